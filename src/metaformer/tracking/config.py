"""Configuration of tracking."""

import math
from dataclasses import dataclass, field
from enum import Enum

from metaformer.errors import UserError


class WandbMode(Enum):
    """Whether a run goes to Weights & Biases."""

    auto = "auto"  # online where there are a key and a server, else offline
    online = "online"
    offline = "offline"
    off = "off"


@dataclass
class TrackingConfig:
    """Console, log.txt and metrics.jsonl are always on; this is wandb."""

    wandb: WandbMode = WandbMode.auto
    project: str = "metaformer"
    entity: str | None = None
    name: str | None = None  # None: the run folder's name
    tags: list[str] = field(default_factory=list)
    artifacts: bool = True  # keep the best and the last checkpoint in wandb
    open_seconds: float = 60.0  # after which wandb that has not opened is reported, and not waited for at the end
    close_seconds: float = 300.0  # without progress, to finish uploads when training has ended

    def __post_init__(self) -> None:
        for name in ("open_seconds", "close_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"tracking.{name}={getattr(self, name):g}: must be a number of seconds above 0")
