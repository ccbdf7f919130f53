"""Imported by the server of workers when it starts: from then on it is killed when the training process ends."""

import signal

from metaformer.death_signal import send_at_parents_death

send_at_parents_death(signal.SIGKILL)
