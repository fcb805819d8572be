"""Tables: their runs, what they say, and that stopping one changes nothing."""

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from race import KNOWS_ITS_LENGTH, METHODS, Cell, Race
from report import by_problem, summarise

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tables" / "tables.py"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tables"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, number in (("train", 190), ("test", 50)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def start(name, out, *more):
    arguments = ["--table", name, "--preset", "smoke", "--jobs", "2", "--out", out, *more]
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check(tables, name, out, image_folder, every):
    more = ["--set", f"data-root={image_folder}"] if name == "own" else []
    chosen = [] if every else tables.TABLES[name].methods[:2]
    cells = tables.cells_of(tables.TABLES[name], "smoke", 1, chosen, {})
    process = start(name, out, "--seeds", "1", *(["--only", *chosen] if chosen else []), *more)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    folder = out / f"{name}-smoke"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert len(rows) == len(cells)
    for row in rows:
        if float(row["finished"]):
            assert float(row["last_mean"]) > 0
    assert (folder / "table.png").stat().st_size > 10_000
    assert "commit" in (folder / "table.md").read_text()


NAMES = ["cifar10-resnet", "cifar100-wideresnet", "ptb-lstm2", "ptb-lstm3", "networks", "datasets", "imagenet",
         "epochs", "t-val", "horizon", "horizon-text", "own"]


def test_every_table_is_tested_here(tables):
    assert sorted(tables.TABLES) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_smoke_of_a_table_runs_and_draws(tables, tmp_path, image_folder, name):
    check(tables, name, tmp_path, image_folder, every=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_smoke_of_a_table_runs_with_all_its_methods(tables, tmp_path, image_folder, name):
    check(tables, name, tmp_path, image_folder, every=True)


def test_a_table_killed_and_started_again_gives_the_same_csv(tmp_path):
    arguments = ["--seeds", "1", "--only", "fixed"]
    left_alone = start("epochs", tmp_path / "whole", *arguments)
    left_alone.communicate(timeout=600)
    first = start("epochs", tmp_path / "killed", *arguments)
    runs = tmp_path / "killed" / "epochs-smoke" / "runs"
    deadline = time.monotonic() + 120
    while not list(runs.glob("*/metrics.csv")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGTERM)
    first.communicate(timeout=120)
    assert first.returncode == 130
    second = start("epochs", tmp_path / "killed", *arguments)
    output = second.communicate(timeout=600)[0]
    assert second.returncode == 0, output
    one, other = (tmp_path / name / "epochs-smoke" / "table.csv" for name in ("whole", "killed"))
    assert one.read_text() == other.read_text()


def test_a_table_says_what_its_runs_say(tmp_path):
    arguments = {"num-epoch": "2", "network": "resnet8", "dataset": "digits"}
    cells = [
        Cell("line", method, seed, tuple(arguments.items()), 2)
        for method in ("fixed", "cosine")
        for seed in (0, 1)
    ]
    accuracies = {"fixed": [(50, 60), (70, 64)], "cosine": [(61, 70), (63, 66)]}
    race = Race(cells, tmp_path, 1)
    for cell in cells:
        folder = tmp_path / cell.name
        folder.mkdir()
        lines = [f"{n},0.1,1.0,50,1.0,{a},2.0" for n, a in enumerate(accuracies[cell.method][cell.seed], 1)]
        header = "epoch,lr,train_loss,train_acc,test_loss,test_acc,seconds"
        (folder / "metrics.csv").write_text("\n".join([header, *lines]))
        (folder / "status.json").write_text('{"status": "done"}')
        passes = 10 if cell.method == "fixed" else 15
        (folder / "cost.json").write_text(
            f'{{"steps_per_epoch": 5, "forward_passes": {passes}, "backward_passes": 10, "peak_memory_mib": 100}}'
        )
    fixed, cosine = summarise(race, None)
    assert (fixed["last_mean"], fixed["best_mean"], cosine["last_mean"]) == (62, 65, 68)
    assert fixed["last_std"] == pytest.approx(8**0.5)
    assert cosine["target"] == 62 and cosine["reached"] == 2 and cosine["steps_to_target"] == 7.5
    assert cosine["seconds_to_target"] == 3.0 and cosine["relative_forward_passes"] == 1.5


@pytest.mark.parametrize("methods", [
    ["average 3", "sgdr"],
    pytest.param([name for name in METHODS if name not in KNOWS_ITS_LENGTH], marks=pytest.mark.slow),
])
def test_a_method_that_does_not_know_its_length_begins_a_long_run_like_a_short_one(tmp_path, methods):
    smoke = {"network": "resnet8", "dataset": "digits", "limit-train": "100", "limit-test": "50", "batch-size": "25",
             "num-meta": "50", "average": ""}

    def cells(run_length):
        return [Cell("line", method, 0, tuple({**smoke, "num-epoch": run_length}.items()), 1) for method in methods]

    short, long = Race(cells("1"), tmp_path, 2), Race(cells("2"), tmp_path, 2)
    for race in (short, long):
        for cell in race.cells:
            race._run(cell)
    for one, other in zip(short.cells, long.cells, strict=True):
        (row,), (begun,) = short.rows(one), long.rows(other)
        assert {**row, "seconds": 0} == {**begun, "seconds": 0}, one.method


def test_a_long_run_serves_the_shorter_lines(tables):
    cells = tables.cells_of(tables.TABLES["horizon"], "smoke", 1, ["average 3", "onecycle"], {})
    shared, own = ([cell for cell in cells if cell.method == name] for name in ("average 3", "onecycle"))
    assert len({cell.name for cell in shared}) == 1 and [cell.is_whole for cell in shared] == [False, True]
    assert len({cell.name for cell in own}) == 2 and all(cell.is_whole for cell in own)


@pytest.mark.parametrize(
    ("table", "change"), [("horizon", "num-epoch=2"), ("networks", "network=resnet8"), ("own", "x")]
)
def test_changes_that_cannot_be_are_one_line_and_status_2(tables, capsys, table, change):
    with pytest.raises(SystemExit) as exit:
        tables.main(["--table", table, "--set", change])
    assert exit.value.code == 2 and "error: --set" in capsys.readouterr().err


def test_a_picture_by_problem_has_every_whole_run_once(tables):
    cells = tables.cells_of(tables.TABLES["horizon"], "smoke", 1, ["fixed", "average 3", "onecycle"], {})
    records = [
        {"problem": "p", "method": cell.method, "epochs": cell.num_epochs, "is_whole": cell.is_whole}
        for cell in cells
    ]
    drawn = by_problem(records, ["onecycle", "fixed"])
    assert [record["method"] for record in drawn] == ["onecycle of 2", "onecycle of 3", "fixed"]
    assert {record["group"] for record in drawn} == {"p"}


def test_a_cell_that_cannot_run_ends_the_table_with_its_line(tables, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        tables.main(["--table", "own", "--preset", "smoke", "--seeds", "1", "--only", "fixed", "--out", str(tmp_path),
                     "--set", f"data-root={tmp_path}/none"])
    assert exit.value.code == 2 and "none/train" in capsys.readouterr().err
