"""Configuration of tracking."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from metaformer.errors import UserError
from metaformer.targets import check_target


class WandbMode(Enum):
    """Mode of recording in Weights & Biases."""

    auto = "auto"  # online if there is a key and the server is reachable, else offline
    online = "online"
    offline = "offline"
    off = "off"


@dataclass
class TrackingConfig:
    """Configuration of wandb and TensorBoard; console, log.txt and metrics.jsonl are always on."""

    wandb: WandbMode = WandbMode.auto  # how runs are recorded in Weights & Biases; tracking=wandb|offline|local sets it
    project: str = "metaformer"  # project in wandb
    entity: str | None = None  # user or team of wandb; None: the key's own
    name: str | None = None  # None: the run folder's name
    tags: list[str] = field(default_factory=list)  # tags of the run in wandb
    artifacts: bool = True  # upload the best and the last checkpoint
    tensorboard: bool = False  # also write event files, with or without wandb
    target: str | None = None  # package.module:Class of a tracker of your own, called with run_dir and options
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of target: tracking.options.file=a.csv
    # Time after which a tracker that has not opened is reported, and not awaited when training ends.
    open_seconds: float = 60.0
    close_seconds: float = 300.0  # after training, give up uploads that make no progress for this long

    def __post_init__(self) -> None:
        if self.target is not None:
            check_target("tracking.target", self.target)
        elif self.options:
            raise UserError(f"tracking.options={self.options}: belongs to a tracker of your own; give tracking.target")
        for name in ("open_seconds", "close_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"tracking.{name}={getattr(self, name):g}: must be a number of seconds above 0")
