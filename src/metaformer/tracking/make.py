"""The trackers of a run, from its configuration."""

import sys
from pathlib import Path
from typing import Any

from metaformer.interfaces import Tracker
from metaformer.tracking.background import BackgroundTracker
from metaformer.tracking.config import TrackingConfig, WandbMode
from metaformer.tracking.console import ConsoleTracker
from metaformer.tracking.jsonl import JsonlTracker
from metaformer.tracking.tracker import FanOut
from metaformer.tracking.wandb import check_wandb, folders

WANDB_PROCESS = (sys.executable, "-m", "metaformer.tracking.wandb_process")


def make_tracker(
    config: TrackingConfig,
    run_dir: Path,
    console: ConsoleTracker,
    resumed_at: int,
    settings: dict[str, Any],
    validated: bool = False,
) -> Tracker:
    """Console and files always, wandb where it is on.

    Args:
        resumed_at: the step at which training goes on; 0 at its beginning.
        settings: the run's whole configuration, for wandb.
        validated: the checkpoint that it resumes from was saved after the validation of its step.
    """
    trackers: list[Tracker] = [console, JsonlTracker(run_dir, resumed_at, validated)]
    if config.wandb is not WandbMode.off:
        check_wandb()
        opening = (sys.argv, config, run_dir, settings, folders(run_dir))
        trackers.append(BackgroundTracker("wandb", WANDB_PROCESS, opening, config.open_seconds, config.close_seconds))
    return FanOut(trackers)
