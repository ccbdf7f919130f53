"""Tests of the lines with which a training ends."""

from typing import Any

from metaformer.assembly.summary import summarize
from metaformer.composing import compose_training
from metaformer.goodput import TimeSpent
from metaformer.training.state import Best, Progress

ROW: dict[str, Any] = {"kind": "validation", "top1": 77.216, "top5": 93.5, "loss": 0.9, "images": 50000}


def test_a_run_with_a_best_epoch() -> None:
    """Rounded figures, the best result with its weights, the time of all starts, and where the files are."""
    config = compose_training(["run_dir=runs/a b"])
    progress = Progress(epochs_completed=310, step=387500, best=Best(77.5, 301, "ema"))
    spent = TimeSpent(2, {"training": 93600.0, "validation": 3600.0})
    assert list(summarize(config, progress, ROW | {"ema_top1": 77.44}, 4321.7, spent)) == [
        "result       top-1 77.2 %, top-5 93.5 %, EMA top-1 77.4 % on 50,000 images",
        "best         top-1 77.5 % after epoch 301 (EMA)",
        "trained      310 of 310 epochs, 387,500 steps, in 1d03h, 4,322 images/s",
        "files        'runs/a b': checkpoints/best, report.html",
    ]


def test_a_run_that_ends_within_an_epoch() -> None:
    """Its last result may be above the best one, which is among those after whole epochs only."""
    progress = Progress(epochs_completed=1, step=60, best=Best(76.0, 1, "model"))
    lines = list(summarize(compose_training([]), progress, ROW | {"kind": "final"}, 0.0, TimeSpent(1, {})))
    assert lines[:2] == [
        "result       top-1 77.2 %, top-5 93.5 % on 50,000 images",
        "best         top-1 76.0 % after epoch 1, among whole epochs",
    ]


def test_a_start_that_trained_nothing() -> None:
    """Without a complete epoch there is no best result; a start without a step has no speed."""
    config = compose_training(["run_dir=runs/a", "report.enabled=false"])
    lines = list(summarize(config, Progress(step=60), ROW, 0.0, TimeSpent(1, {"starting": 75.0})))
    assert lines[1:] == [
        "trained      0 of 310 epochs, 60 steps, in 1m15s",
        "files        runs/a: checkpoints/last",
    ]
