"""Weights by name, downloaded from a server on this machine into the caches."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import HTTPSHandler, Request
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

from metaformer.errors import UserError
from metaformer.models import download, list_models, load_weights
from metaformer.models.download import OFFICIAL_FILES, OFFICIAL_NAMES, download_weights, is_weights_name, weights_cache
from tests.local_server import Reply, Server, serve
from tests.models.released import released_state
from tests.models.test_weights import small_released

NAME, FILE = "official:poolformer_s12", "poolformer_s12.pth.tar"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A local server in place of the authors' release, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serve() as server:
        monkeypatch.setattr(download, "OFFICIAL_RELEASE", server.url)
        yield server


@pytest.fixture
def weights(tmp_path: Path) -> bytes:
    """The file of a small network in the authors' format."""
    torch.save(released_state("poolformer_s12"), tmp_path / "w")
    return (tmp_path / "w").read_bytes()


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        download_weights(name, "checkpoint")
    text = str(caught.value)
    assert text.startswith(f"checkpoint={name}: ")
    assert len(text.splitlines()) == 1
    return text


def cached() -> list[str]:
    return sorted(path.name for path in weights_cache().iterdir())


def test_names() -> None:
    """official: and hf: mark names; networks that the authors name differently are known by both names."""
    assert is_weights_name("official:poolformer_s12")
    assert is_weights_name("hf:timm/poolformer_s12.sail_in1k")
    assert not is_weights_name("runs/official:x")
    assert len(OFFICIAL_FILES) == 10
    assert set(OFFICIAL_NAMES) <= set(list_models())
    assert set(OFFICIAL_NAMES.values()) <= set(OFFICIAL_FILES)


