"""Train a network under learned schedules, or under a baseline."""

import argparse
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve()
sys.path.insert(0, str(SCRIPT.parents[1]))

from baselines import SCHEDULES, Val  # noqa: E402
from data import DATASETS, IMAGES  # noqa: E402
from experiment import add_run_arguments, build, parse_run_arguments  # noqa: E402
from mlr_snet import SHIPPED, MLRSNetLR, Schedule, load_schedules, train  # noqa: E402
from models import NETWORKS  # noqa: E402
from utils import Run, number, user_errors  # noqa: E402


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="shufflenetv2", help="(default: shufflenetv2)")
    add("--dataset", choices=DATASETS, default="cifar10", help="(default: cifar10)")
    add("--schedule", choices=["mlr-snet", *SCHEDULES], default="mlr-snet", help="(default: mlr-snet)")
    add("--nets", type=Path, nargs="+", default=SHIPPED, metavar="FILE",
        help="learned schedules that share the run in turn, or one folder of a meta-train run (default: the three "
        "that lie beside this script)")
    add("--lr", type=number(float, 0, above=True), default=0.1, help="initial rate of a baseline (default: 0.1)")
    add_run_arguments(parser)
    args = parse_run_arguments(parser, SCRIPT, argv)
    if args.schedule == "val" and args.dataset in IMAGES and not args.num_meta:
        parser.error("--schedule val needs images to validate on; set some aside with --num-meta 1000")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with user_errors():
        nets = load_schedules(args.nets) if args.schedule == "mlr-snet" else []
        task, network, optimizer = build(args, args.lr)
        timing = (args.num_epoch, task.steps_per_epoch)
        schedule: Schedule
        if args.schedule == "mlr-snet":
            nets = [net.to(next(network.parameters()).device) for net in nets]
            schedule = MLRSNetLR(optimizer, nets, task.num_classes, *timing, args.gamma, task.perplexity)
        elif args.schedule == "val":
            schedule = Val(optimizer, *timing, validate=lambda: task.validate(network))
        else:
            schedule = SCHEDULES[args.schedule](optimizer, *timing)
        run = Run(args, {"network": network, "optimizer": optimizer, "schedule": schedule}, task.steps_per_epoch)
    return run.follow(
        train(network, task, optimizer, schedule, args.num_epoch, run.step, run.carry),
        lambda loss, accuracy: task.train_metrics(loss, accuracy) | task.evaluate(network),
    )


if __name__ == "__main__":
    sys.exit(main())
