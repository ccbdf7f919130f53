"""Typed configurations of train.py and validate.py, composed by `composing` from conf/ and the command line."""

import dataclasses
import hashlib
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metaformer.data.index.config import Balance, DataConfig, Labels, MatchClasses
from metaformer.data.load.config import DecodeMode, LoaderConfig
from metaformer.data.plan.augmentation import AugmentationConfig
from metaformer.errors import UserError, check_at_least
from metaformer.models.config import AUTO, DEFAULT_NETWORK, InitHead, ModelConfig
from metaformer.reporting.config import ReportConfig
from metaformer.tracking.config import TrackingConfig
from metaformer.training.config import (
    DistillConfig,
    EmaConfig,
    LoopConfig,
    LossConfig,
    OptimizerConfig,
    PrecisionConfig,
)


@dataclass
class CommonConfig:
    """Configuration that train.py and validate.py share."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    image_size: int | None = None  # pixels per side; None: the network's default
    num_classes: int | None = None  # None: the number of classes in the data set
    seed: int = 0  # seed of initial weights, image order and augmentation; the same seed gives the same run
    workers: int | None = None  # loader processes or threads per rank; None: the rank's share of the CPU cores
    eval_batch_size: int = 128  # images per rank
    channels_last: bool = True  # memory format of images and activations; the fused kernels need it
    compile: bool = False  # compile the network by torch.compile
    # Interpolated fields and their raw text: files of a run store ${oc.env:NAME}, never a value that may be secret.
    from_environment: dict[str, str] = field(default_factory=dict, metadata={"omegaconf_ignore": True})

    @property
    def own_code(self) -> list[str]:
        """Return the classes and functions of the user's own that the configuration names."""
        return self.model.own_code

    def __post_init__(self) -> None:
        check_at_least(1, self, "image_size", "num_classes", "eval_batch_size")
        check_at_least(0, self, "workers", "seed")
        if self.image_size is not None and self.image_size < 32:
            raise UserError(f"image_size={self.image_size}: the networks reduce an image 32-fold; use 32 or more")


@dataclass
class TrainConfig(LoopConfig, CommonConfig):
    """Configuration of train.py. The defaults are the paper's recipe."""

    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    run_dir: str | None = None  # None: runs/MODEL-EXPERIMENT
    allow_unused_classes: bool = False  # allow num_classes to exceed the data set's classes
    fill_last_batch: bool = False  # pad the last batch with the epoch's first images; False: drop an incomplete batch
    init_weights: str | None = None  # weights file to start from
    init_head: InitHead = InitHead.auto  # what to do with the classifier of these weights
    dry_run: bool = False  # take three steps, report what the run would need, and write nothing
    resume: str = "auto"  # auto: continue the run in run_dir; never: require an empty run_dir; or a checkpoint

    def __post_init__(self) -> None:
        CommonConfig.__post_init__(self)
        LoopConfig.__post_init__(self)
        self.data.check_can_train()
        if self.model.name == AUTO and self.init_weights is None:
            self.model = dataclasses.replace(self.model, name=DEFAULT_NETWORK)
        if self.model.freeze is not None and self.init_weights is None:
            raise UserError(f"model.freeze={self.model.freeze}: would keep random weights; give init_weights too")
        if self.init_head is not InitHead.auto and self.init_weights is None:
            raise UserError(f"init_head={self.init_head.value}: nothing to convert; give init_weights too")

    @property
    def own_code(self) -> list[str]:
        """Return the classes and functions of the user's own that the configuration names."""
        named = (self.distill.model or "", self.tracking.target or "")
        return [*super().own_code, *(name for name in named if ":" in name)]

    @property
    def learning_rate(self) -> float:
        """Return the peak learning rate."""
        return self.optimizer.learning_rate(self.global_batch_size)

    def check_batches(self, world_size: int) -> None:
        """Raise an error unless the global batch divides evenly among the ranks and suits mixup and cutmix."""
        parts = world_size * self.accumulation
        size, remainder = divmod(self.global_batch_size, parts)
        if remainder or not size:
            raise UserError(
                f"global_batch_size={self.global_batch_size}: not divisible by {world_size} ranks x "
                f"accumulation_steps={self.accumulation_steps}; use a multiple of {parts}"
            )
        group = self.augmentation.mix_group_size
        if self.augmentation.mixes and size % (group or 2):
            raise UserError(
                f"global_batch_size={self.global_batch_size}: gives each rank batches of {size}, but mixup and cutmix "
                f"need {f'a multiple of augmentation.mix_group_size={group}' if group else 'an even size'}; "
                f"use a multiple of {parts * (group or 2)}, or augmentation=light"
            )

    @property
    def batch_multiple(self) -> int:
        """Return the number that the size of a rank's batches must be a multiple of, for mixup and cutmix."""
        return (self.augmentation.mix_group_size or 2) if self.augmentation.mixes else 1

    def accumulations(self, world_size: int) -> list[int]:
        """Return the numbers of accumulation steps that `check_batches` accepts, in ascending order."""
        share, remainder = divmod(self.global_batch_size, world_size)
        numbers = [] if remainder else range(1, share + 1)
        return [number for number in numbers if share % (number * self.batch_multiple) == 0]

    @property
    def resolved_run_dir(self) -> Path:
        """Return the run folder, which `compose` has set."""
        assert self.run_dir is not None
        return Path(self.run_dir)


@dataclass
class ValidateConfig(CommonConfig):
    """Configuration of validate.py."""

    checkpoint: str | None = None  # weights file, checkpoint folder or run folder
    use_ema: bool = False  # evaluate the averaged weights
    results_csv: str | None = None  # append the result to this file
    per_class_csv: str | None = None  # write the accuracy of each class to this file
    match_classes: MatchClasses = MatchClasses.name  # how class folders become the classes that the weights record

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.balance is not Balance.none:
            raise UserError(f"data.balance={self.data.balance.value}: train.py only; validation uses every image once")
        if self.loader.decode is not DecodeMode.exact:
            raise UserError(f"loader.decode={self.loader.decode.value}: train.py only; validation is always exact")
        if self.per_class_csv is not None and self.data.labels is Labels.real:
            raise UserError(f"per_class_csv={self.per_class_csv}: images of data={self.data.name} have several correct "
                            "classes; leave it null")  # fmt: skip
        if self.checkpoint is None:
            raise UserError("checkpoint: missing; give checkpoint=FILE, a checkpoint folder or a run folder")


def redacted(config: CommonConfig) -> DictConfig:
    """Return the configuration with interpolations such as `${oc.env:NAME}` unresolved, safe to write to files."""
    values = OmegaConf.create(_to_containers(config))
    assert isinstance(values, DictConfig)
    for key, raw in config.from_environment.items():
        OmegaConf.update(values, key, raw)
    return values


def fingerprint(config: CommonConfig) -> str:
    """Return a hash of the configuration, including values from the environment."""
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.create(_to_containers(config))).encode()).hexdigest()


def _to_containers(value: Any) -> Any:
    """Convert a configuration to nested dicts and lists for OmegaConf, with `${` escaped in all text."""
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value) if not field.metadata.get("omegaconf_ignore"))
        return {name: _to_containers(getattr(value, name)) for name in names}
    if isinstance(value, list | tuple):
        return [_to_containers(item) for item in value]
    if isinstance(value, dict):
        return {name: _to_containers(item) for name, item in value.items()}
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value.name if isinstance(value, Enum) else value
