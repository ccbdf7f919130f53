"""Distillation: a teacher's predictions as additional soft targets (arXiv 1503.02531)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from metaformer.interfaces import Batch
from metaformer.training.config import DistillConfig
from metaformer.training.losses import Loss


@dataclass(frozen=True)
class Teacher:
    """A trained network, which is not trained further. It receives the student's images, mixed and erased.

    Attributes:
        model: in evaluation mode.
        image_size: side of the teacher's images in pixels; other images are resized to it.
        autocast: returns the context manager of its forward pass.
    """

    model: nn.Module
    image_size: int
    autocast: Callable[[], AbstractContextManager[None]]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 logits [B, C] of float32 images [B, 3, S, S]."""
        if images.shape[-1] != self.image_size:
            images = functional.interpolate(images, size=self.image_size, mode="bilinear", antialias=True)
        with self.autocast():
            logits: Tensor = self.model(images)
        return logits.float()


@dataclass(frozen=True)
class DistillationLoss:
    """(1 - weight) * loss of the labels + weight * T^2 * KL(teacher || student), both at temperature T.

    As in the paper, T^2 keeps the size of the gradients at any temperature.
    """

    config: DistillConfig
    teacher: Teacher
    labels: Loss

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the loss of float32 logits [B, C], a scalar."""
        temperature, weight = self.config.temperature, self.config.weight
        student = (logits / temperature).log_softmax(1)
        teacher = (self.teacher(batch.images) / temperature).log_softmax(1)
        divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return (1 - weight) * self.labels(logits, batch) + weight * temperature**2 * divergence
