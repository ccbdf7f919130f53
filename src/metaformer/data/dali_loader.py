"""The loader on NVIDIA DALI: decodes on the GPU where there is one, with CPU pipelines otherwise.

DALI's own readers shuffle badly and cannot resume exactly, so none is used: the plan's file names and draws go in
through `external_source`, and the graph computes the crops of `geometry` in float64.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from metaformer.data.index import ImageIndex
from metaformer.data.loader import LoaderConfig
from metaformer.data.pil_reader import BAD_FILE, describe_bad_file, read_with_pil
from metaformer.data.plan import TRIES, BatchPlan, Plan
from metaformer.errors import UserError


def dali_is_installed() -> bool:
    """Whether `loader=dali` can work at all."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class DaliLoader:
    """A `Loader` on a DALI pipeline; images come out on `device`.

    Args:
        threads: CPU threads of the pipeline.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, index: ImageIndex, plan: Plan, config: LoaderConfig, device: torch.device, threads: int) -> None:
        self._index, self._plan = index, plan
        self._prefix = np.frombuffer(os.fsencode(f"{index.folder.absolute()}/"), np.uint8)
        self._pending: Iterator[BatchPlan] = iter(())
        self._fed: list[BatchPlan] = []  # gone into the pipeline and not come out, to name a bad file
        self._pipeline = _build_pipeline(self._feed, plan, config, device, threads)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        self._drain()
        positions = range(first, self._plan.batches_per_epoch)
        self._pending = (self._plan.batch(epoch, position) for position in positions)
        self._pipeline.reset()
        for _ in positions:
            try:
                (images,) = self._pipeline.run()
            except RuntimeError as error:
                raise UserError(self._name_bad_file(self._fed[0], error)) from error
            self._fed.pop(0)
            yield from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)

    def _drain(self) -> None:
        """An epoch that was not read to its end left batches in the pipeline."""
        self._pending = iter(())
        while self._fed:
            with suppress(RuntimeError, StopIteration):
                self._pipeline.run()
            self._fed.pop(0)

    def close(self) -> None:
        del self._pipeline

    def _feed(self) -> tuple[NDArray[Any], ...]:
        """DALI calls this ahead of the batch that comes out; StopIteration ends the epoch."""
        plan = next(self._pending)
        self._fed.append(plan)
        paths = self._index.paths[plan.samples]
        files = np.concatenate([np.broadcast_to(self._prefix, (len(plan), len(self._prefix))), paths], axis=1)
        if plan.crop is None:
            return (files,)
        crop = plan.crop
        widths, heights = (np.ascontiguousarray(shares) for shares in np.moveaxis(crop.tries, -1, 0))
        left, top = (np.ascontiguousarray(share) for share in crop.position.T)
        return files, widths, heights, left, top, crop.flip.astype(np.int32), crop.bicubic.astype(np.int32)

    def _name_bad_file(self, plan: BatchPlan, error: RuntimeError) -> str:
        """DALI names no file when decoding fails: try the batch's files with PIL."""
        for row, sample in enumerate(plan.samples):
            path = self._index.path(int(sample))
            try:
                read_with_pil(path, plan, row)
            except BAD_FILE as reason:
                return describe_bad_file(path, reason)
        message = " ".join(str(error).split("encountered:")[-1].split())
        return f"loader=dali: the pipeline failed, though PIL reads every file of the batch ({message[:300]})"


