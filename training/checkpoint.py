"""checkpoint.pth: all that continuing a run bit for bit needs."""

import argparse
from typing import Any

import torch

from utils import all_gather, checksum, first_line, gather_hidden, plain, rank, save, shard_hidden

FORMAT = 5  # of the file
MAY_CHANGE = ("out", "resume", "data_root", "workers")  # from one start of a run to the next


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
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            self._restore_rng(state["rng"])
            return state["step"], shard_hidden(state["hidden"])
        except Exception as error:  # parts fail in many ways; each ends in this one line
            raise ValueError(f"{self.path}: not a checkpoint of this run ({first_line(error)})") from error

    def _restore_rng(self, states: list[Any]) -> None:
        if rank() >= len(states):  # there are more ranks than before
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
        return state
