"""A run of meta-train or meta-test: training, evaluation, and its end under signals and errors."""

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from baselines.from_gradients import twice_differentiable
from data.images import ImageTask
from data.meta_stream import MetaStream
from data.text import TextTask
from mlr_snet import ScaleError, Schedule, Step, train
from mlr_snet_optim.average import Average
from mlr_snet_optim.loop import ReachError
from training.arguments import refuse_used
from training.averaging import evaluating, evaluating_average
from training.checkpoint import Checkpoint
from training.command_line import outside_cause
from training.folder import Cost, FolderLock, Metrics, contents, provenance, read_record
from training.log import Log, say, warn
from training.measuring import Measurement
from training.pictures import draw_run, write_picture
from utils import (
    TEMPORARIES,
    all_gather,
    checksum,
    data_parallel,
    rank,
    save,
    world_size,
    write_atomically,
)

BEFORE_CHECKPOINT = ("args.json", "lr_scale.json", "lr_scale.png")  # what a run writes before its first checkpoint
FETCH_EVERY = 50  # steps between the moments in which an accelerator's numbers come to the host


class StopSignal:
    """Inside its block, SIGINT and SIGTERM ask the run to stop after the step; a second one ends the process."""

    def __init__(self) -> None:
        self.number = 0

    def seen(self) -> int:
        """The signal that any rank has received, or 0."""
        return max(all_gather(self.number))

    def _receive(self, number: int, frame: Any) -> None:
        self.number = number
        if world_size() == 1:  # torchrun passes on the signals that the terminal sends to the ranks as well
            signal.signal(number, signal.SIG_DFL)

    def __enter__(self) -> "StopSignal":
        self.handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> None:
        for which, handler in self.handlers.items():
            signal.signal(which, handler)


class RanksDiffer(Exception):
    """The ranks have come to different weights or rates."""


