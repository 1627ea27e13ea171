"""``python -m fastconv``: ``doctor`` looks at this installation, ``explain`` at one layer."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

import fastconv
from fastconv import _C, _selfcheck
from fastconv._library import EMULATED, find_library, library_path
from fastconv._plans import kernel_key
from fastconv.backends import BACKENDS, unavailable

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Exit status: 0, 1 if the doctor found something wrong, 2 for arguments that make no layer."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return doctor()
    return explain(parser, options)


def doctor() -> int:
    """Prints versions, instruction sets, libraries and kernels, and tries every kernel; 1 if one computes wrongly."""
    _section("versions")
    for name, value in _versions().items():
        _line(name, value)
    _section("processor")
    _line("instruction sets", ", ".join(_C.supported_isas()))
    wanted = os.environ.get("FASTCONV_CPU_ISA")
    _line(
        "in use",
        f"{_C.active_isa()} ({'FASTCONV_CPU_ISA=' + wanted if wanted else 'the widest; FASTCONV_CPU_ISA is not set'})",
    )
    _line("torch's own", torch.backends.cpu.get_cpu_capability())
    _line("threads", f"{torch.get_num_threads()} (torch.set_num_threads)")
    _section("libraries")
    _line("_C_cpu", library_path)
    _line("_C", str(_C.__file__))
    cuda = find_library("_C_cuda")
    _line("_C_cuda", cuda or "not built, which is fine without a GPU")
    for name in BACKENDS:
        _line(f"backend {name}", unavailable(name) or "has kernels")
    _section("kernels")
    devices = ["cpu"] if EMULATED or unavailable("cuda") else ["cpu", "cuda"]
    for family in ["cuda"] if EMULATED else devices:
        for op, algos in _kernels_by_op(family).items():
            _line(kernel_key(family, op), ", ".join(algos))
    failures = 0
    for device in devices:
        _section(f"self-check{', CUDA kernels emulated,' if EMULATED else f' on {device}'} against float64")
        for result in _selfcheck.run(device):
            failures += not result.passed
            _line(result.name, f"{'ok' if result.passed else 'FAILED'}  {result.detail}")
    print(f"\n{failures} of the checks failed" if failures else "\nall is well")
    return 1 if failures else 0


def explain(parser: argparse.ArgumentParser, options: Any) -> int:
    """Prints the plan of one layer."""
    shape = tuple(options.input)
    if len(shape) != 4:
        parser.error(f"--input has {len(shape)} numbers, expected N,C,H,W, for example 1,64,56,56")
    dtype = _DTYPES[options.dtype]
    try:
        layer = _layer(parser, options).to(dtype)
        fastconv.explain(
            layer,
            shape,
            dtype=dtype,
            memory_format="channels_last" if options.channels_last else None,
            backward=options.backward,
        )
    except (RuntimeError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _layer(parser: argparse.ArgumentParser, options: Any) -> torch.nn.Module:
    window: Any = {"stride": options.stride, "padding": options.padding}
    if options.conv is not None:
        if len(options.conv) not in (3, 4):
            parser.error(
                f"--conv has {len(options.conv)} numbers, expected IN,OUT,K or IN,OUT,ROWS,COLUMNS, such as 64,128,3"
            )
        in_channels, out_channels, *kernel = options.conv
        window["stride"] = options.stride or 1
        return fastconv.Conv2d(
            in_channels,
            out_channels,
            (kernel[0], kernel[-1]),
            dilation=options.dilation,
            groups=options.groups,
            bias=not options.no_bias,
            **window,
        )
    if options.max_pool is not None:
        return fastconv.MaxPool2d(options.max_pool, dilation=options.dilation, **window)
    if options.avg_pool is not None:
        return fastconv.AvgPool2d(options.avg_pool, **window)
    return fastconv.GlobalAvgPool2d()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastconv", description="Looks at an installation of fastconv.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "doctor",
        help="versions, instruction sets, libraries, kernels, and a self-check",
        description="Prints versions, instruction sets, libraries and kernels, and tries every kernel. "
        "The exit status is 1 if a kernel computes wrongly.",
    )
    layer = commands.add_parser(
        "explain",
        help="which kernel a layer runs, and why",
        description="Prints which kernel a layer runs, why others do not, FLOPs and bytes. Computes nothing.",
        epilog="example: python -m fastconv explain --conv 64,128,3 --padding 1 --input 1,64,56,56 --channels-last",
    )
    kind = layer.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--conv",
        type=_numbers,
        metavar="IN,OUT,K",
        help="convolution; IN,OUT,ROWS,COLUMNS for a window that is not square",
    )
    kind.add_argument("--max-pool", type=int, metavar="K", help="max pooling")
    kind.add_argument("--avg-pool", type=int, metavar="K", help="average pooling")
    kind.add_argument("--global-avg-pool", action="store_true", help="mean over the plane")
    layer.add_argument("--input", type=_numbers, required=True, metavar="N,C,H,W", help="shape of the input")
    layer.add_argument("--stride", type=int, help="1 for convolutions, the window for pooling")
    layer.add_argument("--padding", type=int, default=0)
    layer.add_argument("--dilation", type=int, default=1)
    layer.add_argument("--groups", type=int, default=1)
    layer.add_argument("--no-bias", action="store_true")
    layer.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    layer.add_argument("--channels-last", action="store_true", help="memory format of the input")
    layer.add_argument("--backward", action="store_true", help="the gradients too")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of integers; write for example 1,64,56,56") from None


def _versions() -> dict[str, str]:
    try:
        import numpy

        numpy_version = numpy.__version__
    except ImportError:
        numpy_version = "not installed (fastconv does not need it)"
    build = _C.build_info()
    how = f"{build['compiler']}, C++{build['cxx_standard'] // 100 % 100}"
    how += ", optimised" if build["optimized"] else ", not optimised"
    how += ", with asserts" if build["asserts"] else ""
    how += ", sanitized" if build["sanitized"] else ""
    versions = {
        "fastconv": fastconv.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "numpy": numpy_version,
        "built with": how,
    }
    if build["flags"]:
        versions["flags"] = build["flags"]
    if build["torch_target"]:
        versions["needs torch"] = f"{build['torch_target']} or newer"
    return versions


def _kernels_by_op(device: str) -> dict[str, list[str]]:
    kernels: dict[str, list[str]] = {}
    for name in _C.kernel_names(device):
        op, algo = name.split("/")
        kernels.setdefault(op, []).append(algo)
    return kernels


def _section(title: str) -> None:
    print(f"\n{title}")


def _line(name: str, value: str) -> None:
    print(f"  {name:<34}  {value}")
