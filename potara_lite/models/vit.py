"""Frozen pre-trained networks: the lab ViT that ships in ``data/``, torchvision ViTs, and any module of yours.

A backbone is an ``nn.Module`` that maps a batch of inputs to logits ``(B, classes)`` and ends in a linear
layer, its *head*. The head is new: it starts at zero and becomes part of the adapter.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checks import PathLike, Size, checked, shown
from ..files import check_file, data_path, reading

LAB_VIT_FILE = "lab_vit.safetensors"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of its channels


class Attention(nn.Module):
    """Multi-head self-attention, written out so that ``vmap`` and forward-mode AD both take it."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim {dim}, which {heads} does not")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)  # (B, T, 3, h, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, T, d)
        weights = (q @ k.transpose(-2, -1) * (dim // self.heads) ** -0.5).softmax(dim=-1)  # (B, h, T, T)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, mlp_ratio * dim)
        self.fc2 = nn.Linear(mlp_ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class LabViT(nn.Module):
    """A small vision transformer for grey 28×28 images in [0, 1], shape ``(B, 1, 28, 28)``.

    The patch embedding is a stack of ``stem`` stride-2 convolutions (Xiao et al., "Early convolutions help
    transformers see better", 2021); tokens are averaged before the head. There is no BatchNorm and no dropout, so a
    sample's logits do not depend on the rest of its batch. The forward pass takes images, or the tokens that ``embed``
    makes of them: with LoRA in the blocks only, embedding a data set once saves that work in every step.
    """

    def __init__(
        self, classes: int = 10, dim: int = 128, depth: int = 4, heads: int = 4, mlp_ratio: int = 2, stem: int = 3
    ):
        super().__init__()
        self.settings = dict(classes=classes, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio, stem=stem)
        widths = [1] + [dim // 2 ** (stem - 1 - i) for i in range(stem)]
        layers: list[nn.Module] = []
        for narrow, wide in zip(widths, widths[1:]):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.GELU()]
        self.stem = nn.Sequential(*layers[:-1])
        side = 28
        for _ in range(stem):
            side = (side + 1) // 2
        self.position = nn.Parameter(0.02 * torch.randn(1, side * side, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Images ``(B, 1, 28, 28)`` to tokens ``(B, T, dim)``: the frozen part below the blocks.

        Raises ``ValueError`` for images of another shape.
        """
        if x.shape[1:] != (1, 28, 28):
            raise ValueError(f"images must be of shape (B, 1, 28, 28), not {tuple(x.shape)}")
        return self.stem((x - 0.5) / 0.25).flatten(2).transpose(1, 2) + self.position

    def features(self, x: Tensor) -> Tensor:
        """The mean token ``(B, dim)`` that the head reads."""
        x = self.embed(x) if x.dim() == 4 else x  # (B, T, dim)
        if x.dim() != 3 or x.shape[2] != self.settings["dim"]:
            raise ValueError(f"tokens must be of shape (B, T, {self.settings['dim']}), not {tuple(x.shape)}")
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@checked
def lab_vit(classes: Size = 10, *, checkpoint: PathLike | None = None) -> LabViT:
    """The lab ViT, pre-trained on CIFAR-10 in grey (``data/pretrain_lab_vit.py``), with a new zero head.

    ``checkpoint`` defaults to the one shipped in ``data/``, whose SHA-256 is checked, as is that of any other with a
    ``.sha256`` file beside it. Raises ``FileError`` (a ``ValueError``) when it is missing, damaged or of another
    network.

    >>> lab_vit()(torch.zeros(2, 1, 28, 28))
    tensor([[0., 0., 0., 0., 0., 0., 0., 0., 0., 0.],
            [0., 0., 0., 0., 0., 0., 0., 0., 0., 0.]], grad_fn=<AddmmBackward0>)
    """
    from safetensors import safe_open

    path = Path(checkpoint) if checkpoint is not None else data_path(LAB_VIT_FILE)
    if checkpoint is None or path.with_suffix(".sha256").is_file():
        check_file(path)
    with reading(path):
        with safe_open(path, framework="pt") as file:
            settings = json.loads(file.metadata()["settings"])
            weights = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in file.keys()}
        if odd := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{odd[0]} has values that are not finite")
        if max(settings["depth"], settings["stem"]) > len(weights):
            raise ValueError(f"a network of {settings} has more than {len(weights)} tensors")
        with torch.device("meta"):  # whatever its size, it takes no memory before the shapes are known to agree
            model = LabViT(classes=classes, **settings)
        head = dict(weight=torch.zeros(classes, len(weights["norm.weight"])), bias=torch.zeros(classes))
        model.load_state_dict(weights | {f"head.{name}": tensor for name, tensor in head.items()}, assign=True)
    return model.eval()


@checked
def torchvision_vit(name: str = "vit_b_16", classes: Size = 10, *, weights: str | None = "DEFAULT") -> nn.Module:
    """A torchvision vision transformer with a new zero head; it resizes images in [0, 1] itself.

    ``weights`` are downloaded by torchvision; ``None`` gives a random network. LoRA targets of its blocks:
    ``targets=("mlp.0", "mlp.3")``, head ``"heads.head"``.
    """
    import torchvision

    model = torchvision.models.get_model(name, weights=weights)
    model.heads.head = nn.Linear(model.heads.head.in_features, classes)
    nn.init.zeros_(model.heads.head.weight)
    nn.init.zeros_(model.heads.head.bias)
    model.register_forward_pre_hook(_imagenet_input)
    return model.eval()


def _imagenet_input(model: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Images in [0, 1] of any size and one or three channels, as a network trained on ImageNet wants them."""
    if inputs[0].dim() != 4 or inputs[0].shape[1] not in (1, 3) or not inputs[0].is_floating_point():
        raise ValueError(f"images must be floats (B, 1 or 3, height, width), not {shown(inputs[0])}")
    x = nn.functional.interpolate(inputs[0], size=(224, 224), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values, device=x.device, dtype=x.dtype).view(3, 1, 1) for values in IMAGENET)
    return ((x - mean) / std,)
