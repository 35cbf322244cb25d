"""LoRA adapters: put on a backbone, as dictionaries of tensors, as folders."""

from .files import load_adapter, save_adapter
from .lora import AdaptedBackbone, attach
from .state import Adapter, adapter_bytes, client_adapter, delta, repeat_adapter, stack_adapters

__all__ = [
    "AdaptedBackbone", "Adapter", "adapter_bytes", "attach", "client_adapter", "delta", "load_adapter",
    "repeat_adapter", "save_adapter", "stack_adapters",
]  # fmt: skip
