"""A network to export, and its comparison with the exported file."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaformer.errors import UserError
from metaformer.models.record import Record

TOLERANCE = 1e-4  # largest difference of a logit, as a share of the largest logit
INPUT, OUTPUT = "images", "logits"  # names of the exported network's input and output

Logits = Callable[[Tensor], Tensor]  # maps images to logits, both on the CPU


@dataclass(frozen=True)
class Exportable:
    """A network with its weights, and images for the comparison with the exported file.

    Attributes:
        model: in evaluation mode on the CPU.
        record: the network's name, parts, classes and preprocessing.
        resize: length of the short side before the crop, in pixels.
        images: preprocessed images, float32 [B, 3, S, S], at least two.
        origin: a phrase about the origin of these images, which begins with "of".
        weights: a name of the weights that is fit for publication.
    """

    model: nn.Module
    record: Record
    resize: int
    images: Tensor
    origin: str
    weights: str

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Return the network's own logits, which must be finite."""
        logits: Tensor = self.model(images)
        if not logits.isfinite().all():
            raise UserError(
                f"checkpoint={self.weights}: the outputs are not finite; use weights from before training diverged"
            )
        return logits

    def describe(self) -> dict[str, Any]:
        """Return a description of the exported network for other programs, as plain values for JSON."""
        side, values = self.images.shape[-1], self.record.to_values()
        values["images"] = (values["images"] or {}) | {"resize": self.resize}
        shape = ["batch", 3, side, side]
        content = "RGB in [0, 1], minus mean, divided by std"
        return values | {
            "input": {"name": INPUT, "type": "float32", "shape": shape, "content": content},
            "output": {"name": OUTPUT, "type": "float32", "shape": ["batch", self.record.num_classes]},
            "weights": self.weights,
        }


class Agreement(NamedTuple):
    """Difference between the logits of an exported network and the network's own.

    Attributes:
        difference: the largest absolute difference over all images and classes.
        largest: the largest absolute logit.
        images: a description of the images.
    """

    difference: float
    largest: float
    images: str

    @property
    def holds(self) -> bool:
        """Whether the difference is within TOLERANCE of the largest logit."""
        return self.difference <= TOLERANCE * self.largest  # false for NaN

    def __str__(self) -> str:
        return f"largest difference {self.difference:.2g}, largest logit {self.largest:.3g}, on {self.images}"


def compare(network: Exportable, exported: Logits) -> Agreement:
    """Compare the logits of all images at once and of the first one alone, because the batch size is variable."""
    differences, largest = [], 0.0
    for images in (network.images, network.images[:1]):
        expected = network.logits(images)
        differences.append((exported(images) - expected).abs().max())
        largest = max(largest, float(expected.abs().max()))
    difference = float(torch.stack(differences).max())
    return Agreement(difference, largest, f"{len(network.images)} images {network.origin}")


def check(network: Exportable, exported: Logits, program: str) -> Agreement:
    """Return how well the logits agree; raise an error if they do not.

    Args:
        program: name of the program that runs the exported network, for the error message.
    """
    agreement = compare(network, exported)
    if not agreement.holds:
        raise UserError(
            f"checkpoint={network.weights}: {program} computes other logits than torch ({agreement}; allowed is "
            f"{TOLERANCE:g} of the largest logit); nothing is written; please report it with the network's name"
        )
    return agreement
