"""Whether DALI decodes regions of JPEGs here as it decodes whole ones: `python -m metaformer.data.region_check DEVICE`.

DEVICE is `cpu` or a GPU's number. Exit code 0: the regions have the whole images' pixels; 3: they have others. It is a
program of its own, because a decoder that does not work may crash its process, or never end. Needs DALI.
"""

import sys
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from PIL import Image

from metaformer.data.dali_pipeline import Node, cut_out, decoder_options
from metaformer.data.loader import LoaderConfig

SIZES = ((500, 375), (333, 500), (64, 48), (1200, 900))  # width, height
SUBSAMPLINGS = ("4:2:0", "4:4:4")
DIFFERENT = 3  # exit code; Python's own of a failure is 1
MOST_DIFFERENCE = (
    1.0  # of 255, mean of an image: a GPU may round otherwise in a region; one pixel beside differs by far
)


def main() -> None:
    """Compare, and tell by the exit code."""
    device = sys.argv[1]
    sys.exit(0 if regions_equal(None if device == "cpu" else int(device)) else DIFFERENT)


def regions_equal(gpu: int | None) -> bool:
    """Whether each region of some JPEGs has the pixels of the decoded whole, on a GPU or, for None, on the CPU."""
    encoded = [_jpeg(*size, subsampling) for size in SIZES for subsampling in SUBSAMPLINGS]
    starts, shapes = _regions([size for size in SIZES for _ in SUBSAMPLINGS])

    @pipeline_def(batch_size=len(encoded), num_threads=1, device_id=gpu)  # type: ignore[untyped-decorator]
    def pipeline() -> tuple[Node, ...]:
        jpegs, start, shape = fn.external_source(source=lambda: (encoded, starts, shapes), num_outputs=3)
        options = decoder_options(LoaderConfig(), gpu is not None)
        return tuple(cut_out(jpegs, start, shape, options, regions) for regions in (True, False))

    built = pipeline()
    built.build()
    regions, wholes = (output.as_cpu() for output in built.run())
    pairs = [(np.asarray(regions[i], np.float64), np.asarray(wholes[i], np.float64)) for i in range(len(encoded))]
    return all(a.shape == b.shape and np.abs(a - b).mean() <= MOST_DIFFERENCE for a, b in pairs)


def _jpeg(width: int, height: int, subsampling: str) -> NDArray[np.uint8]:
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    buffer = BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95, subsampling=subsampling)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _regions(sizes: list[tuple[int, int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Starts and shapes, each [N, 2] (vertical, horizontal): odd places, up to an edge, the whole image."""
    heights_and_widths = np.array(sizes)[:, ::-1]
    shares = np.resize([(0.1, 0.55), (0.37, 0.63), (0.0, 1.0)], (len(sizes), 2))
    starts = (heights_and_widths * shares[:, :1]).astype(np.int32)
    return starts, np.maximum(1, heights_and_widths * shares[:, 1:]).astype(np.int32)


if __name__ == "__main__":
    main()
