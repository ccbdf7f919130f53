"""DALI graphs that turn encoded files and draws into images; crops follow `geometry`, computed in float64.

Importing this module requires DALI. Arguments and results of type `Node` are DALI graph nodes, with one value per
image.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math

from metaformer.data.load.config import LoaderConfig
from metaformer.data.plan.plan import TRIES, BatchPlan, Plan

Node = Any

CHANNELS = 3
MAX_PREALLOCATED = 1 / 16  # share of the GPU's memory for the hardware decoder


class PipelineTarget(NamedTuple):
    """Device and input of a pipeline.

    Attributes:
        threads: number of CPU threads.
        decoded: the input is the regions to be resized, uint8 [H, W, 3], instead of encoded files.
    """

    device: torch.device
    threads: int
    decoded: bool = False


def build_pipeline(feed: Any, plan: Plan, config: LoaderConfig, target: PipelineTarget) -> Any:
    """Build a pipeline whose only output is uint8 [H, W, 3] images.

    Args:
        feed: returns the arrays of the next batch: the bytes of B files, uint8 [bytes], or B regions; and, for a plan
            with random crops, widths and heights of the tries float64 [B, T], left and top float64 [B] (not for
            regions), flip and bicubic int32 [B].
    """
    first = plan.batch(0, 0)
    device, gpu = target.device, target.device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else None
    decoder = decoder_options(config, plan.batch_size, memory)
    regions = not gpu or config.region_decode

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=plan.batch_size,
        num_threads=target.threads,
        device_id=device.index if gpu else None,
        prefetch_queue_depth=config.prefetch_batches,
        exec_dynamic=True,
    )
    def pipeline() -> Node:
        if target.decoded:
            return _graph_on_pixels(feed, first, gpu)
        if first.crop is None:
            return _evaluation_graph(feed, first, decoder)
        return _training_graph(feed, first, decoder, regions)

    built = pipeline()
    built.build()
    return built


def decoder_options(config: LoaderConfig, batch_size: int, gpu_memory: int | None) -> dict[str, Any]:
    """Return options for DALI's decoders of whole images and of regions.

    Args:
        gpu_memory: bytes; None on a CPU.
    """
    options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if gpu_memory is not None:
        width, height = preallocated_size(config, batch_size, gpu_memory)
        options |= {
            "device": "mixed",
            "jpeg_fancy_upsampling": True,  # like libjpeg
            "hw_decoder_load": config.hw_decoder_load,
            "preallocate_width_hint": width,
            "preallocate_height_hint": height,
        }
    return options


def preallocated_size(config: LoaderConfig, batch_size: int, gpu_memory: int) -> tuple[int, int]:
    """Return the width and height for which the hardware decoder preallocates memory, for each image of its batch.

    A batch of 1,024 times ImageNet's largest image would be 77 GB, so the sides are reduced alike until the hardware's
    share of a batch takes at most MAX_PREALLOCATED of the GPU's memory. Larger images then allocate when they appear.
    """
    width, height = config.preallocate_width, config.preallocate_height
    images = math.ceil(batch_size * config.hw_decoder_load)
    needed = images * width * height * CHANNELS
    factor = math.sqrt(min(1.0, MAX_PREALLOCATED * gpu_memory / needed)) if needed else 1.0
    return math.floor(width * factor), math.floor(height * factor)


def cut_out(encoded: Node, start: Node, shape: Node, decoder: dict[str, Any], regions: bool) -> Node:
    """Cut regions out of images; start and shape are (vertical, horizontal), and `regions` decodes nothing else."""
    if regions:
        return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], **decoder)
    return fn.slice(fn.decoders.image(encoded, **decoder), start=start, shape=shape, axes=[0, 1])


def _graph_on_pixels(feed: Any, plan: BatchPlan, gpu: bool) -> Node:
    pixels, flag = (types.UINT8, 3, "HWC"), (types.INT32, 0)
    if plan.crop is None:
        (images,) = _source(feed, pixels)
        shape = images.shape(dtype=types.INT64)
        return _resize_and_center_crop(images.gpu() if gpu else images, shape[0], shape[1], plan)
    images, flip, bicubic = _source(feed, pixels, flag, flag)
    return _resize_and_flip(images.gpu() if gpu else images, flip, bicubic, plan.image_size)


def _evaluation_graph(feed: Any, plan: BatchPlan, decoder: dict[str, Any]) -> Node:
    (encoded,) = _source(feed, (types.UINT8, 1))
    height, width = _height_and_width(encoded)
    return _resize_and_center_crop(fn.decoders.image(encoded, **decoder), height, width, plan)


def _resize_and_center_crop(images: Node, height: Node, width: Node, plan: BatchPlan) -> Node:
    resize_to, size = plan.resize_to, plan.image_size
    short = dali_math.min(height, width)
    sides = fn.stack(resize_to * height // short, resize_to * width // short)
    images = fn.resize(
        images,
        size=fn.cast(sides, dtype=types.FLOAT),
        interp_type=types.INTERP_CUBIC if plan.bicubic else types.INTERP_LINEAR,
        antialias=True,
    )
    margin = sides - size
    half = margin // 2
    start = half + (half & margin & 1)  # rounds half to even, like Python and torchvision
    return fn.slice(images, start=fn.cast(start, dtype=types.INT32), shape=[size, size], axes=[0, 1])


def _training_graph(feed: Any, plan: BatchPlan, decoder: dict[str, Any], regions: bool) -> Node:
    assert plan.crop is not None
    tries, share, flag = (types.FLOAT64, 1), (types.FLOAT64, 0), (types.INT32, 0)
    encoded, *crop_draws, flip, bicubic = _source(feed, (types.UINT8, 1), tries, tries, share, share, flag, flag)
    start, shape = _random_resized_crop(encoded, crop_draws, plan.crop.aspects)
    images = cut_out(encoded, start, shape, decoder, regions)
    return _resize_and_flip(images, flip, bicubic, plan.image_size)


def _resize_and_flip(images: Node, flip: Node, bicubic: Node, size: int) -> Node:
    linear, cubic = int(types.INTERP_LINEAR), int(types.INTERP_CUBIC)
    interp_type = fn.cast(bicubic * (cubic - linear) + linear, dtype=types.INTERP_TYPE)
    images = fn.resize(images, resize_x=size, resize_y=size, interp_type=interp_type, antialias=True)
    return fn.flip(images, horizontal=flip)


def _random_resized_crop(encoded: Node, draws: list[Node], aspects: tuple[float, float]) -> tuple[Node, Node]:
    """Compute `geometry.random_resized_crop` as a graph: start and shape, each (vertical, horizontal), int32."""
    width_shares, height_shares, left, top = draws
    height, width = (fn.cast(side, dtype=types.FLOAT64) for side in _height_and_width(encoded))
    scale = dali_math.sqrt(width * height)
    widths, heights = (dali_math.floor(scale * shares + 0.5) for shares in (width_shares, height_shares))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    # The first try that fits has the highest rank. Reductions do not support float64; float32 is exact here.
    rank = fn.cast(fits, dtype=types.FLOAT) * types.Constant(np.arange(TRIES, 0, -1, dtype=np.float32))
    best = fn.reductions.max(rank)
    chosen = fn.cast((rank == best) & fits, dtype=types.FLOAT)
    none_fits = best == 0

    def side(tried: Node, limit: Node, other: Node, factor: float) -> Node:
        picked = fn.cast(fn.reductions.sum(chosen * fn.cast(tried, dtype=types.FLOAT)), dtype=types.FLOAT64)
        centred = dali_math.min(limit, dali_math.floor(other * factor + 0.5))
        return picked + centred * none_fits

    def offset(share: Node, limit: Node, taken: Node) -> Node:
        margin = limit - taken
        return dali_math.floor(share * (margin + 1)) * (best > 0) + dali_math.floor(margin / 2) * none_fits

    crop_width = side(widths, width, height, aspects[1])
    crop_height = side(heights, height, width, 1 / aspects[0])
    start = fn.stack(offset(top, height, crop_height), offset(left, width, crop_width))
    shape = fn.stack(crop_height, crop_width)
    return fn.cast(start, dtype=types.INT32), fn.cast(shape, dtype=types.INT32)


def _height_and_width(encoded: Node) -> tuple[Node, Node]:
    shape = fn.peek_image_shape(encoded, dtype=types.INT64, adjust_orientation=False)
    return shape[0], shape[1]


def _source(feed: Any, *outputs: tuple[Any, int] | tuple[Any, int, str]) -> list[Node]:
    """Return the nodes of the arrays of `feed`, given the type, dimensions and, for images, layout of each."""
    dtypes, dims, layouts = zip(*((*output, "")[:3] for output in outputs), strict=True)
    return list(
        fn.external_source(
            source=feed,
            num_outputs=len(dims),
            batch=True,
            dtype=list(dtypes),
            ndim=list(dims),
            layout=list(layouts),
        )
    )
