"""torch's own module cases (torch.testing._internal): same constructor, same initial values, same results."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from reference import assert_as_good, kernel_counts, or_from_float32, tensors_in
from torch import nn
from torch.testing._internal.common_modules import module_db

import fastconv
from fastconv.stats import reset_stats

pytestmark = pytest.mark.usefixtures("poisoned")

KERNELS = {
    "Conv2d": "conv2d",
    "MaxPool2d": "max_pool2d_with_offsets",
    "AvgPool2d": "avg_pool2d",
    "AdaptiveAvgPool2d": "adaptive_avg_pool2d",
    "LocalResponseNorm": "local_response_norm",
}
# LazyConv2d is left out: it turns into torch.nn.Conv2d itself, which fastconv.convert then swaps.
INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in KERNELS}


def cases(name: str, dtype: torch.dtype, training: bool) -> list[Any]:
    info = INFOS[name]
    found = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    assert len(found) >= 3
    return found


def build(cls: type[nn.Module], case: Any, dtype: torch.dtype, training: bool) -> nn.Module:
    torch.manual_seed(5)
    constructor = case.constructor_input
    return cls(*constructor.args, **constructor.kwargs).to(dtype).train(training)


def results(module: nn.Module, case: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    inputs = [t.detach().to(dtype).requires_grad_() for t in case.forward_input.args]
    outputs = tensors_in(module(*inputs, **case.forward_input.kwargs))
    grads = torch.autograd.grad(outputs[0].square().sum(), [*inputs, *module.parameters()])
    return [t.detach() for t in outputs] + list(grads)


def test_every_module_has_its_cases():
    assert set(INFOS) == set(KERNELS)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_cases(name, dtype, training):
    for number, case in enumerate(cases(name, dtype, training)):
        mine = build(getattr(fastconv, name), case, dtype, training)
        theirs, exact = (build(getattr(nn, name), case, d, training) for d in (dtype, torch.float64))
        exact.load_state_dict(mine.state_dict())
        assert isinstance(mine, getattr(nn, name))
        assert repr(mine) == repr(theirs)
        assert mine.state_dict().keys() == theirs.state_dict().keys()
        for key, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]), f"{key} is initialised differently"
        reset_stats()
        actual = results(mine, case, dtype)
        counts = kernel_counts()
        torchs = or_from_float32(lambda d, case=case, theirs=theirs: results(theirs.to(d), case, d), dtype)
        triples = zip(actual, torchs, results(exact, case, torch.float64), strict=True)
        for part, triple in enumerate(triples):
            assert_as_good(*triple, f"result {part} of {name} case {number} ({case.desc})", allowed_roundings=8)
        assert KERNELS[name] in {kernel.split("/")[0] for kernel in counts}, counts
        assert not [kernel for kernel in counts if kernel.startswith("torch/")]


@pytest.mark.parametrize("name", KERNELS)
def test_copies_compute_the_same(name):
    for case in cases(name, torch.float32, True):
        module = build(getattr(fastconv, name), case, torch.float32, True)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(twin) is type(module)
            for one, two in zip(results(module, case, torch.float32), results(twin, case, torch.float32), strict=True):
                assert torch.equal(one, two)


@pytest.mark.parametrize("name", [name for name, info in INFOS.items() if info.module_error_inputs_func])
def test_error_cases(name):
    info = INFOS[name]
    found = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=False)
    for case in found:
        given = case.module_error_input
        module = getattr(fastconv, name)(*given.constructor_input.args, **given.constructor_input.kwargs)
        with pytest.raises(case.error_type, match=case.error_regex):
            module(*given.forward_input.args, **given.forward_input.kwargs)