def test_download(server: Server, weights: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is downloaded once, its hash is stored beside it, and later uses need no network."""
    server.replies[f"/{FILE}"] = Reply(weights)
    path = download_weights(NAME)
    assert path == weights_cache() / FILE
    assert path.read_bytes() == weights
    assert capsys.readouterr().err == f"downloading {server.url}{FILE} to {path}\n"
    record = f"{hashlib.sha256(weights).hexdigest()}  {FILE}\n"
    assert path.with_name(f"{FILE}.sha256").read_text() == record
    server.replies.clear()
    model = small_released("poolformer_s12")
    load_weights(model, NAME)
    assert torch.equal(model.head.fc.weight, released_state("poolformer_s12")["head.weight"])
    assert server.requests == [f"GET /{FILE}"]
    assert cached() == [FILE, f"{FILE}.sha256"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ours", OFFICIAL_NAMES)
def test_this_projects_names(server: Server, weights: bytes, ours: str) -> None:
    """The authors' name and this project's name refer to the same file."""
    server.replies[f"/{OFFICIAL_NAMES[ours]}.pth.tar"] = Reply(weights)
    assert download_weights(f"official:{ours}") == download_weights(f"official:{OFFICIAL_NAMES[ours]}")
    assert len(server.requests) == 1


def test_unknown_name(server: Server) -> None:
    """An unknown name is refused with the nearest names, before any request."""
    with pytest.raises(UserError, match=r"^checkpoint=official:poolformer_s13: unknown; did you mean .*poolformer_s12"):
        download_weights("official:poolformer_s13", "checkpoint")
    assert server.requests == []


def test_short_file(server: Server, weights: bytes) -> None:
    """A connection that ends early gives an error with the number of bytes, leaves no file and can be retried."""
    server.replies[f"/{FILE}"] = Reply(weights, length=len(weights) + 1000)
    assert f"(received {len(weights)} of {len(weights) + 1000} bytes)" in refusal(NAME)
    assert cached() == []
    server.replies[f"/{FILE}"] = Reply(weights)
    download_weights(NAME)


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        (Reply(status=404), "404"),
        (Reply(status=503), "503"),
        (Reply(status=0), "closed connection"),
        (Reply(b"<html>Sign in to the network</html>"), "not a complete weights file"),
    ],
)
def test_invalid_responses(server: Server, reply: Reply, part: str) -> None:
    """A missing file, a failing server and a page in its place give an error with URL, reason and fix."""
    server.replies[f"/{FILE}"] = reply
    text = refusal(NAME)
    assert f"cannot get {server.url}{FILE} (" in text
    assert part in text
    assert text.endswith("; download it by hand and give its path")
    assert cached() == []


def test_a_file_without_a_length(server: Server, weights: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A response without a length is accepted up to the size limit, and a larger announced length is refused."""
    server.replies[f"/{FILE}"] = Reply(weights, measured=False)
    path = download_weights(NAME)
    assert path.read_bytes() == weights
    path.unlink()
    path.with_name(f"{FILE}.sha256").unlink()
    monkeypatch.setattr(download, "MAX_BYTES", len(weights) - 1)
    assert f"the download exceeds the limit of {len(weights) - 1} bytes" in refusal(NAME)
    server.replies[f"/{FILE}"] = Reply(weights)
    assert f"(the file has {len(weights)} bytes, more than the limit" in refusal(NAME)
    assert cached() == []


def test_redirects(server: Server, weights: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redirects are followed from http to http and https, and from https only to https."""

    def without_encryption(handler: HTTPSHandler, request: Request) -> Any:
        return handler.do_open(HTTPConnection, request)

    monkeypatch.setattr(HTTPSHandler, "https_open", without_encryption)
    encrypted = server.url.replace("http:", "https:")
    server.replies["/elsewhere"] = Reply(weights)
    cases = [(server.url, server.url), (server.url, encrypted), (encrypted, encrypted), (encrypted, server.url),
             (server.url, "ftp://127.0.0.1:9/"), (encrypted, "ftp://127.0.0.1:9/")]  # fmt: skip
    for source, target in cases:
        monkeypatch.setattr(download, "OFFICIAL_RELEASE", source)
        server.replies[f"/{FILE}"] = Reply(status=302, headers={"Location": f"{target}elsewhere"})
        server.requests.clear()
        if target.startswith("https") or (source, target) == (server.url, server.url):
            path = download_weights(NAME)
            assert path.read_bytes() == weights
            path.unlink()
        else:
            assert f"redirected to {target}elsewhere, which is not https" in refusal(NAME)
            assert server.requests == [f"GET /{FILE}"]
    assert cached() == [f"{FILE}.sha256"]


def test_compressed_file(server: Server, weights: bytes) -> None:
    """A compressed archive is refused before it is unpacked."""
    content = BytesIO()
    with ZipFile(BytesIO(weights)) as archive, ZipFile(content, "w", ZIP_DEFLATED) as compressed:
        for name in archive.namelist():
            compressed.writestr(name, archive.read(name))
    server.replies[f"/{FILE}"] = Reply(content.getvalue())
    assert "a compressed zip archive" in refusal(NAME)
    assert cached() == []


def test_byte_changed_in_transit(server: Server, weights: bytes) -> None:
    """The archive's checksums detect one changed byte in a tensor."""
    middle = len(weights) // 2
    server.replies[f"/{FILE}"] = Reply(weights[:middle] + bytes([weights[middle] ^ 1]) + weights[middle + 1 :])
    assert "a damaged zip archive" in refusal(NAME)
    assert cached() == []


def test_no_network(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing server, an unknown host and a host that never answers give the one-line error soon."""
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.replies[f"/{FILE}"] = Reply(silent=True)
    start = time.monotonic()
    assert "timed out" in refusal(NAME)
    monkeypatch.setattr(download, "OFFICIAL_RELEASE", "http://127.0.0.1:9/")  # discard: nothing listens
    assert "refused" in refusal(NAME)
    monkeypatch.setattr(download, "OFFICIAL_RELEASE", "http://nowhere.invalid/")
    assert f"cannot get http://nowhere.invalid/{FILE} (" in refusal(NAME)
    assert time.monotonic() - start < 10


def test_changed_file(server: Server, weights: bytes) -> None:
    """A cached file that has changed since its download is refused until it is deleted."""
    server.replies[f"/{FILE}"] = Reply(weights)
    path = download_weights(NAME)
    path.write_bytes(weights[:-1] + b"x")
    text = refusal(NAME)
    assert f"{path} has changed" in text
    assert f"{FILE}.sha256; delete both" in text
    path.unlink()
    path.with_name(f"{FILE}.sha256").unlink()
    assert download_weights(NAME).read_bytes() == weights
    path.with_name(f"{FILE}.sha256").write_text("")
    assert "has changed" in refusal(NAME)


def test_file_copied_into_the_cache(server: Server, weights: bytes) -> None:
    """A file copied into the cache is used if its archive is complete, and its hash is stored."""
    weights_cache().mkdir(parents=True)
    path = weights_cache() / FILE
    path.write_bytes(weights[:-100])
    assert "is damaged (not a complete weights file" in refusal(NAME)
    assert cached() == [FILE]
    path.write_bytes(weights)
    assert download_weights(NAME) == path
    assert cached() == [FILE, f"{FILE}.sha256"]
    assert server.requests == []


def test_file_from_an_old_torch(server: Server, weights: bytes) -> None:
    """A file from torch before 1.6, which is not a zip archive, is accepted if it loads and refused if truncated."""
    old = BytesIO()
    torch.save(torch.load(BytesIO(weights), weights_only=True), old, _use_new_zipfile_serialization=False)
    server.replies[f"/{FILE}"] = Reply(old.getvalue()[:-100])
    assert "not a complete weights file" in refusal(NAME)
    assert cached() == []
    server.replies[f"/{FILE}"] = Reply(old.getvalue())
    assert download_weights(NAME).read_bytes() == old.getvalue()


def test_cache_that_cannot_be_written(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder that cannot be created is named in the error."""
    (tmp_path / "taken").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    assert str(tmp_path / "taken") in refusal(NAME)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache is in $XDG_CACHE_HOME if it is set, otherwise in ~/.cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert weights_cache() == tmp_path / ".cache" / "metaformer" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert weights_cache() == tmp_path / "x" / "metaformer" / "weights"


HUB_PROGRAM = """
import json, sys, time
from metaformer.errors import UserError
from metaformer.models import download
download.TIMEOUT = 1
for line in sys.stdin:
    start = time.monotonic()
    try:
        outcome = {"path": str(download.download_weights(f"hf:{line.strip()}", "checkpoint"))}
    except UserError as error:
        outcome = {"error": str(error)}
    print(json.dumps(outcome | {"seconds": time.monotonic() - start}), flush=True)
"""
HUB_FILE = "/timm/{}/resolve/main/{}"


class Hub(NamedTuple):
    """A local hub and a process that downloads from it; the hub's library reads the address only at import."""

    server: Server
    process: "subprocess.Popen[str]"

    def download(self, repository: str) -> dict[str, Any]:
        """Return the result for `hf:REPOSITORY`: "path" or "error", and "seconds"."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(repository, file=self.process.stdin, flush=True)
        outcome: dict[str, Any] = json.loads(self.process.stdout.readline())
        return outcome


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A local hub and an empty cache."""
    with serve() as server:
        addresses = {"HF_ENDPOINT": server.url.rstrip("/"), "HF_HOME": str(tmp_path_factory.mktemp("hub"))}
        command = [sys.executable, "-c", HUB_PROGRAM]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=os.environ | addresses, stdin=pipe, stdout=pipe, text=True) as process:
            yield Hub(server, process)
            process.kill()


def large_file(content: bytes) -> Reply:
    """Return the hub's response for a large file, whose ETag is its SHA-256."""
    return Reply(content, headers={"X-Repo-Commit": "a" * 40, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})


MISSING = Reply(status=404, headers={"X-Repo-Commit": "a" * 40, "X-Error-Code": "EntryNotFound"})
PRIVATE = Reply(status=401, headers={"X-Error-Code": "RepoNotFound"})


def test_hub(hub: Hub) -> None:
    """model.safetensors is preferred to pytorch_model.bin, and cached files need no request."""
    hub.server.replies[HUB_FILE.format("one", "model.safetensors")] = large_file(b"safetensors")
    hub.server.replies[HUB_FILE.format("two", "model.safetensors")] = MISSING
    hub.server.replies[HUB_FILE.format("two", "pytorch_model.bin")] = large_file(b"torch")
    first = [Path(hub.download(f"timm/{name}")["path"]) for name in ("one", "two")]
    assert [path.read_bytes() for path in first] == [b"safetensors", b"torch"]
    requests = len(hub.server.requests)
    again = [Path(hub.download(f"timm/{name}")["path"]) for name in ("one", "two")]
    assert again == first
    assert len(hub.server.requests) == requests


@pytest.mark.parametrize(
    ("reply", "part"),
    [
        (MISSING, "neither model.safetensors nor pytorch_model.bin"),
        (PRIVATE, "no such repository, or it requires a login"),
        (Reply(status=500), "500"),
        (Reply(status=0), "disconnected"),
        (Reply(silent=True), "timed out"),
        (
            Reply(b"endless", headers={"X-Repo-Commit": "a" * 40, "ETag": '"e"'}, measured=False),
            "does not send the size of the file",
        ),
    ],
)
def test_hub_refuses(hub: Hub, reply: Reply, part: str) -> None:
    """Failures at the hub give a one-line error with the reason, without long retries."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        hub.server.replies[HUB_FILE.format("refused", name)] = reply
    outcome = hub.download("timm/refused")
    assert outcome["error"].startswith("checkpoint=hf:timm/refused: ")
    assert part in outcome["error"]
    assert "\n" not in outcome["error"]
    assert outcome["seconds"] < 5
    if reply not in (MISSING, PRIVATE):
        assert f"cannot get {hub.server.url}timm/refused/resolve/main/model.safetensors (" in outcome["error"]
        assert outcome["error"].endswith("; download it by hand and give its path")


def test_invalid_hub_name(hub: Hub) -> None:
    """Names that the hub does not allow are refused before any request."""
    requests = len(hub.server.requests)
    for name in ("no repository", "a/b/c", ""):
        assert hub.download(name)["error"].startswith(f"checkpoint=hf:{name}: not a valid repository name of the hub (")
    assert len(hub.server.requests) == requests


def test_changed_hub_file(hub: Hub) -> None:
    """A cached hub file that no longer matches its hash is refused; after deletion it is downloaded again."""
    hub.server.replies[HUB_FILE.format("changing", "model.safetensors")] = large_file(b"safetensors again")
    file = Path(hub.download("timm/changing")["path"]).resolve()
    file.write_bytes(b"safetensors agaim")
    assert f"delete {file} and run again" in hub.download("timm/changing")["error"]
    file.unlink()
    assert Path(hub.download("timm/changing")["path"]).read_bytes() == b"safetensors again"
