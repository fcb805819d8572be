"""The rates of parameter groups under a schedule: ratios, tensors, groups that are added, and other schedulers."""

import copy

import pytest
import torch
from test_mlr_snet import loss_on, small_network, trained
from test_restoring import loss_of
from test_schedulers import rates
from torch import nn
from torch.optim import SGD, Adam

from mlr_snet import MLRSNet, MLRSNetLR, hypergradient, load_schedules
from mlr_snet_optim.rates import set_lr

# ---------------------------------------------------------------------------------------------- parameter groups


@pytest.mark.parametrize("built_with", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_group_added_in_mid_run_has_its_rate_over_the_present_one_as_its_share(built_with, step):
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=built_with)
    schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=1.0)
    rates(schedule, [2.0] * step)
    present = optimizer.param_groups[0]["lr"]
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": present / 10})
    for _ in range(3):
        schedule.step(1.5)
        first, second = schedule.get_last_lr()
        assert second == pytest.approx(first / 10)


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_a_group_added_without_a_rate_has_the_full_one(make):
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=make(1.0))
    schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=0.02)
    rates(schedule, [2.0, 2.0])
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    schedule.step(1.5)
    first, second = schedule.get_last_lr()
    assert first == second == pytest.approx(0.01, rel=0.1)


def test_a_group_added_beside_the_driven_ones_has_a_rate_tensor_of_its_own():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(1.0))
    schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=0.02, groups=[0])
    rates(schedule, [2.0, 2.0])
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    seconds = [(schedule.step(loss), float(schedule.get_last_lr()[1]))[1] for loss in (1.5, 1.0, 0.5)]
    assert seconds == [1.0] * 3 and schedule.get_last_lr()[0] != 1  # the optimizer's own default


def test_groups_that_a_loaded_state_lets_share_a_tensor_are_driven_apart():
    def adam():
        groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
        return torch.optim.Adam(groups, lr=torch.tensor(0.001), foreach=False)

    optimizer = adam()
    schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=0.2, groups=[0])
    optimizer.load_state_dict(adam().state_dict())
    first, second = rates(schedule, [2.0]) and schedule.get_last_lr()
    assert first > 0.01 and second == torch.tensor(0.001)


def test_a_rate_tensor_of_integers_is_refused():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(1))
    with pytest.raises(ValueError, match="a tensor of torch.int64, which rounds it"):
        MLRSNetLR(optimizer, load_schedules(), 20, gamma=1.0)


def test_another_scheduler_is_told_where_the_rate_is_a_tensor_on_the_host():
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(1.0))
    schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=1.0)
    schedule.step(2.0)
    optimizer.param_groups[0]["lr"].fill_(0.3)
    with pytest.raises(RuntimeError, match="the learning rate is 0.3, but this schedule had set"):
        schedule.step(2.0)


def test_what_another_scheduler_left_behind_does_not_count():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = SGD([{"params": weights[0]}, {"params": weights[1]}], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # sets initial_lr
    optimizer.param_groups[1]["lr"] = 0.05  # layer decay
    with pytest.warns(UserWarning, match="another scheduler"):
        schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=1.0)
    schedule.step(2.0)
    first, second = schedule.get_last_lr()
    assert second == pytest.approx(first / 2)


def test_only_the_named_groups_are_driven_and_the_others_belong_to_their_owner():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = SGD([{"params": [weight]} for weight in weights], lr=0.1)
    schedule = MLRSNetLR(optimizer, load_schedules(), 20, gamma=1.0, groups=[0, 2])
    for step in range(3):
        optimizer.param_groups[1]["lr"] = 0.01 * step
        schedule.step(2.0)
        first, own, third = schedule.get_last_lr()
        assert own == 0.01 * step and first == third == pytest.approx(0.5, rel=0.1)
    optimizer.param_groups[0]["lr"] = 0.3
    with pytest.raises(RuntimeError, match="had set"):
        schedule.step(2.0)


