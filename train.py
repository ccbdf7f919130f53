"""Train a network: `torchrun --nproc_per_node=8 train.py model=poolformer_m36 data.root=/path/to/imagenet`.

Options: conf/ and src/metaformer/config.py, or `python train.py --help`. The same command again resumes.
"""

from metaformer.death_signal import end_with_launcher
from metaformer.program import launched_rank, run_program

if __name__ == "__main__":
    end_with_launcher()  # now: the imports below take seconds

from metaformer import assembly, runtime
from metaformer.config import TrainConfig, compose
from metaformer.training.watchdog import Watchdog


def main() -> None:
    """Compose, build, train; the last line on stdout is the result as JSON."""
    config = compose("train", TrainConfig)
    watchdog = Watchdog(launched_rank(), config.guards.stall_seconds)
    with watchdog.watching(), runtime.start(pause_watchdog=watchdog.pause) as ranks:
        with assembly.build_training(config, ranks, watchdog) as train:
            result = train()
        ranks.print_result(result)


if __name__ == "__main__":
    run_program(main, must_print=False)  # the run folder has the result, too
