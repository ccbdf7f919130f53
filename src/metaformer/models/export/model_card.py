"""Makes the model card of a network on the hub; unknown facts are reported as unknown."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from metaformer.models.export.exportable import TOLERANCE, Agreement, Exportable
from metaformer.models.heads import NormFirstHead

UNKNOWN = "unknown"
_MOST_CLASSES = 20  # number of classes in the card; config.json lists all


class Accuracy(NamedTuple):
    """Accuracy of the weights as measured by their run.

    Attributes:
        top1, top5: accuracies in percent.
        images: number of validation images.
        epoch: counted from 1.
        averaged: whether the weights are an average over training.
    """

    top1: float
    top5: float
    images: int
    epoch: int
    averaged: bool


@dataclass(frozen=True)
class Facts:
    """Known facts about the training of a network; None and empty values mean unknown.

    Attributes:
        data: name of the data set's folder.
        recipe: settings of the run by their names on the command line.
        software: versions and devices.
        commit: commit of this project's code.
        licence: the weights' licence as an identifier of the hub, such as apache-2.0.
    """

    accuracy: Accuracy | None = None
    data: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    software: str | None = None
    commit: str | None = None
    licence: str | None = None


class TimmNetwork(NamedTuple):
    """timm's network with the same name and the same weights.

    Attributes:
        name: the name without a tag of weights.
        agreement: the difference between its logits and the network's own.
    """

    name: str
    agreement: Agreement


def make_card(network: Exportable, facts: Facts, in_timm: TimmNetwork | None, title: str) -> str:
    """Return the text of README.md.

    Args:
        in_timm: timm's network of this name; None if it has none.
        title: the model's name on the hub.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    classes = network.record.classes
    return environment.get_template("model_card.md.jinja").render(
        header=_header(network, facts, in_timm, title),
        title=title,
        network=network,
        record=network.record,
        parameters=sum(parameter.numel() for parameter in network.model.parameters()),
        classes=None if classes is None else classes[:_MOST_CLASSES],
        more_classes=max(0, len(classes or ()) - _MOST_CLASSES),
        facts=facts,
        timm=in_timm,
        tolerance=TOLERANCE,
        norm_first=isinstance(getattr(network.model, "head", None), NormFirstHead),
        unknown=UNKNOWN,
    )


def _header(network: Exportable, facts: Facts, in_timm: TimmNetwork | None, title: str) -> str:
    """Return the card's metadata as YAML."""
    results = None
    if facts.accuracy is not None:
        data = facts.data or UNKNOWN
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=data,
                dataset_name=data,
                metric_type="accuracy",
                metric_name=name,
                metric_value=value,
            )
            for name, value in (("top-1", facts.accuracy.top1), ("top-5", facts.accuracy.top5))
        ]
    metadata = ModelCardData(
        license=facts.licence or UNKNOWN,
        library_name="timm" if in_timm is not None else "metaformer",
        tags=["image-classification", "metaformer", *(["timm"] if in_timm is not None else [])],
        pipeline_tag="image-classification",
        eval_results=results,
        model_name=title,
    )
    text: str = metadata.to_yaml()
    return text
