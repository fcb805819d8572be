"""The measured LR scale of a run: found before its first step, kept in its folder, and drawn."""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from data.meta_stream import TrainStream
from mlr_snet import Task, has_paper_scale
from mlr_snet_scale import MeasuredScale, Trial, measure_lr_scale
from training.command_line import outside_cause
from training.log import say, warn
from training.pictures import draw_scale, write_picture
from utils import averaged_gradients, write_atomically

FILE = "lr_scale.json"


@dataclass
class Measurement:
    """What measure_lr_scale found and tried, and the seconds that it took."""

    result: MeasuredScale
    seconds: float

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.result.scale}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Check that the folder's file and the checkpoint agree. ValueError where they do not."""
        if state["scale"] != self.result.scale:
            raise ValueError(f"{FILE} holds the scale {self.result.scale:g}, the run began with {state['scale']:g}")

    def write(self, folder: Path) -> None:
        """lr_scale.json and lr_scale.png. Rank 0 writes."""
        content = {"scale": self.result.scale, "gamma": 2 * self.result.scale,
                   "num_steps": self.result.num_steps, "seconds": self.seconds,
                   "refusal": self.result.refusal, "trials": [asdict(trial) for trial in self.result.trials]}
        write_atomically(folder / FILE, json.dumps(content, indent=1).encode())
        write_picture(folder / "lr_scale.png", draw_scale, self.result)


def read(folder: Path) -> Measurement:
    """The measurement of the run in that folder. ValueError for a file that is not one."""
    try:
        content = json.loads((folder / FILE).read_text())
        trials = [Trial(**trial) for trial in content["trials"]]
        result = MeasuredScale(float(content["scale"]), trials, content.get("refusal", ""))
        return Measurement(result, float(content["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / FILE}: not the measured scale of a run ({type(error).__name__})") from None


def measure(args: argparse.Namespace, task: Task, network: nn.Module, optimizer: Optimizer) -> Measurement:
    """Measure the LR scale of the run, or take it from the folder of a run that is resumed.

    Where the loss falls at no rate, the scale is a guess, and a line says so. Raises ValueError for a loss that is not
    finite.
    """
    if args.resume and (args.out / FILE).exists():
        return read(args.out)
    start, num_steps = time.perf_counter(), args.num_epoch * task.steps_per_epoch
    say("measuring the LR scale by training at trial rates")
    try:
        with averaged_gradients(network):
            result = measure_lr_scale(
                network, optimizer, TrainStream(task, network), num_steps, task.clip,
                num_classes=task.num_classes, perplexity=task.perplexity,
            )
    except (ValueError, OSError, RuntimeError) as error:  # on this rank only; the others wait in a collective
        cause = outside_cause(error, args)
        if not cause:
            raise
        print(f"error: the LR scale could not be measured ({cause})", file=sys.stderr)
        sys.exit(2)
    seconds = time.perf_counter() - start
    if result.refusal:
        warn(f"the LR scale {result.scale:.3g} is a guess, not measured ({result.refusal})")
    say(f"LR scale {result.scale:.3g} after {result.num_steps} steps, {seconds:.1f} s; the run has {num_steps}")
    return Measurement(result, seconds)


def chosen_gamma(
    args: argparse.Namespace, task: Task, network: nn.Module, optimizer: Optimizer
) -> tuple[float | str, Measurement | None]:
    """What --gamma stands for: a number or "paper", and the measurement where there was one."""
    gamma = args.gamma
    if gamma == "auto":
        gamma = "paper" if has_paper_scale(optimizer) and task.num_classes else "measured"
    if gamma == "paper" and not has_paper_scale(optimizer):
        warn("the paper's gamma was made for SGD without momentum; measured fits others")
    if gamma != "measured":
        return gamma, None
    measurement = measure(args, task, network, optimizer)
    return 2 * measurement.result.scale, measurement  # .gamma, whose warning has been given
