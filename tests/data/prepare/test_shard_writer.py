"""Tests of the shard writer: other readers, interruptions, full disks, names, images that change."""

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from metaformer.data.index.image_index import load_index
from metaformer.data.prepare.reencoding import measure_reencoding, reduce_image
from metaformer.data.prepare.shard_writer import Packing, write_shards
from metaformer.data.prepare.source_images import SourceImage, list_source_images
from metaformer.errors import UserError
from tests.data.conftest import pack, picture

COUNT, BYTES = 60, 200_000  # of files in `source`


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 files of 200 kB in 3 classes, 12 MB in total."""
    root = tmp_path_factory.mktemp("source")
    for number in range(COUNT):
        file = root / "train" / f"class_{number % 3}" / f"{number:02}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([number]) * BYTES)
    return root


def write(source: Path, folder: Path, packing: Packing) -> None:
    with ThreadPoolExecutor(1) as pool:
        write_shards(list_source_images(load_index(source, "train")), folder, packing, pool, lambda *step: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def read_with_dali(folder: Path, count: int) -> list[tuple[Any, ...]]:
    """Read the shards with DALI's own reader; return each image's pixels and label, in its order."""
    from nvidia.dali import fn, pipeline_def

    readers: Any = fn.readers

    @pipeline_def(batch_size=count, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        encoded, label = readers.webdataset(
            paths=[str(tar) for tar in sorted(folder.glob("*.tar"))],
            index_paths=[str(idx) for idx in sorted(folder.glob("*.idx"))],
            ext=["JPEG", "cls"],
            missing_component_behavior="error",
        )
        return fn.decoders.image(encoded, adjust_orientation=False), label

    built: Any = pipeline()
    built.build()
    images, labels = built.run()
    return [(np.asarray(images.at(row)), int(bytes(np.asarray(labels.at(row))))) for row in range(count)]


def test_dalis_own_reader_gives_each_image_once_with_its_label(image_root: Path, shard_root: Path) -> None:
    """DALI's readers.webdataset reads every image of the folder once from the shards, with the folder's label."""
    index = load_index(image_root, "train")
    found = read_with_dali(shard_root / "train", len(index))
    assert [label for _, label in found] == index.labels.tolist()
    for sample, (pixels, _) in enumerate(found):
        with Image.open(index.path(sample)) as file:
            difference = np.abs(pixels.astype(float) - np.asarray(file.convert("RGB")))
        assert difference.mean() < 0.5, index.path(sample)


def test_indices_are_those_of_dalis_tool(shard_root: Path, tmp_path: Path) -> None:
    """DALI's wds2idx makes the same index from a tar, byte for byte."""
    for tar in (shard_root / "val").glob("*.tar"):
        command = [sys.executable, "-m", "wds2idx", str(tar), str(tmp_path / "made.idx")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        assert tar.with_suffix(".idx").read_bytes() == (tmp_path / "made.idx").read_bytes()


def test_tars_are_plain_and_hold_images_with_labels(image_root: Path, shard_root: Path) -> None:
    """Python's tarfile, which the webdataset package uses, reads pairs of an image and its text label, in order."""
    index, sample = load_index(image_root, "train"), 0
    for path in sorted((shard_root / "train").glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                assert image.name == index.name(sample)
                assert label.name == image.name.removesuffix(".JPEG") + ".cls"
                read = [tar.extractfile(member).read() for member in (image, label)]  # type: ignore[union-attr]
                assert read == [index.path(sample).read_bytes(), str(index.labels[sample]).encode()]
                sample += 1
    assert sample == len(index)


def test_shards_fill_up_to_their_size(source: Path, tmp_path: Path) -> None:
    """A shard contains as many images as fit; an image that is larger than a shard gets its own."""
    for shard_bytes, images in ((1_000_000, 4), (2_050_000, 10), (1, 1)):
        folder = tmp_path / str(shard_bytes)
        write(source, folder, Packing(shard_bytes))
        tars = sorted(folder.glob("*.tar"))
        assert [tar.name for tar in tars] == [f"shard-{number:06}.tar" for number in range(COUNT // images)]
        assert all(tar.stat().st_size <= max(shard_bytes, 210_000) + 1024 for tar in tars)


WRITE = """
import sys
from pathlib import Path
from metaformer.data.prepare.conversion import convert
from metaformer.data.prepare.shard_writer import Packing
if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    convert(source, out, Packing(1_000_000), 2, lambda *step: None)
"""


def test_a_killed_writing_is_resumed(source: Path, tmp_path: Path) -> None:
    """After SIGKILL the target does not exist, and shards are complete or absent. Repeating the command keeps them
    and makes the others; the result equals that of an undisturbed call byte for byte."""
    (tmp_path / "write.py").write_text(WRITE)
    out, partial = tmp_path / "out", tmp_path / ".out.shards" / "train"
    command = [sys.executable, str(tmp_path / "write.py"), str(source), str(out)]
    process = subprocess.Popen(command, start_new_session=True)
    while not list(partial.glob("*.idx")):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    made = {idx.with_suffix(".tar").name: idx.with_suffix(".tar").stat().st_ino for idx in partial.glob("*.idx")}
    assert 0 < len(made) < COUNT // 4
    subprocess.run(command, check=True, timeout=120)
    write(source, tmp_path / "undisturbed", Packing(1_000_000))
    assert contents(out / "train") == contents(tmp_path / "undisturbed")
    assert all((out / "train" / name).stat().st_ino == inode for name, inode in made.items())
    assert not partial.exists()


def test_an_interrupted_writing_with_other_options_is_refused(source: Path, tmp_path: Path) -> None:
    """Existing shards are never mixed with shards of another size, quality or source."""
    folder = tmp_path / "out" / "train"
    write(source, folder, Packing(1_000_000))
    (folder / "shards.json").unlink()
    (folder / "plan.sha256").write_text("of another call")
    with pytest.raises(UserError, match=r"out: was started with other images or other options; repeat that"):
        write(source, folder, Packing(2_000_000))


def test_a_full_disk_is_reported(source: Path, small_disk: Path, tmp_path: Path) -> None:
    """Shards that fit are kept; the one that does not and its index are absent; the one-line message says why."""
    packing = Packing(2_050_000)
    with pytest.raises(UserError) as error:
        write(source, small_disk / "train", packing)
    message = rf"{small_disk}/train/shard-000005\.tar: cannot be written \(No space left on device\); the same command"
    assert re.match(message, str(error.value))
    assert "\n" not in str(error.value)
    found, whole = contents(small_disk / "train"), tmp_path / "elsewhere"
    write(source, whole, packing)
    expected = contents(whole)
    tars = {name for name in found if name.endswith("tar")}
    assert tars == {f"{name[:12]}.tar" for name in found if name.endswith("idx")}
    assert len(found) == 3 * 5 + 1
    assert all(found[name] == expected[name] for name in found if name != "plan.sha256")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a/x y.JPEG"],
            "'a/x y.JPEG': shards require names without spaces and with exactly one dot; rename it, or use --format",
        ),
        (["a b/x.JPEG"], "'a b/x.JPEG': shards require names without spaces"),
        (["a/x\n.JPEG"], "shards require names without spaces"),
        (["a/x.1.JPEG"], "'a/x.1.JPEG': shards require names without spaces and with exactly one dot"),
        (["a/x.JPEG", "a/x.png"], "'a/x.png': shards require names that differ in more than the extension"),
        (["a/" + "x" * 110 + ".JPEG"], "its name is too long for a shard"),
        (["../x.JPEG"], "refused: '../x.JPEG' is not CLASS/IMAGE"),
        (["a/../x.JPEG"], "refused: 'a/../x.JPEG' is not CLASS/IMAGE"),
        (["/x.JPEG"], "refused: '/x.JPEG' is not CLASS/IMAGE"),
        (["x.JPEG"], "refused: 'x.JPEG' is not CLASS/IMAGE"),
    ],
)
def test_names_that_shards_cannot_hold(tmp_path: Path, names: list[str], message: str) -> None:
    """Names that a reader of shards would split, join or cut are rejected before anything is written."""
    sources = [SourceImage(name, str(tmp_path / "none"), 0, 1) for name in names]
    with ThreadPoolExecutor(1) as pool, pytest.raises(UserError) as error:
        write_shards(sources, tmp_path / "out", Packing(), pool, lambda *step: None)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["gone", "shorter", "longer"])
