"""Tests of printing to a full disk, to a closed pipe, and to a closed file descriptor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# Prints three tracker messages and a warning. "last words" stays in Python's buffer until exit.
PROGRAM = """
import sys
from pathlib import Path
from metaformer import streams
from metaformer.tracking.console import ConsoleTracker

streams.guard()
folder = Path(sys.argv[1])
alarms = []
tracker = ConsoleTracker(
    epochs=1, steps=1, samples_per_step=1, log_file=folder / "log.txt", alarm=alarms.append
)
tracker.message("one")
print("a warning", file=sys.stderr)
tracker.message("two")
tracker.message("three, \\udcff \\u2713")
tracker.close(failed=False)
(folder / "alarms").write_text("; ".join(alarms))
print("last words")
print("last words", file=sys.stderr, end="")
"""
FULL, GONE = "No space left on device", "Broken pipe"


@pytest.mark.parametrize(
    ("shell", "alarms"),
    [
        ("exec {program}", ""),
        ("exec {program} >/dev/full", f"stdout cannot be written ({FULL})"),
        ("exec {program} 2>/dev/full", f"stderr cannot be written ({FULL})"),
        ("{program} | true; exit ${PIPESTATUS[0]}", f"stdout cannot be written ({GONE})"),
        ("exec {program} >&-", ""),
        ("exec {program} <&- >&- 2>&-", ""),
    ],
    ids=["healthy", "full disk", "full disk for stderr", "reader gone", "closed", "all closed"],
)
def test_training_outlives_its_console(tmp_path: Path, shell: str, alarms: str) -> None:
    """The exit code is 0, the log has all lines and the failure, and the alarm function is called with it."""
    program = f"{sys.executable} -W error -c '{PROGRAM}' {tmp_path}"
    if "|" in shell:
        program = f"{{ sleep 0.3; {program}; }}"  # waits until the reader has ended
    command = ["bash", "-c", shell.replace("{program}", program)]
    environment = os.environ | {"LC_ALL": "C.UTF-8", "PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(
        command, env=environment, capture_output=True, timeout=60, check=False, text=True, errors="replace"
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert (tmp_path / "alarms").read_text() == alarms
    log = [line[20:] for line in (tmp_path / "log.txt").read_text(errors="surrogateescape").splitlines()]
    expected = [f"ALARM        {alarms}; training continues, this file has all lines of the run"] if alarms else []
    assert [line for line in log if line not in expected] == ["one", "two", "three, \udcff \u2713"]
    assert [line for line in log if line in expected] == expected
