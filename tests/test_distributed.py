"""Ranks on the CPU: bit-identical to each other, and equal to one process; what ends one rank ends the run."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from on_ranks import RUNS
from test_scripts import META_TRAIN, ONE_THREAD, ROOT, TRAIN, results, run

import utils
from utils import shard


def start(*command, ranks=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*launcher, str(ranks), *map(str, command)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD)


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    folder, script = tmp_path_factory.mktemp("ranks"), ROOT / "tests" / "on_ranks.py"
    alone, process = run(script, folder), start(script, folder)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert alone.returncode == 0, alone.stderr
    return [torch.load(folder / f"{name}.pth") for name in ("0_of_2", "1_of_2", "0_of_1")]


@pytest.mark.parametrize("name", [f"{name} {make.__name__}" for make, names in RUNS.items() for name in names])
def test_two_ranks_are_bit_identical_and_equal_to_one_process_on_the_same_batches(ends, name):
    first, second, alone = (end[name] for end in ends)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        # loss, accuracy and the metrics come in single precision, and γ of text from the loss
        tolerance = 1e-5 if name in ("numbers", "metrics") else 1e-6
        torch.testing.assert_close(value, alone[name], rtol=tolerance, atol=tolerance)


def stopped_and_resumed(words, folder, ranks):
    """The weights at the end of an unbroken run, and of one that is stopped after its first epoch and resumed."""
    whole = start(META_TRAIN, *words, "--out", folder / "whole", ranks=ranks)
    output = whole.communicate(timeout=240)[0]
    assert whole.returncode == 0, output
    stopped = start(META_TRAIN, *words, "--out", folder / "stopped", ranks=ranks)
    wait_for(folder / "stopped" / "mlr_snet_1.pth")
    stopped.send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=120)[0]
    assert stopped.returncode != 0, output
    resumed = start(META_TRAIN, "--resume", "--out", folder / "stopped", ranks=ranks)
    output = resumed.communicate(timeout=240)[0]
    assert resumed.returncode == 0, output
    return [torch.load(folder / name / "network.pth") for name in ("whole", "stopped")]


# From three ranks on a sum depends on its order, and so on how the gradients are grouped.
@pytest.mark.slow
@pytest.mark.parametrize("words", [
    [*TRAIN, "--batch-size", "66", "--num-epoch", "8", "--gamma", "0.3"],
    ["--network", "lstm2", "--dataset", "pydoc", "--embed-size", "16", "--batch-size", "6", "--limit-train", "6000",
     "--limit-test", "700", "--num-epoch", "6", "--t-val", "5", "--device", "cpu"],
    [*TRAIN, "--network", "nasnet", "--image-size", "8", "--limit-train", "12", "--limit-test", "20",
     "--batch-size", "6", "--num-meta", "20", "--gamma", "0.3"],
], ids=["images", "text", "unused weights"])
def test_three_ranks_that_are_stopped_end_as_unbroken_ones(words, tmp_path):
    whole, stopped = stopped_and_resumed(words, tmp_path, ranks=3)
    assert all(torch.equal(stopped[name], value) for name, value in whole.items())


def test_the_shares_of_all_ranks_make_the_whole(monkeypatch):
    for ranks in (1, 2, 3, 8):
        for number in (1, 2, 7, 128):
            taken = []
            for me in range(ranks):
                monkeypatch.setattr(utils, "rank", lambda me=me: me)
                monkeypatch.setattr(utils, "world_size", lambda ranks=ranks: ranks)
                mine, is_duplicate = shard(number)
                assert len(range(number)[mine]) >= 1
                taken += [] if is_duplicate else range(number)[mine]
            assert taken == list(range(number))


# No BatchNorm and no dropout: what two ranks do is what one process does on the same batches.
EXACT = ["--network", "lstm2", "--dataset", "pydoc", "--embed-size", "16", "--dropout", "0", "--batch-size", "4",
         "--limit-train", "6000", "--limit-test", "700", "--num-epoch", "3", "--t-val", "5", "--device", "cpu"]
ON_RANKS = ROOT / "tests" / "run_on_ranks.py"


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A run of meta-train on two ranks, and the same in one process."""
    folder = tmp_path_factory.mktemp("exact")
    alone = run(META_TRAIN, *EXACT, "--out", folder / "one")
    process = start(ON_RANKS, META_TRAIN, *EXACT, "--out", folder / "two")
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert alone.returncode == 0, alone.stderr
    return folder


