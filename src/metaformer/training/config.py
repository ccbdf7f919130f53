"""Configuration of training. Imports neither torch nor timm, so that command lines are checked quickly."""

from dataclasses import dataclass, field, fields
from enum import Enum

from metaformer.errors import UserError, check_at_least

AUTO = "auto"  # value of accumulation_steps


class ScheduleUnit(Enum):
    """Interval at which the learning rate changes."""

    epoch = "epoch"  # as in the authors' code
    step = "step"


@dataclass
class ScheduleConfig:
    """The defaults are the paper's: 5 warm-up epochs within the cosine, then 10 more epochs at the final rate."""

    unit: ScheduleUnit = ScheduleUnit.epoch  # how often the learning rate changes
    warmup_epochs: int = 5  # first epochs, in which the rate rises linearly; they count among epochs
    warmup_steps: int | None = None  # instead of warmup_epochs, for short trainings; needs unit=step
    warmup_lr: float = 1e-6  # learning rate of the first step
    min_lr: float = 1e-5  # learning rate at the end of the cosine, and of the cool-down
    cooldown_epochs: int = 10  # further epochs at min_lr, added to epochs

    def __post_init__(self) -> None:
        check_at_least(0, self, "warmup_epochs", "warmup_steps", "cooldown_epochs", prefix="schedule.")
        if self.warmup_steps is not None and self.unit is ScheduleUnit.epoch:
            raise UserError(f"schedule.warmup_steps={self.warmup_steps}: needs schedule=cosine_per_step")


@dataclass
class CheckpointConfig:
    """Settings for saving and keeping checkpoints."""

    every_epochs: int = 1  # save after every Nth epoch
    every_steps: int | None = None  # also save in the middle of epochs
    keep: int = 2  # newest checkpoints to keep, besides the best and the last one
    keep_every_epochs: int | None = None  # keep every Nth epoch forever
    max_failed_saves: int = 3  # consecutive failures, as on a full disk, after which training stops
    background: bool = True  # write while training continues, from a copy in host memory

    def __post_init__(self) -> None:
        names = ("every_epochs", "every_steps", "keep", "keep_every_epochs", "max_failed_saves")
        check_at_least(1, self, *names, prefix="checkpoint.")


class Implementation(Enum):
    """The library whose code runs the update."""

    torch = "torch"
    apex = "apex"


@dataclass
class OptimizerConfig:
    """The defaults are the paper's: AdamW, lr = 1e-3 * global batch / 1024."""

    name: str = "adamw"  # any of timm.optim.list_optimizers()
    lr: float | None = None  # None: base_lr * global_batch_size / base_batch_size
    base_lr: float = 1e-3  # learning rate for a batch of base_batch_size
    base_batch_size: int = 1024  # images per step for which base_lr is meant
    weight_decay: float = 0.05  # applies to parameters with two or more dimensions, not to norms and biases
    betas: list[float] | None = None  # None: the optimizer's own
    eps: float | None = None  # None: the optimizer's own
    momentum: float = 0.9  # used by optimizers that have one
    layer_decay: float | None = None  # factor of the learning rate from each layer to the one before it; None: 1
    implementation: Implementation = Implementation.torch  # library that computes the update; apex has adamw and lamb

    def __post_init__(self) -> None:
        if self.betas is not None and len(self.betas) != 2:
            raise UserError(f"optimizer.betas={self.betas}: must be two numbers, as in [0.9,0.999]")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(f"optimizer.layer_decay={self.layer_decay}: must be in (0, 1]")

    def learning_rate(self, global_batch_size: int) -> float:
        """Return the peak learning rate."""
        return self.base_lr * global_batch_size / self.base_batch_size if self.lr is None else self.lr


@dataclass
class EmaConfig:
    """After each optimizer step: average = decay * average + (1 - decay) * weights."""

    enabled: bool = False  # keep an average of the weights, and validate it too
    decay: float = 0.9999  # share of the old average in each step
    warmup: bool = False  # let the decay rise to its value gradually, for short runs

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise UserError(f"ema.decay={self.decay}: must lie in [0, 1]")


class LossName(Enum):
    """The training loss; validation always reports the cross entropy."""

    cross_entropy = "cross_entropy"  # as in the paper
    bce = "bce"  # binary cross entropy of each class, as in timm's RSB recipes (arXiv 2110.00476)


