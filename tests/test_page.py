"""The page of a table: one file that shows every method and leads to its runs."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from page import write_html
from records import summarise
from test_report import accuracies, run_of

SCRIPT = Path(__file__).resolve().parents[1] / "tables" / "tables.py"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tables"] = module
    spec.loader.exec_module(module)
    return module


def test_a_page_is_one_file_with_every_method_and_links_to_all_its_runs(tmp_path):
    pytest.importorskip("bokeh")
    runs = [run_of(method, seed, accuracies(41 + seed, 42 + seed))
            for method in ("MLR-SNet (learning)", "fixed") for seed in (0, 1)]
    runs.append(run_of("l4mom", 0, accuracies(10)))  # it diverged after an epoch
    for run in runs:
        run.name = run.name.replace(" ", "_")
    write_html(tmp_path / "table.html", "A title", summarise(runs, None))
    page = (tmp_path / "table.html").read_text()
    assert not re.search(r"<(script|link)[^>]*(src|href)=", page)  # nothing is fetched
    assert "A title" in page
    for run in runs:
        assert f'"{run.method}"' in page and f"href='runs/{run.name.replace('(', '%28').replace(')', '%29')}/'" in page


def test_open_without_bokeh_is_one_line_and_status_2(tables, monkeypatch, capsys):
    monkeypatch.setattr(tables, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        tables.parse_args(["--table", "cifar10-resnet", "--open"])
    assert exit.value.code == 2
    assert "pip install bokeh" in capsys.readouterr().err.splitlines()[-1]
