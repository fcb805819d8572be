"""Real runs of both scripts on the digits and on Python's documentation."""

import csv
import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from baselines import SCHEDULES
from data.text import pydoc

ROOT = Path(__file__).resolve().parents[1]
META_TRAIN, META_TEST = ROOT / "meta-train" / "meta-train.py", ROOT / "meta-test" / "meta-test.py"
SMALL = ["--network", "resnet8", "--dataset", "digits", "--limit-train", "256", "--limit-test", "60",
         "--batch-size", "64", "--num-epoch", "3", "--device", "cpu"]
TEXT = ["--network", "lstm2", "--dataset", "pydoc", "--embed-size", "64", "--dropout", "0.1", "--batch-size", "4",
        "--limit-train", "20000", "--num-epoch", "3", "--device", "cpu"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # the nets are small, and the cores may be busy
TRAIN = [*SMALL, "--num-meta", "100", "--t-val", "2", "--momentum", "0.5"]


def run(script, *arguments, cwd=ROOT):
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, env=ONE_THREAD)


class Done(NamedTuple):
    returncode: int
    stderr: str
    stdout: str


def call(capsys, script, *arguments):
    """The script's main() in this process, which spares the seconds of a start."""
    spec = importlib.util.spec_from_file_location("script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        status = module.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    printed = capsys.readouterr()
    return Done(status, printed.err, printed.out)


def results(folder):
    """The metrics without their seconds, and the learned nets."""
    rows = [line.rsplit(",", 1)[0] for line in (folder / "metrics.csv").read_text().splitlines()]
    nets = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("mlr_snet_*.pth"))}
    return rows, nets


def same(one, other):
    (rows, nets), (other_rows, other_nets) = one, other
    assert rows == other_rows and nets.keys() == other_nets.keys()
    for name, net in nets.items():
        assert all(torch.equal(value, other_nets[name][key]) for key, value in net.items())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "reference"
    done = run("meta-train.py", *TRAIN, "--out", folder, cwd=META_TRAIN.parent)  # the others start elsewhere
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_folder_holds_all_it_should(reference):
    names = {path.name for path in reference.iterdir()}
    assert {"args.json", "metrics.csv", "checkpoint.pth", "run.png", "mlr_snet_1.pth", "mlr_snet_3.pth"} <= names
    header = (reference / "metrics.csv").read_text().splitlines()[0]
    assert header == "epoch,lr,train_loss,train_acc,test_loss,test_acc,seconds"


