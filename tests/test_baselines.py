"""The schedules, against torch's own and by hand."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import baselines
from baselines import SCHEDULES, ClosedForm, LightningFinder, Val, build_baseline, default_lr, lightning_lr_finder

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
    "multistep": (lambda o: lr_scheduler.MultiStepLR(o, [22, 45, 60], gamma=0.2), False),
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


# ---------------------------------------------------------------------------------------------- rates from losses

NUM_LOSSES = 200


def losses():
    """A loss that falls and then stays, with noise."""
    noise = torch.randn(NUM_LOSSES, generator=torch.Generator().manual_seed(0)).tolist()
    return [max(1.0, 3.0 - 0.04 * step) + 0.02 * value for step, value in enumerate(noise)]


def reading(name):
    """A schedule that reads the loss, with epochs of four steps."""
    if name == "greedy":
        pytest.importorskip("transformers", reason="needs the package transformers")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
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


def test_greedy_equals_its_package_used_directly():
    schedule = reading("greedy")
    from transformers import GreedyLR

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, expected = GreedyLR(optimizer, smooth=True), []  # its bounds suit an initial rate of 0.1
    for value in losses():
        scheduler.step(value)
        expected.append(optimizer.param_groups[0]["lr"])
    assert driven(schedule, losses()) == expected
    assert max(expected) > 0.1 and expected[-1] < max(expected)


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
    monkeypatch.setattr(baselines, "all_reduce_mean", lambda loss: loss - 1)  # as if the other ranks had less
    assert driven(reading(name), [value + 1 for value in losses()]) == pytest.approx(alone)


# ---------------------------------------------------------------------------------------------- packages and defaults


@pytest.mark.parametrize(("schedule", "optimizer", "lr"), [
    ("cosine", "sgd", 0.1), ("wsd", "adamw", 1e-3), ("greedy", "adam", 1e-3), ("val", "sgd", 20.0),
    ("val", "adam", 1e-3),
    ("schedule-free", "sgd", 1.0), ("schedule-free", "adamw", 0.0025), ("schedule-free-radam", "adamw", 0.0025),
    ("prodigy", "adam", 1.0), ("dadaptation", "sgd", 1.0), ("dadaptation", "adamw", 1.0),
])
def test_every_baseline_has_a_usual_rate(schedule, optimizer, lr):
    assert default_lr(schedule, optimizer) == lr


class Short:
    steps_per_epoch = 2


@pytest.mark.parametrize(("schedule", "optimizer", "module"), [
    ("schedule-free", "sgd", "schedulefree"), ("schedule-free-radam", "adamw", "schedulefree"),
    ("prodigy", "adam", "prodigyopt"), ("dadaptation", "adamw", "dadaptation"),
    ("greedy", "sgd", "transformers.optimization"),
])
def test_a_package_that_is_missing_is_named(schedule, optimizer, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"--schedule {schedule} needs .*pip install {module.split('.')[0]}$"):
        build_baseline(schedule, optimizer, nn.Linear(1, 1), Short(), 2)


def test_a_package_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.optimization", sys)  # a module without GreedyLR
    monkeypatch.setitem(sys.modules, "transformers", sys)
    with pytest.raises(ValueError, match="needs a transformers with GreedyLR: pip install --upgrade transformers"):
        build_baseline("greedy", "sgd", nn.Linear(1, 1), Short(), 2)


def test_a_dadaptation_that_does_not_tell_its_rate_is_refused(monkeypatch):
    class OfVersion2(torch.optim.SGD):
        def __init__(self, parameters, **options):
            super().__init__(parameters, **options)
            self.defaults["g0_norm"] = 0.0

    monkeypatch.setitem(sys.modules, "dadaptation", SimpleNamespace(DAdaptSGD=OfVersion2))
    with pytest.raises(ValueError, match="needs dadaptation 3: pip install --upgrade dadaptation"):
        build_baseline("dadaptation", "sgd", nn.Linear(1, 1), Short(), 2)


# ---------------------------------------------------------------------------------------------- Lightning's LR finder


@pytest.mark.parametrize("high", [1.0, 1000.0])  # without and with a divergence
@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightnings_suggestion_is_that_of_its_trainer(high, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="needs the package lightning")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.lr, self.losses = nn.Linear(3, 1), 0.1, []

        def training_step(self, batch, index):
            loss = (self.layer(batch) - batch.sin().sum(1, keepdim=True)).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    torch.manual_seed(0)
    model, batches = Model(), torch.utils.data.DataLoader(torch.randn(400, 3), batch_size=4)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, max_epochs=1, default_root_dir=tmp_path, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )
    finder = lightning.tuner.Tuner(trainer).lr_find(model, batches, max_lr=high)
    ours = LightningFinder(high=high)
    assert finder.results["lr"] == ours.rates[: len(finder.results["lr"])]
    assert ours.suggest(model.losses) == finder.suggestion()
    after_a_divergence = [0.0] * (len(ours.rates) - len(model.losses))
    assert ours.suggest(model.losses + after_a_divergence) == finder.suggestion()


def test_too_few_losses_for_a_suggestion_are_refused():
    pytest.importorskip("lightning.pytorch", reason="needs the package lightning")
    with pytest.raises(ValueError, match="no suggestion after 5 steps"):
        LightningFinder().suggest([1.0] * 5)


def test_lightning_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch.tuner.lr_finder", None)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ValueError, match="Lightning's LR finder needs the package lightning: pip install lightning"):
        lightning_lr_finder(None, None, None, 0)  # before it needs a network
