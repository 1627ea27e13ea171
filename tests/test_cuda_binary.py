"""What `make cuda` made: what ptxas says of the kernels, and what the library asks of the machine that loads it."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = next(iter(sorted((ROOT / "fastconv").glob("_C_cuda*.so"))), None)
LOGS = sorted((ROOT / "build" / "cuda").glob("**/*.ptxas"))
SOURCES = sorted((ROOT / "csrc").glob("**/cuda*.cu"))
MMA_SOURCES = [source for source in SOURCES if source.stem.startswith("cuda_implicit_gemm_mma")]
COPIED_TILES = ("MmaTileILi128ELi128ELi64ELi2EE", "MmaTileILi64ELi64ELi32ELi4EE")
CUOBJDUMP = shutil.which("cuobjdump")

pytestmark = pytest.mark.skipif(LIBRARY is None and not LOGS, reason="no CUDA library; `make cuda` builds it")
binutils = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("readelf") is None, reason="needs nm and readelf (binutils)"
)

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


# Kept by CUDA builds of torch only; everything else must be there in any torch.
CUDA_ONLY_SYMBOLS = {"aoti_torch_get_current_cuda_stream"}
STABLE_ABI = re.compile(r"(aoti_torch|torch)_\w+")
# Of libc, libstdc++ and libgcc, which give their symbols versions; weak ones of the tool chain; standard C++ names
# that the linker found in libtorch_cpu, which has copies without a version.
SYSTEM = re.compile(
    r"\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_ITM_(de)?registerTMCloneTable|__gmon_start__|_Z(N[KOR]*)?St\w+"
)

FATBINARY_MAGIC = struct.pack("<I", 0xBA55ED50)
PTX, ELF = 1, 2


@pytest.fixture
def library() -> Path:
    if LIBRARY is None:
        pytest.fail("the kernels are compiled, but there is no fastconv/_C_cuda*.so; run `make cuda`")
    return LIBRARY


def output_of(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def symbols(library: Path, kind: str) -> set[str]:
    return {line.split()[-1].replace("@@", "@") for line in output_of("nm", "-D", kind, library).splitlines()}


@binutils
def test_it_wants_nothing_but_the_stable_abi_and_the_system(library):
    wanted = {name for name in symbols(library, "--undefined-only") if not SYSTEM.fullmatch(name)}
    assert [name for name in wanted if not STABLE_ABI.fullmatch(name)] == []
    # What the torch at hand does not export, another might not either; a CUDA build has them all.
    own = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch.so"))
    missing = {name for name in wanted if not hasattr(own, name)}
    assert missing == (set() if torch.version.cuda else CUDA_ONLY_SYMBOLS)
    assert wanted >= CUDA_ONLY_SYMBOLS


@binutils
def test_it_keeps_its_copy_of_cudas_runtime_to_itself(library):
    assert [name for name in symbols(library, "--defined-only") if re.match(r"_*(cu|nv)[A-Za-z]", name)] == []


@binutils
def test_it_links_torch_and_nothing_of_cuda(library):
    dynamic = output_of("readelf", "-d", library)
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    # Through libtorch.so, although none of its own symbols is used, it finds libtorch_cuda.so.
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= set(needed)
    assert [name for name in needed if re.match(r"lib(cu|nv|python)", name)] == []
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def images(library: Path) -> Iterator[set[tuple[int, int]]]:
    """For each object file with kernels its images as (PTX or ELF, architecture).

    A fat binary is a header (magic, version, its size, the size of what follows) and entries, each with a header of its
    own (kind, -, its size, the size of what follows, ..., the architecture at byte 28); the images are compressed.
    """
    data = library.read_bytes()
    for match in re.finditer(re.escape(FATBINARY_MAGIC), data):
        version, header, size = struct.unpack_from("<HHQ", data, match.start() + 4)
        assert version == 1
        at, end, found = match.start() + header, match.start() + header + size, set()
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
            (architecture,) = struct.unpack_from("<I", data, at + 28)
            found.add((kind, architecture))
            at += header + size
        yield found


def test_it_holds_code_for_both_architectures(library):
    found = list(images(library))
    sm90_only = sum(source.stem.endswith("_sm90") for source in SOURCES)
    assert len(found) == len(SOURCES)
    assert found.count({(ELF, 80), (PTX, 80), (ELF, 90)}) == len(SOURCES) - sm90_only
    assert found.count({(ELF, 90)}) == sm90_only


def log_of(source: Path) -> str:
    return (ROOT / "build" / "cuda" / source.relative_to(ROOT / "csrc").with_suffix(".ptxas")).read_text()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT / "csrc")))
def test_kernels_keep_out_of_local_memory(source):
    log = log_of(source)
    entries = [match.groupdict() for match in ENTRY.finditer(log)]
    assert len(entries) == log.count("Compiling entry function") > 0
    spilling = [e for e in entries if int(e["stack"]) or int(e["stores"]) or int(e["loads"])]
    assert not spilling, f"kernels with a stack frame or spills: {spilling}"
    wanted = {"sm_90a"} if source.stem.endswith("_sm90") else {"sm_80", "sm_90a"}
    assert {e["arch"] for e in entries} == wanted


def machine_code(source: Path) -> dict[str, str]:
    """Of each kernel, for sm_80: mangled name -> instructions."""
    found = next(iter((ROOT / "build").glob(f"*/csrc/{source.relative_to(ROOT / 'csrc').with_suffix('.o')}")), None)
    if found is None or CUOBJDUMP is None:
        pytest.skip("needs the objects of `make cuda` and cuobjdump (of the CUDA toolkit, with nvdisasm)")
    text = output_of(CUOBJDUMP, "-sass", "-arch", "sm_80", found)
    return {name: code for part in text.split("Function : ")[1:] for name, _, code in [part.partition("\n")]}


@pytest.mark.parametrize("source", MMA_SOURCES, ids=lambda source: source.stem)
def test_tensor_cores_are_fed_by_16_byte_copies(source):
    kernels = {name: code for name, code in machine_code(source).items() if re.search(r"\dimplicit_gemm_mma", name)}
    assert kernels
    copied = 0
    for name, code in kernels.items():
        assert "HMMA." in code, name
        assert "LDSM." in code, name
        if any(tile in name for tile in COPIED_TILES):
            copied += 1
            assert re.search(r"LDGSTS\S*\.128", code), name
        if "implicit_gemm_mma_weight_grad" not in name:
            assert "STG.E.128" in code, name
    assert copied, "no kernel has the tiles whose slices are copied"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT / "csrc")))
def test_no_warnings(source):
    assert "warning" not in log_of(source)
