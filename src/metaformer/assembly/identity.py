"""Identity of a run: the settings that must not change when it resumes."""

import json
from dataclasses import replace
from typing import Any

from metaformer.assembly.splits import Splits
from metaformer.config import TrainConfig
from metaformer.models.config import Preprocessing


def run_identity(config: TrainConfig, images: Preprocessing, splits: Splits, teacher: str | None) -> dict[str, Any]:
    """Return the values that must stay the same when a run resumes, by the names that an error shows."""
    return {
        "model": config.model.name,
        "seed": config.seed,
        "global_batch_size": config.global_batch_size,
        "fill_last_batch": config.fill_last_batch,
        "data": splits.train.fingerprint[:16],
        "data.balance": config.data.balance.value,
        "augmentation.repeats": config.augmentation.repeats,
        "loader.decode": config.loader.decode.value,
        "distill.teacher": teacher,
        **images.settings,
        **_parts_identity(config),
        "model.freeze": config.model.freeze,
        "layer-wise learning rates": config.optimizer.layer_decay is not None,
        "optimizer": f"{config.optimizer.name} of {config.optimizer.implementation.value}",
    }


def _parts_identity(config: TrainConfig) -> dict[str, str]:
    """Return the parts of a user's own network, without the rates of drop path and dropout, which may change."""
    composition, target = config.model.composition, config.model.target
    if target is not None:
        return {"model.target": target, "model.options": json.dumps(config.model.options, sort_keys=True)}
    if composition is None:
        return {}
    return {"model parts": replace(composition, drop_path_rate=0.0, head_dropout=0.0).to_json()}
