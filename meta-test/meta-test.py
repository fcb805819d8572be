"""Train a network under learned schedules, or under a baseline."""

import argparse
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).resolve()
sys.path.insert(0, str(SCRIPT.parents[1]))

from baselines import SCHEDULES  # noqa: E402
from data import DATASETS, build_task  # noqa: E402
from mlr_snet import SHIPPED, MLRSNetLR, Schedule, load_schedules, train  # noqa: E402
from models import NETWORKS, build_network  # noqa: E402
from utils import (  # noqa: E402
    Run,
    add_run_arguments,
    autocast,
    build_optimizer,
    number,
    parse_run_arguments,
    pick_device,
    user_errors,
)


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
    return parse_run_arguments(parser, SCRIPT, argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with user_errors():
        device = pick_device(args.device)
        nets = load_schedules(args.nets) if args.schedule == "mlr-snet" else []
        task = build_task(
            args.dataset, args.data_root, image_size=args.image_size, seed=args.seed, batch_size=args.batch_size,
            limit_train=args.limit_train, limit_test=args.limit_test, device=device,
            autocast=autocast(device, args.precision),
        )
        torch.manual_seed(args.seed)
        network = build_network(args.network, task.num_classes).to(device).to(memory_format=torch.channels_last)
        if args.compile:
            network.compile()
        optimizer = build_optimizer(args.optimizer, network.parameters(), args.lr, args.momentum, args.wd)
        schedule: Schedule
        if args.schedule == "mlr-snet":
            nets = [net.to(device) for net in nets]
            schedule = MLRSNetLR(optimizer, nets, task.num_classes, args.num_epoch, task.steps_per_epoch, args.gamma)
        else:
            schedule = SCHEDULES[args.schedule](optimizer, args.num_epoch, task.steps_per_epoch)
        run = Run(args, {"network": network, "optimizer": optimizer, "schedule": schedule}, task.steps_per_epoch)
    return run.follow(
        train(network, task, optimizer, schedule, args.num_epoch, run.step, run.carry),
        lambda loss, accuracy: task.train_metrics(loss, accuracy) | task.evaluate(network),
    )


if __name__ == "__main__":
    sys.exit(main())
