"""Test prepare_data.py with the sample, small ImageNet archives, and folders."""

import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from metaformer.data.index.image_index import load_index
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.data.prepare import imagenet_archives, imagenette, reencoding
from metaformer.errors import UserError
from scripts import prepare_data
from tests.conftest import VAL_IMAGES
from tests.local_server import Reply, serve

Prepare = Callable[..., str]
WNIDS = ("n01440764", "n02119789", "n01443537")  # in the devkit's order, which is not alphabetical
VAL_LABELS = (2, 1, 3, 2, 1)  # of the validation images in order; labels count from 1


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """Return a function that runs the script and returns its stdout."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments])
        prepare_data.main()
        return capsys.readouterr().out

    return run


def jpeg(gray: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (gray, gray, gray)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def devkit() -> bytes:
    """Return a devkit archive with the labels and synsets, of which one has children and so is not a class."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    leaves = [(number, wnid, f"word {number}, other", "gloss", 0) for number, wnid in enumerate(WNIDS, 1)]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array([*leaves, (1001, "n00001740", "entity", "gloss", 3)], dtype=fields)})
    labels = "\n".join(map(str, VAL_LABELS)).encode()
    contents = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": labels}
    return tar({f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in contents.items()}, "w:gz")


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Build the three archives like the real ones, register their hashes and counts, and return the arguments.

    Class k has k + 1 training images. The brightness of a validation image encodes its label.
    """
    classes = {
        f"{wnid}.tar": tar({f"{wnid}_{number}.JPEG": jpeg(10) for number in range(count)})
        for count, wnid in enumerate(WNIDS, 2)
    }
    val = {f"ILSVRC2012_val_{number:08}.JPEG": jpeg(40 * label) for number, label in enumerate(VAL_LABELS, 1)}
    contents = {"train": tar(classes), "val": tar(dict(reversed(val.items()))), "devkit": devkit()}
    arguments = ["--workers", "2"]
    for (split, content), option in zip(contents.items(), ("train-tar", "val-tar", "devkit"), strict=True):
        (tmp_path / split).write_bytes(content)
        monkeypatch.setitem(imagenet_archives.MD5, split, hashlib.md5(content).hexdigest())
        arguments += [f"--{option}", str(tmp_path / split)]
    monkeypatch.setattr(imagenet_archives, "IMAGES", {"train": 9, "val": 5})
    return tuple(arguments)


def test_imagenet(tmp_path: Path, archives: tuple[str, ...], prepare: Prepare) -> None:
    """Nested archives become SPLIT/CLASS/IMAGE, with validation images sorted by the devkit's labels."""
    out = tmp_path / "data" / "imagenet"
    printed = prepare("imagenet", *archives, "--out", str(out))
    assert printed.splitlines()[-1] == f"{out}: 9 training and 5 validation images, 3 classes"
    train, val = load_index(out, "train"), load_index(out, "val")
    assert train.classes == val.classes == tuple(sorted(WNIDS))
    assert {wnid: len(list((out / "train" / wnid).iterdir())) for wnid in WNIDS} == dict(
        zip(WNIDS, (2, 3, 4), strict=True)
    )
    for label, wnid in enumerate(WNIDS, 1):
        files = sorted((out / "val" / wnid).iterdir())
        assert len(files) == VAL_LABELS.count(label)
        assert all(abs(np.asarray(Image.open(file)).mean() - 40 * label) < 2 for file in files)
    assert list(out.rglob("*.tar")) == []
    assert [path.name for path in out.parent.iterdir()] == ["imagenet"]


@pytest.mark.parametrize("option", ["--train-tar", "--val-tar", "--devkit"])
def test_wrong_archive(tmp_path: Path, archives: tuple[str, ...], prepare: Prepare, option: str) -> None:
    """A wrong archive gives a one-line error and no --out; with the right archive, the same command works."""
    out = tmp_path / "data" / "imagenet"
    archive = Path(archives[archives.index(option) + 1])
    right = archive.read_bytes()
    archive.write_bytes(right + b"\0")
    with pytest.raises(UserError) as caught:
        prepare("imagenet", *archives, "--out", str(out))
    assert str(archive) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    archive.write_bytes(right)
    prepare("imagenet", *archives, "--out", str(out))
    assert len(load_index(out, "val")) == len(VAL_LABELS)


