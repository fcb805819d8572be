"""Tables: their runs, what they say, and that stopping one changes nothing."""

import importlib.util
import itertools
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
from cluster import build_executor
from drawing import coloured
from methods import GRIDS, METHODS
from PIL import Image
from race import CellRun, Race
from records import by_problem, leading, summarise
from regret import peaks_of, regret_of, regrets_of, shown, summaries_of, zero_marks
from report import render
from runs import Run, read, rows_of, write
from specs import TABLES, Table, lines
from words import detail_of, problem_of
from writing import INDEX, index_lines, read_csv, read_toml

from training.folder import FolderLock

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tables" / "tables.py"
NUMBERS = itertools.count()  # of the runs that tests make up
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
    arguments = ["--table", name, "--preset", "smoke", "--jobs", "2", "--out", out, *more]
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
    assert "Commit" in (folder / "README.md").read_text()


# --slow runs the smoke of every table, with all its methods.
@pytest.mark.parametrize("name", ["label-noise", "sizes"])
def test_the_smoke_of_a_table_runs_and_draws(tmp_path, image_folder, name):
    check(name, tmp_path, image_folder, every=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_the_smoke_of_a_table_runs_with_all_its_methods(tmp_path, image_folder, name):
    check(name, tmp_path, image_folder, every=True)


def without_time_and_memory(path):
    return [{name: value for name, value in row.items() if not re.search("seconds|memory", name)}
            for row in read_csv(path)]


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


def run_of(method, seed, rows, steps=0, detail="", scale=None, **arguments):
    """A run as a result keeps it: resnet8 on digits unless the arguments say otherwise; `steps` measured its rate."""
    arguments = {"network": "resnet8", "dataset": "digits", "num-epoch": 2, "schedule": "fixed", **arguments}
    arguments |= METHODS[method].flags
    passes = 10 * arguments["num-epoch"] + steps
    cost = {"steps_per_epoch": 10, "forward_passes": passes, "backward_passes": 2 * passes, "peak_memory_mib": 100}
    name = f"{problem_of(arguments)} {detail} {method} {seed}"
    return Run(
        next(NUMBERS), name, method, {detail: arguments["num-epoch"]}, "done", seed, METHODS[method].script, "python …",
        arguments, "abc", {"torch": "2"}, {"gpu": None, "cpu": "a CPU", "threads": 1}, cost,
        {"scale": scale} if scale else None, [dict(zip(("epoch", "lr", "train_loss"), (n, 0.1, 1.0), strict=True)) | row
                                              for n, row in enumerate(rows, 1)],
    )


def accuracies(*values, **more):
    return [{"test_acc": value, "seconds": 2.0, **more} for value in values]


def test_a_table_says_what_its_runs_say():
    results = {"fixed": [(50, 60), (70, 64)], "cosine": [(61, 70), (63, 66)]}
    runs = [run_of(method, seed, accuracies(*values), steps=10 if method == "cosine" else 0)
            for method, seeds in results.items() for seed, values in enumerate(seeds)]
    fixed, cosine = summarise(runs, None)
    assert (fixed["last_mean"], fixed["best_mean"], cosine["last_mean"]) == (62, 65, 68)
    assert fixed["last_std"] == pytest.approx(8**0.5)
    assert cosine["target"] == 62 and cosine["reached"] == 2 and cosine["steps_to_target"] == 15
    assert cosine["seconds_to_target"] == 3.0 and cosine["relative_forward_passes"] == 1.5


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
            assert CellRun(cell.name, cell.command, tmp_path / cell.name, threads=1)() == ""
        (row,), (begun, _) = (rows_of(tmp_path / cell.name) for cell in (short, long))
        assert {**row, "seconds": 0} == {**begun, "seconds": 0}, name


def test_a_long_run_serves_the_shorter_lines():
    cells = cells_of(TABLES["horizon"], "smoke", 1, ["schedule-free", "onecycle"], {})
    served = {(cell.method.name, cell.num_epochs): cell.lines for cell in cells}
    assert served == {("schedule-free", 3): {"2 epochs": 2, "3 epochs": 3}, ("onecycle", 2): {"2 epochs": 2},
                      ("onecycle", 3): {"3 epochs": 3}}


def test_a_run_serves_no_line_that_differs_in_more_than_its_length():
    cells = cells_of(TABLES["sizes"], "desk", 1, ["fixed"], {})
    assert [list(cell.lines.values()) for cell in cells] == [[30], [20], [12], [4]]


def test_the_name_of_a_run_does_not_depend_on_the_order_of_its_arguments():
    arguments = {"network": "resnet8", "dataset": "digits", "num-epoch": "2"}
    names = {Cell(METHODS["cosine"], 0, dict(order), {}).name
             for order in (arguments.items(), reversed(arguments.items()))}
    assert len(names) == 1 and names != {Cell(METHODS["fixed"], 0, arguments, {}).name}


@pytest.fixture
def two_problems():
    """Images with momentum and text with AdamW, two epochs. The best cosines end at 60 % and at perplexity 50."""
    text = {"network": "gpt", "dataset": "pydoc", "detail": "AdamW"}
    results = {"cosine 0.012": 45, "cosine 0.035": 50, "cosine 0.1": 60, "cosine 0.3": 40, "cosine 0.9": 10,
               "MLR-SNet (transferred, measured)": 59.5, "cosine (measured)": 63, "fixed": 52}
    perplexities = {"cosine 0.0005": 300, "cosine 0.0014": 100, "cosine 0.004": 55, "cosine 0.012": 52,
                    "cosine 0.035": 50, "MLR-SNet (transferred, measured)": 60, "cosine (measured)": 51}
    runs = []
    for method, last in results.items():
        average = 58 if method == "fixed" else last
        steps, scale = (5, 0.2) if "measured" in METHODS[method].flags.values() else (0, None)
        rows = accuracies(10, last, test_acc_average=average)
        runs.append(run_of(method, 0, rows, steps, "momentum", scale))
    for method, last in perplexities.items():
        rows = [{"test_ppl": value, "test_ppl_average": value, "seconds": 1.0} for value in (70, last)]
        runs.append(run_of(method, 0, rows, scale=0.007, **text))
    runs.append(run_of("fixed", 0, [{"test_ppl": 70, "test_ppl_average": 70, "seconds": 1.0}], **text))  # it diverged
    return runs


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


def test_of_equal_cosines_the_lowest_peak_is_the_best_whatever_the_order_of_the_runs():
    runs = [run_of(method, 0, accuracies(10, 60)) for method in ("cosine 0.9", "cosine 0.1", "cosine 0.3")]
    assert zero_marks(summarise(runs, None))["resnet8 digits"]["method"] == "cosine 0.1"


def test_a_summary_of_regrets_counts_a_diverged_run_as_an_infinite_one(two_problems):
    summaries = summaries_of(regrets_of(summarise(two_problems, None)))
    best, *_, worst = [summary for summary in summaries if summary["weights"] == "live"]
    assert best["method"] == "cosine (measured)" and best["median"] == pytest.approx(-0.5) and best["close"] == 0.5
    assert best["worst %"] == pytest.approx(2) and best["relative_steps"] == pytest.approx((25 / 20 + 1) / 2)
    assert worst["method"] == "fixed" and worst["diverged"] == 1 and worst["mean %"] == float("inf")
    assert worst["mean points"] == 8 and worst["median"] == float("inf") and worst["close"] == 0


def test_the_page_of_regrets_and_the_best_peaks_beside_the_measured_rates(two_problems, tmp_path):
    records = summarise(two_problems, None)
    images, text = peaks_of(two_problems, records)
    assert (images["best_peak"], images["is_end_of_grid"], images["measured"]) == (0.1, False, pytest.approx(0.2))
    assert (text["best_peak"], text["is_end_of_grid"], text["measured_over_best"]) == (0.035, True, pytest.approx(0.2))
    page = "\n".join(regret_of(tmp_path, two_problems, records, []))
    assert "| fixed | averaged | 2.00 | 2.00 | ∞ | ∞ | ∞ | 0 % | 1 | 1.00 |" in page
    assert "within a factor of 2 of the grid's best peak on 1 of 2 problems" in page
    assert (tmp_path / "regret.png").stat().st_size > 5_000


def test_regrets_are_shown_once_for_every_method_and_mlr_snet_always():
    names = ["a", "b", "a", *"cdefgh", "ours"]
    summaries = [{"method": name, "weights": f"{place}", "is_ours": name == "ours"} for place, name in enumerate(names)]
    chosen = shown(summaries, [], 4)
    assert [summary["method"] for summary in chosen] == ["a", "b", "c", "ours"] and chosen[0]["weights"] == "0"
    assert [summary["method"] for summary in shown(summaries, ["h"], 2)] == ["a", "h"]


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
    ("MLR-SNet (learning, average, T_val 10)", "network=lstm2 dataset=pydoc", {"t-val": "10"}),
])
def test_a_method_has_its_usual_rate_its_own_flags_and_no_momentum_that_is_not_for_it(method, line, expected):
    table = Table("title", "question", [method], {"desk": lines(f"{line} num-epoch=2")})
    (cell,) = cells_of(table, "desk", 1, [], {})
    found = {name: cell.arguments.get(name) for name in ("lr", "optimizer", "momentum", "t-val")}
    assert {name: value for name, value in found.items() if value is not None} == expected


