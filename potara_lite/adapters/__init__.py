"""LoRA adapters: put on a backbone, as dictionaries of tensors, as folders."""

from .files import export_merged, load_adapter, save_adapter, save_adapters
from .lora import AdaptedBackbone, attach
from .state import Adapter, adapter_bytes, client_adapter, delta, repeat_adapter, stack_adapters

__all__ = [
    "AdaptedBackbone", "Adapter", "adapter_bytes", "attach", "client_adapter", "delta", "export_merged",
    "load_adapter",
    "repeat_adapter", "save_adapter", "save_adapters", "stack_adapters",
]  # fmt: skip
