"""Tests of the index of shards: equality with the folders' index, detected changes, rejected shards."""

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from metaformer.data.index.config import DataConfig, IndexCheck, Labels
from metaformer.data.index.image_index import ImageIndex, find_images, load_index
from metaformer.data.index.labels import relabel
from metaformer.data.index.quarantine import drop_quarantined, write_quarantine
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.data.prepare.scan_images import scan_images
from metaformer.errors import UserError
from tests.data.conftest import pack


def refusal(root: Path, check: IndexCheck = IndexCheck.quick) -> str:
    with pytest.raises(UserError) as error:
        load_index(root, "train", check)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def shard_of(root: Path, sample: int) -> tuple[Path, int]:
    """Return the tar of an image, and the image's offset in it."""
    index = load_index(root, "train")
    assert index.shards is not None
    return root / "train" / index.shards.names[index.shards.numbers[sample]], int(index.shards.offsets[sample])


def test_index_is_the_folders(image_root: Path, shard_root: Path) -> None:
    """Order, labels, classes, sizes, fingerprint and bytes of images in several shards equal those of the folder."""
    for split in ("train", "val"):
        files, packed = load_index(image_root, split), load_index(shard_root, split)
        assert packed.shards is not None
        assert len(packed.shards.names) > 2
        assert (packed.classes, packed.fingerprint) == (files.classes, files.fingerprint)
        for name in ("paths", "labels", "sizes"):
            assert np.array_equal(getattr(packed, name), getattr(files, name))
        assert_same_bytes(packed, files)


def assert_same_bytes(packed: ImageIndex, files: ImageIndex) -> None:
    stored = ImageBytes(packed)
    assert all(stored.read(sample).tobytes() == files.path(sample).read_bytes() for sample in range(len(files)))
    stored.close()


