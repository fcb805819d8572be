"""Measure what the method costs on this machine: the variants take turns, and every number is a median over the rounds.

A meta step against a plain step and against a textbook lookahead, in time and memory; whole epochs; precisions; the
input pipeline; what the loop and MLR-SNet add to the network's own work. To add a measurement: a function from the
Setting to the sentence that says how it was measured and its rows, and a line in MEASUREMENTS.
"""

import argparse
import contextlib
import gc
import itertools
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

SCRIPT = Path(__file__).resolve()
sys.path[:0] = [str(SCRIPT.parents[2]), str(SCRIPT.parents[1])]

from writing import markdown, read_csv, read_jsonl, study_header, write_csv, write_jsonl, write_page

from data import IMAGES
from data.images import ImageData, ImageTask
from data.meta_stream import MetaStream, schedule_arguments
from mlr_snet import MetaMLRSNetLR, MLRSNet
from models import IMAGE_NETWORKS
from studies.benchmark_steps import (
    ENDLESS,
    LR,
    STEPS,
    WEIGHT_DECAY,
    Setting,
    Step,
    build_images,
    learned_step,
    loss_of,
    new_network,
    plain_step,
)
from training.command_line import number, show_safely, user_errors
from utils import build_optimizer, choose_algorithms, peak_memory_mib, pick_device, read_text

WARM_UP = 2  # steps of every variant before it is measured
MOST_META_STEPS = 20  # that stand for an epoch of meta-training at T_val 1
MOST_BATCHES = 8  # that lie ready where drawing them is not to be measured
MOST_ROUNDS = {"memory": 3, "epoch": 3}  # each takes long, and varies little
METRICS = ["measurement", "variant", "column", "round", "value"]  # the columns of metrics.csv

Columns = dict[str, list[float]]  # a column's name -> its value in every round
Rows = dict[str, Columns]  # variant -> its numbers by column, named with their unit
Measured = tuple[str, Rows]  # one sentence on how it was measured, and the numbers


# ---------------------------------------------------------------------------------------------- clock and numbers


def seconds(step: Step, times: int, device: torch.device) -> float:
    """The mean seconds of a step, over `times` in a row."""
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    begin = now()
    for _ in range(times):
        step()
    return (now() - begin) / times


def alternate(
    variants: dict[str, Step], rounds: int, device: torch.device, steps: Mapping[str, int] | None = None
) -> Columns:
    """Seconds a step of every variant in every round.

    `steps` of a variant make its turn. By default it is 1; on a GPU 10, so that the host runs ahead as in training.
    Every second round goes backwards through the variants, so that none always follows the same one.
    """
    for step in variants.values():
        for _ in range(WARM_UP):
            step()
    turns = steps or dict.fromkeys(variants, 10 if device.type == "cuda" else 1)
    times: Columns = {name: [] for name in variants}
    for index in range(rounds):
        for name in list(variants)[:: -1 if index % 2 else 1]:
            times[name].append(seconds(variants[name], turns[name], device))
    return times


def quotients(ones: list[float], others: list[float], factor: float = 1.0) -> list[float]:
    return [factor * one / other for one, other in zip(ones, others, strict=True)]


def relative(values: Columns, unit: str, factor: float = 1.0) -> Rows:
    """Each variant's ratio to the first one, round by round, beside its values times `factor`."""
    base = next(iter(values.values()))
    return {
        name: {"ratio": quotients(own, base), unit: [factor * value for value in own]} for name, own in values.items()
    }


# ---------------------------------------------------------------------------------------------- the measurements


def rounds_of(name: str, args: argparse.Namespace) -> int:
    return min(args.rounds, MOST_ROUNDS.get(name, args.rounds))


def meta_steps(setting: Setting) -> Measured:
    times = alternate({name: make(setting) for name, make in STEPS.items()}, setting.args.rounds, setting.device)
    return (
        "Whole training steps. A meta step is this project's at T_val 1; the textbook lookahead differentiates through "
        "the inner step with create_graph=True, and takes the real step from a pass of its own."
    ), relative(times, "ms a step", 1000)


