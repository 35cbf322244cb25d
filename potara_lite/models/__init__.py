"""Frozen backbones: the lab ViT, torchvision, text encoders and causal language models; their frozen trunk."""
