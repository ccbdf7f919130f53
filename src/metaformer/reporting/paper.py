"""The rows of the paper's tables, with the reported results and the weights to compare them with.

Figures are as printed in the paper (arXiv 2111.11418, updated version): ImageNet-1K, 224 px, single crop.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from metaformer.errors import unknown_name

PAPER_IMAGE_SIZE = 224  # timm evaluates some of the compared networks at a larger size


class Table(Enum):
    """A table of the paper."""

    paper = "PoolFormer"
    longer = "PoolFormer-S12 trained longer"
    ablation = "Ablation of PoolFormer-S12"
    comparison = "Comparison"


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

    @property
    def has_recipe(self) -> bool:
        """Whether this project has a recipe for the row."""
        return self.table is not Table.comparison


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
