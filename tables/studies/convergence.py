"""How fast SGD converges under a schedule on a smooth non-convex problem with known noise.

The problem is logistic regression with the non-convex regulariser λ·Σ w²/(1 + w²); every gradient has Gaussian noise of
standard deviation σ per coordinate. Each schedule runs for 250 to 16,000 steps. The measure is the smallest expected
squared gradient norm along a run, min_t E‖∇f(w_t)‖², whose best known rate for SGD is T^(−1/2).
"""

import argparse
import bisect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCRIPT = Path(__file__).resolve()
sys.path[:0] = [str(SCRIPT.parents[2]), str(SCRIPT.parents[1])]

from writing import markdown, read_csv, read_jsonl, study_header, write_csv, write_jsonl, write_page

from mlr_snet import load_schedules
from training.command_line import number, show_safely, user_errors
from training.pictures import save, subplots

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


class Shipped:
    """A shipped set of nets that share a run, and the share of it over which the rate falls to 0 at the end.

    Every seed has an LSTM state of its own.
    """

    def __init__(self, name: str, cooldown: float = 0.0):
        self.name, self.cooldown = name, cooldown

    @torch.no_grad()
    def __call__(self, step: int, num_steps: int, losses: Tensor) -> Tensor:
        if step == 0:
            nets = load_schedules(self.name)
            self.steps = [torch.vmap(net) for net in nets]
            self.states = nets[0].initial_state().expand(len(losses), -1, -1, -1)
        number = len(self.steps)
        phase = bisect.bisect_right([place * num_steps // number for place in range(1, number)], step)
        fractions, self.states = self.steps[phase](losses.float(), self.states)
        remaining = 1 - step / num_steps
        return fractions.double() * (min(1.0, remaining / self.cooldown) if self.cooldown else 1.0)


SCHEDULES: dict[str, Rate] = {
    "MLR-SNet (paper)": Shipped("paper"),
    "MLR-SNet (paper, cool-down)": Shipped("paper", 0.2),
    "MLR-SNet (recommended)": Shipped("recommended"),
    "MLR-SNet (recommended, cool-down)": Shipped("recommended", 0.2),
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


def write(folder: Path, lengths: list[int], results: dict[str, list[Tensor]], header: dict[str, Any]) -> None:
    """runs.jsonl, which has the slope of every schedule, and metrics.csv."""
    contents, rows = [header], []
    for name, runs in results.items():
        slope, low, high = slope_with_interval(lengths, runs)
        contents.append({"schedule": name, "is_ours": isinstance(SCHEDULES[name], Shipped), "slope": slope, "low": low,
                         "high": high})
        for length, run in zip(lengths, runs, strict=True):
            error = float(run[run.mean(1).argmin()].std() / math.sqrt(run.shape[1]))
            rows.append({"schedule": name, "steps": length, "value": smallest(run), "standard_error": error})
    write_jsonl(folder / "runs.jsonl", contents)
    write_csv(folder / "metrics.csv", list(rows[0]), rows)


def render(folder: Path) -> None:
    """The picture and the page, from runs.jsonl and metrics.csv."""
    header, *schedules = read_jsonl(folder / "runs.jsonl")
    for schedule in schedules:
        rows = [row for row in read_csv(folder / "metrics.csv") if row["schedule"] == schedule["schedule"]]
        schedule["values"] = {int(row["steps"]): float(row["value"]) for row in rows}
        schedule["errors"] = [float(row["standard_error"]) for row in rows]
    lengths = list(schedules[0]["values"])
    table = [["schedule", *(f"{length:,} steps" for length in lengths), "slope (95 % interval)"]]
    for schedule in schedules:
        values = [f"{value:.3g}" for value in schedule["values"].values()]
        slope = f"{schedule['slope']:.2f} ({schedule['low']:.2f} to {schedule['high']:.2f})"
        table.append([schedule["schedule"], *values, slope])
    draw(folder / "table.png", lengths, schedules)
    body = [
        *markdown(table),
        "The smallest expected squared gradient norm along a run, and the slope of its logarithm against that of the "
        f"number of steps; the interval is a bootstrap over the {header['arguments']['seeds']} seeds. γ, and "
        "the peak of every rival, is 1/smoothness; the recommended net trains at about half of γ.", "",
        "![Smallest expected squared gradient norm against the number of steps](table.png)", "",
    ]
    title = "Convergence on a smooth non-convex problem"
    question = "How fast does SGD converge under each schedule where the gradient noise is known?"
    write_page(folder, title, question, header["command"], body, [header])


def draw(path: Path, lengths: list[int], schedules: list[dict[str, Any]]) -> None:
    figure, ((panel,),) = subplots(1, 1, width=6.4, height=4.4)
    for schedule in schedules:
        panel.errorbar(lengths, list(schedule["values"].values()), schedule["errors"], marker="o", capsize=3,
                       linewidth=2.4 if schedule["is_ours"] else 1.4, label=schedule["schedule"])
    top = max(schedule["values"][lengths[0]] for schedule in schedules)
    reference = [top * (lengths[0] / length) ** 0.5 for length in lengths]
    panel.plot(lengths, reference, "k:", label="slope −1/2, the best known rate")
    panel.set(xscale="log", yscale="log", xlabel="steps of the run", ylabel="smallest expected squared gradient norm")
    panel.legend(fontsize="small")
    save(figure, path)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="desk", help="desk: 250 to 16,000 steps; smoke: seconds (default: desk)")
    add("--seeds", type=number(int, 2), default=32, help="runs of every schedule and length (default: 32)")
    add("--out", type=Path, default=SCRIPT.parents[1] / "result",
        help="folder of the tables (default: result beside the studies)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    folder, problem, lengths = args.out.absolute() / f"convergence-{args.preset}", Problem(), PRESETS[args.preset]
    with user_errors():
        folder.mkdir(parents=True, exist_ok=True)
        results = {}
        for name, rate in SCHEDULES.items():
            results[name] = [squared_norms(problem, rate, length, args.seeds) for length in lengths]
        write(folder, lengths, results, study_header("convergence", args, argv))
        render(folder)
    print((folder / "README.md").read_text("utf-8"))
    return 0


if __name__ == "__main__":
    show_safely()
    sys.exit(main())
