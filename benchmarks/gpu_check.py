"""Checks fastconv on a machine with a GPU: its tests, compute-sanitizer, ratios against cuDNN. `make gpu-check`.

    python -m benchmarks.gpu_check --out DIR [--parts tests,sanitize,bench] [--minutes 8] [--dtypes float16,float32]

Runs with the Python that is given and what is installed there: nothing is fetched. The libraries are those built
beforehand in fastconv/; one that is missing, or made for another Python, is built in place. DIR/gpu_check.json and
DIR/gpu_check.md are rewritten after each part, so a part that fails or takes too long costs nothing but itself.
The exit status is 0 if no part failed or ran out of time.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "sanitize", "bench")
TOOLS = ("memcheck", "racecheck")
TOOL_FOUND_ERRORS = 86  # compute-sanitizer's exit status, by our own wish
GRACE_SECONDS = 20  # from the request to stop to the end of all processes
BENCH_MARGIN = 40  # the bench part stops beginning cases that long before its time is up
BENCH_COMMAND = [sys.executable, "-m", "benchmarks.gpu_bench"]
NEEDED = "it needs g++, Python's headers, setuptools>=77, ninja, pybind11, for _C_cuda nvcc"
TAIL = 4000  # characters of output that are kept

FACTS = """
import json, platform, torch
facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda of torch": torch.version.cuda,
         "cudnn": torch.backends.cudnn.version()}
if torch.cuda.is_available():
    device = torch.cuda.get_device_properties(0)
    facts |= {"device": device.name, "capability": f"{device.major}.{device.minor}",
              "multiprocessors": device.multi_processor_count, "memory bytes": device.total_memory,
              "L2 bytes": device.L2_cache_size}
