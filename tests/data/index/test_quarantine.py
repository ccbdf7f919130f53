"""Tests of quarantine lists."""

from pathlib import Path

import numpy as np
import pytest

from metaformer.data.index.config import DataConfig, Labels
from metaformer.data.index.image_index import ImageIndex, load_index
from metaformer.data.index.labels import relabel
from metaformer.data.index.quarantine import drop_quarantined, read_quarantine, write_quarantine
from metaformer.errors import UserError


def config(root: Path, *lines: str) -> DataConfig:
    """Configure a data set with a quarantine list of the given lines."""
    file = root.parent / "broken.txt"
    write_quarantine(file, lines)
    return DataConfig(root=str(root), quarantine=str(file))


def files(index: ImageIndex) -> list[Path]:
    return [index.path(sample) for sample in range(len(index))]


def refusal(root: Path, *lines: str) -> str:
    with pytest.raises(UserError) as caught:
        drop_quarantined(load_index(root, "train"), config(root, *lines), "train")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"data.quarantine={root.parent / 'broken.txt'}: ")
    return str(caught.value)


def test_listed_files_are_left_out(own_root: Path) -> None:
    """First, last and inner files are excluded, other files are unchanged, and each split counts its own files."""
    index = load_index(own_root, "train")
    excluded = ["train/a/0.JPEG", "train/b/gray.JPEG", "train/c/turned.JPEG"]
    listed = config(own_root, *excluded, "val/a/1.JPEG", excluded[0])
    left = drop_quarantined(index, listed, "train")
    kept = np.flatnonzero([str(file.relative_to(own_root)) not in excluded for file in files(index)])
    assert files(left) == [index.path(int(sample)) for sample in kept]
    assert left.labels.tolist() == index.labels[kept].tolist()
    assert left.sizes.tolist() == index.sizes[kept].tolist()
    assert left.classes == index.classes
    assert left.quarantined == 3
    val = drop_quarantined(load_index(own_root, "val"), listed, "val")
    assert (len(val), val.quarantined) == (12, 1)
    assert len(read_quarantine(listed)) == 4


def test_fingerprint_follows_what_is_left(own_root: Path) -> None:
    """Excluded files change the fingerprint; the order of the lines and the other split's lines do not."""
    index = load_index(own_root, "train")

    def fingerprint(*lines: str) -> str:
        return drop_quarantined(index, config(own_root, *lines), "train").fingerprint

    assert fingerprint() == fingerprint("val/a/0.JPEG") == index.fingerprint
    both = fingerprint("train/a/0.JPEG", "train/b/gray.JPEG")
    assert both == fingerprint("train/b/gray.JPEG", "val/a/0.JPEG", "train/a/0.JPEG")
    assert len({index.fingerprint, both, fingerprint("train/a/0.JPEG"), fingerprint("train/a/1.JPEG")}) == 4


def test_names_of_any_bytes(own_root: Path) -> None:
    """Lists support spaces, non-ASCII letters, bytes that are not UTF-8, and folders below a class."""
    folder = own_root / "train" / "a" / "é b"
    folder.mkdir()
    names = [" x.JPEG", "ü.JPEG", "\udcff.JPEG"]
    for name in names:
        (folder / name).write_bytes(b"x")
    listed = config(own_root, *(f"train/a/é b/{name}" for name in names))
    assert drop_quarantined(load_index(own_root, "train"), listed, "train").quarantined == 3


def test_class_folders_in_the_root(own_root: Path) -> None:
    """A test set whose split is the root itself lists CLASS/IMAGE."""
    root = own_root / "val"
    listed = config(root, "a/0.JPEG")
    listed.train_split, listed.val_split = None, "."
    left = drop_quarantined(load_index(root, "."), listed, ".")
    assert root / "a" / "0.JPEG" not in files(left)
    assert left.quarantined == 1


@pytest.mark.parametrize(
    "line", ["other/a/0.JPEG", "a/0.JPEG", "/train/a/0.JPEG", "./../train/a/0.JPEG", "train/../train/a/0.JPEG", "x"]
)
def test_lines_of_no_split(own_root: Path, line: str) -> None:
    """A line in neither split is rejected with a message that names the splits."""
    assert f"{line!r} is in no split of data=imagenet (train, val); remove the line" in refusal(own_root, line)


@pytest.mark.parametrize("line", ["train/a/none.JPEG", "train/z/0.JPEG", "train/a", "train", "train/a/0.JPEG\r"])
def test_lines_of_no_image(own_root: Path, line: str) -> None:
    """A line of this split that names no image, for example a deleted one, is rejected."""
    message = refusal(own_root, line)
    assert f"{line!r}: no such image in {own_root / 'train'}; remove the line if the file is gone" in message


def test_empty_class(own_root: Path) -> None:
    """A list that leaves a class without images is rejected with a message that names the class folder."""
    listed = [f"train/c/{file.name}" for file in (own_root / "train" / "c").iterdir()]
    assert f"leaves no images in class folder {own_root / 'train' / 'c'}; repair" in refusal(own_root, *listed)


def test_missing_list(own_root: Path, tmp_path: Path) -> None:
    """A list that does not exist, or is a folder, is rejected with the command that writes one."""
    for file in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match=rf"^data\.quarantine={file}: cannot be read \([^\n]*scan_data\.py[^\n]*$"):
            drop_quarantined(load_index(own_root, "train"), DataConfig(quarantine=str(file)), "train")


def test_labels_of_a_test_set(own_root: Path) -> None:
    """The number of excluded images is kept when ReaL's labels are applied."""
    folder = own_root / "val" / "a"
    for number, file in enumerate(sorted(folder.parent.rglob("*.JPEG")), 1):
        file.rename(file.with_name(f"ILSVRC2012_val_{number:08}.JPEG"))
    listed = config(own_root, "val/a/ILSVRC2012_val_00000001.JPEG")
    listed.train_split, listed.labels = None, Labels.real
    left = drop_quarantined(load_index(own_root, "val"), listed, "val")
    assert relabel(left, listed).quarantined == 1
