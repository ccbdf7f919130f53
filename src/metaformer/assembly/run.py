"""Opens a run's status file and trackers on rank 0."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf

from metaformer.config import TrainConfig, redacted
from metaformer.errors import Interrupted, UserError, one_line
from metaformer.goodput import Goodput
from metaformer.interfaces import Tracker
from metaformer.program import status_file_of_launcher
from metaformer.runtime import Runtime
from metaformer.tracking.console import ConsoleTracker
from metaformer.tracking.jsonl import ends_with_final
from metaformer.tracking.make import make_tracker
from metaformer.tracking.report import ReportTracker
from metaformer.tracking.run_folder import open_run_folder
from metaformer.tracking.status import DONE, FAILED, INTERRUPTED, StatusFile
from metaformer.tracking.tracker import FanOut, NullTracker
from metaformer.training.state import TrainState


@dataclass(frozen=True)
class Run:
    """A run to be tracked.

    Attributes:
        world_size: The number of ranks.
        fused: The status text of the fused operators, for the status file.
    """

    config: TrainConfig
    world_size: int
    steps_per_epoch: int
    state: TrainState
    fused: str
    goodput: Goodput

    @property
    def derived_settings(self) -> dict[str, Any]:
        """Return the settings that change if the run resumes on another number of ranks, under readable names."""
        config = self.config
        group = config.augmentation.mix_group_size or config.rank_batch_size(self.world_size)
        return {"ranks": self.world_size, "images that share one mixing": group if config.augmentation.mixes else None}

    @property
    def completed_length(self) -> str:
        """Return the length of a run that has been trained and validated to its end, as text; "" for any other run."""
        progress, max_steps = self.state.progress, self.config.max_steps
        if not progress.validated:
            return ""
        if progress.epochs_completed >= self.config.total_epochs:
            return f"{self.config.total_epochs} epochs"
        return f"{max_steps} steps" if max_steps and progress.step >= max_steps else ""


@contextmanager
def open_tracker(run: Run, runtime: Runtime) -> Iterator[Tracker]:
    """Yield the run's tracker; on exit, close it and record in the status file how the run ended.

    It is an error if too many starts in a row have ended without a new checkpoint.
    """
    with ExitStack() as stack:
        silent: Tracker = NullTracker()
        yield runtime.main_only(lambda: _open(run, stack), otherwise=silent)


def _open(run: Run, stack: ExitStack) -> Tracker:
    run_dir = run.config.resolved_run_dir
    status = StatusFile(run_dir, status_file_of_launcher(), run.goodput)
    status.start(run.state.progress.step, run.config.guards.max_starts_without_progress, run.fused)
    try:
        return _open_trackers(run, status, stack)
    except BaseException as error:
        if isinstance(error, OSError):
            error = UserError(f"run_dir={run_dir}: cannot be written ({error.strerror or error})")
        _record_end(status, run.state, type(error), error, None)
        raise error


def _open_trackers(run: Run, status: StatusFile, stack: ExitStack) -> Tracker:
    config, progress = run.config, run.state.progress
    run_dir, values = config.resolved_run_dir, redacted(config)
    changes = open_run_folder(run_dir, OmegaConf.to_yaml(values), progress.step, run.derived_settings)
    console = ConsoleTracker(
        epochs=config.total_epochs,
        steps=config.last_step(run.steps_per_epoch),
        samples_per_step=config.global_batch_size,
        log_file=run_dir / "log.txt",
        alarm=status.console_failed,
        validation_steps=run.steps_per_epoch,
    )
    for change in changes:
        console.message(f"changed      {change}")
    tracker: Tracker = console
    if run.completed_length and ends_with_final(run_dir, progress.step):
        console.message(f"complete     {run_dir}: all {run.completed_length} are done; nothing is left to train")
    else:
        plain: Any = OmegaConf.to_container(values)
        tracked = make_tracker(
            config.tracking, run_dir, console, resumed_at=progress.step, settings=plain, validated=progress.validated
        )
        tracker = FanOut([tracked, status])
    report = ReportTracker(run_dir) if config.report.enabled else None
    if report is not None:
        stack.push(lambda kind, error, trace: report.close(failed=kind is not None))
    stack.push(lambda kind, error, trace: tracker.close(failed=kind is not None))
    if report is not None:  # written while the trackers are closed
        stack.push(lambda kind, error, trace: report.start_last(failed=kind is not None))
    stack.push(partial(_record_end, status, run.state))  # runs before the tracker is closed, which may take long
    stack.callback(_log_time, run.goodput, console)
    return tracker if report is None else FanOut([tracker, report])


def _log_time(goodput: Goodput, console: ConsoleTracker) -> None:
    for line in goodput.spent().lines:
        console.message(f"time         {line}")


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
        status.end(FAILED, step, f"{type(error).__name__}: {one_line(error)}")
