"""checkpoint.pth: all that continuing a run bit for bit needs."""

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils import all_gather, checksum, first_line, gather_hidden, plain, rank, save, shard_hidden

FORMAT = 5  # of the file
MAY_CHANGE = ("out", "resume", "data_root", "workers")  # from one start of a run to the next
KINDS: dict[str, Any] = {
    "arguments": dict, "data": str, "step": int, "hidden": (tuple, list, type(None)), "parts": dict, "rng": list,
}
OPTIONS = ("momentum", "dampening", "nesterov", "weight_decay", "betas", "eps", "maximize")


class Checkpoint:
    """The file of a run. `parts` are the things with a state_dict.

    The run's arguments, a fingerprint of its data and a checksum of its content stand in the file, too.
    """

    def __init__(self, args: argparse.Namespace, fingerprint: str, parts: dict[str, Any]):
        self.path, self.parts, self.seed = args.out / "checkpoint.pth", parts, args.seed
        self.data_root, self.fingerprint = args.data_root, fingerprint
        self.arguments = {name: plain(value) for name, value in vars(args).items() if name not in MAY_CHANGE}

    def save(self, step: int, hidden: Any) -> None:
        """Write the state after `step` steps; `hidden` is the hidden state that the next step takes."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        state = {
            "format": FORMAT,
            "arguments": self.arguments,
            "data": self.fingerprint,
            "step": step,
            "hidden": gather_hidden(hidden),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "rng": all_gather((torch.get_rng_state(), cuda)),
        }
        if rank() == 0:
            save(self.path, {**state, "checksum": checksum(state)})

    def load(self) -> tuple[int, Any]:
        """Restore the parts and this rank's random generators; returns the step and the hidden state.

        Raises ValueError, which names what is wrong, for a damaged checkpoint and for one of another run.
        """
        state = self._read()
        for name in self.arguments.keys() | state["arguments"].keys():
            theirs, ours = state["arguments"].get(name), self.arguments.get(name)
            if theirs != ours:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{self.path} belongs to another run: its {flag} is {theirs}, not {ours}")
        if state["data"] != self.fingerprint:
            raise ValueError(
                f"the data in {self.data_root} are not those that the run began with: their fingerprint is "
                f"{self.fingerprint}, in {self.path} it is {state['data']}; restore them or start a new run"
            )
        try:
            if state["parts"].keys() != self.parts.keys():
                raise ValueError(f"its parts are {', '.join(state['parts'])}")
            for name, part in self.parts.items():
                options = _options(part)
                part.load_state_dict(state["parts"][name])
                if _options(part) != options:
                    raise ValueError(f"the options of an optimizer are {_options(part)}, not {options}")
                _check_fit(part, state["parts"][name], state["step"])
            self._restore_rng(state["rng"])
            return state["step"], shard_hidden(state["hidden"])
        except Exception as error:  # parts fail in many ways; each ends in this one line
            raise ValueError(f"{self.path}: not a checkpoint of this run ({first_line(error)})") from error

    def _restore_rng(self, states: list[Any]) -> None:
        if rank() and rank() >= len(states):  # there are more ranks than before
            torch.manual_seed(self.seed + rank())
            return
        rng, cuda_rng = states[rank()]
        torch.set_rng_state(rng)
        if cuda_rng is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda_rng)

    def _read(self) -> dict[str, Any]:
        """The file's content. ValueError where it is damaged or of another version."""
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in many ways; each ends in this one line
            raise ValueError(f"{self.path} is damaged: not a readable checkpoint ({type(error).__name__})") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"{self.path} is of another version of this software; start a new run in another --out")
        if state.pop("checksum", None) != checksum(state):
            raise ValueError(f"{self.path} is damaged: its content does not match its checksum; restore a copy of it")
        for name, kind in KINDS.items():
            if name not in state or not isinstance(state[name], kind) or state[name] is True:
                raise ValueError(f"{self.path} is damaged: its {name} is {state.get(name)}")
        return state


def _optimizers(part: Any) -> list[Optimizer]:
    """The part itself, or its attributes: MLR-SNet is learned by an optimizer of its own."""
    return [value for value in (part, *vars(part).values()) if isinstance(value, Optimizer)]


def _options(part: Any) -> list[dict[str, Any]]:
    """The options of each parameter group that no schedule changes."""
    groups = [group for optimizer in _optimizers(part) for group in optimizer.param_groups]
    return [{name: group.get(name) for name in OPTIONS if group.get(name) is not None} for group in groups]


def _check_fit(part: Any, state: dict[str, Any], step: int) -> None:
    """ValueError for what load_state_dict takes, though it cannot be of this part: other precision, other sizes."""
    if isinstance(part, nn.Module):
        for name, value in part.state_dict().items():
            if value.dtype != state[name].dtype:
                raise ValueError(f"{name} is {state[name].dtype}, not {value.dtype}")
    if isinstance(part, Optimizer) and step and not part.state and any(map(part.defaults.get, ("momentum", "betas"))):
        raise ValueError(f"the optimizer has no memory of its {step} steps")
    for optimizer in _optimizers(part):
        for weight, memory in optimizer.state.items():
            for name, value in memory.items():
                if not isinstance(value, Tensor | float | int | None):
                    raise ValueError(f"{name} of a weight is {value}")
                if isinstance(value, Tensor) and value.numel() not in (1, weight.numel()):
                    raise ValueError(f"{name} of a weight of {weight.numel()} numbers has {value.numel()}")