def test_images_that_change_meanwhile(own_root: Path, tmp_path: Path, change: str) -> None:
    """A file that no longer matches the index stops the writing with an error that names it, without its shard."""
    sources = list_source_images(load_index(own_root, "train"))
    file = own_root / "train" / "a" / "3.JPEG"
    content = file.read_bytes()
    file.unlink()
    if change != "gone":
        file.write_bytes(content[:-1] if change == "shorter" else content + b"\0")
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(UserError, match=rf"^{file}: (truncated or changed|cannot be read)"),
    ):
        write_shards(sources, tmp_path / "out", Packing(10**6), pool, lambda *step: None)
    assert not list((tmp_path / "out").glob("*shard*"))


def test_only_larger_images_are_reduced() -> None:
    """The longer side is reduced to the limit and the aspect is kept; smaller images are unchanged byte for byte."""
    for size, mode, reduced in (
        ((640, 480), "RGB", (500, 375)),
        ((333, 1000), "RGB", (166, 500)),
        ((600, 600), "L", (500, 500)),
        ((501, 3), "CMYK", (500, 3)),
        ((500, 20), "RGB", None),
    ):
        buffer = BytesIO()
        picture(*size, seed=0).convert(mode).save(buffer, "JPEG")
        found = reduce_image(buffer.getvalue(), 500, 90)
        if reduced is None:
            assert found == buffer.getvalue()
            continue
        with Image.open(BytesIO(found)) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", reduced, "L" if mode == "L" else "RGB")