def _build_pipeline(feed: Any, plan: Plan, config: LoaderConfig, device: torch.device, threads: int) -> Any:
    try:
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali import math as dali_math
    except ImportError as error:
        raise UserError("loader=dali: DALI is not installed; `uv pip install nvidia-dali-cuda130`") from error

    gpu = device.type == "cuda"
    first = plan.batch(0, 0)
    size = first.image_size
    decoder: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if gpu:
        decoder |= {
            "device": "mixed",
            "jpeg_fancy_upsampling": True,  # as libjpeg does
            "hw_decoder_load": config.hw_decoder_load,
            "preallocate_width_hint": config.preallocate_width,
            "preallocate_height_hint": config.preallocate_height,
        }

    def height_and_width(encoded: Any) -> tuple[Any, Any]:
        shape = fn.peek_image_shape(encoded, dtype=types.INT64, adjust_orientation=False)
        return shape[0], shape[1]

    def source(*types_and_dims: tuple[Any, int]) -> Any:
        dtypes, dims = zip(*types_and_dims, strict=True)
        return fn.external_source(source=feed, num_outputs=len(dims), batch=True, dtype=list(dtypes), ndim=list(dims))

    def evaluation() -> Any:
        (files,) = source((types.UINT8, 1))
        encoded = fn.io.file.read(files, dont_use_mmap=True)
        height, width = height_and_width(encoded)
        short = dali_math.min(height, width)
        sides = fn.stack(first.resize_to * height // short, first.resize_to * width // short)
        images = fn.resize(
            fn.decoders.image(encoded, **decoder),
            size=fn.cast(sides, dtype=types.FLOAT),
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )
        room = sides - size
        half = room // 2
        start = fn.cast(
            half + (half & room & 1), dtype=types.INT32
        )  # rounds halves to even, as Python and torchvision do
        return fn.slice(images, start=start, shape=[size, size], axes=[0, 1])

    def training(aspects: tuple[float, float]) -> Any:
        double = (types.FLOAT64, 0)
        tries = (types.FLOAT64, 1)
        files, width_shares, height_shares, left, top, flip, bicubic = source(
            (types.UINT8, 1), tries, tries, double, double, (types.INT32, 0), (types.INT32, 0)
        )
        encoded = fn.io.file.read(files, dont_use_mmap=True)
        height, width = (fn.cast(side, dtype=types.FLOAT64) for side in height_and_width(encoded))

        scale = dali_math.sqrt(width * height)
        widths, heights = (dali_math.floor(scale * shares + 0.5) for shares in (width_shares, height_shares))
        fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
        # The first try that fits has the highest rank; reductions do not take float64, float32 holds these integers.
        rank = fn.cast(fits, dtype=types.FLOAT) * types.Constant(np.arange(TRIES, 0, -1, dtype=np.float32))
        best = fn.reductions.max(rank)
        chosen = fn.cast((rank == best) & fits, dtype=types.FLOAT)
        none = best == 0

        def side(tried: Any, limit: Any, other: Any, factor: float) -> Any:
            picked = fn.cast(fn.reductions.sum(chosen * fn.cast(tried, dtype=types.FLOAT)), dtype=types.FLOAT64)
            centred = dali_math.min(limit, dali_math.floor(other * factor + 0.5))
            return picked + centred * none

        crop_width = side(widths, width, height, aspects[1])
        crop_height = side(heights, height, width, 1 / aspects[0])

        def offset(share: Any, limit: Any, taken: Any) -> Any:
            room = limit - taken
            return dali_math.floor(share * (room + 1)) * (best > 0) + dali_math.floor(room / 2) * none

        start = fn.cast(fn.stack(offset(top, height, crop_height), offset(left, width, crop_width)), dtype=types.INT32)
        shape = fn.cast(fn.stack(crop_height, crop_width), dtype=types.INT32)
        if gpu:
            images = fn.slice(fn.decoders.image(encoded, **decoder), start=start, shape=shape, axes=[0, 1])
        else:
            images = fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], **decoder)
        linear, cubic = int(types.INTERP_LINEAR), int(types.INTERP_CUBIC)
        interp_type = fn.cast(bicubic * (cubic - linear) + linear, dtype=types.INTERP_TYPE)
        images = fn.resize(images, resize_x=size, resize_y=size, interp_type=interp_type, antialias=True)
        return fn.flip(images, horizontal=flip)

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=plan.batch_size,
        num_threads=threads,
        device_id=device.index if gpu else None,
        prefetch_queue_depth=config.prefetch_batches,
        exec_dynamic=True,
    )
    def pipeline() -> Any:
        return evaluation() if first.crop is None else training(first.crop.aspects)

    built = pipeline()
    built.build()
    return built
