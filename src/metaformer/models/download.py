"""Downloads weights by name: `official:poolformer_s12`, `official:caformer_s18`, `hf:timm/poolformer_s12.sail_in1k`.

Files of the papers' authors are downloaded into this project's cache: those of the first paper from its GitHub release,
those of the second paper from a repository of the Hugging Face hub that holds raw torch files. The authors publish no
hash, so a first download is checked only by its size, by the checksums of its zip archive (if it is one), and by the
strict loading that follows. Its SHA-256 is then stored next to it, and every later use is checked against that.

Networks of the Hugging Face hub (`hf:`) are downloaded by its library into its own cache. Where the cache names a file
by its SHA-256, as it does for all large files, every use is checked against it.

Cached files are used without a network request.
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
OFFICIAL_NAMES = {  # this project's names of networks that have another name in the authors' release
    "metaformer_s12_identity": "metaformer_id_s12",
    **{f"metaformer_s12_{mixers}": f"metaformer_{mixers}_s12_224" for mixers in ("pppa", "ppaa", "pppf", "ppff")},
}
BASELINE_RELEASE = "https://huggingface.co/sail/dl/resolve/main/"
SIZES = ("s12", "s24", "s36", "m36", "m48")
# Trained at 224 px; fine-tuned at 384 px; from ImageNet-21K, at both sizes; on ImageNet-21K with its 21,841 classes.
TRAININGS = ("", "_384", "_in21ft1k", "_384_in21ft1k", "_in21k")
BASELINE_FILES = (
    *(f"{family}_{size}" for family in ("identityformer", "randformer", "poolformerv2") for size in SIZES),
    *(
        f"{family}_{size}{training}"
        for family in ("convformer", "caformer")
        for size in ("s18", "s36", "m36", "b36")
        for training in TRAININGS
    ),
)
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
TIMEOUT = 10  # seconds without an answer
MAX_BYTES = 2**30  # size limit of an authors' file; their largest network has 164 million weights
CHUNK_BYTES = 2**20


def is_weights_name(source: str) -> bool:
    """Return whether `source` is a name of weights to download rather than a file."""
    return source.startswith((OFFICIAL, HUB))


def download_weights(name: str, field: str = "weights") -> Path:
    """Return the file for a name, after downloading it if it is not cached.

    Args:
        name: `official:` and the name of one of the authors' files or networks, or `hf:` and a repository of the hub.
        field: the configuration field that holds the name, for error messages.
    """
    try:
        if name.startswith(HUB):
            return _hub_file(name.removeprefix(HUB))
        files = {OFFICIAL + file: file for file in OFFICIAL_FILES}
        files |= {OFFICIAL + network: file for network, file in OFFICIAL_NAMES.items()}
        files |= {OFFICIAL + file: file for file in BASELINE_FILES}
        if name not in files:
            raise unknown_name(field, name, files)
        return _official_file(files[name])
    except ValueError as error:
        raise UserError(f"{field}={name}: {error}") from error


def weights_cache() -> Path:
    """Return the folder of the authors' files: $XDG_CACHE_HOME/metaformer/weights, by default in ~/.cache."""
    return cache_folder() / "weights"


def _official_file(stem: str) -> Path:
    if stem in BASELINE_FILES:
        path = weights_cache() / f"{stem}.pth"
        url = f"{BASELINE_RELEASE}{stem.split('_')[0]}/{path.name}"
    else:
        path = weights_cache() / f"{stem}.pth.tar"
        url = OFFICIAL_RELEASE + path.name
    try:
        if not path.is_file():
            print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, partial(_fetch, url))
        _check_recorded_hash(path)
    except (OSError, HTTPException) as error:
        raise ValueError(f"cannot get {url} ({_reason(error)}); download it by hand and give its path") from error
    return path


class _EncryptedRedirects(HTTPRedirectHandler):
    """A redirect handler that follows redirects from https only to https."""

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
        expected: int | None = response.length  # None if the server does not send it
        if expected is not None and expected > MAX_BYTES:
            raise OSError(f"the file has {expected} bytes, more than the limit of {MAX_BYTES}")
        while chunk := response.read(CHUNK_BYTES):
            out.write(chunk)
            if out.tell() > MAX_BYTES:
                raise OSError(f"the download exceeds the limit of {MAX_BYTES} bytes")
        if expected is not None and out.tell() != expected:
            raise OSError(f"received {out.tell()} of {expected} bytes")
    _check_complete(file)


def _check_complete(file: Path) -> None:
    """Verify the checksums of a zip archive; a file from torch before 1.6 has none, so it must load instead."""
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
        raise OSError(f"not a complete weights file: {error}") from error


def _check_recorded_hash(path: Path) -> None:
    """Compare a file with the hash that was recorded at its first use; record the hash if there is none."""
    record = path.with_name(f"{path.name}.sha256")
    digest = sha256(path)
    if not record.is_file():
        try:
            _check_complete(path)  # the user may have copied it here
        except OSError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
        write_text_atomically(record, f"{digest}  {path.name}\n")  # as sha256sum writes
    elif record.read_text().split()[:1] != [digest]:
        raise ValueError(f"{path} has changed: its SHA-256 is not the one in {record.name}; delete both and run again")


def _hub_file(repository: str) -> Path:
    try:
        for name in HUB_FILES:
            cached = try_to_load_from_cache(repository, name)
            if isinstance(cached, str):
                return _checked_hub_file(Path(cached))
        for name in HUB_FILES:
            try:
                # Without a network this fails at once; hf_hub_download would retry for minutes.
                metadata = get_hf_file_metadata(hf_hub_url(repository, name), timeout=TIMEOUT)
                if metadata.size is None:  # the library would accept a file of any size
                    raise OSError("the server does not send the size of the file")
                return _checked_hub_file(Path(hf_hub_download(repository, name)))
            except RemoteEntryNotFoundError:
                continue
    except HFValidationError as error:
        raise ValueError(f"not a valid repository name of the hub ({_reason(error)})") from error
    except RepositoryNotFoundError as error:
        raise ValueError("the hub has no such repository, or it requires a login (hf auth login)") from error
    except (OSError, httpx2.HTTPError, XetDownloadError) as error:
        url = hf_hub_url(repository, HUB_FILES[0])
        raise ValueError(f"cannot get {url} ({_reason(error)}); download it by hand and give its path") from error
    raise ValueError(f"the repository has neither {' nor '.join(HUB_FILES)}")


def _checked_hub_file(path: Path) -> Path:
    """Return the file after comparing it with its hash, if the hub's cache names it by one."""
    blob = path.readlink().name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", blob) and sha256(path) != blob:
        raise ValueError(f"{path} has changed: its SHA-256 is not {blob}; delete {path.resolve()} and run again")
    return path


def _reason(error: Exception) -> str:
    text = str(error).strip().removeprefix("<urlopen error ").removesuffix(">")
    return printable(next(iter(text.splitlines()), type(error).__name__), 300)
