"""The process that runs wandb: nothing of wandb can hold up, fork beside, or outlive training.

Started by `BackgroundTracker` with the number of the file descriptor on which calls arrive.
"""

import sys
from multiprocessing.connection import Connection

from metaformer import streams
from metaformer.tracking.service import Server
from metaformer.tracking.wandb import WandbTracker

if __name__ == "__main__":
    streams.guard()
    Server(Connection(int(sys.argv[1])), WandbTracker()).run()
