"""MLR-SNet in Lightning: bit-identical to a plain loop, with Lightning's own features beside it; and misuse."""

import contextlib
import math
from functools import partial

import pytest
import torch
from integrating import (
    ACCUMULATION,
    CLIP,
    KINDS,
    NUM_EPOCHS,
    NUM_STEPS,
    assert_equal,
    batches,
    build_network,
    build_optimizer,
    loader_of,
    loss_of,
    make_schedule,
    measuring,
    plain_run,
    rates_of,
    readme_code,
    recorded,
    run_of,
)

from mlr_snet import MLRSNetLR

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
from lightning.pytorch import callbacks as lightnings
from mlr_snet_lightning import MLRSNetCallback


class Loader:
    """Micro-batches in order, from where a restored state says."""

    def __init__(self):
        self.batches, self.position = batches(), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for position in range(self.position % len(self.batches), len(self.batches)):
            self.position = position + 1
            yield self.batches[position]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Endless(torch.utils.data.IterableDataset):
    """Batches whose number Lightning does not know: twelve."""

    def __iter__(self):
        return iter(batches())


class Digits(lightning.LightningModule):
    """Keeps the losses of its micro-batches and the rates of its steps."""

    def __init__(self, optimizer_kind="sgd", **attributes):
        super().__init__()
        self.network = build_network()
        self.optimizer = build_optimizer(self.network, optimizer_kind)
        self.rates, self.losses = rates_of(self.optimizer), []
        for name, value in attributes.items():
            setattr(self, name, value)

    def training_step(self, batch, batch_idx):
        loss = loss_of(self.network, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.optimizer


def trainer_in(folder, **options):
    return lightning.Trainer(**{
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "default_root_dir": folder,
    } | options)


def fit(folder, schedule=None, *others, module=None, loader=None, **options):
    """Train a module under a function that makes its schedule; the module, the callback and the trainer."""
    module = module or Digits()
    callback = MLRSNetCallback(schedule or recorded)
    trainer = trainer_in(folder, **{"max_epochs": 1, "callbacks": [callback, *others]} | options)
    trainer.fit(module, Loader() if loader is None else loader)
    return module, callback, trainer


def run(folder, make, resume_from=None, callback_of=MLRSNetCallback, **options):
    """The run that the plain loop takes, with a checkpoint after steps 4, 8 and 12. make is called with the network."""
    module = Digits()
    callback = callback_of(make(module.network))
    checkpoints = lightnings.ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = trainer_in(folder, **{
        "max_epochs": NUM_EPOCHS, "accumulate_grad_batches": ACCUMULATION, "gradient_clip_val": CLIP,
        "callbacks": [callback, checkpoints], "enable_checkpointing": True,
    } | options)
    trainer.fit(module, Loader(), ckpt_path=resume_from)
    return run_of(module.network, callback.schedule, module.rates)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_equals_the_plain_loop_and_so_does_one_resumed_in_the_middle_of_an_epoch(tmp_path, kind):
    expected = plain_run(kind)
    assert_equal(expected, run(tmp_path, partial(make_schedule, kind)))
    assert_equal(expected, run(tmp_path, partial(make_schedule, kind), tmp_path / "step=4.ckpt"), since=4)


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_keeps_its_measured_scale_and_does_not_measure_again(tmp_path, step):
    calls = []
    whole = run(tmp_path, partial(measuring, calls=calls))
    assert len(calls) == 1 and whole["schedule"]["gamma"] == calls[0]
    assert_equal(whole, run(tmp_path, partial(measuring, calls=calls), tmp_path / f"step={step}.ckpt"), since=step)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [4, 8])
def test_a_checkpoint_without_a_schedule_is_resumed_at_its_step_of_the_plan_with_a_warning(tmp_path, step, kind):
    class WithoutSchedule(lightning.Callback):
        def __init__(self, make):
            self.schedule = make(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), num_steps=NUM_STEPS)

    run(tmp_path, partial(make_schedule, "use"), callback_of=WithoutSchedule)
    with pytest.warns(UserWarning, match=f"no state of a schedule: it starts at step {step} of the 12 planned"):
        resumed = run(tmp_path, partial(make_schedule, kind), tmp_path / f"step={step}.ckpt")
    assert_equal(plain_run(kind, since=step), resumed, since=step)


