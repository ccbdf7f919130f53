"""Program of the separate process that runs a tracker, so that the tracker cannot block, fork or outlive training.

`BackgroundTracker` starts it with the tracker's name and the number of the file descriptor that delivers the calls.
"""

import sys
from multiprocessing.connection import Connection

from metaformer import streams
from metaformer.tracking.service import ServedTracker, Server
from metaformer.tracking.target import TargetTracker
from metaformer.tracking.tensorboard import TensorBoardTracker
from metaformer.tracking.wandb import WandbTracker

TRACKERS: dict[str, type[ServedTracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
    "target": TargetTracker,
}

if __name__ == "__main__":
    streams.guard()
    Server(Connection(int(sys.argv[2])), TRACKERS[sys.argv[1]]()).run()
