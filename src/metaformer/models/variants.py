"""Functions that create networks: the papers' by name, the user's own from a composition, and timm's."""

from dataclasses import replace
from pathlib import Path

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from metaformer.errors import UserError, one_line, printable, unknown_name
from metaformer.models.architectures import build_architecture
from metaformer.models.composition import Composition
from metaformer.models.config import OWN_NETWORK
from metaformer.models.families import COMPOSITIONS
from metaformer.models.metaformer import Architecture, MetaFormer, MetaFormerBlock
from metaformer.models.record import read_record, refuse_own_parts, refuse_target
from metaformer.models.token_mixers import Pooling

POOLING = (Pooling,) * 4
VARIANTS = {name: build_architecture(composition) for name, composition in COMPOSITIONS.items()}


def find_architecture(name: str) -> Architecture:
    """Return the architecture of one of `list_models()`, or the one that a weights file records."""
    if name in VARIANTS:
        return VARIANTS[name]
    if not Path(name).is_file():
        raise unknown_name("model.name", name, VARIANTS)
    record = read_record(Path(name))
    if record is None:
        raise UserError(f"{name}: does not record its network; give one of list_models() and load the file's weights")
    refuse_target(name, record, "create_target_model")
    if record.parts is None:
        raise UserError(f"{name}: is of timm's {record.name}; use create_timm_model")
    refuse_own_parts(Path(name), record.parts)
    return build_architecture(record.parts)


def find_timm_cfg(name: str) -> PretrainedCfg:
    """Return timm's configuration of a network's weights; a name without a tag means timm's default weights."""
    if not timm.is_model(name):
        raise unknown_name("model.name", name, timm.list_models())
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=True) or PretrainedCfg()
    except RuntimeError as error:  # the tag is not registered
        known = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise unknown_name("model.name", name, known) from error


def create_model(
    name: str | Composition,
    num_classes: int = 1000,
    drop_path_rate: float | None = None,
    image_size: int = 224,
    head_dropout: float | None = None,
) -> MetaFormer:
    """Create a network with freshly initialised weights.

    Args:
        name: one of `list_models()`, the composition of another network, or a weights file of this project, which
            records its network.
        num_classes: size of the last layer.
        drop_path_rate: None takes the paper's rate for this network.
        image_size: side of the images in pixels; only networks with position embeddings, spatial FC or a random matrix
            use it.
        head_dropout: None takes the paper's rate; only networks with an MLP head have one.
    """
    architecture = find_architecture(name) if isinstance(name, str) else build_architecture(name)
    own = isinstance(name, Composition) and bool(name.own_parts)
    if drop_path_rate is not None:
        architecture = replace(architecture, drop_path_rate=drop_path_rate)
    if head_dropout is not None:
        architecture = replace(architecture, head_dropout=head_dropout)
    try:
        model = MetaFormer(architecture, num_classes, image_size)
        if own:
            _try(model, image_size)
        return model
    except (TypeError, ValueError, RuntimeError) as error:  # a part does not fit the others
        named = name if isinstance(name, str) else OWN_NETWORK
        raise UserError(f"model={named}: cannot be made ({one_line(error)})") from error


def _try(model: MetaFormer, image_size: int) -> None:
    """Compute logits of two images, and check that token mixers keep the shape of their input.

    Raises:
        ValueError: a shape is wrong.
        TypeError, RuntimeError: of a part.
    """

    def check(mixer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        if out.shape != inputs[0].shape:
            raise ValueError(f"{type(mixer).__name__} makes {list(out.shape)} of {list(inputs[0].shape)}")

    blocks = [module for module in model.modules() if isinstance(module, MetaFormerBlock)]
    hooks = [block.token_mixer.register_forward_hook(check) for block in blocks]
    try:
        logits = _run_once(model, image_size)
    finally:
        for hook in hooks:
            hook.remove()
    if logits.shape != (2, model.num_classes):
        raise ValueError(f"the head makes {list(logits.shape)}, not {[2, model.num_classes]}")


def create_timm_model(
    name: str, num_classes: int = 1000, drop_path_rate: float | None = None, image_size: int | None = None
) -> nn.Module:
    """Create any of timm's networks with freshly initialised weights.

    Args:
        name: a network of timm.
        num_classes: size of the last layer.
        drop_path_rate: None keeps timm's rate; a rate for a network without drop path is refused.
        image_size: side of the images in pixels; only networks for one size use it, and some of them refuse another.
    """
    cfg = find_timm_cfg(name)
    is_other = image_size is not None and cfg.fixed_input_size and cfg.input_size[-1] != image_size
    options = {"drop_path_rate": drop_path_rate, "img_size": image_size if is_other else None}
    given = {option: value for option, value in options.items() if value is not None}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **given)
        if image_size is not None and is_other:
            _run_once(model, image_size)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if is_other and not (isinstance(error, TypeError) and "drop_path_rate" in str(error)):
            raise UserError(
                f"image_size={image_size}: timm's {name} is for images of {cfg.input_size[-1]} pixels and takes no "
                f"others ({printable(one_line(error), 200)}); set image_size={cfg.input_size[-1]}"
            ) from error
        if not isinstance(error, TypeError):
            raise
        raise UserError(f"model.drop_path_rate={drop_path_rate}: timm's {name} does not accept it ({error})") from error
    return model


@torch.no_grad()
def _run_once(model: nn.Module, image_size: int) -> Tensor:
    """Return logits of two black images; the model is in training mode afterwards."""
    logits: Tensor = model.eval()(torch.zeros(2, 3, image_size, image_size))
    model.train()
    return logits
