"""Tracker for Weights & Biases, which runs in a separate process (`tracker_process`)."""

import importlib.util
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from metaformer.errors import UserError, one_line, warn
from metaformer.files import write_text_atomically
from metaformer.interfaces import Row
from metaformer.tracking.config import TrackingConfig, WandbMode
from metaformer.tracking.service import Opened, child_processes
from metaformer.tracking.tracker import NullTracker

CONNECT_SECONDS = 3.0  # timeout for a connection to the server
INIT_SECONDS = 30.0  # timeout for opening the run on the server
POLL_SECONDS = 5.0  # timeout for asking the service about the progress of an upload
MODES = ("online", "offline", "disabled", "shared", "run", "dryrun")  # values of WANDB_MODE that wandb accepts
SUPERSEDED_PREFIX = "superseded-"  # prefix of a wandb folder whose rows are all in a later folder too


class WandbTracker(NullTracker):
    """The wandb run of a run folder, continued by resumed runs. Its id is stored in RUN/wandb_id."""

    def __init__(self) -> None:
        self._service: int | None = None  # the process that wandb starts
        self._ending = self._closing = False  # whether the service is being ended, and the run closed

    def open(
        self,
        arguments: list[str],
        config: TrackingConfig,
        run_dir: Path,
        settings: dict[str, Any],
        earlier_folders: list[str],
        first_step: int | None,
    ) -> Opened:
        """Start or resume the wandb run.

        Args:
            arguments: The training program's sys.argv.
            settings: Configuration that wandb records.
            earlier_folders: Names of the folders in RUN/wandb when training started. Any newer folder belongs to a
                wandb process that died, and all its rows will be sent again.
            first_step: Number of rows that the server had when training started; None at the first start, or if that
                was offline.
        """
        sys.argv[:] = arguments  # wandb records sys.argv
        # wandb's own error reports block without a network, and forever if wandb-core dies while it starts.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb
        from wandb.analytics.opentelemetry import opentelemetry_proxy

        opentelemetry_proxy.disable()
        self._wandb: Any = wandb
        self._artifacts = config.artifacts
        superseded = [name for name in wandb_folders(run_dir) if name not in earlier_folders]
        if superseded:
            time.sleep(1)  # wandb's folder names have a resolution of a second
        self._run = self._start(config, run_dir, settings)
        online = not self._run.offline
        self._skip = self._run.starting_step - first_step if online and first_step is not None else 0
        for name in superseded:
            (run_dir / "wandb" / name).rename(run_dir / "wandb" / f"{SUPERSEDED_PREFIX}{name}")
        folder = Path(self._run.settings.sync_dir)
        self._log = folder / f"run-{self._run.id}.wandb"
        return Opened(f"wandb sync {run_dir / 'wandb' / folder.name}", self._run.starting_step if online else None)

    def metrics(self, row: Row) -> None:
        counts = {name: row[name] for name in ("epoch", "step", "samples")}
        figures = {f"{row['kind']}/{name}": row[name] for name in row.keys() - counts.keys() - {"kind"}}
        if row["kind"] == "final":
            self._run.summary.update(figures)
        else:
            self._append(lambda: counts | figures)

    def picture(self, name: str, file: Path) -> None:
        self._append(lambda: {name: self._wandb.Image(str(file))})

    def checkpoint(self, folder: Path, aliases: list[str]) -> None:
        if self._artifacts:
            artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", type="model")
            artifact.add_dir(str(folder), policy="immutable", skip_cache=True)  # without copying the files
            self._run.log_artifact(artifact, aliases=aliases)

    def close(self, failed: bool) -> None:
        self._closing = True
        self._run.finish(exit_code=int(failed))
        self._end_service()

    def check(self) -> None:
        """Raise an error if wandb's service process has died."""
        service = self._service = self._service or _find_service()
        if service is None or self._ending:
            return
        how = "has ended"
        with suppress(ChildProcessError):  # wandb has already collected its exit status
            ended = os.waitid(os.P_PID, service, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            how = f"died ({'exit code' if ended.si_code == os.CLD_EXITED else 'signal'} {ended.si_status})"
        if self._service == service and not self._ending:
            raise RuntimeError(f"its service, wandb-core, {how}")

    def bytes_moved(self) -> int:
        """Return the bytes written to disk (offline) or sent to the server (online) since closing began."""
        if not self._closing or self._ending or self._service is None:
            return 0
        if self._run.offline:
            return self._log.stat().st_size
        try:
            handle = self._run._interface.deliver_poll_exit()
            answer = handle.wait_or(timeout=POLL_SECONDS).response.poll_exit_response
            return int(answer.pusher_stats.uploaded_bytes)
        except Exception:
            if self._ending:  # since the check above
                return 0
            raise

    def _append(self, row: Callable[[], dict[str, Any]]) -> None:
        """Add a row to the history, unless the server already has it from an earlier start that died."""
        if self._skip > 0:
            self._skip -= 1
        else:
            self._run.log(row())

    def _start(self, config: TrackingConfig, run_dir: Path, run_config: dict[str, Any]) -> Any:
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            write_text_atomically(id_file, uuid.uuid4().hex[:8] + "\n")
        options = {
            "id": id_file.read_text().strip(),
            "resume": "allow",
            "project": config.project,
            "entity": config.entity,
            "name": config.name or run_dir.name,
            "tags": config.tags,
            "dir": str(run_dir),
            "config": run_config,
        }
        # Program and system metrics of the training process, not of this one.
        training = {"program": sys.argv[0], "x_stats_pid": os.getppid()}
        settings = self._wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS, **training)
        chosen = self._choose_mode(config.wandb, settings)
        try:
            run = self._wandb.init(mode=chosen, settings=settings, **options)
        except Exception as error:
            if chosen == "offline":
                raise
            _warn(f"cannot go online, the run is offline ({one_line(error)})")
            self._end_service()  # otherwise the run's id counts as in use
            self._wandb.setup(settings)
            run = self._wandb.init(mode="offline", settings=settings, **options)
        # Plot over samples, so that runs with different batch sizes can be compared.
        for name in ("train/*", "validation/*"):
            run.define_metric(name, step_metric="samples")
        for name in ("validation/top1", "validation/ema_top1"):
            run.define_metric(name, step_metric="samples", summary="max")
        return run

    def _end_service(self) -> None:
        self._ending = True
        self._wandb.teardown()
        self._service = None
        self._ending = False

    def _choose_mode(self, mode: WandbMode, settings: Any) -> str:
        requested = os.environ.get("WANDB_MODE")
        if requested is not None and requested not in MODES:
            del os.environ["WANDB_MODE"]  # wandb raises errors for an unknown mode
            _warn(f"WANDB_MODE={requested!r} is not one of {', '.join(MODES)}; the run is offline")
            requested = "offline"
        server = self._wandb.setup(settings).settings.base_url
        if mode is not WandbMode.auto:
            return str(mode.value)
        if requested == "disabled":
            _warn("WANDB_MODE=disabled: nothing is recorded")
        if requested is not None:
            return requested
        try:
            return "online" if self._wandb.login(prompt=False, verify=False) and _is_reachable(server) else "offline"
        except self._wandb.errors.AuthenticationError as error:
            _warn(f"the key cannot be used, the run is offline ({one_line(error)})")
            return "offline"


def check_wandb() -> None:
    """Raise an error if wandb is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("tracking: wandb is not installed; run `uv pip install wandb`, or use tracking=local")


def wandb_folders(run_dir: Path) -> list[str]:
    """Return the names of the run's wandb folders, one per start."""
    return [folder.name for pattern in ("run-*", "offline-run-*") for folder in (run_dir / "wandb").glob(pattern)]


def _find_service() -> int | None:
    """Return wandb's service process, or None if there is none, as in a disabled run."""
    for process in child_processes(os.getpid()):
        try:
            if Path(f"/proc/{process}/comm").read_text() == "wandb-core\n":
                return process
        except OSError:
            continue  # it has ended
    return None


def _is_reachable(server: str) -> bool:
    url = urlparse(server)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        with socket.create_connection((url.hostname or "", port), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False


def _warn(text: str) -> None:
    warn(f"wandb: {text}")