def test_a_second_fit_of_the_same_trainer_continues_the_schedule(tmp_path):
    expected = plain_run("use")
    module = Digits()
    make = make_schedule("use", module.network)
    callback = MLRSNetCallback(lambda optimizer, num_steps: make(optimizer, num_steps=NUM_STEPS))
    trainer = trainer_in(
        tmp_path, max_epochs=1, callbacks=[callback], accumulate_grad_batches=ACCUMULATION, gradient_clip_val=CLIP
    )
    trainer.fit(module, Loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, Loader())
    assert_equal(expected, run_of(module.network, callback.schedule, module.rates))


@pytest.mark.parametrize("same_callback", [True, False])
def test_a_fit_that_an_error_has_ended_leaves_the_optimizer(tmp_path, same_callback):
    class Failing(Digits):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 3 and not self.has_failed:
                self.has_failed = True
                raise OSError("a disk went away")

    module, callback = Failing(has_failed=False), MLRSNetCallback(recorded)
    for number in range(2):
        callback = callback if same_callback else MLRSNetCallback(recorded)
        with contextlib.nullcontext() if number else pytest.raises(OSError):
            trainer_in(tmp_path, max_epochs=1, callbacks=[callback]).fit(module, Loader())
    assert callback.schedule.steps_taken == len(Loader())


def test_a_second_fit_after_an_interruption_keeps_state_and_measured_scale(tmp_path):
    class Interrupted(Digits):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if len(self.losses) == 5:
                raise KeyboardInterrupt

    calls = []
    module = Interrupted()
    callback = MLRSNetCallback(measuring(module.network, calls=calls))
    trainer = trainer_in(tmp_path, max_epochs=1, callbacks=[callback])
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            trainer.fit(module, Loader())
    assert callback.schedule.steps_taken > 5 and len(calls) == 1


def test_a_callback_that_drove_another_run_starts_anew_beside_a_new_trainer(tmp_path):
    module, callback, _ = fit(tmp_path, max_epochs=1)
    losses = callback.schedule.losses
    module = Digits()
    trainer_in(tmp_path, max_epochs=1, callbacks=[callback]).fit(module, Loader())
    assert callback.schedule.steps_taken == 12 and callback.schedule.losses == losses


# ---------------------------------------------------------------------------------------------- the plan


PLANS = {
    "epochs": {"max_epochs": 2},
    "steps": {"max_epochs": None, "max_steps": 9},
    "epochs that end before the steps": {"max_epochs": 2, "max_steps": 10_000},
    "steps that end before the epochs": {"max_epochs": 100, "max_steps": 17},
    "accumulation": {"max_epochs": 2, "accumulate_grad_batches": 5},
    "fewer batches": {"max_epochs": 3, "limit_train_batches": 7, "accumulate_grad_batches": 2},
    "epochs and time": {"max_epochs": 2, "max_time": "00:01:00:00"},
    "a loader without a length": {"max_epochs": None, "max_steps": 15},
    "accumulation that changes": {"max_epochs": 3},
    "accumulation that changes, and steps": {"max_epochs": 3, "max_steps": 14},
}


@pytest.mark.filterwarnings("ignore:the schedule plans")
@pytest.mark.parametrize("plan", PLANS)
def test_the_schedule_plans_the_steps_that_the_run_takes(tmp_path, plan):
    others = [lightnings.GradientAccumulationScheduler({0: 1, 1: 4})] if "changes" in plan else []
    loader = torch.utils.data.DataLoader(Endless(), batch_size=None) if "length" in plan else loader_of(batches())
    module, callback, trainer = fit(tmp_path, None, *others, loader=loader, **PLANS[plan])
    assert callback.schedule.num_steps == trainer.global_step == len(module.rates)


@pytest.mark.parametrize("nets", ["recommended", "paper"])
def test_a_run_of_one_epoch_decays_to_a_small_part_of_its_rate(tmp_path, nets):
    make = partial(MLRSNetLR, nets=nets, gamma=0.1, cooldown=0.2)
    module, _, _ = fit(tmp_path, make, max_epochs=1, max_steps=10_000)
    rates = [rate for rate, _ in module.rates]
    assert rates[-1] < 0.45 * max(rates)  # the last of twelve steps has the share 1/12 / 0.2 of the last net's


