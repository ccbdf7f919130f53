"""Test the training loop: clipping, accumulation, logging, skipped steps and divergence."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaformer.errors import Diverged
from metaformer.goodput import Goodput
from metaformer.interfaces import Batch, Waiting
from metaformer.runtime import Runtime
from metaformer.tracking.tracker import NullTracker
from metaformer.training.bottleneck import Bottleneck
from metaformer.training.config import (
    CheckpointConfig,
    GuardConfig,
    LoopConfig,
    LossConfig,
    OptimizerConfig,
    PrecisionConfig,
    PrecisionName,
    ScheduleConfig,
)
from metaformer.training.loop import Trainer
from metaformer.training.losses import make_loss
from metaformer.training.meter import Meter
from metaformer.training.precision import Precision
from metaformer.training.saver import CheckpointSaver
from metaformer.training.schedule import Schedule
from metaformer.training.state import TrainState
from metaformer.training.step import Learner, train_step
from metaformer.training.watchdog import Watchdog
from tests.conftest import QUICK, TRAIN_IMAGES, rows
from tests.training.conftest import FEATURES, TINY_CLASSES, checkpoint_folder, tensors, tiny_network, tiny_state

Run = Callable[..., dict[str, Any]]
SMALL = (*QUICK, "workers=0", "model=timm", "model.name=test_resnet", "model.drop_path_rate=null")
STEPS_PER_EPOCH = TRAIN_IMAGES // 8
CPU = Runtime(0, 1, 0, 1, torch.device("cpu"))


@dataclass
class Numbers:
    """Data for the tiny network: 96 images per epoch, the same at every call, in batches of any size."""

    batch_size: int
    scale: float = 1.0
    poisoned_from: int = 96  # images from this index on are NaN

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(epoch)
        images = self.scale * torch.randn(96, FEATURES, generator=generator)
        images[self.poisoned_from :] = math.nan
        targets = torch.rand(96, TINY_CLASSES, generator=generator).softmax(1)
        for start in range(first * self.batch_size, 96, self.batch_size):
            part = slice(start, start + self.batch_size)
            yield Batch(images[part], targets[part])

    @property
    def rounds_per_epoch(self) -> int:
        return 96 // self.batch_size


@dataclass
class Rows(NullTracker):
    """Records rows of metrics."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def metrics(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


def trainer(state: TrainState, folder: Path, data: Numbers, steps_per_epoch: int = 4, **settings: Any) -> Trainer:
    """Return the real loop over the tiny network, at a constant lr: three epochs of four steps of eight images."""
    lr = state.optimizer.param_groups[0]["lr"]
    constant = ScheduleConfig(warmup_epochs=0, min_lr=lr, cooldown_epochs=0)
    defaults: dict[str, Any] = {"epochs": 3, "global_batch_size": 8, "log_every_steps": 1, "schedule": constant}
    config = LoopConfig(**(defaults | settings))
    goodput = Goodput()
    learner = Learner(
        state=state,
        network=state.model,
        precision=Precision(PrecisionConfig(PrecisionName.fp32), CPU.device),
        runtime=CPU,
        loss=make_loss(LossConfig()),
        accumulation_steps=config.accumulation,
        clip_grad_norm=config.clip_grad_norm,
    )
    bottleneck = Bottleneck(dict.fromkeys(Waiting._fields, "raise workers"))
    return Trainer(
        learner=learner,
        data=data,
        steps_per_epoch=steps_per_epoch,
        schedule=Schedule(constant, state.optimizer, 3, 4),
        validate=lambda model, stop: {"top1": 50.0, "top5": 100.0, "loss": 1.0, "images": 2},
        saver=CheckpointSaver(checkpoint_folder(folder), CheckpointConfig(), lambda line: None),
        tracker=Rows(),
        watchdog=Watchdog(0, 60),
        goodput=goodput,
        meter=Meter(learner, ["here"], goodput, bottleneck),
        config=config,
        inspect=lambda batch: None,
    )


