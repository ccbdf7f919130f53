"""Train a network: `torchrun --nproc_per_node=8 train.py model=poolformer_m36 data.root=/path/to/imagenet`.

Options: conf/ and src/metaformer/config.py, or `python train.py --help`. The same command again resumes.
"""

from metaformer import assembly, runtime
from metaformer.config import TrainConfig, compose


def main() -> None:
    """Compose, build, train; the last line on stdout is the result as JSON."""
    config = compose("train", TrainConfig)
    with runtime.start() as ranks:
        with assembly.training(config, ranks) as train:
            result = train()
        ranks.print_result(result)


if __name__ == "__main__":
    runtime.run_program(main, must_print=False)  # the run folder has the result, too
