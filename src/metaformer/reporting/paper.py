"""The rows of the papers' tables, with the reported results and the weights to compare them with.

Figures are as printed in the papers (arXiv 2111.11418, updated version, and arXiv 2210.13452): ImageNet-1K, single
crop, 224 px unless the table says otherwise.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from metaformer.errors import unknown_name

COOLDOWN_EPOCHS = 10  # of recipes that do not set it
PAPER_IMAGE_SIZE = 224  # timm evaluates some of the compared networks at a larger size


class Table(Enum):
    """A table of the papers."""

    paper = "PoolFormer"
    longer = "PoolFormer-S12 trained longer"
    ablation = "Ablation of PoolFormer-S12"
    comparison = "Comparison"
    baselines = "MetaFormer Baselines"
    baselines_384 = "MetaFormer Baselines, fine-tuned at 384 px"
    baselines_21k = "MetaFormer Baselines, from ImageNet-21K"
    baselines_21k_384 = "MetaFormer Baselines, from ImageNet-21K, at 384 px"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: what follows `experiment=`; comparisons have a name of the same form but no recipe.
        table: the table that contains the row.
        parameters: number of parameters, in millions.
        gmacs: multiply-accumulates of one image, in units of 1e9.
        top1: top-1 accuracy in percent.
        model: the network's name. For a comparison it is timm's name with the tag of the weights, or None where timm
            has no weights of that training.
        released_weights: value of `checkpoint=` for the weights published by the paper's authors or timm, if any.
        epochs, global_batch_size: values of the recipe.
        image_size: side of the images in pixels.
        groups, settings: further changes of the recipe: choices of Hydra groups, and nested values.
    """

    name: str
    table: Table
    parameters: float
    gmacs: float
    top1: float
    model: str | None
    released_weights: str | None
    epochs: int = 300
    global_batch_size: int = 4096
    image_size: int = PAPER_IMAGE_SIZE
    groups: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_comparison(self) -> bool:
        """Whether the row is of another project's network, which only timm has."""
        return self.table is Table.comparison

    @property
    def has_recipe(self) -> bool:
        """Whether this project has a recipe for the row."""
        return self.table not in (Table.comparison, Table.baselines_21k, Table.baselines_21k_384)

    @property
    def cooldown_epochs(self) -> int:
        """Epochs of the recipe's cool-down."""
        return int(self.settings.get("schedule", {}).get("cooldown_epochs", COOLDOWN_EPOCHS))


def _poolformer(name: str, parameters: float, gmacs: float, top1: float) -> Row:
    return Row(f"paper/{name}", Table.paper, parameters, gmacs, top1, name, f"official:{name}")


def _longer(epochs: int, top1: float) -> Row:
    name = f"paper/poolformer_s12_{epochs}_epochs"
    return Row(name, Table.longer, 11.9, 1.8, top1, "poolformer_s12", None, epochs)


def _ablation(part: str, parameters: float, gmacs: float, top1: float, released: bool = False) -> Row:
    model = f"metaformer_s12_{part}"
    weights = f"official:{model}" if released else None
    batch = 1024 if part in ("pppa", "ppaa") else 4096  # attention is trained with a smaller batch
    return Row(f"ablation/{part}", Table.ablation, parameters, gmacs, top1, model, weights, global_batch_size=batch)


def _comparison(name: str, parameters: float, gmacs: float, top1: float, timm_weights: str | None = None) -> Row:
    released = f"hf:timm/{timm_weights}" if timm_weights else None
    return Row(f"comparison/{name}", Table.comparison, parameters, gmacs, top1, timm_weights, released)


def _simple_baselines(family: str, top1: Iterable[float], gmacs: Iterable[float]) -> Iterator[Row]:
    """Yield the five sizes of a family without trained token mixers; their recipe is PoolFormer's."""
    sizes = zip(("s12", "s24", "s36", "m36", "m48"), (11.9, 21.3, 30.8, 56.1, 73.3), gmacs, top1, strict=True)
    for size, parameters, macs, accuracy in sizes:
        name = f"{family}_{size}"
        yield Row(f"baselines/{name}", Table.baselines, parameters, macs, accuracy, name, f"official:{name}")


