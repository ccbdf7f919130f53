"""Evaluate weights."""

from metaformer.composing import compose
from metaformer.config import ValidateConfig
from metaformer.program import announce_start


def main() -> None:
    """Compose, build, evaluate; the last line on stdout is the result as JSON."""
    config = compose("validate", ValidateConfig)
    announce_start()
    from metaformer import assembly, runtime  # takes seconds, which --help and wrong options need not wait for

    with runtime.start() as ranks, assembly.build_validation(config, ranks) as evaluate:
        evaluate()