def resident_mib(name: str) -> float:
    """This process's resident memory: VmRSS what it holds now, VmHWM the most it has held."""
    # getrusage is the second choice: on Linux a child inherits the peak of the process that started it.
    found = re.search(rf"{name}:\s*(\d+) kB", read_text("/proc/self/status"))
    return int(found[1]) / 2**10 if found else peak_memory_mib()


def added_memory_mib(setting: Setting, variant: str) -> float:
    """The most that a step of the variant holds (on the CPU: the first ones, too) beyond what was held before."""
    on_gpu = setting.device.type == "cuda"
    gc.collect()
    if not on_gpu:
        with contextlib.suppress(OSError):  # no Linux: the peak of the process so far counts, too
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew at VmRSS
    before = torch.cuda.memory_allocated() / 2**20 if on_gpu else resident_mib("VmRSS")
    step = STEPS[variant](setting)
    for _ in range(WARM_UP):
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # cuDNN's search for fast kernels is over
    step()
    return (torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident_mib("VmHWM")) - before


def in_a_fresh_process(args: argparse.Namespace, variant: str) -> float:
    """added_memory_mib on the CPU, in a process that has done nothing else."""
    names = ("network", "dataset", "data_root", "image_size", "batch_size", "seed")
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--memory-of", variant, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory of {variant}: exit status {done.returncode}\n{done.stderr}")
    return float(done.stdout)


def memory(setting: Setting) -> Measured:
    on_gpu = setting.device.type == "cuda"
    peaks: Columns = {name: [] for name in STEPS}
    for _ in range(rounds_of("memory", setting.args)):
        for name, values in peaks.items():
            values.append(added_memory_mib(setting, name) if on_gpu else in_a_fresh_process(setting.args, name))
    where = "allocated on the GPU" if on_gpu else "resident, in a fresh process for every number"
    how = f"Peak memory of the steps of meta-step, {where}, less what was held before the network was built."
    return how, relative(peaks, "MiB")


def epoch(setting: Setting) -> Measured:
    total, rounds = setting.args.epoch_steps, rounds_of("epoch", setting.args)
    variants = {"plain SGD": plain_step(setting)}
    turns = {"plain SGD": total}
    for t_val, point in itertools.product((300, 1), ("lookahead", "average")):
        name = f"meta-training, T_val {t_val}, {point}"
        variants[name] = learned_step(setting, t_val, at_average=point == "average")
        turns[name] = min(total, MOST_META_STEPS) if t_val == 1 else total
    times = alternate(variants, rounds, setting.device, turns)
    rows = relative(times, "s an epoch", total)
    for name, row in rows.items():
        row["steps timed"] = [float(turns[name])] * rounds
    return f"An epoch is {total} steps: the mean of those that were timed, times {total}.", rows


def precision(setting: Setting) -> Measured:
    kinds = {
        "fp32, channels_last": (setting.task, torch.channels_last),
        "fp32, contiguous": (setting.task, torch.contiguous_format),
        "bf16 autocast, channels_last": (build_images(setting.args, setting.device, "bf16"), torch.channels_last),
    }
    variants: dict[str, Step] = {}
    for suffix in ("", ", compiled")[: 1 + setting.args.compile]:
        for name, (task, memory_format) in kinds.items():
            network = new_network(setting, memory_format)
            if memory_format == torch.contiguous_format:  # the task's batches are channels_last
                network.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
            if suffix:
                network.compile()
            variants[name + suffix] = plain_step(setting, network, task)
    times = alternate(variants, setting.args.rounds, setting.device)
    how = "Plain SGD steps; the contiguous one pays for a copy of every batch out of channels_last."
    return how, relative(times, "ms a step", 1000)


def pillow_batches(images: Tensor, statistics: Any, setting: Setting) -> Iterator[Tensor]:
    """Endless batches on the device by torchvision's transforms, image by image, in this process."""
    transform = transforms.Compose([
        transforms.RandomCrop(setting.args.image_size, padding=4), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(*statistics),
    ])
    stream = itertools.cycle([to_pil_image(image) for image in images])
    while True:
        batch = [transform(image) for image in itertools.islice(stream, setting.args.batch_size)]
        yield torch.stack(batch).to(setting.device)


