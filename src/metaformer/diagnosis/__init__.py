"""Whether a machine is fit to train on: one finding for each thing looked at."""
