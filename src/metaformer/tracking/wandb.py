"""Weights & Biases: online where it can be, offline otherwise; never in the way of training."""

import importlib.util
import os
import socket
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from metaformer.errors import UserError
from metaformer.files import write_text_whole
from metaformer.tracking.config import TrackingConfig, WandbMode
from metaformer.tracking.tracker import NullTracker, Row

CONNECT_SECONDS = 3.0  # to find out whether a server is there
INIT_SECONDS = 30.0  # for the server to open the run


class WandbTracker(NullTracker):
    """One wandb run for one run folder, also over interruptions: its id is kept in RUN/wandb_id.

    Args:
        settings: what the run records as its configuration.
    """

    def __init__(self, config: TrackingConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        import wandb

        self._wandb: Any = wandb
        self._artifacts = config.artifacts
        self._run: Any = None  # None once wandb has failed
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            write_text_whole(id_file, uuid.uuid4().hex[:8] + "\n")
        options = {
            "id": id_file.read_text().strip(),
            "resume": "allow",
            "project": config.project,
            "entity": config.entity,
            "name": config.name or run_dir.name,
            "tags": config.tags,
            "dir": str(run_dir),
            "config": settings,
        }
        try:
            self._run = self._start(config.wandb, options)
        except Exception as error:  # any failure of a service that training does not need
            self._give_up(error)

    def metrics(self, row: Row) -> None:
        counts = {name: row[name] for name in ("epoch", "step", "samples")}
        figures = {f"{row['kind']}/{name}": row[name] for name in row.keys() - counts.keys() - {"kind"}}
        if row["kind"] == "final":
            self._guard(lambda run: run.summary.update(figures))
        else:
            self._guard(lambda run: run.log(counts | figures))

    def picture(self, name: str, file: Path) -> None:
        self._guard(lambda run: run.log({name: self._wandb.Image(str(file))}))

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        def log(run: Any) -> None:
            artifact = self._wandb.Artifact(f"checkpoint-{run.id}", type="model")
            artifact.add_dir(str(folder), policy="immutable", skip_cache=True)  # refers to the files, copies none
            run.log_artifact(artifact, aliases=aliases)

        if self._artifacts:
            self._guard(log)

    def close(self, failed: bool) -> None:
        self._guard(lambda run: run.finish(exit_code=int(failed)))

    def _start(self, mode: WandbMode, options: dict[str, Any]) -> Any:
        settings = self._wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS)
        chosen = _choose_mode(mode, self._wandb, self._wandb.setup(settings).settings.base_url)
        try:
            run = self._wandb.init(mode=chosen, settings=settings, **options)
        except self._wandb.errors.CommError as error:
            if chosen != "online":
                raise
            _warn(f"wandb's server does not open the run; going on offline ({_one_line(error)})")
            self._wandb.teardown()  # else the run's id counts as in use
            self._wandb.setup(settings)
            run = self._wandb.init(mode="offline", settings=settings, **options)
        # Over images seen, so that runs with other batch sizes compare.
        for name in ("train/*", "validation/*"):
            run.define_metric(name, step_metric="samples")
        for name in ("validation/top1", "validation/ema_top1"):
            run.define_metric(name, step_metric="samples", summary="max")
        return run

    def _guard(self, act: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:  # as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        _warn(f"wandb failed and is off from here; training goes on ({_one_line(error)})")


def check_wandb() -> None:
    """Before training starts.

    Raises:
        UserError: wandb is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError("tracking: wandb is not installed; `uv pip install wandb`, or tracking=local")


def _choose_mode(mode: WandbMode, wandb: Any, server: str) -> str:
    if mode is not WandbMode.auto:
        return str(mode.value)
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    return "online" if wandb.login(prompt=False, verify=False) and _answers(server) else "offline"


def _answers(server: str) -> bool:
    url = urlparse(server)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        with socket.create_connection((url.hostname or "", port), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
