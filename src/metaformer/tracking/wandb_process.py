"""The program of the separate process that runs wandb, so that wandb cannot block, fork or outlive training.

`BackgroundTracker` starts it with the number of the file descriptor from which it receives calls.
"""

import sys
from multiprocessing.connection import Connection

from metaformer import streams
from metaformer.tracking.service import Server
from metaformer.tracking.wandb import WandbTracker

if __name__ == "__main__":
    streams.guard()
    Server(Connection(int(sys.argv[1])), WandbTracker()).run()
