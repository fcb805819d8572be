"""Tables: what they run, and that stopping one changes nothing."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cells import Cell, cells_of
from methods import GRIDS, METHODS
from PIL import Image
from race import CellRun, Race
from runs import read, rows_of
from specs import TABLES, Table, lines
from words import detail_of, problem_of
from writing import read_csv, read_toml

from tables import override
from training.folder import FolderLock

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tables" / "tables.py"
RESULTS = sorted((ROOT / "tables" / "results").iterdir())


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
    arguments = ["--table", name, "--preset=smoke", "--jobs", "2", "--out", out, *more]
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def check(name, out, image_folder, every):
    more = ["--set", f"data-root={image_folder}"] if name == "own" else []
    chosen = [] if every else TABLES[name].methods[:2]
    cells = cells_of(TABLES[name], "smoke", 1, chosen, {})
    process = start(name, out, "--seeds", "1", *(["--only", *chosen] if chosen else []), *more)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    folder = out / f"{name}-smoke"
    rows = read_csv(folder / "table.csv")
    assert len(rows) == sum(len(cell.lines) for cell in cells)
    assert all(float(row["last_mean"]) > 0 for row in rows if float(row["finished"]))
    picture = "regret.png" if TABLES[name].has_regret else "table.png"
    assert (folder / picture).stat().st_size > 5_000
    assert "A smoke: it shows that the table runs" in (folder / "README.md").read_text()
    assert f"1 of {len(cells)} runs: {cells[0].name.split('_')[0]}" in output  # without a terminal, a line for each


def test_a_list_flag_that_is_given_twice_adds_to_the_first(tables):
    args = tables.parse_args("--table own --set num-epoch=3 --set wd=0 --only fixed --only cosine".split())
    assert args.overrides == {"num-epoch": "3", "wd": "0"} and args.only == ["fixed", "cosine"]


@pytest.mark.parametrize("rows", ["epoch,lr\n1,x\n", "epoch,lr,train_loss,seconds\n1,0.1\n"])
def test_damaged_metrics_of_a_run_are_told_with_their_folder(tmp_path, capsys, tables, rows):
    (cell,) = cells_of(TABLES["own"], "smoke", 1, ["fixed"], {"data-root": "data"})
    place = tmp_path / "own-smoke" / "runs" / cell.name
    place.mkdir(parents=True)
    (place / "metrics.csv").write_text(rows)
    with pytest.raises(SystemExit) as exit:
        tables.main(["--table", "own", "--preset", "smoke", "--seeds", "1", "--only", "fixed", "--out", str(tmp_path),
                     "--set", "data-root=data"])
    assert exit.value.code == 2 and cell.name in capsys.readouterr().err


def test_a_page_whose_runs_another_command_leaves_out_is_told(tables, tmp_path, capsys):
    for name in ("runs.jsonl", "metrics.csv"):
        shutil.copy(ROOT / "tables" / "results" / "first-desk" / name, tmp_path)
    cells = cells_of(TABLES["first"], "desk", 3, [], {})
    tables._tell_replaced(tmp_path, cells)
    assert not capsys.readouterr().err
    tables._tell_replaced(tmp_path, cells[:2])
    assert "replacing the page of python tables/tables.py --table first" in capsys.readouterr().err


def test_a_table_whose_runs_read_another_folder_says_so(tables, tmp_path, monkeypatch, capsys):
    cells = cells_of(TABLES["own"], "smoke", 1, ["fixed"], {"data-root": "data"})
    place = tmp_path / "runs" / cells[0].name
    place.mkdir(parents=True)
    (place / "args.json").write_text(json.dumps({"arguments": {"data_root": str(tmp_path / "a" / "data")}}))
    for name, is_said in (("a", False), ("b", True)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        tables._tell_moved(tmp_path, cells)
        assert bool(capsys.readouterr().err) == is_said


# --slow runs the smoke of every table, with all its methods.
def test_the_smoke_of_a_table_runs_and_draws(tmp_path, image_folder):
    check("sizes", tmp_path, image_folder, every=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_the_smoke_of_a_table_runs_with_all_its_methods(tmp_path, image_folder, name):
    check(name, tmp_path, image_folder, every=True)


def without_time_and_memory(path):
    return [{name: value for name, value in row.items() if not re.search("seconds|memory", name)}
            for row in read_csv(path)]


@pytest.mark.slow
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
    assert without_time_and_memory(one) == without_time_and_memory(other)


@pytest.mark.parametrize("names", [
    ["sgdr"],
    pytest.param([name for name, method in METHODS.items() if not method.knows_length], marks=pytest.mark.slow),
])
def test_a_method_that_does_not_know_its_length_begins_a_long_run_like_a_short_one(tmp_path, names):
    smoke = {"network": "resnet8", "dataset": "digits", "limit-train": "100", "limit-test": "50", "batch-size": "25",
             "num-meta": "50", "average": "", "device": "cpu"}
    for name in names:
        short, long = (Cell(METHODS[name], 0, {**smoke, **METHODS[name].flags, "num-epoch": length}, {})
                       for length in ("1", "2"))
        for cell in (short, long):
            assert CellRun(cell.name, cell.command, tmp_path / cell.name, 1)() == ""
        (row,), (begun, _) = (rows_of(tmp_path / cell.name) for cell in (short, long))
        assert {**row, "seconds": 0} == {**begun, "seconds": 0}, name


def test_a_rate_that_is_measured_for_one_length_serves_no_other():
    cells = cells_of(TABLES["epochs"], "desk", 1, ["fixed"], {"lr": "measured"})
    assert [cell.lines for cell in cells] == [{"10 epochs": 10}, {"30 epochs": 30}, {"90 epochs": 90}]


def test_images_are_held_out_for_all_where_a_method_learns_though_it_is_none_of_the_tables():
    table = TABLES["epochs"]
    assert not any(METHODS[name].script == "meta-train" for name in table.methods)
    cells = cells_of(table, "desk", 1, ["MLR-SNet (learning)", "cosine"], {})
    assert {cell.arguments["num-meta"] for cell in cells} == {"1000"}


def test_schedule_free_sgd_has_several_times_the_classical_rate_on_text_too():
    cells = cells_of(TABLES["untuned"], "desk", 1, ["schedule-free", "cosine"], {"text-root": "texts"})
    rates = {cell.method.name: cell.arguments["lr"] for cell in cells
             if cell.arguments["network"] == "lstm2" and "lr" not in cell.method.flags
             and cell.arguments.get("optimizer", "sgd") == "sgd" and float(cell.arguments.get("momentum", 0)) == 0}
    assert rates == {"schedule-free": "100", "cosine": "20"}


def test_a_long_run_serves_the_shorter_lines():
    cells = cells_of(TABLES["epochs"], "smoke", 1, ["fixed", "onecycle"], {})
    served = {(cell.method.name, cell.num_epochs): cell.lines for cell in cells}
    assert served == {("fixed", 3): {"2 epochs": 2, "3 epochs": 3}, ("onecycle", 2): {"2 epochs": 2},
                      ("onecycle", 3): {"3 epochs": 3}}


def test_methods_have_more_seeds_and_with_them_the_grid():
    cells = cells_of(TABLES["untuned"], "smoke", 1, ["fixed", "linear"], {}, {"linear": 3})
    seeds = {name: {cell.seed for cell in cells if cell.method.name.startswith(name)}
             for name in ("fixed", "linear", "cosine 0")}
    assert seeds == {"fixed": {0}, "linear": {0, 1, 2}, "cosine 0": {0, 1, 2}}


def test_a_run_that_averages_serves_its_own_length_only():
    cells = cells_of(TABLES["epochs"], "smoke", 1, ["fixed"], {"average": ""})
    assert [list(cell.lines.values()) for cell in cells] == [[2], [3]]


def test_a_run_serves_no_line_that_differs_in_more_than_its_length():
    cells = cells_of(TABLES["sizes"], "desk", 1, ["fixed"], {})
    assert [list(cell.lines.values()) for cell in cells] == [[30], [20], [12], [4]]


def test_the_name_of_a_run_does_not_depend_on_the_order_of_its_arguments():
    arguments = {"network": "resnet8", "dataset": "digits", "num-epoch": "2"}
    names = {Cell(METHODS["cosine"], 0, dict(order), {}).name
             for order in (arguments.items(), reversed(arguments.items()))}
    assert len(names) == 1 and names != {Cell(METHODS["fixed"], 0, arguments, {}).name}


def test_the_peaks_of_a_grid_are_at_most_a_factor_of_3_apart():
    for peaks in GRIDS.values():
        values = [float(peak) for peak in peaks]
        assert all(low < high <= 3.0001 * low for low, high in zip(values, values[1:], strict=False))


def test_images_and_text_of_one_table_take_their_own_roots():
    cells = cells_of(TABLES["untuned"], "desk", 1, ["fixed"], {"image-root": "a", "text-root": "b"})
    roots = {(cell.arguments["dataset"], cell.arguments["data-root"]) for cell in cells}
    assert roots == {("folder", "a"), ("digits", "a"), ("text", "b")}
    assert not [flag for cell in cells for flag in cell.flags if flag in ("--image-root", "--text-root")]


@pytest.mark.parametrize(("line", "lr"), [("network=resnet8 dataset=digits", "0.5"),
                                          ("network=resnet8 dataset=digits momentum=0.9", "0.05"),
                                          ("network=gpt dataset=pydoc optimizer=adamw", "0.005")])
def test_a_constant_rate_is_that_of_the_optimizer(line, lr):
    table = Table("title", "question", ["cosine (constant)"], {"desk": lines(f"{line} num-epoch=2")})
    (cell,) = cells_of(table, "desk", 1, [], {})
    assert cell.arguments["lr"] == lr


@pytest.mark.parametrize(("method", "line", "expected"), [
    ("fixed", "network=lstm2 dataset=pydoc", {"lr": "20"}),
    ("fixed", "network=gpt dataset=pydoc optimizer=adamw", {"optimizer": "adamw"}),
    ("adam", "network=resnet8 dataset=digits momentum=0.9", {"optimizer": "adam"}),
    ("l4mom", "network=resnet8 dataset=digits momentum=0.9 optimizer=adamw", {}),
    ("MLR-SNet (learning)", "network=resnet8 dataset=digits momentum=0.9", {"momentum": "0.9", "t-val": "auto"}),
    ("MLR-SNet (learning, average)", "network=lstm2 dataset=pydoc t-val=10", {"t-val": "10"}),
    ("cosine", "network=resnet8 dataset=digits t-val=10", {}),
])
def test_a_method_has_its_usual_rate_its_own_flags_and_no_momentum_that_is_not_for_it(method, line, expected):
    table = Table("title", "question", [method], {"desk": lines(f"{line} num-epoch=2")})
    (cell,) = cells_of(table, "desk", 1, [], {})
    found = {name: cell.arguments.get(name) for name in ("lr", "optimizer", "momentum", "t-val")}
    assert {name: value for name, value in found.items() if value is not None} == expected


@pytest.mark.parametrize("name", ["untuned", "full-size", "paper-regime", "corruption", "label-noise", "sizes"])
def test_the_scripts_accept_every_run_of_a_table_at_home(tables, tmp_path, name):
    tables.check_cells(cells_of(TABLES[name], "desk", 1, [], {}))


@pytest.mark.parametrize(("wish", "threads"), [(None, "3"), ("1", "1")])
def test_a_run_has_its_share_of_the_cores_unless_the_environment_says_otherwise(tmp_path, monkeypatch, wish, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wish:
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
    (tmp_path / "script.py").write_text("import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'])")
    reason = CellRun("name", [str(tmp_path / "script.py")], tmp_path / "run", threads=3)()
    assert reason.startswith(f"name: {threads} ")


@pytest.mark.parametrize("result", [folder for folder in RESULTS if '"table":"' in (folder / "runs.jsonl").read_text()
                                    and '"table":""' not in (folder / "runs.jsonl").read_text()],
                         ids=lambda folder: folder.name)
def test_committed_runs_are_those_of_their_command(tables, result):
    header, runs = read(result)
    args = tables.parse_args(shlex.split(header["command"])[2:])
    cells = cells_of(TABLES[args.table], args.preset, args.seeds, args.only, args.overrides, args.more_seeds)
    assert args.table == header["table"] and {cell.name: cell.lines for cell in cells} == {
        run.name: run.lines for run in runs
    }


def test_every_spec_names_methods_and_problems_that_exist():
    for name, table in TABLES.items():
        assert {*table.methods, *table.text_methods} <= set(METHODS)
        for preset in table.preset_names:
            lines = table.lines(preset)
            assert len({(problem_of(line), detail_of(line, table.named_by)) for line in lines}) == len(lines)
        for problem, numbers in read_toml("published.toml").get(name, {}).items():
            assert problem in {problem_of(line) for line in table.lines("paper")} and set(numbers) <= set(METHODS)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--table", "epochs", "--set", "num-epoch=2"], "--set num-epoch: the lines of epochs differ in it"),
    (["--table", "networks", "--set", "network=resnet8"], "--set network: the lines of networks differ in it"),
    (["--table", "untuned", "--preset", "paper"], "--preset paper: untuned has only desk and smoke"),
    (["--table", "own", "--set", "x"], "--set: x: give NAME=VALUE"),
    (["--table", "own", "--set", "num-epoch=abc"], "--set: num-epoch: 'abc' is not a number at least 1"),
    (["--table", "own", "--set", "seed=1"], "--set: seed: use --seeds N"),
    (["--table", "learning", "--set", "optimizer=foo"], "--set: optimizer: 'foo': choose sgd, adam or adamw"),
    (["--table", "own", "--set", "help="], "--set: help: leave it out"),
    (["--table", "own", "--set", "wd=0.1", "wd=0.2", "--only", "cosine"], "--set wd: duplicate; give it once"),
    (["--table", "own", "--more-seeds", "fixed=2"], "--more-seeds fixed=2: give more than the 3 of --seeds"),
    (["--table", "sizes", "--set", "lr=0.2"], "--set lr: the method 'cosine (measured)' sets it"),
    (["--table", "epochs", "--only", "fixed", "--set", "test-every=4"], "test-every 4: a line ends after 10 epochs"),
    (["--table", "untuned", "--set", "tokens=word"], "--set makes two lines of the table one"),
    (["--table", "own", "--set", "colour=red"], "unrecognized arguments: --colour red"),
    (["--table", "own", "--set", "batch-size=0"], "--batch_size: 0: must be at least 1"),
    (["--table", "own", "--set", "wd="], "--wd: expected one argument"),
    (["--table", "datasets", "--only", "fixed", "wsd"], "--only wsd: datasets does not run it"),
    (["--table", "cifar10-resnet", "--set", "lr=0.05"], "--set lr: the method 'MLR-SNet (learning)' sets it"),
    (["--table", "untuned", "--only", "cosine (constant)", "--set", "lr=0.3"], "--set lr: the method 'cosine (const"),
    (["--table", "own", "--more-seeds", "fixed"], "--more-seeds: fixed: give NAME=VALUE"),
    (["--table", "own", "--more-seeds", "fixed=0"], "--more-seeds: 0: must be at least 1"),
    (["--table", "own", "--only", "cosine", "--more-seeds", "fixed=4"], "--more-seeds fixed: own does not run it"),
    (["--table", "untuned", "--more-seeds", "cosine 0.1=4"], "--more-seeds cosine 0.1: untuned does not"),
    (["--table", "own", "--target", "nan"], "--target: nan: must be at least 0"),
    (["--table", "own", "--only", "nothing"], "invalid choice: 'nothing'"),
    (["--table", "own", "--highlight", "adam+val"], "--highlight adam+val: own does not run it"),
    (["--table", "untuned", "--set", "tokens=bpe"], "--set makes two lines of the table one"),
    (["--table", "untuned", "--set", "limit-train=abc"], ": 'abc' is not a number"),
    (["--table", "untuned", "--set", "momentum=abc"], ": 'abc' is not a number"),
    (["--table", "own", "--set", "text-root=x"], "--set text-root: leave it out beside data-root, and where"),
    (["--table", "untuned", "--set", "data-root=x", "image-root=y"], "--set image-root: leave it out beside data-root"),
    (["--table", "own", "--slurm-option", "partition=x"], "--slurm-option belongs to --slurm"),
    (["--table", "own", "--slurm", "--jobs", "2"], "--jobs is for one machine"),
    (["--table", "own", "--slurm", "--slurm-option", "x"], "--slurm-option: x: give NAME=VALUE"),
    (["--render", "nowhere", "--target", "90"], "leave the other flags out"),
    (["--render", "nowhere"], "nowhere: has no runs.jsonl; give the folder of a result"),
    (["--table", "own", "--out", ""], "--out: an empty path; give a folder"),
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


@pytest.mark.parametrize("content", ["[", "{}", "1", '{"table": "own", "usual": {}}\n{"run": 1}', '{"study": "x"}'])
def test_a_damaged_result_is_one_line_and_status_2(tables, tmp_path, capsys, content):
    (tmp_path / "runs.jsonl").write_text(content)
    (tmp_path / "metrics.csv").touch()
    with pytest.raises(SystemExit) as exit:
        tables.main(["--render", str(tmp_path)])
    assert exit.value.code == 2 and f"error: {tmp_path}: a damaged result (" in capsys.readouterr().err


def test_a_cell_that_cannot_run_ends_the_table_with_its_line_and_command(tables, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        tables.main(["--table", "own", "--preset", "smoke", "--seeds", "1", "--only", "fixed", "--out", str(tmp_path),
                     "--set", f"data-root={tmp_path}/none"])
    errors = capsys.readouterr().err
    assert exit.value.code == 2 and "none/train" in errors and "meta-test/meta-test.py --network resnet8" in errors


def test_a_run_that_diverges_ends_its_cell_and_not_the_table(tmp_path):
    process = start("cifar10-resnet", tmp_path, "--seeds", "1", "--only", "fixed", "adam", "--set", "wd=1e12")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    fixed, adam = read_csv(tmp_path / "cifar10-resnet-smoke" / "table.csv")
    assert (fixed["finished"], adam["finished"]) == ("0", "1")
    assert "fixed (1 of 1 diverged)" in (tmp_path / "cifar10-resnet-smoke" / "README.md").read_text()


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
    assert second.stdout.readline() == f"runs in {runs.parent}: 1\n"
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


def test_the_authors_name_of_a_flag_overrides_as_its_own_does():
    assert override("optim=sgd") == override("optimizer=sgd") == ("optimizer", "sgd")
