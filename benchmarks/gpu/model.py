"""A model of a training step's time: each launch takes as long as its memory traffic, instructions or products.

A Triton kernel with matrix products takes as long as its instructions and its products together: the products wait for
the instructions between them, and programs that run side by side hide that in part only.

The constants are from data sheets and published measurements, not from this project's own runs. To correct them,
compare predictions with measurements (`python -m benchmarks.gpu --measured FILE`).
"""

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.gpu.recording import Launch

SHARE_OF_COPY = 0.92  # bandwidth of kernels, as a share of that of a large copy
SHARE_OF_SLOTS = 0.75  # share of the instruction slots that kernels use
SHARE_OF_PRODUCTS = 0.85  # rate of the network's matrix products, as a share of that of a large one
SHARE_OF_TRITON_PRODUCTS = 0.43  # the same of products in Triton kernels: half the rate of cuBLAS
SHORTEST_LAUNCH = 2.25e-6  # seconds on the device
HOST_SECONDS = 34e-6  # host time per launch: Python, autograd and the launch itself
SLOTS = 4  # instructions that a multiprocessor can start per cycle, one per scheduler


class Gpu(NamedTuple):
    """A GPU model.

    Attributes:
        arch: compute capability; 90 means sm_90.
        multiprocessors: number of streaming multiprocessors.
        clock: clock rate in Hz.
        copy_rate: bytes per second that a large copy reads and writes.
        product_rate: FLOP per second of a large bfloat16 matrix product.
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


class PredictedTime(NamedTuple):
    """Predicted time and memory traffic of a sequence of launches.

    Attributes:
        launches: number of launches.
        bytes: memory traffic.
        issue_seconds: time to issue the instructions of the Triton kernels alone.
        seconds: time on the device.
    """

    launches: int
    bytes: int
    issue_seconds: float
    seconds: float


def predict(launches: Iterable[Launch], gpu: Gpu) -> PredictedTime:
    """Predict the time of launches that run one after the other."""
    count = total = 0
    issue = seconds = 0.0
    for launch in launches:
        instructions = _issue_seconds(launch, gpu)
        memory = launch.bytes / (gpu.copy_rate * SHARE_OF_COPY)
        share = SHARE_OF_PRODUCTS if launch.facts is None else SHARE_OF_TRITON_PRODUCTS
        products = launch.flops / (gpu.product_rate * share)
        count, total, issue = count + 1, total + launch.bytes, issue + instructions
        seconds += max(memory, instructions + products, SHORTEST_LAUNCH)  # a launch of torch has no instructions
    return PredictedTime(count, total, issue, seconds)


def step_seconds(predicted: PredictedTime) -> float:
    """Return the predicted time of a step: the device's, or the host's if that is longer."""
    return max(predicted.seconds, predicted.launches * HOST_SECONDS)


def _issue_seconds(launch: Launch, gpu: Gpu) -> float:
    """Return the time to issue a Triton kernel's instructions; the threads of a warp share one instruction."""
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
    "to": "casts",
    "_fused_adamw_": "optimizer",
}


def by_part(launches: Iterable[Launch]) -> dict[str, list[Launch]]:
    """Group launches into the rows of a table: one for each Triton kernel and for each kind of torch operator."""
    parts: dict[str, list[Launch]] = {}
    for launch in launches:
        name = launch.name if launch.facts is not None else PARTS.get(launch.name, "other operators of torch")
        parts.setdefault(name, []).append(launch)
    return parts
