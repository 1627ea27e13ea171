"""benchmarks/gpu_check.py without a GPU: other programs play its parts. What they must not do is lose results."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_check  # noqa: E402
from benchmarks.gpu_check import Part, Ran  # noqa: E402

TESTS = """
import os, time, pytest
pytestmark = pytest.mark.gpu

@pytest.fixture
def broken():
    yield
    raise RuntimeError("teardown")

def test_passes(): pass
@pytest.mark.sanitize
def test_passes_too(): pass
def test_fails(): assert 1 == 2, "one is not two"
def test_fails_late(broken): pass
@pytest.mark.skip(reason="no such GPU")
def test_skips(): pass
"""


@pytest.fixture
def gpu_tests(monkeypatch, tmp_path):
    """gpu_tests(text) makes that text the only test file."""

    def write(text: str) -> None:
        path = tmp_path / "test_gpu_fake.py"
        path.write_text(text)
        monkeypatch.setattr(
            gpu_check, "gpu_tests", lambda: [f"--rootdir={ROOT}", f"-c{ROOT}/pyproject.toml", str(path)]
        )

    return write


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_command_gives_status_and_output():
    ran = gpu_check.execute(python("import os; print(os.environ['NAME']); raise SystemExit(3)"), 60, {"NAME": "x"})
    assert (ran.status, ran.output) == (3, "x\n")


def test_a_command_that_takes_too_long_is_interrupted_and_keeps_its_output():
    # A background job of a plain shell, and so its children, would ignore the interrupt.
    text = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    text += "try:\n print('begun', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('closing')"
    ran = gpu_check.execute(python(text), 2)
    assert (ran.status, ran.output) == (None, "begun\nclosing\n")


def test_a_command_that_does_not_stop_is_ended_with_its_children(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.5)
    child = "import signal, time, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    child += f"time.sleep(5); open({str(tmp_path / 'alive')!r}, 'w')"
    text = "import signal, subprocess, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    text += f"subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    assert gpu_check.execute(python(text), 1).status is None
    assert time.monotonic() - start < 4
    time.sleep(4.5)
    assert not (tmp_path / "alive").exists()


def test_outcomes_of_tests_are_counted_and_failures_named(gpu_tests, tmp_path):
    gpu_tests(TESTS)
    part = gpu_check.run_tests(tmp_path, 60, "")
    assert part.status == "failed"
    assert part.counts == {"selected": 5, "passed": 2, "failed": 2, "skipped": 1, "unfinished": 0}
    assert [failure["test"].split("::")[1] for failure in part.failures] == ["test_fails", "test_fails_late"]
    assert "one is not two" in part.failures[0]["text"]
    assert "2 failed" in part.output or "1 failed" in part.output


def test_tests_that_pass_are_a_passed_part(gpu_tests, tmp_path):
    gpu_tests("import pytest\n@pytest.mark.gpu\ndef test_one(): pass\ndef test_unmarked(): assert False\n")
    part = gpu_check.run_tests(tmp_path, 60, "")
    assert (part.status, part.counts["passed"], part.failures, part.output) == ("passed", 1, [], "")


@pytest.mark.parametrize("text", ["def test_unmarked(): pass\n", TESTS.split("@pytest.fixture")[0], "import nothing\n"])
def test_no_test_is_no_pass(gpu_tests, tmp_path, text):
    gpu_tests(text)
    part = gpu_check.run_tests(tmp_path, 60, "")
    assert part.status == "failed"
    assert "no test of -m 'gpu' passed" in part.reason


def test_a_crash_keeps_what_came_before(gpu_tests, tmp_path):
    gpu_tests(TESTS.split("@pytest.fixture")[0] + "def test_a(): pass\ndef test_b(): os._exit(139)\n")
    part = gpu_check.run_tests(tmp_path, 60, "")
    assert part.status == "failed"
    assert (part.counts["passed"], part.counts["unfinished"]) == (1, 1)
    assert part.failures[0]["test"].endswith("test_b")


def test_a_test_that_hangs_keeps_what_came_before(gpu_tests, tmp_path):
    gpu_tests(TESTS.split("@pytest.fixture")[0] + "def test_a(): pass\ndef test_b(): time.sleep(60)\n")
    part = gpu_check.run_tests(tmp_path, 6, "")
    assert part.status == "timed out"
    assert (part.counts["passed"], part.counts["unfinished"]) == (1, 1)


def test_without_the_sanitizer_its_part_is_skipped_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: None)
    part = gpu_check.run_sanitize(tmp_path, 60, "")
    assert (part.status, part.bad) == ("skipped", False)
    assert "not installed" in part.reason


def test_a_failed_test_is_told_from_what_the_sanitizer_finds(monkeypatch, tmp_path):
    for failed, expected in [(0, "found errors: see"), (2, "found errors: see sanitize-memcheck.txt (2 tests failed)")]:
        failures = [{"test": "test_x", "outcome": "failed", "text": ""}] * failed
        part = Part("failed", "2 tests failed", failures=failures) if failed else Part("failed", "exit status 86")
        monkeypatch.setattr(gpu_check, "run_pytest", lambda *_, part=part: (part, Ran(86, "", 1.0)))
        monkeypatch.setattr(gpu_check, "sanitizer", lambda: "true")
        whole = gpu_check.run_sanitize(tmp_path, 60, "")
        assert whole.status == "failed"
        assert whole.reason.startswith(f"memcheck: {expected}")


@pytest.mark.parametrize("errors_of", [None, "racecheck"])
def test_both_tools_run_over_the_tests_marked_for_them(gpu_tests, monkeypatch, tmp_path, errors_of):
    gpu_tests(TESTS)
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f"""#!/bin/sh
[ "$1" = --help ] && {{ echo "  --kernel-name arg"; exit; }}
echo "$@" >> {tmp_path}/calls
tool=$2
while [ "$1" != {sys.executable} ]; do shift; done
"$@" || exit
echo "caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING"
[ "$tool" != "{errors_of}" ] || exit 86
"""
    )
    program.chmod(0o755)
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: str(program))
    part = gpu_check.run_sanitize(tmp_path, 60, "")
    assert part.counts["memcheck passed"] == part.counts["racecheck passed"] == 1
    assert part.counts["memcheck selected"] == 1
    memcheck, racecheck = (tmp_path / "calls").read_text().splitlines()
    assert "--tool memcheck --error-exitcode 86" in memcheck
    assert "--tool racecheck --error-exitcode 86" in racecheck
    assert "--kernel-name kernel_substring=fastconv" in memcheck
    assert "caching off: 1" in (tmp_path / "sanitize-memcheck.txt").read_text()
    if errors_of is None:
        assert (part.status, part.reason) == ("passed", "")
    else:
        assert (part.status, part.reason) == ("failed", "racecheck: found errors: see sanitize-racecheck.txt")


def bench(folder: Path, monkeypatch, text: str, seconds: float = 60) -> Part:
    head = "import sys, json, time; folder = sys.argv[sys.argv.index('--out') + 1]\n"
    head += "def save(rows, missing): open(folder + '/bench.json', 'w').write(json.dumps("
    head += "{'rows': rows, 'missing': missing})); open(folder + '/bench.md', 'w').write('the table')\n"
    monkeypatch.setattr(gpu_check, "BENCH_COMMAND", python(head + text))
    return gpu_check.run_bench(folder, seconds, "float16")


def test_a_bench_with_all_its_rows_passes(monkeypatch, tmp_path):
    part = bench(tmp_path, monkeypatch, "save([1, 2, 3], [])")
    assert (part.status, part.counts) == ("passed", {"measured": 3, "not measured": 0})


@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [
        ("save([1], [{'reason': 'the time was up'}]); sys.exit(1)", "timed out", "1 cases were left"),
        ("save([1], [{'reason': 'differ by 3'}]); sys.exit(1)", "failed", "1 cases could not be measured"),
        ("save([1], []); time.sleep(60)", "timed out", "stopped after"),
        ("save([1], []); sys.exit(7)", "failed", "exit status 7"),
        ("sys.exit(1)", "failed", "exit status 1"),
        ("pass", "failed", "exit status 0"),
    ],
)
def test_what_a_bench_leaves_out_is_said(monkeypatch, tmp_path, text, status, reason):
    (tmp_path / "bench.json").write_text('{"rows": [1, 2, 3], "missing": []}')  # of an earlier run
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.5)
    part = bench(tmp_path, monkeypatch, text, seconds=3)
    assert part.status == status
    assert reason in part.reason
    assert part.counts["measured"] == ("save" in text)


@pytest.fixture
def prepared(monkeypatch):
    monkeypatch.setattr(gpu_check, "machine", lambda: {"device": "Fake GPU", "torch": "2.11.0"})
    monkeypatch.setattr(gpu_check, "prepare", lambda seconds: Part("passed"))


def results(folder: Path) -> tuple[dict[str, object], str]:
    return json.loads((folder / "gpu_check.json").read_text()), (folder / "gpu_check.md").read_text()


def test_every_parts_result_is_written_whatever_the_others_do(monkeypatch, tmp_path, prepared, capsys):
    def raises(folder, seconds, dtypes):
        raise OSError("no such device")

    def measures(folder, seconds, dtypes):
        (folder / "bench.json").write_text('{"rows": [{"ratio": 0.5}]}')
        (folder / "bench.md").write_text("## float16\n")
        return Part("timed out", "3 cases were left", 479, {"measured": 9, "not measured": 3})

    failing = Part("failed", "1 tests failed", 5, {"passed": 2}, [{"test": "test_x", "outcome": "failed", "text": "?"}])
    parts = {"tests": lambda *_: failing, "sanitize": raises, "bench": measures}
    monkeypatch.setattr(gpu_check, "RUN", parts)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    document, text = results(tmp_path)
    assert document["machine"] == {"device": "Fake GPU", "torch": "2.11.0"}
    assert {name: part["status"] for name, part in document["parts"].items()} == {
        "preparation": "passed", "tests": "failed", "sanitize": "failed", "bench": "timed out",
    }  # fmt: skip
    assert document["parts"]["sanitize"]["reason"] == "OSError: no such device"
    assert document["bench"] == {"rows": [{"ratio": 0.5}]}
    assert text.startswith("# fastconv on Fake GPU\n")
    assert "| tests | failed | 5 | 2 passed | 1 tests failed |" in text
    assert "- tests: failed test_x" in text
    assert "| bench | timed out | 479 | 9 measured, 3 not measured | 3 cases were left |" in text
    assert "## float16" in text


def test_parts_are_selected_and_others_not_run(monkeypatch, tmp_path, prepared):
    parts = {"tests": lambda *_: Part("passed"), "sanitize": lambda *_: Part("skipped", "not installed")}
    monkeypatch.setattr(gpu_check, "RUN", parts)
    assert gpu_check.main(["--out", str(tmp_path), "--parts", "tests,sanitize"]) == 0
    document, _ = results(tmp_path)
    assert list(document["parts"]) == ["preparation", "tests", "sanitize"]
    assert document["bench"] == {}


@pytest.mark.parametrize("parts", ["", "tests,fuzz"])
def test_an_unknown_part_is_refused(tmp_path, parts, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path / "out"), "--parts", parts])
    assert "expected some of tests,sanitize,bench" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_runs_after_a_failed_preparation(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "machine", dict)
    monkeypatch.setattr(gpu_check, "prepare", lambda seconds: Part("failed", "no GPU"))
    monkeypatch.setattr(gpu_check, "RUN", {})
    assert gpu_check.main(["--out", str(tmp_path), "--parts", "tests"]) == 1
    document, _ = results(tmp_path)
    assert document["parts"]["preparation"]["reason"] == "no GPU"
    assert document["parts"]["tests"] == {"status": "failed", "reason": "not run: the preparation failed"}


def test_what_is_missing_is_built_and_nothing_else(monkeypatch, tmp_path):
    (tmp_path / "fastconv").mkdir()
    (tmp_path / "fastconv" / "_C_cpu.abi3.so").touch()
    (tmp_path / "fastconv" / "_C_cuda.abi3.so").touch()
    (tmp_path / "fastconv" / "_C.cpython-399-x86_64-linux-gnu.so").touch()  # of another Python
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    calls = []

    def execute(command, seconds, environment=None):
        calls.append(environment)
        return Ran(0, "", 0.0)

    monkeypatch.setattr(gpu_check, "execute", execute)
    assert gpu_check.prepare(60) == Part("passed", "built _C", pytest.approx(0, abs=5))
    assert calls == [{"FASTCONV_ONLY": "_C", "FASTCONV_CUDA": "0"}, None]


def test_a_library_that_cannot_be_built_is_named_with_what_was_said(monkeypatch):
    monkeypatch.setattr(gpu_check, "missing_libraries", lambda: ["_C"])
    monkeypatch.setattr(gpu_check, "execute", lambda *_: Ran(1, "fastconv: no C++ compiler found", 0.0))
    part = gpu_check.prepare(60)
    assert part.status == "failed"
    assert "fastconv/_C is not there for this Python" in part.reason
    assert "FASTCONV_ONLY=_C python setup.py build_ext --inplace" in part.reason
    assert part.output == "fastconv: no C++ compiler found"


def test_the_machine_is_described_without_a_gpu_too():
    facts = gpu_check.machine()
    assert facts["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert facts["torch"]
