"""Checks of whether a machine can train; each check yields findings."""