def test_short_reads_are_continued(image_root: Path, shard_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the file system returns less than requested, the rest is read from there."""
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:700]], offset))
    assert_same_bytes(load_index(shard_root, "train"), load_index(image_root, "train"))


def test_order_of_difficult_names(own_root: Path) -> None:
    """Order and contents equal the folder's for names that are easily sorted wrongly, long or not ASCII."""
    train = own_root / "train"
    for name in ("B", "n10", "n2", "é", "a-b", "a.d", "x" * 100, "a/more", "a/B"):
        shutil.copytree(train / "c", train / name)
    shutil.copy(train / "a" / "0.JPEG", train / "c" / "\udcff.JPEG")
    shutil.copy(train / "a" / "0.JPEG", train / "c" / f"{'y' * 80}.JPEG")
    files, packed = load_index(own_root, "train"), load_index(pack(own_root, own_root.parent / "s"), "train")
    assert [packed.name(i) for i in range(len(packed))] == [files.name(i) for i in range(len(files))]
    assert packed.fingerprint == files.fingerprint
    assert_same_bytes(packed, files)


def test_shards_in_another_order(image_root: Path, shard_root: Path, tmp_path: Path) -> None:
    """Renumbered shards give the same order, labels and bytes."""
    train, shuffled = shard_root / "train", tmp_path / "train"
    shuffled.mkdir()
    listed = json.loads((train / "shards.json").read_text())["shards"]
    for number in range(len(listed)):
        for kind in ("tar", "idx"):
            source = train / f"shard-{len(listed) - 1 - number:06}.{kind}"
            shutil.copy(source, shuffled / f"shard-{number:06}.{kind}")
    (shuffled / "shards.json").write_text(json.dumps({"shards": listed[::-1]}))
    files, packed = load_index(image_root, "train"), find_images(shuffled)
    assert packed.fingerprint == files.fingerprint
    assert packed.labels.tolist() == files.labels.tolist()
    assert_same_bytes(packed, files)


def test_scan_is_cached_until_a_shard_changes(own_shards: Path) -> None:
    """A second start maps the cached arrays; a tar or an index with another time is read again."""
    first = load_index(own_shards, "train")
    assert isinstance(first.labels, np.memmap)
    (stored,) = own_shards.glob(".metaformer/train-*")
    for file in ("shard-000001.tar", "shard-000001.idx"):
        assert load_index(own_shards, "train").fingerprint == first.fingerprint
        assert list(own_shards.glob(".metaformer/train-*")) == [stored]
        os.utime(own_shards / "train" / file, ns=(10**18, 10**18))
        assert load_index(own_shards, "train").notes == ()
        previous = stored
        (stored,) = own_shards.glob(".metaformer/train-*")
        assert stored != previous


def test_a_folder_replaced_by_shards_is_detected(own_root: Path, own_shards: Path) -> None:
    """The cached scan of class folders is not used for shards that replace them, nor vice versa."""
    train = own_root / "train"
    for source, has_shards in ((own_shards / "train", True), (own_root / "val", False), (own_shards / "train", True)):
        load_index(own_root, "train")
        shutil.rmtree(train)
        shutil.copytree(source, train)
        assert (load_index(own_root, "train").shards is not None) == has_shards
        assert (find_images(train).shards is not None) == has_shards


def test_quarantine_selects_from_shards(own_root: Path, own_shards: Path) -> None:
    """A list of SPLIT/CLASS/IMAGE excludes the same images from shards as from the folder."""
    file = own_root.parent / "broken.txt"
    write_quarantine(file, ["train/a/0.JPEG", "train/b/gray.JPEG"])
    left = [
        drop_quarantined(load_index(root, "train"), DataConfig(root=str(root), quarantine=str(file)), "train")
        for root in (own_root, own_shards)
    ]
    assert left[0].fingerprint == left[1].fingerprint
    assert left[1].quarantined == 2
    assert_same_bytes(left[1], left[0])


def test_labels_by_file_name(own_root: Path) -> None:
    """ReaL's labels are found by file names in shards; the error about another name contains the shard."""
    for number, file in enumerate(sorted((own_root / "val").rglob("*.JPEG")), 1):
        file.rename(file.with_name(f"ILSVRC2012_val_{number:08}.JPEG"))
    config = DataConfig(train_split=None, labels=Labels.real)
    packed = pack(own_root, own_root.parent / "shards")
    of_files, of_shards = (relabel(load_index(root, "val"), config) for root in (own_root, packed))
    assert of_files.fingerprint == of_shards.fingerprint
    assert np.array_equal(of_files.labels, of_shards.labels)
    assert_same_bytes(of_shards, of_files)
    with pytest.raises(UserError, match=r"shard-000000\.tar: a/0\.JPEG is not named like an ImageNet validation image"):
        relabel(load_index(packed, "train"), config)


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


def replace_by_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tar": (lambda train: (train / "shard-000001.tar").unlink(), "shard-000001.tar: missing; shards.json lists"),
    "last tar gone": (lambda train: max(train.glob("*.tar")).unlink(), ".tar: missing; shards.json lists"),
    "no index": (lambda train: (train / "shard-000001.idx").unlink(), "shard-000001.idx: missing; shards.json lists"),
    "no checksums": (lambda train: (train / "shard-000001.sfv").unlink(), "shard-000001.sfv: missing; shards.json"),
    "cut checksums": (
        lambda train: rewrite(train / "shard-000001.sfv", lambda content: content[:-1]),
        "shard-000001.sfv: damaged (expected the images of shard-000001.idx)",
    ),
    "checksums of other images": (
        lambda train: rewrite(train / "shard-000000.sfv", lambda content: content.replace(b"a/1.", b"a/9.")),
        "shard-000000.sfv: damaged (expected the images of shard-000000.idx)",
    ),
    "no numbers for checksums": (
        lambda train: rewrite(train / "shard-000001.sfv", lambda content: content[:-2] + b"-\n"),
        "shard-000001.sfv: damaged (expected the images of shard-000001.idx)",
    ),
    "other checksums": (
        lambda train: rewrite(train / "shards.json", lambda content: content.replace(b"crc32", b"md5")),
        "shards.json: damaged",
    ),
    "no list": (lambda train: (train / "shards.json").unlink(), "shards.json: missing, so shards may be missing too"),
    "damaged list": (lambda train: (train / "shards.json").write_text("[1"), "shards.json: damaged"),
    "deep list": (lambda train: (train / "shards.json").write_text("[" * 10**5), "shards.json: damaged"),
    "list of no counts": (lambda train: (train / "shards.json").write_text('{"shards": [[1e999, 1]]}'), "damaged"),
    "list of signs": (lambda train: (train / "shards.json").write_text('{"shards": [[-1, 9]]}'), "damaged"),
    "a FIFO for an index": (
        lambda train: replace_by_fifo(train / "shard-000001.idx"),
        "shard-000001.tar: it or its index is a FIFO",
    ),
    "a FIFO for the list": (
        lambda train: replace_by_fifo(train / "shards.json"),
        "shards.json: damaged",
    ),
    "a negative size": (
        lambda train: rewrite(train / "shard-000000.idx", lambda content: content.replace(b" 512 ", b" 512 -", 1)),
        "is not an image and its label",
    ),
    "cut tar": (
        lambda train: rewrite(train / "shard-000001.tar", lambda content: content[:-5000]),
        ": truncated or changed: ",
    ),
    "cut index": (
        lambda train: rewrite(train / "shard-000001.idx", lambda content: content[:-30]),
        "shard-000001.idx: damaged (",
    ),
    "index without its last line": (
        lambda train: rewrite(train / "shard-000001.idx", lambda content: content[: content[:-1].rindex(b"\n") + 1]),
        "shard-000001.idx: damaged (expected ",
    ),
    "empty index": (
        lambda train: (train / "shard-000001.idx").write_bytes(b""),
        "shard-000001.idx: damaged (expected ",
    ),
    "another version": (
        lambda train: rewrite(train / "shard-000001.idx", lambda content: content.replace(b"v1.2", b"v1.1")),
        "shard-000001.idx: damaged (expected ",
    ),
    "not a number": (
        lambda train: rewrite(train / "shard-000000.idx", lambda content: content.replace(b" 512 ", b" 5l2 ")),
        "shard-000000.idx: damaged (b'JPEG 5l2 ",
    ),
    "beyond the tar's end": (
        lambda train: rewrite(train / "shard-000000.idx", lambda content: content.replace(b" 512 ", b" 51200000 ")),
        "is not an image and its label",
    ),
    "within the header": (
        lambda train: rewrite(train / "shard-000000.idx", lambda content: content.replace(b" 512 ", b" 0 ")),
        "is not an image and its label",
    ),
    "between blocks": (
        lambda train: rewrite(train / "shard-000000.idx", lambda content: content.replace(b" 512 ", b" 513 ")),
        "is not an image and its label",
    ),
    "another tar's index": (
        lambda train: rewrite(train / "shard-000000.idx", lambda content: content.replace(b" a/0.", b" a/x.")),
        "shard-000000.tar: a/x.JPEG is not where shard-000000.idx says",
    ),
    "another size": (
        lambda train: rewrite(train / "shard-000000.idx", another_size),
        "shard-000000.tar: a/0.JPEG is not where shard-000000.idx says",
    ),
    "name with ..": (
        lambda train: rewrite(train / "shard-000000.idx", lambda content: content.replace(b" a/0.", b" ../0.")),
        "refused: '../0.JPEG' is not CLASS/IMAGE",
    ),
    "name without class": (
        lambda train: rewrite(train / "shard-000000.idx", lambda content: content.replace(b" a/0.", b" 0.")),
        "refused: '0.JPEG' is not CLASS/IMAGE",
    ),
    "twice": (
        lambda train: rewrite(train / "shard-000000.idx", lambda content: content.replace(b" a/1.", b" a/0.")),
        "'a/0.JPEG' occurs twice",
    ),
    "class folder beside": (lambda train: (train / "d").mkdir(), "d: beside shards, but not listed in"),
    "further shard": (lambda train: (train / "shard-000099.tar").touch(), "shard-000099.tar: beside shards, but not"),
}  # fmt: skip