print(json.dumps(facts))
"""
USABLE = "import sys; from fastconv import backends; sys.exit(backends.unavailable('cuda'))"


@dataclass
class Ran:
    """A finished command. ``status`` is None if it was stopped because its time was up."""

    status: int | None
    output: str
    seconds: float


@dataclass
class Part:
    """What came of one part: passed, failed, timed out or skipped."""

    status: str
    reason: str = ""
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    output: str = ""  # the end of it, unless all went well

    @property
    def bad(self) -> bool:
        return self.status not in ("passed", "skipped")


def execute(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Ran:
    """Runs a command from the repository's root; when its time is up interrupts it, then ends it and its children."""
    start = time.monotonic()
    process = subprocess.Popen(
        list(command),
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    status: int | None = None
    try:
        output, _ = process.communicate(timeout=max(seconds, 0))
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    except BaseException:  # Ctrl-C does not reach another session's processes
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Ran(status, output, time.monotonic() - start)


# --- preparation ------------------------------------------------------------------------------------------------------


def missing_libraries() -> list[str]:
    """Of the three libraries those that this Python cannot load, because they are not there."""
    folder = ROOT / "fastconv"
    missing = [name for name in ("_C_cpu", "_C_cuda") if not (folder / f"{name}.abi3.so").exists()]
    if not any((folder / f"_C{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        missing.append("_C")
    return missing


def prepare(seconds: float) -> Part:
    """Builds what is missing and asks whether CUDA can be used."""
    start = time.monotonic()
    built = missing_libraries()
    for name in built:
        environment = {"FASTCONV_ONLY": name, "FASTCONV_CUDA": "1" if name == "_C_cuda" else "0"}
        left = seconds - (time.monotonic() - start)
        ran = execute([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], left, environment)
        if ran.status != 0:
            how = "took too long" if ran.status is None else "failed"
            reason = (
                f"fastconv/{name} is not there for this Python ({sys.version.split()[0]}), and building it {how} "
                f"({NEEDED}; the end of the output says what is missing). Build it beforehand: "
                f"FASTCONV_ONLY={name} python setup.py build_ext --inplace"
            )
            return Part("failed", reason, time.monotonic() - start, output=ran.output[-TAIL:])
    ran = execute([sys.executable, "-c", USABLE], seconds - (time.monotonic() - start))
    took = time.monotonic() - start
    if ran.status != 0:
        return Part("failed", "fastconv's CUDA kernels cannot be used here", took, output=ran.output[-TAIL:])
    return Part("passed", f"built {', '.join(built)}" if built else "", took)


def machine() -> dict[str, Any]:
    """What ran: asked of other processes, so that a torch that cannot be imported does not end this one."""
    facts: dict[str, Any] = {"python": sys.version.split()[0]}
    ran = execute([sys.executable, "-c", FACTS], 120)
    try:
        facts |= json.loads(ran.output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        facts["torch"] = f"cannot be asked: {ran.output[-TAIL:]}"
    if shutil.which("nvidia-smi"):
        ran = execute(["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"], 60)
        facts["driver, highest clock"] = ran.output.strip()
    return facts


# --- parts ------------------------------------------------------------------------------------------------------------


def gpu_tests() -> list[str]:
    """Only these files are imported: others need packages that a machine with a GPU may not have."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_gpu*.py"))


def pytest_command(selection: str) -> list[str]:
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu_results"]
    return [sys.executable, "-m", "pytest", "-q", *plugins, "-m", selection, *gpu_tests()]


def outcomes(path: Path) -> tuple[dict[str, int], list[dict[str, str]]]:
    """(counts, failures) of the lines that benchmarks/gpu_results.py wrote. A test that began and has no outcome is
    counted as unfinished: it was running when the process ended."""
    counts = {"selected": 0, "passed": 0, "failed": 0, "skipped": 0, "unfinished": 0}
    tests: dict[str, dict[str, str]] = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        line = json.loads(text)
        if "selected" in line:
            counts["selected"] += line["selected"]
        elif line["outcome"] != "passed" or tests.get(line["test"], line)["outcome"] in ("started", "passed"):
            tests[line["test"]] = line
    for line in tests.values():
        line["outcome"] = line["outcome"].replace("started", "unfinished")
        counts[line["outcome"]] += 1
    failures = [
        {"test": line["test"], "outcome": line["outcome"], "text": line.get("text", "")}
        for line in tests.values()
        if line["outcome"] in ("failed", "unfinished")
    ]
    return counts, failures


def run_pytest(folder: Path, name: str, selection: str, seconds: float, before: Sequence[str] = ()) -> tuple[Part, Ran]:
    results = folder / f"{name}.jsonl"
    results.unlink(missing_ok=True)
    # Its own allocations, so that compute-sanitizer sees where each tensor ends.
    environment = {"FASTCONV_RESULTS": str(results), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    if before:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    ran = execute([*before, *pytest_command(selection)], seconds, environment)
    counts, failures = outcomes(results)
    part = Part("passed", "", ran.seconds, counts, failures)
    if ran.status is None:
        part.status, part.reason = "timed out", f"stopped after {ran.seconds:.0f} s"
    elif failures:
        part.status, part.reason = "failed", f"{len(failures)} tests failed"
    elif counts["passed"] == 0:
        part.status, part.reason = "failed", f"no test of -m '{selection}' passed, {counts['skipped']} were skipped"
    elif ran.status != 0:
        part.status, part.reason = "failed", f"exit status {ran.status}"
    part.output = ran.output[-TAIL:] if part.bad else ""
    return part, ran


def run_tests(folder: Path, seconds: float, dtypes: str) -> Part:
    return run_pytest(folder, "tests", "gpu", seconds)[0]


def sanitizer() -> str | None:
    usual = "/usr/local/cuda/bin/compute-sanitizer"
    return shutil.which("compute-sanitizer") or (usual if os.path.exists(usual) else None)


def run_sanitize(folder: Path, seconds: float, dtypes: str) -> Part:
    """memcheck, then racecheck in the time that is left, over the tests marked gpu and sanitize."""
    program = sanitizer()
    if program is None:
        return Part("skipped", "compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    whole = Part("passed")
    # torch's own kernels are not what is checked, and take most of the time.
    ours_only = "--kernel-name" in execute([program, "--help"], 60).output
    for tool in TOOLS:
        before = [program, "--tool", tool, "--error-exitcode", str(TOOL_FOUND_ERRORS), "--target-processes", "all"]
        before += ["--kernel-name", "kernel_substring=fastconv"] if ours_only else []
        part, ran = run_pytest(folder, f"sanitize-{tool}", "gpu and sanitize", seconds - whole.seconds, before)
        (folder / f"sanitize-{tool}.txt").write_text(ran.output)
        if ran.status == TOOL_FOUND_ERRORS:
            # Also where pytest's own exit status was not 0, which is an error to it.
            also = f" ({part.reason})" if part.failures else ""
            part.status, part.reason = "failed", f"found errors: see sanitize-{tool}.txt{also}"
        whole.counts |= {f"{tool} {name}": number for name, number in part.counts.items()}
        whole.failures += part.failures
        whole.seconds += part.seconds
        if part.bad:
            whole.status = part.status if whole.status != "failed" else "failed"
            whole.reason += ("; " if whole.reason else "") + f"{tool}: {part.reason}"
            whole.output = part.output
    return whole


def run_bench(folder: Path, seconds: float, dtypes: str) -> Part:
    for name in ("bench.json", "bench.md"):
        (folder / name).unlink(missing_ok=True)
    until = max(seconds - BENCH_MARGIN, seconds / 2)
    ran = execute([*BENCH_COMMAND, "--out", str(folder), "--seconds", str(until), "--dtypes", dtypes], seconds)
    found = read_json(folder / "bench.json")
    missing = found.get("missing", [])
    counts = {"measured": len(found.get("rows", [])), "not measured": len(missing)}
    part = Part("passed", "", ran.seconds, counts)
    late = [entry for entry in missing if entry["reason"] == "the time was up"]
    if len(missing) > len(late):
        part.status, part.reason = "failed", f"{len(missing) - len(late)} cases could not be measured"
    elif ran.status is None:
        part.status, part.reason = "timed out", f"stopped after {ran.seconds:.0f} s; the rest was not measured"
    elif late:
        part.status, part.reason = "timed out", f"{len(late)} cases were left when the time was up"
    elif ran.status != 0 or not found:
        part.status, part.reason = "failed", f"exit status {ran.status}"
    part.output = ran.output[-TAIL:] if part.bad else ""
    return part


RUN: dict[str, Callable[[Path, float, str], Part]] = {"tests": run_tests, "sanitize": run_sanitize, "bench": run_bench}


# --- results ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}  # type: ignore[no-any-return]


def write(folder: Path, facts: dict[str, Any], parts: dict[str, Part]) -> None:
    """gpu_check.json and gpu_check.md, of the parts that have run so far."""
    bench = folder / "bench.md"
    has_bench = "bench" in parts and bench.exists()
    document = {
        "machine": facts,
        "parts": {name: {key: value for key, value in vars(part).items() if value} for name, part in parts.items()},
        "bench": read_json(folder / "bench.json") if has_bench else {},
    }
    (folder / "gpu_check.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = [f"# fastconv on {facts.get('device', 'a machine without a GPU')}", ""]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items() if name != "device") + ".", ""]
    lines += ["| part | status | seconds | counts | |", "| --- | --- | --- | --- | --- |"]
    for name, part in parts.items():
        counts = ", ".join(f"{number} {what}" for what, number in part.counts.items() if number)
        lines.append(f"| {name} | {part.status} | {part.seconds:.0f} | {counts} | {part.reason} |")
    lines.append("")
    for name, part in parts.items():
        lines += [f"- {name}: {failure['outcome']} {failure['test']}" for failure in part.failures]
    lines += ["", bench.read_text()] if has_bench else []
    (folder / "gpu_check.md").write_text("\n".join(lines))


def check(folder: Path, wanted: Sequence[str], seconds: float, dtypes: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine()
    parts = {"preparation": prepare(seconds)}
    for name in wanted:
        if parts["preparation"].bad:
            parts[name] = Part("failed", "not run: the preparation failed")
        else:
            print(f"gpu-check: {name}, for at most {seconds:.0f} s", flush=True)
            try:
                parts[name] = RUN[name](folder, seconds, dtypes)
            except Exception as error:  # a fault of this program must not lose the other parts
                parts[name] = Part("failed", f"{type(error).__name__}: {error}")
        write(folder, facts, parts)
    for name, part in parts.items():
        print(f"gpu-check: {name} {part.status} in {part.seconds:.0f} s" + (f": {part.reason}" if part.reason else ""))
        if part.output:
            print(part.output)
    print(f"gpu-check: results are in {folder}/gpu_check.md and gpu_check.json")
    return 1 if any(part.bad for part in parts.values()) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description="tests, sanitizer and ratios on a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu_check", help="folder of the results")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=8, help="for each part (default 8)")
    parser.add_argument("--dtypes", default="float16", help="of bench, comma-separated")
    options = parser.parse_args(arguments)
    wanted = [part for part in options.parts.split(",") if part]
    unknown = [part for part in wanted if part not in PARTS]
    if unknown or not wanted:
        parser.error(f"--parts is {options.parts!r}, expected some of {','.join(PARTS)}")
    return check(options.out.resolve(), wanted, 60 * options.minutes, options.dtypes)


if __name__ == "__main__":
    sys.exit(main())