def kill_and_resume(arguments, out, kill, environment=ONE_THREAD):
    process = subprocess.Popen([sys.executable, str(META_TRAIN), *arguments, "--out", str(out)], cwd="/",
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    deadline = time.monotonic() + 120
    while not (out / "mlr_snet_1.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, kill)
    process.communicate(timeout=60)
    assert process.returncode == (-kill if kill == signal.SIGKILL else 128 + kill)
    done = run(META_TRAIN, "--resume", "--out", out)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kill", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_end_with_deterministic_algorithms_too(reference, tmp_path, kill):
    kill_and_resume([*TRAIN, "--deterministic"], tmp_path / "killed", kill)
    same(results(reference), results(tmp_path / "killed"))


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "language"
    done = run(META_TRAIN, *TEXT, "--t-val", "20", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_meta_training_on_text_ends_well_below_a_unigram_model_and_moves_the_rate(language):
    data = pydoc(Path(), "word")
    counts = data.train[1:].bincount(minlength=len(data.vocabulary)).double() + 1
    unigram = (-(counts / counts.sum()).log()[data.test[1:]].mean()).exp().item()
    rows = list(csv.DictReader((language / "metrics.csv").open()))
    assert float(rows[-1]["test_ppl"]) < 0.8 * unigram
    rates = [float(row["lr"]) for row in rows]
    assert max(rates) > 1.1 * min(rates)  # every Python has another text


def test_a_killed_language_run_resumes_to_the_same_end_with_its_states_and_dropout(language, tmp_path):
    kill_and_resume([*TEXT, "--t-val", "20"], tmp_path / "killed", signal.SIGTERM)
    same(results(language), results(tmp_path / "killed"))


@pytest.mark.parametrize("choice", [["--nets", "images"], ["--schedule", "val", "--lr", "20"]])
def test_a_schedule_learned_on_images_and_the_val_strategy_drive_a_language_model(reference, tmp_path, choice, capsys):
    choice = [reference if word == "images" else word for word in choice]
    done = call(capsys, META_TEST, *TEXT, "--num-epoch", "2", *choice, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    header, *rows = results(tmp_path / "run")[0]
    assert header == "epoch,lr,train_loss,train_ppl,valid_ppl,test_loss,test_ppl" and len(rows) == 2


def test_a_schedule_learned_on_text_drives_an_image_network(language, tmp_path, capsys):
    done = call(capsys, META_TEST, *SMALL, "--nets", language, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr


def test_a_batch_of_one_image_is_not_called_divergence(tmp_path, capsys):
    words = ["--network", "resnet", "--dataset", "digits", "--limit-train", "1", "--num-epoch", "1"]
    done = call(capsys, META_TEST, *words, "--schedule", "fixed", "--out", tmp_path)
    assert done.returncode == 2 and "BatchNorm cannot train on a batch of one image" in done.stderr


def test_a_bug_in_a_rival_is_not_called_divergence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SCHEDULES["fixed"], "factor", lambda self, epoch: math.log(epoch))
    with pytest.raises(ValueError, match="math domain error|expected a positive input"):
        call(capsys, META_TEST, *SMALL, "--schedule", "fixed", "--out", tmp_path)


@pytest.mark.parametrize("schedule", ["shipped", "recommended", "learned", "multistep", "rtho"])
def test_meta_test_runs_with_shipped_nets_with_a_runs_and_with_baselines(reference, tmp_path, schedule, capsys):
    choice = {"shipped": [], "recommended": ["--nets", "recommended"], "learned": ["--nets", reference],
              "multistep": ["--schedule", "multistep"], "rtho": ["--schedule", "rtho", "--num-meta", "100"]}[schedule]
    done = call(capsys, META_TEST, *SMALL, *choice, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert len(results(tmp_path / "run")[0]) == 4
    assert call(capsys, META_TEST, *SMALL[:4], "--resume", "--out", tmp_path / "run").returncode == 0


def test_a_run_that_diverges_says_where_and_keeps_its_last_checkpoint(tmp_path, capsys):
    done = call(capsys, META_TEST, *SMALL, "--schedule", "fixed", "--lr", "1e30", "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "step 2" in done.stderr and "1e+30" in done.stderr and "Traceback" not in done.stderr


def test_a_run_says_what_it_trains_on_and_warns_where_a_short_one_raises_gamma(tmp_path, capsys):
    words = ["--network", "resnet20", "--dataset", "digits", "--num-meta", "100", "--device", "cpu"]
    done = call(capsys, META_TEST, *words, "--num-epoch", "1", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "1,337 training, 100 held-out and 360 test images; 11 steps an epoch" in done.stdout
    assert "gamma has risen from" in done.stderr


def test_torch_hub_gives_the_scheduler_and_the_net():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.hub.load(str(ROOT), "mlr_snet_lr", optimizer, 6, num_classes=10, source="local")
    schedule.step(2.3)
    assert 0 < schedule.get_last_lr()[0] < schedule.gamma
    net = torch.hub.load(str(ROOT), "mlr_snet", source="local")
    assert sum(parameter.numel() for parameter in net.parameters()) == 11776


def test_a_run_that_tests_every_second_epoch_leaves_the_others_empty_and_resumes(tmp_path, capsys):
    words = [*SMALL[:-4], "--num-epoch", "3", "--device", "cpu", "--num-meta", "100", "--t-val", "2", "--average"]
    assert call(capsys, META_TRAIN, *words, "--out", tmp_path / "each").returncode == 0
    assert call(capsys, META_TRAIN, *words, "--test-every", "2", "--out", tmp_path / "some").returncode == 0
    kill_and_resume([*words, "--test-every", "2"], tmp_path / "killed", signal.SIGKILL)
    each, some, killed = (list(csv.DictReader((tmp_path / name / "metrics.csv").open()))
                          for name in ("each", "some", "killed"))
    tested = ("test_loss", "test_acc", "test_acc_average")
    for number, (whole, row, resumed) in enumerate(zip(each, some, killed, strict=True), 1):
        expected = {name: "" if name in tested and number == 1 else whole[name] for name in whole}
        assert row | {"seconds": ""} == resumed | {"seconds": ""} == expected | {"seconds": ""}
    assert (tmp_path / "some" / "run.png").stat().st_size > 5_000
