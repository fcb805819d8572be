"""What a run shows while it trains: a progress bar, a line per epoch, TensorBoard events. None of it ends the run."""

import sys
import threading
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils import first_line, rank


def say(line: str, file: Any = None) -> None:
    """Show a line above the progress bar. Rank 0 shows it."""
    if rank() == 0:
        tqdm.write(line, file=file)


def warn(line: str) -> None:
    say(f"warning: {line}", sys.stderr)


class Log:
    """Shows the steps and epochs of a run on rank 0. Events that cannot be written are given up with a line.

    score is the name of what a step reports beside its loss, in %.
    """

    def __init__(self, folder: Path, num_steps: int, done: int, score: str):
        self.score = score
        self.excepthook = threading.excepthook
        threading.excepthook = lambda _: None  # TensorBoard's thread raises its error again in this one
        self.writer: Any = None
        self.bar = tqdm(total=num_steps, initial=done, disable=True if rank() else None, leave=False)
        if rank() == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(folder), purge_step=done + 1)
            except Exception as error:  # a missing or broken package fails in many ways
                self._give_up_events(error)

    def step(self, number: int, loss: float, score: float, lr: float) -> None:
        self._add_events({"step/loss": loss, "step/lr": lr}, number)
        self.bar.update()
        self.bar.set_postfix({"loss": f"{loss:.3f}", "lr": f"{lr:.4g}", self.score: f"{score:.1f}"})

    def gamma(self, number: int, gamma: float) -> None:
        """The LR scale, set at step `number`."""
        self._add_events({"step/gamma": gamma}, number)
        say(f"gamma {gamma:.4g} from step {number} on")

    def epoch(self, row: dict[str, float]) -> None:
        self._add_events({f"epoch/{name}": value for name, value in row.items()}, int(row["epoch"]))
        say("  ".join(f"{name} {value:.4g}" for name, value in row.items()))

    def close(self) -> None:
        self.bar.close()
        writer, self.writer = self.writer, None
        try:
            if writer:
                writer.close()
        except Exception as error:
            self._give_up_events(error)
        finally:
            threading.excepthook = self.excepthook

    def _add_events(self, values: dict[str, float], number: int) -> None:
        if not self.writer:
            return
        try:
            for name, value in values.items():
                self.writer.add_scalar(name, value, number)
        except Exception as error:
            self._give_up_events(error)

    def _give_up_events(self, error: Exception) -> None:
        self.writer = None
        warn(f"TensorBoard events are not written ({first_line(error)})")
