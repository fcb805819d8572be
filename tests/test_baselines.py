"""The schedules, against torch's own and by hand."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from baselines import SCHEDULES, Val

EPOCHS, STEPS = 75, 4


def rates(name):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = SCHEDULES[name](optimizer, EPOCHS, STEPS)
    seen = []
    for _ in range(EPOCHS * STEPS):
        schedule.step(1.0)
        seen.append(schedule.get_last_lr()[0])
    return seen


def torch_rates(make, per_step):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make(optimizer)
    seen = []
    for step in range(EPOCHS * STEPS):
        seen.append(scheduler.get_last_lr()[0])
        optimizer.step()
        if per_step or (step + 1) % STEPS == 0:
            scheduler.step()
    return seen


ORACLES = {
    "fixed": (lambda o: lr_scheduler.ConstantLR(o, factor=1.0), False),
    "multistep": (lambda o: lr_scheduler.MultiStepLR(o, [22, 45, 60], gamma=0.2), False),
    "exponential": (lambda o: lr_scheduler.ExponentialLR(o, 0.95), False),
    "cosine": (lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS * STEPS), True),
    "sgdr": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10 * STEPS, T_mult=2), True),
    "onecycle": (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=EPOCHS * STEPS, cycle_momentum=False), True),
}


@pytest.mark.parametrize("name", ORACLES)
def test_a_schedule_equals_torchs_own(name):
    assert rates(name) == pytest.approx(torch_rates(*ORACLES[name]), rel=1e-9, abs=1e-12)


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
