"""A running average of a network's weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlr_snet_optim.restoring import copy_all, preserved, preserved_modules


class Average:
    """w̄_t = β·w̄_{t−1} + (1 − β)·w_t, from w̄_0 = w_0: a running average of the weights, and one copy of them.

    Call update() before every step; MetaMLRSNetLR does so in its step(). `decay` is β.

    As a meta point it stands for the lookahead point: the meta gradient is taken at
    w̄_{t+1} = β·w̄_t + (1 − β)·(w_t − lr·d_t), whose derivative in lr is −(1 − β)·d_t. Noise averages out of w̄, so only
    what lasts counts. hypergradient leaves out the factor 1 − β, since Adam is invariant to it.
    """

    def __init__(self, network: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"average decay {decay}: must be at least 0 and below 1")
        self.network, self.decay, self.is_started = network, decay, False
        self.parameters: list[Tensor] = [parameter for parameter in network.parameters() if parameter.requires_grad]
        # 16 bits would round (1 − β)·(w − w̄) away.
        self.weights = [
            parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for parameter in self.parameters
        ]

    def check_holds(self, parameters: list[nn.Parameter]) -> None:
        """RuntimeError where the average leaves out one of the parameters."""
        if not set(parameters) <= set(self.parameters):
            raise RuntimeError("the average of the weights leaves out parameters that train: make it, or the schedule "
                               "that keeps it, on a network that has them all, and while they require a gradient")

    @staticmethod
    def decay_for(num_steps: int) -> float:
        """The β whose average reaches back over a twentieth of a run, between 10 and 1,000 steps."""
        return 1 - 1 / min(max(num_steps / 20, 10), 1000)

    @torch.no_grad()
    def update(self) -> None:
        self._follow()
        self.is_started = True
        # torch's AveragedModel, which does the same, makes the host wait for the GPU at every update.
        torch._foreach_lerp_(self.weights, self._present(), 1 - self.decay)

    @torch.no_grad()
    def _follow(self) -> None:
        if not self.is_started:  # weights may have been loaded or broadcast since the construction
            copy_all(self._present(), self.weights)

    @torch.no_grad()
    def mix_in(self) -> None:
        """w ← β·w̄_t + (1 − β)·w."""
        present = self._present()
        torch._foreach_lerp_(present, self.weights, self.decay)
        copy_all(present, self.parameters)

    def _present(self) -> list[Tensor]:
        """The parameters in the average's precision: themselves, or copies of those of 16 bits."""
        return [parameter.to(weight.dtype) for parameter, weight in zip(self.parameters, self.weights, strict=True)]

    @contextmanager
    def averaged_weights(self) -> Iterator[nn.Module]:
        """The network at the average, its present weights included, to evaluate or save it; restored on exit.

        Its BatchNorm statistics are those of the live weights: measure them anew inside the block, as
        torch.optim.swa_utils.update_bn does. They are restored, too.
        """
        self._follow()
        with preserved_modules(self.network, self.parameters), preserved([*self.parameters, *self.network.buffers()]):
            self.mix_in()
            torch.clear_autocast_cache()
            yield self.network

    def state_dict(self) -> dict[str, Any]:
        self._follow()
        return {"weights": [weight.clone() for weight in self.weights]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if [weight.shape for weight in self.weights] != [saved.shape for saved in state["weights"]]:
            raise ValueError("the state holds the average of another network, or of other parameters of it")
        for weight, saved in zip(self.weights, state["weights"], strict=True):
            weight.copy_(saved)
        self.is_started = True