@pytest.mark.parametrize("limits", [
    {"max_epochs": -1},
    {"max_epochs": None, "max_time": "00:01:00:00"},
    {"max_epochs": -1, "max_steps": -1, "max_time": {"hours": 1}},
])
def test_a_run_without_a_planned_end_is_refused(tmp_path, limits):
    with pytest.raises(ValueError, match="no planned end: give the Trainer max_steps"):
        fit(tmp_path, **limits)


def test_epochs_over_a_loader_without_a_length_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_epochs and a loader with a length"):
        fit(tmp_path, loader=torch.utils.data.DataLoader(Endless(), batch_size=None))


def test_a_time_limit_beside_a_planned_end_is_told_once(tmp_path):
    with pytest.warns(UserWarning, match="plans 12 steps; max_time may end the run before them"):
        fit(tmp_path, max_time="00:01:00:00")
    with pytest.warns(UserWarning, match="plans 12 steps; max_time may end the run before them"):
        fit(tmp_path, None, lightnings.Timer("00:01:00:00"))


def test_epochs_beside_steps_over_a_loader_without_a_length_are_told(tmp_path):
    loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
    with pytest.warns(UserWarning, match="plans 10 steps; max_epochs may end the run before them"):
        fit(tmp_path, max_epochs=1, max_steps=10, loader=loader)


# ---------------------------------------------------------------------------------------------- the loss that is read


@pytest.mark.parametrize("scheduling", [{0: 1, 1: 4}, {0: 2, 1: 3}, {0: 5, 1: 1}])
def test_the_loss_is_the_mean_over_the_window_that_was_accumulated_though_it_changes(tmp_path, scheduling):
    changing = lightnings.GradientAccumulationScheduler(dict(scheduling))
    module, callback, _ = fit(tmp_path, None, changing, max_epochs=2)
    means = [
        sum(window) / len(window)
        for losses, size in zip((module.losses[:12], module.losses[12:]), scheduling.values(), strict=True)
        for window in (losses[start : start + size] for start in range(0, 12, size))
    ]
    assert callback.schedule.losses == pytest.approx(means, rel=1e-6)


def test_a_window_that_the_module_lengthens_in_mid_epoch_gives_its_mean_loss(tmp_path):
    def on_train_batch_start(batch, batch_idx):
        module.trainer.accumulate_grad_batches = 1 if batch_idx < 4 else 4

    module = Digits(on_train_batch_start=on_train_batch_start)
    _, callback, _ = fit(tmp_path, module=module)
    losses = module.losses
    assert callback.schedule.losses == pytest.approx([*losses[:4], sum(losses[4:8]) / 4, sum(losses[8:]) / 4], rel=1e-6)


def test_the_short_last_window_of_an_epoch_gives_its_mean_loss(tmp_path):
    module, callback, _ = fit(tmp_path, accumulate_grad_batches=5)
    windows = [module.losses[:5], module.losses[5:10], module.losses[10:]]  # of 12 micro-batches
    assert callback.schedule.losses == pytest.approx([sum(window) / len(window) for window in windows], rel=1e-6)


def fp16():
    precision = lightning.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    precision.forward_context = contextlib.nullcontext  # keep fp32's numbers, so that they can be compared
    return precision


def test_a_run_under_fp16_equals_the_plain_loop(tmp_path):
    assert_equal(plain_run("learn"), run(tmp_path, partial(make_schedule, "learn"), plugins=[fp16()]))


def test_the_loss_of_a_step_that_fp16_skips_is_dropped(tmp_path):
    class Overflowing(Digits):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if batch_idx == 7 else loss  # the second micro-batch of the fourth step

    module = Overflowing()
    _, callback, _ = fit(tmp_path, module=module, accumulate_grad_batches=2, plugins=[fp16()])
    means = [(first + second) / 2 for first, second in zip(module.losses[::2], module.losses[1::2], strict=True)]
    assert callback.schedule.losses == pytest.approx(means[:3] + means[4:], rel=1e-6)


# ---------------------------------------------------------------------------------------------- beside other callbacks


