"""Tests that the three loaders read the same images from one plan."""

import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import CenterCrop, InterpolationMode
from torchvision.transforms.functional import pil_to_tensor

from metaformer.assembly import make_loader
from metaformer.data.device.transform import EvaluationTransform, TrainingTransform, normalize
from metaformer.data.feed import Feed, Placement
from metaformer.data.index.image_index import ImageIndex, load_index
from metaformer.data.load.config import LoaderConfig, LoaderName
from metaformer.data.load.dali_loader import DaliLoader
from metaformer.data.load.loader import Loader
from metaformer.data.load.pil_reader import PilReader
from metaformer.data.load.reader import ImageReader
from metaformer.data.load.torch_reader import TorchReader
from metaformer.data.load.worker_loader import WorkerLoader
from metaformer.data.plan.augmentation import AugmentationConfig, RandAugmentConfig
from metaformer.data.plan.geometry import Resize, resize_and_center_crop
from metaformer.data.plan.plan import EvaluationPlan, Plan, TrainingPlan
from metaformer.data.prepare.scan_images import examine
from metaformer.errors import UserError
from tests.data.conftest import picture

LOADERS = ("torch", "pil", "dali")
every_loader = pytest.mark.parametrize("name", LOADERS)
CPU = torch.device("cpu")
WITHOUT_RANDAUGMENT = AugmentationConfig(randaugment=RandAugmentConfig(num_ops=0))
IMAGES = 13  # of each split


@pytest.fixture(scope="module")
def index(image_root: Path) -> ImageIndex:
    return load_index(image_root, "train")


def training_plan(size: int = 48, batch: int = 4, **options: AugmentationConfig) -> TrainingPlan:
    augmentation = options.get("augmentation", WITHOUT_RANDAUGMENT)
    return TrainingPlan(
        num_samples=IMAGES,
        global_batch_size=batch,
        accumulation_steps=1,
        rank=0,
        world_size=1,
        seed=1,
        image_size=size,
        crop_pct=0.9,
        augmentation=augmentation,
    )


def evaluation_plan(size: int = 48, batch: int = 4, rank: int = 0, world_size: int = 1) -> EvaluationPlan:
    return EvaluationPlan(
        num_samples=IMAGES, batch_size=batch, rank=rank, world_size=world_size, image_size=size, crop_pct=0.9
    )


@contextmanager
def open_loader(name: str, index: ImageIndex, plan: Plan, workers: int = 0) -> Iterator[Loader]:
    loader: Loader
    if name == "dali":
        loader = DaliLoader(index, plan, LoaderConfig(), CPU, threads=1)
    else:
        reader = TorchReader() if name == "torch" else PilReader()
        loader = WorkerLoader(reader, index, plan, workers, prefetch_batches=2, pin_memory=False)
    with closing(loader):
        yield loader


def read_epoch(name: str, index: ImageIndex, plan: Plan, epoch: int = 0, workers: int = 0) -> list[Tensor]:
    with open_loader(name, index, plan, workers) as loader:
        return list(loader.epoch(epoch))


