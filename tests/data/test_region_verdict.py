"""Whether regions can be decoded: the check, on the CPU, and what becomes of programs that fail it."""

import sys
from pathlib import Path

import pytest
import torch

from metaformer.assembly.parts import region_decode
from metaformer.config import CommonConfig
from metaformer.data.loader import LoaderConfig, LoaderName, RegionDecode
from metaformer.data.region_verdict import judge, remembered
from metaformer.runtime import Runtime

CHECK = (sys.executable, "-m", "metaformer.data.region_check", "cpu")
# Programs that do in place of the check what broken decoders do.
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
HANG = "import time; time.sleep(600)"
WRONG_PIXELS = """
import sys
from metaformer.data import region_check

right = region_check.cut_out
region_check.cut_out = lambda jpegs, start, *rest: right(jpegs, start // 2 if rest[-1] else start, *rest)
sys.argv = ["", "cpu"]
region_check.main()
"""


def test_regions_work_on_the_cpu_and_it_is_remembered(tmp_path: Path) -> None:
    """The check passes where regions are known to be right; a second start reads its verdict and runs nothing."""
    file = tmp_path / "cache" / "verdict.txt"
    assert remembered(file, CHECK)
    assert file.read_text() == "works"
    assert remembered(file, ["/nowhere/no program"])


@pytest.mark.parametrize(
    ("program", "timeout", "verdict"),
    [
        (CRASH, 60, "crashed with signal 11"),
        (HANG, 1, "did not end within 1 s"),
        (WRONG_PIXELS, 60, "ended with exit code 3"),
    ],
    ids=["crash", "hang", "wrong pixels"],
)
def test_what_fails_is_a_no_and_remembered(
    tmp_path: Path, program: str, timeout: float, verdict: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A crash, a hang and other pixels mean no; the reason is kept, and this process goes on without a word."""
    file = tmp_path / "verdict.txt"
    assert not remembered(file, [sys.executable, "-c", program], timeout)
    assert file.read_text() == verdict
    assert not remembered(file, CHECK)
    assert capfd.readouterr() == ("", "")


def test_without_a_place_for_the_verdict(tmp_path: Path) -> None:
    """Where nothing can be written the check is made each time, and counts."""
    (tmp_path / "file").write_text("")
    for program, works in (("", True), ("raise SystemExit(4)", False)):
        command = [sys.executable, "-c", program]
        assert remembered(tmp_path / "file" / "verdict.txt", command) == works
    assert judge(command) == "ended with exit code 4"


@pytest.mark.parametrize("given", RegionDecode)
@pytest.mark.parametrize("name", [LoaderName.dali, LoaderName.torch])
def test_nothing_is_checked_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: LoaderName, given: RegionDecode
) -> None:
    """On a CPU the option stays as it is, and no verdict is written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = CommonConfig(loader=LoaderConfig(name, region_decode=given))
    assert region_decode(config, Runtime(0, 1, 0, 1, torch.device("cpu"))) is given
    assert list(tmp_path.iterdir()) == []
