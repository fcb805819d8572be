"""Tables: their runs, what they say, and that stopping one changes nothing."""

import csv
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cells import Cell, cells_of
from cluster import build_executor
from PIL import Image
from race import CellRun, Race
from regret import profiled, regrets_of, summaries_of, write_regret, zero_marks
from report import by_problem, coloured, result_columns, summarise, write_markdown
from specs import GRIDS, KNOWS_ITS_LENGTH, METHODS, OLDER_NAMES, TABLES, Table

from training.folder import FolderLock

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


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


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
         "epochs", "t-val", "horizon", "horizon-text", "corruption", "label-noise", "sizes",
         "networks-measured", "full-size", "untuned", "own", "first"]


def test_every_table_is_tested_here(tables):
    assert sorted(tables.TABLES) == sorted(NAMES)


# --slow runs the smoke of every table, with all its methods.
@pytest.mark.parametrize("name", ["corruption", "label-noise", "sizes"])
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
    wait_for(lambda: list(runs.glob("*/metrics.csv")))
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
    race = Race(cells, tmp_path)
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
    ["sgdr"],
    pytest.param([name for name in METHODS if name not in KNOWS_ITS_LENGTH], marks=pytest.mark.slow),
])
def test_a_method_that_does_not_know_its_length_begins_a_long_run_like_a_short_one(tmp_path, methods):
    smoke = {"network": "resnet8", "dataset": "digits", "limit-train": "100", "limit-test": "50", "batch-size": "25",
             "num-meta": "50", "average": "", "device": "cpu"}

    def cells(run_length):
        return [Cell("line", method, 0, tuple({**smoke, "num-epoch": run_length}.items()), 1) for method in methods]

    short, long = Race(cells("1"), tmp_path), Race(cells("2"), tmp_path)
    for race in (short, long):
        for cell in race.cells:
            assert CellRun(cell.name, cell.command, tmp_path / cell.name, threads=1)() == ""
    for one, other in zip(short.cells, long.cells, strict=True):
        (row,), (begun,) = short.rows(one), long.rows(other)
        assert {**row, "seconds": 0} == {**begun, "seconds": 0}, one.method


def test_a_long_run_serves_the_shorter_lines():
    cells = cells_of(TABLES["horizon"], "smoke", 1, ["schedule-free", "onecycle"], {})
    shared, own = ([cell for cell in cells if cell.method == name] for name in ("schedule-free", "onecycle"))
    assert len({cell.name for cell in shared}) == 1 and [cell.is_whole for cell in shared] == [False, True]
    assert len({cell.name for cell in own}) == 2 and all(cell.is_whole for cell in own)


def test_a_run_serves_no_line_that_differs_in_more_than_its_length():
    cells = cells_of(TABLES["sizes"], "desk", 1, ["fixed"], {})
    assert [cell.num_epochs for cell in cells] == [30, 20, 12, 4] and all(cell.is_whole for cell in cells)


def write_run(race, cell, metric, results, averaged=None, steps=0):
    """A run folder whose epochs end with these results; `steps` were spent on measuring."""
    folder = race.folder / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    header = f"epoch,lr,train_loss,{metric},{metric}_average,seconds"
    rows = [f"{n},0.1,1.0,{value},{averaged or value},1.0" for n, value in enumerate(results, 1)]
    (folder / "metrics.csv").write_text("\n".join([header, *rows]))
    passes = 10 * cell.num_epochs + steps
    (folder / "cost.json").write_text(json.dumps({
        "steps_per_epoch": 10, "forward_passes": passes, "backward_passes": passes, "peak_memory_mib": 1,
    }))
    facts = {"hardware": {"gpu": None, "cpu": "a CPU", "threads": 1}, "commit": "abc", "versions": {"torch": "2"}}
    (folder / "args.json").write_text(json.dumps(facts))


