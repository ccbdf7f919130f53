"""Networks created by name."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from metaformer.composing import compose_training
from metaformer.errors import UserError
from metaformer.models import MetaFormerBlock, create_model, create_timm_model, list_models
from metaformer.models.token_mixers import Attention, DepthwiseConv, Pooling, SpatialFC
from metaformer.models.variants import VARIANTS

# name: parameters at 1000 classes, blocks, drop path rate, LayerScale's initial value (paper, table 1 and appendix)
PAPER = {
    "poolformer_s12": (11_915_176, 12, 0.1, 1e-5),
    "poolformer_s24": (21_388_968, 24, 0.1, 1e-5),
    "poolformer_s36": (30_862_760, 36, 0.2, 1e-6),
    "poolformer_m36": (56_172_520, 36, 0.3, 1e-6),
    "poolformer_m48": (73_473_448, 48, 0.4, 1e-6),
}


# The parts of PoolFormer-S12 that the ablations change (paper, table 5), and a check of each block.
ABLATIONS: dict[str, Callable[[MetaFormerBlock], bool]] = {
    "identity": lambda block: isinstance(block.token_mixer, nn.Identity),
    "random_matrix": lambda block: not list(block.token_mixer.parameters()),
    "depthwise_conv": lambda block: isinstance(block.token_mixer, DepthwiseConv),
    "pool5": lambda block: repr(block.token_mixer.pool).startswith("AvgPool2d(kernel_size=5,"),
    "pool7": lambda block: repr(block.token_mixer.pool).startswith("AvgPool2d(kernel_size=7,"),
    "pool9": lambda block: repr(block.token_mixer.pool).startswith("AvgPool2d(kernel_size=9,"),
    "layer_norm": lambda block: isinstance(block.norm1, nn.LayerNorm) and isinstance(block.norm2, nn.LayerNorm),
    "batch_norm": lambda block: isinstance(block.norm1, nn.BatchNorm2d) and isinstance(block.norm2, nn.BatchNorm2d),
    "no_norm": lambda block: isinstance(block.norm1, nn.Identity) and isinstance(block.norm2, nn.Identity),
    "relu": lambda block: isinstance(block.mlp.act, nn.ReLU),
    "silu": lambda block: isinstance(block.mlp.act, nn.SiLU),
    "no_residual": lambda block: not block.residual,
    "no_channel_mlp": lambda block: not hasattr(block, "mlp"),
}
HYBRIDS = ("pppa", "ppaa", "pppf", "ppff")


def blocks(model: nn.Module) -> list[MetaFormerBlock]:
    return [module for module in model.modules() if isinstance(module, MetaFormerBlock)]


def test_every_listed_network_is_defined() -> None:
    """The names that are listed without torch are those of the table, in its order."""
    assert list_models() == list(VARIANTS)


def test_list_models_returns_the_papers_networks() -> None:
    """`list_models` returns the 45 networks of both papers in the papers' order; `model=` accepts them."""
    first = list(PAPER) + [f"metaformer_s12_{part}" for part in (*ABLATIONS, *HYBRIDS)]
    sizes = ("s12", "s24", "s36", "m36", "m48")
    second = [f"{family}_{size}" for family in ("identityformer", "randformer", "poolformerv2") for size in sizes]
    second += [f"{family}_{size}" for family in ("convformer", "caformer") for size in ("s18", "s36", "m36", "b36")]
    assert list_models() == first + second
    assert len(list_models()) == 45
    for name in (first[0], first[-1], second[0], second[-1]):
        assert compose_training([f"model={name}", "data.root=."]).model.name == name


@pytest.mark.parametrize("part", ABLATIONS)
def test_ablation_changes_one_part(part: str) -> None:
    """Every block of an ablation has the named part, PoolFormer-S12 does not, and all other keys are the same."""
    ablated, baseline = create_model(f"metaformer_s12_{part}"), create_model("poolformer_s12")
    assert all(ABLATIONS[part](block) for block in blocks(ablated))
    assert not any(ABLATIONS[part](block) for block in blocks(baseline) if part != "random_matrix")
    keys, baseline_keys = set(ablated.state_dict()), set(baseline.state_dict())
    changed = {key for key in keys ^ baseline_keys if "running_" not in key and "num_batches" not in key}
    allowed = {"no_norm": "norm", "no_channel_mlp": "2.|mlp|norm2"}.get(part, "token_mixer")
    assert all(any(word in key for word in allowed.split("|")) for key in changed)


