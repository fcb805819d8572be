"""--gamma measured and --lr measured in the real scripts."""

import json
from types import SimpleNamespace

import pytest
from test_distributed import start
from test_scripts import META_TEST, META_TRAIN, SMALL, TEXT, call, results, run, same
from torch import nn

from mlr_snet import lr_scale
from mlr_snet_scale import MeasuredScale
from training.measuring import measure

SHORT = [*SMALL, "--num-epoch", "2"]
MOMENTUM = [*SHORT, "--momentum", "0.9"]


def scale_of(folder):
    return json.loads((folder / "lr_scale.json").read_text())


def test_auto_measures_with_momentum_and_uses_the_papers_formula_without(tmp_path, capsys):
    done = call(capsys, META_TEST, *MOMENTUM, "--out", tmp_path / "momentum")
    record = scale_of(tmp_path / "momentum")
    assert done.returncode == 0
    assert f"after {record['num_steps']} steps" in done.stdout and "the run has 8\n" in done.stdout
    assert 0 < record["scale"] < 5 and 176 < record["num_steps"] <= 180 and len(record["trials"]) == 5
    assert (tmp_path / "momentum" / "lr_scale.png").stat().st_size > 10_000
    cost = json.loads((tmp_path / "momentum" / "cost.json").read_text())
    assert cost["measuring_steps"] == record["num_steps"] and cost["backward_passes"] == record["num_steps"] + 8
    assert call(capsys, META_TEST, *SHORT, "--out", tmp_path / "plain").returncode == 0
    assert not (tmp_path / "plain" / "lr_scale.json").exists()


def test_a_run_with_the_measured_scale_equals_one_that_is_given_the_number(tmp_path, capsys):
    arguments = [*SHORT, "--optimizer", "adamw", "--num-meta", "100", "--t-val", "2"]
    assert call(capsys, META_TRAIN, *arguments, "--out", tmp_path / "measured").returncode == 0
    gamma = 2 * scale_of(tmp_path / "measured")["scale"]  # an untrained net starts at the measured peak
    assert call(capsys, META_TRAIN, *arguments, "--gamma", gamma, "--out", tmp_path / "number").returncode == 0
    same(results(tmp_path / "measured"), results(tmp_path / "number"))


SHORT_TEXT = [*TEXT, "--num-epoch", "2", "--limit-train", "4000", "--limit-test", "500"]


def test_a_t_val_at_which_nothing_would_be_learned_is_refused_before_measuring(tmp_path, capsys):
    done = call(capsys, META_TRAIN, *MOMENTUM, "--num-meta", "100", "--t-val", "300", "--out", tmp_path)
    assert done.returncode == 2 and "nothing would be learned; lower --t-val" in done.stderr and done.stdout == ""


def test_a_batch_of_one_image_is_named_while_measuring(tmp_path, capsys):
    words = ["--network", "resnet", "--dataset", "digits", "--limit-train", "1", "--num-epoch", "1"]
    done = call(capsys, META_TEST, *words, "--momentum", "0.9", "--out", tmp_path)
    assert done.returncode == 2 and "batch of one image; change --batch-size" in done.stderr


@pytest.mark.parametrize("modality", [SHORT, SHORT_TEXT])
def test_a_baseline_starts_at_the_measured_rate(tmp_path, capsys, modality):
    done = call(capsys, META_TEST, *modality, "--schedule", "fixed", "--lr", "measured", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rates = [float(row.split(",")[1]) for row in results(tmp_path / "run")[0][1:]]
    assert rates == pytest.approx([scale_of(tmp_path / "run")["scale"]] * 2)


def test_where_the_loss_falls_at_no_rate_a_guess_is_used_and_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mlr_snet_scale.CLEARLY", 1000)
    out = tmp_path / "run"
    done = call(capsys, META_TEST, *MOMENTUM, "--schedule", "fixed", "--lr", "measured", "--out", out)
    assert done.returncode == 0 and "is a guess, not measured" in done.stderr
    record = scale_of(out)
    assert "falls clearly at no learning rate" in record["refusal"]
    losses = record["trials"][0]["losses"][:20]
    assert record["scale"] == pytest.approx(lr_scale(sum(losses) / 20, 10) / 2 * 1.5 * 0.1)  # the guess
    assert len(record["trials"]) == 1 and (out / "lr_scale.png").exists()
    assert [float(row.split(",")[1]) for row in results(out)[0][1:]] == pytest.approx([record["scale"]] * 2)
    assert call(capsys, META_TEST, "--resume", "--out", out).returncode == 0


@pytest.mark.parametrize(("num_classes", "perplexity", "clip"), [(10, False, None), (6397, True, 0.25)])
def test_measuring_is_told_the_clipping_and_the_classes_of_the_task(monkeypatch, num_classes, perplexity, clip):
    told = {}
    monkeypatch.setattr("training.measuring.TrainStream", lambda task, network: None)

    def find(network, optimizer, next_loss, num_steps, max_norm, **rest):
        told.update(num_steps=num_steps, max_norm=max_norm, **rest)
        return MeasuredScale(0.1, [])

    task = SimpleNamespace(num_classes=num_classes, perplexity=perplexity, clip=clip, steps_per_epoch=7)
    monkeypatch.setattr("training.measuring.measure_lr_scale", find)
    measure(SimpleNamespace(resume=False, num_epoch=3), task, nn.Linear(1, 1), None)
    assert told == {"num_steps": 21, "max_norm": clip, "num_classes": num_classes, "perplexity": perplexity}


def test_resume_does_not_measure_again(tmp_path, capsys, monkeypatch):
    from training import measuring

    out = tmp_path / "run"
    assert call(capsys, META_TEST, *MOMENTUM, "--out", out).returncode == 0
    monkeypatch.setattr(measuring, "TrainStream", None)
    assert call(capsys, META_TEST, "--resume", "--out", out).returncode == 0
    record = scale_of(out)
    (out / "lr_scale.json").write_text(json.dumps(record | {"scale": 2 * record["scale"]}))
    done = call(capsys, META_TEST, "--resume", "--out", out)
    assert done.returncode == 2 and "the run began with" in done.stderr
    (out / "lr_scale.json").write_text("{}")
    done = call(capsys, META_TEST, "--resume", "--out", out)
    assert done.returncode == 2 and "lr_scale.json" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_two_ranks_measure_the_scale_of_one_process(tmp_path):
    """A language model without dropout: no BatchNorm statistics that differ between the ranks."""
    arguments = [*TEXT, "--num-epoch", "1", "--limit-train", "4000", "--dropout", "0", "--gamma", "measured"]
    process = start(META_TEST, *arguments, "--out", tmp_path / "two")
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert run(META_TEST, *arguments, "--out", tmp_path / "one").returncode == 0
    two, one = scale_of(tmp_path / "two"), scale_of(tmp_path / "one")
    assert two["trials"][0]["losses"][:60] == pytest.approx(one["trials"][0]["losses"][:60], rel=1e-3)
    assert two["scale"] == pytest.approx(one["scale"], rel=0.3)


@pytest.mark.parametrize("schedule", ["prodigy", "l4mom"])
def test_a_measured_rate_for_a_schedule_without_one_is_refused(tmp_path, capsys, schedule):
    done = call(capsys, META_TEST, *SHORT, "--schedule", schedule, "--lr", "measured", "--out", tmp_path / "run")
    assert done.returncode == 2 and "leave" in done.stderr.splitlines()[-1]
