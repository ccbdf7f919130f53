"""Makes a run's trackers from its configuration."""

import sys
from pathlib import Path
from typing import Any

from metaformer.interfaces import Tracker
from metaformer.targets import import_target
from metaformer.tracking.background import BackgroundTracker
from metaformer.tracking.config import TrackingConfig, WandbMode
from metaformer.tracking.console import ConsoleTracker
from metaformer.tracking.jsonl import JsonlTracker
from metaformer.tracking.tensorboard import check_tensorboard
from metaformer.tracking.tracker import FanOut
from metaformer.tracking.wandb import check_wandb, wandb_folders

TRACKER_PROCESS = (sys.executable, "-m", "metaformer.tracking.tracker_process")
WANDB_PROCESS = (*TRACKER_PROCESS, "wandb")
TENSORBOARD_PROCESS = (*TRACKER_PROCESS, "tensorboard")
TARGET_PROCESS = (*TRACKER_PROCESS, "target")


def make_tracker(
    config: TrackingConfig,
    run_dir: Path,
    console: ConsoleTracker,
    *,
    resumed_at: int,
    settings: dict[str, Any],
    validated: bool = False,
) -> Tracker:
    """Return a tracker for the console and files, and for wandb, TensorBoard and the user's own tracker if enabled.

    Args:
        resumed_at: Step at which training resumes; 0 for a new run.
        settings: The run's complete configuration, for wandb.
        validated: Whether the checkpoint to resume from was saved after the validation of its step.
    """
    trackers: list[Tracker] = [console, JsonlTracker(run_dir, resumed_at, validated)]
    if config.wandb is not WandbMode.off:
        check_wandb()
    if config.tensorboard:
        check_tensorboard()  # checked before a process is started
    if config.target is not None:
        import_target("tracking.target", config.target)
    limits = (config.open_seconds, config.close_seconds)
    if config.wandb is not WandbMode.off:
        arguments = (sys.argv, config, run_dir, settings, wandb_folders(run_dir))
        trackers.append(BackgroundTracker("wandb", WANDB_PROCESS, arguments, *limits))
    if config.tensorboard:
        position = (run_dir, resumed_at, validated)
        trackers.append(BackgroundTracker("tensorboard", TENSORBOARD_PROCESS, position, *limits))
    if config.target is not None:
        own = (config.target, sys.path, run_dir, config.options)
        trackers.append(BackgroundTracker(config.target, TARGET_PROCESS, own, *limits))
    return FanOut(trackers)
