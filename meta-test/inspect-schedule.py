"""Inspect a learned schedule: how it responds to the loss, its rate over a run, and how much of that is a response.

Example: python meta-test/inspect-schedule.py --nets paper --losses meta-train/result/resnet8_digits
"""

import argparse
import csv
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

SCRIPT = Path(__file__).resolve()
sys.path.insert(0, str(SCRIPT.parents[1]))

from data.meta_stream import epoch_changes
from mlr_snet import SHIPPED, MLRSNet, MLRSNetLR, load_schedules
from training.arguments import net_files
from training.command_line import number, number_or, show_safely, user_errors
from training.folder import read_record
from training.measuring import FILE, read
from training.pictures import save, subplots
from utils import first_line

LOSSES = torch.logspace(math.log10(4), -2, 40)  # what the nets read, from 4 down to 0.01
SETTLED = 500  # steps at one loss after which the LSTM state no longer moves


@dataclass
class Run:
    """What a schedule does along a run: one value per step."""

    losses: Tensor
    fractions: Tensor
    rates: Tensor


@torch.no_grad()
def settled_fractions(net: MLRSNet, losses: Tensor) -> Tensor:
    """The fraction (losses,) that the net settles at when it reads the same loss (losses,) over and over."""
    step = torch.vmap(net)
    states = net.initial_state().expand(len(losses), -1, -1, -1)
    for _ in range(SETTLED):
        fractions, states = step(losses, states)
    return fractions


def follow(nets: list[MLRSNet], losses: Tensor, args: argparse.Namespace) -> Run:
    """The schedule along a run with these losses, one per step (steps,)."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    epochs = SimpleNamespace(steps_per_epoch=args.steps_per_epoch)
    num_epochs = args.planned or len(losses) // args.steps_per_epoch
    schedule = MLRSNetLR(
        optimizer, nets, num_epochs * args.steps_per_epoch, num_classes=args.num_classes, perplexity=args.perplexity,
        gamma=args.gamma, changes=epoch_changes(epochs, num_epochs, len(nets)), warmup=args.warmup,
        cooldown=args.cooldown,
    )
    fractions, rates = [], []
    for loss in losses:
        schedule.step(loss)
        optimizer.step()
        rates.append(float(schedule.get_last_lr()[0]))
        fractions.append(float(schedule.fraction))
    return Run(losses, torch.tensor(fractions), torch.tensor(rates))


def reaction(nets: list[MLRSNet], run: Run, args: argparse.Namespace) -> float:
    """The part of the variance of log(fraction) along the run that goes away when the nets read a constant loss.

    0: the loss does not matter, all change comes from the change of nets and from settling. 1: all of it is a reaction.
    """
    blind = follow(nets, run.losses.mean().expand_as(run.losses), args)
    whole = run.fractions.log().var(correction=0)
    if whole < 1e-12:
        return 0.0
    return min(1.0, float((run.fractions.log() - blind.fractions.log()).var(correction=0) / whole))


def read_losses(path: Path, args: argparse.Namespace) -> Tensor:
    """The training losses of a run's metrics.csv, each for all steps of its epoch. ValueError for another file, for a
    run of text without --perplexity or one of images with it, and for a regression without a number for γ.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        losses = [float(row["train_loss"]) for row in rows]
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"--losses {path}: not the metrics.csv of a run ({type(error).__name__}: {error})") from None
    if [row.get("epoch") for row in rows] != [str(number) for number in range(1, len(rows) + 1)]:
        raise ValueError(f"--losses {path}: holds other epochs than 1, 2, 3 … of one run")
    if not losses or not all(math.isfinite(loss) and loss > 0 for loss in losses):
        raise ValueError(f"--losses {path}: needs positive and finite training losses")
    if args.gamma == "auto" and "train_r2" in rows[0]:
        raise ValueError(f"--losses {path}: a regression, for which the formula for γ is not made; give --gamma NUMBER")
    if args.perplexity != ("train_ppl" in rows[0]):
        kind, advice = ("images", "leave out --perplexity") if args.perplexity else ("text", "give --perplexity, too")
        raise ValueError(f"--losses {path}: a run of {kind}; {advice}")
    return torch.tensor(losses).repeat_interleave(args.steps_per_epoch)


