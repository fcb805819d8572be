"""Hooks and checks in the loop where a schedule drives an optimizer."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mlr_snet_optim.directions import DIRECTIONS, update_directions
from mlr_snet_optim.rates import Ratios
from mlr_snet_optim.restoring import parameters_of, whole


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer that Accelerate or Lightning has wrapped, or itself."""
    packages = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
    while type(optimizer).__module__.split(".")[0] in packages:
        optimizer = optimizer.optimizer
    return optimizer


def before_update(optimizer: Optimizer, act: Callable[[], None]) -> RemovableHandle:
    """Make every optimizer.step() call act() right before its update: after its closure has run for the first time."""

    def before_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        is_first = True

        def closure_then_act() -> Any:
            nonlocal is_first
            result = closure() if closure else None
            # GradScaler leaves it to a fused optimizer to skip a step.
            if is_first and not getattr(optimizer, "found_inf", 0):
                is_first = False
                act()
            return result

        if closure:
            return args[:1], {**kwargs, "closure": closure_then_act}
        closure_then_act()
        return None

    return optimizer.register_step_pre_hook(torch.compiler.disable(before_step))


def is_registered(handle: RemovableHandle) -> bool:
    return handle.id in (handle.hooks_dict_ref() or {})


class ReachError(RuntimeError):
    """The next step moves the weights too far to be meant."""


class LoopWatch:
    """Warns where the first two steps show that the loop makes its calls in the wrong order, where the planned steps
    are over, and where the optimizer no longer steps.
    """

    LONG_IDLE = 50  # calls without a step of the optimizer; GradScaler skips fewer in a row

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.num_calls = 0
        self.num_updates = 0  # that the optimizer has made since the last call
        self.num_idle = 0  # calls since it has made one
        self.had_state = False  # whether the optimizer had a state at the first call
        self.is_reach_checked = False
        self.hook = optimizer.register_step_post_hook(self._count_update)

    def _count_update(self, *_: Any) -> None:
        self.num_updates += 1

    def before_step(self, schedule: Any) -> None:
        """Warn of what is wrong before this step of the schedule, for the caller of its step()."""
        problem = self._problem(schedule) if is_registered(self.hook) else ""  # copies of an optimizer have no hooks
        if schedule.steps_taken == schedule.num_steps and not problem:
            end = "the cool-down ends at rate 0" if schedule.cooldown else "the last net goes on"
            steps = f"{schedule.num_steps} optimizer steps (not epochs or micro-batches)"
            problem = f"the planned {steps} are over: {end}"
        self.num_calls, self.num_updates = self.num_calls + 1, 0
        if problem:
            warnings.warn(problem, stacklevel=4)

    def _problem(self, schedule: Any) -> str:
        if self.num_calls == 0:
            return self._at_first_step(schedule)
        if self.num_calls == 1:
            return self._at_second_step(schedule)
        is_captured = self.optimizer.param_groups[0].get("capturable")  # replaying a captured step runs no hooks
        self.num_idle = 0 if self.num_updates or is_captured else self.num_idle + 1
        if self.num_idle == self.LONG_IDLE:
            return (f"the optimizer has made no step for {self.LONG_IDLE} calls of step(loss): if another one trains "
                    "now, make a new schedule for it")
        return ""

    def _at_first_step(self, schedule: Any) -> str:
        self.had_state = self._has_state()
        if self.num_updates and not schedule.steps_taken and not schedule.handle:  # which skips a step of GradScaler
            return ("optimizer.step() came before the schedule's first step(loss), which sets the rate of the step "
                    "after it: call step(loss) between backward() and optimizer.step()")
        if all(parameter.grad is None for parameter in parameters_of(self.optimizer)):
            return ("no parameter of the optimizer has a gradient: call step(loss) after backward(), and give the "
                    "schedule the optimizer of the network that trains")
        states = [state for state in self.optimizer.state.values() if isinstance(state, dict) and state]
        steps = [state.get("step", 1) for state in states]  # Adagrad's begins with 0
        if schedule.phase < 0 and not schedule.steps_taken and any(step > 0 for step in steps):
            return ("the optimizer has trained before, and this schedule starts at its first step: in a resumed run "
                    "load the schedule's state_dict(), too")
        scales = {group.get("lr_scale", 1.0) for group in self.optimizer.param_groups}
        if len(scales) > 1 and len(set(schedule.ratios)) == 1:
            return ("the parameter groups have timm's lr_scale, which only its own schedulers apply, and equal rates: "
                    "multiply each group's lr by its lr_scale before the first step")
        return ""

    def _at_second_step(self, schedule: Any) -> str:
        if self.num_updates != 1 and not (schedule.handle and self.num_updates):  # GradScaler skips steps
            return (f"{self.num_updates} optimizer steps lie between two calls of step(loss): call it once before each "
                    "of them, but not before one that GradScaler skips, and under accumulation with the mean over the "
                    "micro-batches")
        if schedule.steps_taken > 1 and self._has_state() and not self.had_state:
            return (f"the optimizer began anew, and this schedule went on at step {schedule.steps_taken}: in a resumed "
                    "run load the optimizer's state_dict(), too")
        return ""

    def _has_state(self) -> bool:
        return any(self.optimizer.state.values())

    def check_reach(self, ratios: Ratios, lr: float | Tensor) -> None:
        """RuntimeError where gradients are still scaled; ReachError where the first finite lookahead is that long."""
        if getattr(self.optimizer, "grad_scale", None) is not None:  # of a fused optimizer
            raise RuntimeError("the gradients are still scaled: call scaler.unscale_(optimizer) before scaler.step()")
        update = {} if self.is_reach_checked else update_directions(self.optimizer, ratios)
        if not update:
            return
        weights = torch.stack([whole(parameter.detach().norm()) for parameter in update]).norm()
        lengths = [whole(direction(parameter).norm()) for parameter, direction in update.items()]
        moved = float(lr) * torch.stack(lengths).norm()
        if not moved.isfinite():
            return
        if moved > 10 * weights.clamp(min=1) or _has_scaled_gradients(self.optimizer):
            raise ReachError(
                f"the next step moves weights of norm {float(weights):.3g} by {float(moved):.3g}: under GradScaler "
                "call scaler.unscale_(optimizer) before step(loss), or use attach(); else lower gamma, and scale the "
                "targets of a regression to about 1"
            )
        self.is_reach_checked = True


