"""Pairwise tests of all advertised options, each run with two steps and a validation."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch._inductor import config as inductor

from metaformer.data.load.dali_loader import dali_is_installed
from tests.conftest import SMALL_NETWORK, VAL_IMAGES, rows

# The first value of an option is in the most runs, so wandb and a second network come last.
OPTIONS = {
    "compile": ("true", "false"),
    "channels_last": ("true", "false"),
    "precision": ("bf16", "fp32"),
    "ema": ("disabled", "enabled"),
    "accumulation_steps": ("1", "2"),
    "loader": ("torch", "pil", "dali"),
    "augmentation": ("paper", "light", "none"),
    "tracking": ("local", "tensorboard", "offline"),
    "optimizer": ("adamw", "lamb", "sgd"),
    "schedule": ("cosine", "cosine_per_step"),
    "clip_grad_norm": ("null", "1.0"),
    "workers": ("0", "2"),
}
COMPILED = 3  # number of runs with compile=true, the slowest ones: the least that covers options with three values


def combinations() -> list[dict[str, str]]:
    """Return runs that cover every pair of values, chosen greedily by the number of missing pairs that they add."""
    names = list(OPTIONS)
    missing = {
        frozenset([(a, x), (b, y)])
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(OPTIONS[a], OPTIONS[b])
    }
    runs: list[dict[str, str]] = []
    while missing:
        chosen = {"compile": "true" if len(runs) < COMPILED else "false"}
        for name in names[1:]:
            chosen[name] = max(OPTIONS[name], key=partial(gain, name, chosen=chosen, missing=missing))
        pairs = {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
        assert pairs & missing, "the run adds no pair"
        missing -= pairs
        runs.append(chosen)
    return runs


def gain(name: str, value: str, chosen: dict[str, str], missing: set[frozenset[tuple[str, str]]]) -> tuple[int, int]:
    """Return the missing pairs of a value with the chosen values, then those with any value."""
    new = sum(frozenset([(name, value), pair]) in missing for pair in chosen.items())
    return new, sum((name, value) in pair for pair in missing)


@pytest.mark.timeout(900)  # compiling takes minutes on two busy cores
@pytest.mark.parametrize("options", combinations(), ids=lambda options: "-".join(options.values()))
def test_options_work_together(
    options: dict[str, str], images: Path, tmp_path: Path, run_program: Callable[..., Any]
) -> None:
    """Losses are finite, all images are validated, and the EMA too if it is enabled."""
    if options["loader"] == "dali" and not dali_is_installed():
        pytest.skip("needs nvidia-dali")
    overrides = [*SMALL_NETWORK, *(f"{name}={value}" for name, value in options.items())]
    size = ["image_size=32", "global_batch_size=8", "eval_batch_size=31", "log_every_steps=1", "max_steps=2"]
    size += ["report.enabled=false"]
    # Vector code and its optimisation, as in test_compile.py, take longer.
    with inductor.patch({"cpp.vec_isa_ok": False, "aot_inductor.debug_compile": True}):
        result = run_program("train", f"data.root={images}", f"run_dir={tmp_path / 'run'}", *size, *overrides)
    assert result["images"] == VAL_IMAGES
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert ("ema_top1" in result) == (options["ema"] == "enabled")
