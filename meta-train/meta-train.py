"""Learn an MLR-SNet while training a network under it."""

import argparse
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).resolve()
sys.path.insert(0, str(SCRIPT.parents[1]))

from data import DATASETS, build_task  # noqa: E402
from mlr_snet import MetaMLRSNetLR, MLRSNet, train  # noqa: E402
from models import NETWORKS, build_network  # noqa: E402
from utils import (  # noqa: E402
    Run,
    add_run_arguments,
    autocast,
    build_optimizer,
    number,
    number_or_auto,
    parse_run_arguments,
    pick_device,
    save,
    user_errors,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="resnet", help="(default: resnet, which is ResNet-18)")
    add("--dataset", choices=DATASETS, default="cifar10", help="(default: cifar10)")
    add("--lr", type=number(float, 0, above=True), default=1e-3, help="of Adam on MLR-SNet (default: 1e-3)")
    add("--t-val", "--t_val", type=number_or_auto(number(int, 1)), default=300,
        help="steps between updates of MLR-SNet; auto makes about 80 updates in the run (default: 300)")
    add("--num-meta", type=number(int, 1), default=1000, help="images that steer MLR-SNet (default: 1000)")
    add("--hidden-size", "--hidden_size", type=number(int, 2), default=50, help="of MLR-SNet (default: 50)")
    add("--num-layers", "--num_layers", type=number(int, 1), default=1, help="of MLR-SNet (default: 1)")
    add_run_arguments(parser)
    return parse_run_arguments(parser, SCRIPT, argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with user_errors():
        device = pick_device(args.device)
        task = build_task(
            args.dataset, args.data_root, image_size=args.image_size, seed=args.seed, batch_size=args.batch_size,
            num_meta=args.num_meta, limit_train=args.limit_train, limit_test=args.limit_test, device=device,
            autocast=autocast(device, args.precision),
        )
        torch.manual_seed(args.seed)
        network = build_network(args.network, task.num_classes).to(device).to(memory_format=torch.channels_last)
        net = MLRSNet(args.hidden_size, args.num_layers).to(device)
        if args.compile:
            network.compile()
        optimizer = build_optimizer(args.optimizer, network.parameters(), 1.0, args.momentum, args.wd)
        t_val = max(1, args.num_epoch * task.steps_per_epoch // 80) if args.t_val == "auto" else args.t_val
        schedule = MetaMLRSNetLR(optimizer, net, network, task, args.num_epoch, t_val, args.lr, gamma=args.gamma)
        run = Run(args, {"network": network, "optimizer": optimizer, "schedule": schedule}, task.steps_per_epoch)
    return run.follow(
        train(network, task, optimizer, schedule, args.num_epoch, run.step, run.carry),
        lambda loss, accuracy: task.train_metrics(loss, accuracy) | task.evaluate(network),
        lambda epoch: save(args.out / f"mlr_snet_{epoch}.pth", {k: v.cpu() for k, v in net.state_dict().items()}),
    )


if __name__ == "__main__":
    sys.exit(main())
