"""What results say: records, regrets, pages and pictures, from the runs alone; the committed ones among them."""

import itertools
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import drawing
import pytest
import writing
from drawing import coloured
from methods import METHODS
from records import leading, summarise
from regret import interval, peaks_of, regret_of, regrets_of, shown, summaries_of, zero_marks
from report import _seeds, render
from runs import Run, read, write
from words import problem_of
from writing import INDEX, index_lines, read_csv, read_toml, write_csv

TABLES_FOLDER = Path(__file__).resolve().parents[1] / "tables"
RESULTS = sorted((TABLES_FOLDER / "results").iterdir())
NUMBERS = itertools.count()  # of the runs that tests make up


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
    (alone,) = summarise([run for run in runs if run.method == "cosine" and run.seed == 0], 65)
    assert alone["target"] == 65 and alone["reached"] == 1 and "relative_seconds" not in alone


@pytest.fixture
def two_problems():
    """Images with momentum and text with AdamW, two epochs. The best cosines end at 60 % and at perplexity 50."""
    text = {"network": "gpt", "dataset": "pydoc", "detail": "AdamW"}
    results = {"cosine 0.012": 45, "cosine 0.035": 50, "cosine 0.1": 60, "cosine 0.3": 40, "cosine 0.9": 10,
               "MLR-SNet (recommended)": 59.5, "cosine (measured)": 63, "fixed": 52}
    perplexities = {"cosine 0.0005": 300, "cosine 0.0014": 100, "cosine 0.004": 55, "cosine 0.012": 52,
                    "cosine 0.035": 50, "MLR-SNet (recommended)": 60, "cosine (measured)": 51}
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
    assert found["MLR-SNet (recommended)", "live", "points"] == pytest.approx(0.5)
    assert found["MLR-SNet (recommended)", "live", "%"] == pytest.approx(20)
    assert found["cosine (measured)", "live", "points"] == pytest.approx(-3)
    assert found["cosine (measured)", "live", "%"] == pytest.approx(2)
    assert found["fixed", "live", "points"] == 8 and found["fixed", "averaged", "points"] == 2


def test_a_regret_is_against_the_same_seed_of_the_cosine_and_the_page_says_which_seeds_only_some_have(tmp_path):
    results = {"cosine 0.1": (60, 50, 40), "fixed": (50, 50), "linear": (60, 60, 60), "wsd": (50, 50)}
    runs = [run_of(method, seed, accuracies(value), **{"num-epoch": 1})
            for method, values in results.items() for seed, value in enumerate(values)]
    regrets = {regret["method"]: regret["by_seed"] for regret in regrets_of(summarise(runs, None))}
    assert regrets == {"fixed": [10, 0], "linear": [0, -10, -20], "wsd": [10, 0]}
    assert _seeds(runs) == "Seeds: 0, 1; 2 of linear, too."
    runs.append(run_of("fixed", 3, accuracies(1), **{"num-epoch": 1}))
    assert _seeds(runs) == "Seeds: 0, 1; 2 of linear, too; 3 of fixed, too."


def test_a_name_that_is_not_utf8_stands_on_the_page_in_escapes(tmp_path):
    run = run_of("fixed", 0, accuracies(1, 2), dataset="folder", **{"data-root": "x\udcff"})
    assert "x\\udcff" in result_of(tmp_path, [run])


def test_a_table_with_regrets_does_without_costs(two_problems, tmp_path):
    for run in two_problems:
        run.cost = {"peak_memory_mib": 1.0}
    page = "\n".join(regret_of(tmp_path, two_problems, summarise(two_problems, None), []))
    assert "| fixed | 8.00 | 8.00 | 2.00 | ∞ | ∞ | ∞ | 0 % | 1 | – |" in page


def test_of_equal_cosines_the_lowest_peak_is_the_best_whatever_the_order_of_the_runs():
    runs = [run_of(method, 0, accuracies(10, 60)) for method in ("cosine 0.9", "cosine 0.1", "cosine 0.3")]
    assert zero_marks(summarise(runs, None))["resnet8 digits"]["method"] == "cosine 0.1"


def test_a_summary_of_regrets_counts_a_diverged_run_as_an_infinite_one(two_problems):
    summaries = summaries_of(regrets_of(summarise(two_problems, None)))
    best, *_, worst = [summary for summary in summaries if summary["weights"] == "live"]
    assert best["method"] == "cosine (measured)" and best["close"] == 0.5
    assert best["worst %"] == pytest.approx(2) and best["relative_steps"] == pytest.approx((25 / 20 + 1) / 2)
    assert worst["method"] == "fixed" and worst["diverged"] == 1 and worst["mean %"] == float("inf")
    assert worst["mean points"] == 8 and worst["close"] == 0