@pytest.mark.parametrize("name", ["untuned", "networks-measured", "full-size", "corruption", "label-noise", "sizes"])
def test_the_scripts_accept_every_run_of_a_table_at_home(tables, tmp_path, name):
    tables.check_cells(cells_of(TABLES[name], "desk", 1, [], {}))


def result_of(folder, runs, **header):
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, {"table": "own", "command": "python …", "target": None, "highlight": [], **header}, runs)
    render(folder)
    return (folder / "README.md").read_text()


def test_under_label_noise_a_table_shows_the_accuracy_on_the_true_labels(tmp_path):
    page = result_of(tmp_path, [run_of("fixed", 0, accuracies(50, 50, train_acc=70, train_clean_acc=44))])
    assert "| fixed | 50.00 | 50.00 | 70.00 | 44.00 |" in page
    assert "train_clean_acc_mean" in read_csv(tmp_path / "table.csv")[0]
    assert "training accuracy" not in result_of(tmp_path, [run_of("fixed", 0, accuracies(50, 50))])


def test_a_page_shows_a_dozen_methods_the_best_first_and_mlr_snet_always(tmp_path):
    names = ["MLR-SNet (learning)", *TABLES["own"].methods[1:]]
    page = result_of(tmp_path, [run_of(name, 0, accuracies(10, 10 + place)) for place, name in enumerate(names)])
    shown = re.findall(r"^\| ([\w-][^|]*) \| \d", page, re.MULTILINE)
    assert shown == [*names[:-12:-1], "MLR-SNet (learning)"] and "5 more methods" in page
    assert len(read_csv(tmp_path / "table.csv")) == len(names)


