"""Comparison of the paper's tables with this project's results."""
