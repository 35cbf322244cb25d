"""All clients at once: batching, one batch of one network, training, rounds of FedIT, per-sample gradients."""
