"""A model of a training step on GPUs, for machines without one: it compiles the kernels and predicts their time.

`python -m benchmarks.gpu` prints a table. All times are predictions; nothing is measured.
"""
