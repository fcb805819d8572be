"""What test_sharded.py starts under torchrun: schedules on FSDP2's sharded networks, and independent runs side by side.

    sharded_on_ranks.py FOLDER
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR
from mlr_snet_optim.ranks import all_reduce_mean
from mlr_snet_scale import measure_lr_scale
from utils import disconnect

KINDS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1.0),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1.0),  # by trial steps
}


def build(is_sharded):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    if is_sharded:
        for part in (network[0], network[2], network):
            fully_shard(part)
    return network


def losses_of(network):
    """The training loss and a meta loss of this rank's half of sixteen points."""
    points = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
    points, labels = points[own], (torch.arange(16) % 3)[own]
    return lambda: cross_entropy(network(points), labels), lambda: cross_entropy(network(points.flip(1)), labels)


def learned(kind, meta_point, is_sharded):
    """θ and the last rate after twelve steps."""
    network = build(is_sharded)
    train_loss, meta_loss = losses_of(network)
    optimizer = KINDS[kind](network.parameters())
    torch.manual_seed(1)
    net = MLRSNet(6).double()
    schedule = MetaMLRSNetLR(
        optimizer, net, network, meta_loss, 12, gamma=0.1, t_val=2, meta_point=meta_point,
        average_decay=0.9 if meta_point == "average" else None,
    )
    for _ in range(12):
        optimizer.zero_grad()
        loss = train_loss()
        loss.backward()
        if not is_sharded:
            for parameter in network.parameters():
                parameter.grad = all_reduce_mean(parameter.grad)
        schedule.step(loss)
        optimizer.step()
    theta = [parameter.detach().flatten() for parameter in net.parameters()]
    return torch.cat([torch.tensor(schedule.get_last_lr()), *theta])


def measured(is_sharded):
    network = build(is_sharded)
    train_loss, _ = losses_of(network)
    if not is_sharded:
        for parameter in network.parameters():
            parameter.register_hook(all_reduce_mean)
    return torch.tensor([measure_lr_scale(network, KINDS["SGD"](network.parameters()), train_loss, 100).scale])


def independent():
    """γ of a run of this rank's own, and of the runs of both: by its loss, by scale_loss, given and measured."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    level = 2.0 + dist.get_rank()
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    gammas = []
    for group in (groups[dist.get_rank()], None):
        measured = measure_lr_scale(
            nn.ParameterList([weight]), optimizer, lambda: 10 ** (level - 3) * (weight - 1).square().sum(), 100,
            process_group=group,
        )
        for options in ({}, {"scale_loss": lambda: level}, {"gamma": lambda: level}, {"gamma": measured.gamma}):
            schedule = MLRSNetLR(optimizer, "paper", 6, num_classes=10, process_group=group, **options)
            schedule.step(level)
            gammas.append(schedule.gamma)
    return torch.tensor(gammas)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    ends = {"independent": independent()}
    for is_sharded in (False, True):
        ends[f"measured {is_sharded}"] = measured(is_sharded)
        for kind in KINDS:
            for meta_point in ("lookahead", "average"):
                ends[f"{kind} {meta_point} {is_sharded}"] = learned(kind, meta_point, is_sharded)
    torch.save(ends, Path(sys.argv[1]) / f"{dist.get_rank()}.pth")
    disconnect()
