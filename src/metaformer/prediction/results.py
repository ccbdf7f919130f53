"""Prints predictions batch by batch, and writes the requested files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from metaformer.errors import UserError, warn
from metaformer.prediction.class_names import ClassNames
from metaformer.prediction.pictures import MAX_IN_GRID, OverlayFiles, Pixels, overlay, save_grid, to_pixels
from metaformer.prediction.predictions import Prediction, predict, table_head, table_lines, to_json_line, write_csv


@dataclass(frozen=True)
class Wanted:
    """The requested output; None for files that are not requested.

    Attributes:
        top_k: number of classes for each image.
        as_json: whether to print lines of JSON instead of a table.
        cam: folder for heat maps.
    """

    top_k: int = 5
    as_json: bool = False
    csv: Path | None = None
    grid: Path | None = None
    cam: Path | None = None


class Results:
    """Collects predictions; `finish` writes the files that need all of them.

    Args:
        names: names of all images, including those that cannot be read.
    """

    def __init__(self, wanted: Wanted, classes: ClassNames, names: Sequence[str]) -> None:
        self._wanted, self._classes = wanted, classes
        head, self._width = table_head(names)
        self._head: str | None = None if wanted.as_json else head
        self._predictions: list[Prediction] = []
        self._pixels: list[Pixels] = []  # of the first predictions
        self._overlays = None if wanted.cam is None else OverlayFiles(wanted.cam)
        self._empty_maps = 0

    def add(self, names: Sequence[str], pixels: Tensor, logits: Tensor, maps: Tensor | None) -> None:
        """Print the predictions of a batch, and write its heat maps.

        Args:
            pixels: uint8 [B, 3, S, S], as the network received them.
            logits: float32 [B, classes].
            maps: float32 [B, H, W] in [0, 1] if heat maps are wanted.
        """
        predictions = predict(names, logits, self._wanted.top_k)
        if self._wanted.as_json:
            lines = [to_json_line(prediction, self._classes) for prediction in predictions]
        else:
            lines = list(table_lines(predictions, self._classes, self._width))
            if self._head is not None and lines:
                lines.insert(0, self._head)
                self._head = None
        if lines:
            print(*lines, sep="\n", flush=True)
        if self._wanted.csv is not None or self._wanted.grid is not None:
            self._predictions += predictions
        if self._wanted.grid is not None:
            room = max(0, MAX_IN_GRID - len(self._pixels))
            self._pixels += [to_pixels(image) for image in pixels[:room]]
        if self._overlays is not None and maps is not None:
            self._save_overlays(self._overlays, names, pixels, maps)

    def finish(self) -> None:
        """Write the CSV file and the grid."""
        wanted = self._wanted
        if self._empty_maps:
            warn(f"{self._empty_maps} heat maps are empty: no position of the layer speaks for the predicted class")
        if wanted.csv is not None:
            try:
                write_csv(wanted.csv, self._predictions, self._classes)
            except OSError as error:
                raise _not_written("csv", wanted.csv, error) from error
        if wanted.grid is not None and self._pixels:
            shown = self._predictions[: len(self._pixels)]
            if len(shown) < len(self._predictions):
                warn(f"--grid={wanted.grid}: shows the first {len(shown)} of {len(self._predictions):,} images")
            try:
                save_grid(wanted.grid, self._pixels, shown, self._classes)
            except OSError as error:
                raise _not_written("grid", wanted.grid, error) from error

    def _save_overlays(self, files: OverlayFiles, names: Sequence[str], pixels: Tensor, maps: Tensor) -> None:
        for name, image, heat in zip(names, pixels, maps, strict=True):
            self._empty_maps += not heat.any()
            try:
                files.save(name, overlay(to_pixels(image), heat))
            except OSError as error:
                assert self._wanted.cam is not None
                raise _not_written("cam", self._wanted.cam, error) from error


def _not_written(option: str, file: Path, error: OSError) -> UserError:
    return UserError(f"--{option}={file}: cannot be written ({error.strerror or error}); free space or give another")
