"""Limits, signals and folders, checked on this machine."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from metaformer.diagnosis.finding import Finding, Verdict
from metaformer.diagnosis.machine import GIB, limits, run_folder, shared_memory, signals, temporary_folder


def verdicts(findings: list[Finding]) -> dict[str, Verdict]:
    return {finding.check: finding.verdict for finding in findings}


def test_more_processes_than_cores() -> None:
    """More processes than usable cores give a warning; as many as cores do not."""
    cores = len(os.sched_getaffinity(0))
    assert verdicts(list(limits(cores)))["cores"] is Verdict.ok
    assert verdicts(list(limits(cores + 1)))["cores"] is Verdict.warn


def test_few_open_files() -> None:
    """A low limit of this process gives a warning with a fix."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limit[1]))
    try:
        found = [finding for finding in limits(1) if finding.check == "open files"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert [(finding.verdict, finding.fix) for finding in found] == [(Verdict.warn, "ulimit -n 4096")]


@pytest.mark.parametrize(
    ("free", "verdict"), [(64 * 2**20, Verdict.fail), (3 * GIB, Verdict.warn), (4 * GIB, Verdict.ok)]
)
def test_shared_memory(free: int, verdict: Verdict) -> None:
    """Docker's 64 MiB fail; less than 1 GiB for each of four processes gives a warning."""
    assert shared_memory(free, 4).verdict is verdict


def test_signals_arrive() -> None:
    """Both signals are handled, and the previous handlers are restored."""
    before = signal.getsignal(signal.SIGTERM)
    assert [finding.verdict for finding in signals()] == [Verdict.ok, Verdict.ok]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_blocked_signal_fails() -> None:
    """A launcher that starts Python with SIGTERM blocked would prevent saving; the finding names the signal."""
    program = (
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]);"
        "from metaformer.diagnosis.machine import signals; print(*signals(), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("fail  signals     SIGTERM does not arrive; ")
    assert second.startswith("ok    signals     SIGUSR1")


def test_a_folder_for_runs(tmp_path: Path) -> None:
    """A folder that can be created and written passes and is left empty; one below a file fails."""
    assert verdicts(list(run_folder(tmp_path / "runs")))["run folder"] is Verdict.ok
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "file").touch()
    (found,) = run_folder(tmp_path / "file" / "runs")
    assert found.verdict is Verdict.fail
    assert "Not a directory" in found.message


def test_a_temporary_folder_with_too_long_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long TMPDIR fails, because worker processes could not open their sockets there."""
    assert temporary_folder().verdict is Verdict.ok
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * 90)
    found = temporary_folder()
    assert found.verdict is Verdict.fail
    assert found.fix.startswith("export TMPDIR=/tmp")