def test_the_lines_of_a_table_stand_side_by_side_with_the_papers_numbers(tmp_path):
    runs = [run_of("fixed", 0, accuracies(40, last), network=network, dataset="cifar10")
            for network, last in (("shufflenetv2", 50), ("nasnet", 60))]
    page = result_of(tmp_path, runs, table="networks")
    assert "| method | shufflenetv2 cifar10 | nasnet cifar10 |" in page
    assert "| fixed | 50.00 (paper: ~87.0) | 60.00 (paper: ~87.2) |" in page


def test_a_page_of_images_and_text_says_both_units(tmp_path):
    text = run_of("fixed", 0, [{"test_ppl": 50, "seconds": 1.0}] * 2, network="gpt", dataset="pydoc")
    page = result_of(tmp_path, [run_of("fixed", 0, accuracies(40, 50)), text])
    assert "Test accuracy (%) or perplexity after the last epoch:" in page and "| fixed | 50.00 | 50.00 |" in page


def test_a_new_run_of_a_table_does_not_get_the_reading_of_the_committed_one(tmp_path):
    reading = read_toml("readings.toml")["first-desk"]["reading"]
    runs = [run_of("fixed", 0, accuracies(1, 2))]
    pages = [result_of(tmp_path / parent / "first-desk", runs, table="first") for parent in ("result", "results")]
    assert [reading in page for page in pages] == [False, True]


def test_a_result_is_read_as_it_was_written(tmp_path):
    runs = [run_of("fixed", 0, accuracies(50, 60)), run_of("cosine (measured)", 1, [], scale=0.1)]
    write(tmp_path, {"table": "own"}, runs)
    assert read(tmp_path) == ({"table": "own"}, runs)


