"""The net, the LR scale, the hypergradient and the schedulers, against oracles."""

import itertools
import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

from data.meta_stream import MetaStream, schedule_arguments
from mlr_snet import (
    MetaMLRSNetLR,
    MLRSNet,
    MLRSNetLR,
    ScaleError,
    hypergradient,
    load_schedule,
    load_schedules,
    lr_scale,
    train,
)
from mlr_snet_optim.average import Average
from mlr_snet_optim.directions import descend, update_directions

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden.json").read_text())

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01),
}


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    ).double()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 1, 6, 6, dtype=torch.float64, generator=generator)
    return images, torch.randint(4, (8,), generator=generator)


def loss_on(network, seed):
    images, labels = batch(seed)
    return nn.functional.cross_entropy(network(images), labels)


def trained(make_optimizer, steps=2):
    """A network and optimizer some steps into training, with the next gradient in .grad."""
    network = small_network()
    optimizer = make_optimizer(network.parameters())
    for seed in range(steps + 1):
        optimizer.zero_grad()
        loss_on(network, seed).backward()
        if seed < steps:
            optimizer.step()
    return network, optimizer


def meta_loss_after_step(make_optimizer, lr):
    """The meta loss after the optimizer's own step of rate lr."""
    network, optimizer = trained(make_optimizer)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return loss_on(network, 99).item()


def test_outputs_agree_with_the_golden_ones():
    net = load_schedule(HERE / "random_schedule.pth").double()
    state, fractions = net.initial_state(), []
    for loss in GOLDEN["losses"]:
        fraction, state = net(torch.tensor(loss, dtype=torch.float64), state)
        fractions.append(fraction.item())
    assert fractions == pytest.approx(GOLDEN["fractions"], abs=1e-6)


def test_parameter_count_and_scale_agree_with_the_golden_ones():
    count = sum(parameter.numel() for parameter in MLRSNet().parameters())
    assert count == GOLDEN["fresh_parameter_counts"]["mlr_snet"]
    for loss, classes, expected in GOLDEN["lr_scale"]:
        assert lr_scale(loss, classes) == pytest.approx(expected, rel=1e-9)


def test_scale_keeps_its_floor_where_the_formula_crosses_zero():
    assert lr_scale(0.1, 10) == pytest.approx(0.1**0.5 / 10**0.25 / 4)


