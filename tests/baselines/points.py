"""A small regression problem in double precision, for the rivals' tests."""

import itertools

import torch
from torch import nn
from torch.func import functional_call

STEPS = 6


class Points:
    """Regression in double precision; the step's number is the seed, and meta batches have seeds of their own."""

    num_classes, perplexity, steps_per_epoch, clip = 2, False, 3, None

    @staticmethod
    def points(seed):
        return torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def meta_batches(self, start):
        return map(self.points, itertools.count(1000 + start))

    def loss(self, network, batch, hidden):
        return (network(batch) - batch.sin().sum(1, keepdim=True)).square().mean(), torch.tensor(0.0), hidden

    def validate(self, network):
        return self.loss(network, self.points(1000), None)[0].item()


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def drive(schedule, network, steps=STEPS, start=0, shrink=1.0):
    """The rates of the steps, and the network's weights before each step. `shrink` multiplies the gradients."""
    task, rates, weights = Points(), [], []
    for number in range(start, start + steps):
        weights.append([parameter.detach().clone() for parameter in network.parameters()])
        loss, _, _ = task.loss(network, task.points(number), None)
        schedule.optimizer.zero_grad()
        loss.backward(retain_graph=schedule.second_order)
        for parameter in network.parameters() if shrink != 1 else ():
            parameter.grad.mul_(shrink)
        schedule.step(loss)
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
    return rates, weights


def unrolled_loss(seed, parameters):
    network = small_network()
    names = [name for name, _ in network.named_parameters()]
    point = dict(zip(names, parameters, strict=True))
    return Points().loss(lambda x: functional_call(network, point, x), Points.points(seed), None)[0]
