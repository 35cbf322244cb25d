"""Pre-train the lab ViT on CIFAR-10 in grey at 28×28 and write ``lab_vit.safetensors`` with its checksum.

    python data/pretrain_lab_vit.py --cifar10 PATH_TO/cifar10_jpeg.npz   # JPEG bytes, offsets and labels per split
    python data/pretrain_lab_vit.py --torchvision ~/datasets             # downloads CIFAR-10 through torchvision

Random 28×28 crops of the 32×32 images, mirrored at random; AdamW with a one-cycle schedule; label smoothing 0.1.
The test accuracy is that of the last epoch on the centre crops of CIFAR-10's test split, which chose nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from potara_lite.models.vit import LabViT

GREY = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R 601 luma


def from_npz(path: str, split: str) -> tuple[Tensor, Tensor]:
    from torchvision.io import decode_jpeg

    with np.load(path) as file:
        jpeg, offsets, labels = (file[f"{split}_{part}"] for part in ("jpeg", "offsets", "labels"))
    pixels = [decode_jpeg(torch.from_numpy(jpeg[i:j])) for i, j in zip(offsets, offsets[1:])]
    grey = torch.stack([(image.float() * GREY).sum(0, keepdim=True) for image in pixels]) / 255
    return grey, torch.from_numpy(labels).long()


def from_torchvision(root: str, split: str) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10

    dataset = CIFAR10(root, train=split == "train", download=True)
    colour = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)
    grey = torch.cat([(part.float() * GREY).sum(1, keepdim=True) for part in colour.split(5000)]) / 255
    return grey, torch.tensor(dataset.targets)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random 28×28 crop of each 32×32 image, mirrored with probability ½."""
    rows, columns = torch.randint(0, 5, (2, len(x)), generator=generator)
    windows = x.unfold(2, 28, 1).unfold(3, 28, 1)  # (B, 1, 5, 5, 28, 28)
    crops = windows[torch.arange(len(x)), :, rows, columns]
    mirror = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirror.view(-1, 1, 1, 1), crops.flip(-1), crops)


@torch.no_grad()
def accuracy(model: LabViT, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = sum((model(a).argmax(1) == b).sum().item() for a, b in zip(x[:, :, 2:30, 2:30].split(1000), y.split(1000)))
    return right / len(y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--cifar10", metavar="NPZ")
    source.add_argument("--torchvision", metavar="FOLDER")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", default="data/lab_vit.safetensors")
    for name, default in dict(dim=128, depth=4, heads=4, mlp_ratio=2, stem=3).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    load = (lambda s: from_npz(args.cifar10, s)) if args.cifar10 else (lambda s: from_torchvision(args.torchvision, s))
    (x, y), (x_test, y_test) = load("train"), load("test")

    settings = {name: getattr(args, name) for name in ("dim", "depth", "heads", "mlp_ratio", "stem")}
    model = LabViT(classes=10, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    steps = args.epochs * (len(x) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, steps, pct_start=0.1)
    for epoch in range(args.epochs):
        model.train()
        began, losses = time.time(), []
        for index in torch.randperm(len(x), generator=generator).split(args.batch_size)[: len(x) // args.batch_size]:
            loss = F.cross_entropy(model(augment(x[index], generator)), y[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        score = accuracy(model, x_test, y_test)
        line = f"epoch {epoch + 1}/{args.epochs}  loss {np.mean(losses):.4f}  test {score:.4f}"
        print(f"{line}  {time.time() - began:.0f} s", flush=True)

    out = Path(args.out)
    facts = {
        "settings": json.dumps(settings),
        "dataset": "CIFAR-10, grey, 28x28",
        "test_accuracy": f"{score:.4f}",
        "epochs": str(args.epochs),
        "seed": str(args.seed),
        "torch": torch.__version__,
    }
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out, metadata=facts)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    out.with_suffix(".sha256").write_text(f"{digest}  {out.name}\n")
    print(json.dumps({**facts, "sha256": digest, "bytes": out.stat().st_size}))


if __name__ == "__main__":
    main()
