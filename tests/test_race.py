"""Files of a cell that were lost, cut short or are another cell's: it is run again, or refused; never a result."""

import shutil

import pytest
from cells import cells_of
from race import CellRun
from runs import collect
from specs import TABLES

SIZES = {"limit-train": "32", "limit-test": "20", "num-meta": "20"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two cells that have run, and their folder."""
    folder = tmp_path_factory.mktemp("cells")
    cells = cells_of(TABLES["first"], "smoke", 1, ["fixed", "cosine"], SIZES)
    for cell in cells:
        run = run_of(cell, folder)
        assert not run.is_done and run() == "" and run.is_done
    return cells, folder


@pytest.fixture
def two(finished, tmp_path):
    cells, folder = finished
    shutil.copytree(folder, tmp_path / "runs")
    return cells, tmp_path / "runs"


def run_of(cell, folder):
    return CellRun(cell.name, cell.command, folder / cell.name, 1)


def rows(cells, folder):
    runs = collect(cells, folder)
    return [[{name: row[name] for name in row if name != "seconds"} for row in run.rows] for run in runs]


def test_a_warning_of_runs_that_succeed_is_shown_once(tmp_path, capsys):
    for cell in cells_of(TABLES["first"], "smoke", 1, ["fixed", "cosine"], {**SIZES, "limit-train": "7"}):
        assert run_of(cell, tmp_path)() == ""
    assert capsys.readouterr().err.count("warning: 7 training images leave out 3 of 10 classes") == 1


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "short": lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1])),
    "cut": lambda path: path.write_text(path.read_text()[:-25]),
    "foreign": lambda path: path.write_text("a,b\n1,2\nx,y\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_metrics_that_are_lost_are_made_again(two, damage):
    cells, folder = two
    before = rows(cells, folder)
    DAMAGES[damage](folder / cells[0].name / "metrics.csv")
    run = run_of(cells[0], folder)
    assert not run.is_done and run() == "" and run.is_done
    assert rows(cells, folder) == before


@pytest.mark.parametrize("with_status", [True, False])
def test_a_cell_that_holds_another_ones_files_is_refused(two, with_status):
    cells, folder = two
    shutil.rmtree(folder / cells[0].name)
    shutil.copytree(folder / cells[1].name, folder / cells[0].name)
    if not with_status:
        (folder / cells[0].name / "status.json").unlink()
    run = run_of(cells[0], folder)
    assert not run.is_done and "holds another run; move it away" in run()


def test_a_run_that_was_stopped_resumes_under_its_arguments_in_another_order(two):
    cells, folder = two
    (folder / cells[0].name / "status.json").unlink()
    script, *flags, seed, number = cells[0].command
    pairs = " ".join(flags).split(" --")
    turned = " --".join([pairs[0], *pairs[:0:-1]]).split()
    run = CellRun(cells[0].name, [script, *turned, seed, number], folder / cells[0].name, 1)
    assert run.command != cells[0].command and run() == "" and run.is_done


@pytest.mark.parametrize(
    "content", ["", "[]", '{"status": "done"}', '{"cell": 3, "status": "diverged", "epochs": 2}', "{"]
)
def test_a_status_that_says_nothing_of_the_cell_does_not_count(two, content):
    cells, folder = two
    (folder / cells[0].name / "status.json").write_text(content)
    assert not run_of(cells[0], folder).is_done


@pytest.mark.parametrize(("name", "content"), [("cost.json", "{"), ("args.json", "{}"), ("args.json", "{")])
def test_a_damaged_record_is_one_line_that_names_the_folder(two, name, content):
    cells, folder = two
    (folder / cells[0].name / name).write_text(content)
    with pytest.raises(ValueError, match=f"{cells[0].name}: damaged files of a run"):
        collect(cells, folder)


def test_a_cell_that_a_signal_ended_says_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert "ended by SIGKILL" in CellRun("name", [str(script)], tmp_path / "run", 1)()
