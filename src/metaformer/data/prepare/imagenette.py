"""Download and unpacking of Imagenette, ten easy classes of ImageNet-1K (github.com/fastai/imagenette)."""

import hashlib
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

from metaformer.errors import UserError
from metaformer.files import temporary_beside


class Archive(NamedTuple):
    """A published archive of Imagenette."""

    url: str
    md5: str  # as in torchvision


_BASE_URL = "https://s3.amazonaws.com/fast-ai-imageclas"
SIZES = {
    "full": Archive(f"{_BASE_URL}/imagenette2.tgz", "fe2fc210e6bb7c5664d602c3cd71e612"),
    "320px": Archive(f"{_BASE_URL}/imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
    "160px": Archive(f"{_BASE_URL}/imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
}


def unpack_imagenette(tgz: Path | None, size: str, out: Path) -> None:
    """Unpack a local archive to `out`, or download it next to `out` and delete it once it is unpacked.

    If this fails, `out` does not exist.
    """
    from torchvision.datasets.utils import download_url  # imports torch, which worker processes do not need

    archive = SIZES[size]
    partial = out.with_name(f".{out.name}.partial")
    unpacked = temporary_beside(partial / "unpacked")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if tgz is None:
            tgz = partial / Path(archive.url).name
            download_url(archive.url, str(partial), md5=archive.md5)  # does nothing if the file is complete
        elif not tgz.is_file():
            raise UserError(f"{tgz}: no such file; omit --tgz to download it")
        with tgz.open("rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() != archive.md5:
                raise UserError(f"{tgz}: not the published archive of size {size} (its MD5 is not {archive.md5})")
        with tarfile.open(tgz) as tar:
            tar.extractall(unpacked, filter=_refuse_all_but_files)
        (folder,) = unpacked.iterdir()
        folder.rename(out)
    except (OSError, EOFError, zlib.error, tarfile.TarError, RuntimeError) as error:  # RuntimeError: wrong hash
        raise UserError(f"imagenette: {' '.join(str(error).split())}; repeat the command to retry") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def _refuse_all_but_files(entry: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    path = Path(entry.name)
    if not (entry.isreg() or entry.isdir()) or path.is_absolute() or ".." in path.parts:
        raise UserError(f"refused: {entry.name!r} in the archive is not a regular file or folder inside it")
    return entry