def test_checked_archives_are_not_read_again(
    tmp_path: Path, archives: tuple[str, ...], prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interruption, a verified archive is not hashed again unless it changes."""
    out, train = tmp_path / "data", Path(archives[archives.index("--train-tar") + 1])
    monkeypatch.setattr(imagenet_archives, "IMAGES", {"train": 9, "val": 6})
    with pytest.raises(UserError, match=r"^val: 5 images in the archive, not 6; download it again$"):
        prepare("imagenet", *archives, "--out", str(out))
    monkeypatch.setattr(imagenet_archives, "IMAGES", {"train": 9, "val": 5})
    monkeypatch.setitem(imagenet_archives.MD5, "train", "what no archive has")
    times = train.stat()
    os.utime(train, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"train: not the published archive"):
        prepare("imagenet", *archives, "--out", str(out))
    os.utime(train, ns=(times.st_atime_ns, times.st_mtime_ns))
    prepare("imagenet", *archives, "--out", str(out))
    assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == ["train", "val"]
    assert not (out / "hashes.json").exists()


def test_labels_of_other_images(
    tmp_path: Path, archives: tuple[str, ...], prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation archive with fewer images than the devkit has labels is refused."""
    val = Path(archives[archives.index("--val-tar") + 1])
    val.write_bytes(tar({f"ILSVRC2012_val_{number:08}.JPEG": jpeg(9) for number in range(1, len(VAL_LABELS))}))
    monkeypatch.setitem(imagenet_archives.MD5, "val", hashlib.md5(val.read_bytes()).hexdigest())
    message = rf"^{val}: 4 images, but {tmp_path}/devkit has labels for 5; download both again$"
    with pytest.raises(UserError, match=message):
        prepare("imagenet", *archives, "--out", str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_missing_archive(tmp_path: Path, archives: tuple[str, ...], prepare: Prepare) -> None:
    """A missing archive is reported before anything is unpacked."""
    Path(archives[archives.index("--val-tar") + 1]).unlink()
    with pytest.raises(UserError, match=r"val: no such file; download it from image-net\.org"):
        prepare("imagenet", *archives, "--out", str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("source", ["sample", "imagenet"])
def test_existing_folder(tmp_path: Path, archives: tuple[str, ...], prepare: Prepare, source: str) -> None:
    """An existing --out is left unchanged."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    arguments = archives if source == "imagenet" else ()
    with pytest.raises(UserError, match=r"^--out \S+mine: already exists; give another folder, or remove it$"):
        prepare(source, *arguments, "--out", str(tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


@pytest.fixture
def tgz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an archive like Imagenette's, with its hash registered."""
    files = {f"imagenette2/{split}/{wnid}/{split}_{wnid}.JPEG": jpeg(9) for split in ("train", "val") for wnid in WNIDS}
    return register_tgz(tmp_path / "imagenette2.tgz", tar(files, "w:gz"), monkeypatch)


def register_tgz(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.write_bytes(content)
    archive = imagenette.SIZES["full"]._replace(md5=hashlib.md5(content).hexdigest())
    monkeypatch.setitem(imagenette.SIZES, "full", archive)
    return path


@pytest.mark.parametrize("download", [False, True])
def test_imagenette(
    tmp_path: Path, tgz: Path, prepare: Prepare, download: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive, local or downloaded, becomes SPLIT/CLASS/IMAGE, and no other files remain."""
    out = tmp_path / "data" / "imagenette"
    with serve() as server:
        server.replies["/imagenette2.tgz"] = Reply(tgz.read_bytes())
        archive = imagenette.SIZES["full"]._replace(url=f"{server.url}imagenette2.tgz")
        monkeypatch.setitem(imagenette.SIZES, "full", archive)
        printed = prepare("imagenette", *(() if download else ("--tgz", str(tgz))), "--out", str(out))
        assert bool(server.requests) == download
    assert printed.splitlines()[-1] == f"{out}: 3 training and 3 validation images, 3 classes"
    assert [path.name for path in out.parent.iterdir()] == ["imagenette"]
    assert tgz.exists()


def test_imagenette_refuses_wrong_archives(
    tmp_path: Path, tgz: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong or missing archive, or members that point outside it, give a one-line error and no --out."""
    out = tmp_path / "data" / "imagenette"

    def refusal(file: Path) -> str:
        with pytest.raises(UserError) as caught:
            prepare("imagenette", "--tgz", str(file), "--out", str(out))
        assert not out.exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    other = tmp_path / "other.tgz"
    other.write_bytes(tgz.read_bytes() + b"\0")
    assert "not the published archive" in refusal(other)
    assert "no such file" in refusal(tmp_path / "none.tgz")
    register_tgz(other, tgz.read_bytes()[:-50], monkeypatch)
    assert "imagenette: " in refusal(other)
    for name in ("../outside.JPEG", str(tmp_path / "absolute.JPEG"), "imagenette2/../../outside.JPEG"):
        register_tgz(other, tar({"imagenette2/train/n1/a.JPEG": jpeg(1), name: jpeg(2)}, "w:gz"), monkeypatch)
        assert f"refused: {name!r}" in refusal(other)
    assert not list(tmp_path.rglob("outside.JPEG"))
    assert not list(tmp_path.rglob("absolute.JPEG"))


def test_sample(tmp_path: Path, prepare: Prepare) -> None:
    """The sample is built in a new folder, and its counts are printed."""
    out = tmp_path / "new" / "sample"
    assert prepare("sample", "--out", str(out)) == f"{out}: 4,000 training and 1,000 validation images, 10 classes\n"


def test_imagenet_as_shards(tmp_path: Path, archives: tuple[str, ...], prepare: Prepare) -> None:
    """Shards from archives have the same index and bytes as folders, and no other files remain."""
    folders, shards = tmp_path / "data" / "folders", tmp_path / "data" / "shards"
    prepare("imagenet", *archives, "--out", str(folders))
    printed = prepare("imagenet", *archives, "--out", str(shards), "--format", "shards")
    assert printed.splitlines() == [f"{shards}: 9 training and 5 validation images, 3 classes"]
    for split in ("train", "val"):
        assert_same_images(folders, shards, split)
    assert {path.name for path in shards.parent.iterdir()} == {"folders", "shards"}
    assert {path.suffix for path in (shards / "train").iterdir()} == {".tar", ".idx", ".sfv", ".json"}


def assert_same_images(folders: Path, shards: Path, split: str) -> None:
    files, packed = load_index(folders, split), load_index(shards, split)
    assert packed.shards is not None
    assert packed.fingerprint == files.fingerprint
    stored = ImageBytes(packed)
    assert all(stored.read(sample).tobytes() == files.path(sample).read_bytes() for sample in range(len(files)))
    stored.close()


def test_imagenet_shards_of_archives_that_lack_images(
    tmp_path: Path, archives: tuple[str, ...], prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected number of images is refused before any shard is written."""
    monkeypatch.setattr(imagenet_archives, "IMAGES", {"train": 10, "val": 5})
    with pytest.raises(UserError, match=r"^train: 9 images in the archive, not 10; download it again$"):
        prepare("imagenet", *archives, "--out", str(tmp_path / "out"), "--format", "shards")
    assert not list(tmp_path.rglob("*.tar"))
    assert not (tmp_path / "out").exists()


def test_imagenette_as_shards(tmp_path: Path, tgz: Path, prepare: Prepare) -> None:
    """Imagenette becomes shards, and the folders that it was unpacked into are removed."""
    folders, shards = tmp_path / "data" / "folders", tmp_path / "data" / "shards"
    prepare("imagenette", "--tgz", str(tgz), "--out", str(folders))
    prepare("imagenette", "--tgz", str(tgz), "--out", str(shards), "--format", "shards", "--workers", "1")
    assert_same_images(folders, shards, "train")
    assert {path.name for path in shards.parent.iterdir()} == {"folders", "shards"}


def test_folder_to_shards_and_back(images: Path, tmp_path: Path, prepare: Prepare) -> None:
    """Converting a folder to shards and back gives the same files; a single split can be converted."""
    shards, back, single = tmp_path / "shards", tmp_path / "back", tmp_path / "single"
    sizes = ("--shard-size", "1", "--workers", "1")
    printed = prepare("folder", "--from", str(images), "--out", str(shards), "--format", "shards", *sizes)
    assert printed == f"{shards}: 48 training and {VAL_IMAGES} validation images, 4 classes\n"
    assert_same_images(images, shards, "val")
    prepare("folder", "--from", str(shards), "--out", str(back), "--workers", "1")
    files = sorted(file.relative_to(images) for file in images.rglob("*.JPEG"))
    assert files == sorted(file.relative_to(back) for file in back.rglob("*.JPEG"))
    assert all((back / file).read_bytes() == (images / file).read_bytes() for file in files)
    shutil.rmtree(back / "train")
    printed = prepare("folder", "--from", str(back), "--out", str(single), "--format", "shards", *sizes)
    assert printed == f"{single}: {VAL_IMAGES} validation images, 4 classes\n"


def test_folder_with_smaller_images(
    images: Path, tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--max-side shrinks images and prints the effect for each split; the index keeps order and labels."""
    monkeypatch.setattr(reencoding, "COMPARED_IMAGES", 100)
    out = tmp_path / "out"
    options = ("--format", "shards", "--max-side", "40", "--quality", "80", "--workers", "1")
    printed = prepare("folder", "--from", str(images), "--out", str(out), *options).splitlines()
    number = r"[\d,]+"
    for split, line, count in zip(("train", "val"), printed, (48, 100), strict=False):
        found = rf"{split}: ({number}) bytes of images before, ({number}) after \(\d+\.\d %\); at 224 px, crop \.9, "
        found += rf"{count} images differ by \d+\.\d\d of 255 on average, PSNR \d+\.\d dB"
        sizes = re.fullmatch(found, line)
        assert sizes, line
        before, after = (int(size.replace(",", "")) for size in sizes.groups())
        files, packed = load_index(images, split), load_index(out, split)
        assert (before, after) == (files.sizes.sum(), packed.sizes.sum())
        assert after < before
        assert np.array_equal(packed.paths, files.paths)
        assert np.array_equal(packed.labels, files.labels)


def test_imagenet_as_pixels(tmp_path: Path, archives: tuple[str, ...], prepare: Prepare) -> None:
    """From the archives straight into pixels: the index of the folders, PIL's pixels, and nothing else on disk."""
    folders, pixels = tmp_path / "data" / "folders", tmp_path / "data" / "pixels"
    prepare("imagenet", *archives, "--out", str(folders))
    printed = prepare("imagenet", *archives, "--out", str(pixels), "--format", "pixels")
    assert printed.splitlines()[-1] == f"{pixels}: 9 training and 5 validation images, 3 classes"
    for split in ("train", "val"):
        assert_same_pixels(folders, pixels, split)
    assert {path.name for path in pixels.parent.iterdir()} == {"folders", "pixels"}
    assert {path.suffix for path in (pixels / "train").iterdir()} == {".safetensors", ".json"}


def assert_same_pixels(folders: Path, pixels: Path, split: str) -> None:
    files, decoded = load_index(folders, split), load_index(pixels, split)
    assert decoded.fingerprint == files.fingerprint
    with closing(ImageBytes(decoded)) as stored:
        for sample in range(len(files)):
            with Image.open(files.path(sample)) as image:
                assert np.array_equal(stored.check(sample), np.asarray(image.convert("RGB")))


def test_shards_to_pixels(images: Path, tmp_path: Path, prepare: Prepare) -> None:
    """Shards become pixels, with a report that nothing differs; pixels become nothing else."""
    shards, pixels = tmp_path / "shards", tmp_path / "pixels"
    prepare("folder", "--from", str(images), "--out", str(shards), "--format", "shards", "--workers", "1")
    options = ("--format", "pixels", "--shard-size", "1", "--workers", "1")
    lines = prepare("folder", "--from", str(shards), "--out", str(pixels), *options).splitlines()
    number = r"[\d,]+"
    for split, line, count in zip(("train", "val"), lines, (48, VAL_IMAGES), strict=False):
        kept = rf"{split}: {number} bytes of images before, {number} after \(\d+\.\d %\); at 224 px, crop \.9, "
        assert re.fullmatch(kept + rf"{count} images differ by 0\.00 of 255 on average, PSNR inf dB", line), line
    assert_same_pixels(images, pixels, "train")
    with pytest.raises(UserError, match=rf"^{pixels}/train: contains decoded pixels; give the data set that they"):
        prepare("folder", "--from", str(pixels), "--out", str(tmp_path / "back"))


def test_smaller_pixels(images: Path, tmp_path: Path, prepare: Prepare) -> None:
    """--resize reduces the short side of larger images, and the data set is another one."""
    out = tmp_path / "out"
    printed = prepare("folder", "--from", str(images), "--out", str(out), "--format", "pixels", "--resize", "40")
    assert "PSNR inf" not in printed
    files, pixels = load_index(images, "val"), load_index(out, "val")
    assert np.array_equal(pixels.paths, files.paths)
    assert pixels.fingerprint != files.fingerprint
    assert pixels.shards is not None
    assert pixels.shards.pixels is not None
    for sample, stored in enumerate(pixels.shards.pixels.shapes.tolist()):
        with Image.open(files.path(sample)) as image:
            short = min(image.size)
            sides = [side if short <= 40 else round(side * 40 / short) for side in (image.height, image.width)]
        assert stored == sides


def test_invalid_options(images: Path, tmp_path: Path, prepare: Prepare) -> None:
    """Options that need others, values out of range, a missing data set and an existing --out give a one-line error."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    shards = ("--format", "shards")
    for source, options, message in (
        (images, ("--max-side", "500"), "--max-side 500: requires --format shards"),
        (images, ("--shard-size", "9"), "--shard-size 9: requires --format shards or pixels"),
        (images, ("--resize", "256"), "--resize 256: requires --format pixels"),
        (images, (*shards, "--resize", "none"), "--resize none: requires --format pixels"),
        (images, ("--format", "pixels", "--max-side", "500"), "--max-side 500: requires --format shards"),
        (images, ("--format", "pixels", "--resize", "31"), "--resize 31: must be none, or from 32"),
        (images, ("--format", "pixels", "--resize", "all"), "--resize all: must be none, or from 32"),
        (images, (*shards, "--quality", "90"), "--quality 90: requires --max-side"),
        (images, (*shards, "--max-side", "500", "--quality", "101"), "--quality 101: must be from 1 to 100"),
        (images, (*shards, "--max-side", "0"), "--max-side 0: must be from 32"),
        (images, (*shards, "--shard-size", "0"), "--shard-size 0: must be from 1"),
        (images, ("--workers", "0"), "--workers 0: must be from 1"),
        (tmp_path / "empty", shards, f"--from {tmp_path / 'empty'}: contains no train or val folder"),
        (images, (*shards, "--out", str(tmp_path / "mine")), f"--out {tmp_path / 'mine'}: already exists"),
    ):
        with pytest.raises(UserError) as caught:
            prepare("folder", "--from", str(source), "--out", str(tmp_path / "out"), *options)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "mine"}
