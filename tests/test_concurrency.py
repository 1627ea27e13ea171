"""Many threads at once, after a fork, with one thread only: right results and no deadlock."""

from __future__ import annotations

import subprocess
import sys
import threading
import traceback
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastconv
from fastconv import functional
from fastconv.stats import stats

TIMEOUT_S = 120  # a deadlock must end as a failure, not as a run that never does


def network(module=fastconv) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        module.Conv2d(3, 16, 3, padding=1), nn.ReLU(), module.MaxPool2d(2),
        module.Conv2d(16, 16, 3, groups=16, padding=1), module.AvgPool2d(2), module.LocalResponseNorm(3),
        module.Conv2d(16, 10, 1), module.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).double()  # fmt: skip


def image(seed: int, size: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Runs work(0) ... work(count - 1) at the same time and reports what failed."""
    failures: list[str] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except Exception:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert not [thread for thread in threads if thread.is_alive()], f"still running after {TIMEOUT_S} s"
    assert not failures, failures[0]


def test_eight_threads_share_a_network():
    net = network()
    sizes = [16 + 4 * number for number in range(8)]
    expected = [network(nn)(image(number, size)).detach() for number, size in enumerate(sizes)]

    def work(number: int) -> None:
        for _ in range(15):
            with torch.no_grad():
                torch.testing.assert_close(net(image(number, sizes[number])), expected[number])

    in_threads(8, work)


def test_eight_threads_train():
    """Forward and backward in every thread, each on a network of its own, against torch's gradients."""
    expected = []
    for number in range(8):
        net = network(nn)
        net(image(number)).square().sum().backward()
        expected.append([parameter.grad for parameter in net.parameters()])
    networks = [network() for _ in range(8)]

    def work(number: int) -> None:
        for _ in range(5):
            networks[number].zero_grad()
            networks[number](image(number)).square().sum().backward()
            grads = [parameter.grad for parameter in networks[number].parameters()]
            torch.testing.assert_close(grads, expected[number])

    in_threads(8, work)


def test_counters_lose_no_call():
    x, w = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)

    def work(number: int) -> None:
        for _ in range(200):
            functional.conv2d(x, w, algo="tiled" if number % 2 else "naive")

    in_threads(8, work)
    assert stats() == {"conv2d/naive": 800, "conv2d/tiled": 800}


class Convolved(Dataset):
    """Each item is computed in the worker, by a process that was forked with a warm thread pool."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        with torch.no_grad():
            result = network()(image(index))
        return result, ",".join(stats())


@pytest.mark.parametrize("threads_in_parent", [1, 4])
def test_dataloader_workers(threads_in_parent):
    torch.set_num_threads(threads_in_parent)
    expected = [network(nn)(image(index)).detach() for index in range(12)]
    network()(image(0))  # the parent's threads are up before the fork
    loader = DataLoader(Convolved(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=TIMEOUT_S)
    for index, (result, ran) in enumerate(loader):
        torch.testing.assert_close(result, expected[index])
        assert "conv2d/" in ran
        assert "torch/" not in ran


def test_backward_after_fork():
    """Autograd refuses to run in a child whose parent has used it, so the child is forked from a fresh process."""
    script = """
import multiprocessing, torch, fastconv
def child(queue):
    torch.set_num_threads(1)  # as torch's own DataLoader does: GNU's OpenMP has no threads after a fork
    layer = fastconv.Conv2d(3, 4, 3).double()
    x = torch.ones(2, 3, 8, 8, dtype=torch.float64)
    layer(x).sum().backward()
    queue.put([float(layer.weight.grad.sum()), float(layer.bias.grad.sum())])
if __name__ == "__main__":
    with torch.no_grad():
        fastconv.Conv2d(3, 64, 3)(torch.ones(4, 3, 64, 64))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    process.join(100)
    assert process.exitcode == 0, process.exitcode
    assert queue.get() == [4 * 27 * 72.0, 4 * 72.0]
    print("done")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.stdout.strip() == "done", result.stderr


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_number_of_threads_changes_nothing(threads):
    first = network()(image(0, 40))
    torch.set_num_threads(threads)
    assert torch.equal(network()(image(0, 40)), first)
    assert torch.get_num_threads() == threads, "a kernel must leave torch's setting alone"


def test_inside_a_parallel_region():
    """A call from one of torch's own pool threads must not wait for the pool."""
    net, expected = network(), network(nn)(image(3)).detach()
    futures = [torch.jit.fork(lambda: net(image(3)).detach()) for _ in range(8)]
    for future in futures:
        torch.testing.assert_close(torch.jit.wait(future), expected)