def test_the_page_of_regrets_and_the_best_peaks_beside_the_measured_rates(two_problems, tmp_path):
    records = summarise(two_problems, None)
    images, text = peaks_of(two_problems, records)
    assert (images["best_peak"], images["is_end_of_grid"], images["measured"]) == (0.1, False, pytest.approx(0.2))
    assert (text["best_peak"], text["is_end_of_grid"], text["measured_over_best"]) == (0.035, True, pytest.approx(0.2))
    page = "\n".join(regret_of(tmp_path, two_problems, records, []))
    assert "| fixed | 8.00 | 8.00 | 2.00 | ∞ | ∞ | ∞ | 0 % | 1 | 1.00 |" in page
    assert "within a factor of 2 of the grid's best peak on 1 of 2 problems" in page
    assert (tmp_path / "regret.png").stat().st_size > 5_000


def test_the_best_peak_is_compared_with_the_rate_measured_for_the_same_optimizer(two_problems):
    runs = [*two_problems, run_of("MLR-SNet (recommended, AdamW)", 0, accuracies(1, 2), 0, "momentum", 0.004)]
    assert peaks_of(runs, summarise(runs, None))[0]["measured"] == pytest.approx(0.2)


def test_a_run_that_holds_no_test_metric_is_a_value_error():
    with pytest.raises(ValueError, match="unpack"):
        summarise([run_of("fixed", 0, [{"seconds": 1.0}] * 2)], None)


def test_a_problem_on_which_no_cosine_of_the_grid_finished_is_named_as_left_out(two_problems, tmp_path):
    for run in two_problems:
        if run.method.startswith("cosine 0") and run.problem == "gpt pydoc":
            del run.rows[1:]
    page = "\n".join(regret_of(tmp_path, two_problems, summarise(two_problems, None), []))
    assert "Regret over 1 problems" in page and "Left out" in page and "there: gpt pydoc, AdamW." in page


def test_an_interval_is_students_over_the_problems_and_over_the_seeds_of_a_single_one():
    assert interval([[3.0, 3.0], [3.0]]) == (3.0, 3.0)
    half = 4.3027 * 2 / math.sqrt(3)  # t of 2 degrees of freedom, times the standard error of 1, 5 and 3
    assert interval([[0.0, 2.0], [5.0], [2.0, 4.0]]) == pytest.approx((3 - half, 3 + half), rel=1e-4)
    assert interval([[0.0, 6.0]]) == pytest.approx((3 - 12.7062 * 3, 3 + 12.7062 * 3), rel=1e-4)
    assert interval([[1.0], [math.inf]]) == (math.inf, math.inf) and interval([[1.0]]) == (1.0, 1.0)


def test_the_live_regret_of_every_method_is_shown_and_mlr_snet_always():
    summaries = [{"method": name, "weights": weights, "is_ours": name == "ours"}
                 for name in [*"abcdefgh", "ours"] for weights in ("averaged", "live")]
    chosen = shown(summaries, [], 4)
    assert [summary["method"] for summary in chosen] == ["a", "b", "c", "ours"] and chosen[0]["weights"] == "live"
    assert [summary["method"] for summary in shown(summaries, ["h"], 2)] == ["a", "h"]


def result_of(folder, runs, **header):
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, {"table": "own", "command": "python …", "target": None, "highlight": [], **header}, runs)
    render(folder)
    return (folder / "README.md").read_text()


def test_the_picture_of_a_regression_has_its_own_unit_and_leaves_diverging_runs_outside(tmp_path, monkeypatch):
    rows = [{"test_r2": value, "seconds": 1.0} for value in (-1e9, 40)]
    runs = [run_of("fixed", 0, rows, predict="angle"), run_of("cosine", 0, rows, predict="angle")]
    drawn = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: drawn.append(figure))
    drawing.draw(tmp_path / "table.png", summarise(runs, None))
    loss, explained, _ = drawn[0].axes
    assert loss.get_ylabel() == "training loss (mean squared error)" and loss.get_yscale() == "log"
    assert explained.get_ylim() == (0, 100)


def test_under_label_noise_a_table_shows_the_accuracy_on_the_true_labels(tmp_path):
    page = result_of(tmp_path, [run_of("fixed", 0, accuracies(50, 50, train_acc=70, train_clean_acc=44))])
    assert "| fixed | 50.00 | 50.00 | 70.00 | 44.00 |" in page
    assert "train_clean_acc_mean" in read_csv(tmp_path / "table.csv")[0]
    assert "training accuracy" not in result_of(tmp_path, [run_of("fixed", 0, accuracies(50, 50))])


def test_a_page_shows_a_dozen_methods_the_best_first_and_mlr_snet_always(tmp_path):
    rivals = [name for name, method in METHODS.items() if not method.is_ours]
    names = ["MLR-SNet (learning)", *rivals[:16]]
    page = result_of(tmp_path, [run_of(name, 0, accuracies(10, 10 + place)) for place, name in enumerate(names)])
    shown = re.findall(r"^\| ([\w-][^|]*) \| \d", page, re.MULTILINE)
    assert shown == [*names[:-12:-1], "MLR-SNet (learning)"] and "5 more methods" in page
    assert len(read_csv(tmp_path / "table.csv")) == len(names)


