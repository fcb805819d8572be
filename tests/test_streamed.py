"""Image data sets that worker processes read from disk, and what happens where these cannot go on."""

import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_files import write_image
from test_scripts import META_TEST, META_TRAIN, call, results

import data.streamed
from data import build_task
from data.streamed import tinyimagenet


@pytest.fixture(scope="module")
def streamed_roots(tmp_path_factory):
    """An ImageNet of 2 and a TinyImageNet of 3 classes, each in its own layout."""
    root, rng = tmp_path_factory.mktemp("streamed"), np.random.default_rng(0)
    for split, number in (("train", 9), ("val", 4)):
        for label in ("n01440764", "n01443537"):
            for index in range(number):
                write_image(root / "imagenet" / split / label / f"{index}.JPEG", 40 + index, rng)
    tiny, lines = root / "tiny-imagenet-200", []
    for number, label in enumerate(("n01443537", "n01629819", "n01641577")):
        for index in range(9):
            write_image(tiny / "train" / label / "images" / f"{label}_{index}.JPEG", 64, rng)
        for index in range(4):
            name = f"val_{3 * index + number}.JPEG"
            write_image(tiny / "val" / "images" / name, 64, rng)
            lines.append(f"{name}\t{label}\t0\t0\t62\t62\n")
    (tiny / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    return {"imagenet": root / "imagenet", "tinyimagenet": root}


@pytest.mark.parametrize("name", ["imagenet", "tinyimagenet"])
def test_a_streamed_data_set_gives_the_same_batches_from_any_step_and_with_any_number_of_workers(streamed_roots, name):
    def task(workers):
        return build_task(name, streamed_roots[name], image_size=16, seed=1, batch_size=4, num_meta=4, workers=workers,
                          device=torch.device("cpu"))

    before = torch.get_rng_state()
    alone, helped = task(0), task(2)
    whole = list(itertools.islice(alone.train_batches(0), 2 * alone.steps_per_epoch))
    for start in (0, alone.steps_per_epoch + 1):
        for one, other in zip(whole[start:], helped.train_batches(start), strict=False):
            assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)
    assert not torch.equal(whole[0].inputs, whole[alone.steps_per_epoch].inputs)
    assert whole[0].inputs.shape == (4, 3, 16, 16)
    assert torch.equal(before, torch.get_rng_state())


def test_the_fingerprint_of_a_streamed_data_set_depends_on_its_files_and_not_on_their_place(streamed_roots, tmp_path):
    def fingerprint(root):
        return build_task("imagenet", root, image_size=16, seed=1, batch_size=4, num_meta=4, workers=0,
                          device=torch.device("cpu")).fingerprint()

    moved = shutil.copytree(streamed_roots["imagenet"], tmp_path / "moved")
    reference = fingerprint(streamed_roots["imagenet"])
    assert fingerprint(moved) == reference
    with open(next(moved.rglob("*.JPEG")), "ab") as file:
        file.write(b"\0")
    assert fingerprint(moved) != reference


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_that_turns_up_during_training_is_one_line_and_status_2(streamed_roots, tmp_path, capsys, workers):
    root = shutil.copytree(streamed_roots["imagenet"], tmp_path / "data")
    bad = root / "train" / "n01440764" / "3.JPEG"
    bad.write_bytes(bad.read_bytes()[:500])
    arguments = ["--network", "resnet8", "--dataset", "imagenet", "--data-root", root, "--image-size", "16",
                 "--batch-size", "5", "--num-epoch", "1", "--workers", workers, "--device", "cpu"]
    done = call(capsys, META_TEST, *arguments, "--out", tmp_path / "stops")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{bad}: cannot be read" in done.stderr.splitlines()[-1]
    done = call(capsys, META_TEST, *arguments, "--skip-bad-images", "--out", tmp_path / "skips")
    assert done.returncode == 0 and "skipped 1 of 18" in done.stderr


def test_the_annotations_of_tinyimagenet_name_the_classes_of_its_test_images(streamed_roots):
    read = tinyimagenet(streamed_roots["tinyimagenet"], None, 0)
    assert [label for _, label in read.test] == [int(Path(file).stem[4:]) % 3 for file, _ in read.test]
    assert read.num_classes == 3 and len(read.test) == 12


def test_tinyimagenet_is_unpacked_whole_or_not_at_all(streamed_roots, tmp_path, monkeypatch):
    def unpack(url, root, extract_root, md5):
        shutil.copytree(streamed_roots["tinyimagenet"] / "tiny-imagenet-200", Path(extract_root, "tiny-imagenet-200"))
        if not (tmp_path / "second").exists():
            (tmp_path / "second").touch()
            raise KeyboardInterrupt

    monkeypatch.setattr(data.streamed, "download_and_extract_archive", unpack)
    with pytest.raises(KeyboardInterrupt):
        tinyimagenet(tmp_path / "root", None, 0)
    assert list((tmp_path / "root").iterdir()) == []
    assert len(tinyimagenet(tmp_path / "root", None, 0).train) == 27
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["tiny-imagenet-200"]


def test_an_annotated_image_that_is_missing_is_named(streamed_roots, tmp_path):
    shutil.copytree(streamed_roots["tinyimagenet"], tmp_path / "root")
    (tmp_path / "root" / "tiny-imagenet-200" / "val" / "images" / "val_0.JPEG").unlink()
    task = build_task("tinyimagenet", tmp_path / "root", batch_size=4, device=torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="val_0.JPEG"):
        task.fingerprint()


