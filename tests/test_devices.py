"""An accelerator: the host does not wait for it, nothing is compiled twice, and a record names the one in use."""

import argparse
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from baselines import build_baseline
from data import build_task
from data.meta_stream import MetaStream, schedule_arguments
from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, train
from mlr_snet_optim.average import Average
from mlr_snet_optim.directions import descend
from models import build_network
from training import folder
from training.averaging import evaluating_average
from training.folder import provenance
from utils import build_optimizer, init_distributed

CPU = torch.device("cpu")


class NoNumbers(TorchDispatchMode):
    """Forbids to make a number of a tensor, for which an accelerator would be waited for."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator is not torch.ops.aten._local_scalar_dense.default, "the host waits"
        return operator(*args, **(kwargs or {}))


def digits(device=CPU, **options):
    sizes = {"batch_size": 16, "num_meta": 20, "limit_train": 64, **options}
    return build_task("digits", Path(), device=device, **sizes)


def parts(kind, task, fused, device=CPU):
    """The optimizer, fused as on CUDA if asked for, and the schedule of that kind."""
    torch.manual_seed(0)
    network, net = build_network("resnet8", 10).to(device), MLRSNet(6).to(device)
    optimizer = build_optimizer("adam" if kind == "adam" else "sgd", network.parameters(), 1.0, 0.0, 0.01)
    if fused:
        optimizer = type(optimizer)(network.parameters(), lr=1.0, weight_decay=0.01, fused=True)
    if kind == "meta-test":
        return network, optimizer, MLRSNetLR(optimizer, [net], 8, num_classes=10)
    if kind in ("cosine", "fixed"):
        return network, *build_baseline(kind, "sgd", network, task, 2, 0.1)
    point = "average" if kind == "average" else "lookahead"
    gamma = 0.01 if kind == "adam" else "auto"
    schedule = MetaMLRSNetLR(
        optimizer, net, network, MetaStream(task, network), **schedule_arguments(task, 2), t_val=1, gamma=gamma,
        meta_point=point,
    )
    return network, optimizer, schedule


KINDS = ["meta-test", "lookahead", "adam", "average", "cosine"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_the_steady_state_makes_no_number_of_a_tensor(kind, stay_on_device):
    if kind != "cosine":
        stay_on_device()
    task = digits()
    steps = loop(parts(kind, task, fused=True), task)
    for _ in range(3):
        next(steps)  # the first sets γ
    with NoNumbers():
        taken = [next(steps) for _ in range(3)]
    assert all(0 < float(step.lr) < 1 and torch.is_tensor(step.loss) for step in taken)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_of_a_steady_step_keep_their_storage(kind, stay_on_device):
    stay_on_device()
    task = digits()
    built = network, optimizer, schedule = parts(kind, task, fused=True)
    steps = loop(built, task)
    for _ in range(3):
        next(steps)
    before = tensors_in(network.state_dict(), vars(optimizer), vars(schedule))  # kept alive
    for _ in range(3):
        next(steps)
    after = tensors_in(network.state_dict(), vars(optimizer), vars(schedule))
    assert after.keys() == before.keys()
    assert [name for name in before if after[name].data_ptr() != before[name].data_ptr()] == []
    assert kind == "cosine" or torch.is_tensor(optimizer.param_groups[0]["lr"])


def tensors_in(*tables):
    """Each tensor in the tables, and in what they hold, by its place there."""
    found = {}

    def visit(value, name):
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, (torch.nn.Module, torch.optim.Optimizer, Average)):
            visit(vars(value), name)
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{name}.{id(key) if isinstance(key, torch.Tensor) else key}")
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                visit(item, f"{name}.{index}")

    elsewhere = ("lr_set", "optimizer", "network")  # copies of the rates, and what another table holds
    for number, table in enumerate(tables):
        visit({name: value for name, value in table.items() if name not in elsewhere}, number)
    return found


def loop(built, task):
    """The scripts' loop over two epochs."""
    network, optimizer, schedule = built
    return train(network, task, optimizer, schedule, 2)


@pytest.mark.parametrize("kind", ["meta-test", "lookahead", "adam", "average"])
def test_rates_that_stay_on_the_device_are_those_that_come_to_the_host(kind, stay_on_device):
    task = digits()
    host = [(step.lr, float(step.loss)) for step in loop(parts(kind, task, fused=False), task)]
    stay_on_device()
    device = [(float(step.lr), float(step.loss)) for step in loop(parts(kind, task, fused=True), task)]
    assert [value for pair in device for value in pair] == pytest.approx([v for pair in host for v in pair], rel=2e-3)


def test_a_rate_that_is_a_tensor_moves_the_weights_as_a_number_does():
    weights, direction = torch.randn(2, 5, dtype=torch.float64)
    one, other = torch.nn.Parameter(weights.clone()), torch.nn.Parameter(weights.clone())
    descend({one: lambda weight: direction}, 0.3)
    descend({other: lambda weight: direction}, torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(one, other)


def test_a_compiled_network_is_not_compiled_again_from_step_to_step():
    from torch._dynamo.testing import CompileCounter

    task, counter = digits(num_meta=16), CompileCounter()
    network, optimizer, schedule = parts("lookahead", task, fused=False)
    network.compile(backend=counter)
    steps = train(network, task, optimizer, schedule, 2)
    next(steps)
    compiled = counter.frame_count
    assert compiled > 0
    rates = [next(steps).lr for _ in range(3)]
    assert counter.frame_count == compiled and len(set(rates)) == 3


def test_fresh_statistics_of_a_compiled_network_compile_nothing():
    from torch._dynamo.testing import CompileCounter

    task, counter = digits(), CompileCounter()
    network = build_network("resnet8", task.num_classes)
    network.compile(backend=counter)
    with evaluating_average(Average(network, 0.9), task):
        assert counter.frame_count == 0
        task.evaluate(network)
    assert counter.frame_count > 0


@pytest.mark.parametrize(("device", "gpu"), [("cpu", None), ("auto", "a GPU")])
def test_provenance_names_a_gpu_only_where_the_run_uses_it(monkeypatch, device, gpu):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(folder, "pick_device", lambda name: torch.device("cpu" if name == "cpu" else "cuda"))
    assert provenance(argparse.Namespace(device=device))["hardware"]["gpu"] == gpu


def test_a_run_alone_on_the_second_gpu_makes_it_the_present_one(monkeypatch):
    chosen = []  # the one whose generator a checkpoint keeps
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert init_distributed(torch.device("cuda", 1)) == torch.device("cuda", 1) == chosen[0]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_call_of_a_steady_step_waits_for_the_gpu(kind):
    device = torch.device("cuda")
    task = digits(device, num_meta=80)  # five meta batches, since the host waits where it reorders the meta images
    steps = loop(parts(kind, task, fused=False, device=device), task)
    for _ in range(3):
        next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