def test_both_ranks_of_the_real_script_learn_the_same_theta(exact):
    for epoch in (1, 2, 3):
        first = torch.load(exact / "two" / f"mlr_snet_{epoch}.pth")
        second = torch.load(exact / "two" / "rank1" / f"mlr_snet_{epoch}.pth")
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_real_script_on_two_ranks_equals_itself_in_one_process(exact):
    one, two = (list(csv.DictReader((exact / name / "metrics.csv").open())) for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for row, other in zip(one, two, strict=True):
        for name in row.keys() - {"seconds"}:
            # sums in another order, in single precision, over 129 steps
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4), name
    for name in ("mlr_snet_3.pth", "network.pth"):
        first, second = (torch.load(exact / folder / name) for folder in ("one", "two"))
        for key in first:
            torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=1e-4)


def test_ranks_that_differ_stop_at_the_start_with_one_line(tmp_path):
    process = start(ON_RANKS, "--apart", META_TRAIN, *EXACT, "--out", tmp_path / "run")
    output = process.communicate(timeout=240)[0]
    assert process.returncode != 0
    assert output.count("the ranks differ in weights and schedule at step 0") == 1


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Three folders of text: the second holds the words of the first, the third others, as many."""
    folder = tmp_path_factory.mktemp("texts")
    for name, words in (("one", "a b c d e f g\n"), ("same", "a b c d e f g\n"), ("other", "a b c d e g f\n")):
        (folder / name).mkdir()
        for split in ("train", "valid", "test"):
            (folder / name / f"{split}.txt").write_text(words * 60)
    return folder


def ends_of_ranks(flags, words, out):
    """Run meta-train on two ranks, the second with these flags as well; its exit status and its lines."""
    process = start(ON_RANKS, "--rank1", flags, META_TRAIN, *words, "--out", out)
    output = process.communicate(timeout=240)[0]
    return process.returncode, output


# The others would wait for each other.
@pytest.mark.parametrize("flags", [
    "--precision bf16", *[pytest.param(flags, marks=pytest.mark.slow) for flags in (
        "--t-val 1", "--batch-size 32", "--seed 1", "--limit-test 50", "--wd 0.1",
    )],
])
def test_ranks_with_different_arguments_are_refused_in_one_line(flags, tmp_path):
    status, output = ends_of_ranks(flags, TRAIN, tmp_path / "run")
    assert status != 0 and output.count("differs from rank to rank") == 1, output
    assert f"error: {flags.split()[0]} differs" in output and not (tmp_path / "run").exists()


WORDS = ["--network", "lstm2", "--dataset", "text", "--embed-size", "8", "--batch-size", "4", "--seq-len", "9",
         "--num-epoch", "1", "--device", "cpu", "--t-val", "5"]


def test_ranks_with_different_data_are_refused_in_one_line(texts, tmp_path):
    words = [*WORDS, "--data-root", texts / "one"]
    status, output = ends_of_ranks(f"--data-root {texts / 'other'}", words, tmp_path / "run")
    assert status != 0 and output.count("error: data differs from rank to rank") == 1, output
    assert not (tmp_path / "run").exists()


def test_ranks_may_have_the_same_data_in_different_places(texts, tmp_path):
    words = [*WORDS, "--data-root", texts / "one"]
    status, output = ends_of_ranks(f"--data-root {texts / 'same'}", words, tmp_path / "run")
    assert status == 0, output


@pytest.mark.slow
def test_an_error_that_only_the_second_rank_has_is_printed(tmp_path):
    for flags, message in (("--wd nan", "argument --wd"), ("--device cuda:99", "not available")):
        status, output = ends_of_ranks(flags, TRAIN, tmp_path / "run")
        assert status != 0 and output.count(message) == 1, output


def test_a_user_error_under_torchrun_is_printed_once(tmp_path):
    process = start(META_TRAIN, *TRAIN, "--limit-train", "9000", "--out", tmp_path / "run")
    output = process.communicate(timeout=240)[0]
    assert process.returncode != 0 and output.count("--limit-train 9000") == 1, output
    assert not (tmp_path / "run").exists()


def wait_for(path, timeout=120):
    deadline = time.monotonic() + timeout
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert path.exists()


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in Linux's /proc")
def test_a_rank_that_dies_ends_the_run_in_which_one_rank_wrote_and_one_process_completes_it(tmp_path):
    out = tmp_path / "run"
    process = start(META_TRAIN, *TRAIN, "--num-epoch", "25", "--average", "--out", out)
    wait_for(out / "mlr_snet_2.pth")  # the line of the first epoch is printed
    os.kill(children(process.pid)[1], signal.SIGKILL)
    killed = time.monotonic()
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and time.monotonic() - killed < 60
    assert output.count("epoch 1 ") == 1 and len(list(out.glob("events*"))) == 1
    assert '"ranks": 2' in (out / "args.json").read_text()
    assert 2 <= len(results(out)[0]) < 26
    done = run(META_TRAIN, "--resume", "--out", out)
    assert done.returncode == 0 and "resumed with ranks 1 instead of 2" in done.stderr, done.stderr
    assert len(results(out)[0]) == 26
