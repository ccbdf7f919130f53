"""Builds a predictor of the classes of single images, with the network and preprocessing of an evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metaformer.assembly.parts import colour_statistics, evaluation_plan, make_reader, memory_format, worker_count
from metaformer.assembly.trained_network import load_trained_network
from metaformer.assembly.validation import weights_lines, why_not_finite
from metaformer.config import ValidateConfig
from metaformer.data.device.transfer import to_device
from metaformer.data.device.transform import normalize
from metaformer.data.load.config import LoaderName
from metaformer.data.load.listed_images import ListedImage, ReadImages, read_listed
from metaformer.errors import Diverged, UserError
from metaformer.models.config import Preprocessing
from metaformer.models.last_stage import find_layer, other_layer
from metaformer.prediction.class_names import ClassNames, find_class_names
from metaformer.prediction.grad_cam import grad_cam
from metaformer.runtime import Runtime
from metaformer.training.precision import Precision

CAM_LAYER = "--cam-layer"  # the option that names the part of a network for heat maps


class Outputs(NamedTuple):
    """The network's outputs for a batch.

    Attributes:
        read: the images, and the files that cannot be read.
        logits: float32 [B, classes], on the CPU.
        maps: heat maps of the most probable classes, float32 [B, H, W] in [0, 1], on the CPU; None if not requested.
    """

    read: ReadImages
    logits: Tensor
    maps: Tensor | None


@dataclass(frozen=True)
class Predictor:
    """A network with its weights, which predicts the classes of images.

    Attributes:
        notes: messages about the network, images, weights and classes.
        layer: the part of the network to make heat maps of, and its name for errors; None for no heat maps.
    """

    config: ValidateConfig
    runtime: Runtime
    model: nn.Module
    precision: Precision
    images: Preprocessing
    classes: ClassNames
    notes: list[str]
    layer: tuple[nn.Module, str] | None = None

    def __call__(self, images: Sequence[ListedImage]) -> Iterator[Outputs]:
        """Yield the network's outputs for the images, in batches.

        Raises:
            Diverged: the outputs for an image are not finite.
        """
        config = self.config
        plan = evaluation_plan(self.images, num_samples=1, batch_size=1).batch(0, 0)
        threads = max(1, worker_count(config, self.runtime))
        for batch in read_listed(images, make_reader(config.loader), plan, config.eval_batch_size, threads):
            if not batch.names:
                yield Outputs(batch, torch.empty(0, len(self.classes.names)), None)
                continue
            logits, maps = self._run(batch.pixels)
            for name, finite in zip(batch.names, logits.isfinite().all(1).tolist(), strict=True):
                if not finite:
                    cause = why_not_finite(self.model, self.precision)
                    raise Diverged(f"{name}: the network's outputs are not finite: {cause}")
            yield Outputs(batch, logits, maps)

    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits and heat maps of images uint8 [B, 3, S, S]."""
        with torch.no_grad():
            images = normalize(to_device(pixels, self.runtime.device), colour_statistics(self.images))
            images = images.contiguous(memory_format=memory_format(self.config))
            if self.layer is None:
                with torch.inference_mode(), self.precision.autocast():
                    return self.model(images).float().cpu(), None
            layer, name = self.layer
            try:
                with self.precision.autocast():
                    logits, maps = grad_cam(self.model, layer, images)
            except ValueError as error:
                raise UserError(f"{name}: {error}; {other_layer(self.model, CAM_LAYER)}") from error
            return logits.cpu(), maps.cpu()


def build_predictor(config: ValidateConfig, runtime: Runtime, heat_maps: bool, layer: str | None) -> Predictor:
    """Find the weights, build their network and load them.

    Args:
        heat_maps: also compute heat maps.
        layer: name of the part of the network to make heat maps of; None takes the last stage.
    """
    if runtime.world_size > 1:
        raise UserError("predict: a program of one process; start it without torchrun")
    if config.loader.name is LoaderName.dali:
        raise UserError("loader=dali: stops at the first bad file; leave loader= out, or give loader=pil")
    if heat_maps and config.compile:
        raise UserError("compile=true: not possible with --cam; leave it out")
    precision = Precision(config.precision, runtime.device)
    config, images, model, outputs, record, weights, notes = load_trained_network(config, runtime, precision.dtype)
    classes = find_class_names(record.classes if record else None, outputs)
    notes += [
        f"model        {config.model.name}",
        *images.lines,
        *weights_lines(weights),
        f"classes      {classes.origin}",
    ]
    target = None
    if heat_maps:
        name = "--cam: the last stage" if layer is None else f"{CAM_LAYER}={layer}"
        target = (find_layer(model, layer, CAM_LAYER), name)
    return Predictor(config, runtime, model, precision, images, classes, notes, target)
