"""Convert a data set to ImageNet's layout, SPLIT/CLASS/IMAGE, pack it into shards, or decode it to pixels.

  python scripts/prepare_data.py sample --out data/sample
  python scripts/prepare_data.py imagenette --out data/imagenette            # or --tgz imagenette2.tgz
  python scripts/prepare_data.py imagenet --train-tar ILSVRC2012_img_train.tar --val-tar ILSVRC2012_img_val.tar \\
      --devkit ILSVRC2012_devkit_t12.tar.gz --out data/imagenet
  python scripts/prepare_data.py folder --from data/imagenet --out data/imagenet-shards --format shards
  python scripts/prepare_data.py folder --from data/imagenet --out data/imagenet-pixels --format pixels --resize 256

The archives' hashes are checked. --out appears only when complete; after an interruption, the same command resumes.

--format shards writes SPLIT/shard-000000.tar (WebDataset), .idx (for DALI's readers.webdataset) and .sfv (checksums),
for shared file systems, where a million small files are slow. Training reads shards like folders. --max-side 500
--quality 90 shrinks images whose longer side exceeds 500 pixels and prints the change in size and pixels; others are
copied byte for byte.

--format pixels writes SPLIT/pixels-000000.safetensors: decoded images, which training crops without decoding anything.
--resize 256 reduces images with a longer short side to 256 px, which changes them; --resize none, the default, keeps
every pixel and takes several times the space. The space is printed and compared with the disk's before it starts.
"""

import argparse
import os
from functools import partial
from pathlib import Path

from metaformer.data.index.image_index import check_same_classes, load_index
from metaformer.data.prepare.conversion import SPLITS, AnyPacking, convert, convert_built
from metaformer.data.prepare.imagenet_archives import Archives, unpack_imagenet
from metaformer.data.prepare.imagenette import SIZES, unpack_imagenette
from metaformer.data.prepare.pixel_writer import PixelPacking
from metaformer.data.prepare.processes import ProgressCallback
from metaformer.data.prepare.progress import progress_bars
from metaformer.data.prepare.reencoding import ReencodingEffect
from metaformer.data.prepare.sample import build_sample
from metaformer.data.prepare.shard_writer import Packing
from metaformer.errors import UserError

QUALITY, SHARD_MB = 90, 256
FORMATS = ("folders", "shards", "pixels")
OPTIONS_OF = {
    "shard_size": ("shards", "pixels"),
    "max_side": ("shards",),
    "quality": ("shards",),
    "resize": ("pixels",),
}


def main() -> None:
    """Prepare the data set, then print the number of images and classes."""
    arguments = _parse()
    out: Path = arguments.out
    if out.exists():
        raise UserError(f"--out {out}: already exists; give another folder, or remove it")
    packing = _packing(arguments)
    with progress_bars() as report:
        effects = _prepare(arguments, packing, report)
    indices = {split: load_index(out, split) for split in SPLITS if (out / split).is_dir()}
    if len(indices) == len(SPLITS):
        check_same_classes(*indices.values())
    for note in (note for index in indices.values() for note in index.notes):
        print(note)
    for split, effect in effects.items():
        _print_effect(split, effect)
    counts = " and ".join(
        f"{len(index):,} {'training' if split == 'train' else 'validation'}" for split, index in indices.items()
    )
    print(f"{out}: {counts} images, {len(next(iter(indices.values())).classes)} classes")


