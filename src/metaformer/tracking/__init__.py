"""Recording of a run: metrics, messages, images and checkpoints, and the files of its run folder."""