@pytest.mark.parametrize("loss", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_refuses_a_loss_that_is_not_positive(loss):
    with pytest.raises(ValueError, match="positive and finite loss"):
        lr_scale(loss, 10)


@pytest.mark.parametrize("layers", [1, 3])
def test_checkpoints_survive_a_round_trip(tmp_path, layers):
    net = MLRSNet(20, layers)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with torch.device("meta"):  # which does not matter
        loaded = load_schedule(tmp_path / "net.pth")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True))


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("content", ["missing", "empty", "truncated", "foreign", "code", "list"])
def test_a_file_that_is_no_schedule_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pth"
    if content == "empty":
        path.write_bytes(b"")
    elif content == "truncated":
        path.write_bytes((HERE / "random_schedule.pth").read_bytes()[:1000])
    elif content != "missing":
        torch.save({"foreign": nn.Linear(2, 2).state_dict(), "code": Malicious(), "list": [1]}[content], path)
    with pytest.raises(ValueError, match="net.pth"):
        load_schedule(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hypergradient_equals_central_differences_of_the_optimizers_own_step(name):
    network, optimizer = trained(OPTIMIZERS[name])
    slope = hypergradient(network, optimizer, 0.05, lambda: loss_on(network, 99))
    width = 1e-5
    above, below = (meta_loss_after_step(OPTIMIZERS[name], 0.05 + sign * width) for sign in (1, -1))
    assert slope.item() == pytest.approx((above - below) / (2 * width), rel=1e-5)


def written_out_direction(name, group, state, parameter, gradient):
    """d_t from the optimizer's equations, differentiable."""
    decayed = gradient + group["weight_decay"] * parameter
    if name in ("sgd", "momentum", "nesterov"):
        if not group["momentum"]:
            return decayed
        velocity = group["momentum"] * state["momentum_buffer"] + (1 - group["dampening"]) * decayed
        return decayed + group["momentum"] * velocity if group["nesterov"] else velocity
    gradient = gradient if name == "adamw" else decayed
    (beta1, beta2), step = group["betas"], state["step"].item() + 1
    mean = (beta1 * state["exp_avg"] + (1 - beta1) * gradient) / (1 - beta1**step)
    square = (beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient**2) / (1 - beta2**step)
    direction = mean / (square.sqrt() + group["eps"])
    return direction + group["weight_decay"] * parameter if name == "adamw" else direction


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hypergradient_equals_autograd_through_the_lookahead(name):
    network, optimizer = trained(OPTIMIZERS[name])
    slope = hypergradient(network, optimizer, 0.05, lambda: loss_on(network, 99))
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    images, labels = batch(2)
    parameters = dict(network.named_parameters())
    buffers = {key: value.clone() for key, value in network.named_buffers()}
    loss = nn.functional.cross_entropy(functional_call(network, {**parameters, **buffers}, (images,)), labels)
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    group, ahead = optimizer.param_groups[0], {}
    for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        state = optimizer.state[parameter]
        ahead[key] = parameter - lr * written_out_direction(name, group, state, parameter, gradient)
    images, labels = batch(99)
    nn.functional.cross_entropy(functional_call(network, {**ahead, **buffers}, (images,)), labels).backward()
    assert slope.item() == pytest.approx(lr.grad.item(), rel=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_lookahead_leaves_everything_as_it_was_to_the_bit(name):
    network, optimizer = trained(OPTIMIZERS[name])

    def snapshot():
        tensors = [*network.state_dict().values(), *(p.grad for p in network.parameters())]
        tensors += [value for state in optimizer.state.values() for value in state.values() if value is not None]
        return [tensor.clone() for tensor in tensors]

    before = snapshot()
    hypergradient(network, optimizer, 0.05, lambda: loss_on(network, 99))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))


@pytest.mark.parametrize("is_averaged", [False, True])
def test_a_step_inside_one_autocast_region_has_the_hypergradient_and_losses_of_separate_ones(is_averaged):
    def run(around, inside):
        network = small_network().float()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        average = Average(network, 0.5) if is_averaged else None

        def loss(seed):
            images, labels = batch(seed)
            with inside():
                return nn.functional.cross_entropy(network(images.float()), labels)

        with around():
            loss(0).backward()
            results = [hypergradient(network, optimizer, 5.0, lambda: loss(1), average=average), loss(1)]
            descend(update_directions(optimizer), 5.0)
            torch.clear_autocast_cache()
            if average:
                with average.averaged_weights():
                    results.append(loss(1))
            results.append(loss(1))
        return [float(result) for result in results]

    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    assert run(autocast, nullcontext) == run(nullcontext, autocast)


def test_the_meta_gradients_are_not_held_all_at_once():
    network, optimizer = trained(OPTIMIZERS["sgd"])
    held = []

    def count_held(parameter):
        held.append(sum(other.grad is not None for other in network.parameters()))

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(count_held)  # runs before hypergradient's own
    hypergradient(network, optimizer, 0.05, lambda: loss_on(network, 99))
    assert held == [1] * len(list(network.parameters()))


def test_an_optimizer_that_is_not_affine_in_the_rate_is_refused():
    network = small_network()
    with pytest.raises(TypeError, match="LBFGS"):
        hypergradient(network, torch.optim.LBFGS(network.parameters()), 0.1, lambda: loss_on(network, 99))


class ToyTask:
    """Random images; the step's number is the seed."""

    num_classes, perplexity, steps_per_epoch, clip = 4, False, 3, None

    class Batch:
        def __init__(self, seed):
            self.inputs, self.targets = batch(seed)
            self.size = len(self.targets)

    def train_batches(self, start):
        while True:
            yield self.Batch(start)
            start += 1

    def meta_batches(self, start):
        return map(self.Batch, itertools.count(1000 + start))

    def micro_batches(self, batch):
        return [batch]

    def loss(self, network, batch, hidden):
        logits = network(batch.inputs)
        accuracy = 100 * (logits.argmax(1) == batch.targets).double().mean()
        return nn.functional.cross_entropy(logits, batch.targets), accuracy, hidden

    def evaluate(self, network):
        return {}


