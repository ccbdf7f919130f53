"""The run folder: records of a run's configuration, command and environment, and of changes to them."""

import itertools
import json
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from metaformer.errors import UserError, one_line
from metaformer.files import to_json, write_text_atomically
from metaformer.runtime import Runtime
from metaformer.tracking.environment import describe_environment
from metaformer.tracking.line_file import read_objects
from metaformer.tracking.lock import LOCK_FILE

CHANGES_FILE = "changes.jsonl"
_RUN_MARKS = (LOCK_FILE, "config.yaml", "checkpoints")  # a folder with one of them has a run
# Raised by OmegaConf for text that is not YAML, not a configuration, or nested too deeply.
_PARSE_ERRORS = (
    YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, AssertionError, RecursionError
)  # fmt: skip


def check_is_for_runs(run_dir: Path) -> None:
    """Raise an error if the folder holds other folders and no run: it may be a data set, or contain several runs.

    Files alone are accepted: a launcher may write its log there.
    """
    try:
        folders = sorted(entry.name for entry in run_dir.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:  # there is no such folder yet, or it cannot be read, which is reported when it is written
        return
    foreign = [name for name in folders if name != "lost+found"]  # which a mounted file system may have
    if foreign and not any((run_dir / name).exists() for name in _RUN_MARKS):
        more = ", ..." if len(foreign) > 3 else ""
        raise UserError(
            f"run_dir={run_dir}: holds other folders ({', '.join(foreign[:3])}{more}) and no run; give a new or empty "
            "folder"
        )


def check_empty(run_dir: Path) -> None:
    """Raise an error if the run folder is not empty; for runs that must not resume."""
    if any(entry.name != LOCK_FILE for entry in run_dir.iterdir()):
        raise UserError(f"run_dir={run_dir}: not empty, and resume=never; give another run_dir, or resume=auto")


def check_shared(run_dir: Path, runtime: Runtime, timeout: float = 5.0) -> None:
    """Raise an error unless all ranks see files that rank 0 writes, such as the checkpoint to resume from.

    Args:
        timeout: Seconds that a network file system may take to show a new file.
    """
    if runtime.world_size == 1:
        return
    token = run_dir / f".shared-{runtime.from_main(lambda: uuid.uuid4().hex)}"
    runtime.main_only(lambda: _write(token), None)
    end = time.monotonic() + timeout
    while not (seen := token.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    hosts = runtime.gather_objects((seen, socket.gethostname()))
    runtime.main_only(token.unlink, None)
    for rank, (sees, host) in enumerate(hosts):
        if not sees:
            raise UserError(
                f"run_dir={run_dir}: rank {rank} on {host} does not see files that rank 0 writes there on "
                f"{hosts[0][1]}; give a folder that all nodes share"
            )


def _write(file: Path) -> None:
    try:
        write_text_atomically(file, "")
    except OSError as error:
        raise UserError(f"run_dir={file.parent}: cannot be written ({error.strerror or error})") from error


def open_run_folder(run_dir: Path, config: str, step: int, derived: dict[str, Any] | None = None) -> list[str]:
    """Write config.yaml, overrides.yaml and environment.json. Earlier versions that differ get a date in their names.

    If configuration or derived values differ from those in the folder, a line is appended to CHANGES_FILE: an object
    with `step`, `time` and `changes`, which maps field names to [before, now].

    Args:
        config: The configuration as YAML.
        step: Step at which training resumes.
        derived: Values that follow from the configuration and the number of ranks; stored in environment.json.

    Returns:
        A line for each field that differs, with its name, its earlier and its new value.
    """
    environment = describe_environment() | {"derived": derived or {}}
    contents = {
        "config.yaml": config,
        "overrides.yaml": "".join(f"- {json.dumps(override)}\n" for override in sys.argv[1:]),
        "environment.json": to_json(environment, indent=2) + "\n",
    }
    try:
        changes = dict(_all_changes(run_dir, contents))
        if changes:
            _record(run_dir / CHANGES_FILE, step, changes)
        for name, content in contents.items():
            path = run_dir / name
            earlier = path.read_bytes() if path.exists() else content.encode()
            if earlier != content.encode():
                path.rename(_backup_path(path))
            write_text_atomically(path, content)
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: cannot be written ({error.strerror or error})") from error
    return [f"{name}: {_text(before)} -> {_text(now)}" for name, (before, now) in changes.items()]


def _all_changes(run_dir: Path, contents: dict[str, str]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield changed fields of the configuration, then changed derived values, which older run folders lack."""
    path = run_dir / "config.yaml"
    content = contents[path.name].encode()
    if path.exists() and path.read_bytes() != content:
        yield from _changes(_parse(path, path.read_bytes()), _parse(path, content))
    path = run_dir / "environment.json"
    if path.exists():
        now = json.loads(contents[path.name])["derived"]
        try:
            before = json.loads(path.read_bytes()).get("derived") or now
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: damaged ({one_line(error)}); move it away") from error
        yield from _changes(before, now)


def parse_config(content: bytes) -> dict[str, Any]:
    """Parse the config.yaml of a run folder into nested dicts, without resolving interpolations.

    Raises:
        ValueError: The file is damaged; the message is one line.
    """
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.create(content.decode()))
        if not isinstance(parsed, dict) or not all(isinstance(name, str) for name in parsed):
            raise ValueError("not a mapping of field names")
        return parsed
    except _PARSE_ERRORS as error:
        raise ValueError(one_line(error) or "not the YAML of a run") from error


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        return parse_config(content)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); move it away") from error


def _changes(before: dict[str, Any], now: dict[str, Any], parent: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the dotted name and both values of each field that differs; a missing field counts as null."""
    for name in before | now:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{parent}{name}.")
        elif old != new:
            yield f"{parent}{name}", (old, new)


def _record(path: Path, step: int, changes: dict[str, tuple[Any, Any]]) -> None:
    entry = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "changes": changes}
    earlier = path.read_text().rstrip("\n") + "\n" if read_objects(path, {"step": int, "changes": dict}) else ""
    write_text_atomically(path, earlier + to_json(entry) + "\n")


def _text(value: Any) -> str:
    """Format a value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _backup_path(path: Path) -> Path:
    """Return an unused path NAME.until-DATE.SUFFIX, with a number if there are several in the same second."""
    stem = f"{path.stem}.until-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(free for name in names if not (free := path.with_name(name + path.suffix)).exists())
