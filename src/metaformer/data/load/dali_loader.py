"""Loader based on NVIDIA DALI, which decodes on the GPU if there is one and in CPU pipelines otherwise.

DALI's own readers shuffle poorly and cannot resume exactly. Instead, the plan's draws and the files' bytes are passed
through `external_source` into the graphs of `dali_pipeline`. RandAugment runs on the device afterwards, because DALI
has neither PIL's equalize nor bicubic warps. Files that DALI cannot decode, or decodes differently from PIL, are passed
as pixels decoded by PIL. Of images that are stored decoded, only the region to be resized is passed.
"""

import importlib.util
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from metaformer.data.device.randaugment import BatchAugmentation, apply_to_batch
from metaformer.data.index.image_index import ImageIndex
from metaformer.data.load.bad_file import BAD_FILE, describe_bad_file
from metaformer.data.load.config import LoaderConfig
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.data.load.image_file import (
    Encoded,
    PixelArray,
    StoredImage,
    as_ppm,
    check_pixels,
    cut_out,
    decode_rgb,
    has_plain_pixels,
    jpeg_header,
    open_image,
    read_ahead,
)
from metaformer.data.load.pil_reader import PilReader
from metaformer.data.plan.geometry import central_part
from metaformer.data.plan.plan import BatchPlan, Plan
from metaformer.errors import UserError
from metaformer.interfaces import Waiting

READERS = 16  # threads that read files, in addition to the pipeline's; on slow storage they mostly wait


