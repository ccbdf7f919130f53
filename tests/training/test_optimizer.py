"""Test optimizers: which parameters are decayed, updates compared with references, and errors."""

import copy
import importlib.util
from typing import Any

import pytest
import timm.optim
import torch
from torch import nn

from metaformer.errors import UserError
from metaformer.models import create_model
from metaformer.training.config import Implementation, OptimizerConfig, ScheduleConfig, ScheduleUnit
from metaformer.training.optimizer import make_optimizer
from metaformer.training.schedule import Schedule
from tests.training.conftest import FEATURES, tiny_network

LR, DECAY = 1e-3, 0.05


def test_only_matrices_are_decayed() -> None:
    """Exactly the parameters of PoolFormer-S12 with at most one dimension have no weight decay."""
    model = create_model("poolformer_s12", num_classes=4)
    model.register_parameter("scalar", nn.Parameter(torch.ones(())))
    model.register_parameter("position", nn.Parameter(torch.ones(1, 8, 2, 2)))
    groups = make_optimizer(OptimizerConfig(), model, LR).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(p): DECAY if p.ndim > 1 else 0.0 for p in model.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())), "none may be in two groups"


def test_learning_rates_decay_towards_the_stem() -> None:
    """With layer decay, each layer of PoolFormer-S12 has the rate of the next one times the factor; the head has lr."""
    model = create_model("poolformer_s12", num_classes=4)
    optimizer = make_optimizer(OptimizerConfig(layer_decay=0.5), model, LR)
    config = ScheduleConfig(unit=ScheduleUnit.step, warmup_epochs=0)
    assert Schedule(config, optimizer, 10, 10).set(0) == pytest.approx(LR)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    layers = ["head", "stages.3.blocks.1", "stages.3.blocks.0", "stages.3.downsample", "stages.2.blocks.5"]
    for name, parameter in model.named_parameters():
        depth = next((i for i, layer in enumerate(layers) if name.startswith(layer)), None)
        rate, decay = rates.pop(id(parameter))
        assert decay == (DECAY if parameter.ndim > 1 else 0), name
        assert depth is None or rate == pytest.approx(LR * 0.5**depth), name
        assert depth is not None or rate <= LR * 0.5**5, name
        assert not name.startswith("stem") or rate == pytest.approx(LR * 0.5**16)
    assert not rates


def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the parameters after 20 steps on gradients from a fixed generator."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("reference", ["torch", "timm"])
def test_adamw_updates_as_the_reference(reference: str) -> None:
    """20 steps of the fused AdamW equal those of PyTorch's unfused loop and of timm's AdamW."""
    ours, theirs = tiny_network(), tiny_network()
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    other = {
        "torch": lambda: torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8, foreach=False),
        "timm": lambda: timm.optim.AdamWLegacy(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8),
    }[reference]()
    start = copy.deepcopy(list(ours.parameters()))
    after = steps(ours, make_optimizer(OptimizerConfig(), ours, LR))
    torch.testing.assert_close(after, steps(theirs, other), rtol=0, atol=1e-6)
    assert all((a - b).abs().max() > LR for a, b in zip(after, start, strict=True))


@pytest.mark.parametrize(("batch", "lr"), [(1024, 1e-3), (4096, 4e-3), (8, 1e-3 / 128)])
def test_learning_rate_grows_with_the_batch(batch: int, lr: float) -> None:
    """The learning rate is 1e-3 per 1024 images of the global batch, unless lr is set."""
    assert OptimizerConfig().learning_rate(batch) == pytest.approx(lr, rel=1e-12)
    assert OptimizerConfig(lr=0.5).learning_rate(batch) == 0.5


def test_options_reach_the_optimizer() -> None:
    """The optimizer gets lr, betas, eps, momentum and weight decay from the configuration."""
    config = OptimizerConfig(betas=[0.8, 0.95], eps=1e-6, weight_decay=0.3)
    for group, decay in zip(make_optimizer(config, tiny_network(), 0.7).param_groups, (0.0, 0.3), strict=True):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.7, (0.8, 0.95), 1e-6, decay)
    sgd = make_optimizer(OptimizerConfig(name="sgd", momentum=0.5), tiny_network(), 0.1)
    assert {group["momentum"] for group in sgd.param_groups} == {0.5}


@pytest.mark.parametrize("name", ["lamb", "sgd", "adam", "adamw", "lion"])
def test_named_optimizers_reduce_a_loss(name: str) -> None:
    """Optimizers chosen by name reduce a loss."""
    model = tiny_network()
    optimizer = make_optimizer(OptimizerConfig(name=name), model, 1e-2)
    images = torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        loss = (model(images) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_unknown_name() -> None:
    """The error for an unknown name suggests similar names."""
    with pytest.raises(UserError, match=r"optimizer\.name=adamv: unknown; did you mean .*\badamw\b.*\?"):
        make_optimizer(OptimizerConfig(name="adamv"), tiny_network(), LR)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"betas": [0.9]}, id="too-few"),
        pytest.param({"betas": [1.5, 0.99]}, id="out-of-range"),
        pytest.param({"lr": -1.0}, id="negative"),
        pytest.param({"name": "fusedadamw"}, id="not-installed"),
    ],
)
def test_invalid_options(options: dict[str, Any]) -> None:
    """An invalid option gives a one-line error that names a field of the optimizer."""

    def make() -> None:
        config = OptimizerConfig(**options)
        make_optimizer(config, tiny_network(), config.learning_rate(8))

    with pytest.raises(UserError, match=r"^optimizer\.(betas|lr|name)=") as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="apex is installed here")
def test_apex_missing() -> None:
    """If apex is configured but not installed, a one-line error says where to get it."""
    with pytest.raises(UserError, match=r"implementation=apex: apex is not installed; .*NVIDIA/apex") as caught:
        make_optimizer(OptimizerConfig(implementation=Implementation.apex), tiny_network(), LR)
    assert "\n" not in str(caught.value)