def difference(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """Return the mean absolute difference of each image, on a scale of 255."""
    return (torch.cat(one).float() - torch.cat(other).float()).abs().mean((1, 2, 3))


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


PLANS = {
    "evaluation": evaluation_plan(),
    "evaluation, odd size": evaluation_plan(size=37),
    "evaluation, bilinear": replace(evaluation_plan(), bicubic=False),
    "training": training_plan(),
    "training, odd size": training_plan(size=33, batch=6),
    "training, centre crop": training_plan(augmentation=replace(WITHOUT_RANDAUGMENT, random_crop=False)),
    "training, centre crop, bilinear": replace(
        training_plan(augmentation=replace(WITHOUT_RANDAUGMENT, random_crop=False)), bicubic=False
    ),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("name", "bound"), [("torch", 0.05), ("dali", 0.5)])
def test_loaders_equal_pil(index: ImageIndex, plan: Plan, name: str, bound: float) -> None:
    """Images of many sizes, gray, CMYK, progressive, rotated and PNG files equal PIL's except for rounding."""
    images, reference = (read_epoch(which, index, plan) for which in (name, "pil"))
    assert [batch.shape for batch in images] == [batch.shape for batch in reference]
    assert {batch.dtype for batch in images} == {torch.uint8}
    differences = difference(images, reference)
    assert differences.max() < bound, {
        str(index.path(int(sample))): round(value, 3)
        for sample, value in zip(samples_of(plan), differences.tolist(), strict=True)
    }


def samples_of(plan: Plan, epoch: int = 0) -> list[int]:
    return [s for position in range(plan.batches_per_epoch) for s in plan.batch(epoch, position).samples.tolist()]


@pytest.mark.parametrize(("name", "bound"), [("torch", 0.5), ("dali", 3.0)])
def test_randaugment_is_pils_in_every_loader(index: ImageIndex, name: str, bound: float) -> None:
    """Each loader applies the same operations as the PIL loader, within the rounding that these amplify."""
    plan = training_plan(augmentation=AugmentationConfig())
    images, reference, plain = (
        read_epoch(name, index, plan),
        read_epoch("pil", index, plan),
        read_epoch("pil", index, training_plan()),
    )
    assert difference(images, reference).max() < bound
    changed = difference(reference, plain) > 0
    expected = [
        bool(batch.randaugment and batch.randaugment.operations_for(row))
        for batch in (plan.batch(0, position) for position in range(plan.batches_per_epoch))
        for row in range(len(batch))
    ]
    assert 0 < sum(expected) < len(expected)
    assert changed.tolist() == expected


def test_pil_loader_equals_torchvisions_evaluation(index: ImageIndex) -> None:
    """The reference loader's evaluation images equal those of PIL, Resize and CenterCrop, in the index's order."""
    images = torch.cat(read_epoch("pil", index, evaluation_plan()))
    for sample in range(IMAGES):
        with Image.open(index.path(sample)) as file:
            image = CenterCrop(48)(transforms.Resize(53, InterpolationMode.BICUBIC)(file.convert("RGB")))
        assert torch.equal(images[sample], pil_to_tensor(image)), index.path(sample)


@pytest.mark.parametrize(
    ("format_", "mode"),
    [("JPEG", mode) for mode in ("L", "CMYK", "RGB")]
    + [("PNG", mode) for mode in ("L", "RGB", "RGBA", "LA", "P", "1", "I;16")]
    + [("TIFF", mode) for mode in ("CMYK", "RGB")],
)
def test_torch_loader_converts_colours_as_pil(tmp_path: Path, mode: str, format_: str) -> None:
    """Gray, CMYK, palette, alpha and 16-bit files named as JPEGs decode exactly to PIL's RGB pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).resize((5, 4)).resize((50, 40), Image.Resampling.BICUBIC)
    image = smooth.convert(mode) if mode != "I;16" else Image.fromarray(np.asarray(smooth.convert("L"), np.uint16) * 99)
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    image.save(folder / "x.JPEG", format=format_)
    plan = EvaluationPlan(num_samples=1, batch_size=1, rank=0, world_size=1, image_size=40, crop_pct=1.0)
    index = load_index(tmp_path, "train")
    assert same(read_epoch("torch", index, plan), read_epoch("pil", index, plan))


@every_loader
def test_resumed_epoch_is_the_rest_of_the_epoch(index: ImageIndex, name: str) -> None:
    """An epoch from position k gives exactly its remaining batches, even after an unfinished epoch."""
    plan = training_plan(batch=2)
    with open_loader(name, index, plan) as loader:
        full = list(loader.epoch(1))
        assert len(full) == plan.batches_per_epoch == 6
        for first in (0, 2, 5, 6):
            assert same(list(loader.epoch(1, first)), full[first:]), first
        for _ in range(2):
            next(loader.epoch(0))
        assert same(list(loader.epoch(1, 1)), full[1:]), "after an unfinished epoch"


@every_loader
def test_batches_are_not_overwritten(index: ImageIndex, name: str) -> None:
    """A batch that the caller keeps is not overwritten by later batches."""
    with open_loader(name, index, training_plan(batch=2)) as loader:
        kept = [(batch, batch.clone()) for epoch in range(2) for batch in loader.epoch(epoch)]
    assert all(torch.equal(batch, copy) for batch, copy in kept)


@every_loader
def test_epochs_differ_in_order_and_crops(index: ImageIndex, name: str) -> None:
    """Two epochs have different orders, and crop the same image differently."""
    plan = training_plan(batch=13)
    with open_loader(name, index, plan) as loader:
        (first,), (second,) = loader.epoch(0), loader.epoch(1)
    positions = [np.argsort(plan.batch(epoch, 0).samples) for epoch in (0, 1)]
    assert (positions[0] != positions[1]).sum() > 8
    same_images = (first[positions[0]].float() - second[positions[1]].float()).abs().mean((1, 2, 3))
    assert (same_images > 1).sum() > 8


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_images(index: ImageIndex, workers: int) -> None:
    """One or two worker processes give the same batches as none, over two epochs and a resumed one."""
    plan = training_plan(batch=3, augmentation=AugmentationConfig())
    with open_loader("torch", index, plan) as alone, open_loader("torch", index, plan, workers) as loader:
        for epoch, first in ((0, 0), (1, 0), (1, 2)):
            assert same(list(loader.epoch(epoch, first)), list(alone.epoch(epoch, first))), (epoch, first)
        next(loader.epoch(2))
        assert same(list(loader.epoch(0)), list(alone.epoch(0))), "after an unfinished epoch"


@every_loader
def test_a_samples_image_is_the_same_in_any_world(index: ImageIndex, name: str) -> None:
    """With two ranks and two accumulation steps, each sample's image is exactly that of a single rank."""
    whole = training_plan(batch=12)
    (expected,) = read_epoch(name, index, whole)
    by_sample = dict(zip(whole.batch(0, 0).samples.tolist(), expected, strict=True))
    for rank in range(2):
        plan = replace(whole, rank=rank, world_size=2, accumulation_steps=2)
        for position, images in enumerate(read_epoch(name, index, plan)):
            for sample, image in zip(plan.batch(0, position).samples.tolist(), images, strict=True):
                assert torch.equal(image, by_sample.pop(sample)), sample
    assert not by_sample


@every_loader
def test_evaluation_reads_each_image_once_over_uneven_ranks(index: ImageIndex, name: str) -> None:
    """Three ranks with short last batches and different numbers of batches read each image once."""
    everything = torch.cat(read_epoch("pil", index, evaluation_plan()))
    for rank in range(3):
        batches = read_epoch(name, index, evaluation_plan(batch=4, rank=rank, world_size=3))
        assert [len(batch) for batch in batches] == ([4, 1] if rank == 0 else [4])
        assert (torch.cat(batches).float() - everything[rank::3].float()).abs().mean((1, 2, 3)).max() < 0.5


def damage(root: Path, kind: str) -> Path:
    """Damage one training image; return its path."""
    path = root / "train" / "a" / "3.JPEG"
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "header only":
        path.write_bytes(content[:100])
    elif kind == "text":
        path.write_text("<html>\n404 not found\n</html>\n" * 9)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "broken PNG":  # PIL raises SyntaxError
        buffer = BytesIO()
        picture(40, 40, seed=0).save(buffer, "PNG")
        png = buffer.getvalue()
        length_at = png.index(b"IDAT") - 4
        path.write_bytes(png[:length_at] + (100).to_bytes(4) + png[length_at + 4 :])  # the next chunk starts too early
    elif kind == "absurd size":  # PIL raises DecompressionBombError, which is not a ValueError
        path.write_bytes(b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6))
    elif kind == "missing":
        path.unlink()
    return path


