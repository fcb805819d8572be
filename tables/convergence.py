"""How fast SGD converges under a schedule on a smooth non-convex problem with known noise.

The problem is logistic regression with the non-convex regulariser λ·Σ w²/(1 + w²); every gradient has Gaussian noise of
standard deviation σ per coordinate. Each schedule runs for 250 to 16,000 steps. The measure is the smallest expected
squared gradient norm along a run, min_t E‖∇f(w_t)‖², whose best known rate for SGD is T^(−1/2).
"""

import argparse
import csv
import io
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCRIPT = Path(__file__).resolve()
sys.path.insert(0, str(SCRIPT.parents[1]))

from mlr_snet import MLRSNet, load_schedules
from training.command_line import number, user_errors
from training.folder import provenance
from utils import write_atomically

DIMENSION, EXAMPLES, REGULARISER, NOISE = 50, 500, 0.05, 0.3
PRESETS = {"desk": [250 * 2**power for power in range(7)], "smoke": [50, 100, 200]}
CHECKPOINTS = 200  # of a run, at which the full gradient is measured
BLOCK = 250  # steps whose noise is drawn at once

Rate = Callable[[int, int, Tensor], Tensor | float]  # (step, steps of the run, losses (seeds,)) -> fraction of γ


class Problem:
    """f(w) = mean log(1 + exp(−y·x·w)) + λ·Σ w²/(1 + w²), for many weight vectors at once: w (seeds, dimension)."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(EXAMPLES, DIMENSION, dtype=torch.float64, generator=generator)
        truth = torch.randn(DIMENSION, dtype=torch.float64, generator=generator)
        noise = torch.randn(EXAMPLES, dtype=torch.float64, generator=generator)
        self.signed = inputs * (inputs @ truth + 2 * noise).sign()[:, None]  # y·x
        largest = torch.linalg.matrix_norm(self.signed, 2).square() / (4 * EXAMPLES)
        self.smoothness = float(largest) + 2 * REGULARISER  # a Lipschitz constant of the gradient

    def loss(self, w: Tensor) -> Tensor:
        fit = torch.nn.functional.softplus(-w @ self.signed.T).mean(1)
        return fit + REGULARISER * (w.square() / (1 + w.square())).sum(1)

    def gradient(self, w: Tensor) -> Tensor:
        fit = -torch.sigmoid(-w @ self.signed.T) @ self.signed / EXAMPLES
        return fit + REGULARISER * 2 * w / (1 + w.square()).square()


class Learned:
    """The nets that share a run, one for each part of it; every seed has an LSTM state of its own."""

    def __init__(self, nets: list[MLRSNet], num_seeds: int):
        self.nets, self.num_seeds = nets, num_seeds
        self.steps = [torch.vmap(net) for net in nets]

    @torch.no_grad()
    def __call__(self, step: int, num_steps: int, losses: Tensor) -> Tensor:
        if step == 0:
            self.states = self.nets[0].initial_state().expand(self.num_seeds, -1, -1, -1)
        phase = min(step * len(self.nets) // num_steps, len(self.nets) - 1)
        fractions, self.states = self.steps[phase](losses.float(), self.states)
        return fractions.double()


def schedules(num_seeds: int) -> dict[str, Rate]:
    return {
        "MLR-SNet (shipped nets)": Learned(load_schedules("shipped"), num_seeds),
        "MLR-SNet (average net)": Learned(load_schedules("average"), num_seeds),
        "cosine": lambda step, num_steps, losses: (1 + math.cos(math.pi * step / num_steps)) / 2,
        "1/sqrt(t)": lambda step, num_steps, losses: 1 / math.sqrt(step + 1),
        "fixed": lambda step, num_steps, losses: 1.0,
    }


def squared_norms(problem: Problem, rate: Rate, num_steps: int, num_seeds: int) -> Tensor:
    """‖∇f(w_t)‖² at the checkpoints of a run, (checkpoints, seeds); each seed has its own start and noise."""
    generators = [torch.Generator().manual_seed(1000 * num_steps + seed) for seed in range(num_seeds)]

    def draw(number: int) -> Tensor:
        """Standard normal numbers (number, seeds, dimension)."""
        drawn = [torch.randn(number, DIMENSION, dtype=torch.float64, generator=each) for each in generators]
        return torch.stack(drawn, 1)

    (w,) = draw(1)
    measured = set(torch.linspace(0, num_steps, min(CHECKPOINTS, num_steps + 1)).round().int().tolist())
    norms = []
    for step in range(num_steps + 1):
        if step % BLOCK == 0:
            noise = NOISE * draw(BLOCK)
        gradient = problem.gradient(w)
        if step in measured:
            norms.append(gradient.square().sum(1))
        fraction = rate(step, num_steps, problem.loss(w)) if step < num_steps else 0.0
        lr = torch.as_tensor(fraction, dtype=torch.float64).reshape(-1, 1) / problem.smoothness  # γ = 1/smoothness
        w = w - lr * (gradient + noise[step % BLOCK])
    return torch.stack(norms)


def slope(lengths: list[int], values: list[float]) -> float:
    """The least-squares slope of log(value) against log(length)."""
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (lengths, values))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def slope_with_interval(lengths: list[int], runs: list[Tensor]) -> tuple[float, float, float]:
    """The slope, and its 95 % interval by a bootstrap over the seeds."""
    num_seeds, generator = runs[0].shape[1], torch.Generator().manual_seed(0)
    resampled = []
    for _ in range(1000):
        seeds = torch.randint(num_seeds, (num_seeds,), generator=generator)
        resampled.append(slope(lengths, [smallest(run[:, seeds]) for run in runs]))
    low, high = torch.tensor(resampled).quantile(torch.tensor([0.025, 0.975])).tolist()
    return slope(lengths, [smallest(run) for run in runs]), low, high


def smallest(run: Tensor) -> float:
    """min_t E‖∇f(w_t)‖², the expectation over the seeds."""
    return float(run.mean(1).min())


def draw(path: Path, lengths: list[int], results: dict[str, list[Tensor]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name, runs in results.items():
        values = [smallest(run) for run in runs]
        errors = [float(run[run.mean(1).argmin()].std() / math.sqrt(run.shape[1])) for run in runs]
        width = 2.4 if name.startswith("MLR-SNet") else 1.4
        panel.errorbar(lengths, values, errors, marker="o", linewidth=width, capsize=3, label=name)
    top = max(smallest(runs[0]) for runs in results.values())
    reference = [top * (lengths[0] / length) ** 0.5 for length in lengths]
    panel.plot(lengths, reference, "k:", label="slope −1/2, the best known rate")
    panel.set(xscale="log", yscale="log", xlabel="steps of the run", ylabel="smallest expected squared gradient norm",
              title="SGD on non-convex logistic regression with known noise")
    panel.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_table(
    path: Path, lengths: list[int], results: dict[str, list[Tensor]], args: argparse.Namespace, command: str
) -> None:
    facts = provenance(args)
    lines = ["# Convergence on a smooth non-convex problem", "",
             "| schedule | " + " | ".join(f"{length:,} steps" for length in lengths) + " | slope (95 % interval) |",
             "|---" * (len(lengths) + 2) + "|"]
    for name, runs in results.items():
        middle, low, high = slope_with_interval(lengths, runs)
        values = " | ".join(f"{smallest(run):.3g}" for run in runs)
        lines.append(f"| {name} | {values} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    lines += ["", "The smallest expected squared gradient norm along a run, and the slope of its logarithm against "
              "that of the number of steps; the interval is a bootstrap over the seeds. γ and every peak learning "
              "rate are 1/smoothness.", "",
              f"Command: `{command}`; seeds 0 to {args.seeds - 1}; commit {facts['commit']}; "
              f"{facts['hardware']['cpu']}; torch {facts['versions']['torch']}.", ""]
    write_atomically(path, "\n".join(lines).encode())


def write_csv(path: Path, lengths: list[int], results: dict[str, list[Tensor]]) -> None:
    """One row per schedule: its value for every length, its slope and the interval."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["schedule", *lengths, "slope", "slope_low", "slope_high"])
    for name, runs in results.items():
        writer.writerow([name, *[smallest(run) for run in runs], *slope_with_interval(lengths, runs)])
    write_atomically(path, text.getvalue().encode())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="desk", help="desk: 250 to 16,000 steps; smoke: seconds (default: desk)")
    add("--seeds", type=number(int, 2), default=32, help="runs of every schedule and length (default: 32)")
    add("--out", type=Path, default=SCRIPT.parent / "result", help="folder of the tables (default: result beside this)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    folder, problem, lengths = args.out.absolute() / f"convergence-{args.preset}", Problem(), PRESETS[args.preset]
    results: dict[str, Any] = {}
    with user_errors():
        folder.mkdir(parents=True, exist_ok=True)
        for name, rate in schedules(args.seeds).items():
            results[name] = [squared_norms(problem, rate, length, args.seeds) for length in lengths]
        command = shlex.join(["python", "tables/convergence.py", *(argv if argv is not None else sys.argv[1:])])
        write_table(folder / "table.md", lengths, results, args, command)
        write_csv(folder / "table.csv", lengths, results)
        draw(folder / "table.png", lengths, results)
    print((folder / "table.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
