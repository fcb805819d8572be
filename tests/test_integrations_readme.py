"""The lines of integrations/README.md, run unchanged; Lightning's and the Trainer's are with their tests."""

import itertools
import math
import multiprocessing
import re

import pytest
import torch
from integrating import INTEGRATIONS, batches, build_network, loader_of, loss_of, readme_code
from torch.nn import functional

from mlr_snet import MLRSNetLR, load_schedules


def namespace():
    """What the README's lines find in a loop of its reader's: two epochs of four batches."""
    network = build_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return {
        "torch": torch, "functional": functional, "itertools": itertools, "math": math, "network": network,
        "loader": loader_of(batches()[:4]), "held_out": loader_of(batches()[4:6]), "optimizer": optimizer,
        "num_epochs": 2, "num_steps": 8, "scaler": torch.amp.GradScaler("cpu"), "MLRSNetLR": MLRSNetLR,
        "loss": loss_of(network, batches()[0]), "schedule": MLRSNetLR(optimizer, "recommended", 8, gamma=0.1),
    }


def train_in(names):
    """The loop that a block has built its schedule for."""
    for _ in range(names["num_epochs"]):
        for batch in names["loader"]:
            loss = loss_of(names["network"], batch)
            names["optimizer"].zero_grad()
            loss.backward()
            names["schedule"].step(loss)
            names["optimizer"].step()
    assert names["schedule"].steps_taken == names["schedule"].num_steps == 8


def test_the_lines_for_a_plain_loop_train_by_the_planned_steps():
    names = namespace()
    exec(readme_code("Plain loop")[0], names)
    assert names["schedule"].steps_taken == names["schedule"].num_steps == 8
    assert names["schedule"].get_last_lr()[0] < 0.7 * names["schedule"].gamma / 2  # the cool-down has begun


def test_the_lines_for_amp_take_a_step_and_those_without_unscale_an_epoch():
    _, with_clipping, with_attach = readme_code("Plain loop")
    for code, num_steps in [(with_clipping, 1), (with_attach, 4)]:
        names = namespace()
        exec(code, names)
        assert names["schedule"].steps_taken == num_steps


def test_the_lines_for_accelerate_train_by_the_planned_steps():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    names = namespace() | {"accelerator": accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)}
    exec(readme_code("Accelerate")[0], names)
    assert names["schedule"].steps_taken == names["schedule"].num_steps == 4


def test_the_lines_for_timm_train_by_the_planned_steps():
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.optim import create_optimizer_v2
    from timm.utils import NativeScaler

    names = namespace() | {"create_optimizer_v2": create_optimizer_v2, "scaler": NativeScaler("cpu")}
    exec(readme_code("timm")[0], names)
    assert names["schedule"].steps_taken == names["schedule"].num_steps == 8


@pytest.mark.parametrize("has_timms_scheduler", [False, True])
def test_the_line_for_timms_layer_decay_gives_the_groups_its_factors_once(has_timms_scheduler):
    pytest.importorskip("timm", reason="timm is not installed")
    from timm import create_model
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    network = create_model("test_resnet", in_chans=1, num_classes=10)
    optimizer = create_optimizer_v2(network, "sgd", lr=0.1, layer_decay=0.5)
    if has_timms_scheduler:
        create_scheduler_v2(optimizer, "cosine", num_epochs=3)
    schedule = MLRSNetLR(optimizer, "recommended", 8, gamma=0.1)
    text = (INTEGRATIONS / "README.md").read_text().replace("\n", " ")
    exec(re.search(r"`(for group in optimizer.param_groups: [^`]*)`", text)[1], {"optimizer": optimizer})
    schedule.step(2.3)
    factors = [group["lr_scale"] for group in optimizer.param_groups]
    assert len(set(factors)) > 2
    rates = schedule.get_last_lr()
    assert [rate / max(rates) for rate in rates] == pytest.approx([factor / max(factors) for factor in factors])


def test_the_lines_for_ignite_train_by_the_planned_steps():
    engine = pytest.importorskip("ignite.engine", reason="ignite is not installed")
    names = namespace()
    exec(readme_code("ignite")[0], names)
    engine.Engine(names["train_step"]).run(names["loader"], 2)
    assert names["schedule"].steps_taken == names["schedule"].num_steps == 8


def test_the_lines_that_measure_do_so_in_a_loop_and_in_an_adapters_function():
    in_a_loop, in_an_adapter = readme_code("Which γ?")
    names = namespace()
    others = multiprocessing.active_children()
    whole = names["loader"]
    names["loader"] = torch.utils.data.DataLoader(whole.dataset, whole.batch_size, num_workers=1)
    exec(in_a_loop, names)
    train_in(names)
    assert multiprocessing.active_children() == others  # those of the measuring have ended, too
    exec(in_an_adapter, names)
    names["schedule"] = names["make_schedule"](optimizer=names["optimizer"], num_steps=8)
    train_in(names)


def test_the_lines_that_learn_leave_a_net_that_the_readme_says_how_to_use(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = namespace()
    exec(readme_code("Learning a schedule")[0], names)
    train_in(names)
    names["schedule"] = MLRSNetLR(names["optimizer"], load_schedules(["schedule.pth"]), 8, num_classes=10)
    train_in(names)


def test_the_readmes_stream_continues_after_a_resume_and_shuffles_every_pass_anew():
    names = namespace()
    exec(readme_code("Learning a schedule")[1], names)
    numbers = torch.arange(7)

    def stream():
        return names["Stream"](torch.utils.data.DataLoader(numbers, 2, shuffle=True, generator=torch.Generator()))

    whole = stream()
    taken = [next(whole).tolist() for _ in range(12)]
    passes = [sum(taken[start : start + 4], []) for start in (0, 4, 8)]
    assert all(sorted(one) == numbers.tolist() for one in passes) and passes[0] != passes[1] != passes[2]
    for number in (3, 4, 9):
        first, resumed = stream(), stream()
        for _ in range(number):
            next(first)
        resumed.load_state_dict(first.state_dict())
        assert [next(resumed).tolist() for _ in range(12 - number)] == taken[number:]
