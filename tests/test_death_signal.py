"""Tests that ranks end with their launcher, even if it dies while they start."""

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


def rank_of(under_torchrun: bool, folder: Path) -> None:
    """Run a rank that records its start and the signal that ends it."""
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    if under_torchrun:
        os.environ["TORCHELASTIC_RUN_ID"] = "run"

    def end(number: int, frame: Any) -> None:
        (folder / "ended").write_text(signal.Signals(number).name)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    end_with_launcher()
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "pid").rename(folder / "started")
    time.sleep(20)


def launcher(under_torchrun: bool, folder: Path) -> None:
    """Run a launcher that only starts a rank."""
    rank = FORK.Process(target=rank_of, args=(under_torchrun, folder))
    rank.start()
    rank.join()


def appears(file: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return file.exists()


@pytest.mark.parametrize("under_torchrun", [True, False])
def test_a_launcher_that_dies(tmp_path: Path, under_torchrun: bool) -> None:
    """After SIGKILL to torchrun, its ranks get SIGTERM; a process without torchrun continues."""
    process = FORK.Process(target=launcher, args=(under_torchrun, tmp_path))
    process.start()
    assert appears(tmp_path / "started", 20)
    rank = int((tmp_path / "started").read_text())
    try:
        process.kill()
        process.join()
        assert appears(tmp_path / "ended", 10 if under_torchrun else 0.5) == under_torchrun
    finally:
        if not under_torchrun:
            os.kill(rank, signal.SIGKILL)
    if under_torchrun:
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
    """A rank exits with code 1 if its torchrun has died before the rank could request the signal."""
    subprocess.run([sys.executable, "-c", ORPHAN, str(tmp_path / "code")], check=True, timeout=60)
    assert appears(tmp_path / "code", 20)
    assert (tmp_path / "code").read_text() == "1"