def _prepare(
    arguments: argparse.Namespace, packing: AnyPacking | None, report: ProgressCallback
) -> dict[str, ReencodingEffect]:
    """Create --out, and return the effect of shrinking images for each split."""
    out: Path = arguments.out
    if arguments.source == "imagenet":
        archives = Archives(arguments.train_tar, arguments.val_tar, arguments.devkit)
        return unpack_imagenet(archives, out, packing, arguments.workers, report)
    if arguments.source == "folder":
        return convert(arguments.source_folder, out, packing, arguments.workers, report)
    build = build_sample
    if arguments.source == "imagenette":
        build = partial(unpack_imagenette, arguments.tgz, arguments.size)
    if packing is None:
        build(out)
        return {}
    return convert_built(build, out, packing, arguments.workers, report)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True)
    sample = sources.add_parser("sample", help="5,000 digits from the data of an installed package")
    imagenette = sources.add_parser("imagenette", help="ten easy classes of ImageNet, 13,394 images")
    imagenette.add_argument("--tgz", type=Path, help="local archive; default: download it")
    imagenette.add_argument("--size", choices=SIZES, default="full", help="shorter side of the images")
    tars = sources.add_parser("imagenet", help="ImageNet-1K from the archives of image-net.org")
    for name in ("train-tar", "val-tar", "devkit"):
        tars.add_argument(f"--{name}", type=Path, required=True)
    folder = sources.add_parser("folder", help="a local data set with train/ and val/, or one of them")
    folder.add_argument("--from", type=Path, required=True, dest="source_folder", metavar="DIR")
    folder.add_argument("--out", type=Path, required=True)
    for source, name in ((sample, "sample"), (imagenette, "imagenette"), (tars, "imagenet")):
        source.add_argument("--out", type=Path, default=Path("data") / name)
    for source in (sample, imagenette, tars, folder):
        source.add_argument("--format", choices=FORMATS, default="folders")
        source.add_argument("--shard-size", type=int, metavar="MB", help=f"about this many 10**6 bytes ({SHARD_MB})")
        source.add_argument("--max-side", type=int, metavar="PIXELS", help="shrink larger images; default: keep all")
        source.add_argument("--quality", type=int, help=f"JPEG quality for --max-side ({QUALITY})")
        source.add_argument("--resize", metavar="PIXELS", help="short side of decoded images, or none (the default)")
        source.add_argument(
            "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: all cores"
        )
    return parser.parse_args()


def _packing(arguments: argparse.Namespace) -> AnyPacking | None:
    """Return the settings of --format shards or pixels, or None for folders."""
    limits = {"workers": (1, 10**4), "shard_size": (1, 10**6), "max_side": (32, 10**5), "quality": (1, 100)}
    for name, (minimum, maximum) in limits.items():
        value = getattr(arguments, name)
        if value is not None and not minimum <= value <= maximum:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {minimum} to {maximum}")
    for name, formats in OPTIONS_OF.items():
        value = getattr(arguments, name)
        if value is not None and arguments.format not in formats:
            option = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{option}: requires --format {' or '.join(formats)}; add that, or remove this option")
    if arguments.quality is not None and arguments.max_side is None:
        raise UserError(f"--quality {arguments.quality}: requires --max-side; add that, or remove this option")
    shard_bytes = (arguments.shard_size or SHARD_MB) * 10**6
    if arguments.format == "pixels":
        return PixelPacking(shard_bytes, _resize(arguments.resize))
    if arguments.format == "shards":
        return Packing(shard_bytes, arguments.max_side, arguments.quality or QUALITY)
    return None


def _resize(given: str | None) -> int | None:
    """Return the length of the short side, or None to keep it."""
    if given in (None, "none"):
        return None
    if not given.isdecimal() or not 32 <= int(given) <= 10**5:
        raise UserError(f"--resize {given}: must be none, or from 32 to 100000")
    return int(given)


def _print_effect(split: str, effect: ReencodingEffect) -> None:
    """Print how shrinking images changed a split's size and pixels."""
    share = 100 * effect.bytes_after / effect.bytes_before
    print(
        f"{split}: {effect.bytes_before:,} bytes of images before, {effect.bytes_after:,} after ({share:.1f} %); "
        f"at 224 px, crop .9, {effect.images_compared} images differ by {effect.mean_difference:.2f} of 255 on "
        f"average, PSNR {effect.psnr:.1f} dB"
    )