@pytest.mark.parametrize(("wish", "threads"), [(None, "3"), ("1", "1")])
def test_a_run_has_its_share_of_the_cores_unless_the_environment_says_otherwise(tmp_path, monkeypatch, wish, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wish:
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
    (tmp_path / "script.py").write_text("import os, sys; sys.exit(os.environ['OMP_NUM_THREADS'])")
    reason = CellRun("name", [str(tmp_path / "script.py")], tmp_path / "run", threads=3)()
    assert reason.startswith(f"name: {threads} ")


@pytest.mark.parametrize("result", [
    folder if folder.name in ("first-desk", "untuned-desk", "benchmark-resnet8-cpu", "convergence")
    else pytest.param(folder, marks=pytest.mark.slow) for folder in RESULTS
], ids=lambda folder: folder.name)
def test_a_committed_page_follows_from_its_runs_and_metrics(tmp_path, result):
    copy = tmp_path / "results" / result.name
    shutil.copytree(result, copy, ignore=shutil.ignore_patterns("README.md", "table.csv", "*.png"))
    render(copy)
    for name in ("README.md", "table.csv"):
        if (result / name).exists():
            assert (copy / name).read_text() == (result / name).read_text()
    assert {path.name for path in copy.iterdir()} == {path.name for path in result.iterdir()}


@pytest.mark.parametrize("result", [folder for folder in RESULTS if '"table":"' in (folder / "runs.jsonl").read_text()
                                    and '"table":""' not in (folder / "runs.jsonl").read_text()],
                         ids=lambda folder: folder.name)
def test_committed_runs_are_those_of_their_command(tables, result):
    header, runs = read(result)
    args = tables.parse_args(shlex.split(header["command"])[2:])
    cells = cells_of(TABLES[args.table], args.preset, args.seeds, args.only, args.overrides)
    assert args.table == header["table"] and {cell.name: cell.lines for cell in cells} == {
        run.name: run.lines for run in runs
    }


def test_every_committed_result_has_a_reading_of_at_most_three_sentences_and_a_line_in_the_index():
    readings = read_toml("readings.toml")
    assert readings.keys() == {folder.name for folder in RESULTS}
    for reading in readings.values():
        assert 1 <= len(re.findall(r"\.(?: |$)", reading["reading"])) <= 3
    page = (ROOT / "tables" / "README.md").read_text()
    assert page.partition(INDEX)[2].strip().splitlines() == index_lines()


def test_every_spec_names_methods_and_problems_that_exist():
    for name, table in TABLES.items():
        assert {*table.methods, *table.text_methods, *table.only_in_t_val} <= set(METHODS)
        for preset in table.preset_names:
            lines = table.lines(preset)
            assert len({(problem_of(line), detail_of(line, table.named_by)) for line in lines}) == len(lines)
        for problem, numbers in read_toml("published.toml").get(name, {}).items():
            assert problem in {problem_of(line) for line in table.lines("paper")} and set(numbers) <= set(METHODS)


def test_a_table_says_what_its_data_and_network_are():
    folder = {"dataset": "folder", "data-root": "some/cifar10"}
    (record,) = summarise([run_of("fixed", 0, accuracies(1, 2), **folder)], None)
    assert record["title"] == "ResNet-8 on CIFAR-10 images (class folder)" and record["group"] == "resnet8 folder"
    (record,) = summarise([run_of("fixed", 0, accuracies(1, 2), detail="2 epochs")], None)
    assert record["title"] == "ResNet-8 on scikit-learn's digits, 2 epochs"


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


def test_a_picture_by_problem_has_every_whole_run_once():
    shared = run_of("fixed", 0, accuracies(1, 2, 3), **{"num-epoch": 3})
    shared.lines = {"2 epochs": 2, "3 epochs": 3}
    own = [run_of("onecycle", 0, accuracies(*range(length)), detail=f"{length} epochs", **{"num-epoch": length})
           for length in (2, 3)]
    drawn = by_problem(summarise([*own, shared], None))
    assert [record["label"] for record in drawn] == ["onecycle of 2", "onecycle of 3", "fixed"]
    assert {record["group"] for record in drawn} == {"resnet8 digits"}


def test_a_picture_colours_mlr_snet_and_the_best_others():
    results = {"fixed": 50, "cosine": 70, "adam": 60, "MLR-SNet (learning)": 10}
    records = summarise([run_of(name, 0, accuracies(1, last)) for name, last in results.items()], None)
    assert coloured(records, [], most=3) == ["cosine", "adam", "MLR-SNet (learning)"]
    assert coloured(records, ["fixed"]) == ["fixed"]


def test_the_leading_are_the_first_ones_and_the_best_others():
    assert leading("abcde", "d", 3) == ["a", "b", "d"]


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
