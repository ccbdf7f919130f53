"""Reading real files."""

from pathlib import Path

from metaformer.diagnosis.finding import Verdict
from metaformer.diagnosis.storage import ByteRange, read_speed


def test_speed_against_what_is_needed(tmp_path: Path) -> None:
    """A speed that no disk has is not reached; without a need, there is only the speed."""
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
    """It is named."""
    (found,) = read_speed([ByteRange(tmp_path / "gone.JPEG", 0, 1)], threads=1, required=None)
    assert found.verdict is Verdict.fail
    assert "gone.JPEG: cannot be read (No such file or directory)" in found.message


def test_a_shard_that_ends_early(tmp_path: Path) -> None:
    """A range past the end of its file has failed, with how much is missing."""
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(bytes(1000))
    (whole,) = read_speed([ByteRange(shard, 600, 400)], threads=1, required=None)
    assert whole.verdict is Verdict.ok
    (short,) = read_speed([ByteRange(shard, 600, 500)], threads=1, required=None)
    assert short.verdict is Verdict.fail
    assert "shard-000000.tar: cannot be read (ends 100 bytes early)" in short.message
