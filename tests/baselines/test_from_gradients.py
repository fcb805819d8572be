"""The rates from gradients, against autograd through the unrolled steps and by hand."""

import pytest
import torch
from points import STEPS, Points, drive, small_network, unrolled_loss
from torch import nn

from baselines import base, build_baseline
from baselines.from_gradients import HD, L4, RTHO, L4Adam, twice_differentiable
from data.meta_stream import MetaStream


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
def test_hd_follows_the_derivative_of_the_next_loss_in_the_last_rate(name):
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    }[name]
    network = small_network()
    rates, weights = drive(HD(make(network.parameters()), 2, 3, beta=1e-3), network)
    for number in range(1, STEPS):
        # the step before, as a function of its rate: w(lr) = w_{t−1} + (w_t − w_{t−1}) · lr / lr_{t−1}
        lr = torch.tensor(rates[number - 1], dtype=torch.float64, requires_grad=True)
        steps = zip(weights[number - 1], weights[number], strict=True)
        point = [before + (after - before) * lr / rates[number - 1] for before, after in steps]
        loss = unrolled_loss(number, point)
        if name != "adamw":
            loss = loss + 0.05 * sum(weight.square().sum() for weight in point)
        slope = torch.autograd.grad(loss, lr)[0].item()
        assert rates[number] == pytest.approx(rates[number - 1] - 1e-3 * slope, rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("shrink", [1.0, 0.3])  # as clipping does
def test_rtho_follows_the_derivative_of_the_validation_loss_through_all_steps(momentum, shrink):
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=momentum, weight_decay=0.1)
    schedule = RTHO(optimizer, 2, 3, beta=1e-3, network=network, meta_loss=MetaStream(Points(), network))
    rates, _ = drive(schedule, network, shrink=shrink)
    for last in range(1, STEPS):
        # all rates moved by the same shift, whose derivative at 0 is the sum over the steps so far
        shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
        point = list(small_network().parameters())
        velocity = [torch.zeros_like(weight) for weight in point]
        for number in range(last):
            gradients = torch.autograd.grad(unrolled_loss(number, point), point, create_graph=True)
            velocity = [
                momentum * old + shrink * gradient + 0.1 * weight
                for old, gradient, weight in zip(velocity, gradients, point, strict=True)
            ]
            point = [weight - (rates[number] + shift) * old for weight, old in zip(point, velocity, strict=True)]
        slope = torch.autograd.grad(unrolled_loss(1000 + last - 1, point), shift)[0].item()
        assert rates[last] == pytest.approx(max(0.0, rates[last - 1] - 1e-3 * slope), rel=1e-8)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(3, 1, 4, dropout=0.0)

    def forward(self, points):
        return self.layer(points).sum(1, keepdim=True)


def test_rtho_differentiates_attention_twice():
    torch.manual_seed(0)
    network = Attention().double()
    stream = MetaStream(Points(), network)
    _, schedule = build_baseline("rtho", "sgd", network, Points(), 2, 0.05, beta=1e-3, meta_loss=stream)
    with twice_differentiable(network):
        rates, _ = drive(schedule, network, 3)
    assert len(set(rates)) > 1


def test_building_rtho_leaves_cudnn_as_it_is():
    network = nn.LSTM(3, 3)
    build_baseline("rtho", "sgd", network, Points(), 2, 0.05, meta_loss=MetaStream(Points(), network))
    assert torch.backends.cudnn.enabled
    with twice_differentiable(network):
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled


def test_rtho_works_beside_batch_norm_and_leaves_its_statistics_to_the_training_batches():
    def statistics(name):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
        _, schedule = build_baseline(
            name, "sgd", network, Points(), 2, 0.05, beta=1e-12, meta_loss=MetaStream(Points(), network)
        )
        drive(schedule, network, 3)
        return network[1].running_mean

    assert torch.allclose(statistics("rtho"), statistics("fixed"), rtol=1e-9)


@pytest.mark.parametrize("kind", [L4, L4Adam])
def test_l4_equals_its_update_equations(kind):
    network = small_network()
    rates, weights = drive(kind(torch.optim.SGD(network.parameters(), lr=0.1), 2, 3), network)
    point = [weight.clone() for weight in weights[0]]
    exp_avg = exp_avg_sq = [torch.zeros_like(weight) for weight in point]
    min_loss = None
    for number in range(STEPS):
        assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(point, weights[number], strict=True))
        point = [weight.detach().requires_grad_() for weight in point]
        loss = unrolled_loss(number, point)
        gradients = torch.autograd.grad(loss, point)
        value = loss.item()
        min_loss = 0.75 * value if min_loss is None else min(min_loss, value)
        exp_avg = [0.9 * old + 0.1 * gradient for old, gradient in zip(exp_avg, gradients, strict=True)]
        squares = [gradient**2 for gradient in gradients]
        exp_avg_sq = [0.999 * old + 0.001 * square for old, square in zip(exp_avg_sq, squares, strict=True)]
        mean = [old / (1 - 0.9 ** (number + 1)) for old in exp_avg]
        roots = [(old / (1 - 0.999 ** (number + 1))).sqrt() + 1e-4 for old in exp_avg_sq]
        direction = [m / root for m, root in zip(mean, roots, strict=True)] if kind is L4Adam else mean
        product = sum((m * v).sum().item() for m, v in zip(mean, direction, strict=True))
        lr = 0.15 * (value - 0.9 * min_loss) / (product + 1e-12)
        assert rates[number] == pytest.approx(lr, rel=1e-9)
        min_loss *= 1.001
        point = [weight.detach() - lr * v for weight, v in zip(point, direction, strict=True)]


def test_l4_reads_the_mean_loss_over_the_ranks(monkeypatch):
    def rates():
        network = small_network()
        return drive(L4(torch.optim.SGD(network.parameters(), lr=0.1), 2, 3), network, 1)[0]

    alone = rates()
    monkeypatch.setattr(base, "all_reduce_mean", lambda loss: 2 * loss)
    assert rates() == pytest.approx([2 * alone[0]])


def test_a_rate_that_is_no_number_does_not_pass_for_zero():
    network = small_network()
    schedule = HD(torch.optim.SGD(network.parameters(), lr=0.05), 2, 3, beta=1e-3)
    drive(schedule, network, 1)
    for parameter in network.parameters():
        parameter.grad.fill_(float("nan"))
    schedule.step(1.0)
    assert schedule.get_last_lr()[0] != schedule.get_last_lr()[0]
