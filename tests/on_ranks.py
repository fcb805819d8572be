"""What test_distributed.py starts under torchrun or alone: the loop in double precision, its ends in a file per rank.

    on_ranks.py FOLDER

The weights are written out, so that nothing here depends on a random stream; run_on_ranks.py tests the scripts'.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from baselines import build_baseline
from data import build_task
from data.meta_stream import MetaStream, schedule_arguments
from data.text import TextData, TextTask
from mlr_snet import MetaMLRSNetLR, MLRSNet, train
from models import build_network
from utils import build_optimizer, data_parallel, gather_hidden, init_distributed, rank, world_size

CPU = torch.device("cpu")


class Double(nn.Module):
    """A network without BatchNorm that takes single precision and computes in double."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 10)).double()

    def forward(self, images):
        return self.layers(images.double())


@torch.no_grad()
def filled(network):
    """The network with weights that wave between −0.3 and 0.3."""
    for parameter in network.parameters():
        parameter.copy_(0.3 * torch.arange(parameter.numel()).double().mul(1.7).sin().view_as(parameter))
    return network


def images(**options):
    # 61 images in batches of 20: the last batch has a single one, for two ranks
    sizes = {"batch_size": 20, "num_meta": 31, "limit_train": 61, "limit_test": 41}
    task = build_task("digits", Path(), device=CPU, **sizes, **options)
    task.train.augment = True
    return task, filled(Double())


def micro_batches():
    return images(accumulate=3)  # of 7, 7 and 6 images, or on two ranks of 4, 3 and 3


def angles():
    task, _ = images(predict="angle")
    network = Double()
    network.layers[-1] = nn.Linear(36, 1).double()
    return task, filled(network)


def text():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(9, (number,), generator=generator) for number in (200, 90, 98)]
    task = TextTask(TextData(*ids, list("abcdefghi")), batch_size=3, seq_len=7, device=CPU, evaluation_columns=3)
    return task, filled(build_network("lstm2", 9, embed_size=6, dropout=0.0).double())


def end_of(make, schedule_name):
    """Three epochs: the rates, the weights, θ, and the test metrics."""
    task, network = make()
    net = filled(MLRSNet(6).double())
    if schedule_name in ("lookahead", "average"):
        optimizer = build_optimizer("sgd", network.parameters(), 1.0, 0.5, 0.01)
        schedule = MetaMLRSNetLR(
            optimizer, net, network, MetaStream(task, network), **schedule_arguments(task, 3), t_val=1, lr=0.01,
            gamma="paper" if task.num_classes else 0.3, meta_point=schedule_name,
            average_decay=0.9 if schedule_name == "average" else None,
        )
    else:
        optimizer, schedule = build_baseline(
            schedule_name, "sgd", network, task, 3, 0.1, meta_loss=MetaStream(task, network)
        )
    steps = list(train(data_parallel(network), task, optimizer, schedule, 3))
    hidden = gather_hidden(steps[-1].hidden)
    return {
        "numbers": torch.tensor([[step.lr, step.loss, step.accuracy] for step in steps], dtype=torch.float64),
        "weights": torch.cat([parameter.detach().flatten() for parameter in network.parameters()]),
        "theta": torch.cat([parameter.detach().flatten() for parameter in net.parameters()]),
        "metrics": torch.tensor(list(task.evaluate(network).values()), dtype=torch.float64),
        "hidden": torch.cat([state.flatten() for state in hidden]) if hidden else torch.zeros(1),
    }


RUNS = {
    images: ("lookahead", "average", "hd", "l4mom", "rtho"), text: ("lookahead", "average", "rtho", "val"),
    micro_batches: ("lookahead", "rtho"), angles: ("average",),
}

if __name__ == "__main__":
    init_distributed(CPU)
    ends = {}
    for make, schedule_names in RUNS.items():
        for schedule_name in schedule_names:
            ends[f"{schedule_name} {make.__name__}"] = end_of(make, schedule_name)
    torch.save(ends, Path(sys.argv[1]) / f"{rank()}_of_{world_size()}.pth")
