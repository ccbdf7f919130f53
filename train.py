"""Train a network: `torchrun --nproc_per_node=8 train.py model=poolformer_m36 data.root=/path/to/imagenet`.

Options: conf/ and src/metaformer/config.py, or `python train.py --help`. The same command again resumes.
"""

import hydra
from omegaconf import DictConfig

from metaformer import build, runtime
from metaformer.config import register_schemas, train_config


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(composed: DictConfig) -> None:
    """Compose, build, train; the last line on stdout is the result as JSON."""
    config = train_config(composed)
    with runtime.start() as ranks:
        with build.training(config, ranks) as trainer:
            validation = trainer.run()
        ranks.print_result(build.training_result(config, trainer, validation))


if __name__ == "__main__":
    register_schemas()
    runtime.run_program(main)
