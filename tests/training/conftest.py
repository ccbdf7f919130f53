"""Fixtures with a tiny network and its real training state."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metaformer.models import load_weights, save_state
from metaformer.training.checkpoint import CheckpointFolder, WeightFiles
from metaformer.training.config import CheckpointConfig, EmaConfig, OptimizerConfig
from metaformer.training.ema import make_ema
from metaformer.training.optimizer import make_optimizer
from metaformer.training.precision import UnitScaler
from metaformer.training.state import TrainState

FEATURES, TINY_CLASSES = 5, 3


def tiny_network(middle: type[nn.Module] | None = None) -> nn.Module:
    """Return a linear layer, BatchNorm (which has buffers) or another layer, and a head, with fixed initial weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 4), middle() if middle else nn.BatchNorm1d(4), nn.Linear(4, TINY_CLASSES))


def tiny_state(
    model: nn.Module | None = None, ema: bool = True, lr: float = 0.1, optimizer: OptimizerConfig | None = None
) -> TrainState:
    """Return a state at step 0."""
    model = model or tiny_network()
    return TrainState(
        model=model,
        ema=make_ema(EmaConfig(enabled=ema, decay=0.9), model),
        optimizer=make_optimizer(optimizer or OptimizerConfig(), model, lr),
        scaler=UnitScaler("cpu"),
        identity={"model": "tiny", "seed": 0, "global_batch_size": 8, "data": "abc"},
    )


def advance(state: TrainState, steps: int = 1) -> None:
    """Take real optimizer steps, each on different data, and update step, loss sum and average."""
    for _ in range(steps):
        state.progress.step += 1
        generator = torch.Generator().manual_seed(state.progress.step)
        loss = state.model(torch.randn(8, FEATURES, generator=generator)).square().sum()
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.loss_sum += loss.detach()
        if state.ema is not None:
            state.ema.update_where(torch.ones(()), state.model, step=state.progress.step)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's state dict."""
    return copy.deepcopy(model.state_dict())


def checkpoint_folder(folder: Path, keep: int = 2) -> CheckpointFolder:
    """Return a checkpoint folder of the tiny network, set up as in train.py."""
    weight_files = WeightFiles(partial(save_state, network="tiny"), load_weights)
    return CheckpointFolder(folder, CheckpointConfig(keep=keep), {"model": "tiny"}, weight_files)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Callable[..., CheckpointFolder]:
    """Return a function that returns the checkpoint folder of a run in this test's temporary folder."""
    (tmp_path / "run").mkdir()
    return lambda keep=2: checkpoint_folder(tmp_path / "run" / "checkpoints", keep)
