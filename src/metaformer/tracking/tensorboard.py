"""Tracker for TensorBoard, which runs in a separate process (`tracker_process`)."""

import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metaformer.errors import UserError
from metaformer.interfaces import Row
from metaformer.tracking.service import Opened
from metaformer.tracking.tracker import NullTracker

FOLDER = "tensorboard"  # in the run folder
_COUNTS = ("kind", "epoch", "step", "samples")


class TensorBoardTracker(NullTracker):
    """Writes event files to RUN/tensorboard/train and RUN/tensorboard/validation, so that their curves share a plot.

    When a run resumes, TensorBoard drops the steps that training will take again. Each row is on disk before the
    next one is taken.
    """

    def open(self, run_dir: Path, resumed_at: int, validated: bool, first_position: int | None) -> Opened:
        """Open the event files.

        Args:
            resumed_at: Step at which training resumes; 0 for a new run.
            validated: Whether the checkpoint to resume from was saved after the validation of its step.
            first_position: Not used: the files do not count rows.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._make_writer: Any = SummaryWriter
        self._folder = run_dir / FOLDER
        self._train = self._writer("train", resumed_at + 1 if resumed_at else 0)
        self._validation = self._writer("validation", resumed_at + validated)
        self._validated_step: int | None = None
        return Opened("", None)

    def metrics(self, row: Row) -> None:
        if row["kind"] == "train":
            return _write(self._train, row)
        if row["kind"] == "final":
            if row["step"] == self._validated_step:
                return  # it repeats the validation
            # An earlier start may have written it, as the validation of its last step.
            self._validation.close()
            self._validation = self._writer("validation", row["step"])
        _write(self._validation, row)
        self._validated_step = row["step"]

    def picture(self, name: str, file: Path) -> None:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._train.add_image(name, pixels, 0, dataformats="HWC")
        self._train.flush()

    def close(self, failed: bool) -> None:
        self._train.close()
        self._validation.close()

    def check(self) -> None:
        """Do nothing, because there is no service process."""

    def bytes_moved(self) -> int:
        """Return 0, because closing writes almost nothing."""
        return 0

    def _writer(self, name: str, purge_step: int) -> Any:
        """Open a new event file, which makes TensorBoard drop earlier records of steps from `purge_step` on."""
        folder = self._folder / name
        if any(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
            # TensorBoard reads the files in the order of their names, which have a resolution of a second.
            time.sleep(1)
        return self._make_writer(str(folder), purge_step=purge_step)


def check_tensorboard() -> None:
    """Raise an error if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("tracking.tensorboard=true: not installed; run `uv pip install tensorboard`, or leave it false")


def _write(writer: Any, row: Row) -> None:
    for name in row.keys() - set(_COUNTS):
        writer.add_scalar(name, row[name], row["step"])
    writer.flush()
