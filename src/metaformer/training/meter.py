"""Measures training between two log rows, and makes the rows."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metaformer.goodput import Goodput
from metaformer.interfaces import Row, Waiting
from metaformer.training.bottleneck import Bottleneck, add_waits
from metaformer.training.step import Learner
from metaformer.training.stragglers import describe_straggler


@dataclass
class _Window:
    """Measurements of this rank between two log rows of an epoch. All times are in seconds.

    Attributes:
        samples: number of images trained on before.
    """

    samples: int
    started: float = field(default_factory=time.perf_counter)
    waited: Waiting = field(default_factory=Waiting)  # without the epoch's first batch
    waited_for_first: float = 0.0  # while workers start


@dataclass(frozen=True)
class Reading:
    """Measurements of the steps since the last log row.

    Attributes:
        row: the log row.
        loss_sum: sum of the losses of the steps that were not skipped, as the mean over the ranks.
        skipped_in_a_row: number of consecutive steps that were skipped up to now.
        straggler: a line about a rank that the other ranks wait for, or None.
    """

    row: Row
    loss_sum: float
    skipped_in_a_row: int
    straggler: str | None


class Meter:
    """Measures throughput, waiting and each rank's own work.

    Args:
        learner: its state's sums on the device are read at each log row, and added to those of the epoch.
        hosts: the name of each rank's node, for messages.
        goodput: counts the time spent waiting for data.
        bottleneck: reports on the waiting of an epoch.
    """

    def __init__(self, learner: Learner, hosts: Sequence[str], goodput: Goodput, bottleneck: Bottleneck) -> None:
        self.bottleneck = bottleneck
        self._learner, self._hosts, self._goodput = learner, list(hosts), goodput
        self.start()

    def start(self) -> None:
        """Start a measurement, at the beginning of an epoch and after each row."""
        self._window = _Window(self._learner.state.progress.samples)

    def waited(self, waited: Waiting, is_first: bool) -> None:
        """Add a wait for a batch; the first one of an epoch includes the start of the workers."""
        if is_first:
            self._window.waited_for_first += waited.total
        else:
            self._window.waited = add_waits(self._window.waited, waited)

    def read(self, lr: float, grad_norm: Tensor) -> Reading:
        """Return the measurements since the last row, and start the next ones. Waits for the device."""
        learner, window = self._learner, self._window
        state, progress, runtime = learner.state, learner.state.progress, learner.runtime
        skipped, skipped_in_a_row = (int(count) for count in state.skips.tolist())
        own = [float(state.loss_sum), learner.stopwatch.read(), window.waited_for_first, *window.waited]
        ranks = torch.stack(runtime.gather(torch.tensor(own, dtype=torch.float64)))
        loss_sum, _, waited_for_first, *stages = ranks.mean(dim=0).tolist()
        waited = Waiting(*stages)
        _, forward_passes, _, *waits_by_stage = ranks.unbind(dim=1)
        elapsed = time.perf_counter() - window.started
        self._goodput.record_wait(window.waited.total + window.waited_for_first)
        self.bottleneck.add(waited, elapsed - waited_for_first)
        taken = state.add_to_epoch(loss_sum, skipped)
        row = progress.row("train") | {
            "loss": loss_sum / taken if taken else math.nan,
            "lr": lr,
            "grad_norm": float(grad_norm),
            "images_per_second": (progress.samples - window.samples) / elapsed,
            "data_wait": (waited.total + waited_for_first) / elapsed,
            "skipped_steps": progress.skipped_steps,
            "memory_gib": runtime.peak_memory_gib(),
        }
        self.start()
        busy = (torch.stack(waits_by_stage).sum(dim=0) + forward_passes).tolist()
        straggler = describe_straggler(busy, self._hosts, elapsed - waited_for_first) if len(busy) > 1 else None
        return Reading(row, loss_sum, skipped_in_a_row, straggler)
