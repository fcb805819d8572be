"""The benchmark: its textbook lookahead is an oracle of the project's meta step; its record holds what it promises."""

import json
import subprocess
import sys

import pytest
import torch
from benchmark import MEASUREMENTS, SCRIPT, STEPS, alternate, main, textbook_gradient
from test_mlr_snet import OPTIMIZERS, ToyTask, loss_on, small_network, trained
from test_scripts import ONE_THREAD

from data.meta_stream import MetaStream, schedule_arguments
from mlr_snet import MetaMLRSNetLR, MLRSNet

SMALL = ["--network", "resnet8", "--dataset", "digits", "--batch-size", "16", "--rounds", "2", "--epoch-steps", "3",
         "--device", "cpu"]
IN_THIS_PROCESS = [name for name in MEASUREMENTS if name != "memory"]
DECAY = 0.01  # the weight decay of OPTIMIZERS


@pytest.mark.parametrize("to_all", [False, True])
def test_the_textbook_lookahead_moves_theta_as_the_project_does(to_all):
    torch.manual_seed(1)
    network, optimizer = trained(OPTIMIZERS["sgd"])
    net = MLRSNet().double()
    schedule = MetaMLRSNetLR(
        optimizer, net, network, MetaStream(ToyTask(), network), **schedule_arguments(ToyTask(), 1), t_val=1,
        weight_decay=0.0, gamma=0.5,
    )
    schedule.state = torch.rand_like(schedule.state)  # so that every tensor of θ has a gradient

    def train_loss(point):
        return loss_on(point, 2)  # whose gradient lies in .grad

    textbook_gradient(network, net, schedule.state, 0.5, train_loss, lambda point: loss_on(point, 1000), DECAY, to_all)
    textbook = [parameter.grad.clone() for parameter in net.parameters()]
    assert all(gradient.abs().max() > 0 for gradient in textbook)
    schedule.step(train_loss(network))
    for parameter, expected in zip(net.parameters(), textbook, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-14)


def test_the_textbook_lookahead_leaves_the_network_as_it_was_to_the_bit():
    network, net = small_network(), MLRSNet(6).double()
    loss_on(network, 0).backward()

    def snapshot():
        return [tensor.clone() for tensor in (*network.state_dict().values(), *(p.grad for p in network.parameters()))]

    before = snapshot()
    losses = (lambda point: loss_on(point, 1)), (lambda point: loss_on(point, 2))
    textbook_gradient(network, net, net.initial_state(), 0.5, *losses, DECAY)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))


def test_the_variants_take_turns_and_change_their_order_every_round():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = alternate(variants, 3, torch.device("cpu"), {"a": 1, "b": 2})
    assert "".join(calls) == "aabb" + "abb" + "bba" + "abb"  # after the warm-up
    assert [len(values) for values in times.values()] == [3, 3]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    assert main([*SMALL, "--only", *IN_THIS_PROCESS, "--out", str(out)]) == 0
    return json.loads((out / "benchmark.json").read_text()), (out / "benchmark.md").read_text()


def test_every_figure_comes_with_its_rounds_and_quartiles(record):
    measurements = record[0]["measurements"]
    assert list(measurements) == IN_THIS_PROCESS
    for measurement in measurements.values():
        for row in measurement["results"].values():
            for figure in row.values():
                low, high = figure["quartiles"]
                assert len(figure["rounds"]) == 2 and low <= figure["median"] <= high


def test_ratios_are_positive_and_taken_to_the_first_variant(record):
    for name in ("meta-step", "epoch", "precision", "input"):
        rows = list(record[0]["measurements"][name]["results"].values())
        assert rows[0]["ratio"]["rounds"] == [1, 1]
        assert all(min(row["ratio"]["rounds"]) > 0 for row in rows)


def test_the_record_and_the_page_say_where_they_come_from(record):
    data, page = record
    assert data["provenance"]["arguments"]["network"] == "resnet8" and data["device"] == "cpu"
    assert data["provenance"]["commit"] in page and "--network resnet8" in page
    assert all(f"## {name}" in page for name in IN_THIS_PROCESS)


def run(*arguments, cwd):
    command = [sys.executable, str(SCRIPT), *SMALL, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, env=ONE_THREAD)


def test_a_fresh_process_answers_with_the_memory_of_one_variant(tmp_path):
    done = run("--memory-of", "meta step", cwd=tmp_path)
    assert done.returncode == 0 and float(done.stdout) > 0, done.stderr


@pytest.mark.slow
def test_the_memory_of_every_variant_is_measured_from_any_folder(tmp_path):
    done = run("--only", "memory", "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "here" / "benchmark.json").read_text())["measurements"]["memory"]["results"]
    assert list(results) == list(STEPS) and all(min(row["ratio"]["rounds"]) > 0 for row in results.values())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--batch-size", "1000"], "give at most 718"),
        (["--dataset", "pydoc"], "pydoc"),
        (["--rounds", "0"], "at least 1"),
        (["--out", str(SCRIPT)], "benchmark.py"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(capsys, arguments, reason):
    with pytest.raises(SystemExit) as exit:
        main([*SMALL, *arguments])
    message = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and "error:" in message and reason in message
