"""Weights by name: `official:poolformer_s12`, `hf:timm/poolformer_s12.sail_in1k`.

The files of the paper's authors come from their GitHub release into this project's cache. The authors publish no hash,
so a first download is checked only by its size, by the checksums in its zip archive where it is one, and by the strict
loading that follows. Its SHA-256 is then kept beside it, and each later use is checked against that.

Files of the Hugging Face hub come into the hub's own cache, by its library. Where their name there is their SHA-256, as
it is for all large files, each use is checked against it.

What is in a cache is used without asking the network.
"""

import re
import sys
import zipfile
from functools import partial
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import httpx2
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    XetDownloadError,
)

from metaformer.errors import UserError, printable, unknown_name
from metaformer.files import cache_folder, sha256, write_atomically, write_text_atomically
from metaformer.models.weight_reader import check_archive, read_weights

OFFICIAL, HUB = "official:", "hf:"
OFFICIAL_RELEASE = "https://github.com/sail-sg/poolformer/releases/download/v1.0/"
OFFICIAL_FILES = (
    *(f"poolformer_{size}" for size in ("s12", "s24", "s36", "m36", "m48")),
    "metaformer_id_s12",
    *(f"metaformer_{mixers}_s12_224" for mixers in ("pppa", "ppaa", "pppf", "ppff")),
)
OFFICIAL_NAMES = {  # of this project's networks that the authors call otherwise
    "metaformer_s12_identity": "metaformer_id_s12",
    **{f"metaformer_s12_{mixers}": f"metaformer_{mixers}_s12_224" for mixers in ("pppa", "ppaa", "pppf", "ppff")},
}
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
TIMEOUT = 10  # seconds without an answer
LARGEST_BYTES = 2**30  # of a file of the authors, whose largest network has 73 million weights
PIECE_BYTES = 2**20


def is_weights_name(source: str) -> bool:
    """Whether this names weights to download, and no file."""
    return source.startswith((OFFICIAL, HUB))


def download_weights(name: str, field: str = "weights") -> Path:
    """The file that a name means, downloaded if it is in no cache yet.

    Args:
        name: `official:` and the name of one of the authors' files or networks, or `hf:` and a repository of the hub.
        field: what the user gave it as, for errors.

    Raises:
        UserError: the name is unknown, the network or the disk refuses, or a cached file has changed.
    """
    try:
        if name.startswith(HUB):
            return _hub_file(name.removeprefix(HUB))
        known = {OFFICIAL + file: file for file in OFFICIAL_FILES}
        known |= {OFFICIAL + ours: file for ours, file in OFFICIAL_NAMES.items()}
        if name not in known:
            raise unknown_name(field, name, known)
        return _official_file(known[name])
    except ValueError as error:
        raise UserError(f"{field}={name}: {error}") from error


def weights_cache() -> Path:
    """The folder of the authors' files: $XDG_CACHE_HOME/metaformer/weights, by default in ~/.cache."""
    return cache_folder() / "weights"


def _official_file(stem: str) -> Path:
    path = weights_cache() / f"{stem}.pth.tar"
    url = OFFICIAL_RELEASE + path.name
    try:
        if not path.is_file():
            print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, partial(_fetch, url))
        _check_official(path)
    except (OSError, HTTPException) as error:
        raise ValueError(f"cannot get {url} ({_reason(error)}); download it by hand and give its path") from error
    return path


class _EncryptedRedirects(HTTPRedirectHandler):
    """Follows redirects, but from https only to https."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if urlsplit(newurl).scheme not in ("https", req.type):
            raise HTTPError(req.full_url, code, f"redirected to {newurl}, which is not https", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(url: str, file: Path) -> None:
    try:
        response = build_opener(_EncryptedRedirects).open(url, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        raise
    with response, file.open("wb") as out:
        expected: int | None = response.length  # None where the server does not say it
        if expected is not None and expected > LARGEST_BYTES:
            raise OSError(f"{expected} bytes, more than such a file may have ({LARGEST_BYTES})")
        while piece := response.read(PIECE_BYTES):
            out.write(piece)
            if out.tell() > LARGEST_BYTES:
                raise OSError(f"more bytes came than such a file may have ({LARGEST_BYTES})")
        if expected is not None and out.tell() != expected:
            raise OSError(f"{out.tell()} of {expected} bytes came")
    _check_whole(file)


def _check_whole(file: Path) -> None:
    """Torch's zip archives have checksums; the files that torch wrote before 1.6 have none, but they must read."""
    try:
        if zipfile.is_zipfile(file):
            with file.open("rb") as content:
                check_archive(content)
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise OSError(f"a damaged zip archive: {printable(damaged, 100)}")
        else:
            read_weights(file)
    except (zipfile.BadZipFile, ValueError, UserError) as error:
        raise OSError(f"not a whole weights file: {error}") from error


def _check_official(path: Path) -> None:
    """Compare a file with the hash that its first use left; a first use leaves it."""
    record = path.with_name(f"{path.name}.sha256")
    digest = sha256(path)
    if not record.is_file():
        try:
            _check_whole(path)  # it may have been put here by hand
        except OSError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and run again") from error
        write_text_atomically(record, f"{digest}  {path.name}\n")  # as sha256sum writes
    elif record.read_text().split()[:1] != [digest]:
        raise ValueError(f"{path} has changed: its SHA-256 is not that in {record.name}; delete both, and run again")


def _hub_file(repository: str) -> Path:
    try:
        for name in HUB_FILES:
            cached = try_to_load_from_cache(repository, name)
            if isinstance(cached, str):
                return _checked_hub_file(Path(cached))
        for name in HUB_FILES:
            try:
                # Where there is no network this fails once; hf_hub_download would go on trying for minutes.
                metadata = get_hf_file_metadata(hf_hub_url(repository, name), timeout=TIMEOUT)
                if metadata.size is None:  # the library would take whatever comes
                    raise OSError("the server does not say how large the file is")
                return _checked_hub_file(Path(hf_hub_download(repository, name)))
            except RemoteEntryNotFoundError:
                continue
    except HFValidationError as error:
        raise ValueError(f"not a repository of the hub ({_reason(error)})") from error
    except RepositoryNotFoundError as error:
        raise ValueError("the hub has no such repository, or it needs a login (hf auth login)") from error
    except (OSError, httpx2.HTTPError, XetDownloadError) as error:
        url = hf_hub_url(repository, HUB_FILES[0])
        raise ValueError(f"cannot get {url} ({_reason(error)}); download it by hand and give its path") from error
    raise ValueError(f"the repository has neither {' nor '.join(HUB_FILES)}")


def _checked_hub_file(path: Path) -> Path:
    """The file, whose link in the hub's cache points to a name that is its hash."""
    blob = path.readlink().name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", blob) and sha256(path) != blob:
        raise ValueError(f"{path} has changed: its SHA-256 is not {blob}; delete {path.resolve()}, and run again")
    return path


def _reason(error: Exception) -> str:
    text = str(error).strip().removeprefix("<urlopen error ").removesuffix(">")
    return printable(next(iter(text.splitlines()), type(error).__name__), 300)
