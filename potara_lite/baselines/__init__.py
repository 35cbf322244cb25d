"""The methods that Potara is compared with: any algorithm as a declaration, merges of finished models, sweeps."""
