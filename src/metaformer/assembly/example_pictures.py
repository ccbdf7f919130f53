"""Adds pictures with heat maps to the list of a validation's worst and best images, for the run's report."""

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaformer.assembly.exporting import data_of_run
from metaformer.assembly.parts import colour_statistics, evaluation_plan, make_reader, memory_format, open_index
from metaformer.assembly.trained_network import load_trained_network
from metaformer.config import CommonConfig, ValidateConfig
from metaformer.data.device.transfer import to_device
from metaformer.data.device.transform import normalize
from metaformer.data.index.files import check_split_folder
from metaformer.data.index.image_index import ImageIndex
from metaformer.data.load.bad_file import BAD_FILE
from metaformer.data.load.image_bytes import ImageBytes
from metaformer.errors import UserError
from metaformer.files import to_json, write_text_atomically
from metaformer.models.config import Preprocessing
from metaformer.models.last_stage import find_layer
from metaformer.prediction.grad_cam import grad_cam
from metaformer.prediction.pictures import thumbnail, to_pixels
from metaformer.runtime import Runtime
from metaformer.training.manifest import read_manifest
from metaformer.training.precision import Precision

# Errors that keep pictures from being added, for which no program should fail.
PICTURE_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, UserError)


def add_pictures(
    file: Path, model: nn.Module, config: CommonConfig, images: Preprocessing, index: ImageIndex, runtime: Runtime
) -> None:
    """Add pictures to the listed images that can be read, unless the list already has pictures.

    Args:
        file: a file written by `evaluation.extremes.write_extremes`.
        model: the network with the weights of that validation, on the runtime's device.

    Raises:
        PICTURE_ERRORS: the list cannot be read or written, or the network cannot be run.
    """
    listed = json.loads(file.read_text())
    entries: list[dict[str, Any]] = [*listed["worst"], *listed["best"]]
    if not entries or any("picture" in entry for entry in entries):
        return
    read = list(_read(entries, config, images, index))
    if not read:
        raise UserError(f"{index.folder}: none of the images of {file} can be read")
    pixels = torch.stack([image for _, image in read])
    maps = _heat_maps(model, pixels, config, images, runtime)
    for number, (entry, image) in enumerate(read):
        picture = thumbnail(to_pixels(image), None if maps is None else maps[number])
        entry["picture"] = base64.b64encode(picture).decode()
    write_text_atomically(file, to_json(listed, indent=1) + "\n")


def add_pictures_of_run(run: Path, file: Path, config: ValidateConfig, runtime: Runtime) -> None:
    """Add pictures for a run folder, with the checkpoint of that validation, on the CPU.

    Args:
        config: any configuration of an evaluation in fp32; the checkpoint determines the rest.
    """
    step = json.loads(file.read_text())["step"]
    found = [folder for folder in (run / "checkpoints").glob("*-*") if _step(folder) == step]
    if not found:
        raise UserError(f"{run}: no checkpoint of step {step} is kept, whose images are the worst and best")
    runtime = replace(runtime, device=torch.device("cpu"))
    config = replace(
        config,
        checkpoint=str(found[0]),
        use_ema=file.name.startswith("ema_"),
        data=data_of_run(run),
        channels_last=False,
    )
    check_split_folder(Path(config.data.root), config.data.val_split)  # before the network is built
    network = load_trained_network(config, runtime, None)
    index = open_index(network.config, runtime, config.data.val_split)
    add_pictures(file, network.model, network.config, network.images, index, runtime)


def _step(checkpoint: Path) -> int | None:
    try:
        step: int | None = read_manifest(checkpoint)["progress"].get("step")
        return step
    except UserError:
        return None


def _read(
    entries: list[dict[str, Any]], config: CommonConfig, images: Preprocessing, index: ImageIndex
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield each image that can be read and is the one that was validated, uint8 [3, S, S]."""
    reader, stored = make_reader(config.loader), ImageBytes(index)
    plan = evaluation_plan(images, num_samples=1, batch_size=1).batch(0, 0)
    for entry in entries:
        sample = entry["sample"]
        if sample < len(index) and index.name(sample) == entry["image"]:
            try:
                image: Tensor = reader.read(stored.read(sample), plan, 0)
            except BAD_FILE:
                continue
            yield entry, image
    stored.close()


def _heat_maps(
    model: nn.Module, pixels: Tensor, config: CommonConfig, images: Preprocessing, runtime: Runtime
) -> Tensor | None:
    """Return Grad-CAM's maps on the CPU; None if the last stage is not known, or has at most one position."""
    batch = normalize(to_device(pixels, runtime.device), colour_statistics(images))
    batch = batch.contiguous(memory_format=memory_format(config))
    try:
        layer = find_layer(model.eval(), None, "report")
        with Precision(config.precision, runtime.device).autocast():
            return grad_cam(model, layer, batch)[1].cpu()
    except (UserError, ValueError):
        return None
