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
import shlex
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
from writing import markdown, provenance_of, read_jsonl, write_csv, write_jsonl, write_page

from mlr_snet_scale import RANGE_STEPS, UNTRAINED_STEPS, measure_lr_scale, smoothed
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
from training.command_line import number, user_errors
from training.folder import provenance

TRIAL_STEPS = 15
GRID = [octave / 10 for octave in range(-25, 11)]  # of log2 c, from which c is fitted

# ---------------------------------------------------------------------------------------------- runs


def measure(problem: Problem, data: Data, seed: int, num_steps: int) -> dict[str, Any]:
    """What measure_lr_scale says of a run, or where it refuses its guess and why."""
    training = Training(problem, data, seed)
    optimizer = OPTIMIZERS[problem.optimizer](training.network.parameters())
    measured = measure_lr_scale(training.network, optimizer, LossStream(training), num_steps, problem.max_norm)
    outcome = {"refusal": measured.refusal} if measured.refusal else {"steps": measured.num_steps}
    return {"scale": float(f"{measured.scale:.4g}"), **outcome}


def cosine(peak: float, num_steps: int) -> list[float]:
    return [peak * (1 + math.cos(math.pi * step / num_steps)) / 2 for step in range(num_steps)]


def sweep(low: float, high: float) -> list[float]:
    """The rates of a range test."""
    return [low * (high / low) ** (step / (RANGE_STEPS - 1)) for step in range(RANGE_STEPS)]


class Cache:
    """Everything that was trained, a line each, found again by what it was. The first line is the provenance."""

    def __init__(self, path: Path, header: dict[str, Any] | None = None):
        self.path = path
        if not path.exists():
            write_jsonl(path, [header])
        self.header, *rows = read_jsonl(path)
        self.rows = {row["key"]: row for row in rows}

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.rows:
            start = time.perf_counter()
            row = {"key": key, **make()}
            row["seconds"] = round(time.perf_counter() - start, 2)
            with self.path.open("a") as file:
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
            self.rows[key] = row
        return self.rows[key]


def final(problem: Problem, data: Data, seed: int, peak: float, num_steps: int) -> dict[str, Any]:
    """A whole run under a cosine from that peak."""
    training = Training(problem, data, seed)
    losses = training.run(cosine(peak, num_steps))
    loss, accuracy = training.validate() if math.isfinite(losses[-1]) else (math.nan, math.nan)
    if not math.isfinite(loss):
        loss, accuracy = math.log(data.num_outputs), 100 / data.num_outputs
    return {"loss": round(loss, 4), "accuracy": round(accuracy, 2)}


def best_exponent(values: dict[int, float]) -> int:
    return min(values, key=lambda exponent: (values[exponent], exponent))


def run_grid(problem: Problem, data: Data, num_steps: int, seeds: int, cache: Cache) -> None:
    """Cosines from usual · 2^k for k = -2 … 2, and on until the best is two places from either end."""
    mean: dict[int, float] = {}
    wanted = set(range(-2, 3))
    while wanted:
        for exponent in sorted(wanted):
            peak = problem.usual * 2.0**exponent
            rows = [cache.get(f"{problem.name} | cosine {num_steps} | 2^{exponent} | seed {seed}",
                              lambda seed=seed, peak=peak: final(problem, data, seed, peak, num_steps))
                    for seed in range(seeds)]
            mean[exponent] = statistics.fmean(score(problem, row) for row in rows)
        best = best_exponent(mean)
        wanted = {k for k in range(best - 2, best + 3) if k not in mean and -9 <= k <= 9}


def score(problem: Problem, row: dict[str, Any]) -> float:
    """What is to be small: the error in %, or for text the loss in per cent of a nat (so in % of perplexity)."""
    return 100 * row["loss"] if problem.is_text else 100 - row["accuracy"]


def run_traces(problem: Problem, data: Data, seeds: int, cache: Cache) -> None:
    """A range test around the usual rate, and short cosines from usual · 2^k: the losses of their steps."""
    usual = problem.usual
    plans = {f"range {RANGE_STEPS}": sweep(usual / 1000, usual * 100)}
    plans |= {f"trial {TRIAL_STEPS} | 2^{k}": cosine(usual * 2.0**k, TRIAL_STEPS) for k in range(-5, 7)}
    for seed in range(seeds):
        training = Training(problem, data, 100 + seed)
        for stream, (kind, rates) in enumerate(plans.items(), start=2):  # the streams of the recorded traces
            cache.get(f"{problem.name} | {kind} | seed {seed}",
                      lambda run=training.run, rates=rates, stream=stream: {"losses": run(rates, stream)})


