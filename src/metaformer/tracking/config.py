"""Configuration of tracking."""

from dataclasses import dataclass, field
from enum import Enum


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
    close_seconds: float = 300.0  # for what has not gone up yet when training has ended
