"""Tests of the loss with a teacher."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from metaformer.errors import UserError
from metaformer.interfaces import Batch
from metaformer.training.config import DistillConfig, LossConfig
from metaformer.training.distillation import DistillationLoss, Teacher
from metaformer.training.losses import make_loss


class Means(nn.Module):
    """A network whose logits are the means of the colours; it records the images that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return images.mean((2, 3)) * self.scale


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 4.0), (1.0, 1.0), (0.0, 2.0)])
def test_value_and_gradient(weight: float, temperature: float) -> None:
    """The loss equals its definition in float64; the teacher gets no gradient."""
    torch.manual_seed(0)
    images, targets = torch.randn(5, 3, 8, 8), torch.rand(5, 3).softmax(1)
    logits, teacher = torch.randn(5, 3, requires_grad=True), Means()
    config = DistillConfig("teacher", weight=weight, temperature=temperature)
    labels = make_loss(LossConfig())
    loss = DistillationLoss(config, Teacher(teacher, 8, nullcontext), labels)(logits, Batch(images, targets))
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    soft = (2 * images.double().mean((2, 3)) / temperature).softmax(1)
    divergence = (soft * (soft.log() - (exact / temperature).log_softmax(1))).sum(1).mean()
    hard = -(targets * exact.log_softmax(1)).sum(1).mean()
    expected = (1 - weight) * hard + weight * temperature**2 * divergence
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert logits.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert teacher.scale.grad is None


def test_images_are_resized_to_the_teachers_size() -> None:
    """A teacher of 16 px gets the student's 8 px images enlarged."""
    images, teacher = torch.randn(2, 3, 8, 8), Means()
    Teacher(teacher, 16, nullcontext)(images)
    torch.testing.assert_close(teacher.images, interpolate(images, size=16, mode="bilinear", antialias=True))


def test_options_without_a_teacher_are_refused() -> None:
    """A weight alone would have no effect."""
    with pytest.raises(UserError, match=r"^distill\.weight=0\.9: there is no teacher; give distill\.teacher too"):
        DistillConfig(weight=0.9)
