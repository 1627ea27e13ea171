"""The short way of plain eager calls: who takes it, who must not, and that refusals lose nothing on it."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv import _eager, functional
from fastconv.fused import fused_conv2d

CALLS = {
    "conv2d": lambda x: functional.conv2d(x, torch.ones(2, 3, 3, 3), None, 1, (1, 0)),
    "conv2d_fused": lambda x: fused_conv2d(x, torch.ones(2, 3, 3, 3), None, torch.ones(2), None, (1, 1), (1, 0, 1, 0)),
    "max_pool2d": lambda x: functional.max_pool2d(x, 2, None, (1, 0)),
    "avg_pool2d": lambda x: functional.avg_pool2d(x, (2, 3), 1),
    "adaptive_avg_pool2d": lambda x: functional.adaptive_avg_pool2d(x, 2),
}
TORCH = {
    "conv2d": lambda x: torch.nn.functional.conv2d(x, torch.ones(2, 3, 3, 3), None, 1, (1, 0)),
    "conv2d_fused": lambda x: torch.nn.functional.conv2d(x, torch.ones(2, 3, 3, 3), torch.ones(2), 1, (1, 0)),
    "max_pool2d": lambda x: torch.nn.functional.max_pool2d(x, 2, None, (1, 0)),
    "avg_pool2d": lambda x: torch.nn.functional.avg_pool2d(x, (2, 3), 1),
    "adaptive_avg_pool2d": lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 2),
}


@pytest.fixture
def short_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts results that the short way gave."""
    counted: Counter[str] = Counter()

    def counting(name, function):
        def run(*args):
            result = function(*args)
            if result is not None:
                counted[name] += 1
            return result

        return run

    for name in CALLS:
        monkeypatch.setattr(_eager, name, counting(name, getattr(_eager, name)))
    return counted


def images(requires_grad: bool = True) -> torch.Tensor:
    whole = torch.randint(-4, 5, (2, 3, 6, 7), generator=torch.Generator().manual_seed(0))
    return whole.float().requires_grad_(requires_grad)


@pytest.mark.parametrize("name", CALLS)
def test_plain_calls_take_it(name, short_calls):
    x = images(requires_grad=False)
    assert torch.equal(CALLS[name](x), TORCH[name](x))
    with torch.no_grad():
        assert torch.equal(CALLS[name](images()), TORCH[name](x))
    with torch.inference_mode():
        assert torch.equal(CALLS[name](x.clone()), TORCH[name](x))
    assert short_calls == {name: 3}
    assert not [key for key in fastconv.stats() if key.startswith("torch/")]


@pytest.mark.parametrize("name", CALLS)
def test_watched_calls_do_not(name, short_calls):
    x = images(requires_grad=False)
    assert CALLS[name](images()).requires_grad
    assert torch.equal(torch.func.vmap(lambda row: CALLS[name](row[None]))(x), TORCH[name](x)[:, None])
    torch.func.jvp(CALLS[name], (x,), (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # about sizes that become constants
        torch.jit.trace(CALLS[name], (x,), check_trace=False)
    with FlopCounterMode(display=False) as counter:
        CALLS[name](x)
    assert (counter.get_total_flops() > 0) == name.startswith("conv2d")
    assert not short_calls


def test_a_trained_weight_or_bias_does_not(short_calls):
    x, weight, bias = images(requires_grad=False), torch.ones(2, 3, 3, 3), torch.ones(2)
    assert functional.conv2d(x, weight.clone().requires_grad_(), bias).requires_grad
    assert functional.conv2d(x, weight, bias.clone().requires_grad_()).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.conv2d(x, weight, bias).dtype == torch.bfloat16
    assert not short_calls


def test_negated_views_are_resolved(short_calls):
    """A view of a conjugate's imaginary part carries its sign as a flag that only torch's dispatcher knows."""
    x = torch.complex(images(requires_grad=False), images(requires_grad=False)).conj().imag
    assert x.is_neg()
    assert torch.equal(functional.conv2d(x, torch.ones(2, 3, 3, 3)), TORCH["conv2d"](x.resolve_neg())[:, :, 1:-1])
    assert short_calls == {"conv2d": 1}


@pytest.mark.parametrize(
    "call",
    [
        lambda x: functional.conv2d(x, torch.ones(2, 4, 3, 3)),
        lambda x: functional.conv2d(x, torch.ones(2, 3, 3, 3), stride=0),
        lambda x: functional.conv2d(x, torch.ones(2, 3, 3, 3), padding=(-1, 0)),
        lambda x: functional.conv2d(x, torch.ones(2, 3, 3, 3), stride=(1.5, 1)),  # type: ignore[arg-type]
        lambda x: functional.max_pool2d(x, 2, padding=2),
        lambda x: functional.avg_pool2d(x, 9),
        lambda x: functional.adaptive_avg_pool2d(x, -1),
    ],
)
def test_refused_calls_are_explained_by_the_long_way(call, short_calls):
    with pytest.raises((RuntimeError, TypeError), match=r"fastconv\.\w+: .*expected|larger than the padded input"):
        call(images(requires_grad=False))
    assert not short_calls


def test_empty_tensors_are_left_to_the_long_way(short_calls):
    assert functional.conv2d(torch.ones(0, 3, 6, 6), torch.ones(2, 3, 3, 3)).shape == (0, 2, 4, 4)
    assert functional.max_pool2d(torch.ones(0, 3, 6, 6), 2).shape == (0, 3, 3, 3)
    assert not short_calls
