"""The page of a table: one file that shows every method and leads to its runs."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from cells import cells_of
from page import write_page
from race import Race
from report import summarise
from specs import TABLES

SCRIPT = Path(__file__).resolve().parents[1] / "tables" / "tables.py"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tables"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def race(tmp_path):
    """Runs of three methods with two seeds; those of the last method diverged after an epoch."""
    cells = cells_of(TABLES["cifar10-resnet"], "smoke", 2, ["MLR-SNet (learning)", "fixed", "l4mom"], {})
    for cell in cells:
        folder = tmp_path / "runs" / cell.name
        folder.mkdir(parents=True)
        num_epochs = 1 if cell.method == "l4mom" else 2
        rows = ["epoch,lr,train_loss,train_acc,test_loss,test_acc,seconds"]
        rows += [f"{epoch},0.1,1.5,50,1.6,{40 + epoch + cell.seed},2" for epoch in range(1, num_epochs + 1)]
        (folder / "metrics.csv").write_text("\n".join(rows))
        cost = {"forward_passes": 8, "backward_passes": 8, "peak_memory_mib": 100, "steps_per_epoch": 4}
        (folder / "cost.json").write_text(json.dumps(cost))
    return Race(cells, tmp_path / "runs")


def test_a_page_is_one_file_with_every_method_and_links_to_all_its_runs(race, tmp_path):
    pytest.importorskip("bokeh")
    write_page(tmp_path / "table.html", "A title", race, summarise(race, None))
    page = (tmp_path / "table.html").read_text()
    assert not re.search(r"<(script|link)[^>]*(src|href)=", page)  # nothing is fetched
    assert "A title" in page
    for cell in race.cells:
        assert f'"{cell.method}"' in page
        links = re.findall(rf"href='(runs/{re.escape(cell.name)}/)'", page)
        assert links and (tmp_path / links[0]).is_dir()


def test_open_without_bokeh_is_one_line_and_status_2(tables, monkeypatch, capsys):
    monkeypatch.setattr(tables, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        tables.parse_args(["--table", "cifar10-resnet", "--open"])
    assert exit.value.code == 2
    assert "pip install bokeh" in capsys.readouterr().err.splitlines()[-1]
