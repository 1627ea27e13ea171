"""Builds the extensions; everything else about the package is in pyproject.toml.

Three libraries come out of it:

* ``fastconv/_C_cpu.abi3.so``: the operators. It speaks to torch through the LibTorch stable ABI and holds no Python
  code, so one file serves every Python and every torch from 2.10 on.
* ``fastconv/_C.<python tag>.so``: the pybind11 introspection module. It knows nothing of torch.
* ``fastconv/_C_cuda.abi3.so``: the operators for CUDA tensors, optional. It speaks to torch like ``_C_cpu`` and holds
  its own copy of CUDA's runtime library, so it is built beside any torch, one without CUDA too, and loads beside any
  that has CUDA.

Environment: ``CXX`` the compiler, ``MAX_JOBS`` compilers at once, ``FASTCONV_SANITIZE=address,undefined`` an
instrumented build, ``FASTCONV_CUDA=1`` with the CUDA library, ``0`` without; not set: where nvcc is found and torch is
a CUDA build. ``FASTCONV_ONLY=_C_cuda`` builds one library and leaves the others as they are.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from unittest import mock

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda_support"))

import nvcc  # noqa: E402

FAMILIES = ("conv2d", "depthwise", "pool", "norm", "network")
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

CUDA = Extension(
    "fastconv._C_cuda",
    sources(
        "csrc/common/checks.cpp",
        "csrc/cuda_support/*.cpp",
        *(f"csrc/{family}/cuda*.cpp" for family in FAMILIES),
    ),
    include_dirs=[str(ROOT / "csrc")],
    depends=[*headers(), *sources("csrc/**/*.cuh")],
    define_macros=[TORCH_TARGET],
    libraries=["rt", "dl", "pthread"],
    extra_compile_args={"cxx": COMPILE_FLAGS, "nvcc": nvcc.FLAGS},
    extra_link_args=[
        # libtorch.so is what brings libtorch_cuda.so into this library's scope. None of its own symbols is used, and a
        # linker that drops such libraries would leave the function for the CUDA stream unresolved.
        *("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"),
        # torch loads its own libcudart for all to see, maybe of another release, and visible symbols of this copy would
        # be taken from there. CUDA 13.0's archive hides them itself.
        "-Wl,--exclude-libs,ALL",
        *LINK_FLAGS,
    ],
    py_limited_api=True,
    language="c++",
)
# Added when they are compiled: torch's build command compares nvcc's release with torch's if it sees them before, and
# here neither torch's CUDA nor its runtime is used.
CUDA_KERNELS = sources(*(f"csrc/{family}/cuda*.cu" for family in FAMILIES))


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
        self.extensions = wanted_extensions(self.extensions)
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
            message = "fastconv: a file did not compile; the compiler's own message is above"
            if CUDA in self.extensions:
                message += ". FASTCONV_CUDA=0 builds without the CUDA kernels"
            raise CompileError(message) from error


def wanted_extensions(extensions: list[Extension]) -> list[Extension]:
    """Without the CUDA library where it is not wanted, and what FASTCONV_ONLY names of the rest."""
    only = os.environ.get("FASTCONV_ONLY", "")
    names = [extension.name.rpartition(".")[2] for extension in extensions]
    if only and only not in names:
        raise CompileError(f"fastconv: FASTCONV_ONLY is {only!r}, expected one of {', '.join(names)}")
    chosen = [extension for extension in extensions if only in ("", extension.name.rpartition(".")[2])]
    if CUDA in chosen and not cuda_is_wanted():
        chosen.remove(CUDA)
    return chosen


def cuda_is_wanted() -> bool:
    """FASTCONV_CUDA, or whether nvcc is found and torch is a CUDA build."""
    wish = os.environ.get("FASTCONV_CUDA", "")
    if wish not in ("", "0", "1"):
        raise CompileError(f"fastconv: FASTCONV_CUDA is {wish!r}, expected 1 (with CUDA kernels) or 0 (without)")
    if wish or SANITIZE:
        return wish == "1"
    try:
        import torch
    except ImportError:
        return False  # build_with_torch() says what to do
    if torch.version.cuda is None:
        return False
    try:
        return nvcc.find_toolkit() is not None
    except nvcc.ToolkitError as error:
        print(f"fastconv: without the CUDA kernels, because {error}")  # nobody asked for them
        return False


def cuda_toolkit() -> nvcc.Toolkit:
    """The toolkit to compile with; raises CompileError, with the remedy, if there is none or it cannot be used."""
    try:
        toolkit = nvcc.find_toolkit()
    except nvcc.ToolkitError as error:
        raise CompileError(f"fastconv: {error}; FASTCONV_CUDA=0 builds without the CUDA kernels") from error
    if toolkit is None:
        raise CompileError(
            "fastconv: FASTCONV_CUDA is 1, but there is no nvcc (looked in CUDA_HOME, PATH, /usr/local/cuda and among "
            "Python's packages). Install CUDA's compiler: 'make cuda' fetches it from PyPI (nvidia-cuda-nvcc, "
            "nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime, nvidia-cuda-cccl, of one release), or name a toolkit "
            "in CUDA_HOME. FASTCONV_CUDA=0 builds without the CUDA kernels."
        )
    return toolkit


def host_compiler() -> str:
    """CXX without a launcher such as ccache before it."""
    return next(word for word in reversed(os.environ["CXX"].split()) if shutil.which(word))


def build_with_torch() -> type[build_ext]:
    """torch's build command with fastconv's folders."""
    try:
        import pybind11
        import torch
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
            if ext is CUDA:
                self.build_cuda(ext)
                return
            if ext.name == INTROSPECTION.name:
                self.build_temp += f"-{sysconfig.get_config_var('SOABI')}"
                foreign = [pybind11.get_include()]
            else:
                foreign = cpp_extension.include_paths("cpu")
                ext.library_dirs = cpp_extension.library_paths("cpu")
            # -isystem: warnings are for our own code
            ext.extra_compile_args = [*ext.extra_compile_args, *(f"-isystem{folder}" for folder in foreign)]
            super().build_extension(ext)

        def build_cuda(self, ext: Extension) -> None:
            toolkit = cuda_toolkit()
            self.build_temp = str(nvcc.LOGS)  # one does not outlive the other
            foreign = [*cpp_extension.include_paths("cpu"), *map(str, toolkit.include_dirs)]
            flags = ext.extra_compile_args
            flags["cxx"] = [*flags["cxx"], *(f"-isystem{folder}" for folder in foreign)]
            flags["nvcc"] = [*flags["nvcc"], f"-ccbin={host_compiler()}"]
            ext.library_dirs = cpp_extension.library_paths("cpu")
            ext.sources = [*ext.sources, *CUDA_KERNELS]
            ext.extra_objects = [str(toolkit.static_runtime)]
            # torch does the same for g++, with the same switch.
            cached = shutil.which("ccache") and not os.environ.get("TORCH_NO_COMPILER_WRAPPER")
            command = [sys.executable, nvcc.__file__, *(["ccache"] if cached else []), str(toolkit.nvcc)]
            # ninja learns of a kernel's headers only where torch has CUDA.
            release = torch.version.cuda or toolkit.release
            with (
                mock.patch.object(torch.version, "cuda", release),
                mock.patch.dict(os.environ, {"PYTORCH_NVCC": shlex.join(command)}),
            ):
                super().build_extension(ext)

    return BuildWithTorch


if __name__ == "__main__":
    setup(
        ext_modules=[extension for extension in (OPERATORS, INTROSPECTION, CUDA) if extension.sources],
        cmdclass={"build_ext": BuildFastconv},
    )
