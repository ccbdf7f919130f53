"""Tests of the labels of ImageNet's test sets against timm's lists."""

import pkgutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from timm.data import ImageNetInfo, RealLabelsImagenet

from metaformer.data.index.config import ClassSubset, DataConfig, Labels
from metaformer.data.index.image_index import ImageIndex, load_index
from metaformer.data.index.labels import class_counts, incompleteness, relabel, subset_mask
from metaformer.errors import UserError
from tests.data.conftest import picture

WNIDS: list[str] = ImageNetInfo().label_names()
NUMBERS = DataConfig(labels=Labels.numbers)
BY_WNIDS = DataConfig(labels=Labels.wnids)
REAL = DataConfig(name="imagenet_real", labels=Labels.real)
IN_A = DataConfig("imagenet_a", labels=Labels.wnids, class_subset=ClassSubset.imagenet_a)


@pytest.fixture(scope="module")
def file_names() -> list[str]:
    """File names of ImageNet's validation images."""
    return [f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, 50_001)]


@pytest.fixture(scope="module")
def real_labels(file_names: list[str]) -> dict[str, list[int]]:
    """ReaL's labels of each file, from timm."""
    labels: dict[str, list[int]] = RealLabelsImagenet(file_names).real_labels
    return labels


def write(root: Path, *files: str) -> ImageIndex:
    """Write small JPEGs of different sizes; return their index."""
    for number, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(20 + number, 20, seed=number).save(root / name, format="JPEG")
    return load_index(root, ".")


def listed(classes: list[str], paths: list[str]) -> ImageIndex:
    """Make an index of files that need not exist, all in the first class."""
    encoded: NDArray[np.uint8] = np.array(paths, np.bytes_).view(np.uint8).reshape(len(paths), -1)
    zeros = np.zeros(len(paths), np.int64)
    return ImageIndex(Path("nowhere"), tuple(classes), encoded, zeros, zeros, "fingerprint")


def labels_by_folder(index: ImageIndex) -> dict[str, int]:
    return {index.path(i).parent.name: label for i, label in enumerate(index.labels.tolist())}


def refusal(index: ImageIndex, config: DataConfig) -> str:
    with pytest.raises(UserError) as error:
        relabel(index, config)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_numbers_are_labels(tmp_path: Path) -> None:
    """A folder's number is its label, although "10" sorts before "2" and numbers are missing."""
    scanned = write(tmp_path, "0/a.jpeg", "0/b.jpeg", "2/a.jpeg", "10/a.jpeg", "999/a.jpeg")
    assert labels_by_folder(scanned) == {"0": 0, "10": 1, "2": 2, "999": 3}
    index = relabel(scanned, NUMBERS)
    assert labels_by_folder(index) == {"0": 0, "2": 2, "10": 10, "999": 999}
    assert index.labels.dtype == np.int64
    assert index.classes == tuple(WNIDS)
    assert index.num_labelled_classes == 4
    assert len(index) == 5


def test_wnids_are_positions_among_the_thousand(tmp_path: Path) -> None:
    """A wnid's label is its position among all of ImageNet-1K's; for the complete set these are the folders' labels."""
    names = [WNIDS[label] for label in (1, 6, 998)]
    index = relabel(write(tmp_path, *(f"{name}/a.JPEG" for name in names)), BY_WNIDS)
    assert labels_by_folder(index) == dict(zip(names, (1, 6, 998), strict=True))
    complete = ImageIndex(
        tmp_path, tuple(WNIDS), np.zeros((1000, 1), np.uint8), np.arange(1000), np.zeros(1000, np.int64), ""
    )
    assert np.array_equal(relabel(complete, BY_WNIDS).labels, complete.labels)
    assert relabel(complete, BY_WNIDS).classes == complete.classes


@pytest.mark.parametrize("subset", ClassSubset)
def test_subsets_are_timms(subset: ClassSubset) -> None:
    """The 200 classes of ImageNet-A and ImageNet-R are those that timm lists by number in another file."""
    content = pkgutil.get_data("timm.data", f"_info/{subset.value}_indices.txt")
    assert content is not None
    assert np.flatnonzero(subset_mask(subset)).tolist() == sorted(map(int, content.split()))
    assert subset_mask(subset).shape == (1000,)


@pytest.mark.parametrize(
    ("folders", "config", "parts"),
    [
        (["0", "07"], NUMBERS, ["07 is not", "a number from 0 to 999"]),
        (["0", "1000", "cat"], NUMBERS, ["1000 (and 1 more) is not", "a number from 0 to 999"]),
        (
            ["imagenet-sketch"],
            BY_WNIDS,
            ["imagenet-sketch is not", "a wnid of ImageNet-1K", "contains the class folders"],
        ),
        ([WNIDS[6], WNIDS[0]], IN_A, [f"{WNIDS[0]} is not", "imagenet_a's 200 wnids", "data=imagenet_a"]),
    ],
    ids=["padded", "beyond", "one level up", "extra class"],
)
def test_unknown_folders_are_refused(tmp_path: Path, folders: list[str], config: DataConfig, parts: list[str]) -> None:
    """A class folder without a label is named in one line, with the expected kind of name."""
    message = refusal(write(tmp_path, *(f"{folder}/a.JPEG" for folder in folders)), config)
    for part in ["data.root: class folder", str(tmp_path), *parts]:
        assert part in message


