"""What is only shown, lines, pictures and events, never ends a run, and comes after what is saved."""

import errno
import sys

import pytest
import torch
from faults import TINY, TRAIN, is_whole, shell
from tensorboard.summary.writer import record_writer
from test_scripts import META_TEST, META_TRAIN, call

from training.log import Log


@pytest.mark.parametrize("after", [
    "| head -1",
    *[pytest.param(after, marks=pytest.mark.slow) for after in (
        "2>&-", ">&-", ">/dev/full", "<&- >&- 2>&-", ">/dev/full 2>&1", "2>/dev/full", "2> >(true)", "> >(true) 2>&1",
        "2>&1 | head -0",
    )],
])
def test_a_run_whose_output_cannot_be_written_ends_well(after, tmp_path):
    out = tmp_path / "run"
    done = shell("", META_TRAIN, [*TRAIN, "--num-epoch", "6", "--gamma", "measured", "--out", out], after)
    assert done.returncode == 0 and b"Traceback" not in done.stderr and is_whole(out), done
    assert shell("", META_TRAIN, ["--resume", "--out", out], after).returncode == 0


@pytest.mark.parametrize("after", ["2>&-", pytest.param("2>/dev/full", marks=pytest.mark.slow)])
def test_bad_input_has_its_status_where_no_line_can_be_written(after, tmp_path):
    done = shell("", META_TRAIN, [*TRAIN, "--limit-train", "9999", "--out", tmp_path / "run"], after)
    assert done.returncode == 2 and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("environment", [
    {"MPLBACKEND": "module://missing"}, {"MPLBACKEND": "QtAgg"}, {"MATPLOTLIBRC": "usetex"}, {"PYTHONPATH": "stubs"},
    {"HOME": "/nonexistent"}, {"HOME": ""},
])
def test_a_run_that_cannot_be_drawn_ends_well(environment, tmp_path):
    (tmp_path / "usetex").write_text("text.usetex: True")
    for name in ("matplotlib", "tensorboard"):
        (tmp_path / "stubs" / name).mkdir(parents=True)
        (tmp_path / "stubs" / name / "__init__.py").write_text("raise RuntimeError('built for another numpy')")
    paths = {name: value if value.startswith("/") else str(tmp_path / value)
             for name, value in environment.items() if name != "MPLBACKEND" and value}
    done = shell("", META_TRAIN, [*TRAIN, "--out", tmp_path / "run"], **{**environment, **paths})
    assert done.returncode == 0 and b"Traceback" not in done.stderr and is_whole(tmp_path / "run"), done


@pytest.mark.parametrize("name", ["$NAME_$SEED", "a_{b}^$\\frac$", "not UTF-8 \udcff"])
def test_a_run_in_a_folder_of_any_name_is_drawn(name, tmp_path, capsys):
    done = call(capsys, META_TRAIN, *TRAIN, "--out", tmp_path / name)
    assert done.returncode == 0 and (tmp_path / name / "run.png").exists()
    assert "\udcff" in name or not done.stderr  # TensorBoard wants UTF-8


@pytest.mark.parametrize(("module", "missing"), [
    ("torch.utils.tensorboard", "TensorBoard events are not written"), ("matplotlib", "run.png could not be drawn"),
])
def test_a_run_without_a_package_that_only_shows_says_so_in_one_line(module, missing, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    done = call(capsys, META_TRAIN, *TRAIN, "--out", tmp_path / "run")
    assert done.returncode == 0 and is_whole(tmp_path / "run")
    assert len(done.stderr.splitlines()) == 1 and missing in done.stderr


@pytest.mark.parametrize("method", ["write", "flush", "close"])
def test_events_for_which_the_disk_is_full_end_with_one_line_and_the_run_goes_on(
    method, tmp_path, capsys, monkeypatch
):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_writer.RecordWriter, method, full)
    done = call(capsys, META_TRAIN, *TRAIN, "--out", tmp_path / "run")
    assert done.returncode == 0 and is_whole(tmp_path / "run")
    assert len(done.stderr.splitlines()) == 1 and "No space left on device" in done.stderr


def test_a_run_is_saved_before_it_is_shown(tmp_path, capsys, monkeypatch):
    out, shown = tmp_path / "run", []

    class Watched(Log):
        def epoch(self, row):
            shown.append(torch.load(out / "checkpoint.pth", weights_only=True)["step"])

    def draw_run(path, rows):
        shown.append((out / "network.pth").exists())

    monkeypatch.setattr("training.trainer.Log", Watched)
    monkeypatch.setattr("training.trainer.draw_run", draw_run)
    assert call(capsys, META_TRAIN, *TRAIN, "--out", out).returncode == 0
    assert shown == [2, 4, True]


@pytest.mark.parametrize(("script", "words"), [
    (META_TRAIN, ["--help"]), (META_TRAIN, [*TINY, "--image-size", "30000", "--out", "missing/é"]),
    pytest.param(META_TEST.parent / "inspect-schedule.py", ["--out", "/dev/null/é.png"], marks=pytest.mark.slow),
])
def test_letters_that_a_terminal_lacks_are_escaped(script, words):
    done = shell("", script, words, PYTHONIOENCODING="ascii")
    assert done.returncode == (0 if words == ["--help"] else 2) and b"Traceback" not in done.stderr
    assert (done.stdout + done.stderr).isascii()
