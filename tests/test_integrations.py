"""The schedules in the examples' own loops and under GradScaler; and misuse.

Lightning, the Hugging Face Trainer and the README have tests of their own.
"""

import copy
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from integrating import (
    ACCUMULATION,
    CLIP,
    INTEGRATIONS,
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
    run_of,
)
from torch import nn

from mlr_snet import MLRSNetLR, load_schedule, load_schedules
from mlr_snet_scale import measure_lr_scale

LOOPS = ["plain", "accelerate", "timm", "ignite"]


def example_of(framework):
    if framework != "plain":
        pytest.importorskip(framework, reason=f"{framework} is not installed")
    return importlib.import_module(f"{framework}_example")


def network_of(framework):
    torch.manual_seed(0)
    if framework == "timm":
        return example_of("timm").timm.create_model("test_resnet", in_chans=1, num_classes=10)
    return build_network()


def example_run(framework, make, parts, folder):
    """Call the example's train() on one part of the run after the other, each time with all objects made anew.

    make is called with the network.
    """
    folder.mkdir()
    rates, network = [], network_of(framework)
    for part in parts:
        fresh = copy.deepcopy(network)
        optimizer = build_optimizer(fresh)
        rates_of_part = rates_of(optimizer)
        of_whole_run = partial(make(fresh), optimizer=optimizer)
        schedule = example_of(framework).train(
            fresh, optimizer, lambda optimizer, num_steps, make=of_whole_run: make(num_steps=NUM_STEPS),
            loader_of(part), 1, folder / "checkpoint.pt", ACCUMULATION, CLIP,
        )
        rates += rates_of_part
    return run_of(fresh, schedule, rates)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("framework", LOOPS)
def test_an_example_equals_the_plain_loop_and_so_does_a_run_resumed_in_the_middle_of_an_epoch(
    tmp_path, framework, kind
):
    expected = plain_run(kind, network_of(framework))
    run, make = batches() * NUM_EPOCHS, partial(make_schedule, kind)
    assert_equal(expected, example_run(framework, make, [run], tmp_path / "whole"))
    assert_equal(expected, example_run(framework, make, [run[:8], run[8:]], tmp_path / "resumed"))


@pytest.mark.parametrize("framework", LOOPS)
def test_a_resumed_run_of_an_example_keeps_its_measured_scale_and_does_not_measure_again(tmp_path, framework):
    calls, run = [], batches() * NUM_EPOCHS
    make = partial(measuring, calls=calls)
    whole = example_run(framework, make, [run], tmp_path / "whole")
    assert len(calls) == 1 and whole["schedule"]["gamma"] == calls[0]
    torch.manual_seed(0)
    assert_equal(whole, example_run(framework, make, [run[:8], run[8:]], tmp_path / "resumed"))
    assert len(calls) == 2  # for the first part


