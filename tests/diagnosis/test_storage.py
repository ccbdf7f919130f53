"""Reading real files."""

from pathlib import Path

from metaformer.diagnosis.finding import Verdict
from metaformer.diagnosis.storage import reading


def test_speed_against_what_is_needed(tmp_path: Path) -> None:
    """A speed that no disk has is not reached; without a need, there is only the speed."""
    files = [tmp_path / f"{number}.JPEG" for number in range(20)]
    for file in files:
        file.write_bytes(bytes(100_000))
    (found,) = reading(files, threads=2, needed=None)
    assert found.verdict is Verdict.ok
    assert "over 20 files" in found.said
    (slow,) = reading(files, threads=2, needed=1e9)
    assert slow.verdict is Verdict.warn


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """It is named."""
    (found,) = reading([tmp_path / "gone.JPEG"], threads=1, needed=None)
    assert found.verdict is Verdict.fail
    assert "gone.JPEG: cannot be read (No such file or directory)" in found.said