def test_a_run_is_resumed_with_another_number_of_workers(streamed_roots, tmp_path, capsys):
    arguments = ["--network", "resnet8", "--dataset", "imagenet", "--data-root", streamed_roots["imagenet"],
                 "--image-size", "16", "--batch-size", "7", "--num-epoch", "1", "--workers", "1", "--device", "cpu",
                 "--schedule", "fixed"]
    assert call(capsys, META_TEST, *arguments, "--out", tmp_path / "run").returncode == 0
    done = call(capsys, META_TEST, "--resume", "--workers", "0", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr


def test_files_of_another_size_are_brought_to_that_of_tinyimagenet(streamed_roots, tmp_path):
    root = shutil.copytree(streamed_roots["tinyimagenet"], tmp_path / "data")
    for path in root.rglob("n01443537_*.JPEG"):
        write_image(path, 50, np.random.default_rng(0))
    task = build_task("tinyimagenet", root, batch_size=9, workers=0, device=torch.device("cpu"))
    assert next(task.train_batches(0)).inputs.shape[2:] == (64, 64)


@pytest.mark.parametrize("name", ["imagenet", "tinyimagenet"])
def test_an_epoch_on_a_streamed_data_set_runs_with_workers(streamed_roots, tmp_path, capsys, name):
    done = call(capsys, META_TRAIN, "--network", "resnet8", "--dataset", name, "--data-root", streamed_roots[name],
                "--image-size", "16", "--batch-size", "7", "--num-meta", "3", "--num-epoch", "1", "--t-val", "1",
                "--workers", "2", "--device", "cpu", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert len(results(tmp_path / "run")[0]) == 2


@pytest.mark.parametrize(("name", "spoil", "message"), [
    ("tinyimagenet", lambda root: (root / "tiny-imagenet-200").mkdir(), "expected class folders"),
    ("tinyimagenet", lambda root: None, "not in .* could not be downloaded"),
    ("tinyimagenet", lambda root: (root / "tiny-imagenet-200.zip").write_bytes(b"half of it"),
     r"damaged or incomplete in .*\(tiny-imagenet-200.zip\), and could not be downloaded"),
    ("tinyimagenet", lambda root: (root / "tiny-imagenet-200.zip").write_bytes(b""), "damaged or incomplete"),
    ("imagenet", lambda root: None, "train: expected class folders"),
])
def test_a_streamed_data_set_that_is_missing_is_one_clear_line(tmp_path, monkeypatch, name, spoil, message):
    def refuse(*args, **kwargs):
        raise OSError("no network\nmore")

    monkeypatch.setattr(data.streamed, "download_and_extract_archive", refuse)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        build_task(name, tmp_path, seed=0, batch_size=4, device=torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_before_the_annotations_of_tinyimagenet_belongs_to_no_file_name(streamed_roots, tmp_path):
    root = shutil.copytree(streamed_roots["tinyimagenet"], tmp_path / "data")
    annotations = root / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text(), encoding="utf-8-sig")
    assert all(Path(file).exists() for file, _ in tinyimagenet(root, None, 0).test)


# ---------------------------------------------------------------------------------------------- workers that fail


def streams(root, workers=2):
    task = build_task("imagenet", root, image_size=16, seed=1, batch_size=4, workers=workers,
                      device=torch.device("cpu"))
    return task.train_batches(0)


def fails_in_one_line(capfd, batches):
    with pytest.raises(OSError, match="^workers [12]: the processes that read images failed") as error:
        for _ in range(30):
            next(batches)
    assert str(error.value).endswith("give 0 to read them in the training process") and "\n" not in str(error.value)
    assert "Traceback" not in capfd.readouterr().err
    return str(error.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_killed_worker_is_one_line_where_its_batch_is_awaited(streamed_roots, capfd, number):
    others = multiprocessing.active_children()  # of other tests
    batches = streams(streamed_roots["imagenet"])
    next(batches)
    worker = next(child for child in multiprocessing.active_children() if child not in others)
    os.kill(worker.pid, number)
    for _ in range(50):
        time.sleep(0.01)  # torch would raise here
    assert "exited unexpectedly" in fails_in_one_line(capfd, batches)


def test_a_sigterm_to_the_whole_job_leaves_its_workers_time_for_a_last_batch(streamed_roots):
    others = multiprocessing.active_children()  # of other tests
    batches = streams(streamed_roots["imagenet"])
    for _ in range(2):
        next(batches)  # one of each worker, which has begun by then
    workers = [child for child in multiprocessing.active_children() if child not in others]
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    for _ in range(4):
        next(batches)
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(timeout=30)
        assert worker.exitcode in (-signal.SIGTERM, -signal.SIGALRM)


def test_memory_that_workers_cannot_share_is_one_line(streamed_roots, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # a batch is larger
    try:
        message = fails_in_one_line(capfd, streams(streamed_roots["imagenet"], workers=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "torch_" in message  # the name of the shared file


@pytest.mark.parametrize("started", [False, True])
def test_too_many_open_files_are_one_line(streamed_roots, capfd, started):
    batches, limits = streams(streamed_roots["imagenet"]), resource.getrlimit(resource.RLIMIT_NOFILE)
    if started:
        next(batches)
    few = os.dup(0)  # the lowest number that is free
    os.close(few)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        message = fails_in_one_line(capfd, batches)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "open files" in message or "ancdata" in message


def test_an_error_of_the_program_keeps_its_traceback_without_workers(streamed_roots, monkeypatch):
    def fail(path):
        raise RuntimeError("a bug")

    monkeypatch.setattr(data.streamed, "read_image", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        next(streams(streamed_roots["imagenet"], workers=0))


@pytest.mark.parametrize("name", ["digits", "folder", "cifar10"])
def test_workers_are_refused_where_nothing_is_streamed(streamed_roots, name):
    with pytest.raises(ValueError, match=f"workers is for tinyimagenet and imagenet; {name} lies in memory"):
        build_task(name, streamed_roots["imagenet"], workers=2, batch_size=4, device=torch.device("cpu"))
