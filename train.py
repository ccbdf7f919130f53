"""Train a network: `torchrun --nproc_per_node=8 train.py model=poolformer_m36 data.root=/path/to/imagenet`.

Options: conf/ and src/metaformer/config.py, or `python train.py --help`. The same command again resumes.
"""

from metaformer.death_signal import end_with_launcher
from metaformer.program import launched_rank, run_program

if __name__ == "__main__":
    end_with_launcher()  # before the imports, which take time

from metaformer.composing import compose
from metaformer.config import TrainConfig


def main() -> None:
    """Compose, build, train; the last line on stdout is the result as JSON."""
    config = compose("train", TrainConfig)
    from metaformer import assembly, runtime  # takes seconds, which --help and wrong options need not wait for
    from metaformer.training.watchdog import Watchdog

    watchdog = Watchdog(launched_rank(), config.guards.stall_seconds)
    with watchdog.watching(), runtime.start(pause_watchdog=watchdog.pause) as ranks:
        with assembly.build_training(config, ranks, watchdog) as train:
            result = train()
        ranks.print_result(result)


if __name__ == "__main__":
    run_program(main, must_print=False)  # the run folder has the result, too
