"""Runs the wandb process with an injected fault."""

import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from metaformer.tracking.service import Server
from metaformer.tracking.wandb import WandbTracker


def main() -> None:
    """Serve the wandb tracker with the fault."""
    fault, descriptor = sys.argv[1:]
    match fault:
        case "tracker-raises":
            WandbTracker.metrics = _raise  # type: ignore[method-assign, assignment]
        case "tracker-blocks":
            WandbTracker.metrics = _block  # type: ignore[method-assign, assignment]
        case "tracker-blocks-at-start":
            WandbTracker._start = _block  # type: ignore[method-assign, assignment]
    Server(Connection(int(descriptor)), WandbTracker()).run()


def _raise(*arguments: Any) -> None:
    raise RuntimeError("wandb has a bad day")


def _block(*arguments: Any) -> None:
    time.sleep(1000)


if __name__ == "__main__":
    main()
