"""Tests that programs started by tests/warm behave as under a real interpreter, on which the tests of programs rely."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.warm import python

SHOW = """
import os, sys
print(sys.argv, os.getcwd(), os.environ["COLOUR"], sys.stdin.read(), __name__, sys.path[:2])
print("wrong", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("form", ["-c", "-m", "file"])
def test_runs_like_the_interpreter(tmp_path: Path, form: str) -> None:
    """Arguments, folder, environment, stdin, both outputs, __name__, sys.path and exit code are the interpreter's."""
    variables = {"COLOUR": "blue", "PYTHONPATH": str(tmp_path / "modules")}
    (tmp_path / "show.py").write_text(SHOW)
    command = {"-c": ["-c", SHOW], "-m": ["-m", "show"], "file": ["show.py"]}[form]
    options = {"cwd": tmp_path, "env": os.environ | variables, "input": "text", "capture_output": True}
    real, warm = (
        subprocess.run([name, *command, "a b", "c"], **options, text=True, check=False)  # type: ignore[call-overload]
        for name in (sys.executable, python())
    )
    assert (warm.returncode, warm.stderr) == (real.returncode, real.stderr) == (3, "wrong\n")
    assert warm.stdout == real.stdout


@pytest.mark.parametrize(
    ("code", "expected"),
    [("raise ValueError", 1), ("import sys; sys.exit('reason')", 1), ("pass", 0), ("import os; os._exit(9)", 9),
     ("import os; os.kill(os.getpid(), 9)", -9)],
)  # fmt: skip
def test_ends_like_the_interpreter(code: str, expected: int) -> None:
    """Errors, messages, exits and signals give the interpreter's exit code."""
    assert subprocess.run([python(), "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == expected


@pytest.mark.parametrize(
    ("flags", "variables", "warm"), [(["-u"], {}, True), (["-I"], {}, False), ([], {"LD_PRELOAD": ""}, False)]
)
def test_what_a_program_starts(flags: list[str], variables: dict[str, str], warm: bool) -> None:
    """`sys.executable` of a program is warm too, but not for an isolated interpreter or one with other libraries."""
    inner = [*flags, "-c", "import sys; print('torch' in sys.modules)"]
    code = f"import os, subprocess, sys; subprocess.run([sys.executable, *{inner}], env=os.environ | {variables})"
    done = subprocess.run([python(), "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{warm}\n"


def test_signals_reach_the_program(tmp_path: Path) -> None:
    """SIGTERM runs the program's handler; after SIGKILL the program ends too."""
    handler = (
        "import signal, sys, time\nsignal.signal(15, lambda *a: sys.exit(5))\nprint('on', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([python(), "-c", handler], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    assert process.wait(10) == 5
    process.stdout.close()
    file = tmp_path / "pid"
    program = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    process = subprocess.Popen([python(), "-c", program])
    while not file.exists() or not file.read_text():
        time.sleep(0.01)
    process.kill()
    process.wait()
    entry = Path("/proc") / file.read_text()
    deadline = time.monotonic() + 10
    while entry.exists() and (entry / "stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
