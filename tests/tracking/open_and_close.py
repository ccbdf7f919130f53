"""Open the trackers of a run in RUN_DIR, log COUNT rows and close them: `open_and_close.py RUN_DIR COUNT`."""

import sys
from pathlib import Path

from metaformer.tracking import background
from metaformer.tracking.config import TrackingConfig, WandbMode
from metaformer.tracking.console import ConsoleTracker
from metaformer.tracking.make import make_tracker

if __name__ == "__main__":
    run_dir, count = Path(sys.argv[1]), int(sys.argv[2])
    run_dir.mkdir()
    background.SILENT_SECONDS = 60  # a longer wait is a failure
    console = ConsoleTracker(epochs=1, steps=1, samples_per_step=1, log_file=run_dir / "log.txt")
    tracker = make_tracker(TrackingConfig(WandbMode.offline), run_dir, console, resumed_at=0, settings={})
    figures = {"images_per_second": 1.0, "data_wait": 0.0, "lr": 0.1, "loss": 1.0, "grad_norm": 1.0}
    for step in range(1, count + 1):
        counts = {"epoch": 1, "step": step, "samples": step, "memory_gib": 0.0, "skipped_steps": 0}
        tracker.metrics({"kind": "train", **counts, **figures})
    tracker.close(failed=False)