def test_the_lookahead_moves_groups_that_are_not_driven_at_their_own_rate():
    network, _ = trained(lambda p: SGD(p, lr=0.1))
    body, head = list(network[:5].parameters()), list(network[5].parameters())
    optimizer = SGD([{"params": body}, {"params": head, "lr": 0.2}], lr=0.1, weight_decay=0.1)
    slope = hypergradient(network, optimizer, 0.05, lambda: loss_on(network, 99), ratios=[1.0, None])

    def meta_loss(lr):
        other = copy.deepcopy(network)
        with torch.no_grad():
            for mine, theirs in zip(other.parameters(), network.parameters(), strict=True):
                is_head = any(theirs is parameter for parameter in head)
                mine.sub_((0.2 if is_head else lr) * (theirs.grad + 0.1 * theirs))
        return loss_on(other, 99).item()

    assert slope.item() == pytest.approx((meta_loss(0.05 + 1e-5) - meta_loss(0.05 - 1e-5)) / 2e-5, rel=1e-5)


def test_an_optimizer_that_takes_no_rate_is_refused():
    with pytest.raises(TypeError, match="Rprop keeps step sizes of its own"):
        MLRSNetLR(torch.optim.Rprop(small_network().parameters()), "paper", 8, gamma=0.1)


def test_a_state_of_other_parameter_groups_is_refused():
    def built(groups):
        network = small_network()
        optimizer = SGD([{"params": [weight], "lr": 0.1} for weight in network.parameters()])
        return MLRSNetLR(optimizer, "paper", 8, gamma=0.1, groups=groups)

    with pytest.raises(ValueError, match=r"of the parameter groups \[0, 1, 2, 3, 4, 5\], this one has \[0\]"):
        built([0]).load_state_dict(built(None).state_dict())
    built([0]).load_state_dict(built([0]).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_in_a_tensor_is_rounded_to_its_own_precision_only(dtype):
    optimizer = Adam([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.5, dtype=dtype))
    set_lr(optimizer, 0.1)
    assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.1, dtype=dtype))


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_rate_that_groups_share_in_one_tensor_is_set_for_the_driven_ones_only(kind):
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = kind([{"params": part.parameters()} for part in network], lr=torch.tensor(0.001))
    schedule = MLRSNetLR(optimizer, "recommended", 100, gamma=0.2, groups=[0])
    loss_of(network).backward()
    schedule.step(1.0)
    driven, other = schedule.get_last_lr()
    assert driven > 0.05 and other == 0.001


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_rate_that_is_a_tensor_is_filled_in_place_and_returned_as_a_copy(kind):
    weight = nn.Parameter(torch.zeros(2))
    rate = torch.tensor(0.1)
    optimizer = kind([{"params": [weight], "lr": rate}], lr=1.0, foreach=False)
    schedule = MLRSNetLR(optimizer, [MLRSNet()], 6, num_classes=10, gamma="paper")
    schedule.step(2.3)
    (lr,) = schedule.get_last_lr()
    assert optimizer.param_groups[0]["lr"] is rate and lr is not rate and torch.equal(lr, rate)
    assert rate.item() == pytest.approx(schedule.gamma * 0.5, rel=0.1)
    rate.fill_(0.0)
    assert lr > 0


def test_a_compiled_step_is_not_compiled_again_when_the_rate_changes():
    from torch._dynamo.testing import CompileCounter

    weight, counter = nn.Parameter(torch.ones(2)), CompileCounter()
    optimizer = torch.optim.SGD([weight], lr=torch.tensor(0.1), foreach=False)
    schedule = MLRSNetLR(optimizer, [MLRSNet()], 6, num_classes=10)
    step = torch.compile(optimizer.step, backend=counter)
    for loss in (2.3, 1.9, 1.0, 0.4):
        weight.grad = torch.ones(2)
        schedule.step(loss)
        step()
    assert counter.frame_count == 1
