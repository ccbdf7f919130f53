"""Tests that a training step in channels_last copies no feature map only to change its layout."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from metaformer.models import create_model
from metaformer.models.families import COMPOSITIONS
from metaformer.models.metaformer import stage_sides

NAMES = ("poolformerv2_s12", "identityformer_s12", "randformer_s12", "convformer_s18", "caformer_s18")
SIDE, CLASSES = 64, 5
POSITIONS = [side**2 for side in stage_sides(SIDE, 4)]


def ancestors(event: FunctionEvent) -> list[str]:
    """Return the names of the operators that called an operator, innermost first."""
    names, caller = [], event.cpu_parent
    while caller is not None:
        names.append(caller.name)
        caller = caller.cpu_parent
    return names


def copies(events: list[FunctionEvent]) -> Counter[str]:
    """Count the copies of feature maps and tokens that change no type, by shape and calling operators."""
    found: Counter[str] = Counter()
    for event in events:
        callers = ancestors(event)
        converts_type = "aten::_to_copy" in callers
        shape: Any = event.input_shapes[0] if event.name == "aten::copy_" else []
        # In bfloat16, torch's bmm on CPUs copies RandFormer's matrix for each image.
        is_matrix = "aten::bmm" in callers and shape[1:] in [[size, size] for size in POSITIONS]
        if len(shape) > 2 and not converts_type and not is_matrix:
            found[f"{shape} in {' < '.join(callers[:4])}"] += 1
    return found


@pytest.mark.parametrize("batch", [4, 16])  # torch chooses another convolution for at least 16 images
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_feature_map_changes_its_layout(name: str, dtype: torch.dtype, batch: int) -> None:
    """Forward and backward pass have no copy except those that change the type (`_to_copy`).

    The gradients of convolutions' weights are `_to_copy`, too: torch computes them in another layout.
    """
    small = replace(COMPOSITIONS[name], depths=(1, 1, 2, 2), dims=(32, 32, 64, 64))
    model = create_model(small, CLASSES, image_size=SIDE).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = model(images).float().square().sum()
        loss.backward()
    events = list(profiler.events())
    assert sum(event.name.startswith("aten::convolution_backward") for event in events) >= 4
    assert copies(events) == Counter()