@dataclass
class LossConfig:
    """The training loss of soft targets. Their smoothing is `augmentation.label_smoothing`."""

    name: LossName = LossName.cross_entropy  # the loss; loss=NAME sets it
    target_threshold: float | None = None  # for bce: targets above it become 1, the others 0; None: soft targets
    sum_classes: bool = False  # for bce: sum over the classes instead of the mean

    def __post_init__(self) -> None:
        if self.target_threshold is not None and not 0 <= self.target_threshold < 1:
            raise UserError(f"loss.target_threshold={self.target_threshold}: must be in [0, 1), or null for none")
        if self.name is not LossName.bce and (self.target_threshold is not None or self.sum_classes):
            name = "sum_classes" if self.target_threshold is None else "target_threshold"
            raise UserError(f"loss.{name}={getattr(self, name)}: not used by loss={self.name.value}; give loss=bce")


@dataclass
class DistillConfig:
    """Distillation: soft targets from a teacher, a network that is trained already (arXiv 1503.02531)."""

    teacher: str | None = None  # the teacher's weights: a file, a checkpoint folder, a run folder, or official:NAME
    model: str | None = None  # the teacher's network, if its weights do not record it: one of this project or of timm
    use_ema: bool = False  # the averaged weights of the teacher's checkpoint
    weight: float = 0.5  # share of the teacher in the loss; the labels have the rest
    temperature: float = 1.0  # divides the logits of teacher and student

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UserError(f"distill.weight={self.weight}: must be in [0, 1]")
        if not self.temperature > 0:
            raise UserError(f"distill.temperature={self.temperature}: must be positive")
        for option in fields(self):
            if self.teacher is None and getattr(self, option.name) != option.default:
                value = getattr(self, option.name)
                raise UserError(f"distill.{option.name}={value}: there is no teacher; give distill.teacher too")


class PrecisionName(Enum):
    """Format of matrix products; parameters, the norms' statistics and the loss stay in float32."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@dataclass
class PrecisionConfig:
    """Configuration of automatic mixed precision."""

    name: PrecisionName = PrecisionName.bf16  # format of matrix products; parameters stay in float32
    # Let GPUs round the inputs of float32 products to TF32's 10 bits, in matrix products and convolutions.
    tf32: bool = False
    reduce_in_bf16: bool = False  # average gradients over the ranks in bfloat16, for half the network traffic


@dataclass
class GuardConfig:
    """Limits after which a run without progress is stopped."""

    max_skipped_steps: int = 20  # consecutive steps whose gradients were not finite
    stall_seconds: int = 600  # if a rank takes no step, validation batch or save for this long, end the job
    compare_ranks_every_steps: int | None = 1000  # check that all ranks have the same weights
    max_starts_without_progress: int = 5  # consecutive starts that crashed before the next checkpoint

    def __post_init__(self) -> None:
        check_at_least(1, self, *self.__dataclass_fields__, prefix="guards.")


@dataclass
class LoopConfig:
    """Settings of the training loop: its length, batches, and intervals of logging, saving and checking."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    epochs: int = 300  # the schedule's cool-down epochs are added to these
    global_batch_size: int = 1024  # images of an optimizer step, over all ranks and accumulation steps
    # Passes whose gradients make one step, for less memory; the batch stays the same; auto: the fewest that fit.
    accumulation_steps: int | str = 1
    clip_grad_norm: float | None = None  # largest norm of the gradients; larger ones are scaled down to it
    log_every_steps: int = 50  # steps between two rows of the log and of metrics.jsonl
    max_steps: int | None = None  # stop after this many steps in total, for trials

    def __post_init__(self) -> None:
        check_at_least(1, self, "epochs", "global_batch_size", "log_every_steps", "max_steps")
        if isinstance(self.accumulation_steps, int):
            check_at_least(1, self, "accumulation_steps")
        elif self.accumulation_steps != AUTO:
            raise UserError(f"accumulation_steps={self.accumulation_steps}: must be a whole number, or {AUTO}")
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            raise UserError(f"clip_grad_norm={self.clip_grad_norm}: must be positive, or null for none")

    @property
    def total_epochs(self) -> int:
        """Number of epochs, including the cool-down."""
        return self.epochs + self.schedule.cooldown_epochs

    def last_step(self, steps_per_epoch: int) -> int:
        """Return the step at which training ends."""
        steps = self.total_epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def accumulation(self) -> int:
        """Return the number of accumulation steps, once `auto` is resolved."""
        assert isinstance(self.accumulation_steps, int)
        return self.accumulation_steps

    def rank_batch_size(self, world_size: int) -> int:
        """Return the number of images in one forward pass of a rank."""
        return self.global_batch_size // world_size // self.accumulation