@pytest.mark.parametrize("framework", [*LOOPS, "lightning"])
@pytest.mark.parametrize("num_batches, num_epochs", [(12, 2), (7, 2), (5, 3)])
def test_an_example_plans_the_steps_that_it_takes(tmp_path, framework, num_batches, num_epochs):
    network = network_of(framework)
    optimizer = build_optimizer(network)
    schedule = example_of(framework).train(
        network, optimizer, partial(MLRSNetLR, nets="recommended", gamma=0.01),
        loader_of(batches()[:num_batches]), num_epochs, tmp_path / "checkpoint.pt",
    )
    assert schedule.num_steps == schedule.steps_taken


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["learn"]])
@pytest.mark.parametrize("framework", [*LOOPS, "lightning", "transformers"])
def test_an_example_runs_and_prints_how_it_ended(framework, arguments):
    if framework != "plain":
        pytest.importorskip(framework, reason=f"{framework} is not installed")
    command = [sys.executable, INTEGRATIONS / f"{framework}_example.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kind, number = re.search(r"^120 steps.*(accuracy|perplexity) ([\d.]+)", done.stdout, re.MULTILINE).groups()
    assert 80 < float(number) if kind == "accuracy" else float(number) < 30


ON_RANKS = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import json
from functools import partial
from pathlib import Path
import torch
import accelerate_example as example
import integrating as tests

torch.manual_seed(0)  # no BatchNorm, which normalizes a rank's share by itself
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).double()
optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
batches = [(images.double(), labels) for images, labels in tests.batches()]
meta_loss = lambda: tests.loss_of(network, batches[0])
net = torch.manual_seed(1) and tests.MLRSNet(8).double()
make = partial(
    tests.MetaMLRSNetLR, net=net, network=network, meta_loss=meta_loss, num_classes=10, t_val=1, lr=0.1,
    gamma="paper", cooldown=0.5,
)
rates = tests.rates_of(optimizer)
accumulation = int(sys.argv[3])
schedule = example.train(network, optimizer, make, tests.loader_of(batches), 1, Path("checkpoint"), accumulation, 0.5)
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
assert schedule.num_steps == schedule.steps_taken == 3
Path(f"rates_{rank}.json").write_text(json.dumps(rates))
"""


@pytest.mark.slow
def test_two_ranks_of_accelerate_plan_and_take_the_steps_of_one_process(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    here = Path(__file__).parent
    (tmp_path / "on_ranks.py").write_text(ON_RANKS)
    rates = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*(launch if ranks > 1 else [sys.executable]), str(tmp_path / "on_ranks.py")]
        # the same micro-batches in a window: four of one rank, or two of each
        command += [str(here), str(INTEGRATIONS), str(4 // ranks)]
        environment = os.environ | {"PYTHONPATH": str(here.parent), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        rates[ranks] = [json.loads((folder / f"rates_{rank}.json").read_text()) for rank in range(ranks)]
    assert rates[2][0] == rates[2][1]
    # the ranks' losses and gradients are added up in another order than one process's
    torch.testing.assert_close(torch.tensor(rates[2][0]), torch.tensor(rates[1][0]), rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------- GradScaler


def scaled_run(kind, optimizer_kind, clip=CLIP, skip=None, unscale=True):
    """An epoch under a GradScaler that hides the place before the update; step number `skip` overflows."""
    network, scaler, losses = build_network(), torch.amp.GradScaler("cpu"), []
    optimizer = build_optimizer(network, optimizer_kind)
    schedule = make_schedule(kind, network)(optimizer=optimizer, num_steps=NUM_STEPS)
    schedule.attach(lambda: losses[-1])
    rates = rates_of(optimizer)
    for number, batch in enumerate(batches()):
        optimizer.zero_grad()
        losses.append(loss_of(network, batch))
        scaler.scale(losses[-1]).backward()
        if number == skip:
            network[0].weight.grad[0] = math.inf
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
    return run_of(network, schedule, rates)


@pytest.mark.parametrize("optimizer_kind", ["sgd", "fused"])
@pytest.mark.parametrize("clip", [CLIP, math.inf])
def test_under_grad_scaler_the_meta_update_sees_unscaled_and_clipped_gradients(optimizer_kind, clip):
    network = build_network()
    optimizer = build_optimizer(network, optimizer_kind)
    schedule = make_schedule("learn", network)(optimizer=optimizer, num_steps=NUM_STEPS)
    rates = rates_of(optimizer)
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_of(network, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        schedule.step(loss)
        optimizer.step()
    # the scale is a power of two, so that it leaves no rounding
    assert_equal(run_of(network, schedule, rates), scaled_run("learn", optimizer_kind, clip))


@pytest.mark.parametrize("optimizer_kind", ["sgd", "fused"])
def test_a_step_that_grad_scaler_skips_does_not_advance_the_schedule(optimizer_kind):
    run = scaled_run("use", optimizer_kind, skip=3)
    assert run["schedule"]["steps_taken"] == len(batches()) - 1
    assert all(weights.isfinite().all() for weights in run["weights"].values())


def test_a_fused_optimizer_whose_gradients_are_still_scaled_cannot_learn_a_schedule():
    scaled_run("use", "fused", unscale=False)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaled_run("learn", "fused", unscale=False)


@pytest.mark.parametrize("build", [
    partial(torch.optim.SGD, lr=0.1), partial(torch.optim.SGD, lr=0.1, fused=True),
    partial(torch.optim.AdamW, lr=0.1, fused=True),
])
def test_measuring_in_the_first_step_under_grad_scaler_finds_the_scale_of_a_step_without_it(build):
    gammas = []
    for scaler in (torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu")):
        network, calls = build_network(), []
        optimizer = build(network.parameters())
        schedule = measuring(network, calls)(optimizer, NUM_STEPS)
        loss = loss_of(network, batches()[0])
        schedule.attach(lambda loss=loss: loss.detach())
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # a fused optimizer unscales inside its step
        gammas += calls
    assert gammas[0] == gammas[1]


def test_the_trial_steps_that_measure_an_optimizer_do_not_step_an_attached_schedule():
    class Unknown(torch.optim.SGD):
        """An optimizer without an entry of its own in DIRECTIONS."""

    network = build_network()
    optimizer = Unknown(network.parameters(), lr=0.1)
    schedule = make_schedule("learn", network)(optimizer=optimizer, num_steps=4)
    schedule.attach(lambda: loss)
    for batch in batches()[:4]:
        loss = loss_of(network, batch)
        loss.backward()
        optimizer.step()
    assert schedule.steps_taken == 4


@pytest.mark.parametrize("build", [
    partial(torch.optim.SGD, lr=0.1), partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    partial(torch.optim.Adadelta, lr=1.0),
])
def test_an_optimizer_that_accelerate_has_wrapped_is_measured_as_the_bare_one(build):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    gammas = []
    for prepare in (accelerate.Accelerator(cpu=True).prepare, lambda optimizer: optimizer):
        network = build_network()
        optimizer = prepare(build(network.parameters()))
        next_loss = partial(next, (loss_of(network, batch) for batch in itertools.cycle(batches())))
        gammas.append(measure_lr_scale(network, optimizer, next_loss, NUM_STEPS).gamma)
    assert gammas[0] == gammas[1]


# ---------------------------------------------------------------------------------------------- the other semantics


@pytest.mark.parametrize("kind", KINDS)
def test_two_optimizers_have_a_schedule_each_and_leave_each_others_rates_alone(kind):
    network = build_network()
    halves = network[:2], network[2:]
    optimizers = [torch.optim.SGD(halves[0].parameters(), lr=0.1), torch.optim.AdamW(halves[1].parameters(), lr=0.1)]
    schedules = [
        make_schedule(kind, network, gamma=gamma)(optimizer=optimizer, num_steps=NUM_STEPS)
        for optimizer, gamma in zip(optimizers, (0.5, 0.01), strict=True)
    ]
    for batch in batches():
        loss = loss_of(network, batch)
        network.zero_grad()
        loss.backward()
        for schedule in schedules:
            schedule.step(loss)
        for optimizer in optimizers:
            optimizer.step()
    (one,), (other,) = (schedule.get_last_lr() for schedule in schedules)
    assert 0 < other < 0.05 * one


def test_training_past_the_planned_end_keeps_the_last_net():
    network = build_network()
    schedule = make_schedule("use", network, cooldown=0.0)(optimizer=build_optimizer(network), num_steps=3)
    for _ in range(9):
        schedule.step(2.3)
    assert schedule.net is schedule.nets[2] and schedule.get_last_lr()[0] > 0


def test_parameter_groups_keep_their_ratios():
    run = plain_run("use")
    assert all(second == first / 2 for first, second in run["rates"])


@pytest.mark.parametrize("warmup_steps, num_steps", [(29, 100), (5, 12), (57, 100), (1, 3)])
def test_a_warm_up_of_so_many_steps_has_that_many(warmup_steps, num_steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = MLRSNetLR(optimizer, "recommended", num_steps, gamma=1.0, warmup=warmup_steps / num_steps)
    shares = []
    for _ in range(num_steps):
        schedule.step(2.3)
        shares.append(schedule.get_last_lr()[0] / schedule.fraction.item())
    expected = [min(1.0, step / (warmup_steps + 1)) for step in range(1, num_steps + 1)]
    assert shares == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------------------------------- misuse, in one sentence


def a_schedule(lr=0.1):
    optimizer = torch.optim.SGD(build_network().parameters(), lr=lr)
    return MLRSNetLR(optimizer, load_schedules(), num_steps=3, gamma=0.1)


def test_a_step_without_a_loss_says_where_to_call_it():
    with pytest.raises(TypeError, match=r"step\(loss\) after backward\(\), before optimizer.step\(\)"):
        a_schedule().step()


def test_a_loss_that_is_not_0_d_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"shape \(20,\): give the mean"):
        a_schedule().step(torch.ones(20))


def test_an_optimizer_whose_rates_are_all_zero_is_refused():
    with pytest.raises(ValueError, match="rates are all zero; give at least one group a positive lr"):
        a_schedule(lr=0.0)


def test_a_net_file_that_is_none_is_refused_by_its_name(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: not an MLR-SNet"):
        load_schedule(tmp_path / "other.pth")


def test_a_second_scheduler_that_overwrites_the_rate_is_noticed_at_the_next_step():
    schedule = a_schedule()
    other = torch.optim.lr_scheduler.StepLR(schedule.optimizer, 1)
    schedule.step(2.3)
    schedule.optimizer.step()
    other.step()
    with pytest.raises(RuntimeError, match="remove the other scheduler"):
        schedule.step(2.3)


@pytest.mark.parametrize("framework", LOOPS)
def test_an_example_refuses_a_checkpoint_without_a_schedule(tmp_path, framework):
    run, make = batches(), partial(make_schedule, "use")
    example_run(framework, make, [run], tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    if checkpoint.is_dir():
        (checkpoint / "custom_checkpoint_0.pkl").unlink()
    else:
        torch.save({name: part for name, part in torch.load(checkpoint).items() if name != "schedule"}, checkpoint)
    network = network_of(framework)
    with pytest.raises((KeyError, ValueError, RuntimeError), match="schedule|custom"):
        example_of(framework).train(
            network, build_optimizer(network), make(network), loader_of(run), 1, checkpoint, ACCUMULATION, CLIP
        )
