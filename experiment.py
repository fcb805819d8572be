"""What meta-train and meta-test have in common: their flags, the task and network that these ask for, and the run."""

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from averaging import Average, auto_decay
from data import STREAMED, TEXTS, build_task
from data.images import ImageTask
from data.meta_stream import MetaStream
from data.text import TextTask
from distributed import data_parallel, rank
from mlr_snet import Schedule, train
from models import IMAGE_NETWORKS, LANGUAGE_MODELS, build_network
from utils import ROOT, Run, autocast, number, number_or_auto, pick_device, plain, save, user_errors

# The flags whose defaults depend on the modality; a flag of the other modality alone is refused.
IMAGE_DEFAULTS = {"num_epoch": 200, "batch_size": 128, "wd": 5e-4, "num_meta": 0, "image_size": None, "workers": None}
IMAGENET_DEFAULTS = {"num_epoch": 90}
TEXT_DEFAULTS = {"num_epoch": 150, "batch_size": 32, "wd": 5e-6, "seq_len": 35, "tokens": "word", "embed_size": 512,
                 "dropout": 0.5}


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that meta-train and meta-test share."""
    add = parser.add_argument
    positive = number(int, 1)
    add("--num-epoch", "--max_epoch", dest="num_epoch", type=positive,
        help="epochs (default: 200; imagenet: 90; text: 150)")
    add("--batch-size", "--batch_size", type=positive,
        help="images or sequences a step, those of all ranks together (default: 128; text: 32)")
    add("--optimizer", "--optim", choices=["sgd", "adam", "adamw"], default="sgd", help="of the network (default: sgd)")
    add("--momentum", type=number(float, 0, 1), default=0.0, help="of SGD (default: 0)")
    add("--wd", type=number(float, 0), help="weight decay of the network (default: 5e-4; text: 5e-6)")
    add("--gamma", type=number_or_auto(number(float, 0, above=True)), default="auto",
        help="LR scale, the largest rate MLR-SNet can give; for adam a number near 1e-3 is wise (default: auto)")
    add("--data-root", type=Path, default=ROOT / "data" / "downloads", help="where the data lies or is downloaded to")
    add("--limit-train", type=positive, metavar="N",
        help="train on N class-balanced images, or on the first N tokens (default: all)")
    add("--limit-test", type=positive, metavar="N",
        help="test on N class-balanced images, or on the first N tokens (default: all)")
    add("--out", type=Path, help="the run's folder (default: result/<network>_<dataset> beside the script)")
    add("--seed", type=number(int, 0), default=0, help="of weights, data order and meta set (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda or another that torch names (default: auto: cuda or cpu)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the network's forward pass (default: fp32)")
    add("--average", action="store_true", help="evaluate and save a running average of the weights, too")
    add("--average-decay", type=number_or_auto(number(float, 0, 0.9999999)),
        help="of the running average, per step (default: auto, which reaches back about an epoch, 0.9 to 0.999)")
    add("--init", type=Path, metavar="FILE", help="begin from a run's network.pth (default: random weights)")
    add("--deterministic", action="store_true", help="use only algorithms that torch holds to be deterministic")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--resume", action="store_true", help="continue the run that lies in --out, with its own arguments")
    images = parser.add_argument_group("images")
    images.add_argument("--num-meta", type=positive,
                        help="training images held out to steer MLR-SNet or to validate (default: 1000; meta-test: 0)")
    images.add_argument("--image-size", type=positive,
                        help="resize to this many pixels (default: folder 32, tinyimagenet 64, imagenet 224)")
    images.add_argument("--workers", type=number(int, 0),
                        help="processes that read tinyimagenet or imagenet from disk (default: one a core, at most 8)")
    text = parser.add_argument_group("text")
    text.add_argument("--seq-len", "--seq_len", type=positive, help="tokens of a sequence (default: 35)")
    text.add_argument("--tokens", choices=["word", "char"], help="what the text is cut into (default: word)")
    text.add_argument("--embed-size", "--embed_size", type=positive,
                      help="width of the language model's embedding and LSTM layers (default: 512)")
    text.add_argument("--dropout", type=number(float, 0, 1), help="of the language model (default: 0.5)")


def parse_run_arguments(
    parser: argparse.ArgumentParser, script: Path, argv: list[str] | None, **defaults: Any
) -> argparse.Namespace:
    """Parse, settle --out and the defaults, and on --resume bring back the run's own arguments, refusing others.

    `defaults` are the script's own for flags of the images.
    """
    args = parser.parse_args(argv)
    args.out = args.out or script.parent / "result" / f"{args.network}_{args.dataset}"
    args.out = args.out.absolute()
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file; give a folder")
    record = args.out / "args.json"
    if not args.resume:
        if record.exists():
            parser.error(f"--out {args.out} holds another run; continue it with --resume or give another --out")
        _settle(parser, args, defaults)
        return args
    try:
        stored = json.loads(record.read_text())["arguments"]
    except (OSError, ValueError, KeyError):
        parser.error(f"--resume: no run in {args.out} (no readable args.json)")
    given = {key: plain(value) for key, value in vars(args).items() if value != parser.get_default(key)}
    for key, value in given.items():
        if key not in ("resume", "out") and stored.get(key) != value:
            flag = key.replace("_", "-")
            parser.error(f"--resume continues with the run's own --{flag} {stored.get(key)}; leave --{flag} out")
    for key, value in stored.items():
        if key not in ("resume", "out"):
            setattr(args, key, Path(value) if key == "data_root" else value)
    return args


def _settle(parser: argparse.ArgumentParser, args: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Give the flags that were left out the defaults of the modality; refuse what does not fit it."""
    is_text = args.dataset in TEXTS
    fitting = LANGUAGE_MODELS if is_text else IMAGE_NETWORKS
    if args.network not in fitting:
        kind = "text" if is_text else "images"
        parser.error(f"--network {args.network} is not for {kind}; for {args.dataset} choose from {', '.join(fitting)}")
    if not args.average and getattr(args, "meta_point", "lookahead") == "lookahead" and args.average_decay is not None:
        parser.error("--average-decay belongs to --average or --meta-point average; leave it out")
    args.average_decay = args.average_decay or "auto"
    own, other = (TEXT_DEFAULTS, IMAGE_DEFAULTS) if is_text else (IMAGE_DEFAULTS | defaults, TEXT_DEFAULTS)
    if args.dataset == "imagenet":
        own = own | IMAGENET_DEFAULTS
    if args.workers is not None and args.dataset not in STREAMED:
        parser.error(f"--workers is for {' and '.join(STREAMED)}; {args.dataset} lies in memory, leave it out")
    for name in other.keys() - own.keys():
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} does not apply to --dataset {args.dataset}; leave it out")
    for name, default in own.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def build(args: argparse.Namespace) -> tuple[ImageTask | TextTask, nn.Module]:
    """The task, and the network on its device. ValueError for what cannot be had."""
    device = pick_device(args.device, args.deterministic)
    names = ("seq_len", "tokens") if args.dataset in TEXTS else ("seed", "num_meta", "image_size", "workers")
    task = build_task(
        args.dataset, args.data_root, batch_size=args.batch_size, limit_train=args.limit_train,
        limit_test=args.limit_test, device=device, autocast=autocast(device, args.precision),
        **{name: getattr(args, name) for name in names},
    )
    sizes = {"embed_size": args.embed_size, "dropout": args.dropout} if args.dataset in TEXTS else {}
    torch.manual_seed(args.seed)
    network = build_network(args.network, task.num_classes, **sizes).to(device).to(memory_format=torch.channels_last)
    if args.init and not args.resume:
        try:
            network.load_state_dict(torch.load(args.init, map_location="cpu", weights_only=True))
        except Exception as error:  # a foreign file fails in many ways; each ends in this one line
            raise ValueError(f"--init {args.init}: no weights of this network ({type(error).__name__})") from error
    if args.compile:
        network.compile()
    return task, network


