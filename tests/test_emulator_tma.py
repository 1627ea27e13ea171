"""The emulator's TMA against what was measured on an H100.

The facts' numbers are those of csrc/emulator/README.md; the model here is written from them, not from the emulator.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from emulator_kernels import NAN, WGMMA, integers, library
from emulator_library import ConvProblem

# ---------------------------------------------------------------- what is known of TMA


def _corners(r: int, s: int, pad: tuple[int, int], dilation: int) -> list[int]:
    """Fact 2, {w, h}: lower = -pad, upper = pad - (taps - 1) * dilation."""
    return [-pad[1], -pad[0], pad[1] - (s - 1) * dilation, pad[0] - (r - 1) * dilation]


def _want_box(x: torch.Tensor, case: dict[str, int], first: int, tap: tuple[int, int], c0: int) -> torch.Tensor:
    """Facts 3, 6, 7: output pixels in order, over rows and images; zeros outside the tensor; [pixels, channels]."""
    n_images, channels, height, width = x.shape
    box = torch.zeros(case["pixels"], case["channels"], dtype=torch.int16)
    p, q = case["p"], case["q"]
    for i in range(case["pixels"]):
        n, rest = divmod(first + i, p * q)
        h = rest // q * case["stride"] - case["pad_h"] + tap[0] * case["dilation"]
        w = rest % q * case["stride"] - case["pad_w"] + tap[1] * case["dilation"]
        if 0 <= n < n_images and 0 <= h < height and 0 <= w < width:
            stop = min(c0 + case["channels"], channels)
            box[i, : stop - c0] = x[n, c0:stop, h, w].view(torch.int16)
    return box


def _swizzled(box: torch.Tensor) -> torch.Tensor:
    """Fact 8: the 16-byte chunk's number XOR address bits 7-9 (128-byte rows), 7-8 (64), 7 (32)."""
    row_bytes = 2 * box.shape[1]
    mask = {128: 7, 64: 3, 32: 1}.get(row_bytes, 0)
    chunk = torch.arange(box.numel() // 8)
    out = torch.empty_like(box).view(-1, 8)
    out[chunk ^ (chunk * 16 >> 7 & mask)] = box.reshape(-1, 8)
    return out.view(-1)


BOXES = [  # n, c, h, w, r, s, stride, pad, dilation, pixels, channels of a box
    (3, 24, 7, 7, 3, 3, 1, (1, 1), 1, 64, 16),
    (3, 24, 8, 17, 1, 5, 2, (0, 2), 1, 64, 16),
    (2, 64, 9, 14, 3, 5, 1, (1, 2), 1, 64, 64),
    (2, 64, 9, 14, 5, 1, 1, (2, 0), 1, 64, 64),
    (2, 40, 14, 14, 3, 3, 2, (1, 1), 1, 128, 64),
    (2, 8, 15, 10, 3, 3, 3, (1, 2), 2, 128, 64),
    (3, 136, 12, 9, 3, 3, 1, (2, 2), 2, 192, 64),
    (1, 32, 15, 16, 3, 3, 1, (1, 1), 1, 512, 32),
    (1, 16, 30, 31, 3, 3, 1, (1, 1), 1, 1024, 16),
    (2, 8, 14, 14, 3, 3, 1, (1, 1), 1, 128, 8),
    (1, 64, 33, 20, 11, 11, 4, (2, 2), 1, 64, 64),
]


@pytest.mark.parametrize("pair", [0, 1])
@pytest.mark.parametrize("shape", BOXES, ids=str)
def test_im2col_boxes(shape: tuple[int, ...], pair: int) -> None:
    """Facts 1 to 3 and 6 to 9, tiles past the last image and before the first included."""
    n, c, h, w, r, s, stride, pad, dilation, pixels, channels = shape
    x = integers(n, c, h, w, low=1, high=1000).half().contiguous(memory_format=torch.channels_last)
    weight = torch.empty(1, c, r, s).half()
    problem = ConvProblem.of(x, weight, (stride, stride), (pad[0], pad[1], pad[0], pad[1]), (dilation, dilation))
    p = (h + 2 * pad[0] - dilation * (r - 1) - 1) // stride + 1
    q = (w + 2 * pad[1] - dilation * (s - 1) - 1) // stride + 1
    case = {"p": p, "q": q, "stride": stride, "pad_h": pad[0], "pad_w": pad[1], "dilation": dilation}
    case |= {"pixels": pixels, "channels": channels}
    starts: list[tuple[int, ...]] = []
    want: list[torch.Tensor] = []
    for first in (0, pixels, n * p * q - 5, n * p * q, -pixels):
        taps = list(itertools.product(range(r), range(s)))[:: max(1, r * s // 4)]
        for (tap_r, tap_s), c0 in itertools.product(taps, range(0, c, channels)):
            half = pixels // 2
            for begin in (first, first + half) if pair else (first,):
                image, rest = divmod(begin, p * q)
                at_h, at_w = rest // q * stride - pad[0], rest % q * stride - pad[1]
                starts.append((c0, at_w, at_h, image, tap_s * dilation, tap_r * dilation))
                want.append(_swizzled(_want_box(x, case, first, (tap_r, tap_s), c0)))
    out = torch.full((len(starts), pixels * channels), -1, dtype=torch.int16)
    corners = torch.tensor(_corners(r, s, pad, dilation), dtype=torch.int32)
    box = torch.tensor([channels, pixels], dtype=torch.int32)
    flat = torch.tensor(starts, dtype=torch.int32)
    library(files=(WGMMA,)).call("boxes", "im2col", problem, x, corners, box, flat, len(starts), pair, out)
    assert torch.equal(out, torch.stack(want))


@pytest.mark.parametrize("stride", [1, 2])
def test_im2col_stores_write_the_pixels_that_loads_read(stride: int) -> None:
    """The last box ends beyond the last image, where nothing is written."""
    n, c, h, w, pixels = 3, 96, 6, 7, 32
    x = integers(n, c, h, w, low=1, high=1000).half().contiguous(memory_format=torch.channels_last)
    y = torch.full_like(x, -1)
    problem = ConvProblem.of(x, torch.empty(1, c, 1, 1).half(), (stride, stride))
    rows, columns = (h - 1) // stride + 1, (w - 1) // stride + 1
    starts = []
    for first in range(0, n * rows * columns, pixels):
        image, rest = divmod(first, rows * columns)
        starts += [(c0, rest % columns * stride, rest // columns * stride, image, 0, 0) for c0 in (0, 64)]
    box, flat = (torch.tensor(v, dtype=torch.int32) for v in ([64, pixels], starts))
    library(files=(WGMMA,)).call("copy", "im2col", problem, x, box, flat, len(starts), y)
    assert torch.equal(y[:, :, ::stride, ::stride], x[:, :, ::stride, ::stride])
    y[:, :, ::stride, ::stride] = -1
    assert (y == -1).all()


@pytest.mark.parametrize(
    ("start", "error"),
    [
        ((0, -2, -1, 0, 0, 0), r"base w = -2 is outside the box from -1 to 6 \(error 715"),
        ((0, -1, -2, 0, 0, 0), "base h = -2 is outside the box"),
        ((0, 7, -1, 0, 0, 0), "base w = 7 is outside the box"),
        ((0, -1, -1, 0, 256, 0), "offset 256, expected 0 to 255"),
    ],
)
def test_im2col_base_outside_its_box(start: tuple[int, ...], error: str) -> None:
    """Fact 5."""
    x = torch.ones(2, 64, 8, 8).half().contiguous(memory_format=torch.channels_last)
    problem = ConvProblem.of(x, torch.empty(1, 64, 3, 3).half())
    corners, box = (torch.tensor(v, dtype=torch.int32) for v in ([-1, -1, -1, -1], [64, 64]))
    out = torch.empty(64 * 64, dtype=torch.int16)
    with pytest.raises(RuntimeError, match=error):
        library(files=(WGMMA,)).call(
            "boxes", "im2col", problem, x, corners, box, torch.tensor(start, dtype=torch.int32), 1, 0, out
        )


SWIZZLE_128, SWIZZLE_NONE = 3, 0
ENCODINGS = [
    # accepted, c, w, h, then channel box, pixels, swizzle, lower w h, upper w h, step w h, address offset: fact 10
    (True, 64, 28, 28, [64, 128, SWIZZLE_128, -1, -1, -1, -1, 1, 1], 0),
    (False, 128, 28, 28, [72, 128, SWIZZLE_128, -1, -1, -1, -1, 1, 1], 0),
    (True, 64, 28, 28, [32, 128, SWIZZLE_128, -1, -1, -1, -1, 1, 1], 0),
    (True, 64, 28, 28, [128, 128, SWIZZLE_NONE, -1, -1, -1, -1, 1, 1], 0),
    (False, 512, 28, 28, [257, 128, SWIZZLE_NONE, -1, -1, -1, -1, 1, 1], 0),
    (False, 64, 28, 28, [4, 128, SWIZZLE_NONE, -1, -1, -1, -1, 1, 1], 0),
    (False, 3, 28, 28, [64, 128, SWIZZLE_128, -1, -1, -1, -1, 1, 1], 0),
    (False, 4, 28, 28, [64, 128, SWIZZLE_128, -1, -1, -1, -1, 1, 1], 0),
    (True, 8, 28, 28, [64, 128, SWIZZLE_128, -1, -1, -1, -1, 1, 1], 0),
    (True, 64, 28, 28, [64, 1024, SWIZZLE_128, -1, -1, -1, -1, 1, 1], 0),
    (False, 64, 28, 28, [64, 1025, SWIZZLE_128, -1, -1, -1, -1, 1, 1], 0),
    (True, 64, 28, 28, [64, 128, SWIZZLE_128, -128, -128, -1, -1, 1, 1], 0),
    (False, 64, 28, 28, [64, 128, SWIZZLE_128, -129, -1, -1, -1, 1, 1], 0),
    (True, 64, 28, 28, [64, 128, SWIZZLE_128, -1, -1, 127, 127, 1, 1], 0),
    (False, 64, 28, 28, [64, 128, SWIZZLE_128, -1, -1, 128, -1, 1, 1], 0),
    (True, 64, 28, 28, [64, 128, SWIZZLE_128, -1, -1, -1, -1, 8, 8], 0),
    (False, 64, 28, 28, [64, 128, SWIZZLE_128, -1, -1, -1, -1, 9, 1], 0),
    (False, 64, 28, 28, [64, 128, SWIZZLE_128, -1, -1, -1, -1, 0, 1], 0),
    (False, 64, 4, 4, [64, 128, SWIZZLE_128, 0, 0, -4, 0, 1, 1], 0),
    (False, 64, 4, 4, [64, 128, SWIZZLE_128, 0, 0, -6, 0, 1, 1], 0),
    (False, 64, 28, 28, [64, 128, SWIZZLE_128, -1, -1, -1, -1, 1, 1], 8),
    (True, 64, 28, 28, [64, 128, SWIZZLE_128, -1, -1, -1, -1, 1, 1], 16),
]


@pytest.mark.parametrize(("accepted", "c", "w", "h", "values", "offset"), ENCODINGS)
def test_tensor_map_limits(accepted: bool, c: int, w: int, h: int, values: list[int], offset: int) -> None:
    space = torch.empty(1 << 20, dtype=torch.float16)
    base = space[-space.data_ptr() // 2 % 64 :]  # 128-byte aligned
    problem = ConvProblem(4, c, h, w)
    arguments = ("encode", "im2col", problem, base, offset, torch.tensor(values, dtype=torch.int32))
    if accepted:
        library(files=(WGMMA,)).call(*arguments)
    else:
        with pytest.raises(RuntimeError, match="CUDA refused a im2col tensor map|CUDA refused an im2col tensor map"):
            library(files=(WGMMA,)).call(*arguments)


@pytest.mark.parametrize("to_tf32", [0, 1])
def test_rounding_on_load(to_tf32: int) -> None:
    """Fact 11: to nearest, ties to even, and the subnormal that was tried became zero."""
    given = [0x3F800000, 0x3F800FFF, 0x3F801000, 0x3F801001, 0x3F803000, 0x3F801FFF, 0x3F802FFF, 0x00000001]
    rounded = [0x3F800000, 0x3F800000, 0x3F800000, 0x3F802000, 0x3F804000, 0x3F802000, 0x3F802000, 0x00000000]
    space = torch.zeros(64)
    x = space[-space.data_ptr() // 4 % 16 :][:16]
    x[:8] = torch.tensor(given, dtype=torch.int32).view(torch.float32)
    out = torch.full((16,), NAN)
    library(files=(WGMMA,)).call("rounding", "tiled", x, out, to_tf32)
    assert out[:8].view(torch.int32).tolist() == (rounded if to_tf32 else given)


def test_a_store_is_visible_only_after_the_wait_without_read() -> None:
    for full in (0, 1):
        space = torch.zeros(64)
        tensor, seen = space[-space.data_ptr() // 4 % 16 :][:16], torch.full((1,), NAN)
        library(files=(WGMMA,)).call("bulk", "store", tensor, seen, full)
        one = torch.tensor([1], dtype=torch.int32).view(torch.float32)
        assert torch.equal(seen, one if full else torch.zeros(1))
        assert torch.equal(tensor, one.expand(16))  # in the end it is there, as it was when it was stored
