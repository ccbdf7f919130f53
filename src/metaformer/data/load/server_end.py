"""Imported by the server of workers when it starts: from then on it is killed when the training process ends."""

import signal

from metaformer.death_signal import set_parent_death_signal

set_parent_death_signal(signal.SIGKILL)