def test_effect_of_reencoding(own_root: Path, tmp_path: Path) -> None:
    """Bytes before and after are those of the files. Unchanged images do not differ; reduced images do, and more at a
    lower quality."""
    for name in ("a", "b", "c"):
        for number in range(4):
            picture(600, 450, seed=number).save(own_root / "train" / name / f"large{number}.JPEG", quality=95)
    sources = list_source_images(load_index(own_root, "train"))
    found = {}
    for side, quality in ((600, 90), (300, 90), (300, 20)):
        folder = tmp_path / f"{side}-{quality}"
        with ThreadPoolExecutor(1) as pool:
            packed = write_shards(sources, folder, Packing(10**6, side, quality), pool, lambda *step: None)
        found[side, quality] = measure_reencoding(packed, folder)
    untouched, good, bad = found.values()
    assert (
        untouched.bytes_before == untouched.bytes_after == good.bytes_before == sum(source.size for source in sources)
    )
    assert (untouched.images_compared, untouched.mean_difference, untouched.psnr) == (len(sources), 0, float("inf"))
    assert bad.bytes_after < good.bytes_after < good.bytes_before
    assert 0 < good.mean_difference < bad.mean_difference < 10
    assert bad.psnr < good.psnr < 60


def test_a_broken_image_is_not_reduced(own_root: Path, tmp_path: Path) -> None:
    """An image that cannot be decoded is named if images have to be reduced."""
    (own_root / "train" / "a" / "3.JPEG").write_text("no image")
    with pytest.raises(
        UserError,
        match=r"train/a/3\.JPEG: cannot be read as an image \(not in a supported image format: [^)]*\); repair",
    ):
        pack(own_root, tmp_path / "out", max_side=50)
    pack(own_root, tmp_path / "as they are")
