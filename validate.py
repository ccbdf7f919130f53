"""Evaluate weights: `python validate.py model=poolformer_s12 checkpoint=FILE data.root=/path/to/imagenet`.

Options: conf/ and src/metaformer/config.py, or `python validate.py --help`.
"""

import hydra
from omegaconf import DictConfig

from metaformer import build, runtime
from metaformer.config import register_schemas, validate_config


@hydra.main(version_base="1.3", config_path="conf", config_name="validate")
def main(composed: DictConfig) -> None:
    """Compose, build, evaluate; the last line on stdout is the result as JSON."""
    config = validate_config(composed)
    with runtime.start() as ranks, build.validation(config, ranks) as evaluate:
        ranks.print_result(evaluate())


if __name__ == "__main__":
    register_schemas()
    runtime.run_program(main)