def _has_scaled_gradients(optimizer: Optimizer) -> bool:
    """Whether the gradients are a hundred times as long as the averages that SGD or Adam keeps of them."""
    lengths = []
    for group in optimizer.param_groups if type(optimizer) in DIRECTIONS else ():
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            average, weight = state.get("momentum_buffer"), 1.0
            if "exp_avg" in state:
                average, weight = state["exp_avg"], 1 - group["betas"][0] ** state["step"]
            if average is not None and parameter.grad is not None:
                lengths.append(torch.stack([whole(parameter.grad.norm()), whole(average.norm()) / weight]))
    gradients, averages = torch.stack(lengths).norm(dim=0).tolist() if lengths else (0.0, 0.0)
    return 0 < 100 * averages < gradients


def check_state(schedule: Any, state: dict[str, Any], expected: Iterable[str]) -> None:
    """ValueError for a state whose keys are not the ones of the schedule."""
    different = ", ".join(sorted(set(state) ^ set(expected)))
    if different:
        raise ValueError(f"not the state of a {type(schedule).__name__}: missing or unknown {different}")


def check_arrived(driven: list[nn.Parameter], terms: dict[nn.Parameter, Tensor], network: nn.Module) -> None:
    """RuntimeError where a parameter that trains has got no gradient from the meta loss."""
    missing = [parameter for parameter in driven if parameter not in terms]
    if missing:
        names = {parameter: name for name, parameter in network.named_parameters()}
        shown = ", ".join(names.get(parameter, f"one of shape {tuple(parameter.shape)}") for parameter in missing[:5])
        raise RuntimeError(
            f"{len(missing)} of {len(driven)} parameters with a training gradient got none from meta_loss ({shown}): "
            "it has to use the same network, without checkpointing by use_reentrant=True; or freeze them. Where the "
            "network skips some by design, add 0 * sum(p.sum() for p in network.parameters()) to the meta loss"
        )
