"""From a data set on disk, of folders or shards, to a copy of it of folders or shards."""

import itertools
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from metaformer.data.index.image_index import find_images, load_index
from metaformer.data.prepare.class_folder import write_class_folder
from metaformer.data.prepare.pieces import Piece, pieces_of
from metaformer.data.prepare.processes import Report, worker_processes
from metaformer.data.prepare.reencoding import Cost, measure_cost
from metaformer.data.prepare.shard_writer import Packing, write_shards
from metaformer.errors import UserError

SPLITS = ("train", "val")


def convert(source: Path, out: Path, packing: Packing | None, workers: int, report: Report) -> dict[str, Cost]:
    """Make `out` with the splits that `source` has, as folders or, with a `packing`, as shards.

    Returns:
        What reducing cost each split; empty without it.

    Raises:
        UserError: `source` is no data set, an image cannot be read or stored, or the disk is full. What was done so far
            is kept beside `out`, and `out` does not exist.
    """
    indices = {split: load_index(source, split) for split in SPLITS if (source / split).is_dir()}
    if not indices:
        raise UserError(f"--from {source}: no {' and no '.join(SPLITS)} folder in it; give the folder that holds them")
    partial, costs = partial_folder(out, packing), {}
    with worker_processes(workers) as pool:
        for split, index in indices.items():
            cost = write_split(pieces_of(index), partial / split, packing, pool, report)
            if cost is not None:
                costs[split] = cost
            elif find_images(partial / split).fingerprint != index.fingerprint:
                raise UserError(f"{source / split}: has changed while it was read; remove {partial} and begin again")
    finish(partial, out)
    return costs


def convert_built(
    build: Callable[[Path], None], out: Path, packing: Packing, workers: int, report: Report
) -> dict[str, Cost]:
    """`convert` of what `build` makes at a path that it is given; it is removed afterwards.

    Raises:
        UserError: as `convert` and `build`.
    """
    folders = out.with_name(f".{out.name}.folders")
    if not folders.exists():  # else an earlier call made it, whole, and was interrupted later
        build(folders)
    costs = convert(folders, out, packing, workers, report)
    shutil.rmtree(folders)
    return costs


def write_split(
    pieces: list[Piece], folder: Path, packing: Packing | None, pool: ProcessPoolExecutor, report: Report
) -> Cost | None:
    """Make one split; returns what reducing its images cost.

    Raises:
        UserError: as `convert`.
    """
    if packing is not None:
        packed = write_shards(pieces, folder, packing, pool, report)
        return None if packing.max_side is None else measure_cost(packed, folder)
    runs = [(name, list(run)) for name, run in itertools.groupby(pieces, key=lambda piece: piece.class_name)]
    futures = [pool.submit(write_class_folder, folder / name, run) for name, run in runs]
    images = 0
    for future in as_completed(futures):
        images += future.result()
        report(f"copying {folder.name}", images, len(pieces))
    return None


def partial_folder(out: Path, packing: Packing | None) -> Path:
    """Where `out` grows, and what an interrupted call left is found."""
    return out.with_name(f".{out.name}.{'partial' if packing is None else 'shards'}")


def finish(partial: Path, out: Path) -> None:
    """Let `out` appear.

    Raises:
        UserError: it cannot be renamed, as where another process has just made it.
    """
    os.sync()
    try:
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be made from {partial} ({error.strerror or error})") from error
