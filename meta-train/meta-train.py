"""Learn an MLR-SNet while training a network under it."""

import argparse
import sys
from functools import partial
from pathlib import Path

SCRIPT = Path(__file__).resolve()
sys.path.insert(0, str(SCRIPT.parents[1]))

from data.meta_stream import MetaStream, schedule_arguments
from mlr_snet import MetaMLRSNetLR, MLRSNet, steps_between_updates
from training.arguments import FILES, add_run_arguments, add_scale, add_task_arguments, parse_run_arguments
from training.building import network_of, start, task_of
from training.command_line import Parser, number, number_or, show_safely, user_errors
from training.measuring import chosen_gamma
from training.trainer import Trainer
from utils import build_optimizer, built_within_memory, save

EXAMPLES = """\
  python meta-train/meta-train.py --network resnet8 --dataset digits --num-meta 200 \\
    --num-epoch 20 --t-val auto
  python meta-train/meta-train.py --network lstm2 --dataset ptb"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__, EXAMPLES, FILES)
    add_task_arguments(parser, network="resnet")
    add = parser.add_argument_group("schedule").add_argument
    add("--lr", type=number(float, 0, above=True), default=1e-3, metavar="LR",
        help="rate of Adam on MLR-SNet (default: 1e-3)")
    add("--t-val", "--t_val", type=number_or(number(int, 1), "auto"), default=300, metavar="N",
        help="steps between updates of MLR-SNet, or auto: about 80 in the run (default: 300)")
    add("--meta-point", choices=["lookahead", "average"], default="lookahead", metavar="POINT",
        help="where the meta gradient is taken: lookahead (one step ahead) or average (at the running average of the "
        "weights) (default: lookahead)")
    add_scale(add)
    add("--hidden-size", type=number(int, 2, 2**20), default=50, metavar="N",
        help="hidden size of MLR-SNet (default: 50)")
    add("--num-layers", type=number(int, 1, 100), default=1, metavar="N", help="layers of MLR-SNet (default: 1)")
    add_run_arguments(parser)
    args, _ = parse_run_arguments(parser, SCRIPT, argv, "resnet", num_meta=1000)
    if args.num_meta == 0:
        parser.error("--num-meta 0: MLR-SNet learns on held-out images; give at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with user_errors(args):
        device = start(args)
        task = task_of(args, device)
        network = network_of(args, task, device)
        form = "text" if task.perplexity else "images"
        net = built_within_memory(partial(MLRSNet, args.hidden_size, args.num_layers, form), "MLR-SNet")
        net = net.to(device)
        optimizer = build_optimizer(args.optimizer, network.parameters(), 1.0, args.momentum, args.wd)
        meta_stream = MetaStream(task, network)
        options = schedule_arguments(task, args.num_epoch)
        t_val = steps_between_updates(None if args.t_val == "auto" else args.t_val, options["num_steps"])
        gamma, measurement = chosen_gamma(args, task, network, optimizer)  # may take minutes
        schedule = MetaMLRSNetLR(
            optimizer, net, network, meta_stream, **options, gamma=gamma,
            scale_loss=partial(task.scale_loss, network), warmup=args.warmup, cooldown=args.cooldown,
            t_val=t_val, lr=args.lr, meta_point=args.meta_point,
            average_decay=args.average_decay if args.meta_point == "average" and args.average_decay != "auto" else None,
        )

        def save_net(epoch: int) -> None:
            save(args.out / f"mlr_snet_{epoch}.pth", {name: value.cpu() for name, value in net.state_dict().items()})

        trainer = Trainer(args, task, network, optimizer, schedule, meta_stream, measurement, save_net)
    return trainer.run()


if __name__ == "__main__":
    show_safely()
    sys.exit(main())
