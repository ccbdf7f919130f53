"""Read speed, measured on real files."""

from pathlib import Path

from metaformer.diagnosis.finding import Verdict
from metaformer.diagnosis.storage import ByteRange, read_speed


def test_speed_against_the_required_speed(tmp_path: Path) -> None:
    """A required speed that no disk reaches gives a warning; without one, only the speed is reported."""
    files = [tmp_path / f"{number}.JPEG" for number in range(20)]
    for file in files:
        file.write_bytes(bytes(100_000))
    images = [ByteRange(file, 0, 100_000) for file in files]
    (found,) = read_speed(images, threads=2, required=None)
    assert found.verdict is Verdict.ok
    assert "over 20 images" in found.message
    (slow,) = read_speed(images, threads=2, required=1e9)
    assert slow.verdict is Verdict.warn


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """The finding names the file."""
    (found,) = read_speed([ByteRange(tmp_path / "gone.JPEG", 0, 1)], threads=1, required=None)
    assert found.verdict is Verdict.fail
    assert "gone.JPEG: cannot be read (No such file or directory)" in found.message


def test_a_shard_that_ends_early(tmp_path: Path) -> None:
    """A range past the end of its file fails with the number of missing bytes."""
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(bytes(1000))
    (whole,) = read_speed([ByteRange(shard, 600, 400)], threads=1, required=None)
    assert whole.verdict is Verdict.ok
    (short,) = read_speed([ByteRange(shard, 600, 500)], threads=1, required=None)
    assert short.verdict is Verdict.fail
    assert "shard-000000.tar: cannot be read (ends 100 bytes early)" in short.message
