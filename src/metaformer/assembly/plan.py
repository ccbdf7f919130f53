"""Builds the sample plan of training."""

from metaformer.assembly.splits import Splits
from metaformer.config import TrainConfig
from metaformer.data.plan.balance import make_balance
from metaformer.data.plan.plan import TrainingPlan
from metaformer.errors import UserError
from metaformer.models.config import Preprocessing, ResizeFilter
from metaformer.runtime import Runtime


def training_plan(config: TrainConfig, images: Preprocessing, runtime: Runtime, splits: Splits) -> TrainingPlan:
    """Return this rank's plan; raise an error if the data set has fewer images than a global batch."""
    if len(splits.train) < config.global_batch_size:
        raise UserError(
            f"global_batch_size={config.global_batch_size}: {splits.train.folder} has only {len(splits.train)} images"
        )
    return TrainingPlan(
        num_samples=len(splits.train),
        global_batch_size=config.global_batch_size,
        accumulation_steps=config.accumulation,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=config.seed,
        image_size=images.image_size,
        crop_pct=images.crop_pct,
        augmentation=config.augmentation,
        fill_last_batch=config.fill_last_batch,
        bicubic=images.interpolation is ResizeFilter.bicubic,
        fill=images.mean_colour,
        balance=make_balance(config.data.balance, splits.train.labels),
    )
