"""Builds the extensions; everything else about the package is in pyproject.toml.

Two libraries come out of it:

* ``fastconv/_C_cpu.abi3.so``: the operators. It speaks to torch through the LibTorch stable ABI and holds no Python
  code, so one file serves every Python and every torch from 2.10 on.
* ``fastconv/_C.<python tag>.so``: the pybind11 introspection module. It knows nothing of torch.

Environment: ``CXX`` the compiler, ``MAX_JOBS`` compilers at once, ``FASTCONV_SANITIZE=address,undefined`` an
instrumented build.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
FAMILIES = ("conv2d", "depthwise", "pool", "norm")
SANITIZE = os.environ.get("FASTCONV_SANITIZE", "")
# The heaviest translation unit peaks near 1 GB; a machine with many cores and little memory must not start them all.
BYTES_PER_JOB = 3 * 2**29

COMPILE_FLAGS = [
    "-std=c++20",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    # a * b + c is fused only where a kernel says so: results must not depend on the compiler's mood
    "-ffp-contract=off",
]
if SANITIZE:
    # NDEBUG comes from Python's own flags; an instrumented build keeps its asserts.
    COMPILE_FLAGS += ["-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    COMPILE_FLAGS += [f"-fsanitize={SANITIZE}"]
    LINK_FLAGS = [f"-fsanitize={SANITIZE}"]
else:
    COMPILE_FLAGS += ["-O3", "-g0"]
    LINK_FLAGS = []

# The oldest torch that the libraries must load under: 2.10.0.
TORCH_TARGET = ("TORCH_TARGET_VERSION", "0x020a000000000000")


def sources(*patterns: str) -> list[str]:
    """Files under the repository that match, relative to it and in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def headers() -> list[str]:
    return sources("csrc/**/*.h")


OPERATORS = Extension(
    "fastconv._C_cpu",
    sources("csrc/ops.cpp", "csrc/common/*.cpp", *(f"csrc/{family}/cpu*.cpp" for family in FAMILIES)),
    include_dirs=[str(ROOT / "csrc")],
    depends=headers(),
    define_macros=[TORCH_TARGET],
    libraries=["torch", "torch_cpu", "c10"],
    extra_compile_args=COMPILE_FLAGS,
    extra_link_args=LINK_FLAGS,
    # Names the file .abi3.so: no Python version in it.
    py_limited_api=True,
    language="c++",
)

INTROSPECTION = Extension(
    "fastconv._C",
    sources("csrc/introspect.cpp"),
    include_dirs=[str(ROOT / "csrc")],
    depends=headers(),
    # For `python -m fastconv doctor`.
    define_macros=[TORCH_TARGET, ("FASTCONV_COMPILE_FLAGS", f'"{" ".join(COMPILE_FLAGS)}"')],
    extra_compile_args=COMPILE_FLAGS,
    extra_link_args=LINK_FLAGS,
    language="c++",
)


def find_compiler() -> str:
    """The C++ compiler to use: CXX, else the one Python was built with, else g++ or clang++.

    Raises:
        CompileError: there is none; the message says what to install.
    """
    asked = os.environ.get("CXX", "").split()
    if asked:
        if shutil.which(asked[-1]) or shutil.which(asked[0]):
            return os.environ["CXX"]
        raise CompileError(
            f"fastconv: CXX is {os.environ['CXX']!r}, but there is no such program; unset it or correct it"
        )
    pythons_own = (sysconfig.get_config_var("CXX") or "").split()[:1]
    for candidate in [*pythons_own, "g++", "clang++"]:
        if shutil.which(candidate):
            return candidate
    raise CompileError(
        "fastconv: no C++ compiler found (looked for CXX, g++, clang++); its kernels are compiled during installation. "
        "Install one with C++20: 'apt-get install g++' (Debian, Ubuntu), 'dnf install gcc-c++' (Fedora), "
        "'xcode-select --install' (macOS)."
    )


def check_python_headers() -> None:
    folder = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(folder, "Python.h")):
        raise CompileError(
            f"fastconv: {folder}/Python.h is missing, which the introspection module is compiled with. "
            "Install Python's headers: 'apt-get install python3-dev' (Debian, Ubuntu) or "
            "'dnf install python3-devel' (Fedora)."
        )


def compilers_at_once() -> int:
    """As many as there are cores, fewer where memory is short."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return cores
    return max(1, min(cores, available // BYTES_PER_JOB))


class BuildFastconv(build_ext):
    """Compiles with ninja through torch.utils.cpp_extension.

    setuptools makes this command also to list files for the metadata and the sdist, so torch is imported in run() only.
    """

    def run(self) -> None:
        compiler = find_compiler()
        check_python_headers()
        os.environ["CXX"] = compiler
        os.environ.setdefault("MAX_JOBS", str(compilers_at_once()))
        command = build_with_torch()(self.distribution)
        command.__dict__.update({**self.__dict__, "use_ninja": command.use_ninja, "no_python_abi_suffix": False})
        command.force = True  # ninja decides what is out of date, headers included
        try:
            command.run()
        except RuntimeError as error:
            if "compiling objects" not in str(error):
                raise
            raise CompileError("fastconv: a file did not compile; the compiler's own message is above") from error


def build_with_torch() -> type[build_ext]:
    """torch's build command with fastconv's folders."""
    try:
        import pybind11
        from torch.utils import cpp_extension
    except ImportError as error:
        raise CompileError(
            f"fastconv: the build needs torch, pybind11 and ninja, and {error.name} is not installed. Run "
            "'pip install torch pybind11 ninja', or let pip fetch them: leave out --no-build-isolation."
        ) from error

    class BuildWithTorch(cpp_extension.BuildExtension):
        def build_extension(self, ext: Extension) -> None:
            # Objects are kept beside the sources, also by editable installs (whose own folder is temporary), one folder
            # per library, since each has its own build.ninja.
            kind = "sanitize" if SANITIZE else "release"
            self.build_temp = str(ROOT / "build" / f"{kind}-{sysconfig.get_platform()}" / ext.name)
            if ext.name == INTROSPECTION.name:
                self.build_temp += f"-{sysconfig.get_config_var('SOABI')}"
                foreign = [pybind11.get_include()]
            else:
                foreign = cpp_extension.include_paths("cpu")
                ext.library_dirs = cpp_extension.library_paths("cpu")
            # -isystem: warnings are for our own code
            ext.extra_compile_args = [*ext.extra_compile_args, *(f"-isystem{folder}" for folder in foreign)]
            super().build_extension(ext)

    return BuildWithTorch


if __name__ == "__main__":
    setup(
        ext_modules=[extension for extension in (OPERATORS, INTROSPECTION) if extension.sources],
        cmdclass={"build_ext": BuildFastconv},
    )
