"""Where metrics, messages, pictures and checkpoints of a run go."""
