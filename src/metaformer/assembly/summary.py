"""Summarizes the result of a training in the last lines of its log."""

import shlex
from collections.abc import Iterator

from metaformer.config import TrainConfig
from metaformer.goodput import TimeSpent
from metaformer.interfaces import Row
from metaformer.tracking.console import duration
from metaformer.training.pointers import BEST, LAST
from metaformer.training.state import Progress


def summarize(config: TrainConfig, progress: Progress, result: Row, speed: float, spent: TimeSpent) -> Iterator[str]:
    """Yield the last lines of a run's log.

    Args:
        result: The row of the last validation.
        speed: Images per second in the steps of this start; 0 if it took no step.
        spent: The time of all starts.
    """
    best, has_best = progress.best, progress.best.top1 is not None
    ema = f", EMA top-1 {result['ema_top1']:.1f} %" if "ema_top1" in result else ""
    yield f"result       top-1 {result['top1']:.1f} %, top-5 {result['top5']:.1f} %{ema} on {result['images']:,} images"
    if has_best:
        average = " (EMA)" if best.weights == "ema" else ""
        among = ", among whole epochs" if result["kind"] == "final" else ""
        yield f"best         top-1 {best.top1:.1f} % after epoch {best.epoch}{average}{among}"
    yield (
        f"trained      {progress.epochs_completed} of {config.total_epochs} epochs, {progress.step:,} steps, "
        f"in {duration(sum(spent.seconds.values()))}{f', {speed:,.0f} images/s' if speed else ''}"
    )
    names = [f"checkpoints/{BEST if has_best else LAST}", *(["report.html"] if config.report.enabled else [])]
    yield f"files        {shlex.quote(str(config.resolved_run_dir))}: {', '.join(names)}"
