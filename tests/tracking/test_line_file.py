"""Tests of appending lines to a disk that may be full for a while."""

from pathlib import Path

import pytest

from metaformer.tracking.line_file import LineFile
from tests.ranks import fill, small_disk


def test_appends_whole_lines(tmp_path: Path) -> None:
    """Lines are written at once, below earlier content."""
    file = tmp_path / "log"
    for number in range(2):
        lines = LineFile(file)
        for word in ("one", "zwölf"):
            lines.write(f"{word} {number}")
            assert file.read_text().endswith(f"{word} {number}\n"), "written before the file is closed"
        lines.close()
    assert file.read_text() == "one 0\nzwölf 0\none 1\nzwölf 1\n"


def test_a_full_disk_delays_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A full disk has whole lines only and gives one warning; once there is room, all lines follow in order."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        file = disk / "log"
        lines, expected = LineFile(file), ""
        lines.write("first")
        for round_ in range(2):
            expected = file.read_text()
            filler = fill(disk)
            for number in range(20):
                text = f"{round_}-{number} " + "x" * 1000
                lines.write(text)
                expected += text + "\n"
                assert expected.startswith(file.read_text())
                assert file.read_text().endswith("\n")
            assert file.read_text() != expected
            assert capfd.readouterr().err.count(f"warning: {file}: cannot be written (") == 1
            filler.unlink()
            lines.write("again")
            assert file.read_text() == expected + "again\n"
        lines.close()
        assert capfd.readouterr().err == ""


def test_lost_lines_are_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Closing while the disk is still full reports the number of missing lines and raises no error."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        lines = LineFile(disk / "log")
        fill(disk)
        for _ in range(3):
            lines.write("x" * 10_000)
        lines.close()
        assert f"warning: {disk / 'log'}: 3 lines could not be written\n" in capfd.readouterr().err
        assert (disk / "log").read_text() == ""


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    """A file that cannot be opened is an error, since this happens before the run."""
    with pytest.raises(FileNotFoundError):
        LineFile(tmp_path / "gone" / "log")
