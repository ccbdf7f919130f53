"""Between the ranks, and to wandb's server."""

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
    """Sum a tensor over all ranks, see that it is the sum, and how fast it was. Every rank must call it.

    The figure is what each rank sends and receives in a ring: 2 (n - 1) / n times the tensor's bytes.
    """
    ranks = runtime.world_size
    if ranks == 1:
        yield ok("all-reduce", "one process: nothing to exchange; under torchrun, this measures the network")
        return
    values = torch.full((mebibytes * 2**18,), float(runtime.rank + 1), device=runtime.device)
    total = runtime.sum(values)
    if not bool((total == ranks * (ranks + 1) / 2).all()):
        yield fail("all-reduce", "gives wrong sums", "do not train here: a link or a library is broken")
        return
    start = time.monotonic()
    for _ in range(REPEATS):
        total = runtime.sum(values)
    float(total[0])  # waits for a GPU
    seconds = (time.monotonic() - start) / REPEATS
    sent = 2 * (ranks - 1) / ranks * values.numel() * 4
    backend = "NCCL" if runtime.device.type == "cuda" else "gloo"
    said = f"{mebibytes} MiB over {ranks} ranks by {backend}: {1000 * seconds:.0f} ms, {sent / seconds / 1e9:.2f} GB/s"
    yield ok("all-reduce", said)


def wandb(timeout: float = 5.0) -> Iterator[Finding]:
    """Whether tracking=wandb can go online."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    address = urlsplit(server)
    host = address.hostname or ""
    offline = "runs are kept offline; `wandb sync` uploads them later, from where there is internet"
    try:
        socket.create_connection((host, address.port or (80 if address.scheme == "http" else 443)), timeout).close()
    except OSError as error:
        yield warn("wandb", f"{server} does not answer ({error.strerror or error})", offline)
        return
    if "WANDB_API_KEY" not in os.environ and not _has_login(host):
        yield warn("wandb", f"{server} answers, but there is no key", "`wandb login`, or runs are kept offline")
    else:
        yield ok("wandb", f"{server} answers, and there is a key")


def _has_login(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