@pytest.mark.parametrize("kind", ["truncated", "header only", "text", "empty", "broken PNG", "absurd size", "missing"])
@pytest.mark.parametrize("plan", [training_plan(batch=13), evaluation_plan(batch=13)], ids=["training", "evaluation"])
@every_loader
def test_a_bad_file_is_named(own_root: Path, name: str, plan: Plan, kind: str) -> None:
    """A damaged or missing image raises a one-line UserError that starts with its path."""
    index = load_index(own_root, "train")
    path = damage(own_root, kind)
    with pytest.raises(UserError) as error:
        read_epoch(name, index, plan)
    assert str(error.value).startswith(f"{path}: cannot be read as an image (")
    assert "data.quarantine=FILE" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def save_cmyk_without_marker(path: Path) -> None:
    """Write a CMYK JPEG without Adobe's marker, which PIL reads as is and DALI would invert."""
    picture(40, 40, seed=0).convert("CMYK").save(path, "JPEG")
    content = path.read_bytes()
    start = content.index(b"\xff\xee")
    length = int.from_bytes(content[start + 2 : start + 4])
    path.write_bytes(content[:start] + content[start + 2 + length :])


UNUSUAL: dict[str, Callable[[Path], None]] = {
    "GIF": lambda path: picture(40, 40, seed=0).save(path, "GIF"),
    "16-bit": lambda path: Image.fromarray(np.full((40, 40), 40_000, np.uint16)).save(path, "PNG"),
    "palette": lambda path: picture(40, 40, seed=0).convert("P").save(path, "PNG", transparency=3),
    "alpha": lambda path: picture(40, 40, seed=0).convert("RGBA").save(path, "PNG"),
    "WebP": lambda path: picture(40, 40, seed=0).save(path, "WEBP"),
    "CMYK TIFF": lambda path: picture(40, 40, seed=0).convert("CMYK").save(path, "TIFF"),
    "RGB JPEG": lambda path: picture(40, 40, seed=0).save(path, "JPEG", keep_rgb=True),
    "CMYK without marker": save_cmyk_without_marker,
    "1x1": lambda path: picture(40, 40, seed=0).resize((1, 1)).save(path, "JPEG"),
    "very wide": lambda path: picture(9000, 3, seed=0).save(path, "JPEG"),
    "very high": lambda path: picture(2, 8001, seed=0).save(path, "PNG"),
}


