"""Module imported only by the worker server: the import has the server killed when the training process ends."""

import signal

from metaformer.death_signal import set_parent_death_signal

set_parent_death_signal(signal.SIGKILL)
