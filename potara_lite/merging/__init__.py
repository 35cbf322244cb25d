"""Merge adapters, exactly or by factors, compress them, and look at the loss between them."""
