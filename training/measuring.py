"""The measured LR scale of a run: found before its first step, kept in its folder, and drawn."""

import argparse
import io
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from baselines import LightningFinder
from data.files import ImageFileError
from data.meta_stream import TrainStream
from mlr_snet import (
    MeasuredScale,
    NoScaleError,
    Task,
    Trial,
    has_paper_scale,
    measure_lr_scale,
    try_rates,
)
from training.command_line import is_out_of_memory
from utils import averaged_gradients, first_line, is_lost_rank, rank, write_atomically

FILE = "lr_scale.json"


@dataclass
class Measurement:
    """What measure_lr_scale found and tried, and the seconds that it took."""

    result: MeasuredScale
    seconds: float
    refusal: str = ""  # why nothing could be measured; the scale is then a guess

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.result.scale}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Check that the folder's file and the checkpoint agree. ValueError where they do not."""
        if state["scale"] != self.result.scale:
            raise ValueError(f"{FILE} holds the scale {self.result.scale:g}, the run began with {state['scale']:g}")

    def write(self, folder: Path) -> None:
        """lr_scale.json and lr_scale.png. Rank 0 alone writes."""
        content = {"scale": self.result.scale, "num_steps": self.result.num_steps, "seconds": self.seconds,
                   "refusal": self.refusal,
                   "trials": [asdict(trial) for trial in self.result.trials]}
        write_atomically(folder / FILE, json.dumps(content, indent=1).encode())
        if rank() == 0:
            draw(self, folder / "lr_scale.png")


def read(folder: Path) -> Measurement:
    """The measurement of the run in that folder. ValueError for a file that is not one."""
    try:
        content = json.loads((folder / FILE).read_text())
        trials = [Trial(**trial) for trial in content["trials"]]
        result = MeasuredScale(float(content["scale"]), trials)
        return Measurement(result, float(content["seconds"]), content.get("refusal", ""))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / FILE}: not the measured scale of a run ({type(error).__name__})") from None


def measure(
    args: argparse.Namespace, task: Task, network: nn.Module, optimizer: Optimizer, by_lightning: bool = False
) -> Measurement:
    """Measure the LR scale of the run, or take it from the folder of a run that is resumed.

    By measure_lr_scale, or as Lightning's LR finder does by default. Where the loss falls at no rate, the scale is the
    error's guess, on all ranks alike, and a line says so. Raises ValueError for a loss that is not finite.
    """
    if args.resume and (args.out / FILE).exists():
        return read(args.out)
    finder = LightningFinder() if by_lightning else None
    start, num_steps = time.perf_counter(), args.num_epoch * task.steps_per_epoch
    stream, refusal = TrainStream(task, network), ""
    try:
        with averaged_gradients(network):
            if finder:
                test = try_rates(network, optimizer, stream, "range test", finder.rates, task.clip)
                result = MeasuredScale(finder.suggest(test.losses), [test])
            else:
                result = measure_lr_scale(network, optimizer, stream, num_steps, task.clip)
    except NoScaleError as error:
        result, refusal = MeasuredScale(error.guess, error.trials), str(error)
        if rank() == 0:
            print(f"warning: the LR scale {result.scale:.3g} is a guess, not measured ({refusal})", file=sys.stderr)
    except (ImageFileError, RuntimeError) as error:  # met by this rank alone, while the others wait in a collective
        if isinstance(error, RuntimeError) and not (is_out_of_memory(error) or is_lost_rank(error)):
            raise
        print(f"error: the LR scale could not be measured ({first_line(error)})", file=sys.stderr)
        sys.exit(2)
    return Measurement(result, time.perf_counter() - start, refusal)


def chosen_gamma(
    args: argparse.Namespace, task: Task, network: nn.Module, optimizer: Optimizer
) -> tuple[float | str, Measurement | None]:
    """What --gamma stands for: a number or "paper", and the measurement where there was one."""
    gamma = args.gamma
    if gamma == "auto":
        gamma = "paper" if has_paper_scale(optimizer) else "measured"
    if gamma != "measured":
        return gamma, None
    measurement = measure(args, task, network, optimizer)
    return measurement.result.gamma, measurement


def draw(measurement: Measurement, path: Path) -> None:
    """The loss against the rate of the range test, and the losses of the cosine trials."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scale, (range_test, *cosines) = measurement.result.scale, measurement.result.trials
    kind = "guessed scale" if measurement.refusal else "measured scale"
    start = sum(range_test.losses[:20]) / 20
    figure, panels = pyplot.subplots(1, 2 if cosines else 1, figsize=(9, 3.6), layout="constrained", squeeze=False)
    left, right = panels[0, 0], panels[0, -1]
    left.plot(range_test.rates, range_test.losses, color="0.6", linewidth=1, label="training loss")
    left.axvline(scale, color="k", linestyle="--", label=f"{kind} {scale:.3g}")
    left.set(xscale="log", ylim=(0, 1.6 * start), xlabel="learning rate", ylabel="training loss (nats)",
             title="LR range test")
    for trial in cosines:
        right.plot(range(1, len(trial.losses) + 1), trial.losses, label=f"peak {trial.rates[0]:.3g}")
    if cosines:
        right.set(ylim=(0, 1.6 * start), xlabel="step", ylabel="training loss (nats)", title="Cosine trials")
    for panel in panels.flat:
        panel.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    pyplot.close(figure)
    write_atomically(path, image.getvalue())
