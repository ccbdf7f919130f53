"""Parameters and multiply-accumulates of the paper's networks."""

import pytest
import torch
from torch import nn

from metaformer.models import create_model
from metaformer.models.norms import GroupNormWithoutBias
from metaformer.reporting.complexity import count_complexity

# name: exact parameters, and fvcore's GMACs to three decimals
EXACT = {
    "poolformer_s12": (11_915_176, 1.823),
    "poolformer_s24": (21_388_968, 3.413),
    "poolformer_s36": (30_862_760, 5.003),
    "poolformer_m36": (56_172_520, 8.802),
    "poolformer_m48": (73_473_448, 11.591),
}
# name: parameters in millions and GMACs, as printed in the paper's ablation table
PRINTED = {
    "identity": (11.9, 1.8),
    "random_matrix": (11.9, 3.3),
    "depthwise_conv": (11.9, 1.8),
    "pool5": (11.9, 1.8),
    "pool7": (11.9, 1.8),
    "pool9": (11.9, 1.8),
    "layer_norm": (11.9, 1.8),
    "batch_norm": (11.9, 1.8),
    "no_norm": (11.9, 1.8),
    "relu": (11.9, 1.8),
    "silu": (11.9, 1.8),
    "no_residual": (11.9, 1.8),
    "no_channel_mlp": (2.5, 0.2),
    "pppa": (14.0, 1.9),
    "ppaa": (16.5, 2.5),
    "pppf": (11.9, 1.8),
    "ppff": (12.2, 1.9),
}

# Of the second paper: exact parameters; frozen values; GMACs at 224 and 384 px as its authors print them.
BASELINES = {
    "identityformer_s12": (11_891_712, 0, 1.8, None),
    "identityformer_s24": (21_341_464, 0, 3.4, None),
    "identityformer_s36": (30_791_216, 0, 5.0, None),
    "identityformer_m36": (56_077_168, 0, 8.8, None),
    "identityformer_m48": (73_346_056, 0, 11.5, None),
    "randformer_s12": (11_891_712, 235_298, 1.9, None),
    "randformer_s24": (21_341_464, 470_596, 3.5, None),
    "randformer_s36": (30_791_216, 705_894, 5.2, None),
    "randformer_m36": (56_077_168, 705_894, 9.0, None),
    "randformer_m48": (73_346_056, 941_192, 11.9, None),
    "poolformerv2_s12": (11_891_712, 0, 1.8, None),
    "poolformerv2_s24": (21_341_464, 0, 3.4, None),
    "poolformerv2_s36": (30_791_216, 0, 5.0, None),
    "poolformerv2_m36": (56_077_168, 0, 8.8, None),
    "poolformerv2_m48": (73_346_056, 0, 11.5, None),
    "convformer_s18": (26_774_448, 0, 3.9, 11.6),
    "convformer_s36": (40_012_152, 0, 7.6, 22.4),
    "convformer_m36": (57_051_640, 0, 12.8, 37.7),
    "convformer_b36": (99_882_616, 0, 22.6, 66.5),
    "caformer_s18": (26_341_656, 0, 4.1, 13.4),
    "caformer_s36": (39_297_102, 0, 8.0, 26.0),
    "caformer_m36": (56_204_878, 0, 13.2, 42.0),
    "caformer_b36": (98_753_614, 0, 23.2, 72.2),
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_count_as_the_authors_print(name: str) -> None:
    """Parameters and frozen values are exact, and GMACs equal the printed digit, at 384 px too."""
    parameters, frozen, gmacs, gmacs_384 = BASELINES[name]
    with torch.device("meta"):
        model = create_model(name)
    assert sum(buffer.numel() for buffer in model.buffers()) == frozen
    found = count_complexity(model)
    assert (found.parameters, round(found.macs / 1e9, 1)) == (parameters, gmacs)
    if gmacs_384 is not None:
        assert round(count_complexity(model, 384).macs / 1e9, 1) == gmacs_384


@pytest.mark.parametrize("name", EXACT)
def test_poolformers_count_as_fvcore_counts(name: str) -> None:
    """Parameters are exact, and GMACs are equal to three decimals."""
    found = count_complexity(create_model(name))
    assert (found.parameters, round(found.macs / 1e9, 3)) == EXACT[name]


@pytest.mark.parametrize("part", PRINTED)
def test_ablations_count_as_the_paper_prints(part: str) -> None:
    """Parameters in millions and GMACs are equal to the paper's one decimal."""
    found = count_complexity(create_model(f"metaformer_s12_{part}"))
    assert (round(found.parameters / 1e6, 1), round(found.macs / 1e9, 1)) == PRINTED[part]


def test_buffers_are_not_parameters() -> None:
    """The 21,133,602 values of random matrices are not counted as parameters; depthwise convolutions are."""
    model = create_model("metaformer_s12_random_matrix")
    assert sum(buffer.numel() for buffer in model.buffers()) == 21_133_602
    assert count_complexity(model).parameters == 11_915_176
    assert count_complexity(create_model("metaformer_s12_depthwise_conv")).parameters == 11_948_456


def test_a_layer_counts_by_its_formula() -> None:
    """A convolution counts outputs x inputs per output, a GroupNorm 5 per value, a BatchNorm 2, and pooling 0.

    A GroupNorm without bias counts 0.
    """
    with torch.device("meta"):
        conv = nn.Conv2d(3, 8, 3, padding=1)
        layers = [nn.GroupNorm(1, 8), nn.BatchNorm2d(8), nn.AvgPool2d(3, 1, 1), GroupNormWithoutBias(8)]
    base = 10 * 10 * 8 * 27
    assert count_complexity(conv, 10).macs == base
    assert [count_complexity(nn.Sequential(conv, layer), 10).macs - base for layer in layers] == [
        5 * 800, 2 * 800, 0, 0,
    ]  # fmt: skip
