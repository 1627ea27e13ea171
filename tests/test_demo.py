"""The demo: its data, a short run of it, and that each of its checks can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the sanitized tree has no examples", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import mnist  # noqa: E402
import train_lenet  # noqa: E402


def test_digits_are_stratified_normalised_and_apart():
    digits = mnist.load()
    assert digits.train_images.shape == (4000, 1, 32, 32)
    assert digits.test_images.shape == (1000, 1, 32, 32)
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert digits.test_labels.bincount().tolist() == [100] * 10
    assert abs(digits.train_images.mean().item()) < 1e-4
    assert abs(digits.train_images.std().item() - 1) < 1e-4
    # The padding is background.
    assert torch.all(digits.train_images[:, :, :2] == digits.train_images.min())
    seen = {image.numpy().tobytes() for image in digits.train_images}
    assert not [image for image in digits.test_images if image.numpy().tobytes() in seen]


def test_the_split_follows_the_seed_and_the_test_set_does_not_follow_the_size():
    first, again, other = mnist.load(), mnist.load(), mnist.load(seed=1)
    assert torch.equal(first.train_images, again.train_images)
    assert not torch.equal(first.test_images, other.test_images)
    assert torch.equal(mnist.load(train=500).test_labels, first.test_labels)
    with pytest.raises(ValueError, match="multiples of 10"):
        mnist.load(train=4500)


def test_augmentation_moves_digits_but_keeps_background_and_seed():
    images = mnist.load(train=100).train_images
    first = train_lenet.augment(images, torch.Generator().manual_seed(3))
    again = train_lenet.augment(images, torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    assert not torch.equal(first, images)
    assert first.shape == images.shape
    torch.testing.assert_close(first[:, :, 0, 0], images[:, :, 0, 0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_short_demo_runs_and_draws(tmp_path):
    picture = tmp_path / "deep" / "demo.png"
    command = [
        sys.executable,
        str(EXAMPLES / "train_lenet.py"),
        "--epochs=2",
        "--train=1000",
        "--require=70",
        f"--picture={picture}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "conv2d" in result.stdout
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


GOOD_KERNELS = {
    f"{op}/tiled": 7
    for op in ("conv2d", "conv2d_weight_grad", "conv2d_input_grad", "avg_pool2d", "avg_pool2d_backward")
}


def make_run(name: str, *, loss: float = 2.0, accuracy: float = 98.0, kernels: dict[str, int] | None = None):
    run = train_lenet.Run(name, torch.nn.Identity())
    run.step_losses, run.accuracies = [loss] * 20, [accuracy]
    run.kernels = {} if kernels is None else kernels
    return run


def test_a_good_demo_reports_no_failure():
    assert train_lenet.failures(make_run("fastconv", kernels=GOOD_KERNELS), make_run("torch.nn"), 97.0) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"kernels": {**GOOD_KERNELS, "torch/conv2d": 1}}, {}, "handed to torch"),
        ({"kernels": {}}, {}, "no fastconv kernel for conv2d ran"),
        ({"kernels": {**GOOD_KERNELS, "avg_pool2d/tiled": 0}}, {}, "no fastconv kernel for avg_pool2d ran"),
        ({"kernels": GOOD_KERNELS, "loss": 2.01}, {}, "the first losses differ"),
        ({"kernels": GOOD_KERNELS, "loss": float("nan")}, {}, "the first losses differ"),
        ({"kernels": GOOD_KERNELS, "accuracy": 96.9}, {}, "test accuracy is 96.9 %"),
        ({"kernels": GOOD_KERNELS, "accuracy": float("nan")}, {}, "test accuracy is nan"),
        ({"kernels": GOOD_KERNELS}, {"kernels": GOOD_KERNELS}, "compares nothing"),
    ],
)
def test_each_check_of_the_demo_can_fail(ours, theirs, message):
    problems = train_lenet.failures(make_run("fastconv", **ours), make_run("torch.nn", **theirs), 97.0)
    assert any(message in problem for problem in problems), problems
