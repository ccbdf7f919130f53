"""Trackers that record a run's metrics, messages, images and checkpoints, and the files of its run folder."""