def another_size(content: bytes) -> bytes:
    """Make the first image in an index a byte longer."""
    header, first, rest = content.split(b"\n", 2)
    extension, offset, size, *others = first.split(b" ")
    return b"\n".join([header, b" ".join([extension, offset, b"%d" % (int(size) + 1), *others]), rest])


@pytest.mark.parametrize("kind", REFUSED)
def test_shards_that_are_not_whole_are_refused(own_shards: Path, kind: str) -> None:
    """Each fault gives one line that names the file, even if an earlier scan is still cached."""
    load_index(own_shards, "train")
    spoil, message = REFUSED[kind]
    spoil(own_shards / "train")
    assert message in refusal(own_shards)


def test_the_first_image_that_a_cut_tar_lost_is_named(own_shards: Path) -> None:
    """A tar that ends within an image is refused with that image's name; one that lost only a label, without."""
    index = load_index(own_shards, "train")
    assert index.shards is not None
    samples = [sample for sample in range(len(index)) if index.shards.numbers[sample] == 1]
    ends = {sample: int(index.shards.offsets[sample] + index.sizes[sample]) for sample in samples}
    samples.sort(key=lambda sample: -ends[sample])  # the tar is cut from its end
    tar, problem = own_shards / "train" / "shard-000001.tar", "truncated or changed: "
    assert len(samples) > 1
    for position, sample in enumerate(samples):
        os.truncate(tar, ends[sample])
        lost = f"{index.name(samples[position - 1])}: " if position else ""
        assert refusal(own_shards).startswith(f"{tar}: {lost}{problem}{ends[sample]:,} bytes, ")
        os.truncate(tar, ends[sample] - 1)
        assert refusal(own_shards).startswith(f"{tar}: {index.name(sample)}: {problem}")