def run_measure(problem: Problem, data: Data, num_steps: int, seeds: int, cache: Cache) -> None:
    for seed in range(500, 500 + seeds):
        cache.get(f"{problem.name} | measured {num_steps} | seed {seed}",
                  lambda seed=seed: measure(problem, data, seed, num_steps))


# ---------------------------------------------------------------------------------------------- rules

# Rates are in octaves above the usual rate of the optimizer: log2(rate / usual).


@dataclass(frozen=True, eq=False)
class Case:
    """A problem, one run length, and the traces of one seed."""

    problem: Problem
    num_steps: int
    scores: dict[int, float]  # of whole runs, by the peak in octaves; small is good
    range_test: list[float]  # losses
    trials: dict[int, list[float]]  # losses of cosines over 15 steps, by the peak in octaves

    @cached_property
    def best(self) -> float:
        """The best peak: the vertex of the parabola through the lowest score and its neighbours."""
        middle = best_exponent(self.scores)
        left, low, right = (self.scores[middle + offset] for offset in (-1, 0, 1))
        return middle + (left - right) / (left - 2 * low + right) / 2 if left + right > 2 * low else float(middle)

    def regret(self, rate: float) -> float:
        """What a run from that peak loses against the best of the grid: interpolated, and level outside the grid."""
        low = max(min(self.scores), min(math.floor(rate), max(self.scores) - 1))
        share = min(max(rate - low, 0.0), 1.0)
        return (1 - share) * self.scores[low] + share * self.scores[low + 1] - min(self.scores.values())

    @cached_property
    def range_rate(self) -> float:
        """Where the function's smoothed loss of the range test is lowest, once the rates are large enough to matter."""
        trained = smoothed(self.range_test)[UNTRAINED_STEPS:]
        return math.log2(sweep(1e-3, 1e2)[UNTRAINED_STEPS + trained.index(min(trained))])

    def best_trial(self, peaks: list[float]) -> float:
        """The peak with the lowest final loss, among those trials that are nearest to the given peaks."""
        nearest = {min(self.trials, key=lambda peak, wanted=peak: abs(peak - wanted)) for peak in peaks}
        return float(min(nearest, key=self.final_loss))

    def final_loss(self, peak: int) -> float:
        losses = self.trials[peak]
        return statistics.fmean(losses[-5:]) if math.isfinite(losses[-1]) else math.inf


def between(case: Case, c: float) -> float:
    """c · the best of three cosine trials, from usual / c to the rate of the range test."""
    high = case.range_rate
    rate = case.best_trial([-c, (high - c) / 2, high]) + c
    return min(max(rate, min(0.0, high + c)), max(0.0, high + c))


def weighted_by_noise(case: Case, c: float) -> float:
    """The mean of the three trials of between, weighted by how clearly the noise of the batches tells them apart."""
    high = case.range_rate
    peaks = [case.best_trial([peak]) for peak in (-c, (high - c) / 2, high)]
    losses = [case.final_loss(int(peak)) for peak in peaks]
    error = statistics.pstdev(case.range_test[:20]) * math.sqrt(2 / 5)
    weights = [math.exp((min(losses) - loss) / (2 * error)) if math.isfinite(loss) else 0.0 for loss in losses]
    return sum(weight * peak for weight, peak in zip(weights, peaks, strict=True)) / (sum(weights) or 1) + c


RULES: dict[str, Callable[[Case, float], float]] = {  # of the case and log2 c
    "the usual rate": lambda case, c: 0.0,
    "c per optimizer": lambda case, c: c,
    "c · range test": lambda case, c: case.range_rate + c,
    "c · trials": lambda case, c: case.best_trial(list(case.trials)) + c,
    "c · best of three trials between usual and c · range test": between,
    "the function's: mean of the three, weighted by loss and noise, and its c":
        lambda case, c: weighted_by_noise(case, math.log2(case.problem.factor)),
}
PER_OPTIMIZER = ("c per optimizer",)  # c is fitted on the problems of the optimizer only


def weighted_mean(values: dict[Case, float]) -> float:
    """The mean over problems; the lengths and seeds of one share its weight."""
    by_problem: dict[str, list[float]] = {}
    for case, value in values.items():
        by_problem.setdefault(case.problem.name, []).append(value)
    return statistics.fmean(statistics.fmean(group) for group in by_problem.values())


def estimates(name: str, cases: list[Case]) -> dict[Case, float]:
    """The rule's rate for every case, its constant fitted on the other problems alone."""
    table = {case: [RULES[name](case, c) for c in GRID] for case in cases}
    problems: dict[Problem, list[Case]] = {}
    for case in cases:
        problems.setdefault(case.problem, []).append(case)
    errors = {problem: [statistics.fmean((table[case][place] - case.best) ** 2 for case in group)
                        for place in range(len(GRID))] for problem, group in problems.items()}
    result = {}
    for problem, group in problems.items():
        others = [row for other, row in errors.items() if other != problem and (
            name not in PER_OPTIMIZER or FAMILY[other.optimizer] == FAMILY[problem.optimizer])]
        sums = [sum(column) for column in zip(*others, strict=True)]
        result |= {case: table[case][sums.index(min(sums))] for case in group}
    return result


