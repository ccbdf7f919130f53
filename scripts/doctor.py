"""Check a machine before training: `python scripts/doctor.py --help`, or `metaformer doctor --help`."""

import sys

try:
    from metaformer.commands.doctor import main
    from metaformer.program import run_program
except ModuleNotFoundError as error:  # the wrong Python
    sys.exit(f"error: {sys.executable} has no module {error.name}; run `make install` and start with .venv/bin/python")

__all__ = ["main"]

if __name__ == "__main__":
    run_program(main)
