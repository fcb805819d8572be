"""The functions of the time, against torch's own."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from baselines import SCHEDULES
from baselines.of_time import ClosedForm

ROOT = Path(__file__).resolve().parents[2]
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


def after_warmup(optimizer, *schedulers, milestones=()):
    """torch's linear warm-up over 15 of 300 steps, then the schedulers, which change at the milestones."""
    warmup = lr_scheduler.LinearLR(optimizer, 1 / 16, total_iters=15)
    return lr_scheduler.SequentialLR(optimizer, [warmup, *schedulers], [15, *milestones])


def torch_wsd(optimizer):
    stable = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    decay = lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=60)
    return after_warmup(optimizer, stable, decay, milestones=[240])


ORACLES = {
    "fixed": (lambda o: lr_scheduler.ConstantLR(o, factor=1.0), False),
    "multistep": (lambda o: lr_scheduler.MultiStepLR(o, [90, 180, 240], gamma=0.2), True),
    "exponential": (lambda o: lr_scheduler.ExponentialLR(o, 0.95), False),
    "cosine": (lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS * STEPS), True),
    "sgdr": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10 * STEPS, T_mult=2), True),
    "onecycle": (lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=EPOCHS * STEPS, cycle_momentum=False), True),
    "warmup-cosine": (lambda o: after_warmup(o, lr_scheduler.CosineAnnealingLR(o, 285)), True),
    "linear": (lambda o: after_warmup(o, lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=285)), True),
    "wsd": (torch_wsd, True),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR passes it
@pytest.mark.parametrize("name", ORACLES)
def test_a_schedule_equals_torchs_own(name):
    assert rates(name) == pytest.approx(torch_rates(*ORACLES[name]), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", [name for name, kind in SCHEDULES.items() if issubclass(kind, ClosedForm)])
@pytest.mark.parametrize(("num_epochs", "steps_per_epoch"), [(1, 1), (1, 3), (3, 1), (2, 21)])
def test_a_function_of_the_time_stays_between_0_and_the_initial_rate_in_the_shortest_runs(
    name, num_epochs, steps_per_epoch
):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = SCHEDULES[name](optimizer, num_epochs, steps_per_epoch)
    for _ in range(num_epochs * steps_per_epoch):
        schedule.step(1.0)
        assert 0 < schedule.get_last_lr()[0] <= 0.1


def test_the_rival_of_the_readme_is_a_class_and_a_line(monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "meta-test" / "README.md").read_text(), re.DOTALL)
    names = {"ClosedForm": ClosedForm}
    exec(block, names)
    monkeypatch.setitem(SCHEDULES, "halving", names["Halving"])
    assert rates("halving")[:: EPOCHS * STEPS // 10][:3] == [0.1, 0.05, 0.025]
