"""Bad input: the same exception type as torch, its words, and what fastconv got and wanted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastconv
from fastconv import functional
from fastconv.ops import conv2d as raw_conv2d
from fastconv.stats import stats

Call = tuple[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]], str]


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def case(function: str, wanted: str, *arguments: Any, **keywords: Any) -> Any:
    """A call that must fail, and a pattern that must be in fastconv's line of the message."""
    words = [str(tuple(a.shape)) if isinstance(a, Tensor) else repr(a) for a in arguments]
    words += [f"{name}={value!r}" for name, value in keywords.items()]
    return pytest.param(function, arguments, keywords, wanted, id=f"{function}-{'-'.join(words)}".replace(" ", "")[:90])


IMAGE, WEIGHT = x(2, 4, 6, 6), x(8, 4, 3, 3)
BAD_CONVOLUTIONS = [
    # rank
    case("conv2d", r"\(2, 4\).*expected \(N, C, H, W\)", x(2, 4), WEIGHT),
    case("conv2d", r"\(1, 2, 4, 6, 6\).*expected \(N, C, H, W\)", x(1, 2, 4, 6, 6), WEIGHT),
    case("conv2d", r"expected .*\(K, C / groups, R, S\)", IMAGE, x(8, 4, 3)),
    case("conv2d", r"bias has shape \(8, 1\), expected \(8,\)", IMAGE, WEIGHT, x(8, 1)),
    # channels and groups
    case("conv2d", r"weight.size\(1\) is 3 and input has 4 channels", IMAGE, x(8, 3, 3, 3)),
    case("conv2d", r"groups = 2", IMAGE, WEIGHT, groups=2),
    case("conv2d", r"multiple of groups = 4", IMAGE, x(6, 1, 3, 3), groups=4),
    case("conv2d", r"groups is 0, expected an integer of at least 1", IMAGE, WEIGHT, groups=0),
    case("conv2d", r"groups is -1", IMAGE, WEIGHT, groups=-1),
    case("conv2d", r"bias has shape \(7,\), expected \(8,\)", IMAGE, WEIGHT, x(7)),
    # dtypes
    case("conv2d", r"float32 and torch.float64, expected one dtype", IMAGE, x(8, 4, 3, 3, dtype=torch.float64)),
    case("conv2d", r"torch.float16 and torch.float32", x(2, 4, 6, 6, dtype=torch.float16), WEIGHT),
    case("conv2d", r"expected one dtype", IMAGE, WEIGHT, x(8, dtype=torch.bfloat16)),
    case("conv2d", r"int64, conv2d has kernels for float32", x(2, 4, 6, 6, dtype=torch.int64), WEIGHT),
    # numbers
    case("conv2d", r"padding is \(-1, -1\), expected no negative", IMAGE, WEIGHT, padding=-1),
    case("conv2d", r"padding is \(0, -2\)", IMAGE, WEIGHT, padding=(0, -2)),
    case("conv2d", r"stride is \(0, 0\)", IMAGE, WEIGHT, stride=0),
    case("conv2d", r"stride is \(1, -1\)", IMAGE, WEIGHT, stride=(1, -1)),
    case("conv2d", r"dilation \(0, 0\)", IMAGE, WEIGHT, dilation=0),
    case("conv2d", r"integers", IMAGE, WEIGHT, stride=(1, 1, 1)),
    case("conv2d", r"integers", IMAGE, WEIGHT, padding=(1, 1, 1)),
    case("conv2d", r"integers", IMAGE, WEIGHT, stride=1.5),
    case("conv2d", r"padding is 'full', expected 'same', 'valid'", IMAGE, WEIGHT, padding="full"),
    case("conv2d", r"padding is 'same' and stride \(2, 2\)", IMAGE, WEIGHT, padding="same", stride=2),
    # the kernel against the padded input
    case("conv2d", r"larger than the padded input, 6 x 6", IMAGE, x(8, 4, 7, 3)),
    case("conv2d", r"larger than the padded input, 8 x 8", IMAGE, WEIGHT, padding=1, dilation=4),
    case("conv2d", r"larger than the padded input", x(1, 4, 0, 6), WEIGHT),
    case("conv2d", r"no empty H or W", x(1, 4, 0, 6), WEIGHT, padding=2),
    # things that are no tensors
    case("conv2d", r"input is list, expected a Tensor", [[1.0]], WEIGHT),
    case("conv2d", r"weight is NoneType", IMAGE, None),
]
BAD_POOLS = [
    *(
        bad
        for name in ("max_pool2d", "avg_pool2d")
        for bad in (
            case(name, r"expected \(N, C, H, W\) or \(C, H, W\)", x(4, 6), 2),
            case(name, r"expected \(N, C, H, W\) or \(C, H, W\)", x(1, 2, 4, 6, 6), 2),
            case(name, r"no empty C, H or W", x(2, 0, 6, 6), 2),
            case(name, r"kernel_size is \(0, 0\)", IMAGE, 0),
            case(name, r"kernel_size is None", IMAGE, (2, 2, 2)),
            case(name, r"stride is \(0, 0\)", IMAGE, 2, stride=0),
            case(name, r"padding is \(-1, -1\)", IMAGE, 2, padding=-1),
            case(name, r"padding is \(2, 2\), expected at most half", IMAGE, 3, padding=2),
            case(name, r"larger than the padded input, 6 along H", IMAGE, 7),
            case(name, r"input is str, expected a Tensor", "image", 2),
        )
    ),
    case("max_pool2d", r"dilation is \(0, 0\)", IMAGE, 2, dilation=0),
    case("max_pool2d", r"larger than the padded input", IMAGE, 3, dilation=3),
    case("max_pool2d", r"bool", x(2, 4, 6, 6, dtype=torch.bool), 2),
    case("avg_pool2d", r"divisor_override is 0", IMAGE, 2, divisor_override=0),
    case("adaptive_avg_pool2d", r"expected \(N, C, H, W\)", x(4, 6), (1, 1)),
    case("adaptive_avg_pool2d", r"expected \(N, C, H, W\)", x(1, 2, 4, 6, 6), (2, 2)),
    case("adaptive_avg_pool2d", r"none of C, H, W empty", x(2, 4, 0, 6), (2, 2)),
    case("adaptive_avg_pool2d", r"output_size is \(1, 1, 1\)", IMAGE, (1, 1, 1)),
    case("adaptive_avg_pool2d", r"output_size is -1|output_size is \(-1, -1\)", IMAGE, -1),
    case("adaptive_avg_pool2d", r"int64", x(2, 4, 6, 6, dtype=torch.int64), 1),
    case("local_response_norm", r"at least 3 dimensions", x(4, 6), 2),
    case("local_response_norm", r"size is 0, expected an integer of at least 1", IMAGE, 0),
]


