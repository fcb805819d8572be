"""The schedules that follow gradients, against autograd through the unrolled steps and by hand."""

import itertools

import pytest
import torch
from torch import nn
from torch.func import functional_call

from baselines import HD, L4, RTHO, L4Adam, build_baseline, twice_differentiable
from data.meta_stream import MetaStream

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


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def drive(schedule, network, steps=STEPS):
    """The rates of the steps, and the network's weights before each step."""
    task, rates, weights = Points(), [], []
    for number in range(steps):
        weights.append([parameter.detach().clone() for parameter in network.parameters()])
        loss, _, _ = task.loss(network, task.points(number), None)
        schedule.optimizer.zero_grad()
        loss.backward(retain_graph=schedule.second_order)
        schedule.step(loss)
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
    return rates, weights


def unrolled_loss(seed, parameters):
    network = small_network()
    names = [name for name, _ in network.named_parameters()]
    point = dict(zip(names, parameters, strict=True))
    return Points().loss(lambda x: functional_call(network, point, x), Points.points(seed), None)[0]


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
def test_rtho_follows_the_derivative_of_the_validation_loss_through_all_steps(momentum):
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=momentum, weight_decay=0.1)
    schedule = RTHO(optimizer, 2, 3, beta=1e-3, network=network, meta_loss=MetaStream(Points(), network))
    rates, _ = drive(schedule, network)
    for last in range(1, STEPS):
        # all rates moved by the same shift, whose derivative at 0 is the sum over the steps so far
        shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
        point = list(small_network().parameters())
        velocity = [torch.zeros_like(weight) for weight in point]
        for number in range(last):
            gradients = torch.autograd.grad(unrolled_loss(number, point), point, create_graph=True)
            velocity = [
                momentum * old + gradient + 0.1 * weight
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


def test_the_state_of_another_schedule_is_refused():
    network = small_network()
    _, fixed = build_baseline("fixed", "sgd", network, Points(), 2)
    _, hd = build_baseline("hd", "sgd", network, Points(), 2)
    with pytest.raises(ValueError, match="not the state of a HD: missing or unknown last_directions, lr"):
        hd.load_state_dict(fixed.state_dict())


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


@pytest.mark.parametrize("name", ["hd", "rtho", "l4mom", "l4adam", "schedule-free", "prodigy"])
def test_a_rival_continues_from_its_state_as_if_never_stopped(name):
    for package in {"schedule-free": ["schedulefree"], "prodigy": ["prodigyopt"]}.get(name, []):
        pytest.importorskip(package, reason=f"needs the package {package}")

    def start():
        network = small_network()
        kind = "adam" if name == "prodigy" else "sgd"
        stream = MetaStream(Points(), network)
        return network, stream, *build_baseline(name, kind, network, Points(), 2, 0.05, meta_loss=stream)

    network, _, _, schedule = start()
    whole, _ = drive(schedule, network)
    one, first_stream, first_optimizer, first = start()
    begun, _ = drive(first, one, 3)
    other, second_stream, second_optimizer, second = start()
    other.load_state_dict(one.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    second_stream.load_state_dict(first_stream.state_dict())

    class Later(Points):
        @staticmethod
        def points(seed):
            return Points.points(seed + 3 if seed < 1000 else seed)

    rest, task = [], Later()
    for number in range(3):
        loss, _, _ = task.loss(other, task.points(number), None)
        second_optimizer.zero_grad()
        loss.backward(retain_graph=second.second_order)
        second.step(loss)
        rest.append(second.get_last_lr()[0])
        second_optimizer.step()
    assert begun + rest == whole


@pytest.mark.parametrize(("name", "kind", "package", "make"), [
    ("schedule-free", "sgd", "schedulefree", lambda m, p: m.SGDScheduleFree(p, lr=0.05, momentum=0.9)),
    ("schedule-free", "adamw", "schedulefree", lambda m, p: m.AdamWScheduleFree(p, lr=0.05)),
    ("prodigy", "adamw", "prodigyopt", lambda m, p: m.Prodigy(p, lr=0.05)),
])
def test_a_packaged_rival_equals_its_package_used_directly(name, kind, package, make):
    module = pytest.importorskip(package, reason=f"needs the package {package}")
    network = small_network()
    _, schedule = build_baseline(name, kind, network, Points(), 2, 0.05)
    drive(schedule, network)
    other = small_network()
    optimizer = make(module, other.parameters())
    if hasattr(optimizer, "train"):
        optimizer.train()
    for number in range(STEPS):
        optimizer.zero_grad()
        Points().loss(other, Points.points(number), None)[0].backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("name", "kind", "momentum"), [
    ("rtho", "adam", 0.0), ("l4mom", "sgd", 0.9), ("l4adam", "adam", 0.0), ("schedule-free", "adam", 0.0),
    ("prodigy", "sgd", 0.0),
])
def test_a_rival_on_an_optimizer_that_it_cannot_drive_is_refused(name, kind, momentum):
    network = small_network()
    with pytest.raises(ValueError, match="--optimizer"):
        build_baseline(name, kind, network, Points(), 2, momentum=momentum, meta_loss=MetaStream(Points(), network))


def test_a_package_that_is_not_there_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ValueError, match="pip install prodigyopt"):
        build_baseline("prodigy", "adam", small_network(), Points(), 2)


def test_a_rate_that_is_no_number_does_not_pass_for_zero():
    network = small_network()
    schedule = HD(torch.optim.SGD(network.parameters(), lr=0.05), 2, 3, beta=1e-3)
    drive(schedule, network, 1)
    for parameter in network.parameters():
        parameter.grad.fill_(float("nan"))
    schedule.step(1.0)
    assert schedule.get_last_lr()[0] != schedule.get_last_lr()[0]
