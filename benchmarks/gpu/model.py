"""A model of a training step's time: for each launch, the slowest of memory, instructions and products.

The constants are from data sheets and from measurements that others published, not from this project's runs. Compare
them with measurements (`python -m benchmarks.gpu --measured`), and correct them.
"""

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.gpu.recording import Launch

SHARE_OF_COPY = 0.92  # of the bandwidth of a large copy, which kernels reach
SHARE_OF_SLOTS = 0.75  # of the instruction slots, which kernels reach
SHARE_OF_PRODUCTS = 0.85  # of the rate of a large product, which the network's products reach
SHORTEST_LAUNCH = 2.25e-6  # seconds on the device
HOST_SECONDS = 34e-6  # of the host per launch, of Python, autograd and the launch itself
SLOTS = 4  # instructions that a multiprocessor can start per cycle, one per scheduler


class Gpu(NamedTuple):
    """A GPU model.

    Attributes:
        arch: 90 means sm_90.
        multiprocessors, clock: clock in Hz.
        copy_rate: bytes per second that a large copy reads and writes.
        product_rate: FLOP per second of a large bfloat16 product.
    """

    arch: int
    multiprocessors: int
    clock: float
    copy_rate: float
    product_rate: float


GPUS = {
    "H200": Gpu(90, 132, 1.755e9, 4.3e12, 790e12),
    "H100": Gpu(90, 132, 1.755e9, 3.0e12, 790e12),
    "A100": Gpu(80, 108, 1.41e9, 1.75e12, 280e12),
    "RTX 4090": Gpu(89, 128, 2.52e9, 0.92e12, 165e12),
}


class Cost(NamedTuple):
    """The predicted cost of launches.

    Attributes:
        seconds: of the device.
        issue_seconds: that it takes to start the instructions of the Triton kernels alone.
    """

    launches: int
    bytes: int
    issue_seconds: float
    seconds: float


def cost_of(launches: Iterable[Launch], gpu: Gpu) -> Cost:
    """Return the predicted cost of launches one after the other."""
    count = total = 0
    issue = seconds = 0.0
    for launch in launches:
        instructions = _issue_seconds(launch, gpu)
        memory = launch.bytes / (gpu.copy_rate * SHARE_OF_COPY)
        products = launch.flops / (gpu.product_rate * SHARE_OF_PRODUCTS)
        count, total, issue = count + 1, total + launch.bytes, issue + instructions
        seconds += max(memory, instructions, products, SHORTEST_LAUNCH)
    return Cost(count, total, issue, seconds)


def step_seconds(cost: Cost) -> float:
    """Return the predicted time of a step: the device's, or the host's where that is longer."""
    return max(cost.seconds, cost.launches * HOST_SECONDS)


def _issue_seconds(launch: Launch, gpu: Gpu) -> float:
    """Return the time to start a Triton kernel's instructions; one instruction serves the threads of a warp."""
    if launch.facts is None:
        return 0.0
    executed = launch.programs * launch.facts.warps * launch.facts.instructions
    return executed / (gpu.multiprocessors * gpu.clock * SLOTS * SHARE_OF_SLOTS)


PARTS = {
    "mm": "matrix products",
    "addmm": "matrix products",
    "convolution": "convolutions",
    "convolution_backward": "convolutions",
    "_to_copy": "casts",
    "_fused_adamw_": "optimizer",
}


def by_part(launches: Iterable[Launch]) -> dict[str, list[Launch]]:
    """Group launches into the rows of a table: each Triton kernel, and kinds of torch's operators."""
    parts: dict[str, list[Launch]] = {}
    for launch in launches:
        name = launch.name if launch.facts is not None else PARTS.get(launch.name, "other operators of torch")
        parts.setdefault(name, []).append(launch)
    return parts
