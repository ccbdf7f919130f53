"""Tests of AdamW and its parameter groups against timm, torch and the published formula."""

from typing import Any

import numpy as np
import pytest
import timm.optim
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metaformer.models import create_model
from metaformer.training.config import OptimizerConfig
from metaformer.training.optimizer import make_optimizer

DECAY, BETAS, EPS, STEPS = 0.05, (0.9, 0.999), 1e-8, 20
# Every step has a different rate, and the decay of a step, 1 - .05 * lr, is far above the tolerances.
RATES = [0.02 * (1 - step / STEPS) for step in range(STEPS)]


class Small(nn.Module):
    """Module with one of each kind of parameter in the paper's networks, including hybrids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(1, 8)
        self.layer_scale = nn.Parameter(torch.full((8,), 1e-5))
        self.position = nn.Parameter(torch.randn(1, 8, 4, 4) * 0.02)
        self.head = nn.Linear(8, 5)


def decay_of_names(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, float]:
    """Return the weight decay by parameter name; check that each parameter is in exactly one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = [(names[id(parameter)], group["weight_decay"]) for group in groups for parameter in group["params"]]
    assert len(pairs) == len(names)
    return dict(pairs)


def random_gradients(model: nn.Module) -> list[list[Tensor]]:
    """Return gradients of all steps, [STEPS][parameters], scaled by 1e-10 to 1e2, so that eps matters in some."""
    generator = torch.Generator().manual_seed(1)
    scales = [10 ** (12 * torch.rand(p.shape, generator=generator) - 10) for p in model.parameters()]
    return [
        [torch.randn(p.shape, generator=generator) * scale for p, scale in zip(model.parameters(), scales, strict=True)]
        for _ in range(STEPS)
    ]


def run(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: list[list[Tensor]]) -> dict[str, Tensor]:
    """Return the parameters after one step at each of RATES."""
    for lr, step in zip(RATES, gradients, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for parameter, gradient in zip(model.parameters(), step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def adamw(parameter: Tensor, gradients: list[Tensor]) -> NDArray[np.float64]:
    """Compute AdamW (arXiv 1711.05101, algorithm 2) in float64, without decay for one-dimensional parameters."""
    x = parameter.detach().double().numpy().copy()
    first, second = np.zeros_like(x), np.zeros_like(x)
    decay = 0.0 if x.ndim <= 1 else DECAY
    for step, (lr, gradient) in enumerate(zip(RATES, gradients, strict=True), start=1):
        g = gradient.double().numpy()
        first = BETAS[0] * first + (1 - BETAS[0]) * g
        second = BETAS[1] * second + (1 - BETAS[1]) * g**2
        corrected_first, corrected_second = first / (1 - BETAS[0] ** step), second / (1 - BETAS[1] ** step)
        x = x - lr * decay * x - lr * corrected_first / (np.sqrt(corrected_second) + EPS)
    return x


def test_groups_of_poolformer_are_timms() -> None:
    """PoolFormer-S12's groups equal those of two functions of timm, and of the rule "one dimension: no decay"."""
    model = create_model("poolformer_s12")
    ours = decay_of_names(model, make_optimizer(OptimizerConfig(), model, 1e-3).param_groups)
    timms = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=DECAY).param_groups
    assert ours == decay_of_names(model, timms)
    assert ours == decay_of_names(model, timm.optim.param_groups_weight_decay(model, DECAY))
    assert ours == {name: 0.0 if parameter.ndim <= 1 else DECAY for name, parameter in model.named_parameters()}


def test_groups_of_poolformer_by_kind() -> None:
    """By a manual count, the weights of 28 convolutions and the head are decayed; other parameters are not."""
    model = create_model("poolformer_s12")
    decay = decay_of_names(model, make_optimizer(OptimizerConfig(), model, 1e-3).param_groups)
    decayed = {name for name, value in decay.items() if value}
    assert len(decayed) == 1 + 3 + 2 * 12 + 1
    assert all(name.endswith(("conv.weight", "fc1.weight", "fc2.weight", "head.fc.weight")) for name in decayed)
    assert len(decay) - len(decayed) == 29 + 2 * (2 * 12 + 1) + 2 * 12


def test_position_embeddings_are_decayed() -> None:
    """A parameter [1, C, H, W] is in the group with weight decay, as in timm; a parameter [C] is not."""
    model = Small()
    decay = decay_of_names(model, make_optimizer(OptimizerConfig(), model, 1e-3).param_groups)
    assert decay == decay_of_names(model, timm.optim.param_groups_weight_decay(model, DECAY))
    assert {name for name, value in decay.items() if value} == {"conv.weight", "position", "head.weight"}
    assert decay["position"] == DECAY


def test_adamw_follows_the_formula() -> None:
    """After 20 steps of up to .02 with gradients of all sizes, parameters are within 2e-6 of the float64 formula."""
    model = Small()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = random_gradients(model)
    after = run(model, make_optimizer(OptimizerConfig(), model, RATES[0]), gradients)
    for number, (name, parameter) in enumerate(start.items()):
        expected = adamw(parameter, [step[number] for step in gradients])
        np.testing.assert_allclose(after[name].double().numpy(), expected, rtol=0, atol=2e-6, err_msg=name)
        assert np.abs(expected - parameter.double().numpy()).max() > 0.01


def test_adamw_is_torchs() -> None:
    """The fused optimizer of the program gives the same steps as torch's plain loop over timm's groups."""
    ours, theirs = Small(), Small()
    gradients = random_gradients(ours)
    groups = timm.optim.param_groups_weight_decay(theirs, DECAY)
    plain = torch.optim.AdamW(groups, lr=RATES[0], betas=BETAS, eps=EPS, foreach=False, fused=False)
    optimizer = make_optimizer(OptimizerConfig(), ours, RATES[0])
    assert {group["fused"] for group in optimizer.param_groups} == {True}
    torch.testing.assert_close(run(ours, optimizer, gradients), run(theirs, plain, gradients), rtol=0, atol=1e-6)


def test_weight_decay_is_decoupled() -> None:
    """With zero gradients, decayed parameters shrink by a factor of 1 - lr * .05 per step, and others do not change."""
    model = Small()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    nothing = [[torch.zeros_like(parameter) for parameter in model.parameters()]] * STEPS
    after = run(model, make_optimizer(OptimizerConfig(), model, RATES[0]), nothing)
    shrunk = float(np.prod([1 - lr * DECAY for lr in RATES]))
    assert shrunk < 0.99
    for name, parameter in start.items():
        factor = 1.0 if parameter.ndim <= 1 else shrunk
        assert after[name].numpy() == pytest.approx(parameter.numpy() * factor, rel=2e-6), name
