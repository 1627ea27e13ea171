"""Trains LeNet-5 on real digits twice from one seed, built of fastconv's layers and of torch.nn's, and compares.

    python examples/train_lenet.py            # about a minute on two cores; the picture is out/demo.png
    python examples/train_lenet.py --help

Fails unless fastconv's network reaches the accuracy asked for, both networks walk the same way, and every convolution
and pooling ran in a fastconv kernel.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time

# Before torch is imported. LeNet-5 has thousands of short parallel loops: threads that spin between them slow training
# twentyfold as soon as another program wants a core, and sleeping costs nothing that can be measured.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mnist
import torch
from picture import draw
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import fastconv
from fastconv.models import LeNet5
from fastconv.models.lenet import Layers

# Rounding differs between the two libraries, and training amplifies it step by step. Over the first steps there is no
# time for that: a larger difference is a wrong gradient.
EARLY_STEPS = 10
EARLY_TOLERANCE = 1e-3


@dataclass
class Run:
    """What training one network left behind."""

    name: str
    model: nn.Module
    step_losses: list[float] = field(default_factory=list)
    epoch_losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=dict)

    @property
    def typical_epoch_seconds(self) -> float:
        return sorted(self.epoch_seconds)[len(self.epoch_seconds) // 2]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 12 degrees, scaled by up to 12 %, slanted by up to 0.2, moved by up to 1.5 pixels."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, scale, slant = uniform(math.radians(12)), 1 + uniform(0.12), uniform(0.2)
    row_x = torch.stack([angle.cos() * scale, slant - angle.sin() * scale, uniform(1.5 / 16)], dim=1)
    row_y = torch.stack([angle.sin() * scale, angle.cos() * scale, uniform(1.5 / 16)], dim=1)
    grid = functional.affine_grid(torch.stack([row_x, row_y], dim=1), list(images.shape), align_corners=False)
    background = images.min()
    return functional.grid_sample(images - background, grid, align_corners=False) + background


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers, in percent. The RBF units give distances: the nearest class wins."""
    with torch.no_grad():
        return 100 * (model(images).argmin(1) == labels).double().mean().item()


def train_epoch(
    run: Run, step: Callable[[Tensor, Tensor], float], digits: mnist.Digits, batches: list[Tensor], images: Tensor
) -> None:
    """One pass over the batches, timed; evaluation is not."""
    begin = time.perf_counter()
    losses = [step(images[rows], digits.train_labels[rows]) for rows in batches]
    run.epoch_seconds.append(time.perf_counter() - begin)
    run.step_losses += losses
    run.epoch_losses.append(sum(losses) / len(losses))
    run.accuracies.append(accuracy(run.model, digits.test_images, digits.test_labels))


def train(name: str, layers: Layers, digits: mnist.Digits, epochs: int, batch: int, seed: int) -> Run:
    """SGD with momentum on the cross entropy of the negated distances; one cycle of the learning rate.

    Weights, augmentation and order of the images follow from the seed alone.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    run = Run(name, LeNet5(layers=layers))
    count = len(digits.train_images)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    steps = epochs * math.ceil(count / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps, pct_start=0.2)

    def step(images: Tensor, labels: Tensor) -> float:
        loss = functional.cross_entropy(-run.model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.item()

    fastconv.reset_stats()
    with tqdm(range(epochs), desc=f"{name:>8}", unit="epoch", ncols=100, file=sys.stdout) as bar:
        for _ in bar:
            images = augment(digits.train_images, generator)
            batches = list(torch.randperm(count, generator=generator).split(batch))
            train_epoch(run, step, digits, batches, images)
            bar.set_postfix_str(f"loss {run.epoch_losses[-1]:6.3f}, test {run.accuracies[-1]:5.1f} %")
    run.kernels = dict(fastconv.stats())
    return run


def early_difference(ours: Run, theirs: Run) -> float:
    """Largest relative difference between the losses of the first steps."""
    pairs = zip(ours.step_losses[:EARLY_STEPS], theirs.step_losses[:EARLY_STEPS], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def report(ours: Run, theirs: Run) -> None:
    """Both runs side by side."""
    print(f"\n{'':26}{ours.name:>12}{theirs.name:>12}")
    epochs = len(ours.epoch_losses)
    for epoch in sorted({0, epochs // 4, epochs // 2, 3 * epochs // 4, epochs - 1}):
        print(f"loss, epoch {epoch + 1:<14}{ours.epoch_losses[epoch]:>12.4f}{theirs.epoch_losses[epoch]:>12.4f}")
    print(f"{'test accuracy':26}{ours.accuracies[-1]:>10.1f} %{theirs.accuracies[-1]:>10.1f} %")
    print(f"{'time per epoch':26}{ours.typical_epoch_seconds:>10.2f} s{theirs.typical_epoch_seconds:>10.2f} s")
    print(
        f"\nlosses of the first {EARLY_STEPS} steps differ by at most {early_difference(ours, theirs):.1e} (relative)"
    )
    print(f"\ncalls per kernel while {ours.name} trained and was tested:")
    for kernel, calls in sorted(ours.kernels.items()):
        print(f"  {kernel:40}{calls:>10,}")


def failures(ours: Run, theirs: Run, required: float) -> list[str]:
    """What went wrong, one sentence each; empty if nothing did."""
    problems = []
    to_torch = {kernel: calls for kernel, calls in ours.kernels.items() if kernel.startswith("torch/")}
    if to_torch:
        problems.append(f"calls were handed to torch, expected none: {to_torch}")
    for op in ("conv2d", "conv2d_weight_grad", "conv2d_input_grad", "avg_pool2d", "avg_pool2d_backward"):
        if not any(kernel.startswith(f"{op}/") and calls > 0 for kernel, calls in ours.kernels.items()):
            problems.append(f"no fastconv kernel for {op} ran; fastconv.stats() counted {sorted(ours.kernels)}")
    if any(theirs.kernels.values()):
        problems.append(f"fastconv ran in torch's twin, so the comparison compares nothing: {theirs.kernels}")
    difference = early_difference(ours, theirs)
    if not difference <= EARLY_TOLERANCE:  # NaN fails too
        problems.append(f"the first losses differ by {difference:.1e}, expected at most {EARLY_TOLERANCE:.0e}")
    if not ours.accuracies[-1] >= required:
        problems.append(f"test accuracy is {ours.accuracies[-1]:.1f} %, expected at least {required:.1f} %")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--train", type=int, default=4000, help="training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--require", type=float, default=97.0, help="test accuracy below which the demo fails, in percent"
    )
    parser.add_argument("--picture", type=Path, default=Path(__file__).resolve().parent.parent / "out" / "demo.png")
    options = parser.parse_args()

    digits = mnist.load(train=options.train, seed=options.seed)
    print(
        f"LeNet-5 on {len(digits.train_images):,} MNIST digits, tested on {len(digits.test_images):,} others; "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    recipe = (digits, options.epochs, options.batch, options.seed)
    ours = train("fastconv", fastconv, *recipe)
    theirs = train("torch.nn", nn, *recipe)
    report(ours, theirs)
    draw(options.picture, ours, theirs, digits)
    print(f"\npicture: {options.picture}")
    problems = failures(ours, theirs, options.require)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
