"""The numbers in the pages agree with the committed results, and check_numbers.py notices when they do not."""

import json
from pathlib import Path

import check_numbers
import pytest

TABLES = check_numbers.ROOT / "tables" / "README.md"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Where a changed copy of tables/README.md goes; its links lead to the committed results."""
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "results").symlink_to(check_numbers.ROOT / "tables" / "results")
    (tmp_path / "meta-test").symlink_to(check_numbers.ROOT / "meta-test")
    return tmp_path / "tables" / "README.md"


@pytest.fixture
def small_page(tmp_path: Path) -> Path:
    """A page beside one result: a table with the row 59.7333 ± 1.7142, of runs on 10,000 images."""
    folder = tmp_path / "tables" / "results" / "race"
    (folder / "runs" / "one").mkdir(parents=True)
    (folder / "table.csv").write_text("method,last_mean,last_std\nours,59.7333,1.7142\nfixed,29.6467,8.4184\n")
    (folder / "table.md").write_text("# Race\n")
    (folder / "runs" / "one" / "args.json").write_text(json.dumps({"arguments": {"limit_train": 10000}}))
    return tmp_path / "tables" / "README.md"


def findings(page: Path, text: str) -> list[str]:
    page.write_text(text)
    return [line.partition(f"{page}:")[2] for line in check_numbers.problems(page)[0]]


def test_a_commit_is_no_number_though_it_begins_like_one(small_page):
    assert findings(small_page, "[Race](results/race/table.md), commit 8e1475f37bb0: 59.73 ± 1.71\n") == []


@pytest.mark.parametrize("name", ["README.md", "tables/README.md"])
def test_every_number_of_a_committed_page_agrees_with_the_committed_results(name):
    found, compared = check_numbers.problems(check_numbers.ROOT / name)
    assert not found
    assert compared > 0


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("| MLR-SNet (learning) | 59.7 ± 1.7 |", "| MLR-SNet (learning) | 59.8 ± 1.7 |"),
        ("| MLR-SNet (learning) | 59.7 ± 1.7 |", "| MLR-SNet (learning) | 59.7 ± 1.2 |"),
        ("77.9 %", "77.1 %"),
        ("217,646", "217,645"),
    ],
)
def test_one_changed_digit_fails_with_its_file_line_and_number(page, capsys, right, wrong):
    text = TABLES.read_text()
    line = text[:text.index(right)].count("\n") + 1
    page.write_text(text.replace(right, wrong, 1))
    assert check_numbers.main([str(page)]) == 1
    number = next(word for word in wrong.split() if word not in right.split())
    report = capsys.readouterr().out.splitlines()[0]
    assert report.startswith(f"{page}:{line}: ")
    assert number in report


def test_an_unchanged_copy_passes(page, capsys):
    page.write_text(TABLES.read_text())
    assert check_numbers.main([str(page)]) == 0
    assert "numbers agree" in capsys.readouterr().out


def test_numbers_may_be_rounded_but_counts_may_not(small_page):
    link = "[table](results/race/table.md) "
    assert findings(small_page, link + "59.7 ± 1.7, 59.73, 60 %, 29.6 and 10,000 images") == []
    assert findings(small_page, link + "60 and 10,001") == [
        "1: 60: no linked result has this value",
        "1: 10,001: no linked result has this value",
    ]


def test_a_mean_takes_its_own_deviation(small_page):
    found = findings(small_page, "[table](results/race)\n59.7 ± 8.4")
    assert found == ["2: 59.7 ± 8.4: no linked result has this mean and deviation"]


def test_rounding_the_rounded_table_again_is_a_mistake(small_page):
    folder = small_page.parent / "results" / "race"
    (folder / "table.csv").write_text("method,last_mean,last_std\nadam,61.7,1.3468\n")
    (folder / "table.md").write_text("| adam | 61.70 ± 1.35 |\n")
    assert findings(small_page, "[table](results/race) 61.7 ± 1.3") == []
    assert len(findings(small_page, "[table](results/race) 61.7 ± 1.4")) == 1


def test_a_link_to_all_results_links_none(small_page):
    assert findings(small_page, "[all](results) 59.7") == ["1: 59.7: the section links no results"]


def test_a_section_has_only_the_results_that_it_links(small_page):
    text = "# One\n[table](results/race) 59.7\n# Two\n59.7"
    assert findings(small_page, text) == ["4: 59.7: the section links no results"]


def test_a_link_to_results_that_do_not_exist_is_reported(small_page):
    assert findings(small_page, "[table](results/gone/table.md)") == ["1: results/gone/table.md does not exist"]


def test_what_cannot_be_a_result_is_skipped(small_page):
    text = """# ResNet-18 on CIFAR-10 at 32×32 pixels in bf16, 2022, arXiv 2007.14546, torch 2.14.1, ÷4
1. `--lr 0.3` and [a link](page4.md) to https://example.org/7
```sh
# run 17
python run.py --seed 5
```
<!-- 12 --> Python 3.11
"""
    assert findings(small_page, text) == []


def test_numbers_above_the_marker_are_settings(small_page):
    text = f"200 epochs\n{check_numbers.MARKER}\n201 epochs"
    assert findings(small_page, text) == ["3: 201: the section links no results"]


def test_a_missing_page_is_one_line_and_exit_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        check_numbers.main([str(tmp_path / "gone.md")])
    assert stopped.value.code == 2
    assert "no such page" in capsys.readouterr().err
