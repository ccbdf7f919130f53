"""The run folder: what was run, with which configuration, on what."""

import difflib
import itertools
import json
import sys
import time
from pathlib import Path

from metaformer.errors import UserError
from metaformer.files import write_text_whole
from metaformer.tracking.environment import describe_environment
from metaformer.tracking.lock import LOCK_FILE


def check_empty(run_dir: Path) -> None:
    """For a run that must not continue another.

    Raises:
        UserError: something is there.
    """
    if any(entry.name != LOCK_FILE for entry in run_dir.iterdir()):
        raise UserError(f"run_dir={run_dir}: not empty, and resume=never; give another run_dir, or resume=auto")


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
