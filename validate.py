"""Evaluate weights: `python validate.py model=poolformer_s12 checkpoint=FILE data.root=/path/to/imagenet`.

Options: conf/ and src/metaformer/config.py, or `python validate.py --help`.
"""

from metaformer.death_signal import end_with_launcher
from metaformer.program import run_program

if __name__ == "__main__":
    end_with_launcher()  # before the imports, which take time

from metaformer.composing import compose
from metaformer.config import ValidateConfig


def main() -> None:
    """Compose, build, evaluate, which prints the result as JSON: the last line on stdout."""
    config = compose("validate", ValidateConfig)
    from metaformer import assembly, runtime  # takes seconds, which --help and wrong options need not wait for

    with runtime.start() as ranks, assembly.build_validation(config, ranks) as evaluate:
        evaluate()


if __name__ == "__main__":
    run_program(main)
