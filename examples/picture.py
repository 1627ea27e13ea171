"""The demo's picture: loss curves, first-layer filters, digits with their predictions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import matplotlib.ticker
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

if TYPE_CHECKING:
    from mnist import Digits
    from train_lenet import Run

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
OURS, THEIRS, WRONG = "#d1495b", "#9db4c0", "#c1121f"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def draw(path: Path, ours: Run, theirs: Run, digits: Digits) -> None:
    """Writes the picture as PNG, making the folder."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 9.4), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(rect=(0.01, 0.01, 0.98, 0.975), w_pad=0.06, h_pad=0.06)
        curves, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.22], hspace=0.05)
        loss_axes, accuracy_axes = curves.subplots(1, 2, width_ratios=[1.35, 1])
        loss_curves(loss_axes, ours, theirs)
        accuracy_curves(accuracy_axes, ours, theirs)
        filters, examples = bottom.subfigures(1, 2, width_ratios=[1, 2.9])
        filter_tiles(filters, ours)
        prediction_tiles(examples, ours, digits)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def loss_curves(axes: Axes, ours: Run, theirs: Run) -> None:
    """Mean training loss per epoch. Equal gradients put one line on the other: torch's is the broad one."""
    epochs = range(1, len(ours.epoch_losses) + 1)
    axes.plot(
        epochs, theirs.epoch_losses, color=THEIRS, linewidth=7, alpha=0.8, label=theirs.name, solid_capstyle="round"
    )
    axes.plot(epochs, ours.epoch_losses, color=OURS, linewidth=1.8, label=ours.name)
    axes.set(yscale="log", xlabel="epoch", title="Training loss: one seed, two libraries")
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(mpl.ticker.LogFormatter(minor_thresholds=(2, 0.6)))
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper right")


def accuracy_curves(axes: Axes, ours: Run, theirs: Run) -> None:
    """Test accuracy after each epoch, in percent."""
    epochs = range(1, len(ours.accuracies) + 1)
    axes.plot(epochs, theirs.accuracies, color=THEIRS, linewidth=7, alpha=0.8, solid_capstyle="round")
    axes.plot(epochs, ours.accuracies, color=OURS, linewidth=1.8)
    lowest = min(ours.accuracies + theirs.accuracies)
    axes.set(ylim=(max(lowest - 1, 85), 100), xlabel="epoch", title=f"Test accuracy: {ours.accuracies[-1]:.1f} %")
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g %%"))
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))


def bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def filter_tiles(figure: SubFigure, run: Run) -> None:
    """C1's six 5x5 filters on one colour scale: red adds light, blue takes it away."""
    weight = run.model.c1.weight.detach()[:, 0]
    limit = weight.abs().max().item()
    figure.suptitle("First layer: 6 filters, 5 x 5", x=0.04, ha="left", fontsize=11, fontweight="bold")
    for axes, image in zip(figure.subplots(3, 2).flat, weight, strict=True):
        axes.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit)
        bare(axes)


def prediction_tiles(figure: SubFigure, run: Run, digits: Digits, rows: int = 3, columns: int = 9) -> None:
    """Test digits and what the network takes them for: some right ones, then up to a row of wrong ones."""
    with torch.no_grad():
        predicted = run.model(digits.test_images).argmin(1)
    right = predicted == digits.test_labels
    wrong = torch.nonzero(~right).flatten()[:columns]
    good = torch.nonzero(right).flatten()
    good = good[torch.linspace(0, len(good) - 1, rows * columns - len(wrong)).long()]
    figure.suptitle(
        f"Test digits and predictions: {int((~right).sum())} of {len(right):,} are wrong",
        x=0.02, ha="left", fontsize=11, fontweight="bold",
    )  # fmt: skip
    for axes, row in zip(figure.subplots(rows, columns).flat, [*good.tolist(), *wrong.tolist()], strict=True):
        axes.imshow(digits.test_images[row, 0, 2:-2, 2:-2], cmap="gray_r")
        bare(axes)
        if right[row]:
            axes.set_xlabel(str(predicted[row].item()), color=INK, fontsize=12)
        else:
            axes.set_xlabel(
                f"{predicted[row]} (is {digits.test_labels[row]})", color=WRONG, fontsize=11, fontweight="bold"
            )