def dali_is_installed() -> bool:
    """Return whether DALI is installed, as `loader=dali` requires."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class DaliLoader:
    """A `Loader` based on a DALI pipeline; the images are on `device`.

    Args:
        threads: number of CPU threads of the pipeline.
        augment: applies RandAugment to channels_last images on the device.
    """

    def __init__(
        self,
        index: ImageIndex,
        plan: Plan,
        config: LoaderConfig,
        device: torch.device,
        threads: int,
        augment: BatchAugmentation = apply_to_batch,
    ) -> None:
        self._index, self._plan, self._stored, self._augment = index, plan, ImageBytes(index), augment
        self._max_pixels = config.max_pixels
        self._decoded = index.shards is not None and index.shards.pixels is not None
        self._unreadable: dict[int, str] = {}  # messages by sample, for images that are stored decoded
        self._readers = ThreadPoolExecutor(READERS)
        # Given the stream that uses its images, DALI orders its work before torch's without waiting for the GPU.
        self._streams = (torch.cuda.current_stream(device),) if device.type == "cuda" else ()
        self._pending: Iterator[tuple[BatchPlan, Any]] = iter(())
        self._in_pipeline: list[BatchPlan] = []  # needed to name a bad file
        self.waited, self._fed = Waiting(), 0.0  # seconds in which the pipeline waited for files
        try:
            from metaformer.data.load.dali_pipeline import PipelineTarget, build_pipeline
        except ImportError as error:
            raise UserError("loader=dali: DALI is not installed; run `uv pip install nvidia-dali-cuda130`") from error
        self._pipeline = build_pipeline(self._feed, plan, config, PipelineTarget(device, threads, self._decoded))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        self._drain()
        positions = range(first, self._plan.batches_per_epoch)
        plans = (self._plan.to_read(epoch, position) for position in positions)
        self._pending = self._read_ahead(plans)
        self._pipeline.reset()
        for _ in positions:
            yield self._next_batch()

    def check_decoding(self) -> None:
        """Make the first batch twice; if the pixels differ, raise an error, because a run would not resume exactly."""
        if not self._plan.batches_per_epoch:
            return
        self._drain()
        self._pending = self._read_ahead(iter([self._plan.to_read(0, 0)] * 2))
        self._pipeline.reset()
        one, other = self._next_batch().clone(), self._next_batch()
        different = int((one != other).flatten(1).any(dim=1).sum())
        if different:
            raise UserError(
                f"loader=dali: {different} of {len(one)} images had other pixels when they were decoded again, so a "
                "run would not resume bit for bit; use loader=torch, try loader.hw_decoder_load=0, or accept it with "
                "loader.check_decoding=false"
            )

    def _next_batch(self) -> Tensor:
        self._fed, started = 0.0, time.perf_counter()
        try:
            (images,) = self._pipeline.run(*self._streams)
        except RuntimeError as error:
            raise UserError(self._name_bad_file(self._in_pipeline[0], error)) from error
        pixels = from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
        decoded = time.perf_counter()
        done = self._in_pipeline.pop(0)
        self._check_readable(done)
        if done.randaugment is not None:
            pixels = self._augment(pixels, done.randaugment)
        self.waited = Waiting(self._fed, max(0.0, decoded - started - self._fed), time.perf_counter() - decoded)
        return pixels

    def _check_readable(self, plan: BatchPlan) -> None:
        for sample in plan.samples.tolist() if self._unreadable else ():
            if sample in self._unreadable:
                raise UserError(self._unreadable[sample])

    def _drain(self) -> None:
        """Discard the batches that an unfinished epoch left in the pipeline."""
        self._pending = iter(())
        self._unreadable.clear()
        while self._in_pipeline:
            with suppress(RuntimeError, StopIteration):
                self._pipeline.run()
            self._in_pipeline.pop(0)

    def close(self) -> None:
        del self._pipeline
        self._readers.shutdown()
        self._stored.close()

    def _feed(self) -> tuple[NDArray[Any], ...]:
        """Return the inputs of the next batch. DALI calls this ahead of its output; StopIteration ends the epoch."""
        started = time.perf_counter()
        plan, images = next(self._pending)
        self._fed += time.perf_counter() - started
        self._in_pipeline.append(plan)
        if plan.crop is None:
            return (images,)
        crop = plan.crop
        flip, bicubic = crop.flip.astype(np.int32), crop.bicubic.astype(np.int32)
        if self._decoded:
            return images, flip, bicubic
        widths, heights = (np.ascontiguousarray(sides) for sides in np.moveaxis(crop.tries, -1, 0))
        left, top = (np.ascontiguousarray(position) for position in crop.position.T)
        return images, widths, heights, left, top, flip, bicubic

    def _read_ahead(self, plans: Iterator[BatchPlan]) -> Iterator[tuple[BatchPlan, list[StoredImage]]]:
        """Yield each plan with its images, while the images of the next plan are being read."""
        read = self._read_region if self._decoded else self._read_encoded
        reading: list[tuple[BatchPlan, list[Future[StoredImage]]]] = []
        for plan in plans:
            reading.append((plan, [self._readers.submit(read, plan, row) for row in range(len(plan))]))
            if len(reading) > 1:
                earlier, images = reading.pop(0)
                yield earlier, [image.result() for image in images]
        for last, images in reading:
            yield last, [image.result() for image in images]

    def _read_region(self, plan: BatchPlan, row: int) -> PixelArray:
        """Return the part of a decoded image that is resized; one black pixel for an image that cannot be read."""
        sample = int(plan.samples[row])
        try:
            pixels = self._stored.read(sample)
            height, width, _ = pixels.shape
            check_pixels(width, height, self._max_pixels)
        except BAD_FILE as error:
            self._unreadable[sample] = describe_bad_file(self._index.location(sample), error)
            return np.zeros((1, 1, 3), np.uint8)
        region = plan.region(row, width, height)
        read_ahead(pixels, region)
        return cut_out(pixels, region)

    def _read_encoded(self, plan: BatchPlan, row: int) -> Encoded:
        try:
            stored = self._stored.read(int(plan.samples[row]))
            return _encode_for_dali(stored, plan.crop is None, self._max_pixels)
        except BAD_FILE:  # DALI fails on this byte, so the error appears after the batches before it
            return np.zeros(1, np.uint8)

    def _name_bad_file(self, plan: BatchPlan, error: RuntimeError) -> str:
        """Find the bad file of a batch by decoding its files with PIL, because DALI's errors do not name it."""
        reader = PilReader(self._max_pixels)
        for row, sample in enumerate(plan.samples.tolist()):
            try:
                reader.read(self._stored.read(sample), plan, row)
            except BAD_FILE as reason:
                return describe_bad_file(self._index.location(sample), reason)
        message = " ".join(str(error).split("encountered:")[-1].split())
        return f"loader=dali: the pipeline failed, though PIL reads every file of the batch ({message[:300]})"


def _encode_for_dali(encoded: Encoded, resized_whole: bool, max_pixels: int) -> Encoded:
    """Return a file's bytes, or pixels decoded by PIL if DALI cannot decode the file or decodes it differently.

    DALI decodes JPEGs with one or three components and 8-bit PNGs. It does not get CMYK, whose polarity it takes from
    Adobe's marker alone, palettes, 16-bit images or other formats.

    Args:
        resized_whole: the image is resized whole; DALI then gets only the central part of a very elongated image.

    Raises:
        OSError, ValueError, ...: one of BAD_FILE: the image cannot be decoded, or has more than `max_pixels`.
    """
    header = jpeg_header(encoded)
    if header is not None and header.components in (1, 3):
        check_pixels(header.width, header.height, max_pixels)
        plain, size = True, (header.width, header.height)
    else:
        with open_image(encoded, max_pixels) as image:
            plain, size = image.format == "PNG" and has_plain_pixels(image), image.size
    part = central_part(*size) if resized_whole else None
    if plain and part is None:
        return encoded
    pixels = decode_rgb(encoded, max_pixels)
    if part is not None:
        pixels = pixels.crop(part.corners)
    return as_ppm(pixels)