def meta_schedule(optimizer, net, network, **options):
    stream = MetaStream(ToyTask(), network)
    return MetaMLRSNetLR(optimizer, net, network, stream, **schedule_arguments(ToyTask(), 1), t_val=1, **options)


def test_the_loop_with_a_fixed_rate_equals_a_plain_loop_to_the_bit():
    from baselines import SCHEDULES

    task, mine, plain = ToyTask(), small_network(), small_network()
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1, momentum=0.9)
    assert len(list(train(mine, task, optimizer, SCHEDULES["fixed"](optimizer, 2, 3), 2))) == 6
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for seed in range(6):
        optimizer.zero_grad()
        loss_on(plain, seed).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), plain.parameters(), strict=True))


def test_theta_moves_along_the_total_derivative_of_the_meta_loss():
    """Adam's first gradient equals autograd through θ → lr → ŵ → L_meta, in float64."""
    network, optimizer = trained(OPTIMIZERS["sgd"])
    net = MLRSNet(6).double()
    schedule = meta_schedule(optimizer, net, network, weight_decay=0.0)
    loss = torch.tensor(1.3, dtype=torch.float64)
    fraction, _ = net(loss, net.initial_state())
    scale = lr_scale(1.3, 4)
    slope = hypergradient(network, optimizer, scale * fraction.item(), lambda: loss_on(network, 1000))
    gradients = torch.autograd.grad(fraction, list(net.parameters()))
    slope_by_hand = [slope * scale * gradient for gradient in gradients]
    schedule.step(loss)
    for parameter, expected in zip(net.parameters(), slope_by_hand, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-14)
    assert schedule.meta_loss.index == 1


def test_the_real_step_uses_the_new_theta_and_advances_the_state_once():
    network, optimizer = trained(OPTIMIZERS["sgd"])
    net = MLRSNet(6).double()
    schedule = meta_schedule(optimizer, net, network, lr=0.1)
    schedule.step(torch.tensor(1.3, dtype=torch.float64))
    fraction, state = net(torch.tensor(1.3, dtype=torch.float64), net.initial_state())
    assert schedule.get_last_lr()[0] == pytest.approx(lr_scale(1.3, 4) * fraction.item(), rel=1e-12)
    assert torch.equal(schedule.state, state)


def test_nets_change_at_thirds_and_groups_keep_their_ratios():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[0], "lr": 1.0}, {"params": weights[1], "lr": 0.1}])
    schedule = MLRSNetLR(optimizer, [MLRSNet() for _ in range(3)], 14, num_classes=10)
    phases = []
    for _ in range(14):
        schedule.step(2.3)
        phases.append(schedule.phase)
        assert schedule.get_last_lr()[1] == pytest.approx(0.1 * schedule.get_last_lr()[0])
    assert phases == [0] * 4 + [1] * 5 + [2] * 5


@pytest.mark.parametrize("spike", [7.0, 1e6, math.inf, math.nan])
def test_the_scale_at_a_change_of_nets_comes_from_the_median_of_the_last_losses(spike):
    schedule = MLRSNetLR(one_weight_sgd(), [MLRSNet(), MLRSNet()], 8, num_classes=10)
    for loss in (2.0, 1.5, 1.5, spike):
        schedule.step(loss)
    assert schedule.phase == 0 and schedule.gamma == pytest.approx(lr_scale(2.0, 10))
    schedule.step(1.4)
    assert schedule.phase == 1 and schedule.gamma == pytest.approx(lr_scale(1.5, 10))


def test_a_loss_of_zero_at_a_change_of_nets_keeps_net_and_scale_and_is_refused_at_the_start():
    schedule = MLRSNetLR(one_weight_sgd(), [MLRSNet(), MLRSNet()], 8, num_classes=10)
    with pytest.raises(ScaleError):
        schedule.step(0.0)
    for loss in (2.0, *[0.0] * 7):
        schedule.step(loss)
    assert schedule.phase == 0 and schedule.gamma == pytest.approx(lr_scale(2.0, 10))