@pytest.mark.sanitize
@pytest.mark.parametrize(("function", "arguments", "keywords", "wanted"), [*BAD_CONVOLUTIONS, *BAD_POOLS])
def test_same_type_as_torch_and_what_was_wanted(function, arguments, keywords, wanted):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        getattr(torch.nn.functional, function)(*arguments, **keywords)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(functional, function)(*arguments, **keywords)
    assert type(ours.value) is type(theirs.value)
    first, _, line = str(ours.value).rpartition("\n")
    # torch lists the types of an unknown combination of arguments; defaults are among them here.
    torchs = str(theirs.value).partition(" received an invalid combination")[0]
    assert first.startswith(torchs), "torch's own words must stay"
    assert line.startswith(f"fastconv.{function}: "), line
    assert re.search(wanted, line), line
    assert stats() == {}, "a call that failed is not a call that ran"


@pytest.mark.parametrize(("function", "arguments", "keywords", "wanted"), BAD_CONVOLUTIONS[:3])
def test_errors_are_chained_to_nothing(function, arguments, keywords, wanted):
    """One traceback, not "during handling of the above exception, another exception occurred"."""
    with pytest.raises(RuntimeError) as caught:
        getattr(functional, function)(*arguments, **keywords)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("there", ["input", "weight", "bias"])
def test_mixed_devices_end_as_in_torch(there):
    """Whether that is an error depends on torch; a kernel of ours may not read the tensor that is not here."""
    tensors = {"input": IMAGE, "weight": WEIGHT, "bias": x(8)}
    tensors[there] = tensors[there].to("meta")
    results = []
    for function in (torch.nn.functional.conv2d, functional.conv2d):
        try:
            results.append(function(**tensors).device)
        except (RuntimeError, NotImplementedError) as error:
            results.append(type(error))
    assert results[0] == results[1]
    assert "conv2d/tiled" not in stats()


