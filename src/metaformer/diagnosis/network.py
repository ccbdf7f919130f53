"""Checks of the network between the ranks and to wandb's server."""

import netrc
import os
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import torch

from metaformer.diagnosis.finding import Finding, fail, ok, warn
from metaformer.runtime import Runtime

REPEATS = 5


def all_reduce(runtime: Runtime, mebibytes: int) -> Iterator[Finding]:
    """Check the result and the speed of a sum over all ranks; every rank must call this.

    The speed is that of a ring, in which each rank sends and receives 2 (n - 1) / n times the tensor's bytes.
    """
    ranks = runtime.world_size
    if ranks == 1:
        yield ok("all-reduce", "one process: nothing to exchange; run under torchrun to measure the network")
        return
    values = torch.full((mebibytes * 2**18,), float(runtime.rank + 1), device=runtime.device)
    total = runtime.sum(values)
    if not bool((total == ranks * (ranks + 1) / 2).all()):
        yield fail("all-reduce", "returns wrong sums", "do not train on these nodes: a link or a library is broken")
        return
    start = time.monotonic()
    for _ in range(REPEATS):
        total = runtime.sum(values)
    float(total[0])  # waits for a GPU
    seconds = (time.monotonic() - start) / REPEATS
    sent = 2 * (ranks - 1) / ranks * values.numel() * 4
    backend = "NCCL" if runtime.device.type == "cuda" else "gloo"
    message = (
        f"{mebibytes} MiB over {ranks} ranks by {backend}: {1000 * seconds:.0f} ms, {sent / seconds / 1e9:.2f} GB/s"
    )
    yield ok("all-reduce", message)


def wandb(timeout: float = 5.0) -> Iterator[Finding]:
    """Check that tracking=wandb can work online."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    address = urlsplit(server)
    host = address.hostname or ""
    fix = "runs are stored offline; upload them later with `wandb sync` from a machine with internet access"
    try:
        socket.create_connection((host, address.port or (80 if address.scheme == "http" else 443)), timeout).close()
    except OSError as error:
        yield warn("wandb", f"{server} does not answer ({error.strerror or error})", fix)
        return
    if "WANDB_API_KEY" not in os.environ and not _has_netrc_login(host):
        yield warn(
            "wandb", f"{server} answers, but there is no API key", "run `wandb login`, or runs are stored offline"
        )
    else:
        yield ok("wandb", f"{server} answers, and there is an API key")


def _has_netrc_login(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
