"""A run's folder: it harms no file of the user, and a resumed run knows what it began with."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faults import TINY, TRAIN, shell, tree
from test_scripts import META_TEST, META_TRAIN, ONE_THREAD, call, kill_and_resume, results, same

from training.folder import FolderLock, _commit
from utils import write_atomically


@pytest.mark.parametrize("name", [
    "mlr_snet_200.pth", "network.pth", "network_average.pth", "run.png", "cost.json", "lr_scale.json", "notes.txt",
    "events.out.tfevents.1", ".hidden", "network.pth.tmp",
])
def test_a_new_run_refuses_a_folder_in_which_files_lie(name, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("the user's")
    done = call(capsys, META_TRAIN, *TRAIN, "--gamma", "measured", "--average", "--out", out)
    assert done.returncode == 2 and name in done.stderr and "give a new folder" in done.stderr
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "the user's")]


def test_the_folder_of_the_shipped_nets_is_refused(tmp_path, capsys):
    shutil.copytree(META_TEST.parent, tmp_path / "meta-test", ignore=shutil.ignore_patterns("result"))
    before = tree(tmp_path)
    done = call(capsys, META_TRAIN, *TRAIN, "--out", tmp_path / "meta-test")
    assert done.returncode == 2 and tree(tmp_path) == before
    done = call(capsys, META_TRAIN, "--resume", "--out", tmp_path / "meta-test")
    assert done.returncode == 2 and "no run in" in done.stderr and tree(tmp_path) == before


def test_a_run_that_resumes_before_its_first_checkpoint_keeps_its_command(finished, tmp_path, capsys):
    shutil.copy(finished / "args.json", tmp_path)
    record = json.loads((tmp_path / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps(record | {"command": ["meta-train.py", "--as", "begun"]}))
    assert call(capsys, META_TRAIN, "--resume", "--out", tmp_path).returncode == 0
    assert json.loads((tmp_path / "args.json").read_text())["command"] == ["meta-train.py", "--as", "begun"]


def test_a_copy_inside_another_repository_does_not_record_its_commit(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    (tmp_path / "copy").mkdir()
    for root, is_known in ((tmp_path, True), (tmp_path / "copy", False)):
        monkeypatch.setattr("training.folder.ROOT", root)
        assert (_commit() != "unknown") == is_known


def test_a_place_that_cannot_be_written_to_is_told_before_the_scale_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    done = call(capsys, META_TEST, *TINY, "--momentum", "0.9", "--out", tmp_path / "a" / "b")
    assert done.returncode == 2 and f"{tmp_path} is not a folder that can be written to" in done.stderr
    assert "measuring" not in done.stdout + done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["run.png", "cost.json", "notes.txt"])
def test_a_resumed_run_without_a_checkpoint_overwrites_nothing(finished, tmp_path, capsys, name):
    shutil.copy(finished / "args.json", tmp_path)
    (tmp_path / name).write_text("the user's")
    before = tree(tmp_path)
    done = call(capsys, META_TRAIN, "--resume", "--out", tmp_path)
    assert done.returncode == 2 and f"missing beside {name}" in done.stderr and tree(tmp_path) == before


LOCKS = {
    "symbolic link": lambda lock, precious: lock.symlink_to(precious),
    "hard link": lambda lock, precious: lock.hardlink_to(precious),
    "file": lambda lock, precious: lock.write_text("notes"),
    "process id of another program": lambda lock, precious: lock.write_text("12\n"),
    "folder": lambda lock, precious: lock.mkdir(),
    "pipe": lambda lock, precious: os.mkfifo(lock),
}


@pytest.mark.parametrize("kind", LOCKS)
def test_a_lock_that_is_not_ours_is_refused_and_kept(kind, tmp_path):
    precious, lock = tmp_path / "precious", tmp_path / "run" / ".lock"
    precious.write_text("the user's")
    lock.parent.mkdir()
    LOCKS[kind](lock, precious)
    before = lock.read_bytes() if lock.is_file() else None
    with pytest.raises((ValueError, OSError), match=r"\.lock.*give another --out"):
        FolderLock(lock.parent).acquire()
    assert precious.read_text() == "the user's" and (lock.read_bytes() if lock.is_file() else None) == before


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def flock(file, how):  # as some network file systems do
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with FolderLock(tmp_path):
        line, = capsys.readouterr().err.splitlines()
    assert f"{tmp_path} cannot be locked" in line


@pytest.mark.parametrize("words", [[], ["a command", "of two\nlines"], ["not UTF-8: \udcff"]])
def test_a_lock_of_ours_is_taken_again(words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", words)
    for _ in range(2):
        with FolderLock(tmp_path):
            assert (tmp_path / ".lock").read_bytes().startswith(f"{os.getpid()} ".encode())


@pytest.mark.parametrize("name", ["checkpoint.pth.tmp", "metrics.csv.tmp", "run.png.tmp", "network.pth", "run.png"])
def test_a_resumed_run_writes_through_no_link(finished, tmp_path, capsys, name):
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("the user's")
    shutil.copytree(finished, folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(precious)
    done = call(capsys, META_TRAIN, "--resume", "--out", folder)
    assert done.returncode == 0 and precious.read_text() == "the user's", done.stderr
    assert (folder / name).is_symlink() == name.endswith(".tmp")


def test_a_temporary_file_is_never_one_that_exists(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda number: "0")
    (tmp_path / "precious").write_text("the user's")
    (tmp_path / ".mlr-snet-0.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="could not be written"):
        write_atomically(tmp_path / "file", b"ours")
    assert (tmp_path / "precious").read_text() == "the user's" and not (tmp_path / "file").exists()


def test_a_run_removes_what_a_killed_one_left_half_written_and_nothing_else(finished, tmp_path, capsys):
    new, resumed = tmp_path / "new", tmp_path / "resumed"
    new.mkdir()
    shutil.copytree(finished, resumed)
    for folder in (new, resumed):
        (folder / ".lock").write_text("1 meta-train.py")
        (folder / ".mlr-snet-0123456789abcdef.tmp").write_text("half of it")
    (resumed / "notes.tmp").write_text("the user's")
    assert call(capsys, META_TRAIN, *TRAIN, "--out", new).returncode == 0
    assert call(capsys, META_TRAIN, "--resume", "--out", resumed).returncode == 0
    assert [path.name for path in (*new.glob("*.tmp"), *resumed.glob("*.tmp"))] == ["notes.tmp"]


# ---------------------------------------------------------------------------------------------- what a run began with


def test_a_resumed_run_has_as_many_threads_as_it_began_with(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    torch.set_num_threads(2)
    try:
        done = call(capsys, META_TRAIN, "--resume", "--out", tmp_path / "run")
        assert done.returncode == 0 and not done.stderr and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


@pytest.mark.slow
def test_a_run_resumed_with_other_threads_ends_as_an_unbroken_one(tmp_path):
    words = [*TRAIN, "--limit-train", "256", "--num-epoch", "3", "--momentum", "0.9", "--gamma", "0.5"]
    two = {**ONE_THREAD, "OMP_NUM_THREADS": "2"}
    assert shell("", META_TRAIN, [*words, "--out", tmp_path / "whole"], **two).returncode == 0
    kill_and_resume(words, tmp_path / "broken", signal.SIGTERM, two)  # on one thread
    same(results(tmp_path / "whole"), results(tmp_path / "broken"))


@pytest.mark.parametrize(("table", "name", "value"), [
    ("versions", "torch", "2.6.0"), ("hardware", "gpu", "NVIDIA H100"), ("hardware", "cpu", "Z80"),
    ("hardware", "ranks", 2), (None, "commit", "abc"),
])
def test_a_resumed_run_says_what_has_changed_since_it_began(table, name, value, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    record = json.loads((finished / "args.json").read_text())
    (record[table] if table else record)[name] = value
    (tmp_path / "run" / "args.json").write_text(json.dumps(record))
    done = call(capsys, META_TRAIN, "--resume", "--out", tmp_path / "run")
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1
    assert f"instead of {value}; results may differ" in done.stderr
