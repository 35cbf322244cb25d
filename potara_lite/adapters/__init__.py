"""LoRA adapters: put on a backbone, as dictionaries of tensors, as folders."""