class Trainer:
    """One run: trains, logs and writes the run's folder; under --resume from its checkpoint on.

    after_epoch is called with the number of every epoch that has ended, before its checkpoint. Raises ValueError for a
    folder that another process uses, and for a checkpoint that is damaged or of something else.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        task: ImageTask | TextTask,
        network: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        meta_stream: MetaStream,
        measurement: Measurement | None = None,
        after_epoch: Callable[[int], None] = lambda epoch: None,
    ):
        self.args, self.task, self.network = args, task, network
        self.optimizer, self.schedule, self.after_epoch = optimizer, schedule, after_epoch
        self.num_steps = args.num_epoch * task.steps_per_epoch
        self.step, self.hidden, self.last_lr = 0, None, 0.0
        self.saved_step: int | None = None
        self.gamma: float | None = None  # as last told
        on_cpu = next(network.parameters()).device.type == "cpu"
        self.fetch_every = 1 if on_cpu else FETCH_EVERY
        images_per_pass = None if task.perplexity else args.batch_size / args.accumulate / world_size()
        self.metrics, self.cost = Metrics(), Cost(network, args.compile, images_per_pass)
        self.measurement = measurement
        parts = {
            "network": network, "optimizer": optimizer, "schedule": schedule, "meta_stream": meta_stream,
            "metrics": self.metrics, "cost": self.cost,
        }
        kept: Average | None = getattr(schedule, "average", None)  # which moves with the schedule
        self.average = kept if args.average else None
        self.moves_average = args.average and not kept
        if self.moves_average:
            decay = Average.decay_for(self.num_steps) if args.average_decay == "auto" else args.average_decay
            self.average = parts["average"] = Average(network, decay)
        if measurement:
            parts["measurement"] = measurement
        self.checkpoint = Checkpoint(args, task.fingerprint(), parts)
        self.lock = FolderLock(args.out)
        if rank() == 0:
            self.lock.acquire()
        with ExitStack() as undo:
            undo.callback(self.lock.release)
            if rank() == 0:
                for path in args.out.glob(TEMPORARIES):  # of a run that was killed
                    path.unlink()
            self._restore()
            undo.pop_all()  # the run keeps its lock

    def _restore(self) -> None:
        """Continue from the checkpoint, where there is one. ValueError where results would be overwritten."""
        out, path = self.args.out, self.checkpoint.path
        if self.args.resume and path.exists():
            self.step, self.hidden = self.checkpoint.load()
            self.saved_step = self.step
            self.gamma = getattr(self.schedule, "gamma", None)
            return
        results = [name for name in contents(out) if name not in BEFORE_CHECKPOINT]
        if self.args.resume and results:
            raise ValueError(f"{path} is missing beside {results[0]}; restore it or start a new run elsewhere")
        if not self.args.resume:
            refuse_used(out)  # again, since another run may have come and gone
        if rank():
            torch.manual_seed(self.args.seed + rank())  # for dropout: all that must agree is drawn by now

    def run(self) -> int:
        """Train to the end. Exit status: 0, 1 where it diverged or failed, 2 for bad input, 128 + a signal."""
        try:
            double_backward = twice_differentiable(self.network) if self.schedule.second_order else nullcontext()
            with StopSignal() as stop, double_backward:
                return self._run(stop)
        except Exception as error:
            failure = self._failure(error)
            if not failure:
                raise
            if rank() == 0 or not isinstance(error, (FloatingPointError, RanksDiffer)):  # these two hit all ranks alike
                good = "none" if self.saved_step is None else f"the checkpoint of step {self.saved_step}"
                tqdm.write(f"{failure}; last good checkpoint: {good}", file=sys.stderr)
            return 2 if isinstance(error, ValueError) else 1
        finally:
            self.lock.release()

    def _run(self, stop: StopSignal) -> int:
        if self.step == self.num_steps:
            say(f"{self.args.out}: the run is complete")
        if self.saved_step is None:
            length = f"{self.task.steps_per_epoch} steps an epoch"
            say(f"{self.args.network} on {self.args.dataset}: {self.task.in_words()}; {length}")
            record = provenance(self.args)
            if self.args.resume:  # by a table, say, which knows its run by the command
                record["command"] = read_record(self.args.out, "command")
            write_atomically(self.args.out / "args.json", json.dumps(record, indent=1).encode())
            if self.measurement:
                self.measurement.write(self.args.out)
                self.cost.add_steps(self.measurement.result.num_steps, self.args.accumulate or 1)
                self.metrics.totals["seconds"] += self.measurement.seconds  # of the first epoch
            self._save_checkpoint()
        else:
            self._compare_ranks()
        self.log = Log(self.args.out, self.num_steps, self.step, "r2" if self.task.metric == "r2" else "acc")
        try:
            stop_signal = self._train(stop)
        finally:
            self.log.close()
        if stop_signal:
            say(f"stopped at step {self.step}; continue with --resume --out {self.args.out}")
            return 128 + stop_signal
        self._write_metrics()
        self._save_networks()
        write_picture(self.args.out / "run.png", draw_run, self.metrics.rows)
        return 0

    def _failure(self, error: Exception) -> str:
        """What has gone wrong, in one line; nothing for an error of the program itself."""
        if isinstance(error, FloatingPointError):
            return f"diverged: {error}"
        cause = str(error) if isinstance(error, RanksDiffer) else outside_cause(error, self.args)
        return f"error: {cause}" if cause else ""

    def _train(self, stop: StopSignal) -> int:
        """Take all steps; returns the signal that stopped them, or 0."""
        self.metrics.start_clock()
        waiting: list[Step] = []  # steps whose numbers are still on the device
        for step in self._steps():
            self.step, self.hidden = step.number, step.hidden
            self._tell_gamma()
            waiting.append(step)
            ends_epoch = step.number % self.task.steps_per_epoch == 0
            if len(waiting) < self.fetch_every and not ends_epoch:
                continue
            self._fetch(waiting)
            waiting.clear()
            if ends_epoch:
                self._end_epoch(step.number // self.task.steps_per_epoch)
            if stop_signal := stop.seen():
                self.metrics.count_seconds()
                self._save_checkpoint()
                return stop_signal
        return 0

    def _steps(self) -> Iterator[Step]:
        with self.cost.paused():
            network = data_parallel(self.network)
        steps = train(
            network, self.task, self.optimizer, self.schedule, self.args.num_epoch, self.step, self.hidden
        )
        try:
            for _ in range(self.step, self.num_steps):
                if self.average and self.moves_average:
                    self.average.update()
                yield next(steps)
        except (ScaleError, ReachError) as error:
            raise FloatingPointError(f"{error} (step {self.step + 1})") from None
        except (OverflowError, RuntimeError) as error:
            # torch has no class of its own for a number that single precision cannot hold.
            if isinstance(error, RuntimeError) and "without overflow" not in str(error):
                raise
            lr = float(self.schedule.get_last_lr()[0])
            message = f"the LR is beyond single precision at step {self.step + 1} (last set: {lr:g})"
            raise FloatingPointError(message) from None

    def _tell_gamma(self) -> None:
        """Print and log γ where a schedule has set it anew."""
        gamma, before = getattr(self.schedule, "gamma", math.nan), self.gamma
        if gamma == before or math.isnan(gamma):
            return
        self.gamma = gamma
        self.log.gamma(self.step, gamma)
        if before and gamma > 1.5 * before:
            warn(f"gamma has risen from {before:.3g} with the loss in eval mode, as where BatchNorm's statistics lag "
                 "behind in a short run; a number for --gamma keeps it fixed")

    def _fetch(self, steps: list[Step]) -> None:
        """Bring the numbers of the steps to the host and log them. FloatingPointError at the first not finite."""
        for step in steps:
            loss, lr = float(step.loss), float(step.lr)
            accuracies = step.accuracy.flatten().tolist()  # under label noise the second is on the true labels
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step.number}, after LR {self.last_lr}")
            if not math.isfinite(lr):
                raise FloatingPointError(f"the LR is {lr} at step {step.number}, at loss {loss}")
            self.last_lr = lr
            self.metrics.add(step.size, lr, loss, *accuracies)
            self.log.step(step.number, loss, accuracies[0], lr)

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate, write metrics and checkpoint, and log."""
        means = self.metrics.means()
        lr = means.pop("lr")
        is_tested = epoch % self.args.test_every == 0 or epoch == self.args.num_epoch
        with self.cost.paused():
            results = self._evaluate(means, is_tested)
        for name, value in results.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} after step {self.step}, the last one of epoch {epoch}")
        self._check_finite()
        row = self.metrics.end_epoch({"epoch": epoch, "lr": lr, **results})
        self.after_epoch(epoch)
        self._write_metrics()
        self._save_checkpoint()
        self.log.epoch(row)

    def _evaluate(self, means: dict[str, float], is_tested: bool) -> dict[str, float]:
        """The columns of the epoch with these means of the training loss and accuracies (%)."""
        row = self.task.train_metrics(**means)
        if not is_tested:
            return row
        with evaluating(self.optimizer, self.network, self.task):  # where schedule-free swaps the weights
            row |= self.task.evaluate(self.network)
        if self.average:
            name = f"test_{self.task.metric}"
            with evaluating_average(self.average, self.task):
                row[f"{name}_average"] = self.task.evaluate(self.network)[name]
        return row

    def _save_checkpoint(self) -> None:
        self._check_finite()
        self._compare_ranks()
        self.checkpoint.save(self.step, self.hidden)
        self.saved_step = self.step

    def _check_finite(self) -> None:
        """FloatingPointError where weights, or nets that learn, are not finite: a checkpoint has to be good."""
        for module in (self.network, *getattr(self.schedule, "nets", [])):
            for name, tensor in module.named_parameters():
                if not tensor.isfinite().all():
                    raise FloatingPointError(f"{name} is not finite after step {self.step}, after LR {self.last_lr}")

    def _compare_ranks(self) -> None:
        """RanksDiffer unless all ranks hold the same weights, schedule and rates."""
        if world_size() == 1:
            return
        mine = {
            "weights": checksum(*self.network.parameters()),
            "schedule": checksum(self.schedule.state_dict()),
            "rates": checksum(*self.schedule.get_last_lr()),
        }
        everyone = all_gather(mine)
        different = [name for name in mine if len({theirs[name] for theirs in everyone}) > 1]
        if different:
            remedy = "please report this" if self.step else "give all of them the same files"
            raise RanksDiffer(f"the ranks differ in {' and '.join(different)} at step {self.step}; {remedy}")

    def _write_metrics(self) -> None:
        self.metrics.write(self.args.out / "metrics.csv")
        self.cost.write(self.args.out / "cost.json", self.task.steps_per_epoch)

    def _save_networks(self) -> None:
        with evaluating(self.optimizer, self.network, self.task):
            save(self.args.out / "network.pth", self.network.state_dict())
        if self.average:
            with evaluating_average(self.average, self.task):
                save(self.args.out / "network_average.pth", self.network.state_dict())
