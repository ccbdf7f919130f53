"""Checks that a machine can train; each check yields findings."""