@pytest.mark.parametrize("plan", [training_plan(batch=13), evaluation_plan(batch=13)], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["torch", "dali"])
def test_unusual_files_are_pils_in_every_loader(own_root: Path, plan: Plan, name: str) -> None:
    """Every supported kind of file named as a JPEG has PIL's pixels in each loader."""
    index = load_index(own_root, "train")
    for sample, write in enumerate(UNUSUAL.values()):
        write(index.path(sample))
    index = load_index(own_root, "train")
    differences = difference(read_epoch(name, index, plan), read_epoch("pil", index, plan))
    rows = [plan.batch(0, 0).samples.tolist().index(sample) for sample in range(len(UNUSUAL))]
    found = dict(zip(UNUSUAL, differences[rows].tolist(), strict=True))
    assert max(found.values()) < {"torch": 0.5, "dali": 1.0}[name], found


def header_of(width: int, height: int) -> bytes:
    """Make a small JPEG whose header claims the given size."""
    buffer = BytesIO()
    picture(40, 40, seed=0).save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


NOT_READ = {
    "QOI": (b"qoif" + bytes(30), "not in a supported image format"),
    "PSD": (b"8BPS\0\1" + b"\xff" * 60, "not in a supported image format"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not in a supported image format"),
    "huge JPEG": (header_of(65_500, 65_500), "65,500 x 65,500 pixels, more than loader.max_pixels=100000000"),
    "large": (header_of(20_000, 5_001), "20,000 x 5,001 pixels, more than loader.max_pixels=100000000"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_READ)
def test_unsupported_images_are_rejected_by_every_loader_and_the_scan(own_root: Path, kind: str) -> None:
    """Unsupported formats and images with too many pixels give the same message everywhere, from their headers."""
    path, (content, reason) = own_root / "train" / "a" / "3.JPEG", NOT_READ[kind]
    path.write_bytes(content)
    index = load_index(own_root, "train")
    for name in LOADERS:
        with pytest.raises(UserError) as error:
            read_epoch(name, index, evaluation_plan())
        assert str(error.value).startswith(f"{path}: cannot be read as an image ({reason}"), name
    assert examine("x", lambda: np.fromfile(path, np.uint8)).reason.startswith(reason)


def test_pixel_limit_is_configured(index: ImageIndex) -> None:
    """Each loader applies `loader.max_pixels`, and all name the same file."""
    for name in LoaderName:
        if name is not LoaderName.auto:
            config = LoaderConfig(name, max_pixels=97 * 64 - 1)
            with (
                closing(make_loader(config, index, evaluation_plan(), CPU, 0)) as loader,
                pytest.raises(UserError, match=r"a/0\.JPEG: .*97 x 64 pixels, more than loader\.max_pixels=6207"),
            ):
                next(iter(loader.epoch(0)))
    with pytest.raises(UserError, match=r"^loader\.max_pixels=0: must be at least 1$"):
        LoaderConfig(max_pixels=0)


@pytest.mark.parametrize("reader", [PilReader(), TorchReader()])
def test_a_thin_image_takes_little_memory(reader: ImageReader[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the part around the crop of a 20,000 x 1 image is resized: 12 MB instead of 4 GB."""
    buffer, sizes = BytesIO(), list[int]()
    picture(20_000, 1, seed=0).save(buffer, "JPEG")
    module = sys.modules[type(reader).__module__]

    def count(*sides: int) -> Resize:
        found = resize_and_center_crop(*sides)
        sizes.append(found.width * found.height)
        return found

    monkeypatch.setattr(module, "resize_and_center_crop", count)
    plan = EvaluationPlan(num_samples=1, batch_size=1, rank=0, world_size=1, image_size=224, crop_pct=0.9).batch(0, 0)
    image = reader.read(np.frombuffer(bytearray(buffer.getvalue()), np.uint8), plan, 0)
    assert image.shape == (3, 224, 224)
    assert sizes[0] <= 248 * 248 * 64


@every_loader
def test_batches_before_a_bad_file_are_good(own_root: Path, name: str) -> None:
    """Despite reading ahead, the batches before a bad file are returned unchanged before its error."""
    index, plan = load_index(own_root, "train"), evaluation_plan(batch=1)
    good = read_epoch(name, index, plan)[:3]
    path = damage(own_root, "truncated")
    assert path == index.path(3)
    read: list[Tensor] = []
    with open_loader(name, index, plan) as loader, pytest.raises(UserError, match=r"3\.JPEG"):
        read.extend(batch for batch in loader.epoch(0))
    with open_loader(name, index, plan) as loader:
        batches = loader.epoch(0)
        assert same([next(batches) for _ in range(3)], good)
        with pytest.raises(UserError, match=r"a/3\.JPEG"):
            next(batches)


def test_a_bad_file_is_named_from_a_worker(own_root: Path) -> None:
    """The error of a worker process keeps its type and message."""
    index = load_index(own_root, "train")
    path = damage(own_root, "truncated")
    with pytest.raises(UserError, match=rf"^{path}: cannot be read as an image [^\n]*$"):
        read_epoch("torch", index, evaluation_plan(), workers=1)


PROGRAM = """
import sys
from pathlib import Path
from metaformer.data.index.image_index import load_index
from metaformer.data.load.pil_reader import PilReader
from metaformer.data.plan.plan import EvaluationPlan
from metaformer.data.load.worker_loader import WorkerLoader

index = load_index(Path(sys.argv[1]), "train")
plan = EvaluationPlan(num_samples=len(index), batch_size=1, rank=0, world_size=1, image_size=32, crop_pct=0.9)
loader = WorkerLoader(PilReader(), index, plan, workers=1, prefetch_batches=2, pin_memory=False)
batches = loader.epoch(0)
next(batches)
loader.close()
raise RuntimeError("a failure in the middle of an epoch")
"""


def test_a_program_that_fails_in_an_epoch_ends(image_root: Path) -> None:
    """Workers of a closed loader end, although the traceback still refers to the epoch, so the program ends too."""
    command = [sys.executable, "-c", PROGRAM, str(image_root)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert "RuntimeError: a failure in the middle of an epoch" in ended.stderr


@every_loader
def test_relative_roots_and_unusual_names(own_root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files below a relative root, with spaces, brackets and non-ASCII letters in their paths, are read."""
    folder = own_root / "train" / "é ü [1] %d"
    shutil.copytree(own_root / "train" / "a", folder)
    monkeypatch.chdir(own_root.parent)
    index = load_index(Path(own_root.name), "train")
    plan = EvaluationPlan(num_samples=len(index), batch_size=32, rank=0, world_size=1, image_size=32, crop_pct=0.9)
    (images,) = read_epoch(name, index, plan)
    copies = [sample for sample in range(len(index)) if index.classes[index.labels[sample]] == folder.name]
    originals = [sample for sample in range(len(index)) if index.classes[index.labels[sample]] == "a"]
    assert torch.equal(images[copies], images[originals])


def test_feed_gives_the_plans_labels_and_transforms(index: ImageIndex) -> None:
    """A feed's batches from `first` on are the loader's images, transformed, with the labels of the plan's samples."""
    plan = evaluation_plan()
    with open_loader("pil", index, plan) as loader:
        images = list(loader.epoch(0))
        feed = Feed(index, plan, loader, EvaluationTransform(), Placement(CPU, torch.contiguous_format))
        batches = list(feed.epoch(0, first=1))
    assert torch.cat([batch.targets for batch in batches]).tolist() == index.labels[4:].tolist()
    assert same([batch.images for batch in batches], [normalize(batch) for batch in images[1:]])
    assert all(batch.images.is_contiguous() for batch in batches)
    assert all(min(batch.waited) >= 0 < batch.waited.total for batch in batches)


def test_training_feed_is_the_same_from_any_resume_point(index: ImageIndex) -> None:
    """Mixed and erased images and soft targets of a resumed epoch exactly equal those of the whole epoch."""
    plan = training_plan(augmentation=AugmentationConfig(erase_probability=0.5))
    with open_loader("torch", index, plan) as loader:
        feed = Feed(index, plan, loader, TrainingTransform(3, 0.1), Placement(CPU, torch.channels_last))
        whole, rest = list(feed.epoch(2)), list(feed.epoch(2, first=1))
    assert len(whole) == 3
    for one, other in zip(whole[1:], rest, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
