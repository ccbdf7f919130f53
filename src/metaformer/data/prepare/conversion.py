"""Conversion of a data set on disk to folders or shards."""

import itertools
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from metaformer.data.index.image_index import find_images, load_index
from metaformer.data.prepare.class_folder import write_class_folder
from metaformer.data.prepare.processes import ProgressCallback, worker_processes
from metaformer.data.prepare.reencoding import ReencodingEffect, measure_reencoding
from metaformer.data.prepare.shard_writer import Packing, write_shards
from metaformer.data.prepare.source_images import SourceImage, list_source_images
from metaformer.errors import UserError

SPLITS = ("train", "val")


def convert(
    source: Path, out: Path, packing: Packing | None, workers: int, report: ProgressCallback
) -> dict[str, ReencodingEffect]:
    """Write the splits of `source` to `out`, as shards if `packing` is given, otherwise as folders.

    Returns:
        The effect of reducing the images of each split; empty if images are not reduced.

    Raises:
        UserError: `source` is not a data set, an image cannot be read or stored, or the disk is full. `out` then does
            not exist, and the work done so far is kept beside it.
    """
    indices = {split: load_index(source, split) for split in SPLITS if (source / split).is_dir()}
    if not indices:
        raise UserError(f"--from {source}: contains no {' or '.join(SPLITS)} folder; give the folder with the splits")
    partial, effects = partial_folder(out, packing), {}
    with worker_processes(workers) as pool:
        for split, index in indices.items():
            effect = write_split(list_source_images(index), partial / split, packing, pool, report)
            if effect is not None:
                effects[split] = effect
            elif find_images(partial / split).fingerprint != index.fingerprint:
                raise UserError(f"{source / split}: changed while it was being read; remove {partial} and start again")
    finish(partial, out)
    return effects


def convert_built(
    build: Callable[[Path], None], out: Path, packing: Packing, workers: int, report: ProgressCallback
) -> dict[str, ReencodingEffect]:
    """Call `build` with a temporary path and `convert` the data set that it writes there; then remove it."""
    folders = out.with_name(f".{out.name}.folders")
    if not folders.exists():  # otherwise an earlier call completed it and was interrupted later
        build(folders)
    effects = convert(folders, out, packing, workers, report)
    shutil.rmtree(folders)
    return effects


def write_split(
    sources: list[SourceImage],
    folder: Path,
    packing: Packing | None,
    pool: ProcessPoolExecutor,
    report: ProgressCallback,
) -> ReencodingEffect | None:
    """Write one split; return the effect of reducing its images, or None if images are not reduced."""
    if packing is not None:
        packed = write_shards(sources, folder, packing, pool, report)
        return None if packing.max_side is None else measure_reencoding(packed, folder)
    runs = [(name, list(run)) for name, run in itertools.groupby(sources, key=lambda source: source.class_name)]
    futures = [pool.submit(write_class_folder, folder / name, run) for name, run in runs]
    images = 0
    for future in as_completed(futures):
        images += future.result()
        report(f"copying {folder.name}", images, len(sources))
    return None


def partial_folder(out: Path, packing: Packing | None) -> Path:
    """Return the folder in which `out` is built, and where an interrupted call is resumed."""
    return out.with_name(f".{out.name}.{'partial' if packing is None else 'shards'}")


def finish(partial: Path, out: Path) -> None:
    """Rename the finished folder to `out`.

    Raises:
        UserError: the folder cannot be renamed, for example because another process has just created `out`.
    """
    os.sync()
    try:
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be renamed from {partial} ({error.strerror or error})") from error
