"""What a GPU would run, compiled, counted and timed by a model on a machine without one.

`python -m benchmarks.gpu` prints the table. Nothing here measures: all times are predictions.
"""