@pytest.mark.parametrize("letters", HYBRIDS)
def test_hybrid_has_one_mixer_per_stage(letters: str) -> None:
    """Letters name the stages' mixers; attention adds channel LayerNorm everywhere and one position embedding."""
    model = create_model(f"metaformer_s12_{letters}")
    kinds = {"p": Pooling, "a": Attention, "f": SpatialFC}
    for stage, letter in zip(model.stages, letters, strict=True):
        assert all(isinstance(block.token_mixer, kinds[letter]) for block in blocks(stage))
    norm = nn.LayerNorm if "a" in letters else nn.GroupNorm
    assert isinstance(model.head.norm, norm)
    assert all(isinstance(n, norm) and n.eps == 1e-5 for block in blocks(model) for n in (block.norm1, block.norm2))
    embeddings = {key: p for key, p in model.named_parameters() if "position_embedding" in key}
    expected = {"pppa": {"stages.3.position_embedding": (1, 512, 7, 7)},
                "ppaa": {"stages.2.position_embedding": (1, 320, 14, 14)}}  # fmt: skip
    assert {key: tuple(p.shape) for key, p in embeddings.items()} == expected.get(letters, {})
    assert not any(p.any() for p in embeddings.values())


@pytest.mark.parametrize("name", ["metaformer_s12_ppaa", "metaformer_s12_ppff", "metaformer_s12_random_matrix"])
@pytest.mark.parametrize("size", [32, 37])  # 37: odd sides in the second and third stage
def test_position_dependent_networks_follow_the_image_size(name: str, size: int) -> None:
    """Networks with position-dependent weights accept images of the size that they were created for."""
    model = create_model(name, num_classes=3, image_size=size)
    logits = model(torch.randn(2, 3, size, size))
    logits.square().sum().backward()
    assert logits.shape == (2, 3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", PAPER)
def test_network_is_the_papers(name: str) -> None:
    """Parameter count, depth, drop path and LayerScale equal the paper's; keys and shapes equal timm's."""
    parameters, depth, drop_path, layer_scale = PAPER[name]
    model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(blocks(model)) == depth
    assert blocks(model)[-1].drop_path1.drop_prob == pytest.approx(drop_path)
    scales = torch.cat([scale.scale for b in blocks(model) for scale in (b.layer_scale1, b.layer_scale2)])
    assert torch.equal(scales, torch.full_like(scales, layer_scale))
    with torch.device("meta"):
        reference = timm.create_model(name)
    ours, theirs = model.state_dict(), reference.state_dict()
    assert [(key, tensor.shape) for key, tensor in ours.items()] == [(k, t.shape) for k, t in theirs.items()]
    reference.load_state_dict(ours, strict=True, assign=True)
    model.load_state_dict(reference.state_dict(), strict=True)


def test_arguments_override_the_papers_values() -> None:
    """`num_classes` sets the classifier's size, and `drop_path_rate` (even 0) replaces the paper's rate."""
    model = create_model("poolformer_s12", num_classes=7, drop_path_rate=0.0)
    assert model.head.fc.weight.shape == (7, 512)
    assert not [m for m in model.modules() if getattr(m, "drop_prob", 0)]


@pytest.mark.parametrize("create", [create_model, create_timm_model])
def test_unknown_name_is_refused(create: type) -> None:
    """An unknown network gives a one-line UserError with the field, the name and the nearest known name."""
    with pytest.raises(UserError, match=r"^model\.name=poolformer_s13: unknown; .*\bpoolformer_s12\b.*$"):
        create("poolformer_s13")


def test_timm_network_takes_classes_and_drop_path() -> None:
    """timm's networks are created by name with the given number of classes and drop path rate."""
    model = create_timm_model("test_vit", num_classes=7, drop_path_rate=0.25)
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 7)
    assert max(getattr(m, "drop_prob", None) or 0 for m in model.modules()) == pytest.approx(0.25)


def test_timm_network_of_fixed_size_refuses_another() -> None:
    """A network of timm that timm cannot build for another size refuses it in one line; others accept any size."""
    refused = (
        r"^image_size=64: timm's efficientformer_l1 is for images of 224 pixels and takes no others .*image_size=224$"
    )
    with pytest.raises(UserError, match=refused):
        create_timm_model("efficientformer_l1", image_size=64)
    create_timm_model("efficientformer_l1", image_size=224)
    create_timm_model("test_vit", image_size=64)
    create_timm_model("test_resnet", image_size=64)


def test_timm_network_without_drop_path_refuses_a_rate() -> None:
    """A drop path rate for a network without drop path gives an error with field and network."""
    with pytest.raises(UserError, match=r"^model\.drop_path_rate=0\.1: .*ghostnet_050.*$"):
        create_timm_model("ghostnet_050", drop_path_rate=0.1)
    assert create_timm_model("ghostnet_050", num_classes=3).get_classifier().out_features == 3  # type: ignore[operator]
