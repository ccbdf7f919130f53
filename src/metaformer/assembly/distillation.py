"""Builds the training loss of a run, with its teacher."""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from metaformer.assembly.adoption import adopt, find_record
from metaformer.assembly.parts import LocatedWeights, locate_weights, make_model
from metaformer.assembly.preprocessing import resolve_config
from metaformer.config import TrainConfig
from metaformer.errors import UserError
from metaformer.files import sha256
from metaformer.models import list_models, load_weights
from metaformer.models.classifier import classifier_names
from metaformer.models.config import AUTO, Library, ModelConfig, Preprocessing
from metaformer.models.record import Record, refuse_target
from metaformer.models.weight_formats import StateDict
from metaformer.runtime import Runtime
from metaformer.training.config import DistillConfig
from metaformer.training.distillation import DistillationLoss, Teacher
from metaformer.training.losses import Loss, make_loss
from metaformer.training.precision import Precision


@dataclass(frozen=True)
class Distillation:
    """The training loss of a run, with a teacher if it has one.

    Attributes:
        identity: the network and the SHA-256 of the teacher's weights; None without a teacher.
        lines: lines for the log about the teacher.
    """

    loss: Loss
    identity: str | None = None
    lines: tuple[str, ...] = ()


class _Source(NamedTuple):
    """A teacher's weights and the record of its network."""

    weights: LocatedWeights
    sha256: str
    record: Record | None


def make_distillation(
    config: TrainConfig, images: Preprocessing, classes: tuple[str, ...], num_classes: int, runtime: Runtime,
    precision: Precision,
) -> Distillation:  # fmt: skip
    """Return the configured loss; load the teacher, if there is one, on every rank.

    Args:
        images: The student's preprocessing.
        classes: Names of the data set's classes, which a teacher must have too.
    """
    loss, name = make_loss(config.loss), config.distill.teacher
    if name is None:
        return Distillation(loss)
    source = runtime.from_main(partial(_find, config.distill, name))
    of_teacher, own_images = resolve_config(_configuration(config, source.record, name), name)
    _check(source.record, own_images, images, classes, num_classes, name)
    dtype = precision.inference_dtype
    model, fused = make_model(of_teacher, own_images, num_classes, runtime, dtype)

    no_head = (f"distill.teacher={name}", "a teacher with a linear classifier")

    def check_outputs(state: StateDict) -> StateDict:
        own, prefixes = model.state_dict(), tuple(f"{layer}." for layer in classifier_names(model, *no_head))
        for key in (key for key in own if key.startswith(prefixes) and key in state):
            if state[key].shape[:1] != own[key].shape[:1]:
                raise _other_outputs(name, state[key].shape[0], num_classes)
        return state

    load_weights(model, source.weights.path, source.weights.use_ema, check_outputs)
    teacher = Teacher(model.eval().requires_grad_(False), own_images.image_size, precision.inference_autocast)
    size = own_images.image_size
    resized = f", images resized to {size} px" if size != images.image_size else ""
    lines = (
        f"teacher      {of_teacher.model.name}, fused blocks {fused}",
        f"teacher      {source.weights.name}, sha256 {source.sha256[:12]}",
        f"teacher      weight {config.distill.weight:g}, temperature {config.distill.temperature:g}{resized}",
    )
    identity = f"{of_teacher.model.name} {source.sha256}"
    return Distillation(DistillationLoss(config.distill, teacher, loss), identity, lines)


def _find(config: DistillConfig, name: str) -> _Source:
    weights = locate_weights("distill.teacher", name, config.use_ema)
    return _Source(weights, sha256(weights.path), find_record(name, weights.path))


def _configuration(config: TrainConfig, record: Record | None, name: str) -> TrainConfig:
    """Return the configuration with the teacher's network instead of the student's."""
    given = config.distill.model
    if given is not None and ":" in given:
        model = ModelConfig(AUTO, target=given)
    elif given is not None:
        model = ModelConfig(given, Library.metaformer if given in list_models() else Library.timm)
    elif record is not None:
        refuse_target(name, record, "distill.model")
        model = ModelConfig(record.name, record.library)
    else:
        raise UserError(
            f"distill.teacher={name}: does not record its network; give distill.model=NAME, "
            "a network of this project or of timm"
        )
    model = replace(model, fused=config.model.fused)
    adopted, _ = adopt(replace(config, model=model, image_size=None), record, name)
    return adopted


def _check(
    record: Record | None,
    own: Preprocessing,
    images: Preprocessing,
    classes: tuple[str, ...],
    num_classes: int,
    name: str,
) -> None:
    """Raise an error unless the teacher's classes, mean and std are those of the student."""
    if record is not None and record.num_classes not in (None, num_classes):
        raise _other_outputs(name, record.num_classes, num_classes)
    if record is not None and record.classes not in (None, classes):
        raise UserError(
            f"distill.teacher={name}: its classes have other names than those of the data set; "
            "give a teacher of the same classes"
        )
    for field in ("mean", "std"):
        teachers, students = list(getattr(own, field)), list(getattr(images, field))
        if teachers != students:
            raise UserError(
                f"distill.teacher={name}: expects images of {field} {teachers}, the student of {students}; "
                f"give model.{field}=[{','.join(map(str, teachers))}], or another teacher"
            )


def _other_outputs(name: str, outputs: int | None, num_classes: int) -> UserError:
    return UserError(
        f"distill.teacher={name}: has {outputs} outputs, but the student has {num_classes}; "
        "give a teacher of the same classes"
    )
