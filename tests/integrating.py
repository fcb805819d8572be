"""What the tests of the integrations share: a small problem, schedules, and the oracle, a plain loop.

Every run has two epochs of six steps, of two micro-batches each, with clipping.
"""

import copy
import functools
import re
import sys
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, load_schedules
from mlr_snet_scale import measure_lr_scale

INTEGRATIONS = Path(__file__).resolve().parents[1] / "integrations"
sys.path.insert(0, str(INTEGRATIONS))

NUM_EPOCHS, STEPS_PER_EPOCH, ACCUMULATION, CLIP = 2, 6, 2, 0.5
NUM_STEPS = NUM_EPOCHS * STEPS_PER_EPOCH
KINDS = ["use", "learn"]


@functools.cache
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def batches():
    """The micro-batches of an epoch: handwritten digits (20, 1, 8, 8) and their labels."""
    images, labels = digits()
    return list(zip(images.split(20), labels.split(20), strict=True))[: STEPS_PER_EPOCH * ACCUMULATION]


def held_out():
    images, labels = digits()
    return images[-50:], labels[-50:]


def loader_of(micro_batches):
    images, labels = (torch.cat(parts) for parts in zip(*micro_batches, strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=len(micro_batches[0][0]))


def build_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)
    )


def build_optimizer(network, kind="sgd"):
    """Two parameter groups, the second at half the rate."""
    parameters = list(network.parameters())
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.05}]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.1, fused=kind == "fused")


def loss_of(network, batch):
    return functional.cross_entropy(network(batch[0]), batch[1])


def make_schedule(kind, network, loss_of_network=None, num_classes=10, **options):
    """A function from optimizer and num_steps to a schedule, with warm-up and cool-down, that is used or learns."""
    options = {"num_classes": num_classes, "gamma": "paper", "warmup": 0.2, "cooldown": 0.3} | options
    if kind == "use":
        return partial(MLRSNetLR, nets=load_schedules("paper"), **options)
    torch.manual_seed(1)
    net = MLRSNet(8)
    meta_loss = loss_of_network or (lambda: loss_of(network, held_out()))
    return partial(MetaMLRSNetLR, net=net, network=network, meta_loss=meta_loss, t_val=2, lr=0.1, **options)


def measuring(network, calls, next_loss=None):
    """As make_schedule, with a measured γ; `calls` gets an entry whenever it is measured."""
    next_loss = next_loss or (lambda: loss_of(network, batches()[int(torch.randint(12, ()))]))

    def make(optimizer, num_steps):
        def gamma():
            calls.append(measure_lr_scale(network, optimizer, next_loss, num_steps).gamma)
            return calls[-1]

        return MLRSNetLR(optimizer, "recommended", num_steps, gamma=gamma)

    return make


class Recorded(MLRSNetLR):
    """Keeps the losses that it was stepped with."""

    def _step(self, loss):
        self.__dict__.setdefault("losses", []).append(float(loss))
        super()._step(loss)


recorded = partial(Recorded, nets="recommended", gamma=0.01)


def rates_of(optimizer):
    """The rates of the steps that the optimizer will take, as a list that grows."""
    rates = []
    optimizer.register_step_post_hook(lambda *_: rates.append([group["lr"] for group in optimizer.param_groups]))
    return rates


def run_of(network, schedule, rates):
    """What two runs are compared by. Copies: the next run may move the same tensors."""
    state = {name: value for name, value in schedule.state_dict().items() if name != "adam"}
    return copy.deepcopy({"rates": rates, "weights": dict(network.state_dict()), "schedule": state})


def assert_equal(one, other, since=0):
    """Bit for bit; `since` is the step that a resumed run continued from."""
    assert other["rates"] == one["rates"][since:]
    torch.testing.assert_close(other["weights"], one["weights"], rtol=0, atol=0)
    torch.testing.assert_close(other["schedule"], one["schedule"], rtol=0, atol=0, equal_nan=True)


def plain_run(kind, network=None, micro_batches=None, part_of_loss=None, since=0, **options):
    """The oracle: an explicit loop. part_of_loss is a micro-batch's part of the mean over the window.

    The first `since` steps have no schedule.
    """
    network = network or build_network()
    micro_batches = (micro_batches or batches()) * NUM_EPOCHS
    part_of_loss = part_of_loss or (lambda batch: loss_of(network, batch) / ACCUMULATION)
    optimizer = build_optimizer(network)
    schedule = make_schedule(kind, network, **options)(optimizer=optimizer, num_steps=NUM_STEPS)
    schedule.steps_taken = since
    rates = rates_of(optimizer)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        window_loss = 0.0
        for batch in micro_batches[step * ACCUMULATION : (step + 1) * ACCUMULATION]:
            loss = part_of_loss(batch)
            loss.backward()
            window_loss += loss.detach()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        if step >= since:
            schedule.step(window_loss)
        optimizer.step()
    return run_of(network, schedule, rates)


# ---------------------------------------------------------------------------------------------- the README's lines


def readme_code(heading):
    """The blocks of code under a heading of integrations/README.md, a diff as what it leaves.

    A diff may add eight lines, among them those that take another's place.
    """
    section = (INTEGRATIONS / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    code = []
    for kind, block in re.findall(r"```(diff|python)\n(.*?)```", section, re.DOTALL):
        lines = block.splitlines()
        if kind == "diff":
            assert sum(line.startswith("+") for line in lines) <= 8
            assert all(line[0] in "+- " for line in lines)
            block = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        code.append(block)
    return code
