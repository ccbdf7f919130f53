"""Decode every image of a data set once and report broken files.

  python scripts/scan_data.py data/imagenet --out manifest.csv --quarantine broken.txt

Then train with data.quarantine=broken.txt, or repair the files. Exit code: 0 if all files decode, 1 if some do not.
"""

import argparse
import csv
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from metaformer.data.index.image_index import load_index
from metaformer.data.index.quarantine import write_quarantine
from metaformer.data.load.limits import MAX_PIXELS
from metaformer.data.prepare.progress import progress_bars
from metaformer.data.prepare.scan_images import ScannedImage, scan_images
from metaformer.errors import UserError, printable
from metaformer.files import check_output, write_atomically
from metaformer.program import run_program

NOTES = {
    "GIF": " (only the first frame is read)",
    "16-bit": " (grayscale: clipped at 255, as in PIL, mostly to white)",
}


@dataclass
class Summary:
    """Counts for the report."""

    images: int = 0
    unusual: Counter[str] = field(default_factory=Counter)
    not_plain_rgb: int = 0
    broken: list[ScannedImage] = field(default_factory=list)

    def add(self, image: ScannedImage) -> None:
        """Count one image."""
        self.images += 1
        self.not_plain_rgb += bool(image.unusual and image.ok)
        if image.ok and image.unusual:
            self.unusual.update(image.unusual.split(", "))
        if not image.ok:
            self.broken.append(image)


def main() -> None:
    """Scan the data set, write the requested files, and print the report."""
    arguments = _parse()
    splits = arguments.split or ["train", "val"]
    _check_writable(arguments)
    summary = Summary()
    if arguments.out is None:
        for image in _scan(arguments, splits):
            summary.add(image)
    else:
        try:
            write_atomically(
                arguments.out, lambda temporary: _write_manifest(temporary, _scan(arguments, splits), summary)
            )
        except OSError as error:
            raise UserError(f"--out {arguments.out}: cannot be written ({error.strerror or error})") from error
    # Before the list is written, so that a full disk does not lose the result.
    _print(summary, f"{arguments.root} ({', '.join(splits)})")
    if arguments.quarantine is not None:
        _write_quarantine(arguments.quarantine, summary.broken)
    if summary.broken:
        sys.exit(1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="data set folder, as in data.root")
    parser.add_argument("--split", action="append", help="split folder; may be repeated; default: train, val")
    parser.add_argument("--out", type=Path, help="CSV file to write, with a row for each image")
    parser.add_argument("--quarantine", type=Path, help="file to write, a list of broken files for data.quarantine")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: all cores"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, help="largest image to decode, as loader.max_pixels (%(default)s)"
    )
    arguments = parser.parse_args()
    for option in ("workers", "max_pixels"):
        if getattr(arguments, option) < 1:
            flag = f"--{option.replace('_', '-')} {getattr(arguments, option)}"
            raise UserError(f"{flag}: must be at least 1")
    return arguments


def _check_writable(arguments: argparse.Namespace) -> None:
    """Check the output files before the scan, which may take an hour."""
    for option in ("out", "quarantine"):
        file: Path | None = getattr(arguments, option)
        if file is not None:
            check_output(f"--{option} {file}", file)


def _scan(arguments: argparse.Namespace, splits: list[str]) -> Iterator[ScannedImage]:
    indices = {split: load_index(arguments.root, split) for split in splits}
    for note in (note for index in indices.values() for note in index.notes):
        print(note, file=sys.stderr)
    with progress_bars() as report:
        for split, index in indices.items():
            yield from scan_images(index, split, arguments.workers, report, arguments.max_pixels)


def _write_manifest(file: Path, images: Iterator[ScannedImage], summary: Summary) -> None:
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        rows = csv.writer(out)
        rows.writerow(ScannedImage._fields)
        for image in images:
            summary.add(image)
            rows.writerow(image)


def _write_quarantine(file: Path, broken: list[ScannedImage]) -> None:
    for image in broken:
        if "\n" in image.path:
            raise UserError(f"--quarantine {file}: {image.path!r} has a line break in its name; rename the file")
    try:
        write_quarantine(file, (image.path for image in broken))
    except OSError as error:
        raise UserError(f"--quarantine {file}: cannot be written ({error.strerror or error})") from error


def _print(summary: Summary, data_set: str) -> None:
    print(f"{data_set}: {summary.images:,} images, {len(summary.broken):,} cannot be decoded")
    print(f"decodable, but not plain RGB JPEGs: {summary.not_plain_rgb:,}")
    for kind, count in summary.unusual.most_common():
        print(f"  {count:>9,}  {kind}{NOTES.get(kind.split()[0], '')}")
    for image in summary.broken:
        print(f"broken: {printable(image.path)}: {image.reason}")


if __name__ == "__main__":
    run_program(main)