def test_layers_fail_as_torchs_do():
    for build in (lambda m: m.Conv2d(4, 8, 3), lambda m: m.MaxPool2d(9), lambda m: m.AvgPool2d(9)):
        mine, theirs = build(fastconv), build(torch.nn)
        for bad in (x(2, 3), x(1, 3, 2, 2), x(1, 1, 1, 1, 1)):
            with pytest.raises(Exception) as wanted:  # noqa: PT011
                theirs(bad)
            with pytest.raises(type(wanted.value)) as caught:
                mine(bad)
            assert type(caught.value) is type(wanted.value)
            assert "fastconv." in str(caught.value)
    with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
        fastconv.Conv2d(4, 8, 3, groups=3)


ARGUMENTS = ((1, 1), (0, 0, 0, 0), (1, 1), 1)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("wanted", "call"),
    [
        (r"input has shape \(4, 6, 6\), expected 4 dimensions", lambda op: op(x(4, 6, 6), WEIGHT, None, *ARGUMENTS)),
        (r"expected values of at least 1", lambda op: op(IMAGE, WEIGHT, None, (0, 1), *ARGUMENTS[1:])),
        (r"negative padding", lambda op: op(IMAGE, WEIGHT, None, (1, 1), (0, -1, 0, 0), (1, 1), 1)),
        (r"groups is 0", lambda op: op(IMAGE, WEIGHT, None, *ARGUMENTS[:3], 0)),
        (r"not divisible by groups = 3", lambda op: op(IMAGE, WEIGHT, None, *ARGUMENTS[:3], 3)),
        (r"weight.size\(1\) is 4, expected .* = 2", lambda op: op(IMAGE, WEIGHT, None, *ARGUMENTS[:3], 2)),
        (r"more than the padded input", lambda op: op(IMAGE, x(8, 4, 9, 9), None, *ARGUMENTS)),
        (r"bias has shape \(7\), expected \(8\)", lambda op: op(IMAGE, WEIGHT, x(7), *ARGUMENTS)),
        (r"different dtypes", lambda op: op(IMAGE, WEIGHT.double(), None, *ARGUMENTS)),
        (r"expected float32, float64", lambda op: op(IMAGE.int(), WEIGHT.int(), None, *ARGUMENTS)),
    ],
)
def test_raw_ops_check_for_themselves(wanted, call):
    """Whoever calls the ops directly gets a reason too, and no memory is touched."""
    with pytest.raises(RuntimeError, match=wanted):
        call(raw_conv2d.conv2d)


@pytest.mark.sanitize
def test_raw_gradients_check_for_themselves():
    with pytest.raises(RuntimeError, match=r"grad_output has shape .*, expected \(2, 8, 4, 4\)"):
        raw_conv2d.conv2d_input_grad(x(2, 8, 5, 4), WEIGHT, (6, 6), *ARGUMENTS)
    with pytest.raises(RuntimeError, match=r"grad_output has shape .*, expected \(2, 8, 4, 4\)"):
        raw_conv2d.conv2d_weight_grad(x(2, 8, 4, 3), IMAGE, (3, 3), *ARGUMENTS)
    with pytest.raises(RuntimeError, match="expected values of at least 1"):
        raw_conv2d.conv2d_weight_grad(x(2, 8, 4, 4), IMAGE, (0, 3), *ARGUMENTS)


def test_a_named_kernel_is_not_exchanged_for_torchs():
    numbers = torch.ones(1, 1, 3, 3, dtype=torch.int64)
    assert functional.conv2d(numbers, numbers).item() == 9
    with pytest.raises(RuntimeError, match="algo=.tiled. does not serve .*int64"):
        functional.conv2d(numbers, numbers, algo="tiled")


@pytest.mark.parametrize("recording", [False, True], ids=["plain", "grad"])
def test_out_of_memory_has_torchs_words(recording):
    image = torch.zeros(1, 1, 4, 4, requires_grad=recording)
    weight = torch.zeros(64, 1, 1, 1)
    for call in (
        lambda: functional.conv2d(image, weight, padding=1_000_000),
        lambda: functional.adaptive_avg_pool2d(image, 8_000_000),
    ):
        with pytest.raises(RuntimeError, match="you tried to allocate [0-9]+ bytes|out of memory"):
            call()