@pytest.fixture
def two_problems(tmp_path):
    """Images with momentum and text with AdamW, two epochs. The best cosines end at 60 % and at perplexity 50."""
    methods = ["MLR-SNet (transferred, measured)", "cosine (measured)", "fixed"]
    lines = {
        "resnet8 digits, momentum": "network=resnet8 dataset=digits momentum=0.9",
        "gpt pydoc, AdamW": "network=gpt dataset=pydoc optimizer=adamw",
    }
    cells = cells_of(Table("t", methods, {"desk": "num-epoch=2"}, {"desk": lines}, has_regret=True), "desk", 1, [], {})
    race = Race(cells, tmp_path)
    accuracies = {"cosine 0.012": 45, "cosine 0.035": 50, "cosine 0.1": 60, "cosine 0.3": 40, "cosine 0.9": 10,
                  "MLR-SNet (transferred, measured)": 59.5, "cosine (measured)": 63, "fixed": 52}
    perplexities = {"cosine 0.0005": 300, "cosine 0.0014": 100, "cosine 0.004": 55, "cosine 0.012": 52,
                    "cosine 0.035": 50, "MLR-SNet (transferred, measured)": 60, "cosine (measured)": 51}
    for cell in cells:
        if cell.problem == "resnet8 digits":
            averaged = 58 if cell.method == "fixed" else None
            steps = 5 if "measured" in cell.method else 0
            write_run(race, cell, "test_acc", [10, accuracies[cell.method]], averaged, steps)
        elif cell.method == "fixed":
            write_run(race, cell, "test_ppl", [70])  # it diverged in the second epoch
        else:
            write_run(race, cell, "test_ppl", [70, perplexities[cell.method]])
        if cell.method == "cosine (measured)":
            scale = 0.2 if cell.problem == "resnet8 digits" else 0.007
            (tmp_path / cell.name / "lr_scale.json").write_text(json.dumps({"scale": scale}))
    return race


def test_regret_is_the_distance_from_the_best_cosine_of_the_grid(two_problems):
    records = summarise(two_problems, None)
    marks = zero_marks(records)
    assert {group: mark["method"] for group, mark in marks.items()} == {
        "resnet8 digits, momentum": "cosine 0.1", "gpt pydoc, AdamW": "cosine 0.035",
    }
    found = {(entry["method"], entry["weights"], entry["unit"]): entry["regret"] for entry in regrets_of(records)}
    assert found["MLR-SNet (transferred, measured)", "live", "points"] == pytest.approx(0.5)
    assert found["MLR-SNet (transferred, measured)", "live", "%"] == pytest.approx(20)
    assert found["cosine (measured)", "live", "points"] == pytest.approx(-3)
    assert found["cosine (measured)", "live", "%"] == pytest.approx(2)
    assert found["fixed", "live", "points"] == 8 and found["fixed", "averaged", "points"] == 2


def test_a_summary_of_regrets_counts_a_diverged_run_as_an_infinite_one(two_problems):
    summaries = summaries_of(regrets_of(summarise(two_problems, None)))
    best, *_, worst = [summary for summary in summaries if summary["weights"] == "live"]
    assert best["method"] == "cosine (measured)" and best["median"] == pytest.approx(-0.5) and best["close"] == 0.5
    assert best["worst %"] == pytest.approx(2) and best["relative_steps"] == pytest.approx((25 / 20 + 1) / 2)
    assert worst["method"] == "fixed" and worst["diverged"] == 1 and worst["mean %"] == float("inf")
    assert worst["mean points"] == 8 and worst["median"] == float("inf") and worst["close"] == 0


def test_the_page_of_regrets_names_the_best_peaks_and_the_measured_rates(two_problems):
    write_regret(two_problems.folder, two_problems, summarise(two_problems, None), [], "python tables.py")
    page = (two_problems.folder / "regret.md").read_text()
    assert "digits, momentum | 0.1 | 60.00 % | 0.2 | 2.00 |" in page
    assert "AdamW | 0.035 (the end of the grid) | 50.00 | 0.007 | 0.20 |" in page
    assert "| fixed | live | 8.00 | 8.00 | ∞ | ∞ | ∞ | 0 % | 1 | 1.00 |" in page and "commit abc" in page
    assert (two_problems.folder / "regret.png").stat().st_size > 10_000


def test_a_profile_shows_every_method_once_and_mlr_snet_first():
    names = ["a", "b", "a", "MLR-SNet (transferred)", *"cdefgh"]
    summaries = [{"method": name, "weights": f"{place}"} for place, name in enumerate(names)]
    shown = profiled(summaries, [])
    assert [summary["method"] for summary in shown] == ["MLR-SNet (transferred)", *"abcdefg"]
    assert shown[1]["weights"] == "0" and [summary["method"] for summary in profiled(summaries, ["b"])] == ["b"]


def test_the_peaks_of_a_grid_are_at_most_a_factor_of_3_apart():
    for peaks in GRIDS.values():
        values = [float(peak) for peak in peaks]
        assert all(low < high <= 3.0001 * low for low, high in zip(values, values[1:], strict=False))