def fitted_factor(cases: list[Case]) -> float:
    """c of weighted_by_noise with the smallest mean squared error over these cases."""
    errors = [weighted_mean({case: (weighted_by_noise(case, c) - case.best) ** 2 for case in cases}) for c in GRID]
    return 2 ** GRID[errors.index(min(errors))]


def collect(cache: Cache, longest: int) -> list[Case]:
    """Every problem, length and seed whose runs and traces are all there."""
    scores: dict[tuple[str, int], dict[int, list[float]]] = {}
    ranges: dict[tuple[str, int], list[float]] = {}
    trials: dict[tuple[str, int], dict[int, list[float]]] = {}
    problems = {problem.name: problem for problem in PROBLEMS}
    for row in cache.rows.values():
        name, kind, *peak, seed = row["key"].split(" | ")
        kind, steps = kind.split()
        trace = name, int(seed.removeprefix("seed "))
        if kind == "cosine":
            places = scores.setdefault((name, int(steps)), {})
            places.setdefault(int(peak[0][2:]), []).append(score(problems[name], row))
        elif kind == "range":
            ranges[trace] = row["losses"]
        elif kind == "trial":
            trials.setdefault(trace, {})[int(peak[0][2:])] = row["losses"]
    cases = []
    for (name, num_steps), values in scores.items():
        mean = {peak: statistics.fmean(seeds) for peak, seeds in sorted(values.items())}
        best = best_exponent(mean)
        for trace, range_test in ranges.items():
            complete = set(range(best - 2, best + 3)) <= mean.keys() and len(trials.get(trace, {})) == 12
            if trace[0] == name and complete and num_steps <= longest:
                cases.append(Case(problems[name], num_steps, mean, range_test, trials[trace]))
    return cases


@dataclass(frozen=True, eq=False)
class Judged:
    """A problem, one run length, and the rates of measure_lr_scale in octaves, seed by seed."""

    case: Case  # of any seed of the traces
    rates: list[float]
    refusals: int  # of them

    def within(self, factor: float) -> float:
        """The share of seeds whose rate is that close to the best peak."""
        return statistics.fmean(abs(rate - self.case.best) <= math.log2(factor) for rate in self.rates)

    @property
    def regrets(self) -> list[float]:
        return [self.case.regret(rate) for rate in self.rates]


def judge(cases: list[Case], cache: Cache) -> list[Judged]:
    """Every problem and run length that measure_lr_scale has measured, in the order of the problems."""
    measured: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in cache.rows.values():
        name, kind, *_ = row["key"].split(" | ")
        if kind.startswith("measured"):
            measured.setdefault((name, int(kind.split()[1])), []).append(row)
    judged = []
    for case in {(case.problem.name, case.num_steps): case for case in cases}.values():
        rows = measured.get((case.problem.name, case.num_steps))
        if rows:
            rates = [math.log2(row["scale"] / case.problem.usual) for row in rows]
            judged.append(Judged(case, rates, sum("refusal" in row for row in rows)))
    return sorted(judged, key=lambda one: (PROBLEMS.index(one.case.problem), one.case.num_steps))


# ---------------------------------------------------------------------------------------------- the page

COLUMNS = ["within ×2", "within ×3", "regret, images", "worst", "regret, text", "worst"]


def row_of(name: list[str], within: list[dict[Case, float]], regrets: dict[Case, list[float]]) -> list[str]:
    """A row of a table of rules."""
    cells = [weighted_mean(values) for values in within]
    for is_text in (False, True):
        some = {case: values for case, values in regrets.items() if case.problem.is_text == is_text and values}
        mean = weighted_mean({case: statistics.fmean(values) for case, values in some.items()}) if some else math.nan
        cells += [mean, max(map(max, some.values()), default=math.nan)]
    return [*name, *(f"{cell:.2f}" for cell in cells)]


def function_table(judged: list[Judged]) -> list[str]:
    """The function against the usual rate, over all problems, and how often it refused."""
    seeds = {len(one.rates) for one in judged}
    usual = [{one.case: float(abs(one.case.best) <= math.log2(factor)) for one in judged} for factor in (2, 3)]
    counts = sum(one.refusals for one in judged), sum(len(one.rates) for one in judged)
    return [
        "## The function", "",
        f"measure_lr_scale on {' or '.join(map(str, sorted(seeds)))} seeds that no trace has. It refused in "
        f"{counts[0]} of {counts[1]} measurements, and its guess counts there.", "",
        *markdown([
            ["", *COLUMNS],
            row_of(["measure_lr_scale"], [{one.case: one.within(factor) for one in judged} for factor in (2, 3)],
                   {one.case: one.regrets for one in judged}),
            row_of(["the usual rate"], usual, {one.case: [one.case.regret(0.0)] for one in judged}),
        ]), "",
    ]


