"""Tests of the index of a data set."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from metaformer.data.index.config import DataConfig, IndexCheck, Labels
from metaformer.data.index.image_index import check_same_classes, check_several_classes, load_index
from metaformer.errors import UserError


def refusal(root: Path, split: str) -> str:
    with pytest.raises(UserError) as error:
        load_index(root, split)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def age(folder: Path) -> None:
    """Set a folder's modification time back, to avoid the limited resolution of the file system's clock."""
    os.utime(folder, ns=(10**18, 10**18))


def test_order_and_labels_equal_image_folders(own_root: Path) -> None:
    """Classes, files and labels equal those of torchvision's ImageFolder, for names that are easily sorted wrongly."""
    train = own_root / "train"
    for name in ("B", "n10", "n2", "é", "a b", "a-b", "a.d"):
        shutil.copytree(train / "c", train / name)
    for name in ("10.JPEG", "2.jpg", "X.PNG", "x.jpeg", "é.JPEG"):
        shutil.copy(train / "a" / "0.JPEG", train / "a" / name)
    (train / "a" / "readme.txt").write_text("no image")
    (train / "a-list.JPEG").write_text("a file among the class folders")
    index, reference = load_index(own_root, "train"), ImageFolder(str(train))
    assert list(index.classes) == reference.classes
    assert [(str(index.path(i)), label) for i, label in enumerate(index.labels.tolist())] == reference.samples
    assert index.sizes.tolist() == [Path(path).stat().st_size for path, _ in reference.samples]


def test_hidden_files_are_left_out_and_folders_below_a_class_are_read(own_root: Path) -> None:
    """Hidden files and folders, such as macOS's `._x.JPEG`, are ignored; images in folders below a class count."""
    train = own_root / "train"
    before = len(load_index(own_root, "train"))
    (train / "a" / "._0.JPEG").write_bytes(b"x")
    (train / ".thumbnails").mkdir()
    shutil.copytree(train / "b", train / "a" / "more")
    index = load_index(own_root, "train")
    assert index.classes == ("a", "b", "c")
    assert len(index) == before + 3
    assert train / "a" / "more" / "cmyk.JPEG" in {index.path(int(i)) for i in np.flatnonzero(index.labels == 0)}


def test_cache_is_used_while_nothing_changed(own_root: Path) -> None:
    """The second index equals the first and uses its memory-mapped files, without a scan."""
    first = load_index(own_root, "train")
    assert isinstance(first.labels, np.memmap)
    second = load_index(own_root, "train")
    assert (second.fingerprint, second.classes) == (first.fingerprint, first.classes)
    for name in ("paths", "labels", "sizes"):
        assert np.array_equal(getattr(second, name), getattr(first, name))
        assert getattr(second, name).dtype == getattr(first, name).dtype
    assert isinstance(second.labels, np.memmap)
    assert second.labels.filename == first.labels.filename


@pytest.mark.parametrize("check", IndexCheck)
def test_files_rewritten_in_place_are_detected(own_root: Path, check: IndexCheck) -> None:
    """A changed size or time of one file triggers a new scan, though no folder changed; old arrays are removed."""
    first = load_index(own_root, "train", check)
    file = own_root / "train" / "a" / "0.JPEG"
    file.write_bytes(b"longer or shorter")
    second = load_index(own_root, "train", check)
    assert second.fingerprint != first.fingerprint
    assert second.sizes[0] == 17
    age(file)
    (before,) = own_root.glob(".metaformer/train-*")
    assert load_index(own_root, "train", check).fingerprint == second.fingerprint
    (after,) = own_root.glob(".metaformer/train-*")
    assert before != after


