"""Evaluate weights: `python validate.py model=poolformer_s12 checkpoint=FILE data.root=/path/to/imagenet`.

Options: conf/ and src/metaformer/config.py, or `python validate.py --help`.
"""

import sys

try:
    from metaformer.death_signal import end_with_launcher
    from metaformer.program import run_program

    if __name__ == "__main__":
        end_with_launcher()  # before the imports, which take time

    from metaformer.commands.validate import main
except ModuleNotFoundError as error:  # the wrong Python
    sys.exit(f"error: {sys.executable} has no module {error.name}; run `make install` and start with .venv/bin/python")

__all__ = ["main"]

if __name__ == "__main__":
    run_program(main)
