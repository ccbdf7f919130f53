"""A run while it is open: its status file, and everyone who is told how it goes. Rank 0's business."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf

from metaformer.config import TrainConfig, redacted
from metaformer.errors import Interrupted, UserError
from metaformer.goodput import Goodput
from metaformer.interfaces import Tracker
from metaformer.program import status_file_of_launcher
from metaformer.runtime import Runtime
from metaformer.tracking.console import ConsoleTracker
from metaformer.tracking.jsonl import ends_with_final
from metaformer.tracking.make import make_tracker
from metaformer.tracking.run_folder import open_run_folder
from metaformer.tracking.status import DONE, FAILED, INTERRUPTED, StatusFile
from metaformer.tracking.tracker import FanOut, NullTracker
from metaformer.training.config import LoopSettings
from metaformer.training.state import Progress, TrainState


@contextmanager
def tracking(
    config: TrainConfig, runtime: Runtime, settings: LoopSettings, state: TrainState, fused: str, goodput: Goodput
) -> Iterator[Tracker]:
    """What is told of the run, closed at the end, when the status file says how it went.

    Args:
        fused: what the run uses of the fused parts, for the status file.

    Raises:
        UserError: the run folder cannot be written, or too many starts have ended before a new checkpoint.
    """
    with ExitStack() as parts:
        silent: Tracker = NullTracker()
        derived = derive(config, runtime.world_size)
        yield runtime.main_only(
            lambda: _open(config, settings, state, fused, goodput, derived, parts), otherwise=silent
        )


def derive(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """What a resume on another number of ranks changes, by the names that people read."""
    group = (
        (config.augmentation.mix_group_size or config.rank_batch_size(world_size))
        if config.augmentation.mixes
        else None
    )
    return {"ranks": world_size, "images that share one mixing": group}


def _open(
    config: TrainConfig,
    settings: LoopSettings,
    state: TrainState,
    fused: str,
    goodput: Goodput,
    derived: dict[str, Any],
    parts: ExitStack,
) -> Tracker:
    run_dir = config.resolved_run_dir
    status = StatusFile(run_dir, status_file_of_launcher(), goodput)
    status.start(state.progress.step, config.guards.max_starts_without_progress, fused)
    try:
        return _open_trackers(config, settings, state, status, goodput, derived, parts)
    except BaseException as error:
        if isinstance(error, OSError):
            error = UserError(f"run_dir={run_dir}: cannot be written ({error.strerror or error})")
        _record_end(status, state, type(error), error, None)
        raise error


def _open_trackers(
    config: TrainConfig,
    settings: LoopSettings,
    state: TrainState,
    status: StatusFile,
    goodput: Goodput,
    derived: dict[str, Any],
    parts: ExitStack,
) -> Tracker:
    run_dir, kept = config.resolved_run_dir, redacted(config)
    changed = open_run_folder(run_dir, OmegaConf.to_yaml(kept), state.progress.step, derived)
    steps = settings.epochs * settings.steps_per_epoch
    console = ConsoleTracker(
        settings.epochs, steps, settings.global_batch_size, run_dir / "log.txt", status.console_failed
    )
    for change in changed:
        console.message(f"changed      {change}")
    tracker: Tracker = console
    progress = state.progress
    complete = _complete(settings, progress)
    if complete and ends_with_final(run_dir, progress.step):
        console.message(f"complete     {run_dir} has all its {complete}; nothing is left to train")
    else:
        values: Any = OmegaConf.to_container(kept)
        tracked = make_tracker(config.tracking, run_dir, console, progress.step, values, progress.validated)
        tracker = FanOut([tracked, status])
    parts.push(lambda kind, error, trace: tracker.close(failed=kind is not None))
    parts.push(partial(_record_end, status, state))  # before that, which may take its time
    parts.callback(lambda: console.message(f"time         {goodput.spent()}"))
    return tracker


def _complete(settings: LoopSettings, progress: Progress) -> str:
    """What a run that has been trained and validated to its end has all of; empty for any other."""
    if not progress.validated:
        return ""
    if progress.epochs_completed >= settings.epochs:
        return f"{settings.epochs} epochs"
    return f"{settings.max_steps} steps" if settings.max_steps and progress.step >= settings.max_steps else ""


def _record_end(
    status: StatusFile,
    state: TrainState,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    step = state.progress.step
    if error is None:
        status.end(DONE, step, "")
    elif isinstance(error, Interrupted):
        status.end(INTERRUPTED, step, str(error))
    else:
        status.end(FAILED, step, " ".join(f"{type(error).__name__}: {error}".split()))
