"""Limits for reading images."""

MAX_PIXELS = 100_000_000  # 300 MB as RGB; ImageNet's largest image has 38,451,400
