"""Prepares a training: resolves its configuration and builds its parts, without touching the run folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from metaformer.assembly.adoption import adopt_weights
from metaformer.assembly.distillation import Distillation, make_distillation
from metaformer.assembly.fusion import choose_randaugment, choose_transform
from metaformer.assembly.identity import run_identity
from metaformer.assembly.initial_weights import load_initial_weights
from metaformer.assembly.parts import (
    check_data_folder,
    colour_statistics,
    example_images,
    loader_name,
    make_feed,
    make_model,
    prepare_workers,
)
from metaformer.assembly.plan import training_plan
from metaformer.assembly.preprocessing import resolve_config
from metaformer.assembly.splits import Splits, open_splits
from metaformer.config import TrainConfig, fingerprint
from metaformer.data.device.randaugment import BatchAugmentation
from metaformer.data.device.transform import TrainingTransform
from metaformer.data.feed import Feed
from metaformer.data.plan.plan import TrainingPlan
from metaformer.errors import UserError
from metaformer.models.config import Preprocessing
from metaformer.models.freezing import freeze
from metaformer.models.norms import find_single_value_batch_norm
from metaformer.numa import keep_near_gpu
from metaformer.runtime import Runtime
from metaformer.tracking.environment import code_fingerprint
from metaformer.training.ema import make_ema
from metaformer.training.optimizer import make_optimizer
from metaformer.training.precision import Precision
from metaformer.training.state import TrainState
from metaformer.training.step import Learner


@dataclass(frozen=True)
class Preparation:
    """The parts of a training, built before it touches its run folder.

    Attributes:
        config: The configuration, with every `auto` resolved.
        runtime: This rank, bound to CPUs near its GPU.
        frozen_norms: BatchNorms that keep their running statistics.
        fused: The status text of the fused operators.
        notes: Lines about the initial weights.
        choices: Lines about the values chosen for `auto`.
    """

    config: TrainConfig
    images: Preprocessing
    runtime: Runtime
    precision: Precision
    splits: Splits
    plan: TrainingPlan
    state: TrainState
    transform: TrainingTransform
    augment: BatchAugmentation
    distillation: Distillation
    frozen_norms: list[nn.Module]
    fused: str
    notes: list[str]
    choices: Sequence[str] = ()

    @property
    def lines(self) -> list[str]:
        """Return lines about the values chosen for `auto`, the fused operators and the teacher."""
        return [*self.choices, f"fused        {self.fused}", *self.distillation.lines]

    def distribute(self) -> nn.Module:
        """Return the network wrapped by DDP. Call this before worker processes exist, because the ranks communicate."""
        example = example_images(self.config, self.images, self.runtime)
        return self.runtime.distribute(self.state.model, example, self.config.precision.reduce_in_bf16)

    def feed(self) -> Feed:
        """Return this rank's training batches."""
        return make_feed(self.config, self.runtime, self.splits.train, self.plan, self.transform, self.augment)

    def learner(self, network: nn.Module) -> Learner:
        """Return a learner that takes optimizer steps with a network: the state's own or the distributed one."""
        return Learner(
            state=self.state,
            network=network,
            precision=self.precision,
            runtime=self.runtime,
            loss=self.distillation.loss,
            seed=self.config.seed,
            accumulation_steps=self.config.accumulation,
            clip_grad_norm=self.config.clip_grad_norm,
            frozen_norms=self.frozen_norms,
        )


def prepare_training(config: TrainConfig, runtime: Runtime) -> Preparation:
    """Resolve the configuration, open the data, and build the network and its state, without writing anything."""
    runtime.check_agreement("the code of metaformer, or the version of torch,", code_fingerprint())
    check_data_folder(config, runtime, config.data.train_split or config.data.val_split)
    initial = None
    if config.init_weights is not None:
        initial = adopt_weights(config, "init_weights", config.init_weights, False, runtime)
        config = initial.config
    config, images = resolve_config(config, config.init_weights)
    runtime.check_agreement("the configuration", fingerprint(config))
    runtime = keep_near_gpu(runtime) if config.loader.numa_affinity else runtime
    config.check_batches(runtime.world_size)
    prepare_workers(config, runtime)
    precision = Precision(config.precision, runtime.device)
    splits = open_splits(config, runtime)
    plan = training_plan(config, images, runtime, splits)
    model, fused_blocks = make_model(config, images, splits.num_classes, runtime, precision.dtype)
    _check_batch_norm(config, images, runtime, model)
    transform_images, fused_transform = choose_transform(config, images, runtime)
    augment, augmentation_status = choose_randaugment(config, images, runtime, loader_name(config, runtime))
    notes = [] if initial is None else list(load_initial_weights(initial, model, splits.train.classes, runtime))
    frozen_norms = [] if config.model.freeze is None else freeze(model, config.model.freeze)
    distillation = make_distillation(config, images, splits.train.classes, splits.num_classes, runtime, precision)
    identity = run_identity(config, images, splits, distillation.identity)
    return Preparation(
        config=config,
        images=images,
        runtime=runtime,
        precision=precision,
        splits=splits,
        plan=plan,
        state=_new_state(config, precision, model, identity),
        transform=TrainingTransform(
            splits.num_classes, config.augmentation.label_smoothing, colour_statistics(images), transform_images
        ),
        augment=augment,
        distillation=distillation,
        frozen_norms=list(frozen_norms),
        fused="; ".join([f"blocks {fused_blocks}", f"transform {fused_transform}", *augmentation_status]),
        notes=notes,
    )


def _check_batch_norm(config: TrainConfig, images: Preprocessing, runtime: Runtime, model: nn.Module) -> None:
    """Raise an error if batches contain one image and a BatchNorm gets a single value per channel from it."""
    if config.rank_batch_size(runtime.world_size) > 1:
        return
    norm = find_single_value_batch_norm(model, example_images(config, images, runtime))
    if norm is not None:
        raise UserError(
            f"global_batch_size={config.global_batch_size}: with one image per rank and accumulation step, {norm} "
            f"(BatchNorm) gets one value per channel at image_size={images.image_size}; use at least "
            f"{2 * config.global_batch_size}, or fewer ranks or accumulation_steps"
        )


def _new_state(config: TrainConfig, precision: Precision, model: nn.Module, identity: dict[str, Any]) -> TrainState:
    return TrainState(
        model=model,
        ema=make_ema(config.ema, model),
        optimizer=make_optimizer(config.optimizer, model, config.learning_rate),
        scaler=precision.scaler,
        identity=identity,
    )
