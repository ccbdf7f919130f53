"""Module imported only by the worker server: the import has the server killed when the training process ends."""

import signal

from metaformer.death_signal import send_at_parents_death

send_at_parents_death(signal.SIGKILL)