@dataclass(frozen=True)
class _Figures:
    """The second paper's figures for a network, and its rates when fine-tuned at 384 px."""

    parameters: float
    gmacs: float
    gmacs_384: float
    top1: float
    top1_384: float
    top1_21k: float
    top1_21k_384: float
    drop_path_384: float
    dropout_384: float


def _trained_baselines(family: str, figures: Mapping[str, _Figures]) -> Iterator[Row]:
    """Yield the rows of ConvFormer or CAFormer: trained, fine-tuned at 384 px, and both from ImageNet-21K."""
    groups = {"optimizer": "lamb"} if family == "caformer" else {}
    rates = {"optimizer": {"base_lr": 2e-3}} if family == "caformer" else {}
    training = {**rates, "schedule": {"warmup_epochs": 20}}
    for size, f in figures.items():
        name = f"{family}_{size}"
        released = f"official:{name}"
        settings = _finetuning(name, 1e-4 if family == "caformer" else 5e-5, f.drop_path_384, f.dropout_384)
        row = (f"baselines/{name}", Table.baselines, f.parameters, f.gmacs, f.top1, name, released)
        yield Row(*row, groups=groups, settings=training)
        row = (f"baselines/{name}_384", Table.baselines_384, f.parameters, f.gmacs_384, f.top1_384, name,
               f"{released}_384")  # fmt: skip
        yield Row(*row, 30, 1024, 384, groups | {"ema": "enabled"}, settings)
        row = (f"baselines/{name}_in21ft1k", Table.baselines_21k, f.parameters, f.gmacs, f.top1_21k, name,
               f"{released}_in21ft1k")  # fmt: skip
        yield Row(*row)
        row = (f"baselines/{name}_384_in21ft1k", Table.baselines_21k_384, f.parameters, f.gmacs_384, f.top1_21k_384,
               name, f"{released}_384_in21ft1k")  # fmt: skip
        yield Row(*row, image_size=384)


def _finetuning(name: str, lr: float, drop_path_rate: float, head_dropout: float) -> dict[str, Any]:
    """Return the recipe of fine-tuning at 384 px: a cosine from lr to lr is a constant."""
    return {
        "image_size": 384,
        "init_weights": f"official:{name}",
        "model": {"drop_path_rate": drop_path_rate, "head_dropout": head_dropout},
        "optimizer": {"lr": lr},
        "schedule": {"min_lr": lr, "warmup_epochs": 0, "cooldown_epochs": 0},
        "ema": {"decay": 0.9999},
        "augmentation": {"mixup_alpha": 0.0, "cutmix_alpha": 0.0},
    }


