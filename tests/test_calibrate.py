"""The calibration: its targets, its rules, and a small one from the first run to the page."""

import pytest
from studies import calibrate
from studies.calibration_problems import PROBLEMS
from writing import read_csv, read_jsonl


def case(scores, trials=None):
    return calibrate.Case(PROBLEMS[0], 100, scores, 0.0, [], trials or {})


def test_the_best_peak_is_the_vertex_through_the_lowest_score_and_its_neighbours():
    parabola = case({octave: (octave - 0.3) ** 2 for octave in range(-2, 3)})
    assert parabola.best == pytest.approx(0.3)


def test_the_regret_of_a_rate_lies_between_those_of_the_peaks_beside_it_and_is_level_outside_the_grid():
    one = case({-1: 4.0, 0: 1.0, 1: 3.0})
    assert [one.regret(rate) for rate in (0.0, 0.5, 1.0, 7.0, -7.0)] == [0.0, 1.0, 2.0, 2.0, 3.0]


def test_c_is_fitted_to_the_smallest_error():
    cases = [case({octave: (octave - 0.4) ** 2 for octave in range(-2, 4)})]
    assert calibrate.fitted(calibrate.RULES["c per optimizer"], cases) == pytest.approx(0.4)


def test_the_best_of_the_four_trials_about_the_guess_is_none_that_blew_up_or_is_far_from_it():
    trials = {-3: [2.0, 1.5], -1: [2.0, 1.2], 0: [2.0, 0.1], 1: [2.0, 1.0], 2: [2.0, float("nan")]}
    assert case({}, trials).trial_rate(0.0) == 1


def test_a_small_calibration_is_resumed_and_writes_its_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "TRACE_SEEDS", 1)
    monkeypatch.setattr(calibrate, "JUDGE_SEEDS", 1)
    arguments = ["--data-root", str(tmp_path), "--out", str(tmp_path / "out"), "--only", "digits8"]
    assert calibrate.main(arguments) == 0
    before = (tmp_path / "out" / "runs.jsonl").read_bytes()
    with (tmp_path / "out" / "runs.jsonl").open("a") as file:
        file.write('{"problem":"dig')  # as a kill leaves it
    page = (tmp_path / "out" / "README.md").read_text()
    assert calibrate.main(arguments) == 0
    assert (tmp_path / "out" / "runs.jsonl").read_bytes() == before
    assert all(f"| {name} | " in page for name in calibrate.RULES)
    rows = read_csv(tmp_path / "out" / "table.csv")
    assert [row["steps"] for row in rows] == ["300", "100", "100", "300"]
    assert read_jsonl(tmp_path / "out" / "runs.jsonl")[0]["study"] == "calibrate"


def test_a_calibration_that_goes_on_at_another_commit_says_so(tmp_path, capsys):
    calibrate.Cache(tmp_path / "runs.jsonl", {"commit": "old"})
    assert not capsys.readouterr().err
    calibrate.Cache(tmp_path / "runs.jsonl", {"commit": "new"})
    assert "was begun at commit old" in capsys.readouterr().err


def test_a_word_that_is_in_no_problem_is_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        calibrate.main(["--data-root", str(tmp_path), "--out", str(tmp_path / "out"), "--only", "nothing"])
    assert exit.value.code == 2 and "--only nothing: is in the name of no problem" in capsys.readouterr().err


def test_data_that_is_not_there_is_one_line_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        calibrate.main(["--data-root", str(tmp_path), "--out", str(tmp_path / "out"), "--only", "cifar8 mlp2"])
    assert exit.value.code == 2 and "No such file or directory:" in capsys.readouterr().err
