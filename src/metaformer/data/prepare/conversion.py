"""Conversion of a data set on disk to folders, shards or decoded pixels."""

import itertools
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from metaformer.data.index.image_index import find_images, load_index
from metaformer.data.prepare.class_folder import write_class_folder
from metaformer.data.prepare.pixel_writer import (
    PixelPacking,
    SizedImage,
    check_disk_space,
    size_images,
    write_pixels,
)
from metaformer.data.prepare.processes import ProgressCallback, worker_processes
from metaformer.data.prepare.reencoding import ReencodingEffect, measure_reencoding
from metaformer.data.prepare.shard_writer import Packing, write_shards
from metaformer.data.prepare.source_images import SourceImage, list_source_images
from metaformer.errors import UserError

SPLITS = ("train", "val")

AnyPacking = Packing | PixelPacking


def convert(
    source: Path, out: Path, packing: AnyPacking | None, workers: int, report: ProgressCallback
) -> dict[str, ReencodingEffect]:
    """Write the splits of `source` to `out`: as shards or pixels if `packing` is given, otherwise as folders.

    If this fails, `out` does not exist, and the work done so far is kept next to it.

    Returns:
        The effect on the images of each split, as `write_splits`.
    """
    indices = {split: load_index(source, split) for split in SPLITS if (source / split).is_dir()}
    if not indices:
        raise UserError(f"--from {source}: contains no {' or '.join(SPLITS)} folder; give the folder with the splits")
    partial = partial_folder(out, packing)
    sources = {split: list_source_images(index) for split, index in indices.items()}
    with worker_processes(workers) as pool:
        effects = write_splits(sources, partial, packing, pool, report)
        for split, index in indices.items():
            kept = packing is None or packing.keeps_images
            if kept and find_images(partial / split).fingerprint != index.fingerprint:
                raise UserError(f"{source / split}: changed while it was being read; remove {partial} and start again")
    finish(partial, out)
    return effects


def convert_built(
    build: Callable[[Path], None], out: Path, packing: AnyPacking, workers: int, report: ProgressCallback
) -> dict[str, ReencodingEffect]:
    """Call `build` with a temporary path and `convert` the data set that it writes there; then remove it."""
    folders = out.with_name(f".{out.name}.folders")
    if not folders.exists():  # otherwise an earlier call completed it and was interrupted later
        build(folders)
    effects = convert(folders, out, packing, workers, report)
    shutil.rmtree(folders)
    return effects


def write_splits(
    sources: dict[str, list[SourceImage]],
    partial: Path,
    packing: AnyPacking | None,
    pool: ProcessPoolExecutor,
    report: ProgressCallback,
) -> dict[str, ReencodingEffect]:
    """Write each split to a folder in `partial`.

    Returns:
        The effect of reducing or decoding the images of each split; empty if they are stored as they are.
    """
    if isinstance(packing, PixelPacking):
        return _write_as_pixels(sources, partial, packing, pool, report)
    effects = {}
    for split, images in sources.items():
        if packing is None:
            _write_as_folders(images, partial / split, pool, report)
            continue
        packed = write_shards(images, partial / split, packing, pool, report)
        if not packing.keeps_images:
            effects[split] = measure_reencoding(packed, partial / split)
    return effects


def _write_as_pixels(
    sources: dict[str, list[SourceImage]],
    partial: Path,
    packing: PixelPacking,
    pool: ProcessPoolExecutor,
    report: ProgressCallback,
) -> dict[str, ReencodingEffect]:
    partial.mkdir(parents=True, exist_ok=True)
    sized: dict[str, list[SizedImage]] = {}
    for split, images in sources.items():
        sized[split] = size_images(images, packing, pool, lambda *step, name=split: report(f"sizes of {name}", *step))
    check_disk_space([image for images_of_split in sized.values() for image in images_of_split], partial)
    effects = {}
    for split, of_split in sized.items():
        write_pixels(of_split, partial / split, packing, pool, report)
        effects[split] = measure_reencoding([image.source for image in of_split], partial / split)
    return effects


def _write_as_folders(
    sources: list[SourceImage], folder: Path, pool: ProcessPoolExecutor, report: ProgressCallback
) -> None:
    runs = [(name, list(run)) for name, run in itertools.groupby(sources, key=lambda source: source.class_name)]
    futures = [pool.submit(write_class_folder, folder / name, run) for name, run in runs]
    images = 0
    for future in as_completed(futures):
        images += future.result()
        report(f"copying {folder.name}", images, len(sources))


def partial_folder(out: Path, packing: AnyPacking | None) -> Path:
    """Return the folder in which `out` is built, and from which an interrupted call resumes."""
    kinds = {type(None): "partial", Packing: "shards", PixelPacking: "pixels"}
    return out.with_name(f".{out.name}.{kinds[type(packing)]}")


def finish(partial: Path, out: Path) -> None:
    """Rename the finished folder to `out`."""
    os.sync()
    try:
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be renamed from {partial} ({error.strerror or error})") from error