def build_average(args: argparse.Namespace, network: nn.Module, steps_per_epoch: int) -> Average | None:
    """The running average of the weights, where the run asks for one."""
    if not args.average and getattr(args, "meta_point", "lookahead") == "lookahead":
        return None
    return Average(network, auto_decay(steps_per_epoch) if args.average_decay == "auto" else args.average_decay)


def carry_out(
    args: argparse.Namespace,
    task: ImageTask | TextTask,
    network: nn.Module,
    optimizer: Optimizer,
    schedule: Schedule,
    average: Average | None,
    meta_stream: MetaStream,
    at_epoch: Callable[[int], None] = lambda epoch: None,
    evaluating: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> int:
    """Train to the end, under --resume from where the run stopped, and save the networks; return the exit status.

    at_epoch is called with the number of every epoch that has ended; evaluating gives a context for each evaluation.
    """
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule, "meta_stream": meta_stream}
    with user_errors():
        run = Run(args, parts | ({"average": average} if average else {}), task.steps_per_epoch)

    if rank() and not run.step:
        torch.manual_seed(args.seed + rank())  # dropout masks of its own; networks and nets are drawn by now
    steps = train(data_parallel(network), task, optimizer, schedule, args.num_epoch, run.step, run.hidden)
    if average:
        steps = average.following(steps)

    def metrics(loss: float, accuracy: float) -> dict[str, float]:
        with evaluating():
            row = task.train_metrics(loss, accuracy) | task.evaluate(network)
            if average and args.average:
                name = "test_ppl" if task.perplexity else "test_acc"
                with average.swapped_in(task):
                    row[f"{name}_average"] = task.evaluate(network)[name]
        return row

    status = run.follow(steps, metrics, at_epoch)
    if status == 0:
        with evaluating():
            save(args.out / "network.pth", network.state_dict())
            if average and args.average:
                with average.swapped_in(task):
                    save(args.out / "network_average.pth", network.state_dict())
    return status
