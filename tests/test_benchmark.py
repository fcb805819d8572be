"""The benchmark: its textbook lookahead is an oracle of the project's meta step; its record holds what it promises."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from studies.benchmark import MEASUREMENTS, SCRIPT, STEPS, added_memory_mib, alternate, cell, main
from studies.benchmark_steps import textbook_gradient
from test_mlr_snet import OPTIMIZERS, ToyTask, loss_on, small_network, trained
from test_scripts import ONE_THREAD
from writing import read_csv, read_jsonl

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
def result(tmp_path_factory):
    """The header of runs.jsonl, the rows of metrics.csv, and the page."""
    out = tmp_path_factory.mktemp("benchmark")
    assert main([*SMALL, "--only", *IN_THIS_PROCESS, "--out", str(out)]) == 0
    (header,) = read_jsonl(out / "runs.jsonl")
    return header, read_csv(out / "metrics.csv"), (out / "README.md").read_text()


def test_every_number_comes_with_its_rounds(result):
    _, rows, _ = result
    assert list(dict.fromkeys(row["measurement"] for row in rows)) == IN_THIS_PROCESS
    rounds = {}
    for row in rows:
        rounds.setdefault((row["measurement"], row["variant"], row["column"]), []).append(row["round"])
    assert all(places == ["1", "2"] for places in rounds.values())


def test_ratios_are_positive_and_taken_to_the_first_variant(result):
    for name in ("meta-step", "epoch", "precision", "input"):
        ratios = [row for row in result[1] if row["measurement"] == name and row["column"] == "ratio"]
        assert [float(row["value"]) for row in ratios if row["variant"] == ratios[0]["variant"]] == [1, 1]
        assert all(float(row["value"]) > 0 for row in ratios)


def test_a_cell_is_the_median_and_the_quartiles_where_the_rounds_differ():
    assert cell("ratio", [1.0, 3.0, 2.0, 5.0, 4.0]) == "3.00 (2.00 to 4.00)"
    assert cell("ms", [1234.0, 1234.0]) == "1,234" and cell("ms", None) == "–"


def test_the_header_and_the_page_say_where_they_come_from(result):
    header, _, page = result
    assert header["arguments"]["network"] == "resnet8" and header["device"] == "cpu"
    assert header["commit"] in page and "--network resnet8" in page
    assert all(f"## {name}" in page for name in IN_THIS_PROCESS)


def run(*arguments, cwd):
    command = [sys.executable, str(SCRIPT), *SMALL, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, env=ONE_THREAD)


def test_a_fresh_process_answers_with_the_memory_of_one_variant(tmp_path):
    done = run("--memory-of", "meta step", cwd=tmp_path)
    assert done.returncode == 0 and float(done.stdout) > 0, done.stderr


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, which forgets a peak on request")
def test_memory_that_was_held_before_does_not_count(monkeypatch):
    monkeypatch.setitem(STEPS, "nothing", lambda setting: lambda: None)
    held = bytearray(300 * 2**20)
    del held
    assert added_memory_mib(SimpleNamespace(device=torch.device("cpu")), "nothing") < 100


@pytest.mark.slow
def test_the_memory_of_every_variant_is_measured_from_any_folder(tmp_path):
    done = run("--only", "memory", "--out", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "here" / "metrics.csv")
    assert list(dict.fromkeys(row["variant"] for row in rows)) == list(STEPS)
    assert all(float(row["value"]) > 0 for row in rows if row["column"] == "ratio")


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
