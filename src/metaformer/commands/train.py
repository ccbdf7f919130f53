"""Train a network."""

from metaformer.composing import compose
from metaformer.config import TrainConfig
from metaformer.program import announce_start, launched_rank


def main() -> None:
    """Compose, build, train; the last line on stdout is the result as JSON."""
    config = compose("train", TrainConfig)
    announce_start()
    from metaformer import assembly, runtime  # takes seconds, which --help and wrong options need not wait for
    from metaformer.training.watchdog import Watchdog

    watchdog = Watchdog(launched_rank(), config.guards.stall_seconds, config.compile)
    with watchdog.watching(), runtime.start(pause_watchdog=watchdog.pause) as ranks:
        with assembly.build_training(config, ranks, watchdog) as train:
            result = train()
        ranks.print_result(result)