class Unfreeze(lightnings.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.network[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        self.unfreeze_and_add_param_group(pl_module.network[0], optimizer)


class AnotherFinder(lightnings.LearningRateFinder):
    pass


@pytest.mark.parametrize("callback", [
    lightnings.StochasticWeightAveraging(swa_lrs=0.1), lightnings.BackboneFinetuning(), Unfreeze(),
    lightnings.LearningRateFinder(), AnotherFinder(),
], ids=lambda callback: type(callback).__name__)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_callback_that_sets_rates_itself_is_refused_by_name_before_anything_runs(tmp_path, callback, is_first):
    module = Digits(backbone=build_network())
    others = [callback, MLRSNetCallback(recorded)] if is_first else [MLRSNetCallback(recorded), callback]
    with pytest.raises(ValueError, match=f"^{type(callback).__name__} sets learning rates itself.*: [^\n]+$"):
        trainer_in(tmp_path, max_epochs=1, callbacks=others).fit(module, Loader())
    assert not module.losses


def test_a_group_that_the_module_unfreezes_gets_its_share_of_the_rate(tmp_path):
    class Unfreezing(Digits):
        def configure_optimizers(self):
            self.network[0].requires_grad_(False)
            self.optimizer = torch.optim.SGD(list(self.network.parameters())[2:], lr=1e-3)
            self.rates = rates_of(self.optimizer)
            return self.optimizer

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                lightnings.BaseFinetuning.unfreeze_and_add_param_group(self.network[0], self.optimizer)

    module, _, _ = fit(tmp_path, partial(MLRSNetLR, nets="paper", gamma=0.1), module=Unfreezing(), max_epochs=2)
    assert all(len(rates) == 1 for rates in module.rates[:12])
    assert all(added == pytest.approx(first / 10) for first, added in module.rates[12:])


def test_lightnings_average_of_the_weights_leaves_the_rates_as_they_are(tmp_path):
    if not hasattr(lightnings, "EMAWeightAveraging"):
        pytest.skip("Lightning has EMAWeightAveraging since 2.6")
    module = Digits()
    fit(
        tmp_path, make_schedule("learn", module.network), lightnings.EMAWeightAveraging(decay=0.5), module=module,
        max_epochs=NUM_EPOCHS, accumulate_grad_batches=ACCUMULATION, gradient_clip_val=CLIP,
    )
    expected = plain_run("learn")
    assert module.rates == expected["rates"]
    assert not torch.equal(module.network[0].weight, expected["weights"]["0.weight"])  # it ends with the average


def test_lr_is_the_applied_rate_and_lightnings_own_monitor_reads_the_one_before(tmp_path):
    logged = {}

    class Logger(lightning.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            for name, value in metrics.items():
                logged.setdefault(name, []).append(float(value))

    make = partial(MLRSNetLR, nets="paper", gamma=0.1, warmup=0.3)
    module, _, _ = fit(
        tmp_path, make, lightnings.LearningRateMonitor("step"), logger=Logger(), log_every_n_steps=1,
        max_epochs=2,
    )
    applied = [rate for rate, _ in module.rates]
    assert logged["lr"] == pytest.approx(applied, rel=1e-6)
    assert logged["lr-SGD/pg1"] == pytest.approx([0.1, *applied[:-1]], rel=1e-6)


# ---------------------------------------------------------------------------------------------- misuse, in one sentence


def test_manual_optimization_is_refused(tmp_path):
    with pytest.raises(ValueError, match="between manual_backward"):
        fit(tmp_path, module=Digits(automatic_optimization=False))


def test_a_scheduler_beside_this_one_is_refused(tmp_path):
    module = Digits()
    other = torch.optim.lr_scheduler.StepLR(module.optimizer, 1)
    module.configure_optimizers = lambda: ([module.optimizer], [other])
    with pytest.raises(ValueError, match="return only the optimizer"):
        fit(tmp_path, module=module)


def test_a_resumed_run_of_another_length_is_refused_with_both_numbers(tmp_path):
    run(tmp_path, partial(make_schedule, "use"))
    with pytest.raises(ValueError, match="a run of 12 steps, this one plans 18"):
        run(tmp_path, partial(make_schedule, "use"), tmp_path / "step=8.ckpt", max_epochs=3)


# ---------------------------------------------------------------------------------------------- the README's lines


def test_the_readmes_lines_train_by_the_planned_steps(tmp_path):
    module = Digits()
    names = {"Trainer": partial(trainer_in, tmp_path), "module": module, "loader": loader_of(batches()[:4])}
    module.optimizer = torch.optim.SGD(module.network.parameters(), lr=0.1)
    exec(readme_code("Lightning")[0], names)
    schedule = names["callback"].schedule
    assert schedule.num_steps == schedule.steps_taken == 8
