"""Memory in huge pages: the same numbers at the same addresses, and mapped so where the system has such pages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fastconv
from fastconv import _huge_pages
from fastconv._huge_pages import PAGE, advise_huge_pages, collapse_into_huge_pages

MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SMAPS = Path("/proc/self/smaps")


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes in huge pages of the mappings that ``tensor`` lies in."""
    first, last, found, inside = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, 0, False
    for line in SMAPS.read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(address, 16) for address in head.split("-"))
            inside = begin < last and first < end
        elif inside and head == "AnonHugePages:":
            found += int(line.split()[1]) * 1024
    return found


def test_collapsing_changes_neither_numbers_nor_addresses():
    weight = torch.randn(3 * PAGE)
    kept, address = weight.clone(), weight.data_ptr()
    collapse_into_huge_pages(weight)
    assert weight.data_ptr() == address
    assert torch.equal(weight, kept)


@pytest.mark.skipif(
    sys.platform != "linux" or not MODES.exists() or "[never]" in MODES.read_text(), reason="no huge pages here"
)
def test_fresh_memory_is_mapped_in_huge_pages():
    workspace = torch.empty(64 * PAGE, dtype=torch.uint8)
    advise_huge_pages(workspace)
    workspace.fill_(1)
    if huge_bytes(workspace) == 0 and "[always]" not in MODES.read_text():
        pytest.skip("the system has no huge page to give")
    assert huge_bytes(workspace) > 32 * PAGE


def test_what_is_small_or_elsewhere_is_left_alone(monkeypatch):
    def fail(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(_huge_pages, "_madvise", fail)
    for tensor in (torch.empty(PAGE // 2, dtype=torch.uint8), torch.empty(0), torch.empty(PAGE, device="meta")):
        advise_huge_pages(tensor)
        collapse_into_huge_pages(tensor)


def test_a_system_that_refuses_changes_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(_huge_pages, "_madvise", lambda start, length, advice: asked.append(advice) or -1)
    monkeypatch.setattr(sys, "platform", "linux")
    weight = torch.ones(2 * PAGE)
    collapse_into_huge_pages(weight)
    assert len(asked) == 2  # an older system takes a hint instead
    assert weight.sum() == weight.numel()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has such pages")
def test_large_weights_of_a_network_are_collapsed(monkeypatch):
    asked = []
    monkeypatch.setattr(_huge_pages, "_madvise", lambda start, length, advice: asked.append(length.value) or 0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(64, 512, 3, padding=1),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(2048, 1024),
    )
    x = torch.randn(1, 64, 16, 16)
    with torch.no_grad():
        fused = fastconv.fuse(model.eval())
        torch.testing.assert_close(fused(x), model(x))
    assert sum(length >= PAGE for length in asked) >= 2  # the packed filters and the matrix
