"""Every advertised option together with every value of every other one, in pairs: two steps and a validation each."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from metaformer.data.load.dali_loader import dali_is_installed
from metaformer.models.variants import VARIANTS
from tests.conftest import rows
from tests.faults.program import SMALL

OPTIONS = {
    "compile": ("true", "false"),
    "model.fused": ("true", "false"),
    "channels_last": ("true", "false"),
    "precision": ("bf16", "fp32"),
    "ema": ("enabled", "disabled"),
    "accumulation_steps": ("1", "2"),
    "loader": ("torch", "pil", "dali"),
    "augmentation": ("paper", "light", "none"),
    "tracking": ("offline", "local"),
    "optimizer": ("adamw", "lamb", "sgd"),
    "schedule": ("cosine", "cosine_per_step"),
    "clip_grad_norm": ("null", "1.0"),
    "workers": ("0", "2"),
}
COMPILED = 3  # runs with compile=true, which take the longest: as few as its pairs with options of three values need


def combinations() -> list[dict[str, str]]:
    """Runs that contain every pair of values: greedily, each run takes the values that add the most pairs."""
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
        assert pairs & missing, "a run that adds nothing"
        missing -= pairs
        runs.append(chosen)
    return runs


def gain(name: str, value: str, chosen: dict[str, str], missing: set[frozenset[tuple[str, str]]]) -> tuple[int, int]:
    """Missing pairs of a value with those chosen so far, and with any."""
    new = sum(frozenset([(name, value), pair]) in missing for pair in chosen.items())
    return new, sum((name, value) in pair for pair in missing)


@pytest.mark.timeout(900)  # compiling takes minutes on two busy cores
@pytest.mark.parametrize("options", combinations(), ids=lambda options: "-".join(options.values()))
def test_options_work_together(
    options: dict[str, str], images: Path, tmp_path: Path, run_program: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The losses are numbers, all images are validated, and where the average is on it is validated too."""
    if options["loader"] == "dali" and not dali_is_installed():
        pytest.skip("needs nvidia-dali")
    monkeypatch.setitem(VARIANTS, "poolformer_s12", SMALL)
    overrides = [f"{name}={value}" for name, value in options.items()]
    size = ["image_size=32", "global_batch_size=8", "eval_batch_size=31", "log_every_steps=1", "max_steps=2"]
    result = run_program("train", f"data.root={images}", f"run_dir={tmp_path / 'run'}", *size, *overrides)
    assert result["images"] == 403
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert ("ema_top1" in result) == (options["ema"] == "enabled")
