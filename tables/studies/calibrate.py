"""Calibrates the measured LR scale: small problems whose best cosine peak is known, and rules that should find it.

    python tables/studies/calibrate.py --data-root DIR

DIR holds cifar10/train/{class}/*.jpg, tinyshakespeare.txt and wikitext-2-valid.txt; digits come with scikit-learn.
Every problem trains with a cosine over a grid of peaks a factor of 2 apart (its best is the target), and leaves
traces: the losses of range tests and of short cosine trials. Every rule then reads the traces only. At last
measure_lr_scale itself is judged on seeds that no trace has; its guess counts where it refuses. What is in runs.jsonl
is not run again.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
SCRIPT = Path(__file__).resolve()
sys.path[:0] = [str(SCRIPT.parents[2]), str(SCRIPT.parents[1])]

import torch
from writing import markdown, read_jsonl, study_header, write_csv, write_jsonl, write_page

from mlr_snet_scale import RANGE_STEPS, UNTRAINED_STEPS, guessed_scale, measure_lr_scale, smoothed
from studies.calibration_problems import (
    FAMILY,
    OPTIMIZERS,
    PROBLEMS,
    Data,
    LossStream,
    Problem,
    Training,
    load_data,
)
from training.command_line import show_safely, user_errors
from training.log import warn
from utils import write_atomically

TRIAL_STEPS = 15
TRACE_SEEDS, JUDGE_SEEDS = 5, 10  # whole runs have one
OCTAVES = range(-5, 7)  # of the trials' peaks, above the usual rate
FACTORS = [octave / 10 for octave in range(-25, 11)]  # of log2 c, from which c is fitted
KEY = ("problem", "kind", "steps", "octave", "seed")  # what tells the lines of runs.jsonl apart

# ---------------------------------------------------------------------------------------------- runs


class Cache:
    """runs.jsonl: the provenance, then a line for everything that was trained, found again by what it was."""

    def __init__(self, path: Path, header: dict[str, Any] | None = None):
        self.path = path
        if not path.exists():
            write_jsonl(path, [header])
        content = path.read_text("utf-8")
        if not content.endswith("\n"):  # a kill has cut the last line short
            write_atomically(path, content[: content.rfind("\n") + 1].encode())
        self.header, *rows = read_jsonl(path)
        self.rows = {tuple(row[name] for name in KEY): row for row in rows}
        if header and header["commit"] != self.header["commit"]:
            warn(f"{path} was begun at commit {self.header['commit']}; what it holds is not run again")

    def get(self, key: tuple[Any, ...], make: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        if key not in self.rows:
            start = time.perf_counter()
            row = dict(zip(KEY, key, strict=True)) | make(*arguments)
            self.rows[key] = row | {"seconds": round(time.perf_counter() - start, 2)}
            with self.path.open("a") as file:
                file.write(json.dumps(self.rows[key], separators=(",", ":")) + "\n")
        return self.rows[key]


def cosine(peak: float, num_steps: int) -> list[float]:
    return [peak * (1 + math.cos(math.pi * step / num_steps)) / 2 for step in range(num_steps)]


def sweep(low: float, high: float) -> list[float]:
    """The rates of a range test."""
    return [low * (high / low) ** (step / (RANGE_STEPS - 1)) for step in range(RANGE_STEPS)]


def final(problem: Problem, data: Data, seed: int, peak: float, num_steps: int) -> dict[str, Any]:
    """A whole run under a cosine from that peak."""
    training = Training(problem, data, seed)
    losses = training.run(cosine(peak, num_steps))
    loss, accuracy = training.validate() if math.isfinite(losses[-1]) else (math.nan, math.nan)
    if not math.isfinite(loss):
        loss, accuracy = math.log(data.num_outputs), 100 / data.num_outputs
    return {"loss": round(loss, 4), "accuracy": round(accuracy, 2)}


def range_test(training: Training) -> dict[str, Any]:
    """The losses of a range test around the usual rate, and the guess that its first ones give."""
    problem = training.problem
    losses = training.run(sweep(problem.usual / 1000, problem.usual * 100), stream=2)
    optimizer = OPTIMIZERS[problem.optimizer](training.network.parameters())
    start = statistics.fmean(losses[:UNTRAINED_STEPS])
    return {"losses": losses, "guess": guessed_scale(optimizer, start, training.data.num_outputs, problem.is_text)}


def trial(training: Training, octave: int) -> dict[str, Any]:
    """The losses of a short cosine from usual · 2^octave."""
    rates = cosine(training.problem.usual * 2.0**octave, TRIAL_STEPS)
    return {"losses": training.run(rates, stream=3 + OCTAVES.index(octave))}


def measure(problem: Problem, data: Data, seed: int, num_steps: int) -> dict[str, Any]:
    """What measure_lr_scale says of a run, or where it refuses its guess and why."""
    training = Training(problem, data, seed)
    optimizer = OPTIMIZERS[problem.optimizer](training.network.parameters())
    measured = measure_lr_scale(training.network, optimizer, LossStream(training), num_steps, problem.max_norm,
                                training.data.num_outputs, problem.is_text)
    outcome = {"refusal": measured.refusal} if measured.refusal else {"num_steps": measured.num_steps}
    return {"scale": float(f"{measured.scale:.4g}"), **outcome}


def score(problem: Problem, row: dict[str, Any]) -> float:
    """What is to be small: the error in %, or for text the loss in hundredths of a nat."""
    return 100 * row["loss"] if problem.is_text else 100 - row["accuracy"]


def best_octave(scores: dict[int, float]) -> int:
    return min(scores, key=lambda octave: (scores[octave], octave))


def run_grid(problem: Problem, data: Data, num_steps: int, cache: Cache) -> None:
    """Cosines from usual · 2^k for k = -2 … 2, and on until the best is two places from either end."""
    scores: dict[int, float] = {}
    wanted = set(range(-2, 3))
    while wanted:
        for octave in sorted(wanted):
            peak = problem.usual * 2.0**octave
            key = (problem.name, "cosine", num_steps, octave, 0)
            scores[octave] = score(problem, cache.get(key, final, problem, data, 0, peak, num_steps))
        best = best_octave(scores)
        wanted = {k for k in range(best - 2, best + 3) if k not in scores and -9 <= k <= 9}


def run_traces(problem: Problem, data: Data, cache: Cache) -> None:
    for seed in range(TRACE_SEEDS):
        training = Training(problem, data, 100 + seed)
        cache.get((problem.name, "range", RANGE_STEPS, 0, seed), range_test, training)
        for octave in OCTAVES:
            cache.get((problem.name, "trial", TRIAL_STEPS, octave, seed), trial, training, octave)


def run_measure(problem: Problem, data: Data, num_steps: int, cache: Cache) -> None:
    for seed in range(500, 500 + JUDGE_SEEDS):
        cache.get((problem.name, "measured", num_steps, 0, seed), measure, problem, data, seed, num_steps)


# ---------------------------------------------------------------------------------------------- rules

# Rates are in octaves above the usual rate of the optimizer: log2(rate / usual).


@dataclass(frozen=True, eq=False)
class Case:
    """A problem, one run length, and the traces of one seed."""

    problem: Problem
    num_steps: int
    scores: dict[int, float]  # of whole runs, by the peak in octaves; small is good
    guess: float  # of the function
    range_test: list[float]  # losses
    trials: dict[int, list[float]]  # losses of cosines over 15 steps, by the peak in octaves

    @cached_property
    def best(self) -> float:
        """The best peak: the vertex of the parabola through the lowest score and its neighbours."""
        middle = best_octave(self.scores)
        left, low, right = (self.scores[middle + offset] for offset in (-1, 0, 1))
        return middle + (left - right) / (left - 2 * low + right) / 2 if left + right > 2 * low else float(middle)

    def regret(self, rate: float) -> float:
        """What a run from that peak loses against the best of the grid, in points or % of perplexity: interpolated,
        and level outside the grid.
        """
        low = max(min(self.scores), min(math.floor(rate), max(self.scores) - 1))
        share = min(max(rate - low, 0.0), 1.0)
        lost = (1 - share) * self.scores[low] + share * self.scores[low + 1] - min(self.scores.values())
        return 100 * math.expm1(lost / 100) if self.problem.is_text else lost

    @cached_property
    def range_rate(self) -> float:
        """Where the function's smoothed loss of the range test is lowest, once the rates are large enough to matter."""
        trained = smoothed(self.range_test)[UNTRAINED_STEPS:]
        return math.log2(sweep(1e-3, 1e2)[UNTRAINED_STEPS + trained.index(min(trained))])

    def trial_rate(self, c: float) -> float:
        """The best peak of the recorded trials nearest to those of the function, guess / c times 1/6, 1/2, 3/2, 9/2."""
        wanted = [self.guess - c + math.log2(ratio) for ratio in (1 / 6, 1 / 2, 3 / 2, 9 / 2)]
        nearest = [min(self.trials, key=lambda octave: abs(octave - place)) for place in wanted]
        return float(min(dict.fromkeys(nearest), key=self.final_loss))

    def final_loss(self, peak: int) -> float:
        """The mean loss of the second half of a trial; infinite if it blew up."""
        losses = self.trials[peak]
        return statistics.fmean(losses[len(losses) // 2 :]) if math.isfinite(losses[-1]) else math.inf


def median_of_three(case: Case, c: float) -> float:
    """The function's rule."""
    return statistics.median((case.guess, case.range_rate + c, case.trial_rate(c) + c))


RULES: dict[str, Callable[[Case, float], float]] = {  # of the case and log2 c
    "the usual rate": lambda case, c: 0.0,
    "c per optimizer": lambda case, c: c,
    "the guess": lambda case, c: case.guess,
    "c · range test": lambda case, c: case.range_rate + c,
    "c · best of four trials about the guess": lambda case, c: case.trial_rate(c) + c,
    "median of the guess and these two, c per optimizer": median_of_three,
    "the function's: this median with its own c":
        lambda case, c: median_of_three(case, math.log2(case.problem.factor)),
}

Estimate = tuple[Case, float]  # and the rate that a rule, or the function, gives it


def mean_over_problems(estimates: list[Estimate], value: Callable[[Case, float], float]) -> float:
    """The mean over problems; the lengths and seeds of one share its weight."""
    by_problem: dict[str, list[float]] = {}
    for case, rate in estimates:
        by_problem.setdefault(case.problem.name, []).append(value(case, rate))
    return statistics.fmean(statistics.fmean(values) for values in by_problem.values())


def squared_error(case: Case, rate: float) -> float:
    return (rate - case.best) ** 2


def fitted(rule: Callable[[Case, float], float], cases: list[Case]) -> float:
    """log2 c with the smallest mean squared error over the problems."""
    return min(FACTORS, key=lambda c: mean_over_problems([(case, rule(case, c)) for case in cases], squared_error))


def estimates_of(name: str, cases: list[Case]) -> list[Estimate]:
    """The rule's rate for every case, its constant fitted on the other problems, or on those of the same optimizer."""
    rates = {(case, c): RULES[name](case, c) for case in cases for c in FACTORS}
    estimates = []
    for problem in dict.fromkeys(case.problem for case in cases):
        others = [case for case in cases if case.problem != problem and (
            "per optimizer" not in name or FAMILY[case.problem.optimizer] == FAMILY[problem.optimizer])]
        c = fitted(lambda case, c: rates[case, c], others or cases)
        estimates += [(case, rates[case, c]) for case in cases if case.problem == problem]
    return estimates


def collect(cache: Cache) -> list[Case]:
    """Every problem, length and seed whose runs and traces are all there."""
    rows = {kind: [row for row in cache.rows.values() if row["kind"] == kind] for kind in ("cosine", "range", "trial")}
    cases = []
    for problem in PROBLEMS:
        own = {kind: [row for row in some if row["problem"] == problem.name] for kind, some in rows.items()}
        for num_steps in problem.lengths:
            scores = {row["octave"]: score(problem, row) for row in own["cosine"] if row["steps"] == num_steps}
            if not scores or not set(range(best_octave(scores) - 2, best_octave(scores) + 3)) <= scores.keys():
                continue
            for test in own["range"]:
                trials = {row["octave"]: row["losses"] for row in own["trial"] if row["seed"] == test["seed"]}
                if trials.keys() == set(OCTAVES):
                    guess = math.log2(test["guess"] / problem.usual)
                    cases.append(Case(problem, num_steps, scores, guess, test["losses"], trials))
    return cases


# ---------------------------------------------------------------------------------------------- the page

COLUMNS = ["std (decades)", "within ×2", "within ×3", "regret, images", "worst", "regret, text", "worst"]


def quality(estimates: list[Estimate]) -> list[str]:
    """The cells of a rule under COLUMNS."""
    def share(factor: float) -> float:
        return mean_over_problems(estimates, lambda case, rate: float(abs(rate - case.best) <= math.log2(factor)))

    cells = [math.log10(2) * math.sqrt(mean_over_problems(estimates, squared_error)), share(2), share(3)]
    for is_text in (False, True):
        some = [(case, rate) for case, rate in estimates if case.problem.is_text == is_text]
        cells += [mean_over_problems(some, Case.regret), max(case.regret(rate) for case, rate in some)] if some else [
            math.nan, math.nan]
    return [f"{cell:.2f}" for cell in cells]


def judge(targets: dict[tuple[str, int], Case], cache: Cache) -> tuple[list[Estimate], list[dict[str, Any]]]:
    """The rates of measure_lr_scale for every problem and run length, and a row of table.csv for each."""
    judged: list[Estimate] = []
    rows = []
    for (name, num_steps), case in targets.items():
        measured = [row for key, row in cache.rows.items() if key[:3] == (name, "measured", num_steps)]
        if not measured:  # an interrupted study has not come to it
            continue
        rates = [math.log2(row["scale"] / case.problem.usual) for row in measured]
        ratios = [2 ** (rate - case.best) for rate in rates]
        judged += [(case, rate) for rate in rates]
        rows.append({
            "problem": name, "steps": num_steps, "best_peak": case.problem.usual * 2**case.best,
            "measured_median": case.problem.usual * 2 ** statistics.median(rates), "lowest_ratio": min(ratios),
            "highest_ratio": max(ratios), "mean_regret": statistics.fmean(map(case.regret, rates)),
            "refusals": len([row for row in measured if "refusal" in row]), "seeds": len(rates),
        })
    return judged, rows


def render(folder: Path) -> None:
    """table.csv and the page, from runs.jsonl."""
    cache = Cache(folder / "runs.jsonl")
    cases = collect(cache)
    targets = {(case.problem.name, case.num_steps): case for case in cases}
    judged, rows = judge(targets, cache)
    write_csv(folder / "table.csv", list(rows[0]), rows)
    usual = [(case, 0.0) for case in targets.values()]
    families: dict[str, list[Case]] = {}
    for case in cases:
        families.setdefault(FAMILY[case.problem.optimizer], []).append(case)
    fits = [f"{2 ** fitted(median_of_three, some):.2f} ({family})" for family, some in families.items()]
    body = [
        f"{len({name for name, _ in targets})} problems, {len(targets)} with their run lengths, against the best "
        "cosine peak of a grid. Regret in points of accuracy, and in % of perplexity. [table.csv](table.csv) has every "
        "problem.", "", "## The function", "",
        f"measure_lr_scale on seeds that no trace has. It refused in {sum(row['refusals'] for row in rows)} of "
        f"{len(judged)} measurements, and its guess counts there.", "",
        *markdown([["", *COLUMNS[1:]], ["measure_lr_scale", *quality(judged)[1:]],
                   ["the usual rate", *quality(usual)[1:]]]), "## The rules", "",
        f"On the traces of {len(cases)} problems, lengths and seeds, with trials a factor of 2 apart; c is fitted on "
        "all other problems, but for the function's own, which was chosen on these.", "",
        *markdown([["rule", *COLUMNS], *([name, *quality(estimates_of(name, cases))] for name in RULES)]),
        f"c of the median that fits all problems of an optimizer best: {', '.join(sorted(fits))}.", "",
    ]
    title, question = "Calibration of the measured LR scale", "How near does measuring come to the best peak rate?"
    write_page(folder, title, question, cache.header["command"], body, [cache.header])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data-root", type=Path, required=True, help="folder with cifar10 and the texts")
    add("--out", type=Path, default=SCRIPT.parents[1] / "result" / "calibration",
        help="folder of the result, whose runs are not run again (default: result/calibration beside the studies)")
    add("--only", default="", help="problems whose name contains this (default: all)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    with user_errors(args):
        chosen = [problem for problem in PROBLEMS if args.only in problem.name]
        if not chosen:
            raise ValueError(f"only {args.only}: is in the name of no problem")
        args.out.mkdir(parents=True, exist_ok=True)
        cache = Cache(args.out / "runs.jsonl", study_header("calibrate", args, argv))
        for problem in chosen:
            data = load_data(args.data_root, problem.data, problem.size)
            run_traces(problem, data, cache)
            for num_steps in problem.lengths:
                run_grid(problem, data, num_steps, cache)
                run_measure(problem, data, num_steps, cache)
            print(problem.name, flush=True)
        render(args.out)
    return 0


if __name__ == "__main__":
    show_safely()
    sys.exit(main())
