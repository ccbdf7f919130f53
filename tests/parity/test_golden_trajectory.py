"""Tests of the whole program against a plain loop over timm's parts: 30 steps with all augmentation enabled.

The reference shares with the program the network, the plan's numbers, the erasing noise, and the seeding of torch's
generator before each batch of a rank, for drop path. Everything else (reading, augmentation, mixing, loss, parameter
groups, optimizer, schedule) is code of PIL, torch and timm, combined in the order of timm's training script.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import AugmentOp
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.scheduler.scheduler_factory import create_scheduler_v2, scheduler_kwargs
from torch import Tensor
from torchvision.transforms.functional import hflip, pil_to_tensor

from metaformer.data.device.transform import counter_normal
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.data.plan.draws import generator
from metaformer.data.plan.plan import _MIX_STREAM, BatchPlan, TrainingPlan
from metaformer.models import create_model
from tests.conftest import launch, rows
from tests.data.conftest import picture
from tests.parity.conftest import crop_drawn_from, papers_mixup

CLASSES, IMAGES, SIZE, BATCH, SEED = 10, 83, 64, 16, 3
STEPS_PER_EPOCH, EPOCHS, WARMUP, COOLDOWN = 5, 5, 2, 1
LR = 4e-3  # the paper's peak
LOSS_TOLERANCE = 1e-5  # relative; observed: 3e-7, which is float32 rounding of a loss
COMMAND = (
    f"image_size={SIZE}", f"seed={SEED}", f"global_batch_size={BATCH}", f"optimizer.lr={LR}", f"epochs={EPOCHS}",
    f"schedule.warmup_epochs={WARMUP}", f"schedule.cooldown_epochs={COOLDOWN}", "loader=pil", "precision=fp32",
    "eval_batch_size=10", "workers=1", "tracking=local", "log_every_steps=1",
    "report.enabled=false",
)  # fmt: skip


class Step(NamedTuple):
    """The values of a step that the program logs and the reference computes."""

    loss: float
    lr: float
    grad_norm: float


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """83 training and 10 validation JPEGs of 70 to 120 pixels in 10 classes, each class with its own colour cast."""
    folder = tmp_path_factory.mktemp("golden")
    rng = np.random.default_rng(0)
    casts = rng.integers(-60, 61, (CLASSES, 3))
    for split, count in (("train", IMAGES), ("val", CLASSES)):
        for number in range(count):
            label = number % CLASSES
            width, height = rng.integers(70, 121, 2).tolist()
            pixels = np.asarray(picture(width, height, seed=number), np.int64) + casts[label]
            file = folder / split / f"class_{label}" / f"{number:02}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return folder


def filter_name(bicubic: bool) -> str:
    return "bicubic" if bicubic else "bilinear"


def augmented(file: Path, plan: BatchPlan, row: int) -> Tensor:
    """Augment the image at position `row` of a batch with timm's transforms and the plan's numbers: uint8 [3, S, S]."""
    crop, randaugment = plan.crop, plan.randaugment
    assert crop is not None
    assert randaugment is not None
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    with crop_drawn_from(crop.tries[row], crop.position[row]):
        image = RandomResizedCropAndInterpolation(SIZE, interpolation=filter_name(crop.bicubic[row]))(image)
    if crop.flip[row]:
        image = hflip(image)
    for name, magnitude, negative, bicubic, fill in randaugment.operations_for(row):
        sign = -1 if negative else 1
        hparams = {"img_mean": fill, "interpolation": Image.Resampling[filter_name(bicubic).upper()]}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
            image = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)(image)
    pixels: Tensor = pil_to_tensor(image)
    return pixels


@dataclass
class Reference:
    """Reference training run in this process.

    Attributes:
        ranks: number of processes to emulate; each has a share of the batch and its own draws for drop path.
        mix_group_size: number of images that are mixed with each other.
    """

    root: Path
    ranks: int = 1
    mix_group_size: int = BATCH
    weight_decay: float = 0.05

    def run(self) -> Iterator[Step]:
        """Yield the steps of all epochs."""
        torch.manual_seed(SEED)
        model = create_model("poolformer_s12", CLASSES).train()
        groups = param_groups_weight_decay(model, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8, foreach=False, fused=False)
        args = argparse.Namespace(
            sched="cosine", epochs=EPOCHS, warmup_epochs=WARMUP, cooldown_epochs=COOLDOWN, min_lr=1e-5, warmup_lr=1e-6
        )
        scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
        criterion = SoftTargetCrossEntropy()
        for epoch in range(epochs):
            for position in range(STEPS_PER_EPOCH):
                step, loss_sum = epoch * STEPS_PER_EPOCH + position, 0.0
                shares = (part.chunk(self.ranks) for part in self._batch(epoch, position))
                optimizer.zero_grad()
                for rank, (images, targets) in enumerate(zip(*shares, strict=True)):
                    torch.manual_seed(SEED * 2**40 + step * self.ranks + rank)
                    loss = criterion(model(images), targets)
                    (loss / self.ranks).backward()
                    loss_sum += float(loss.detach())
                gradient = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
                optimizer.step()
                yield Step(loss_sum / self.ranks, optimizer.param_groups[0]["lr"], float(gradient.norm()))
            scheduler.step(epoch + 1)

    def _batch(self, epoch: int, position: int) -> tuple[Tensor, Tensor]:
        """Return images float32 [B, 3, S, S] and soft targets [B, classes] of all ranks."""
        plan = TrainingPlan(
            num_samples=IMAGES,
            global_batch_size=BATCH,
            accumulation_steps=1,
            rank=0,
            world_size=1,
            seed=SEED,
            image_size=SIZE,
            crop_pct=0.9,
            augmentation=AugmentationConfig(),
        ).batch(epoch, position)
        files = sorted((self.root / "train").glob("*/*.JPEG"))
        classes = sorted({file.parent.name for file in files})
        labels = torch.tensor([classes.index(files[sample].parent.name) for sample in plan.samples])
        pixels = torch.stack([augmented(files[sample], plan, row) for row, sample in enumerate(plan.samples)])
        mean, std = (torch.tensor(v).mul(255).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        images, targets = self._mixed(pixels.float().sub(mean).div(std), labels, epoch, position)
        assert plan.erase is not None
        noise = counter_normal(torch.from_numpy(plan.erase.noise_keys), images.shape[1:])
        for row, (top, left, bottom, right), values in zip(plan.erase.rows, plan.erase.boxes, noise, strict=True):
            images[row, :, top:bottom, left:right] = values[:, top:bottom, left:right]
        return images, targets

    def _mixed(self, images: Tensor, labels: Tensor, epoch: int, position: int) -> tuple[Tensor, Tensor]:
        groups = BATCH // self.mix_group_size
        mixed = []
        for number, group in enumerate(zip(images.chunk(groups), labels.chunk(groups), strict=True)):
            rng = generator(SEED, epoch, _MIX_STREAM, position * groups + number)
            with papers_mixup(rng, CLASSES) as mixup:
                mixed.append(mixup(*group))
        return torch.cat([x for x, _ in mixed]), torch.cat([y for _, y in mixed])


def program_and_reference(reference: Reference, run_dir: Path, *options: str) -> tuple[list[Step], list[Step]]:
    """Train with train.py in separate processes, and with the reference; return the steps of both."""
    command = (*COMMAND, *options, f"data.root={reference.root}", f"run_dir={run_dir}")
    with ThreadPoolExecutor() as background:
        program = background.submit(launch, "train", *command, ranks=reference.ranks)
        expected = list(reference.run())
    assert program.result().code == 0, program.result().stderr
    return [Step(row["loss"], row["lr"], row["grad_norm"]) for row in rows(run_dir)], expected


def assert_same(steps: list[Step], expected: list[Step]) -> None:
    """Check that learning rates are equal, that losses and norms differ by rounding only, and that steps differ."""
    assert len(expected) == (EPOCHS + COOLDOWN) * STEPS_PER_EPOCH == 30
    losses, rates, norms = zip(*steps, strict=True)
    expected_losses, expected_rates, expected_norms = zip(*expected, strict=True)
    assert rates == expected_rates
    assert losses == pytest.approx(expected_losses, rel=LOSS_TOLERANCE)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert np.abs(np.diff(expected_losses)).min() > 100 * LOSS_TOLERANCE
    assert len(set(expected_rates)) == EPOCHS + COOLDOWN


@pytest.fixture(scope="module")
def one_process(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Step], list[Step]]:
    """Steps of the default recipe on one process, from the program and the reference."""
    return program_and_reference(Reference(root), tmp_path_factory.mktemp("one") / "run")


def test_one_process_follows_timms_recipe(one_process: tuple[list[Step], list[Step]]) -> None:
    """On one process, every step of six epochs has the reference's loss, learning rate and gradient norm."""
    assert_same(*one_process)


@pytest.mark.whole
def test_two_processes_follow_timms_recipe(root: Path, tmp_path: Path) -> None:
    """The same holds on two processes with mixing groups of four; each rank draws drop path for half of a batch."""
    reference = Reference(root, ranks=2, mix_group_size=4)
    assert_same(*program_and_reference(reference, tmp_path / "run", "augmentation.mix_group_size=4"))


def test_missing_weight_decay_exceeds_the_tolerance(root: Path, one_process: tuple[list[Step], list[Step]]) -> None:
    """The tolerance detects missing weight decay, which changes a loss by at most 4e-4 in this run, in ten steps."""
    expected = [step.loss for step in one_process[1]]
    without = [step.loss for step in islice(Reference(root, weight_decay=0.0).run(), 10)]
    assert without[:6] == pytest.approx(expected[:6], rel=LOSS_TOLERANCE), "at a rate of 1e-6, decay has no effect yet"
    assert abs(without[9] / expected[9] - 1) > 4 * LOSS_TOLERANCE
