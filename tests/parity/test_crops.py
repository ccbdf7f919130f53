"""Tests of the training and evaluation crops against torchvision's and timm's."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize

from metaformer.data.index.image_index import load_index
from metaformer.data.load.pil_reader import PilReader
from metaformer.data.load.worker_loader import WorkerLoader
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.geometry import Box, evaluation_resize, random_resized_crop, resize_and_center_crop
from metaformer.data.plan.plan import CropDraws, EvaluationPlan, TrainingPlan
from tests.data.conftest import picture
from tests.parity.conftest import crop_drawn_from

# (width, height): common ImageNet sizes, a square, a small image, and panoramas for which tries fail
SIZES = ((500, 375), (375, 500), (256, 256), (71, 64), (900, 200), (120, 700))
DRAWS = 3000
LEAST_P = 1e-3  # of the statistical tests; the draws are fixed
SCALE, ASPECTS = (0.08, 1.0), (3 / 4, 4 / 3)
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
both_crops = pytest.mark.parametrize(("crop_pct", "resize_to"), [(0.9, 248), (0.95, 235)])


@pytest.fixture(scope="module")
def draws() -> CropDraws:
    """The plan's draws for one batch of the default recipe."""
    crop = (
        TrainingPlan(
            num_samples=DRAWS,
            global_batch_size=DRAWS,
            accumulation_steps=1,
            rank=0,
            world_size=1,
            seed=6,
            image_size=224,
            crop_pct=0.9,
            augmentation=AugmentationConfig(),
        )
        .batch(2, 0)
        .crop
    )
    assert crop is not None
    return crop


def our_box(draws: CropDraws, row: int, size: tuple[int, int]) -> Box:
    return random_resized_crop(draws.tries[row], draws.position[row], draws.aspects, *size)


def theirs(get_params: Callable[..., tuple[int, int, int, int]], size: tuple[int, int]) -> Box:
    """Draw a rectangle with torchvision's or timm's get_params, which depends only on the image's size."""
    top, left, height, width = get_params(Image.new("1", size), SCALE, ASPECTS)
    return Box(left, top, width, height)


@every_size
def test_rectangles_are_timms_for_the_same_numbers(draws: CropDraws, size: tuple[int, int]) -> None:
    """With the plan's areas, aspects and positions, timm's crop takes exactly the same pixels in 3000 cases."""
    for row in range(DRAWS):
        with crop_drawn_from(draws.tries[row], draws.position[row]):
            expected = theirs(RandomResizedCropAndInterpolation.get_params, size)
        assert our_box(draws, row, size) == expected


@every_size
def test_rectangles_are_distributed_as_torchvisions(draws: CropDraws, size: tuple[int, int]) -> None:
    """Area, aspect and position of 3000 rectangles pass two-sample Kolmogorov-Smirnov tests."""
    torch.manual_seed(0)
    ours = np.array([our_box(draws, row, size) for row in range(DRAWS)])
    reference = np.array([theirs(RandomResizedCrop.get_params, size) for _ in range(DRAWS)])
    for name, values in properties(ours, size).items():
        assert stats.ks_2samp(values, properties(reference, size)[name]).pvalue > LEAST_P, name


def properties(boxes: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the compared properties; a position is a share of the rectangle's free range, if that is not empty."""
    left, top, width, height = boxes.T
    room_x, room_y = size[0] - width, size[1] - height
    return {
        "area": width * height,
        "aspect": width / height,
        "width": width,
        "height": height,
        "horizontal position": (left / np.maximum(room_x, 1))[room_x > 0],
        "vertical position": (top / np.maximum(room_y, 1))[room_y > 0],
    }


def test_flip_and_filter_are_fair_and_unrelated_to_the_crop(draws: CropDraws) -> None:
    """Half of the images are flipped and half are resized bicubically, independently of each other and the crop."""
    assert stats.binomtest(int(draws.flip.sum()), DRAWS, 0.5).pvalue > LEAST_P
    assert stats.binomtest(int(draws.bicubic.sum()), DRAWS, 0.5).pvalue > LEAST_P
    columns = np.column_stack([draws.flip, draws.bicubic, draws.position, draws.tries.prod(axis=2)[:, 0]])
    assert stats.spearmanr(columns).pvalue[np.triu_indices(5, 1)].min() > LEAST_P


def evaluation_sizes() -> list[tuple[int, int]]:
    """Return 100 sizes: typical of ImageNet, small, extreme, and with a resized side that is odd or nearly fits."""
    rng = np.random.default_rng(0)
    near = [(224, 224), (248, 248), (235, 301), (249, 248), (223, 225)]
    special = [(500, 375), (375, 500), *near, (1, 9), (3, 4), (2000, 31)]
    return [*special, *((int(width), int(height)) for width, height in rng.integers(16, 800, (90, 2)))]


@both_crops
def test_evaluation_sizes_and_offsets_are_torchvisions(crop_pct: float, resize_to: int) -> None:
    """For 100 image sizes, the resized size and crop offset at 224 px equal those of Resize and CenterCrop."""
    assert evaluation_resize(224, crop_pct) == resize_to
    sizes = evaluation_sizes()
    assert len(set(sizes)) == 100
    for width, height in sizes:
        ours = resize_and_center_crop(width, height, evaluation_resize(224, crop_pct), 224)
        resized = Resize(resize_to, InterpolationMode.NEAREST)(Image.new("1", (width, height)))
        assert resized.size == (ours.width, ours.height), (width, height)
        numbered = torch.arange(ours.width * ours.height).view(1, ours.height, ours.width)
        first = int(CenterCrop(224)(numbered)[0, 0, 0])
        assert divmod(first, ours.width) == (ours.top, ours.left), (width, height)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of odd sizes (landscape, portrait, smaller and larger than 224, narrow) in RGB, gray and CMYK."""
    folder = tmp_path_factory.mktemp("crops") / "val" / "a"
    folder.mkdir(parents=True)
    sizes = [(500, 375), (333, 501), (225, 224), (97, 151), (151, 97), (640, 91), (31, 33), (249, 248), (401, 403)]
    for number, (width, height) in enumerate(sizes):
        for mode in ("RGB", "L", "CMYK"):
            image = picture(width, height, seed=number).convert(mode)
            image.save(folder / f"{number}_{mode}.JPEG", quality=91)
    return folder.parents[1]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@both_crops
def test_evaluation_images_are_timms(root: Path, crop_pct: float, resize_to: int, interpolation: str) -> None:
    """The pil loader's images exactly equal those of timm's evaluation transform before normalization."""
    index = load_index(root, "val")
    plan = EvaluationPlan(
        num_samples=len(index),
        batch_size=len(index),
        rank=0,
        world_size=1,
        image_size=224,
        crop_pct=crop_pct,
        bicubic=interpolation == "bicubic",
    )
    with closing(WorkerLoader(PilReader(), index, plan, workers=0, prefetch_batches=2, pin_memory=False)) as loader:
        (images,) = loader.epoch(0)
    transform: Any = create_transform(
        224, is_training=False, crop_pct=crop_pct, interpolation=interpolation, use_prefetcher=True
    )
    assert transform.transforms[0].size == resize_to
    for sample in range(len(index)):
        with Image.open(index.path(sample)) as file:
            expected: Tensor = transform(file.convert("RGB"))
        assert expected.dtype == torch.uint8
        assert torch.equal(images[sample], expected), index.path(sample).name
