"""The rates from losses, against torch's and the package's own and by hand."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from baselines import SCHEDULES, base
from baselines.from_losses import Val

STEPS = 4

def test_val_divides_the_rate_by_4_after_each_epoch_that_did_not_help():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=20.0)
    losses = iter([5.0, 4.0, 4.0, 4.5, 3.9])  # after epochs 1 … 5
    schedule, seen = Val(optimizer, 6, 2, validate=lambda: next(losses)), []
    for step in range(12):
        if step == 7:  # a copy takes over in the middle of an epoch
            state = schedule.state_dict()
            schedule = Val(optimizer, 6, 2, validate=lambda: next(losses))
            schedule.load_state_dict(state)
        schedule.step(1.0)
        seen.append(schedule.get_last_lr()[0])
    assert seen == [20, 20, 20, 20, 20, 20, 5, 5, 1.25, 1.25, 1.25, 1.25]


NUM_LOSSES = 200


def losses():
    """A loss that falls and then stays, with noise."""
    noise = torch.randn(NUM_LOSSES, generator=torch.Generator().manual_seed(0)).tolist()
    return [max(1.0, 3.0 - 0.04 * step) + 0.02 * value for step, value in enumerate(noise)]


def reading(name, lr=0.1):
    """A schedule that reads the loss, with epochs of four steps."""
    if name == "greedy":
        pytest.importorskip("transformers", reason="needs the package transformers")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    return SCHEDULES[name](optimizer, NUM_LOSSES // STEPS, STEPS)


def driven(schedule, values):
    rates = []
    for value in values:
        schedule.step(torch.tensor(value, dtype=torch.float64))
        rates.append(schedule.get_last_lr()[0])
    return rates


def test_plateau_equals_torchs_own_on_the_mean_losses_of_the_epochs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, expected = lr_scheduler.ReduceLROnPlateau(optimizer), []
    for epoch in range(NUM_LOSSES // STEPS):
        expected += [optimizer.param_groups[0]["lr"]] * STEPS
        scheduler.step(sum(losses()[epoch * STEPS : (epoch + 1) * STEPS]) / STEPS)
    assert driven(reading("plateau"), losses()) == expected
    assert expected[-1] < expected[0]


@pytest.mark.parametrize(("lr", "bounds"), [(0.1, {}), (0.002, {"min_lr": 2e-5, "max_lr": 0.02})])
def test_greedy_equals_its_package_used_directly(lr, bounds):
    schedule = reading("greedy", lr)
    from transformers import GreedyLR

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, expected = GreedyLR(optimizer, smooth=True, **bounds), []  # its own suit an initial rate of 0.1
    values = [*losses(), *(abs(step - 600) - 700 for step in range(2400))]
    for value in values:
        scheduler.step(value)
        expected.append(optimizer.param_groups[0]["lr"])
    assert driven(schedule, values) == pytest.approx(expected)
    assert max(expected) == pytest.approx(10 * lr) and min(expected) == pytest.approx(lr / 100)


@pytest.mark.parametrize("name", ["plateau", "greedy"])
def test_a_schedule_that_reads_the_loss_continues_within_an_epoch_as_if_never_stopped(name):
    whole = driven(reading(name), losses())
    first, second = reading(name), reading(name)
    begun = driven(first, losses()[:149])
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert begun + driven(second, losses()[149:]) == whole


@pytest.mark.parametrize("name", ["plateau", "greedy"])
def test_a_schedule_that_reads_the_loss_reads_the_mean_over_the_ranks(name, monkeypatch):
    alone = driven(reading(name), losses())
    monkeypatch.setattr(base, "all_reduce_mean", lambda loss: loss - 1)  # as if the other ranks had less
    assert driven(reading(name), [value + 1 for value in losses()]) == pytest.approx(alone)
