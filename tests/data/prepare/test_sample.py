"""Tests of the built-in sample data."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metaformer.data.index.image_index import load_index
from metaformer.data.prepare.sample import build_sample
from metaformer.errors import UserError


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("built") / "sample"
    build_sample(root)
    return root


def hashes(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.JPEG")}


def test_layout_is_imagenets(sample: Path) -> None:
    """There are 5,000 images in 10 classes: 400 of each for training, 100 of each for validation, nothing else."""
    assert sorted(path.name for path in sample.parent.iterdir()) == ["sample"], "nothing temporary is left"
    for split, per_class in (("train", 400), ("val", 100)):
        index = load_index(sample, split)
        assert index.classes == tuple(f"digit_{digit}" for digit in range(10))
        assert Counter(index.labels.tolist()) == dict.fromkeys(range(10), per_class)
    assert len([path for path in sample.rglob("*") if path.suffix == ".JPEG"]) == 5000


def test_splits_share_no_image(sample: Path) -> None:
    """No validation image is a training image."""
    by_split: dict[str, set[str]] = {"train": set(), "val": set()}
    for name, digest in hashes(sample).items():
        by_split[Path(name).parts[0]].add(digest)
    assert not by_split["train"] & by_split["val"]


def test_images_are_gray_digits(sample: Path) -> None:
    """An image is a 28 x 28 gray JPEG of a bright digit on a dark background."""
    with Image.open(sample / "val" / "digit_7" / "7_499.JPEG") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "L", (28, 28))
        pixels = np.asarray(image)
    assert pixels.max() > 200
    assert pixels[0, 0] < 10


def test_build_is_reproducible_byte_for_byte(sample: Path, tmp_path: Path) -> None:
    """A second build writes the same 5,000 files byte for byte."""
    build_sample(tmp_path / "again")
    again = hashes(tmp_path / "again")
    assert len(again) == 5000
    assert again == hashes(sample)


def test_unwritable_root_is_named(tmp_path: Path) -> None:
    """A root below a file raises a one-line UserError that names data.root, and nothing is left behind."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=rf"^data\.root={tmp_path}/file/sample: cannot write [^\n]*$"):
        build_sample(tmp_path / "file" / "sample")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_builds_at_once(sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When two first starts with data=sample run at once, the later one uses the other's data and cleans up."""
    rename = Path.rename

    def finish_second(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        build_sample(tmp_path / "sample")  # begins and ends while the first one is about to end
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", finish_second)
    build_sample(tmp_path / "sample")
    assert hashes(tmp_path / "sample") == hashes(sample)
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]
