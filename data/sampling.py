"""Seeded random generators and class-balanced samples."""

import numpy as np
import torch
from torch import Tensor


def generator_for(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator seeded by the key, so that the randomness of any step can be had without the steps before."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
    return torch.Generator(device).manual_seed(seed)


def balanced_sample(labels: Tensor, candidates: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """`number` of the candidate indices, sorted, with class sizes as equal as possible."""
    shuffled = candidates[torch.randperm(len(candidates), generator=generator)]
    place_in_class = torch.empty(len(shuffled), dtype=torch.long)
    for label in labels[shuffled].unique():
        members = labels[shuffled] == label
        place_in_class[members] = torch.arange(int(members.sum()))
    return shuffled[place_in_class.argsort(stable=True)[:number]].sort().values


def without(total: int, taken: Tensor) -> Tensor:
    """The indices below `total` that are not taken."""
    free = torch.ones(total, dtype=torch.bool)
    free[taken] = False
    return free.nonzero().squeeze(1)