def rules_table(cases: list[Case]) -> list[str]:
    """Every rule over all problems."""
    rows = [["rule", "std (decades)", *COLUMNS]]
    for name in RULES:
        rates = estimates(name, cases)
        errors = {case: rates[case] - case.best for case in cases}
        deviation = math.log10(2) * math.sqrt(weighted_mean({case: error**2 for case, error in errors.items()}))
        within = [{case: float(abs(error) <= math.log2(factor)) for case, error in errors.items()} for factor in (2, 3)]
        regrets = {case: [case.regret(rates[case])] for case in cases}
        rows.append(row_of([name, f"{deviation:.2f}"], within, regrets))
    fits = [f"{fitted_factor([case for case in cases if FAMILY[case.problem.optimizer] == family]):.2f} ({family})"
            for family in dict.fromkeys(FAMILY.values())]
    return [
        "## The rules", "",
        f"On the traces of {len(cases)} problems, lengths and seeds, with trials a factor of 2 apart; c is fitted on "
        "all other problems.", "", *markdown(rows), "",
        f"c of the weighted mean that fits all problems of an optimizer best: {', '.join(fits)}.", "",
    ]


def problem_rows(judged: list[Judged]) -> list[dict[str, Any]]:
    """The function on every problem."""
    rows = []
    for one in judged:
        usual = one.case.problem.usual
        ratios = [2 ** (rate - one.case.best) for rate in one.rates]
        rows.append({
            "problem": one.case.problem.name, "steps": one.case.num_steps, "best_peak": usual * 2**one.case.best,
            "measured_median": usual * 2 ** statistics.median(one.rates), "lowest_ratio": min(ratios),
            "highest_ratio": max(ratios), "mean_regret": statistics.fmean(one.regrets), "refusals": one.refusals,
            "seeds": len(one.rates),
        })
    return rows


def render(folder: Path) -> None:
    """table.csv and the page, from runs.jsonl."""
    cache = Cache(folder / "runs.jsonl")
    cases = collect(cache, cache.header["arguments"]["longest"])
    judged = judge(cases, cache)
    rows = problem_rows(judged)
    write_csv(folder / "table.csv", list(rows[0]), rows)
    lengths = {(case.problem.name, case.num_steps) for case in cases}
    body = [
        f"{len({name for name, _ in lengths})} problems, {len(lengths)} with their run lengths, against the best "
        "cosine peak of a grid. Regret in points of accuracy, and in % of perplexity. [table.csv](table.csv) has every "
        "problem.", "", *function_table(judged), *rules_table(cases),
    ]
    title, question = "Calibration of the measured LR scale", "How near does measuring come to the best peak rate?"
    write_page(folder, title, question, cache.header["command"], body, provenance_of([cache.header]))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, positive = parser.add_argument, number(int, 1)
    add("--data-root", type=Path, required=True, help="folder with cifar10 and the texts")
    add("--out", type=Path, default=SCRIPT.parents[1] / "results" / "calibration", help="folder of the result")
    add("--seeds", type=positive, default=1, help="seeds of every run (default: 1)")
    add("--trace-seeds", type=positive, default=5, help="seeds of every trace (default: 5)")
    add("--judge-seeds", type=positive, default=10, help="seeds of measure_lr_scale (default: 10)")
    add("--longest", type=positive, default=3000, help="steps of the longest runs (default: 3000)")
    add("--only", default="", help="problems whose name contains this (default: all)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)
    command = shlex.join(["python", "tables/studies/calibrate.py", *(argv if argv is not None else sys.argv[1:])])
    with user_errors():
        args.out.mkdir(parents=True, exist_ok=True)
        header = {"study": "calibrate", **provenance(args), "command": command}
        cache = Cache(args.out / "runs.jsonl", header)
        loaded: dict[tuple[str, int], Data] = {}
        for problem in PROBLEMS:
            if args.only not in problem.name:
                continue
            key = problem.data, problem.size
            if key not in loaded:
                loaded[key] = load_data(args.data_root, *key)
            run_traces(problem, loaded[key], args.trace_seeds, cache)
            for num_steps in (length for length in problem.lengths if length <= args.longest):
                run_grid(problem, loaded[key], num_steps, args.seeds, cache)
                run_measure(problem, loaded[key], num_steps, args.judge_seeds, cache)
            print(problem.name, flush=True)
        render(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