@pytest.mark.parametrize("name", ["shards.json", "shard-000000.idx", "shard-000000.sfv", "shard-000001.tar"])
def test_damaged_shards_end_in_one_line(own_shards: Path, name: str) -> None:
    """After any of 100 random changes to a file, the shards are read or rejected in one printable line."""
    file, rng = own_shards / "train" / name, random.Random(0)
    whole = file.read_bytes()
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        file.write_bytes(content)
        with suppress(UserError):  # always one printable line: tests/test_errors.py
            find_images(own_shards / "train")


def test_shards_without_an_image(own_shards: Path) -> None:
    """Shards without any image are rejected."""
    train = own_shards / "train"
    listed = json.loads((train / "shards.json").read_text())["shards"]
    (train / "shards.json").write_text(json.dumps({"shards": [[0, size] for _, size in listed]}))
    for idx in train.glob("*.idx"):
        idx.write_bytes(b"v1.2 0\n")
    assert "its shards contain no images; pack the data again" in refusal(own_shards)


def test_full_check_compares_every_image(own_shards: Path) -> None:
    """A tar header that names another file is found by data.check=files, but not by the quick check."""
    tar, offset = shard_of(own_shards, 1)
    times = tar.stat()
    with tar.open("r+b") as file:
        file.seek(offset - 512)
        file.write(b"a/9")
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    load_index(own_shards, "train")
    message = refusal(own_shards, IndexCheck.files)
    assert message.startswith(
        f"{tar}: a/1.JPEG is not where {tar.stem}.idx says; copy both again, or rebuild the index"
    )