def input_pipeline(setting: Setting) -> Measured:
    args, device = setting.args, setting.device
    data = IMAGES[args.dataset](args.data_root, args.image_size, args.seed)
    if not isinstance(data, ImageData):
        raise ValueError(f"--only input: {args.dataset} is read from disk as it trains; take a data set held decoded")
    task = ImageTask(replace(data, augment=True), seed=args.seed, batch_size=args.batch_size, device=device)
    images = data.train_images[: MOST_BATCHES * args.batch_size]
    variants = {
        "Pillow, image by image": partial(next, pillow_batches(images, data.statistics, setting)),
        "decoded tensor, batch by batch": partial(next, task.train_batches(0)),
    }
    times = alternate({**variants, "plain": plain_step(setting, task=task)}, args.rounds, device)
    rows = {
        name: {
            "ratio": quotients(times["Pillow, image by image"], times[name]),
            "images a second": [args.batch_size / value for value in times[name]],
            "% of a plain step": quotients(times[name], times["plain"], 100),
        } for name in variants
    }
    return "Batches cropped, flipped, normalised and on the device; the ratio is of the images a second.", rows


def overhead(setting: Setting) -> Measured:
    network, task, net = new_network(setting), setting.task, MLRSNet().to(setting.device)
    batches = itertools.cycle(list(itertools.islice(task.train_batches(0), min(MOST_BATCHES, task.steps_per_epoch))))
    optimizer = build_optimizer("sgd", network.parameters(), LR, 0.0, WEIGHT_DECAY)
    schedule = MetaMLRSNetLR(
        optimizer, net, network, MetaStream(task, network), **schedule_arguments(task, ENDLESS), t_val=ENDLESS
    )  # for its Adam and LSTM state
    loss = torch.tensor(math.log(task.num_classes), device=setting.device)

    def forward_and_backward() -> None:
        network.zero_grad()
        loss_of(task, next(batches), network).backward()

    def forward_of_net() -> None:
        with torch.no_grad():
            net(loss, schedule.state)

    def update_of_net() -> None:
        fraction, _ = net(loss, schedule.state)
        schedule.adam.zero_grad()
        fraction.backward()
        schedule.adam.step()

    bare = {"forward and backward": forward_and_backward}
    whole = {"plain step": plain_step(setting), "step driven by MLR-SNet": learned_step(setting, None)}
    own = {"one forward of MLR-SNet": forward_of_net, "one update of MLR-SNet": update_of_net}
    times = alternate({**bare, **whole, **own}, setting.args.rounds, setting.device)
    rows = {name: {"ms": [1000 * value for value in values]} for name, values in times.items()}
    for name in whole:
        inside = quotients(times["forward and backward"], times[name], 100)
        rows[name]["% outside forward and backward"] = [100 - value for value in inside]
    for name in own:
        rows[name]["% of a plain step"] = quotients(times[name], times["plain step"], 100)
    return (
        "The network's forward, loss and backward on batches that lie ready, against whole steps of the loop on the "
        "same ones. MLR-SNet's update is its forward, backward and Adam, without the network's part."
    ), rows


MEASUREMENTS: dict[str, Callable[[Setting], Measured]] = {
    "meta-step": meta_steps,
    "memory": memory,
    "epoch": epoch,
    "precision": precision,
    "input": input_pipeline,
    "overhead": overhead,
}

# ---------------------------------------------------------------------------------------------- the report


def cell(column: str, values: list[float] | None) -> str:
    """The median and, where the rounds differ, the quartiles."""
    if values is None:
        return "–"
    places = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = (
        format(value, ".2f" if column == "ratio" else ",.0f" if abs(value) >= 1000 else ".3g")
        for value in torch.tensor(values, dtype=torch.float64).quantile(places).tolist()
    )
    return median if low == high else f"{median} ({low} to {high})"