def logged(loop: Trainer, kind: str = "train") -> list[dict[str, Any]]:
    """Return the rows of one kind that the loop has logged."""
    assert isinstance(loop.tracker, Rows)
    return [row for row in loop.tracker.rows if row["kind"] == kind]


def sgd_state() -> TrainState:
    """Return a state without BatchNorm, momentum or decay, whose update is the gradient times the learning rate."""
    plain = OptimizerConfig(name="momentum", momentum=0.0, weight_decay=0.0)
    return tiny_state(tiny_network(nn.Tanh), ema=False, lr=0.5, optimizer=plain)


def update_norm(tmp_path: Path, clip: float | None) -> tuple[float, float]:
    """Return the norm of one step's update, and the gradient norm that the loop logged for it."""
    state = sgd_state()
    before = tensors(state.model)
    loop = trainer(state, tmp_path, Numbers(8, scale=10.0), clip_grad_norm=clip, max_steps=1)
    loop.run()
    change = [value - before[name] for name, value in state.model.state_dict().items()]
    return float(torch.nn.utils.get_total_norm(change)), logged(loop)[0]["grad_norm"]


def test_clipping_limits_the_update(tmp_path: Path) -> None:
    """The norm of the update is lr times the smaller of the gradient norm and clip_grad_norm."""
    free, norm = update_norm(tmp_path / "free", None)
    assert free == pytest.approx(0.5 * norm, rel=1e-5)
    clipped, norm_before = update_norm(tmp_path / "clipped", norm / 10)
    assert clipped == pytest.approx(0.05 * norm, rel=1e-4)
    assert norm_before == pytest.approx(norm), "the norm before clipping must be logged"
    assert update_norm(tmp_path / "loose", 10 * norm)[0] == pytest.approx(free, rel=1e-6)


def test_only_the_first_step_and_validation_may_compile(tmp_path: Path) -> None:
    """The watchdog allows for compiling in the first step and the first validation of a start, and not after them."""
    state = sgd_state()
    loop = trainer(state, tmp_path, Numbers(8), epochs=2)
    allowed: dict[str, list[bool]] = {"step": [], "validation": []}
    state.model.register_forward_hook(lambda *_: allowed["step"].append(loop.watchdog._compiling))
    validate = loop.validate

    def validate_and_note(model: nn.Module, stop: Callable[[], bool]) -> dict[str, Any]:
        allowed["validation"].append(loop.watchdog._compiling)
        return validate(model, stop)

    loop.validate = validate_and_note
    loop.run()
    assert allowed == {"step": [True, *[False] * 7], "validation": [True, False]}