def flip(file: Path, position: int) -> None:
    """Flip a bit without a trace in the file's size or time."""
    times = file.stat()
    with file.open("r+b") as opened:
        opened.seek(position)
        (value,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([value ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_flipped_bit_is_named(own_shards: Path) -> None:
    """data.check=files and scan_data.py name the shard and the image of which a bit has changed, and no other."""
    for sample in (1, 7):
        index = load_index(own_shards, "train")
        tar, offset, size = index.byte_range(sample)
        for position in (offset, offset + size // 2, offset + size - 1):
            flip(tar, position)
            load_index(own_shards, "train")
            assert refusal(own_shards, IndexCheck.files).startswith(
                f"{tar}: {index.name(sample)}: its bytes have changed (they do not have their CRC-32); copy the shard"
            )
            found = list(scan_images(index, "train", 1, lambda *step: None))
            assert [image.path for image in found if not image.ok] == [f"train/{index.name(sample)}"]
            assert found[sample].reason.startswith("its bytes have changed")
            flip(tar, position)
        assert load_index(own_shards, "train", IndexCheck.files).notes == ()


def test_checksums_follow_the_order_of_images(own_shards: Path) -> None:
    """Each image has its own checksum where shards are not in the order of the split's images."""
    folder, manifest = own_shards / "train", own_shards / "train" / "shards.json"
    before = load_index(own_shards, "train")
    content = json.loads(manifest.read_text())
    first, second = "shard-000000", "shard-000001"
    for suffix in (".tar", ".idx", ".sfv"):
        (folder / f"{first}{suffix}").rename(folder / "other")
        (folder / f"{second}{suffix}").rename(folder / f"{first}{suffix}")
        (folder / "other").rename(folder / f"{second}{suffix}")
    content["shards"][:2] = reversed(content["shards"][:2])
    manifest.write_text(json.dumps(content))
    swapped = load_index(own_shards, "train", IndexCheck.files)
    assert swapped.fingerprint == before.fingerprint
    assert swapped.shards is not None
    assert before.shards is not None
    assert np.array_equal(swapped.shards.checksums, before.shards.checksums)
    assert not np.array_equal(swapped.shards.numbers, before.shards.numbers)
    assert all(image.ok for image in scan_images(swapped, "train", 1, lambda *step: None))


def test_shards_without_checksums(own_root: Path, own_shards: Path) -> None:
    """Shards that were packed before there were checksums are read, and the full check says what it cannot compare."""
    for sfv in own_shards.rglob("*.sfv"):
        sfv.unlink()
    for manifest in own_shards.rglob("shards.json"):
        manifest.write_text(json.dumps({"shards": json.loads(manifest.read_text())["shards"]}))
    assert load_index(own_shards, "train").notes == ()
    packed = load_index(own_shards, "train", IndexCheck.files)
    assert packed.notes == (
        f"{own_shards / 'train'}: its shards have no checksums, so data.check=files compared only names and sizes; "
        "pack it again",
    )
    assert packed.fingerprint == load_index(own_root, "train").fingerprint
    assert all(image.ok for image in scan_images(packed, "train", 1, lambda *step: None))


def test_shards_that_cannot_all_be_open(own_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More shards than the process may open are rejected before the first batch; a soft limit is raised."""
    import resource

    index, limits = load_index(own_shards, "train"), resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
        ImageBytes(index).close()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 256 + 3
        monkeypatch.setattr("resource.getrlimit", lambda which: (200, 250))
        with pytest.raises(
            UserError, match=r"^data\.root: its shards need \d+ open files, but only 250 are allowed; raise"
        ):
            ImageBytes(index)
    finally:
        monkeypatch.undo()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_manifest_counts(shard_root: Path) -> None:
    """shards.json lists each shard's images and bytes."""
    train = shard_root / "train"
    listed = json.loads((train / "shards.json").read_text())["shards"]
    assert [size for _, size in listed] == [tar.stat().st_size for tar in sorted(train.glob("*.tar"))]
    assert sum(images for images, _ in listed) == 13
