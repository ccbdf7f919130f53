"""The trackers of a run, from its configuration."""

from functools import partial
from pathlib import Path
from typing import Any

from metaformer.tracking.background import BackgroundTracker
from metaformer.tracking.config import TrackingConfig, WandbMode
from metaformer.tracking.console import ConsoleTracker
from metaformer.tracking.jsonl import JsonlTracker
from metaformer.tracking.tracker import FanOut, Tracker
from metaformer.tracking.wandb import WandbTracker, check_wandb


def make_tracker(
    config: TrackingConfig, run_dir: Path, console: ConsoleTracker, resumed_at: int, settings: dict[str, Any]
) -> Tracker:
    """Console and files always, wandb where it is on.

    Args:
        resumed_at: the step at which training goes on; 0 at its beginning.
        settings: the run's whole configuration, for wandb.
    """
    trackers: list[Tracker] = [console, JsonlTracker(run_dir, resumed_at)]
    if config.wandb is not WandbMode.off:
        check_wandb()
        make = partial(WandbTracker, config, run_dir, settings)
        trackers.append(BackgroundTracker("wandb", make, config.close_seconds))
    return FanOut(trackers)