def take_settings(args: argparse.Namespace, folder: Path) -> None:
    """Take steps per epoch, planned epochs, warm-up, cool-down and, where a number or measured, γ from a run's folder.

    ValueError for a damaged file there.
    """
    try:
        if args.steps_per_epoch is None and (folder / "cost.json").exists():
            args.steps_per_epoch = int(json.loads((folder / "cost.json").read_text())["steps_per_epoch"])
        if not (folder / "args.json").exists():
            return
        flags = read_record(folder, "arguments")
        args.warmup, args.cooldown, args.planned = flags["warmup"], flags["cooldown"], flags["num_epoch"]
        if args.gamma == "auto" and ((folder / FILE).exists() or flags["gamma"] == "measured"):
            args.gamma = 2 * read(folder).result.scale
        elif args.gamma == "auto" and flags["gamma"] != "paper":
            args.gamma = flags["gamma"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: a damaged cost.json, args.json or {FILE} ({first_line(error)})") from None


def draw(path: Path, names: list[str], settled: list[Tensor], run: Run, args: argparse.Namespace) -> None:
    figure, (panels,) = subplots(1, 3, 4.3, 3.8)
    for name, fractions in zip(names, settled, strict=True):
        panels[0].plot(LOSSES, fractions, label=name)
    panels[0].set(xscale="log", xlabel="loss that the net reads", ylabel="settled fraction of γ", ylim=(0, 1))
    panels[0].legend(fontsize="small")
    epochs = torch.arange(len(run.losses)) / args.steps_per_epoch
    panels[1].plot(epochs, run.fractions, "k-", label="fraction of γ")
    panels[1].set(xlabel="epoch", ylabel="fraction of γ", ylim=(0, 1))
    losses = panels[1].twinx()
    losses.plot(epochs, run.losses, "C1--", label="training loss")
    losses.set(ylabel="training loss (nats)", ylim=(0, None))
    lines = [*panels[1].get_lines(), *losses.get_lines()]
    panels[1].legend(lines, [line.get_label() for line in lines], fontsize="small")
    panels[2].plot(epochs, run.rates, "k-")
    panels[2].set(xlabel="epoch", ylabel="learning rate", yscale="log")
    figure.suptitle("What a learned schedule does: settled fraction, fraction along a run, learning rate")
    save(figure, path, dpi=120)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    description, example = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=example, allow_abbrev=False)
    add = parser.add_argument
    add("--nets", nargs="+", default=["paper"], metavar="FILE",
        help=f"nets that share the run in turn, the folder of a meta-train run, or one of {', '.join(SHIPPED)} "
        "(default: paper)")
    add("--losses", type=Path, metavar="RUN", help="a run's folder or metrics.csv, whose training losses the nets read")
    add("--decay", type=number(float, 1e-6, 1e6), nargs=2, default=[2.3, 0.01], metavar=("FIRST", "LAST"),
        help="without --losses: a training loss that falls exponentially, in nats (default: 2.3 0.01)")
    add("--num-epoch", type=number(int, 1), default=60, metavar="N", help="epochs of that decay (default: 60)")
    add("--steps-per-epoch", type=number(int, 1), metavar="N",
        help="steps of an epoch (default: those of the run of --losses, or 20)")
    add("--num-classes", type=number(int, 2), metavar="N",
        help="classes, or the size of the vocabulary, which --perplexity needs (default: 10)")
    add("--perplexity", action="store_true", help="the losses are a language model's")
    add("--gamma", type=number_or(number(float, 1e-6, 1e6), "auto"), default="auto",
        help="LR scale: a number, or auto, the γ of the run of --losses where it has one, else the paper's formula "
        "(default: auto)")
    add("--out", type=Path, default=SCRIPT.parent / "result" / "inspect-schedule.png", metavar="FILE",
        help="the picture, a .png (default: result/inspect-schedule.png beside this script)")
    args = parser.parse_args(argv)
    if args.out.suffix != ".png":
        parser.error(f"--out {args.out}: give a file that ends in .png")
    if args.perplexity and args.num_classes is None:
        parser.error("--perplexity: give the size of the vocabulary, too, as --num-classes")
    args.num_classes = args.num_classes or 10
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with user_errors(args):
        files = net_files(args.nets)
        nets = load_schedules(files)
        names = list(SHIPPED[files]) if isinstance(files, str) else [path.name for path in files]
        args.warmup = args.cooldown = 0.0
        args.planned = None  # epochs, where the losses are of a run that was stopped
        if args.losses:
            metrics = args.losses / "metrics.csv" if args.losses.is_dir() else args.losses
            take_settings(args, metrics.parent)
        args.steps_per_epoch = args.steps_per_epoch or 20
        if args.losses:
            losses = read_losses(metrics, args)
        else:
            start, end = map(math.log10, args.decay)
            losses = torch.logspace(start, end, args.num_epoch * args.steps_per_epoch)
        run = follow(nets, losses, args)
        settled = [settled_fractions(net, LOSSES) for net in nets]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw(args.out, names, settled, run, args)
    width = max(map(len, names))
    print(f"{'settled fraction of γ':{width}}   at loss 4   at loss 0.01   smallest   largest")
    for name, fractions in zip(names, settled, strict=True):
        least, most = fractions.min(), fractions.max()
        print(f"{name:{width}}   {fractions[0]:9.3f}   {fractions[-1]:12.3f}   {least:8.3f}   {most:7.3f}")
    share = reaction(nets, run, args)
    gammas = run.rates / run.fractions
    first, last = (f"{run.fractions[place]:.3f} · {gammas[place]:.3g} = {run.rates[place]:.4g}" for place in (0, -1))
    print(f"along the run: fraction · γ·e = learning rate: first {first}, last {last}")
    if args.gamma == "auto":
        print(f"γ is the formula's for these losses and {args.num_classes} classes; a run takes it from a mean loss in "
              "eval mode, so that its own rates differ")
    print(f"the fraction moves between {run.fractions.min():.3f} and {run.fractions.max():.3f}")
    print(f"reaction to the loss: {100 * share:.1f} % of the variance of its logarithm; the rest is settling and the "
          "change of nets")
    print(f"picture: {args.out}")
    return 0


if __name__ == "__main__":
    show_safely()
    sys.exit(main())
