"""Ranks end with their launcher, and notice one that has gone before they could ask."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from metaformer.death_signal import end_with_launcher

FORK = multiprocessing.get_context("fork")


def rank_of(launcher_said: bool, folder: Path) -> None:
    """A rank: it says that it has begun, and what ends it."""
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    if launcher_said:
        os.environ["TORCHELASTIC_RUN_ID"] = "run"

    def end(number: int, frame: Any) -> None:
        (folder / "ended").write_text(signal.Signals(number).name)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    end_with_launcher()
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "pid").rename(folder / "begun")
    time.sleep(20)


def launcher(launcher_said: bool, folder: Path) -> None:
    """A launcher, which does nothing but start a rank."""
    rank = FORK.Process(target=rank_of, args=(launcher_said, folder))
    rank.start()
    rank.join()


def appears(file: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return file.exists()


@pytest.mark.parametrize("launcher_said", [True, False])
def test_a_launcher_that_dies(tmp_path: Path, launcher_said: bool) -> None:
    """Killed by SIGKILL, torchrun's ranks get SIGTERM; what no torchrun has started goes on."""
    process = FORK.Process(target=launcher, args=(launcher_said, tmp_path))
    process.start()
    assert appears(tmp_path / "begun", 20)
    rank = int((tmp_path / "begun").read_text())
    try:
        process.kill()
        process.join()
        assert appears(tmp_path / "ended", 10 if launcher_said else 0.5) == launcher_said
    finally:
        if not launcher_said:
            os.kill(rank, signal.SIGKILL)
    if launcher_said:
        assert (tmp_path / "ended").read_text() == "SIGTERM"


ORPHAN = """
import os, sys, time
from pathlib import Path
from typing import Any
from metaformer.death_signal import end_with_launcher

launcher = os.getpid()
if os.fork() == 0:
    while os.getppid() == launcher:
        time.sleep(0.01)
    os.environ["TORCHELASTIC_RUN_ID"] = "run"
    try:
        end_with_launcher()
    except SystemExit as error:
        Path(sys.argv[1]).write_text(str(error.code))
"""


def test_an_orphan_ends(tmp_path: Path) -> None:
    """A rank whose torchrun has gone before the rank could ask for the signal: it has another parent by then."""
    subprocess.run([sys.executable, "-c", ORPHAN, str(tmp_path / "code")], check=True, timeout=60)
    assert appears(tmp_path / "code", 20)
    assert (tmp_path / "code").read_text() == "1"