def test_images_and_text_of_one_table_take_their_own_roots():
    cells = cells_of(TABLES["untuned"], "desk", 1, ["fixed"], {"image-root": "a", "text-root": "b"})
    roots = {(dict(cell.arguments)["dataset"], dict(cell.arguments)["data-root"]) for cell in cells}
    assert roots == {("folder", "a"), ("digits", "a"), ("text", "b")}
    assert not [flag for cell in cells for flag in cell.flags if flag in ("--image-root", "--text-root")]


@pytest.mark.parametrize(("line", "lr"), [("network=resnet8 dataset=digits", "0.5"),
                                          ("network=resnet8 dataset=digits momentum=0.9", "0.05"),
                                          ("network=gpt dataset=pydoc optimizer=adamw", "0.005")])
def test_a_constant_rate_is_that_of_the_optimizer(line, lr):
    table = Table("title", ["cosine (constant)"], {"smoke": "num-epoch=2"}, {"smoke": {"line": line}})
    (cell,) = cells_of(table, "smoke", 1, [], {})
    assert cell.flags[cell.flags.index("--lr") + 1] == lr


@pytest.mark.parametrize("name", ["untuned", "networks-measured", "full-size", "corruption", "label-noise", "sizes"])
def test_the_scripts_accept_every_run_of_a_table_at_home(tables, tmp_path, name):
    tables.check_cells(cells_of(TABLES[name], "desk", 1, [], {}))


def test_under_label_noise_a_table_shows_the_accuracy_on_the_true_labels(tables, tmp_path):
    cell = Cell("line", "fixed", 0, (("num-epoch", "1"), ("network", "resnet8"), ("dataset", "digits")), 1)
    race = Race([cell], tmp_path)
    write_run(race, cell, "test_acc", [50])
    plain_records = summarise(race, None)
    columns = "epoch,lr,train_loss,train_acc,train_clean_acc,test_acc,seconds"
    (tmp_path / cell.name / "metrics.csv").write_text(f"{columns}\n1,0.1,1.0,70,44,50,1.0")
    records = summarise(race, None)
    write_markdown(tmp_path / "table.md", TABLES["own"], race, records, "python tables.py")
    assert "| 50.00 | 50.00 | 70.00 | 44.00 |" in (tmp_path / "table.md").read_text()
    assert "train_clean_acc_mean" in result_columns(records)
    assert "train_clean_acc_mean" not in result_columns(plain_records)


