"""nvcc: where it is, its flags, and one compilation with ptxas's report kept.

    python build_tools/nvcc.py                              prints the CUDA toolkit's folder; fails if there is none
    python build_tools/nvcc.py [LAUNCHER] NVCC ARGUMENTS    compiles one file; setup.py names this to ninja as "nvcc"

ptxas's report (registers, spills, stack frames) of csrc/F/K.cu goes to build/cuda/F/K.ptxas, which
tests/test_cuda_binary.py reads. The terminal gets warnings and errors only.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USUAL_PLACE = Path("/usr/local/cuda/bin/nvcc")
LOGS = ROOT / "build" / "cuda"

# sm_90a code runs on that chip alone, so the PTX for later ones is compute_80's.
SM80_FLAGS = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_80,code=compute_80"]
SM90_FLAGS = ["-gencode=arch=compute_90a,code=sm_90a"]
# torch's build command forbids arithmetic on __half, lest it be mistaken for c10::Half's; kernels use the former.
TORCHS_MACROS = ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
FLAGS = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",
    *(f"-U__CUDA_NO_{name}__" for name in TORCHS_MACROS),
    *SM80_FLAGS,
    *SM90_FLAGS,
]
REPORT = re.compile(r"ptxas info|    \d+ bytes stack frame")
OLDEST_RELEASE = (12, 5)  # cudaGetDriverEntryPointByVersion


class ToolkitError(Exception):
    """The CUDA toolkit is not there, too old or incomplete; says so and names the remedy."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    release: str  # "13.0"
    include_dirs: tuple[Path, ...]
    static_runtime: Path  # libcudart_static.a


def find_nvcc() -> Path | None:
    """CUDA_HOME's (or CUDA_PATH's), the one on PATH, /usr/local/cuda's, or that of NVIDIA's packages from PyPI."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            named = Path(home) / "bin" / "nvcc"
            if not named.exists():
                raise ToolkitError(f"{variable} is {home!r}, but {named} does not exist; unset it or correct it")
            return named
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    return next((path for path in _usual_places() if path.exists()), None)


def _usual_places() -> Iterator[Path]:
    yield USUAL_PLACE
    for folder in map(Path, sys.path):
        yield from sorted(folder.glob("nvidia/cu[0-9]*/bin/nvcc"), reverse=True)


def find_toolkit() -> Toolkit | None:
    """The toolkit, or None if there is no nvcc.

    Raises:
        ToolkitError: nvcc is not where it is said to be, or is too old, or its headers or runtime library are missing.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    # Not guessed from nvcc's own path, which may be a script or a link: a dry run says where it looks.
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    values = dict(re.findall(r"^#\$ (\w+)=(.*)$", plan, re.MULTILINE))
    found = re.search(r"release (\d+)\.(\d+)", version)
    if found is None or "TOP" not in values:
        raise ToolkitError(f"{nvcc} does not answer as nvcc does; name another toolkit in CUDA_HOME")
    if tuple(map(int, found.groups())) < OLDEST_RELEASE:
        release = f"{found[1]}.{found[2]}, expected {'.'.join(map(str, OLDEST_RELEASE))} or later"
        raise ToolkitError(f"{nvcc} is of CUDA {release}; name another toolkit in CUDA_HOME")
    top = Path(values["TOP"]).resolve()
    include_dirs = _folders(values.get("INCLUDES", ""), values.get("SYSTEM_INCLUDES", "")) or (top / "include",)
    _first_with("cuda_runtime.h", include_dirs)
    places = (*_folders(values.get("LIBRARIES", "")), top / "lib64", top / "lib")
    static_runtime = _first_with("libcudart_static.a", places)
    own = top / "bin" / "nvcc"
    return Toolkit(own if own.exists() else nvcc, f"{found[1]}.{found[2]}", include_dirs, static_runtime)


def _folders(*values: str) -> tuple[Path, ...]:
    """Of '"-I/a" "-isystem" "/b"' the folders that exist."""
    words = [re.sub(r"^-(I|L|isystem)", "", word) for value in values for word in shlex.split(value)]
    return tuple(Path(word).resolve() for word in words if word and os.path.isdir(word))


def _first_with(name: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    looked = ", ".join(map(str, folders))
    raise ToolkitError(
        f"the CUDA toolkit has no {name} (looked in {looked}); install the rest of it: of NVIDIA's packages on PyPI "
        "nvidia-cuda-runtime, of the release of nvcc"
    )


def compile_one(command: Sequence[str]) -> int:
    """Runs nvcc for one file, without the architectures that the file's name excludes."""
    source = next(Path(word).resolve() for word in command if word.endswith(".cu"))
    log = (LOGS / source.relative_to(ROOT / "csrc")).with_suffix(".ptxas")
    # A compilation that fails or is cut off leaves none.
    log.unlink(missing_ok=True)
    if source.stem.endswith("_sm90"):
        command = [word for word in command if word not in SM80_FLAGS]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        print(result.stdout, end="", flush=True)
        return result.returncode
    rest = [line for line in result.stdout.splitlines(keepends=True) if not REPORT.match(line)]
    print("".join(rest), end="", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(result.stdout)
    return 0


def main() -> int:
    if len(sys.argv) > 1:
        return compile_one(sys.argv[1:])
    try:
        toolkit = find_toolkit()
    except ToolkitError as error:
        print(f"fastconv: {error}", file=sys.stderr)
        return 1
    print(toolkit.nvcc.parent.parent if toolkit else "no nvcc")
    return 0 if toolkit else 1


if __name__ == "__main__":
    sys.exit(main())