def test_the_lines_of_a_table_stand_side_by_side_with_the_papers_numbers(tmp_path):
    runs = [run_of("fixed", 0, accuracies(40, last), network=network, dataset="cifar10")
            for network, last in (("shufflenetv2", 50), ("nasnet", 60))]
    assert "| fixed | 50.00 | 60.00 |" in result_of(tmp_path, runs, table="networks")
    page = result_of(tmp_path, runs, table="networks", command="python tables/tables.py --preset=paper")
    assert "| method | ShuffleNetV2 on CIFAR-10 | NASNet on CIFAR-10 | steps |" in page
    assert "| fixed | 50.00 (paper: ~87.0) | 60.00 (paper: ~87.2) |" in page


def test_a_method_of_which_a_seed_diverged_ranks_behind_those_that_finished(tmp_path):
    runs = [run_of("cosine", seed, accuracies(80, 80)) for seed in (0, 1)]
    runs += [run_of("l4mom", 0, accuracies(90, 90)), replace(run_of("l4mom", 1, accuracies(90)), status="diverged")]
    page = result_of(tmp_path, runs)
    assert page.index("| cosine |") < page.index("| l4mom (1 of 2 diverged) |")


def test_a_page_of_images_and_text_says_both_units(tmp_path):
    text = run_of("fixed", 0, [{"test_ppl": 50, "seconds": 1.0}] * 2, network="gpt", dataset="pydoc")
    page = result_of(tmp_path, [run_of("fixed", 0, accuracies(40, 50)), text])
    assert "Test accuracy (%) or perplexity after the last epoch:" in page and "| fixed | 50.00 | 50.00 |" in page


def test_a_new_run_of_a_table_does_not_get_the_reading_of_the_committed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "RESULTS", tmp_path / "committed")
    reading = read_toml("readings.toml")["first-desk"]["reading"]
    runs = [run_of("fixed", 0, accuracies(1, 2))]
    pages = [result_of(tmp_path / parent / "first-desk", runs, table="first") for parent in ("results", "committed")]
    assert [reading in page for page in pages] == [False, True]


def test_a_result_is_read_as_it_was_written(tmp_path):
    runs = [run_of("fixed", 0, accuracies(50, 60)), run_of("cosine (measured)", 1, [], scale=0.1)]
    write(tmp_path, {"table": "own"}, runs)
    assert read(tmp_path) == ({"table": "own"}, runs)


@pytest.mark.parametrize("result", [
    folder if folder.name in ("first-desk", "benchmark-resnet8-cpu", "convergence")
    else pytest.param(folder, marks=pytest.mark.slow) for folder in RESULTS
], ids=lambda folder: folder.name)
def test_a_committed_page_follows_from_its_runs_and_metrics(tmp_path, monkeypatch, result):
    monkeypatch.setattr(writing, "RESULTS", tmp_path / "results")
    copy = tmp_path / "results" / result.name
    shutil.copytree(result, copy, ignore=shutil.ignore_patterns("README.md", "table.csv", "*.png"))
    render(copy)
    for name in ("README.md", "table.csv"):
        if (result / name).exists():
            assert (copy / name).read_text() == (result / name).read_text()
    assert {path.name for path in copy.iterdir()} == {path.name for path in result.iterdir()}


def test_every_committed_result_has_a_reading_of_at_most_three_sentences_and_a_line_in_the_index():
    readings = read_toml("readings.toml")
    assert readings.keys() == {folder.name for folder in RESULTS}
    for reading in readings.values():
        assert 1 <= len(re.findall(r"\.(?: |$)", reading["reading"])) <= 3
    page = (TABLES_FOLDER / "README.md").read_text()
    assert page.partition(INDEX)[2].strip().splitlines() == index_lines()


def test_a_table_says_what_its_data_and_network_are():
    folder = {"dataset": "folder", "data-root": "some/cifar10"}
    (record,) = summarise([run_of("fixed", 0, accuracies(1, 2), **folder)], None)
    assert record["title"] == "ResNet-8 on CIFAR-10 images (class folder)" and record["group"] == "resnet8 folder"
    (record,) = summarise([run_of("fixed", 0, accuracies(1, 2), detail="2 epochs")], None)
    assert record["title"] == "ResNet-8 on scikit-learn's digits, 2 epochs"


def test_a_picture_colours_mlr_snet_and_the_best_others():
    results = {"fixed": 50, "cosine": 70, "adam": 60, "MLR-SNet (learning)": 10}
    records = summarise([run_of(name, 0, accuracies(1, last)) for name, last in results.items()], None)
    assert coloured(records, [], most=3) == ["cosine", "adam", "MLR-SNet (learning)"]
    assert coloured(records, ["fixed"]) == ["fixed"]


def test_the_leading_are_the_first_ones_and_the_best_others():
    assert leading("abcde", "d", 3) == ["a", "b", "d"]


def test_a_table_does_not_show_the_last_digits_of_a_sum(tmp_path):
    write_csv(tmp_path / "table.csv", ["mean", "runs", "worst"], [{"mean": 0.1 + 0.2, "runs": 3, "other": 1.0}])
    assert (tmp_path / "table.csv").read_text() == "mean,runs,worst\n0.3,3,\n"
