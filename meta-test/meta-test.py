"""Train a network under learned schedules, or under a baseline."""

import argparse
import sys
from functools import partial
from pathlib import Path

SCRIPT = Path(__file__).resolve()
sys.path.insert(0, str(SCRIPT.parents[1]))

from baselines import SCHEDULES, Baseline, build_baseline, default_beta
from data import IMAGES, TEXTS
from data.meta_stream import MetaStream, epoch_changes, schedule_arguments
from mlr_snet import SHIPPED, MLRSNetLR, Schedule, load_schedules
from training.arguments import (
    FILES,
    add_run_arguments,
    add_scale,
    add_task_arguments,
    net_files,
    parse_run_arguments,
)
from training.building import network_of, start, task_of
from training.command_line import Parser, number, number_or, show_safely, user_errors
from training.measuring import chosen_gamma, measure
from training.trainer import Trainer
from utils import build_optimizer

EXAMPLES = """\
  python meta-test/meta-test.py --network resnet20 --dataset digits --num-meta 200 --num-epoch 20 \\
    --nets meta-train/result/resnet8_digits
  python meta-test/meta-test.py --network shufflenetv2 --dataset cifar10 --schedule cosine --lr 0.5"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, EXAMPLES, FILES)
    add_task_arguments(parser, network="shufflenetv2")
    add = parser.add_argument_group("schedule").add_argument
    add("--schedule", choices=["mlr-snet", *SCHEDULES], default="mlr-snet", metavar="NAME",
        help=f"mlr-snet, or a baseline: {', '.join(SCHEDULES)} (default: mlr-snet)")
    add("--nets", type=lambda text: text if text in SHIPPED else Path(text), nargs="+", default=["paper"],
        metavar="FILE", help="learned schedules that share the run in turn, the folder of a meta-train run, or shipped "
        f"ones: {', '.join(SHIPPED)} (default: paper)")
    add_scale(add)
    with_beta = " and ".join(name for name, baseline in SCHEDULES.items() if baseline.has_beta)
    add("--lr", type=number_or(number(float, 0, above=True), "measured"), metavar="LR",
        help=f"initial or peak rate of a baseline; measured finds it as for --gamma (default: {_usual_rates()})")
    add("--beta", type=number(float, 0, above=True), metavar="BETA",
        help=f"step of {with_beta} on the rate (default: {default_beta('sgd'):g}; others {default_beta('adam'):g})")
    add_run_arguments(parser)
    args, given = parse_run_arguments(parser, SCRIPT, argv, "shufflenetv2")
    _check_schedule(parser, args, given)
    return args


def _check_schedule(parser: Parser, args: argparse.Namespace, given: set[str]) -> None:
    """Refuse what does not go together with --schedule."""
    schedule, baseline = f"--schedule {args.schedule}", SCHEDULES.get(args.schedule)
    if args.lr is not None and (baseline is None or baseline.rate == "none"):
        parser.error(f"{schedule} has no initial rate; leave --lr out")
    if args.beta is not None and (baseline is None or not baseline.has_beta):
        parser.error(f"{schedule} has no --beta; leave it out")
    if baseline is None:
        return
    for flag in ("gamma", "nets", "warmup", "cooldown"):
        if flag in given:
            parser.error(f"--{flag} belongs to --schedule mlr-snet; leave it out with {args.schedule}")
    if args.lr == "measured" and baseline.rate == "factor":
        parser.error(f"{schedule} finds its rate itself, and --lr multiplies it; leave it out")
    if baseline.needs_validation and args.dataset in IMAGES and not args.num_meta:
        parser.error(f"{schedule} needs images to validate on; set some aside with --num-meta 1000")
    if args.optimizer not in baseline.usual_lr:
        parser.error(f"{schedule} works with --optimizer {' or '.join(baseline.usual_lr)}, not {args.optimizer}")
    if baseline.for_text and args.optimizer == "sgd" and args.lr is None and args.dataset not in TEXTS:
        parser.error(f"{schedule} has a usual rate of SGD for language models only; give --lr")
    if baseline.second_order and args.compile:
        parser.error(f"{schedule} differentiates twice, which torch.compile cannot; leave --compile out")
    if baseline.own_direction and args.momentum:
        parser.error(f"{schedule} brings its own direction; use --momentum 0")


def _usual_rates() -> str:
    """The usual rates of most baselines, then where the others differ."""
    usual = Baseline.usual_lr
    texts = [", ".join(f"{optimizer} {lr:g}" for optimizer, lr in usual.items())]
    for name, baseline in SCHEDULES.items():
        own = [f"{optimizer} {lr:g}" for optimizer, lr in baseline.usual_lr.items() if lr != usual[optimizer]]
        if baseline.rate == "factor":
            own = [f"{max(baseline.usual_lr.values()):g}, a factor"]
        if own:
            texts.append(f"{name} {', '.join(own)}")
    return "; ".join(texts)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with user_errors(args):
        nets = load_schedules(net_files(args.nets)) if args.schedule == "mlr-snet" else []
        device = start(args)
        task = task_of(args, device)
        network = network_of(args, task, device)
        meta_stream = MetaStream(task, network)
        schedule: Schedule
        measurement = None
        optimizer = build_optimizer(args.optimizer, network.parameters(), 1.0, args.momentum, args.wd)
        if args.schedule == "mlr-snet":
            nets = [net.to(device) for net in nets]
            gamma, measurement = chosen_gamma(args, task, network, optimizer)
            schedule = MLRSNetLR(
                optimizer, nets, **schedule_arguments(task, args.num_epoch), gamma=gamma, warmup=args.warmup,
                cooldown=args.cooldown, changes=epoch_changes(task, args.num_epoch, len(nets)),
                scale_loss=partial(task.scale_loss, network),
            )
        else:
            lr = args.lr
            if lr == "measured":
                measurement = measure(args, task, network, optimizer)
                lr = measurement.result.scale
            optimizer, schedule = build_baseline(
                args.schedule, args.optimizer, network, task, args.num_epoch, lr, args.momentum, args.wd,
                args.beta, meta_stream,
            )
        trainer = Trainer(args, task, network, optimizer, schedule, meta_stream, measurement)
    return trainer.run()


if __name__ == "__main__":
    show_safely()
    sys.exit(main())
