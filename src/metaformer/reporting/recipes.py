"""The recipes of the papers' rows: `experiment=paper/poolformer_s12` and the like."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from metaformer.reporting.paper import ROWS, Row

GPUS = 8
TRAINING_IMAGES = 1_281_167  # in ImageNet-1K


class Recipe(NamedTuple):
    """A recipe as Hydra stores it: its group, its name in the group, and its values."""

    group: str
    name: str
    values: dict[str, Any]


def recipes() -> Iterator[Recipe]:
    """Yield the recipe of each row that this project can train."""
    for row in ROWS:
        if row.has_recipe:
            folder, _, name = row.name.rpartition("/")
            yield Recipe(f"experiment/{folder}", name, recipe_values(row))


def recipe_values(row: Row) -> dict[str, Any]:
    """Return the values in which a row's recipe differs from the defaults, which are the first paper's training."""
    overrides = [{f"override /{group}": name} for group, name in {"model": row.model, **row.groups}.items()]
    values: dict[str, Any] = {"defaults": overrides, "global_batch_size": row.global_batch_size}
    return values | ({} if row.epochs == 300 else {"epochs": row.epochs}) | dict(row.settings)


def recipe_file(row: Row) -> str:
    """Return a row's recipe as a file to copy to conf/experiment/ and change."""
    images = (row.epochs + row.cooldown_epochs) * TRAINING_IMAGES
    days = max(1, round(row.epochs / 300))
    return (
        "# @package _global_\n"
        f"# {row.table.value}: {row.name}, {row.epochs} epochs: top-1 {row.top1} in the paper.\n"
        f"#   torchrun --nproc_per_node={GPUS} train.py experiment={row.name} data.root=/path/to/imagenet\n"
        f"# Hardware: {GPUS} GPUs with room for {row.global_batch_size // GPUS} images each, or fewer GPUs and "
        "accumulation_steps=2, 4, ...\n"
        f"# {row.epochs} epochs and {row.cooldown_epochs} of cool-down read {images / 1e6:,.0f} million images: "
        f"{images / days / 86400:,.0f} images/s finish them in {'a day' if days == 1 else f'{days} days'}. "
        "GPU hours: not measured.\n" + OmegaConf.to_yaml(OmegaConf.create(recipe_values(row))).rstrip() + "\n"
    )