def test_a_loss_that_is_not_finite_reaches_the_caller_with_its_step():
    network = small_network()
    with torch.no_grad():
        network[0].weight.fill_(float("nan"))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    schedule = MLRSNetLR(optimizer, [MLRSNet()], 3, num_classes=4)
    step = next(train(network, ToyTask(), optimizer, schedule, 1))
    assert step.number == 1 and step.loss.isnan()


def test_the_shipped_schedules_fall_over_the_run():
    """At the settled state the fraction of the LR scale falls from one net to the next, as their run's rate did."""
    settled = []
    for net in load_schedules("paper"):
        state = net.initial_state()
        for _ in range(200):
            fraction, state = net(torch.tensor(1.0), state)
        settled.append(fraction.item())
    assert settled == sorted(settled, reverse=True) and settled[0] > 2 * settled[2]


def test_the_shipped_schedule_of_averaged_weights_goes_by_its_name_and_does_not_fall():
    (net,) = load_schedules()
    state, fractions = net.initial_state(), []
    for step in range(1000):
        fraction, state = net(torch.tensor(2.3 - 0.002 * step), state)
        fractions.append(fraction.item())
    assert min(fractions) > 0.5 * max(fractions) and 0.2 < fractions[-1] < 0.9


def test_a_scheduler_resumes_to_the_bit():
    def make():
        torch.manual_seed(0)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return MLRSNetLR(optimizer, [MLRSNet(), MLRSNet()], 12, num_classes=10)

    losses = [2.3 * 0.9**step for step in range(12)]
    whole, first, second = make(), make(), make()
    expected = [(whole.step(loss), whole.get_last_lr())[1] for loss in losses]
    for loss in losses[:5]:
        first.step(loss)
    second.load_state_dict(first.state_dict())
    assert [(second.step(loss), second.get_last_lr())[1] for loss in losses[5:]] == expected[5:]


def test_a_scheduler_resumes_at_the_gamma_of_its_run():
    """However the number was found: measured again, it would be another."""
    whole = MLRSNetLR(one_weight_sgd(), [MLRSNet(), MLRSNet()], 2, gamma=0.3)
    whole.step(2.3)
    resumed = MLRSNetLR(one_weight_sgd(), whole.nets, 2, gamma=0.4)
    with pytest.warns(UserWarning, match="its own gamma 0.3, not 0.4"):
        resumed.load_state_dict(whole.state_dict())
    whole.step(2.0)
    resumed.step(2.0)
    assert resumed.phase == 1 and resumed.get_last_lr() == whole.get_last_lr()


def one_weight_sgd():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize("num_classes", [0, -1, "10", 2.5, float("nan"), True, None])
def test_a_number_of_classes_that_is_none_is_refused(num_classes):
    with pytest.raises(ValueError, match="num_classes"):
        MLRSNetLR(one_weight_sgd(), [MLRSNet()], 6, num_classes=num_classes)
    with pytest.raises(ValueError, match="num_classes"):
        lr_scale(2.3, num_classes)


def test_a_vocabulary_of_one_word_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        MLRSNetLR(one_weight_sgd(), [MLRSNet()], 6, num_classes=1, perplexity=True)


def test_nets_of_different_sizes_are_refused_at_construction():
    with pytest.raises(ValueError, match="different sizes"):
        MLRSNetLR(one_weight_sgd(), [MLRSNet(50), MLRSNet(20)], 6, num_classes=10)


@pytest.mark.parametrize("damage", ["missing", "unknown", "fewer nets", "missing weight", "other size"])
def test_a_state_of_another_schedule_is_refused(damage):
    schedule = MLRSNetLR(one_weight_sgd(), [MLRSNet(), MLRSNet()], 6, num_classes=10)
    state = schedule.state_dict()
    if damage == "missing":
        del state["gamma"]
    elif damage == "unknown":
        state["scale"] = 1.0
    elif damage == "fewer nets":
        state["nets"] = state["nets"][:1]
    elif damage == "missing weight":
        state["nets"] = [dict(list(weights.items())[1:]) for weights in state["nets"]]
    else:
        state["nets"] = [MLRSNet(20).state_dict()] * 2
    with pytest.raises(ValueError, match="state"):
        schedule.load_state_dict(state)
