"""The run folder: what was run, with which configuration, on what."""

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
# What OmegaConf raises on what is not YAML, not a configuration, or nested too deeply.
_DAMAGE = (
    YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, AssertionError, RecursionError
)  # fmt: skip


def check_empty(run_dir: Path) -> None:
    """For a run that must not continue another.

    Raises:
        UserError: something is there.
    """
    if any(entry.name != LOCK_FILE for entry in run_dir.iterdir()):
        raise UserError(f"run_dir={run_dir}: not empty, and resume=never; give another run_dir, or resume=auto")


def check_shared(run_dir: Path, runtime: Runtime, patience: float = 5.0) -> None:
    """All nodes must see what rank 0 writes: each rank reads the checkpoint that it resumes from.

    Args:
        patience: seconds that a network file system may take to show a new file.

    Raises:
        UserError: a node does not see it.
    """
    if runtime.world_size == 1:
        return
    token = run_dir / f".shared-{runtime.from_main(lambda: uuid.uuid4().hex)}"
    runtime.main_only(lambda: _write(token), None)
    end = time.monotonic() + patience
    while not (seen := token.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    hosts = runtime.gather_objects((seen, socket.gethostname()))
    runtime.main_only(token.unlink, None)
    for rank, (sees, host) in enumerate(hosts):
        if not sees:
            raise UserError(
                f"run_dir={run_dir}: rank {rank} on {host} does not see what rank 0 writes there on {hosts[0][1]}; "
                "give a folder that all nodes share"
            )


def _write(file: Path) -> None:
    try:
        write_text_atomically(file, "")
    except OSError as error:
        raise UserError(f"run_dir={file.parent}: cannot be written ({error.strerror or error})") from error


def open_run_folder(run_dir: Path, config: str, step: int, derived: dict[str, Any] | None = None) -> list[str]:
    """Write config.yaml, overrides.yaml and environment.json into the folder; earlier ones are kept under a date.

    Where the configuration, or what is derived, differs from the folder's earlier one, CHANGES_FILE gets a line: an
    object with `step`, `time` and `changes`, an object of [before, now] by the fields' names.

    Args:
        config: as YAML.
        step: where training continues.
        derived: what follows from the configuration and the number of ranks; environment.json keeps it.

    Returns:
        A text for each field that differs: its name, before and now.

    Raises:
        UserError: the folder cannot be written, or its config.yaml, CHANGES_FILE or environment.json is damaged.
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
                path.rename(_name_for_earlier(path))
            write_text_atomically(path, content)
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: cannot be written ({error.strerror or error})") from error
    return [f"{name}: {_text(before)} -> {_text(now)}" for name, (before, now) in changes.items()]


def _all_changes(run_dir: Path, contents: dict[str, str]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Fields of the configuration that differ, then what is derived, which folders of earlier versions do not have."""
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
            raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); move it away") from error
        yield from _changes(before, now)


def parse_config(content: bytes) -> dict[str, Any]:
    """Return a configuration that a run folder keeps, nested, interpolations as they are written.

    Raises:
        ValueError: it is damaged; says how, in one line.
    """
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.create(content.decode()))
        if not isinstance(parsed, dict) or not all(isinstance(name, str) for name in parsed):
            raise ValueError("not fields by name")
        return parsed
    except _DAMAGE as error:
        raise ValueError(one_line(error) or "not YAML that a run writes") from error


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        return parse_config(content)
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); move it away") from error


def _changes(before: dict[str, Any], now: dict[str, Any], parent: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Dotted names of the fields that differ, each with both values; a field that is not there counts as null."""
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
    """A value as the command line has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _name_for_earlier(path: Path) -> Path:
    """NAME.until-DATE.SUFFIX, with a number where two changes fall into one second."""
    stem = f"{path.stem}.until-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(free for name in names if not (free := path.with_name(name + path.suffix)).exists())
