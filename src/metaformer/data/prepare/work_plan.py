"""Interruptible parallel work: its division into tasks, and a record of its input that a resume must match."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from pathlib import Path
from typing import TypeVar

from metaformer.errors import UserError
from metaformer.files import write_text_atomically

Item = TypeVar("Item")
Task = TypeVar("Task")
Result = TypeVar("Result")


def split_by_size(
    items: Iterable[Item], limit: int, size: Callable[[Item], int], max_items: int | None = None
) -> Iterator[list[Item]]:
    """Yield groups of consecutive items whose sizes add up to at most `limit`; a larger item is a group of its own."""
    part: list[Item] = []
    free = limit
    for item in items:
        if part and (size(item) > free or len(part) == max_items):
            yield part
            part, free = [], limit
        part.append(item)
        free -= size(item)
    yield part


def run_tasks(
    work: Callable[[Task], Result], tasks: Sequence[Task], pool: Executor, report: Callable[[Task], None]
) -> list[Result]:
    """Run `work` on all tasks in the pool; return the results in the order of the tasks.

    Args:
        report: called with each task when it is done.
    """
    futures = {pool.submit(work, task): number for number, task in enumerate(tasks)}
    results: dict[int, Result] = {}
    for future in as_completed(futures):
        number = futures[future]
        results[number] = future.result()
        report(tasks[number])
    return [results[number] for number in range(len(tasks))]


def check_same_plan(folder: Path, description: Iterable[str]) -> None:
    """Record what is written to `folder`; raise an error if an interrupted call recorded something else.

    Args:
        description: options and images.
    """
    digest = hashlib.sha256()
    for line in description:
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    plan = _plan_file(folder)
    if plan.exists() and plan.read_bytes() != digest.hexdigest().encode():
        raise UserError(f"{folder.parent}: was started with other images or other options; repeat that command, or "
                        "remove it")  # fmt: skip
    write_text_atomically(plan, digest.hexdigest())


def finish_plan(folder: Path) -> None:
    """Remove the record from a complete folder."""
    _plan_file(folder).unlink(missing_ok=True)  # another process may have done the same work


def cannot_write(path: Path, error: OSError) -> UserError:
    """Return the error for a file that cannot be written, for example on a full disk. Completed work is kept."""
    return UserError(f"{path}: cannot be written ({error.strerror or error}); the same command resumes from here")


def _plan_file(folder: Path) -> Path:
    return folder / "plan.sha256"
