"""Make ``fashion_mnist.npz``: the first 2,000 training images of each class and the whole test split.

    python data/make_fashion_mnist.py /usr/share/datasets/fashion-mnist   # Debian: dataset-fashion-mnist
    python data/make_fashion_mnist.py FOLDER                              # any folder with the four published files

The images stand in order of their class, and the members of the archive are packed with LZMA, which
``numpy.load`` reads as it reads any other npz. The same input gives the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np

PER_CLASS = {"train": 2000, "test": 1000}


def read_idx(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    def unpack(name: str, offset: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=offset)

    images = unpack(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    return images, unpack(f"{prefix}-labels-idx1-ubyte.gz", 8)


def main(folder: Path, out: Path) -> None:
    arrays = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = read_idx(folder, prefix)
        keep = np.concatenate([np.flatnonzero(labels == k)[: PER_CLASS[split]] for k in range(10)])
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[keep], labels[keep]
    with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue(), zipfile.ZIP_LZMA)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    out.with_suffix(".sha256").write_text(f"{digest}  {out.name}\n")
    print({name: array.shape for name, array in arrays.items()}, out.stat().st_size, digest)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent / "fashion_mnist.npz")
