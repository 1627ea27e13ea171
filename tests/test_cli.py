"""python -m fastconv."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastconv
from fastconv import _C, _selfcheck, cli


def run_module(*arguments, **environment):
    # The child must import the package that this process imported.
    path = os.pathsep.join([str(Path(fastconv.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "fastconv", *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_doctor_reports_and_passes(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for wanted in (
        "torch ",
        "numpy ",
        "instruction sets",
        _C.active_isa(),
        "_C_cpu",
        "_C_cuda",
        "threads",
        "all is well",
    ):
        assert wanted in out
    for op in {name.split("/")[0] for name in _C.kernel_names()}:
        assert op in out


def test_doctor_notices_a_wrong_kernel(monkeypatch, capsys):
    ours = fastconv.functional.avg_pool2d
    monkeypatch.setattr(_selfcheck.functional, "avg_pool2d", lambda *args: ours(*args) * 1.001)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED") == 2
    assert "avg_pool2d contiguous" in out


def test_doctor_notices_a_call_that_went_to_torch(monkeypatch):
    function = "max_pool2d"
    by_torch = fastconv.functional._torch_max_pool2d

    def hand_over(*args):
        return fastconv.functional._by_torch(function, by_torch, "for the test", *args)

    monkeypatch.setattr(_selfcheck.functional, function, hand_over)
    results = {result.name: result for result in _selfcheck.run()}
    assert not results["max_pool2d contiguous"].passed
    assert "torch/max_pool2d" in results["max_pool2d contiguous"].detail


def test_the_self_check_keeps_to_the_device_it_is_given():
    found = _selfcheck._with_gradients(
        lambda x: fastconv.functional.max_pool2d(x, 2), [torch.ones(1, 2, 4, 4, device="meta")]
    )
    assert [part.device.type for part in found] == ["meta", "meta"]


def test_doctor_in_its_own_process_with_another_instruction_set():
    result = run_module("doctor", FASTCONV_CPU_ISA="generic")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "generic (FASTCONV_CPU_ISA=generic)" in result.stdout


def test_explain_prints_the_plan(capsys):
    arguments = ["explain", "--conv", "64,128,3", "--padding", "1", "--input", "1,64,56,56", "--channels-last"]
    assert cli.main([*arguments, "--backward"]) == 0
    out = capsys.readouterr().out
    for wanted in (
        "conv2d/winograd",
        "condition",
        "conv2d_input_grad/winograd",
        "conv2d_weight_grad/tiled",
        "462 MFLOP",
        "channels_last",
    ):
        assert wanted in out


@pytest.mark.parametrize(
    ("arguments", "kernel"),
    [
        (["--conv", "8,8,3,1", "--groups", "8", "--no-bias"], "conv2d/"),
        (["--max-pool", "3", "--stride", "2", "--padding", "1"], "max_pool2d/rows"),
        (["--avg-pool", "2"], "avg_pool2d/rows"),
        (["--global-avg-pool"], "adaptive_avg_pool2d/global"),
    ],
)
def test_explain_knows_every_layer(arguments, kernel, capsys):
    assert cli.main(["explain", *arguments, "--input", "2,8,9,9", "--dtype", "float16"]) == 0
    assert kernel in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--conv", "64,128", "--input", "1,64,56,56"], "--conv has 2 numbers, expected IN,OUT,K"),
        (["--conv", "64,128,3", "--input", "64,56"], "--input has 2 numbers, expected N,C,H,W"),
        (["--conv", "64,x,3", "--input", "1,64,56,56"], "'64,x,3' is no list of integers"),
        (["--input", "1,64,56,56"], "one of the arguments --conv --max-pool"),
    ],
)
def test_explain_says_what_is_wrong_with_its_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["explain", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_explain_passes_on_the_layers_own_error(capsys):
    assert cli.main(["explain", "--conv", "64,128,3", "--input", "1,32,56,56"]) == 2
    assert "check groups and the input's channels" in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "doctor" in out
    assert "explain" in out
