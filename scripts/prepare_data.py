"""Bring a data set into ImageNet's layout: SPLIT/CLASS/IMAGE.

python scripts/prepare_data.py sample --out data/sample
python scripts/prepare_data.py imagenet --train-tar ILSVRC2012_img_train.tar --val-tar ILSVRC2012_img_val.tar \\
    --devkit ILSVRC2012_devkit_t12.tar.gz --out data/imagenet
"""

import argparse
import shutil
import tarfile
from pathlib import Path

from torchvision.datasets import imagenet

from metaformer.data.index import check_same_classes, load_index
from metaformer.data.sample import build_sample
from metaformer.errors import UserError
from metaformer.runtime import run_program


def main() -> None:
    """Prepare, then count what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True)
    sample = sources.add_parser("sample", help="5,000 digits, built from a package's data")
    sample.add_argument("--out", type=Path, default=Path("data/sample"))
    tars = sources.add_parser("imagenet", help="ImageNet-1K from the archives of image-net.org")
    for name in ("train-tar", "val-tar", "devkit"):
        tars.add_argument(f"--{name}", type=Path, required=True)
    tars.add_argument("--out", type=Path, default=Path("data/imagenet"))
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise UserError(f"--out {arguments.out}: exists already; give another folder, or remove it")
    if arguments.source == "sample":
        build_sample(arguments.out)
    else:
        unpack_imagenet(arguments.train_tar, arguments.val_tar, arguments.devkit, arguments.out)
    train, val = load_index(arguments.out, "train"), load_index(arguments.out, "val")
    check_same_classes(train, val)
    print(f"{arguments.out}: {len(train):,} training and {len(val):,} validation images, {len(train.classes)} classes")


def unpack_imagenet(train_tar: Path, val_tar: Path, devkit: Path, out: Path) -> None:
    """Check the archives' hashes and unpack them, by torchvision; `out` appears when all is there.

    Raises:
        UserError: an archive is missing or not the known one.
    """
    for archive in (train_tar, val_tar, devkit):
        if not archive.is_file():
            raise UserError(f"{archive}: no such file; get it from image-net.org, after signing in")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        imagenet.parse_devkit_archive(temporary, str(devkit.absolute()))
        imagenet.parse_train_archive(temporary, str(train_tar.absolute()))
        imagenet.parse_val_archive(temporary, str(val_tar.absolute()))
    except (RuntimeError, OSError, tarfile.TarError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
    temporary.rename(out)


if __name__ == "__main__":
    run_program(main)
