"""Regression on images, which has no classes: the network predicts an angle, or the noise that was added."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from utils import shard

from .images import Batch, Data, ImageTask, Plan, Split
from .sampling import generator_for

NOISE = 0.5  # standard deviations of the images


def turned(images: Tensor, number: int, own: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The images turned by random angles of up to 45 degrees, and the angles (shard, 1)."""
    share = (2 * torch.rand(number, 1, generator=generator, device=images.device) - 1)[own]
    angle = share * math.pi / 4
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    turns = torch.stack([torch.cat([cos, -sin, zero], 1), torch.cat([sin, cos, zero], 1)], 1)  # (shard, 2, 3)
    grid = functional.affine_grid(turns, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False), math.sqrt(3) * share


def noisy(images: Tensor, number: int, own: slice, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The images with Gaussian noise, and the noise, of their shape."""
    noise = torch.randn(number, *images.shape[1:], generator=generator, device=images.device)[own]
    return images + NOISE * noise, noise


PREDICTED = {"angle": (turned, 1), "noise": (noisy, 3)}  # what makes the pairs, and the network's outputs


class RegressionTask(ImageTask):
    """Least squares on images: loss and test_loss are mean squared errors, test_r2 the share explained in %.

    predict is "angle" or "noise"; all targets have mean 0 and variance 1. A pair depends on the seed and the step only,
    in evaluation on its place. Takes the arguments of ImageTask; label noise is for classes.
    """

    metric = "r2"

    def __init__(self, data: Data, *, predict: str, **options: Any):
        super().__init__(data, **options)
        if self.train.true_labels is not None:
            raise ValueError(f"label_noise changes classes, and the network predicts the {predict}; leave it out")
        self.pair, self.num_outputs = PREDICTED[predict]
        self.num_classes = None

    def sums(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The sums over the images of the squared error and of what is explained, 0-d; both are means over outputs."""
        counts = ~targets.flatten(1).isnan().any(1)
        if not counts.all():  # before the square, whose gradient would be NaN, too
            outputs, targets = outputs[counts], targets[counts]
        errors = (outputs.float() - targets).square().flatten(1).mean(1)
        return errors.sum(), (1 - errors).sum()

    def _batches(self, split: Split, plan: Plan) -> Iterator[Batch]:
        plan, same_plan = itertools.tee(plan)
        for place, (batch, (indices, key)) in enumerate(zip(super()._batches(split, plan), same_plan, strict=True)):
            own, is_duplicate = shard(len(indices))
            generator = generator_for(*(key or (0, 10, place)), 11, device=self.device)
            inputs, targets = self.pair(batch.inputs, len(indices), own, generator)
            if is_duplicate:
                targets.fill_(math.nan)
            yield Batch(inputs.contiguous(memory_format=torch.channels_last), targets, batch.size)
