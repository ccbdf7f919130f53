"""How long a step takes on many GPUs, from the time of one GPU, the gradients' bytes and the links' speeds.

The exchange has NCCL's two levels: the GPUs of a node reduce among themselves, each exchanges its part with the same
GPU of the other nodes, all of them over the node's network cards, and the node's GPUs gather. A ring of n moves
2 (n - 1) / n times the bytes through each member (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms").
DDP starts it bucket by bucket while the backward pass runs: what outlasts that pass is waited for, and the last bucket
in any case.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

BACKWARD = 2 / 3  # of a step's arithmetic: two products for each of the forward pass's
JPEG_BYTES = 115_000  # the mean of ImageNet-1K's training images: 147.9 GB / 1,281,167
LR_PER_IMAGE = 1e-3 / 1024  # the recipe's


@dataclass(frozen=True)
class Links:
    """How fast gradients travel; one direction."""

    gpus_per_node: int
    within_node: float  # bytes/s, of each GPU
    between_nodes: float  # bytes/s, of all network cards of a node together
    latency: float  # seconds, of one hop


@dataclass(frozen=True)
class Work:
    """What each GPU does in a step."""

    compute: float  # seconds: forward, backward and update, without any exchange
    gradient_bytes: float
    bucket_bytes: float = 25 * 2**20  # of torch's DistributedDataParallel
    overlap: float = 1.0  # the share of the backward pass beside which an exchange can run; 0 where both use the CPU


class Step(NamedTuple):
    """Seconds of a step."""

    exchange: float  # of the gradients, whether or not it is waited for
    waited: float  # what of it the step is longer by
    total: float


def exchange_seconds(gradient_bytes: float, links: Links, gpus: int) -> float:
    """An all-reduce of so many bytes over so many GPUs, whole nodes of them or part of one."""
    local = min(gpus, links.gpus_per_node)
    nodes = math.ceil(gpus / links.gpus_per_node)
    within = 2 * (local - 1) / local * gradient_bytes / links.within_node
    between = 2 * (nodes - 1) / nodes * gradient_bytes / links.between_nodes
    hops = 2 * (local - 1) + 2 * math.ceil(math.log2(nodes))  # NCCL takes trees between many nodes
    return within + between + hops * links.latency


def predict(work: Work, links: Links, gpus: int) -> Step:
    """The time of a step."""
    if gpus == 1:
        return Step(0.0, 0.0, work.compute)
    exchange = exchange_seconds(work.gradient_bytes, links, gpus)
    hidden = work.overlap * BACKWARD * work.compute
    last_bucket = exchange * min(1.0, work.bucket_bytes / work.gradient_bytes)
    waited = max(exchange - hidden, last_bucket)
    return Step(exchange, waited, work.compute + waited)