def render(folder: Path) -> None:
    """The page, from runs.jsonl and metrics.csv."""
    (header,) = read_jsonl(folder / "runs.jsonl")
    measurements: dict[str, Rows] = {}
    for row in read_csv(folder / "metrics.csv"):
        variants = measurements.setdefault(row["measurement"], {})
        variants.setdefault(row["variant"], {}).setdefault(row["column"], []).append(float(row["value"]))
    args = header["arguments"]
    body = [
        f"{args['network']} on {args['dataset']}, {args['image_size']} pixels, batch {args['batch_size']}, "
        f"{header['device']}. Median (quartiles) over the rounds, in which the variants take turns; ratios are taken "
        "round by round.", "",
    ]
    for name, numbers in measurements.items():
        columns = list(dict.fromkeys(column for row in numbers.values() for column in row))
        table = [[variant, *(cell(column, row.get(column)) for column in columns)] for variant, row in numbers.items()]
        body += [f"## {name}", "", header["how"][name], "", *markdown([["variant", *columns], *table])]
    title, question = "What the method costs", "What does a meta step cost beside a plain step, in time and memory?"
    write_page(folder, title, question, header["command"], body, [header])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    positive = number(int, 1)
    downloads = SCRIPT.parents[2] / "data" / "downloads"
    classifiers = [name for name in IMAGE_NETWORKS if name != "denoiser"]
    add("--network", choices=classifiers, default="resnet", help="(default: resnet, which is ResNet-18)")
    add("--dataset", choices=IMAGES, default="digits", help="(default: digits, which needs no download)")
    add("--image-size", type=positive, default=32, help="resize to this many pixels (default: 32)")
    add("--data-root", type=Path, default=downloads, help="where the data lies or is downloaded to")
    add("--batch-size", type=positive, default=128, help="images a step (default: 128)")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add("--rounds", type=positive, default=10,
        help="turns of every variant; memory and epoch take at most 3 (default: 10)")
    add("--epoch-steps", type=positive, default=300,
        help="steps of the epochs that are compared; a multiple of 300 holds all of its meta steps (default: 300)")
    add("--compile", action="store_true", help="measure the precisions compiled, too")
    add("--only", nargs="+", choices=MEASUREMENTS, metavar="NAME",
        help=f"some of {', '.join(MEASUREMENTS)} (default: all)")
    add("--out", type=Path, default=SCRIPT.parents[1] / "result" / "benchmark",
        help="folder of the result (default: result/benchmark beside the studies)")
    add("--seed", type=number(int, 0), default=0, help="seed of the weights and of the data order (default: 0)")
    add("--memory-of", choices=STEPS, help=argparse.SUPPRESS)  # what a fresh process is asked for
    args = parser.parse_args(argv)
    args.only = list(dict.fromkeys(args.only or MEASUREMENTS))
    return args


def measure(setting: Setting, header: dict[str, Any]) -> None:
    """Take every measurement that is asked for; all files are written anew after each."""
    args, rows = setting.args, []
    header |= {"device": setting.device.type, "how": {}}
    for name in args.only:
        print(f"measuring {name}", file=sys.stderr)
        how, numbers = MEASUREMENTS[name](setting)
        header["how"][name] = f"{how} Rounds: {rounds_of(name, args)}."
        for variant, columns in numbers.items():
            for column, values in columns.items():
                for place, value in enumerate(values, 1):
                    rows.append(dict(zip(METRICS, (name, variant, column, place, value), strict=True)))
        write_jsonl(args.out / "runs.jsonl", [header])
        write_csv(args.out / "metrics.csv", METRICS, rows)
        render(args.out)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with user_errors(args):
        device = pick_device(args.device)
        choose_algorithms(deterministic=False)
        setting = Setting(args, device, build_images(args, device))
        if args.memory_of:
            print(added_memory_mib(setting, args.memory_of))
            return 0
        args.out.mkdir(parents=True, exist_ok=True)
        measure(setting, study_header("benchmark", args, argv))
        print((args.out / "README.md").read_text("utf-8"))
    return 0


if __name__ == "__main__":
    show_safely()
    sys.exit(main())