def test_no_two_batches_have_the_same_drop_path(tmp_path: Path) -> None:
    """Each batch of each step and rank is seeded differently, so that drop path draws other numbers for it."""
    seeds: list[int] = []
    for rank in range(2):
        state = sgd_state()
        state.model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
        learner = trainer(state, tmp_path / str(rank), Numbers(4), accumulation_steps=2).learner
        learner.runtime = Runtime(rank, 2, rank, 2, CPU.device)
        for _ in range(3):
            train_step(learner, Numbers(4).epoch(0))
            state.progress.count_step(8)
    assert len(set(seeds)) == len(seeds) == 2 * 3 * 2


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_big_batch(tmp_path: Path, parts: int) -> None:
    """Accumulating batches of 8 in 2 or 4 parts gives the weights, losses and counts of whole batches."""
    whole, cut = sgd_state(), sgd_state()
    loops = [
        trainer(whole, tmp_path / "whole", Numbers(8)),
        trainer(cut, tmp_path / "cut", Numbers(8 // parts), accumulation_steps=parts),
    ]
    for loop in loops:
        loop.run()
    torch.testing.assert_close(cut.model.state_dict(), whole.model.state_dict(), rtol=1e-5, atol=1e-6)
    one, other = (logged(loop) for loop in loops)
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert [row["samples"] for row in other] == [8 * step for step in range(1, 13)]


def test_logged_losses_are_means(tmp_path: Path) -> None:
    """Rows at every third step and at an epoch's end have the mean loss of the steps since the previous row."""
    each, some = (
        trainer(sgd_state(), tmp_path / name, Numbers(8), log_every_steps=every)
        for name, every in (("each", 1), ("some", 3))
    )
    for loop in (each, some):
        loop.run()
    losses = [row["loss"] for row in logged(each)]
    figures = {row["step"]: row["loss"] for row in logged(some)}
    spans = {3: losses[:3], 4: losses[3:4], 6: losses[4:6], 8: losses[6:8], 9: losses[8:9], 12: losses[9:12]}
    assert figures == pytest.approx({step: sum(span) / len(span) for step, span in spans.items()})
    epochs = [row["train_loss"] for row in logged(some, "validation")]
    assert epochs == pytest.approx([sum(losses[start : start + 4]) / 4 for start in (0, 4, 8)])


class HostReads(TorchDispatchMode):
    """Counts operators that copy a value to the host, each of which would synchronise with a GPU.

    Reads of an optimizer's step count are ignored, because it is on the host even when training on a GPU.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.count = 0
        self._optimizer = optimizer

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_host = any(args and args[0] is group.get("step") for group in self._optimizer.param_groups)
        reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += operator in reads and not on_host
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_a_step_reads_nothing_back(tmp_path: Path, name: str) -> None:
    """Steps with clipping, EMA and BatchNorm copy no value to the host unless they log a row.

    lamb, which is not fused, copies one in its first step.
    """
    reads = []

    class CountedNumbers(Numbers):
        def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
            for batch in super().epoch(epoch, first):
                reads.append(host.count)
                yield batch

    state = tiny_state(tiny_network(), optimizer=OptimizerConfig(name=name))
    assert state.ema is not None
    loop = trainer(state, tmp_path, CountedNumbers(8), clip_grad_norm=1.0, log_every_steps=3, max_steps=4)
    with HostReads(state.optimizer) as host:
        loop.run()
    before_second, before_third, before_fourth = (later - reads[0] for later in reads[1:])
    assert before_second == before_third == (name == "lamb")
    assert before_fourth > before_third


def test_divergence_ends_the_run(images: Path, tmp_path: Path, run_program: Run) -> None:
    """Divergence in the second epoch gives exit code 3 and a one-line error, and the first epoch's checkpoint stays."""
    command = (f"data.root={images}", *SMALL, "epochs=3", "optimizer.lr=1e18", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(Diverged, match=r"^epoch 2, step 12: the validation loss is nan and .*; lower opt") as caught:
        run_program("train", *command)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    last = (tmp_path / "run" / "checkpoints" / "last").resolve()
    assert last.name == "epoch-001"
    assert all(tensor.isfinite().all() for tensor in load_file(last / "model.safetensors").values())
    assert json.loads((last / "manifest.json").read_text())["progress"]["step"] == STEPS_PER_EPOCH
    assert rows(tmp_path / "run")[-1]["loss"] is None, "JSON has null for NaN"


def test_steps_on_nan_are_skipped_and_counted(tmp_path: Path) -> None:
    """If the last two batches of each epoch are NaN, the weights are those of training without these batches."""
    whole, cut = sgd_state(), sgd_state()
    loop = trainer(whole, tmp_path / "whole", Numbers(8, poisoned_from=16))
    loop.run()
    trainer(cut, tmp_path / "cut", Numbers(8), steps_per_epoch=2).run()
    torch.testing.assert_close(whole.model.state_dict(), cut.model.state_dict(), rtol=0, atol=0)
    found = logged(loop)
    assert [row["skipped_steps"] for row in found] == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6]
    assert [math.isfinite(row["loss"]) for row in found] == [True, True, False, False] * 3
    losses = [row["loss"] for row in found if math.isfinite(row["loss"])]
    epochs = [row["train_loss"] for row in logged(loop, "validation")]
    assert epochs == pytest.approx([sum(losses[start : start + 2]) / 2 for start in (0, 2, 4)])


@pytest.mark.parametrize("name", ["adamw", "sgd", "momentum", "lamb", "nadamw", "rmsproptf", "adamp"])
def test_a_skipped_step_leaves_no_trace(tmp_path: Path, name: str) -> None:
    """NaN batches change neither weights, BatchNorm statistics and their average nor the optimizer state.

    If the last two batches of each epoch are NaN, all of these, including the optimizer's step count, are bit-identical
    to those of training without the two batches.
    """
    states = [tiny_state(optimizer=OptimizerConfig(name=name)) for _ in range(2)]
    trainer(states[0], tmp_path / "whole", Numbers(8, poisoned_from=16)).run()
    trainer(states[1], tmp_path / "cut", Numbers(8), steps_per_epoch=2).run()
    whole, cut = states
    assert whole.ema is not None
    assert cut.ema is not None
    assert any(name.endswith("running_var") for name in whole.model.state_dict())
    torch.testing.assert_close(whole.model.state_dict(), cut.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(whole.ema.module.state_dict(), cut.ema.module.state_dict(), rtol=0, atol=0)
    found, expected = (state.trainer_state_dict()["optimizer"] for state in states)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("log_every", [1, 100])
def test_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, log_every: int) -> None:
    """Nothing is saved while steps are skipped, and the run ends with the earlier checkpoints intact."""
    state, checkpoint = sgd_state(), CheckpointConfig(every_steps=1)
    data, guards = Numbers(8, poisoned_from=32), GuardConfig(max_skipped_steps=3)
    settings: dict[str, Any] = {
        "steps_per_epoch": 12,
        "checkpoint": checkpoint,
        "guards": guards,
        "log_every_steps": log_every,
    }
    loop = trainer(state, tmp_path, data, **settings)
    with pytest.raises(Diverged, match=r"^epoch 1, step \d+: the last \d+ steps had gradients that are not finite"):
        loop.run()
    loop.saver.close()
    saved = sorted(folder.name for folder in tmp_path.glob("step-*"))
    assert saved == [f"step-{step:08d}" for step in (3, 4)], "the two newest must be kept"
    assert checkpoint_folder(tmp_path).find().folder == tmp_path / saved[-1]


def test_one_bad_step_does_not_end_the_run(tmp_path: Path) -> None:
    """A step that is taken resets the count of skipped steps in a row."""
    guards = GuardConfig(max_skipped_steps=3)
    loop = trainer(sgd_state(), tmp_path, Numbers(8, poisoned_from=16), guards=guards)
    loop.run()
    assert loop.state.progress.skipped_steps == 6


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """Weights with a NaN are not saved, and the error names the tensor."""
    state = sgd_state()
    loop = trainer(state, tmp_path, Numbers(8), max_steps=1)
    loop.run()
    with torch.no_grad():
        state.model.get_parameter("2.weight")[0, 0] = math.nan
    loop = trainer(state, tmp_path, Numbers(8), max_steps=2)
    with pytest.raises(Diverged, match=r"step-00000002: not written: 2\.weight is not finite"):
        loop.run()
    assert checkpoint_folder(tmp_path).find().folder == tmp_path / "step-00000001"


def test_changed_hyperparameters_hold_after_a_resume(images: Path, tmp_path: Path, run_program: Run) -> None:
    """A run that resumes with another learning rate and weight decay uses these, not those of its checkpoint."""
    command = (f"data.root={images}", *SMALL, "epochs=2", "schedule.warmup_epochs=0", f"run_dir={tmp_path / 'run'}")
    run_program("train", *command, "optimizer.lr=1e-3", f"max_steps={STEPS_PER_EPOCH}")
    run_program("train", *command, "optimizer.lr=1e-4", "optimizer.weight_decay=0.3")
    before, after = rows(tmp_path / "run")[0]["lr"], rows(tmp_path / "run")[-1]["lr"]
    assert before == pytest.approx(1e-3)
    assert after == pytest.approx(1e-5 + 0.5 * (1e-4 - 1e-5))
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last" / "trainer.pt", weights_only=True)
    assert {group["weight_decay"] for group in saved["optimizer"]["param_groups"]} == {0.0, 0.3}