@pytest.mark.parametrize(("wish", "threads"), [(None, "3"), ("1", "1")])
def test_a_run_has_its_share_of_the_cores_unless_the_environment_says_otherwise(tmp_path, monkeypatch, wish, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wish:
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
    (tmp_path / "script.py").write_text("import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'])")
    reason = CellRun("name", [str(tmp_path / "script.py")], tmp_path / "run", threads=3)()
    assert reason.startswith(f"name: {threads} ")


@pytest.mark.parametrize("table", ["cifar10-resnet-desk", "networks-desk", "horizon-desk", "horizon-text-desk",
                                   "wikitext-2-lstm2", "corruption-desk", "label-noise-desk", "sizes-desk"])
def test_committed_results_are_found_by_their_command(tables, table):
    folder = ROOT / "tables" / "results" / table
    command = shlex.split(re.search("Command: `(.*?)`", (folder / "table.md").read_text())[1])
    args = tables.parse_args(command[2:])
    cells = cells_of(TABLES[args.table], args.preset, args.seeds, args.only, args.overrides)
    assert {cell.name for cell in cells} == {run.name for run in (folder / "runs").iterdir()}


def test_every_spec_names_methods_and_lines_that_exist():
    assert set(OLDER_NAMES) <= set(METHODS) and not set(OLDER_NAMES.values()) & set(METHODS)
    for table in TABLES.values():
        named = [*table.methods, *table.text_methods, *table.only_in_t_val]
        assert "smoke" in table.presets
        for line, numbers in table.published.items():
            assert line in table.lines["paper"]
            named += numbers
        assert set(named) <= set(METHODS) and table.lines.keys() == table.presets.keys()


def test_a_table_says_what_its_data_and_network_are():
    folder = {"dataset": "folder", "data-root": "some/cifar10"}
    (cell,) = cells_of(TABLES["cifar10-resnet"], "desk", 1, ["fixed"], folder)
    assert cell.title == "ResNet-8 on CIFAR-10 images (class folder)" and cell.group == "resnet8 folder"
    cells = cells_of(TABLES["horizon"], "desk", 1, ["fixed"], {})
    assert cells[0].title == "ResNet-8 on CIFAR-10, 10 epochs"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--table", "horizon", "--set", "num-epoch=2"], "--set num-epoch: the lines of horizon differ in it"),
    (["--table", "networks", "--set", "network=resnet8"], "--set network: the lines of networks differ in it"),
    (["--table", "untuned", "--preset", "paper"], "--preset paper: untuned has only desk and smoke"),
    (["--table", "own", "--set", "x"], "--set x: give NAME=VALUE"),
    (["--table", "own", "--set", "num-epoch=abc"], "--set num-epoch: 'abc' is not a number at least 1"),
    (["--table", "own", "--set", "num-epoch=3", "num-epoch=4"], "--set num-epoch: duplicate"),
    (["--table", "own", "--set", "seed=1"], "--set seed: use --seeds"),
    (["--table", "own", "--set", "out=x"], "--set out: use --out"),
    (["--table", "own", "--set", "resume="], "--set resume: leave it out"),
    (["--table", "own", "--set", "lr=0.2"], "--set lr: the method 'cosine 0.5' sets it"),
    (["--table", "own", "--set", "colour=red"], "unrecognized arguments: --colour red"),
    (["--table", "own", "--set", "batch-size=0"], "--batch_size: 0: must be at least 1"),
    (["--table", "own", "--set", "wd="], "--wd: expected one argument"),
    (["--table", "own", "--set", "help="], "prints help"),
    (["--table", "own", "--target", "nan"], "--target: nan: must be at least 0"),
    (["--table", "own", "--only", "nothing"], "invalid choice: 'nothing'"),
    (["--table", "own", "--slurm-option", "partition=x"], "--slurm-option belongs to --slurm"),
    (["--table", "own", "--slurm", "--jobs", "2"], "--jobs is for one machine"),
    (["--table", "own", "--slurm", "--slurm-option", "x"], "--slurm-option x: give NAME=VALUE"),
    (["--table", "own", "--out", ""], "--out: give a folder"),
    (["--table", "own", "--out", "x" * 300], "File name too long"),
    (["--table", "own", "--out", str(SCRIPT)], "Not a directory"),
])
def test_bad_arguments_are_one_line_and_status_2_before_anything_runs(tables, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(Race, "_follow", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(SystemExit) as exit:
        tables.main(arguments)
    *usage, line = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and "error: " in line and message in line
    assert not usage or usage[0].startswith("usage:")


def test_a_picture_by_problem_has_every_whole_run_once():
    cells = cells_of(TABLES["horizon"], "smoke", 1, ["onecycle", "fixed"], {})
    records = [
        {"problem": "p", "problem_title": "P", "method": cell.method, "epochs": cell.num_epochs,
         "is_whole": cell.is_whole}
        for cell in cells
    ]
    drawn = by_problem(records)
    assert [record["label"] for record in drawn] == ["onecycle of 2", "onecycle of 3", "fixed"]
    assert {record["group"] for record in drawn} == {"p"}


def test_a_picture_colours_mlr_snet_and_the_best_others():
    names = ["a", "b", "c", "MLR-SNet (learning)"]
    records = [
        {"group": "g", "method": name, "label": name, "runs": [], "metric": "test_acc", "last_mean": last}
        for name, last in zip(names, (50, 70, 60, 10), strict=True)
    ]
    assert coloured(records, [], most=3) == ["b", "c", "MLR-SNet (learning)"]
    assert coloured(records, ["a"]) == ["a"]


def test_a_cell_that_cannot_run_ends_the_table_with_its_line_and_command(tables, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        tables.main(["--table", "own", "--preset", "smoke", "--seeds", "1", "--only", "fixed", "--out", str(tmp_path),
                     "--set", f"data-root={tmp_path}/none"])
    errors = capsys.readouterr().err
    assert exit.value.code == 2 and "none/train" in errors and "meta-test/meta-test.py --num-epoch 2" in errors


def test_a_run_that_diverges_ends_its_cell_and_not_the_table(tmp_path):
    process = start("cifar10-resnet", tmp_path, "--seeds", "1", "--only", "fixed", "adam", "--set", "wd=1e12")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    fixed, adam = csv.DictReader((tmp_path / "cifar10-resnet-smoke" / "table.csv").open())
    assert (fixed["finished"], adam["finished"]) == ("0", "1")
    assert "fixed (1 of 1 diverged)" in (tmp_path / "cifar10-resnet-smoke" / "table.md").read_text()


def test_a_locked_folder_names_its_holder_and_is_free_after_kill_9(tmp_path):
    code = f"""
import time
from pathlib import Path
from training.folder import FolderLock
lock = FolderLock(Path({str(tmp_path)!r}))
lock.acquire()
print("locked", flush=True)
time.sleep(60)"""
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    with pytest.raises(ValueError, match=rf"is in use by process {holder.pid} \(.*\); wait for it to end"):
        FolderLock(tmp_path).acquire()
    holder.kill()
    holder.wait()
    with FolderLock(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()} "):
        FolderLock(tmp_path).acquire()
    FolderLock(tmp_path).acquire()


def test_a_second_table_is_told_who_runs_the_first(tables, tmp_path, capsys):
    with FolderLock(tmp_path / "epochs-smoke"), pytest.raises(SystemExit) as exit:
        tables.main(["--table", "epochs", "--preset", "smoke", "--out", str(tmp_path)])
    assert exit.value.code == 2 and f"epochs-smoke is in use by process {os.getpid()}" in capsys.readouterr().err


def test_a_table_restarted_after_kill_9_waits_for_the_cell_that_still_runs(tmp_path):
    arguments = ["cifar10-resnet", tmp_path, "--seeds", "1", "--only", "fixed"]
    first = start(*arguments)
    runs = tmp_path / "cifar10-resnet-smoke" / "runs"
    wait_for(lambda: list(runs.glob("*/args.json")))
    first.kill()
    first.wait()
    (run,) = runs.iterdir()
    pid = int((run / ".lock").read_text().split()[0])
    os.kill(pid, signal.SIGSTOP)  # so that it still runs when the second table looks
    begun = (run / "args.json").stat().st_mtime_ns
    second = start(*arguments)
    assert f"waiting: {run} is in use by process {pid} " in second.stdout.readline()
    os.kill(pid, signal.SIGCONT)
    output = second.communicate(timeout=120)[0]
    assert second.returncode == 0, output
    assert json.loads((run / "status.json").read_text())["status"] == "done"
    assert [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()] == ["epoch", "1", "2"]
    assert (run / "args.json").stat().st_mtime_ns == begun


def test_slurm_without_submitit_is_one_line(tables, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit) as exit:
        tables.main(["--table", "epochs", "--preset", "smoke", "--slurm", "--out", str(tmp_path)])
    assert exit.value.code == 2 and "pip install submitit" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    ({"cluster": "moon"}, "cluster=moon: choose slurm, or local"),
    ({"cluster": "local", "partitoin": "x"}, "partitoin"),
    ({"cluster": "local", "cpus_per_task": "x"}, "cpus_per_task"),
])
def test_bad_slurm_options_are_one_line(tmp_path, options, message):
    pytest.importorskip("submitit")
    with pytest.raises(ValueError, match=message):
        build_executor(tmp_path, options)


def test_slurm_options_reach_the_batch_script(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    for name, text in (("srun", ""), ("sbatch", "echo Submitted batch job 7")):  # stand in for a cluster's commands
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "")
    executor = build_executor(tmp_path / "jobs", {"partition": "short", "gpus_per_node": "1", "timeout_min": "30"})
    executor.submit(CellRun("name", ["script.py"], tmp_path / "run", threads=1))
    (script,) = (tmp_path / "jobs").glob("*_submission.sh")
    lines = script.read_text().splitlines()
    for line in ("--partition=short", "--gpus-per-node=1", "--time=30", "--signal=USR2@90"):
        assert f"#SBATCH {line}" in lines


def test_a_job_near_its_time_limit_stops_at_a_checkpoint_and_a_new_one_resumes(tmp_path):
    pytest.importorskip("submitit")
    arguments = ["--table", "cifar10-resnet", "--preset", "smoke", "--seeds", "1", "--only", "fixed"]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--set", "num-epoch=8", "--out", str(tmp_path), "--slurm",
         "--slurm-option", "cluster=local"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    runs = tmp_path / "cifar10-resnet-smoke" / "runs"
    wait_for(lambda: list(runs.glob("*/metrics.csv")))
    (run,) = runs.iterdir()
    trainer = int((run / ".lock").read_text().split()[0])
    job = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{trainer}/status").read_text())[1])
    os.kill(job, signal.SIGUSR2)  # as Slurm does near the time limit
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    epochs = [line.split(",")[0] for line in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert epochs == [str(epoch) for epoch in range(1, 9)]
    (log,) = (tmp_path / "cifar10-resnet-smoke" / "jobs").glob("*_log.out")
    assert "Requeued" in log.read_text()
