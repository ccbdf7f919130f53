"""The run folder: what was run, with which configuration, on what."""

import difflib
import itertools
import json
import socket
import sys
import time
import uuid
from pathlib import Path

from metaformer.errors import UserError
from metaformer.files import write_text_whole
from metaformer.runtime import Runtime
from metaformer.tracking.environment import describe_environment
from metaformer.tracking.lock import LOCK_FILE


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
        write_text_whole(file, "")
    except OSError as error:
        raise UserError(f"run_dir={file.parent}: cannot be written ({error.strerror or error})") from error


def open_run_folder(run_dir: Path, config: str) -> list[str]:
    """Write into the folder config.yaml, overrides.yaml and environment.json; earlier ones are kept under a date.

    Returns:
        The lines by which the configuration differs from the folder's earlier one.

    Raises:
        UserError: the folder cannot be written.
    """
    contents = {
        "config.yaml": config,
        "overrides.yaml": "".join(f"- {json.dumps(override)}\n" for override in sys.argv[1:]),
        "environment.json": json.dumps(describe_environment(), indent=2) + "\n",
    }
    changed: list[str] = []
    try:
        for name, content in contents.items():
            path = run_dir / name
            earlier = path.read_text() if path.exists() else content
            if earlier != content:
                path.rename(_name_for_earlier(path))
                if name == "config.yaml":
                    lines = difflib.ndiff(earlier.splitlines(), content.splitlines())
                    changed = [line[2:].strip() for line in lines if line.startswith("+ ")]
            write_text_whole(path, content)
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: cannot be written ({error.strerror or error})") from error
    return changed


def _name_for_earlier(path: Path) -> Path:
    """NAME.until-DATE.SUFFIX, with a number where two changes fall into one second."""
    stem = f"{path.stem}.until-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(free for name in names if not (free := path.with_name(name + path.suffix)).exists())