SIMPLE_GMACS = (1.8, 3.4, 5.0, 8.8, 11.5)
CONVFORMERS = {
    "s18": _Figures(26.8, 3.9, 11.6, 83.0, 84.4, 83.7, 85.0, 0.3, 0.4),
    "s36": _Figures(40.0, 7.6, 22.4, 84.1, 85.4, 85.4, 86.4, 0.5, 0.4),
    "m36": _Figures(57.1, 12.8, 37.7, 84.5, 85.6, 86.1, 86.9, 0.8, 0.5),
    "b36": _Figures(99.9, 22.6, 66.5, 84.8, 85.7, 87.0, 87.6, 0.8, 0.5),
}
CAFORMERS = {
    "s18": _Figures(26.3, 4.1, 13.4, 83.6, 85.0, 84.1, 85.4, 0.3, 0.4),
    "s36": _Figures(39.3, 8.0, 26.0, 84.5, 85.7, 85.8, 86.9, 0.5, 0.4),
    "m36": _Figures(56.2, 13.2, 42.0, 85.2, 86.2, 86.6, 87.5, 0.7, 0.4),
    "b36": _Figures(98.8, 23.2, 72.2, 85.5, 86.4, 87.4, 88.1, 0.8, 0.5),
}
ROWS = (
    _poolformer("poolformer_s12", 11.9, 1.8, 77.2),
    _poolformer("poolformer_s24", 21.4, 3.4, 80.3),
    _poolformer("poolformer_s36", 30.9, 5.0, 81.4),
    _poolformer("poolformer_m36", 56.2, 8.8, 82.1),
    _poolformer("poolformer_m48", 73.5, 11.6, 82.5),
    _longer(400, 77.5),
    _longer(500, 77.9),
    _longer(1000, 78.4),
    _longer(1500, 78.6),
    _longer(2000, 78.8),
    _longer(2500, 78.8),
    _longer(3000, 78.8),
    _ablation("identity", 11.9, 1.8, 74.3, released=True),
    _ablation("random_matrix", 11.9, 3.3, 75.8),
    _ablation("depthwise_conv", 11.9, 1.8, 78.1),
    _ablation("pool5", 11.9, 1.8, 77.2),
    _ablation("pool7", 11.9, 1.8, 77.1),
    _ablation("pool9", 11.9, 1.8, 76.8),
    _ablation("layer_norm", 11.9, 1.8, 76.5),
    _ablation("batch_norm", 11.9, 1.8, 76.4),
    _ablation("no_norm", 11.9, 1.8, 46.1),
    _ablation("relu", 11.9, 1.8, 76.4),
    _ablation("silu", 11.9, 1.8, 77.2),
    _ablation("no_residual", 11.9, 1.8, 0.1),
    _ablation("no_channel_mlp", 2.5, 0.2, 5.7),
    _ablation("pppa", 14.0, 1.9, 78.3, released=True),
    _ablation("ppaa", 16.5, 2.5, 81.0, released=True),
    _ablation("pppf", 11.9, 1.8, 77.5, released=True),
    _ablation("ppff", 12.2, 1.9, 77.9, released=True),
    _comparison("rsb_resnet18", 12, 1.8, 70.6, "resnet18.a2_in1k"),
    _comparison("rsb_resnet34", 22, 3.7, 75.5, "resnet34.a2_in1k"),
    _comparison("rsb_resnet50", 26, 4.1, 79.8, "resnet50.a2_in1k"),
    _comparison("rsb_resnet101", 45, 7.9, 81.3, "resnet101.a2_in1k"),
    _comparison("rsb_resnet152", 60, 11.6, 81.8, "resnet152.a2_in1k"),
    _comparison("vit_b16", 86, 17.6, 79.7),
    _comparison("vit_l16", 307, 63.6, 76.1),
    _comparison("deit_s", 22, 4.6, 79.8, "deit_small_patch16_224.fb_in1k"),
    _comparison("deit_b", 86, 17.5, 81.8, "deit_base_patch16_224.fb_in1k"),
    _comparison("pvt_tiny", 13, 1.9, 75.1),
    _comparison("pvt_small", 25, 3.8, 79.8),
    _comparison("pvt_medium", 44, 6.7, 81.2),
    _comparison("pvt_large", 61, 9.8, 81.7),
    _comparison("mlp_mixer_b16", 59, 12.7, 76.4),
    _comparison("resmlp_s12", 15, 3.0, 76.6, "resmlp_12_224.fb_in1k"),
    _comparison("resmlp_s24", 30, 6.0, 79.4, "resmlp_24_224.fb_in1k"),
    _comparison("resmlp_b24", 116, 23.0, 81.0, "resmlp_big_24_224.fb_in1k"),
    _comparison("swin_mixer_t_d24", 20, 4.0, 79.4),
    _comparison("swin_mixer_t_d6", 23, 4.0, 79.7),
    _comparison("swin_mixer_b_d24", 61, 10.4, 81.3),
    _comparison("gmlp_s", 20, 4.5, 79.6, "gmlp_s16_224.ra3_in1k"),
    _comparison("gmlp_b", 73, 15.8, 81.6),
    *_simple_baselines("identityformer", (74.6, 78.2, 79.3, 80.0, 80.4), SIMPLE_GMACS),
    *_simple_baselines("randformer", (76.6, 78.2, 79.5, 81.2, 81.4), (1.9, 3.5, 5.2, 9.0, 11.9)),
    *_simple_baselines("poolformerv2", (78.0, 80.7, 81.6, 82.2, 82.6), SIMPLE_GMACS),
    *_trained_baselines("convformer", CONVFORMERS),
    *_trained_baselines("caformer", CAFORMERS),
)


def find_rows(patterns: Iterable[str]) -> list[Row]:
    """Return the rows with these names, in the given order and without duplicates; `*` in a name matches any text."""
    found: list[Row] = []
    for pattern in patterns:
        matching = [row for row in ROWS if fnmatchcase(row.name, pattern)]
        if not matching:
            raise unknown_name("row", pattern, (row.name for row in ROWS))
        found += [row for row in matching if row not in found]
    return found