def test_quick_check_looks_at_some_files_and_the_full_one_at_all(tmp_path: Path) -> None:
    """The quick check examines a thousand of 3,000 files; the full check detects a change of another file."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number in range(3000):
        (tmp_path / "train" / "a" / f"{number:04}.JPEG").write_bytes(b"x")
    first = load_index(tmp_path, "train")
    (tmp_path / "train" / "a" / "0001.JPEG").write_bytes(b"xx")
    assert load_index(tmp_path, "train").fingerprint == first.fingerprint
    assert load_index(tmp_path, "train", IndexCheck.files).fingerprint != first.fingerprint


def test_added_and_removed_files_and_classes_are_detected(own_root: Path) -> None:
    """A file added or removed, or a class added, triggers a new scan despite the cache."""
    train = own_root / "train"
    for folder in ("a", "b", "c"):
        age(train / folder)
    full = load_index(own_root, "train")
    shutil.copy(train / "a" / "0.JPEG", train / "b" / "added.JPEG")
    added = load_index(own_root, "train")
    assert len(added) == len(full) + 1
    age(train / "b")
    load_index(own_root, "train")
    (train / "b" / "added.JPEG").unlink()
    removed = load_index(own_root, "train")
    assert removed.fingerprint == full.fingerprint
    shutil.copytree(train / "c", train / "d")
    assert load_index(own_root, "train").classes == ("a", "b", "c", "d")


def test_files_added_below_a_class_are_detected(own_root: Path) -> None:
    """A file added to a folder inside a class folder also triggers a new scan."""
    more = own_root / "train" / "a" / "more"
    shutil.copytree(own_root / "train" / "b", more)
    for folder in (more, *(own_root / "train").iterdir()):
        age(folder)
    before = len(load_index(own_root, "train"))
    shutil.copy(own_root / "train" / "a" / "0.JPEG", more / "added.JPEG")
    assert len(load_index(own_root, "train")) == before + 1


def flip(content: bytes) -> bytes:
    """Flip a bit of the last byte."""
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "no archive": lambda content: b"no archive",
    "deep": lambda content: b"[" * 100_000,
    "a list": lambda content: b"[1]",
    "a flipped bit": flip,
    "cut short": lambda content: content[:-8],
    "an absurd header": lambda content: content.replace(b"(13,)", b"(9**9**9,)"),
}


@pytest.mark.parametrize("name", ["train.json", "train-*/paths.npy", "train-*/labels.npy", "train-*/changed.npy"])
def test_damaged_cache_is_replaced(own_root: Path, name: str) -> None:
    """A cache with even a single changed bit is reported as damaged once, and rebuilt."""
    first = load_index(own_root, "train")
    for kind, damage in DAMAGE.items():
        (file,) = (own_root / ".metaformer").glob(name)
        content = file.read_bytes()
        if damage(content) == content:
            continue
        file.unlink()  # the previous index maps it
        file.write_bytes(damage(content))
        again, later = load_index(own_root, "train"), load_index(own_root, "train")
        assert (again.fingerprint, again.labels.tolist()) == (first.fingerprint, first.labels.tolist()), kind
        (note,) = again.notes
        assert note.endswith("train.json: the index cache is damaged; scanning the data set again"), kind
        assert later.notes == (), kind


def test_damaged_descriptions_never_escape(own_root: Path) -> None:
    """After any of 100 random changes to the cache's description, the index matches the data."""
    first, rng = load_index(own_root, "train"), random.Random(0)
    file = own_root / ".metaformer" / "train.json"
    for _ in range(100):
        content = bytearray(file.read_bytes())
        for _ in range(rng.choice((1, 1, 3))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file.write_bytes(content)
        assert load_index(own_root, "train").fingerprint == first.fingerprint


def test_splits_have_separate_caches(own_root: Path) -> None:
    """The cached index of one split is never used for the other."""
    for _ in range(2):
        train, val = load_index(own_root, "train"), load_index(own_root, "val")
        assert train.fingerprint != val.fingerprint
        assert val.path(0) == own_root / "val" / "a" / "0.JPEG"


def test_cache_moves_to_the_user_where_the_data_is_read_only(own_root: Path, tmp_path: Path) -> None:
    """If no cache can be written beside the data, it is written to XDG_CACHE_HOME and used from there."""
    (own_root / ".metaformer").write_text("a file where the cache's folder would be")
    first = load_index(own_root, "train")
    (cached,) = (tmp_path / "cache" / "metaformer").glob("*/train.json")
    inode = cached.stat().st_ino
    assert load_index(own_root, "train").sizes.tolist() == first.sizes.tolist()
    assert cached.stat().st_ino == inode


@pytest.mark.parametrize("change", [{"format": 3}, {"kind": "ShardScan"}])
def test_a_scan_of_something_else_is_not_used(own_root: Path, change: dict[str, object]) -> None:
    """A cache of another format, kind or folder is ignored without a message, and the data is scanned again."""

    def stored(root: Path) -> Path:
        (arrays,) = root.glob(".metaformer/train-*")
        return arrays

    load_index(own_root, "train")
    file, before = own_root / ".metaformer" / "train.json", stored(own_root)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert load_index(own_root, "train").notes == ()
    assert stored(own_root) != before
    before = stored(own_root)
    moved = own_root.rename(own_root.with_name("moved"))
    assert load_index(moved, "train").notes == ()
    assert stored(moved).name != before.name


def test_a_cache_that_fills_the_disk_leaves_nothing(own_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that cannot all be written are removed, and the scan is used without a cache."""

    def save(file: Path, array: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", save)
    assert len(load_index(own_root, "train")) == 13
    assert list((own_root / ".metaformer").iterdir()) == []


def test_index_works_where_nothing_can_be_cached(own_root: Path, tmp_path: Path) -> None:
    """Without any place for a cache, the scan is repeated and nothing fails."""
    for place in (own_root / ".metaformer", tmp_path / "cache"):
        place.write_text("in the way")
    assert load_index(own_root, "train").fingerprint == load_index(own_root, "train").fingerprint


def test_fingerprint_follows_content_and_not_place(own_root: Path, tmp_path: Path) -> None:
    """A copy of the data has the same fingerprint; another size, file name or class name changes it."""
    seen = {load_index(own_root, "train").fingerprint}
    shutil.copytree(own_root, tmp_path / "copy")
    assert load_index(tmp_path / "copy", "train").fingerprint in seen
    a = tmp_path / "copy" / "train" / "a"
    file = a / "0.JPEG"
    for change in (
        lambda: file.write_bytes(file.read_bytes() + b"\0"),
        lambda: file.rename(a / "00.JPEG"),
        lambda: a.rename(a.with_name("A")),
    ):
        change()
        shutil.rmtree(tmp_path / "copy" / ".metaformer")
        fingerprint = load_index(tmp_path / "copy", "train").fingerprint
        assert fingerprint not in seen
        seen.add(fingerprint)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    """A missing split names data.root and the whole path, and says what to run."""
    text = refusal(tmp_path, "train")
    assert text.startswith(f"data.root={tmp_path}: no folder {tmp_path / 'train'}")
    assert "prepare_data.py" in text


def test_flat_and_empty_splits_are_refused(tmp_path: Path) -> None:
    """An empty split and one without class folders, which would score 0.1 %, give different messages."""
    (tmp_path / "val").mkdir()
    assert f"{tmp_path / 'val'} is not a data set: it is empty" in refusal(tmp_path, "val")
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"x")
    assert f"{tmp_path / 'val'} is not a data set: it contains no class folders" in refusal(tmp_path, "val")


def test_empty_class_folder_is_named(own_root: Path) -> None:
    """A class folder without an image is rejected by name, because dropping it would shift the labels after it."""
    (own_root / "train" / "bb").mkdir()
    (own_root / "train" / "bb" / "notes.txt").write_text("no image")
    assert str(own_root / "train" / "bb") in refusal(own_root, "train")


def test_splits_must_have_the_same_classes(own_root: Path) -> None:
    """Class folders that only one split has are named with the split that lacks them, in both directions."""
    train, val = load_index(own_root, "train"), load_index(own_root, "val")
    check_same_classes(train, val)
    (own_root / "val" / "b").rename(own_root / "val" / "z")
    changed = load_index(own_root, "val")
    with pytest.raises(UserError, match=r"class folders b are in .*/train but not in .*/val$"):
        check_same_classes(train, changed)
    shutil.rmtree(own_root / "train" / "b")
    with pytest.raises(UserError, match=r"class folders z are in .*/val but not in .*/train$"):
        check_same_classes(load_index(own_root, "train"), changed)


def test_files_that_are_not_data_are_skipped(own_root: Path) -> None:
    """Thumbnails of a NAS or macOS are ignored; files without an image suffix are counted and reported each time."""
    before = load_index(own_root, "train")
    assert before.notes == ()
    train = own_root / "train"
    for folder in (train / "@eaDir", train / "a" / "@eaDir" / "0.JPEG", train / "a" / "__MACOSX", train / "#recycle"):
        folder.mkdir(parents=True)
        shutil.copy(train / "a" / "0.JPEG", folder / "SYNOPHOTO_THUMB_S.jpg")
    for name in ("x.jfif", "y.JPE", "z.jpe", "noted", ".hidden.gif"):
        shutil.copy(train / "a" / "0.JPEG", train / "b" / name)
    for _ in range(2):
        index = load_index(own_root, "train")
        assert index.fingerprint == before.fingerprint
        assert index.notes == (f"{train}: skipped 4 files without an image suffix: 2 .jpe, 1 without suffix, 1 .jfif",)
    for file in (train / "a").glob("*.JPEG"):
        if file.is_file():
            file.rename(file.with_suffix(".avif"))
    assert "contains no images, only 8 .avif; image suffixes are .jpg .jpeg " in refusal(own_root, "train")


def test_a_fifo_is_rejected_by_its_name(own_root: Path) -> None:
    """A FIFO, which would block a reader forever, is named when the folders are scanned."""
    os.mkfifo(own_root / "train" / "a" / "x.JPEG")
    assert f"{own_root}/train/a/x.JPEG has an image suffix but is a FIFO" in refusal(own_root, "train")


def test_one_class_is_refused(tmp_path: Path, own_root: Path) -> None:
    """An extra folder level gives a single class; the error names the split that was probably meant."""
    (tmp_path / "x" / "train").mkdir(parents=True)
    (own_root / "train").rename(tmp_path / "x" / "train" / "images")
    root = tmp_path / "x"
    index, config = load_index(root, "train"), DataConfig(root=str(root))
    with pytest.raises(UserError, match=r"one class folder, images; .*: set data\.train_split=train/images$"):
        check_several_classes(index, config, "train")
    check_several_classes(load_index(root, "train/images"), config, "train/images")
    check_several_classes(index, replace(config, labels=Labels.wnids), "train")
    shutil.rmtree(root / "train" / "images" / "b")
    shutil.rmtree(root / "train" / "images" / "c")
    with pytest.raises(UserError, match=r"one class folder, a; give the folder that contains the class folders$"):
        check_several_classes(load_index(root, "train/images"), config, "train/images")


def test_names_that_look_alike_are_told_apart(own_root: Path) -> None:
    """Classes that differ only in Unicode normalisation are printed with escapes."""
    for split, name in (("train", "caf\u00e9"), ("val", "cafe\u0301")):
        (own_root / split / "a").rename(own_root / split / name)
    train, val = load_index(own_root, "train"), load_index(own_root, "val")
    with pytest.raises(UserError, match=r"is 'caf\\xe9' in .*/train and 'cafe\\u0301' in .*/val \(Unicode"):
        check_same_classes(train, val)


def test_names_are_printed_in_one_line(own_root: Path) -> None:
    """Line breaks, escape sequences and undecodable bytes are escaped in messages."""
    name = os.fsdecode(b"b\n\x1b[31m\xff")
    (own_root / "train" / name).mkdir()
    assert "/train/b\\n\\x1b[31m\\udcff contains no images" in refusal(own_root, "train")


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` in data.root and data.quarantine is the user's home folder."""
    monkeypatch.setenv("HOME", "/home/me")
    config = DataConfig(root="~/imagenet", quarantine="~/list.txt")
    assert (config.root, config.quarantine) == ("/home/me/imagenet", "/home/me/list.txt")
