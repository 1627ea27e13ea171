"""Builds libraries of emulated CUDA kernels and calls their launchers.

A library is the emulator (``csrc/emulator``) with some ``.cu`` files, compiled by g++ as ordinary C++. No CUDA, no GPU
and no torch are needed to build it, and fastconv itself does not need it.

    library = build(["csrc/pool/cuda_max.cu"])
    library.call("max_pool2d", "rows", PoolProblem.of(x, ...), x, y, None)

Kinds of library:

* ``plain``: optimised; for results.
* ``checked``: every load and store of the kernels is seen by the race checks (``Options.check_races``).
* ``address``: AddressSanitizer and UBSan; the process must have started with libasan preloaded.
* ``planted``: plain, compiled without optimisation.
* ``ucontext``: plain, with the context switch of machines other than x86-64.
* ``debug``: plain, not optimised; for gdb.

As a script it builds the library behind ``FASTCONV_EMULATE=1``: ``python tests/emulator_library.py [KIND]``.
"""

from __future__ import annotations

import ctypes
import enum
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from emulator_problems import ConvProblem as ConvProblem
from emulator_problems import DType as DType
from emulator_problems import Layout as Layout
from emulator_problems import PoolProblem as PoolProblem
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "csrc" / "emulator"

COMMON_FLAGS = [
    "-std=c++20",
    "-g",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-Wno-restrict",  # g++ 12 sees one in std::string's operator+ that is not there (PR 105651)
    # Kernels read registers as other types, which nvcc allows and ISO C++ does not.
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    # The running thread's identity is read at every threadIdx; fibers stay on their OS thread.
    "-ftls-model=initial-exec",
    "-DFASTCONV_EMULATOR",
    f"-I{EMULATOR / 'include'}",
    f"-I{ROOT / 'csrc'}",
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


@dataclass(frozen=True)
class Kind:
    kernel_flags: tuple[str, ...]
    emulator_flags: tuple[str, ...] = ("-O2",)
    link_flags: tuple[str, ...] = ()
    # fiber.cpp alone knows which context switch is in use.
    fiber_flags: tuple[str, ...] = ()


KINDS = {
    "plain": Kind(("-O2",)),
    # Compiled for ThreadSanitizer and not linked with it: plain_access.cpp answers the calls.
    "checked": Kind(("-O1", "-fsanitize=thread")),
    "address": Kind(("-O0", *SANITIZERS), ("-O1", *SANITIZERS), ("-fsanitize=address,undefined",)),
    # Quick to compile: for kernels with planted bugs.
    "planted": Kind(("-O0",)),
    "ucontext": Kind(("-O2",), fiber_flags=("-DFASTCONV_EMULATOR_UCONTEXT",)),
    "debug": Kind(("-Og",)),
}


# ---------------------------------------------------------------- building


def _out_of_date(target: Path, dependency_file: Path) -> bool:
    """As make would say, from the compiler's own list of headers."""
    if not target.exists() or not dependency_file.exists():
        return True
    text = dependency_file.read_text().replace("\\\n", " ")
    made = target.stat().st_mtime_ns
    needed = text.split(":", 1)[1].split()
    return any(not os.path.exists(name) or os.stat(name).st_mtime_ns > made for name in needed)


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


def _compile(source: Path, flags: Sequence[str], root: Path) -> Path:
    folder = root / _digest(flags)  # objects are shared by all libraries that compile them alike
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / (str(source.relative_to(ROOT)).replace("/", "-") + ".o")
    dependencies = target.with_suffix(".d")
    if _out_of_date(target, dependencies):
        launcher = ["ccache"] if shutil.which("ccache") else []
        command = [*launcher, os.environ.get("CXX", "g++"), "-x", "c++", *COMMON_FLAGS, *flags]
        command += ["-MMD", "-MF", str(dependencies), "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{source.relative_to(ROOT)} does not compile for the emulator:\n{result.stderr}")
        if result.stderr:
            print(result.stderr)
    return target


def build(sources: Iterable[str | Path], kind: str = "plain", defines: Sequence[str] = ()) -> Library:
    """Compiles what is out of date and loads the library.

    Args:
        sources: files with kernels and launchers, relative to the repository's root.
        kind: a key of ``KINDS``.
        defines: preprocessor symbols for the kernels, for example ``["PLANTED_BUG=3"]``.
    """
    return Library(build_file(sources, kind, defines))


def kernel_sources() -> list[Path]:
    """Every file of CUDA kernels in the package, relative to the repository's root."""
    return sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/*/cuda*.cu"))


def declared_launchers() -> dict[tuple[str, str], Path]:
    """(op, algo) -> file, of every FASTCONV_LAUNCHER in the package."""
    pattern = re.compile(r'FASTCONV_LAUNCHER\(\s*"([^"]*)",\s*"([^"]*)"')
    return {
        (op, algo): source for source in kernel_sources() for op, algo in pattern.findall((ROOT / source).read_text())
    }


HOST_SOURCES = ["csrc/ops.cpp", "csrc/common/checks.cpp", "csrc/cuda_support/registry.cpp"]


def build_ops(sources: Iterable[str | Path] | None = None, kind: str = "plain") -> Path:
    """A library of torch ops over emulated kernels: `.cu` files and host functions (``csrc/cuda_support/host.h``).

    Load it with ``torch.ops.load_library``; its ops are in ``torch.ops.fastconv_emulated`` and take CPU tensors.
    Without ``sources`` it holds all ops of the package: ``FASTCONV_EMULATE=PATH`` then runs fastconv on it.
    """
    if sources is None:
        sources = [*kernel_sources(), *HOST_SOURCES, *sorted(ROOT.glob("csrc/*/cuda.cpp"))]
    return build_file(sources, kind, torch_ops=True)


def _torch_flags() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the compiler, for files that include torch's headers, and of the linker."""
    include = [f"-isystem{folder}" for folder in cpp_extension.include_paths("cpu")]
    libraries = cpp_extension.library_paths("cpu")
    links = [*(f"-L{folder}" for folder in libraries), *(f"-Wl,-rpath,{folder}" for folder in libraries)]
    return (
        ("-DTORCH_TARGET_VERSION=0x020a000000000000", *include),
        (*links, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
    )


def build_file(
    sources: Iterable[str | Path],
    kind: str = "plain",
    defines: Sequence[str] = (),
    torch_ops: bool = False,
    overlay: Path | None = None,
) -> Path:
    """``build`` without loading: the library's path.

    ``torch_ops``: `.cpp` files include torch's headers. Files below ``overlay`` take the place of those of ``csrc``.
    """
    chosen = KINDS[kind]
    torch_flags, link_flags = _torch_flags() if torch_ops else ((), ())
    places = [overlay, ROOT] if overlay else [ROOT]
    kernels = sorted(
        next(place / source for place in places if (place / source).exists()).resolve() for source in sources
    )
    emulator = [path for path in sorted(EMULATOR.glob("*.cpp")) if kind == "checked" or path.stem != "plain_access"]
    root = ROOT / "build" / "emulator"
    kernel_flags = (*chosen.kernel_flags, *(f"-D{symbol}" for symbol in defines))
    if overlay:
        kernel_flags += (f"-iquote{overlay / 'csrc'}",)  # before every -I
    jobs = [(source, chosen.emulator_flags) for source in emulator if source.stem != "fiber"]
    jobs += [(EMULATOR / "fiber.cpp", (*chosen.emulator_flags, *chosen.fiber_flags))]
    jobs += [(source, (*kernel_flags, *(torch_flags if source.suffix == ".cpp" else ()))) for source in kernels]
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist's workers build the same files
        return _build_locked(jobs, root, kind, (*chosen.link_flags, *link_flags))


def _build_locked(jobs: list[tuple[Path, tuple[str, ...]]], root: Path, kind: str, link_flags: tuple[str, ...]) -> Path:
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        objects = list(pool.map(lambda job: _compile(job[0], job[1], root), jobs))
    library = root / f"libfastconv_emulated_{kind}_{_digest(map(str, objects))}.so"
    if not library.exists() or any(path.stat().st_mtime_ns > library.stat().st_mtime_ns for path in objects):
        fresh = library.with_suffix(f".{os.getpid()}")  # another process may have the old file loaded
        command = [
            os.environ.get("CXX", "g++"),
            "-shared",
            *map(str, objects),
            *link_flags,
            "-o",
            str(fresh),
        ]
        subprocess.run([*command, "-pthread", "-ldl"], check=True)
        fresh.replace(library)
    return library


# ---------------------------------------------------------------- calling


class Timing(enum.IntEnum):
    """When asynchronous work happens; csrc/emulator/run.h."""

    lazy, eager, random = range(3)


@dataclass
class Record:
    """What `make emulate` prints about a launcher."""

    cases: int = 0
    worst_error: float | None = None


records: dict[tuple[str, str], Record] = {}


def note_error(op: str, algo: str, error: float) -> None:
    """Keeps the largest of a launcher's errors, in the unit of its tests (NaN counts as infinite)."""
    record = records.setdefault((op, algo), Record())
    error = float("inf") if error != error else error
    record.worst_error = error if record.worst_error is None else max(record.worst_error, error)


Argument = torch.Tensor | ctypes.Structure | int | float | None


class Library:
    """A loaded library. Errors of the emulator are RuntimeErrors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._c = ctypes.CDLL(str(path))
        for question in ("op", "algo", "signature"):
            getattr(self._c, f"fastconv_emulator_launcher_{question}").restype = ctypes.c_char_p
        self._numbers: dict[tuple[str, str], int] = {}
        self._answering: set[tuple[str, str]] = set()
        self.signatures: dict[tuple[str, str], list[str]] = {}
        for number in range(self._c.fastconv_emulator_launcher_count()):
            op, algo, signature = (
                getattr(self._c, f"fastconv_emulator_launcher_{question}")(number).decode()
                for question in ("op", "algo", "signature")
            )
            if (op, algo) in self._numbers:
                raise RuntimeError(f"two launchers are called ({op}, {algo}); every pair must be unique")
            self._numbers[op, algo] = number
            if self._c.fastconv_emulator_launcher_returns_number(number):
                self._answering.add((op, algo))
            self.signatures[op, algo] = signature.split()

    def configure(
        self,
        timing: Timing = Timing.lazy,
        seed: int = 1,
        check_races: bool = False,
        os_threads: int = 0,
        sm_count: int = 2,
        capability: int = 90,
    ) -> None:
        """Sets all options; those that are not named go back to their defaults."""
        self._c.fastconv_emulator_configure(timing, seed, check_races, os_threads, sm_count, capability)

    def statistics(self) -> dict[str, int]:
        counts = (ctypes.c_uint64 * 4)()
        self._c.fastconv_emulator_statistics(counts)
        return dict(zip(("launches", "switches", "tma_operations", "wgmma_warps"), counts, strict=True))

    def call(self, op: str, algo: str, *arguments: Argument) -> int | None:
        """Runs the launcher: problems as structures, tensors for pointers (None for null), numbers; no stream.

        Returns its number, None if it has none.
        """
        words = self.signatures.get((op, algo))
        if words is None:
            known = ", ".join(map(str, sorted(self.signatures)))
            raise KeyError(f"no launcher is called ({op}, {algo}); there are {known}")
        if len(words) != len(arguments):
            raise TypeError(f"({op}, {algo}) takes {len(words)} arguments, {' '.join(words)}; got {len(arguments)}")
        values = [_as_c(word, argument) for word, argument in zip(words, arguments, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        result, error = ctypes.c_int64(), ctypes.create_string_buffer(8192)
        if self._c.fastconv_emulator_call(
            self._numbers[op, algo], pointers, ctypes.byref(result), error, ctypes.sizeof(error)
        ):
            raise RuntimeError(error.value.decode(errors="replace"))
        records.setdefault((op, algo), Record()).cases += 1
        return result.value if (op, algo) in self._answering else None


def _as_c(word: str, argument: Argument) -> ctypes.Structure | ctypes._SimpleCData:  # type: ignore[type-arg]
    kind, size = word[0], int(word[1:] or 0)
    if kind == "r":
        if not isinstance(argument, ctypes.Structure) or ctypes.sizeof(argument) != size:
            raise TypeError(f"got {argument!r}, expected a structure of {size} bytes, such as ConvProblem")
        return argument
    if kind == "p":
        if argument is None:
            return ctypes.c_void_p(None)
        if not isinstance(argument, torch.Tensor):
            raise TypeError(f"got {argument!r}, expected a tensor or None")
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, (torch.Tensor, ctypes.Structure)) or argument is None:
        raise TypeError(f"got {argument!r}, expected a number")
    if kind == "f":
        return (ctypes.c_float if size == 4 else ctypes.c_double)(argument)
    sizes = {1: ctypes.c_int8, 2: ctypes.c_int16, 4: ctypes.c_int32, 8: ctypes.c_int64}
    return sizes[size](int(argument))


if __name__ == "__main__":
    target = ROOT / "fastconv" / "_C_emulated.abi3.so"
    shutil.copyfile(build_ops(kind=sys.argv[1] if len(sys.argv) > 1 else "plain"), target)
    print(f"{target}: FASTCONV_EMULATE=1 runs fastconv on it")