def test_real_labels_are_timms(tmp_path: Path, file_names: list[str], real_labels: dict[str, list[int]]) -> None:
    """Each image has timm's labels for its name; images without a label are excluded."""
    names = file_names[:40]
    scanned = write(tmp_path, *(f"{WNIDS[i * 7 % 5]}/{name}" for i, name in enumerate(names)))
    index = relabel(scanned, REAL)
    assert index.label_sets is not None
    assert index.label_sets.dtype == index.labels.dtype == np.int64
    assert index.classes == tuple(WNIDS)
    labelled = [scanned.path(i) for i in range(len(scanned)) if real_labels[scanned.path(i).name]]
    assert 0 < len(labelled) < 40
    assert [index.path(i) for i in range(len(index))] == labelled
    assert index.sizes.tolist() == [file.stat().st_size for file in labelled]
    for i, file in enumerate(labelled):
        row = index.label_sets[index.labels[i]].tolist()
        labels = sorted(real_labels[file.name])
        assert row == labels + [-1] * (len(row) - len(labels))


def test_real_counts_are_the_published(file_names: list[str], real_labels: dict[str, list[int]]) -> None:
    """46,837 of the 50,000 images have labels, from 1000 classes."""
    whole = relabel(listed(["val"], [f"val/{name}" for name in file_names]), REAL)
    assert len(whole) == 46_837
    assert whole.num_labelled_classes == 1000
    some = relabel(listed(["val"], [f"val/{name}" for name in file_names[:10]]), REAL)
    assert some.num_labelled_classes == len({label for name in file_names[:10] for label in real_labels[name]})


def test_other_file_names_have_no_real_labels(file_names: list[str]) -> None:
    """A file that is not one of the 50,000 is named, and so is a folder without any labelled image."""
    for bad in ("cat.JPEG", "ILSVRC2012_val_00000000.JPEG", "ILSVRC2012_val_00050001.JPEG", f"x{file_names[1]}"):
        message = refusal(listed(["a"], [f"a/{file_names[1]}", f"a/{bad}"]), REAL)
        assert f"a/{bad} is not named like an ImageNet validation image" in message
    assert "no image in" in refusal(listed(["a"], [f"a/{file_names[0]}"]), REAL)


def test_fingerprints_follow_labels(tmp_path: Path, file_names: list[str]) -> None:
    """The same files with other labels are another data set; with the same labels the same, cached or not."""
    first, again = (write(tmp_path, f"{WNIDS[6]}/{file_names[1]}", f"{WNIDS[9]}/{file_names[3]}") for _ in range(2))
    assert relabel(first, DataConfig()) is first
    prints = [relabel(first, config).fingerprint for config in (DataConfig(), BY_WNIDS, REAL)]
    assert len(set(prints)) == 3
    assert prints == [relabel(again, config).fingerprint for config in (DataConfig(), BY_WNIDS, REAL)]
    assert (tmp_path / ".metaformer" / "all.json").is_file()


def test_same_folders_in_another_scheme_are_no_cache_of_each_other(tmp_path: Path) -> None:
    """The cached scan of a folder serves every labelling; the labels are those requested."""
    write(tmp_path, "1/a.JPEG", "3/a.JPEG")
    assert relabel(load_index(tmp_path, "."), NUMBERS).labels.tolist() == [1, 3]
    assert relabel(load_index(tmp_path, "."), DataConfig()).labels.tolist() == [0, 1]
    assert relabel(load_index(tmp_path, "."), NUMBERS).labels.tolist() == [1, 3]


def test_incomplete_sets_are_reported(tmp_path: Path) -> None:
    """A difference from the published counts gives a warning; equal or unknown counts do not."""
    files = [f"{WNIDS[6]}/a.JPEG", f"{WNIDS[6]}/b.JPEG", f"{WNIDS[11]}/a.JPEG"]
    complete = DataConfig("imagenet_a", labels=Labels.wnids, expected_images=3, expected_classes=2)
    index = relabel(write(tmp_path, *files), complete)
    assert incompleteness(index, complete) is None
    assert incompleteness(index, BY_WNIDS) is None
    assert class_counts(index, BY_WNIDS) == {"classes": 2}
    for images, classes in ((7500, 2), (3, 200)):
        partial = DataConfig("imagenet_a", labels=Labels.wnids, expected_images=images, expected_classes=classes)
        message = incompleteness(index, partial)
        assert message is not None
        assert f"3 images of 2 classes to score, but the published set has {images:,} of {classes}" in message
        assert class_counts(index, partial) == {"classes": 2, "expected_images": images, "expected_classes": classes}


def test_missing_root_without_splits(tmp_path: Path) -> None:
    """If data.root itself should contain the class folders, the error describes that layout."""
    for root, what in ((tmp_path / "nowhere", "no folder"), (tmp_path, "it is empty")):
        with pytest.raises(UserError, match=rf"data.root={root}: .*{what}.*data.root must contain the class folders"):
            load_index(root, ".")


def test_subset_needs_wnids() -> None:
    """A class subset requires labels by wnid, because folder positions do not identify ImageNet's classes."""
    with pytest.raises(UserError, match=r"data.class_subset=imagenet_r: .*data.labels=wnids"):
        DataConfig(class_subset=ClassSubset.imagenet_r)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (DataConfig("imagenet_v2", train_split=None), "data=imagenet_v2"),
        (DataConfig(labels=Labels.real), "data.labels=real"),
    ],
)
def test_test_sets_are_not_trained_on(config: DataConfig, field: str) -> None:
    """A set without a training split, or with labels for evaluation only, cannot be trained on."""
    with pytest.raises(UserError, match=rf"^{field}: .*validate\.py"):
        config.check_can_train()
    DataConfig().check_can_train()
