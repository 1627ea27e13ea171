"""What convert leaves, what it says about that, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastconv
from fastconv._report import conversion_report
from fastconv.convert import convert, revert


class WeightStandardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def odd_model():
    model = nn.ModuleDict(
        {
            "plain": nn.Conv2d(3, 3, 3),
            "subclass": WeightStandardised(3, 3, 3),
            "lazy": nn.LazyConv2d(3, 3),
            "complex": nn.Conv2d(3, 3, 3, dtype=torch.complex64),
            "replaced": nn.MaxPool2d(2),
            "ours": fastconv.Conv2d(3, 3, 3),
            "unwanted": nn.Conv2d(3, 3, 3),
            "scripted": torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 3))),
            "compiled": torch.compile(nn.Conv2d(3, 3, 3)),
            "quantised": torch.ao.nn.quantized.Conv2d(3, 3, 3),
            "other": nn.ConvTranspose2d(3, 3, 3),
        }
    )
    model["replaced"].forward = lambda x: x
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_left_and_why(inplace):
    model = convert(odd_model(), filter_fn=lambda name, _: name != "unwanted", inplace=inplace)
    report = conversion_report(model)
    assert [entry.name for entry in report.swapped] == ["plain"]
    assert {entry.name: entry.note.split(";")[0] for entry in report.left} == {
        "subclass": "a subclass of torch.nn.Conv2d, which may compute something else",
        "lazy": "not initialised yet",
        "complex": "its weight is torch.complex64",
        "replaced": "forward is replaced on the object itself",
        "unwanted": "filter_fn returned False",
        "scripted": "compiled by torch.jit",
        "compiled": "compiled by torch.compile",
        "quantised": "quantised",
    }
    assert report is model.fastconv_report
    text = str(report)
    assert text.splitlines()[0] == "fastconv.convert: 1 swapped, 8 left"
    assert "plain      torch.nn.Conv2d -> fastconv.Conv2d" in text
    assert "subclass   WeightStandardised: a subclass" in text


def test_lazy_layer_is_converted_once_it_has_run():
    model = nn.Sequential(nn.LazyConv2d(4, 3))
    model(torch.zeros(1, 3, 5, 5))
    assert type(convert(model)[0]) is fastconv.Conv2d


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrong_models_are_refused():
    with pytest.raises(TypeError, match=r"model is list, expected a torch.nn.Module"):
        convert([nn.Conv2d(1, 1, 1)])
    with pytest.raises(TypeError, match="then compile it"):
        convert(torch.compile(nn.Conv2d(1, 1, 1)))
    with pytest.raises(TypeError, match="then script or trace it"):
        revert(torch.jit.script(nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match="carries no report"):
        conversion_report(nn.Conv2d(1, 1, 1))
