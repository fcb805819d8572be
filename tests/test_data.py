"""The image task: its splits, its stateless streams, and the class-folder layout."""

import itertools
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from test_scripts import META_TRAIN, call, results

import data.streamed
from data import build_task
from data.streamed import tinyimagenet


def digits_task(**options):
    return build_task("digits", Path(), **{"seed": 3, "batch_size": 64, "device": torch.device("cpu"), **options})


def test_the_meta_set_is_balanced_and_disjoint_from_the_training_set():
    task = digits_task(num_meta=100, limit_train=500)
    assert not set(task.meta_indices.tolist()) & set(task.train_indices.tolist())
    assert task.train.labels[task.meta_indices].bincount().tolist() == [10] * 10
    assert task.train.labels[task.train_indices].bincount().tolist() == [50] * 10


@pytest.mark.parametrize("start", [1, 7, 8, 20])
def test_a_stream_started_at_any_step_gives_the_same_batches(start):
    task = digits_task(limit_train=500)
    task.train.augment = True
    whole = task.train_batches(0)
    for _ in range(start):
        next(whole)
    for one, other, _ in zip(whole, task.train_batches(start), range(10), strict=False):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("options", [{"num_meta": 1437}, {"limit_train": 2000}, {"limit_test": 361}, {"batch_size": 0}])
def test_sizes_that_the_data_do_not_allow_are_refused(options):
    with pytest.raises(ValueError, match="[0-9]"):
        digits_task(**options)


@pytest.mark.parametrize("splits", [("train", "test"), ("train",)])
def test_class_folders_are_read_and_resized(tmp_path, splits):
    rng = np.random.default_rng(0)
    for split in splits:
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(10):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    task = build_task("folder", tmp_path, image_size=16, seed=0, batch_size=4, device=torch.device("cpu"))
    assert next(task.train_batches(0)).inputs.shape == (4, 3, 16, 16)
    assert len(task.train_indices) == (20 if len(splits) == 2 else 16)
    assert len(task.test_indices) == (20 if len(splits) == 2 else 4)


def test_the_fingerprint_is_the_same_for_the_same_data_and_differs_for_any_other():
    reference = digits_task(num_meta=100).fingerprint()
    assert reference == digits_task(num_meta=100, batch_size=32).fingerprint()
    assert len({reference, *(digits_task(**options).fingerprint() for options in
                             ({}, {"num_meta": 100, "seed": 4}, {"num_meta": 100, "limit_test": 50},
                              {"num_meta": 100, "image_size": 16}))}) == 5
    task = digits_task(num_meta=100)
    task.train.images[5, 0, 3, 3] += 1
    assert task.fingerprint() != reference


def test_data_that_are_not_available_are_one_clear_line(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no network\nmore")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    for name in ("cifar10", "folder"):
        with pytest.raises(ValueError) as error:
            build_task(name, tmp_path, seed=0, batch_size=4, device=torch.device("cpu"))
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def write_image(path, size, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


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


def test_the_annotations_of_tinyimagenet_name_the_classes_of_its_test_images(streamed_roots):
    read = tinyimagenet(streamed_roots["tinyimagenet"], None, 0)
    assert [label for _, label in read.test] == [int(Path(file).stem[4:]) % 3 for file, _ in read.test]
    assert read.num_classes == 3 and len(read.test) == 12


@pytest.mark.parametrize(("name", "network"), [("imagenet", "resnet50-imagenet"), ("tinyimagenet", "resnet8")])
def test_an_epoch_on_a_streamed_data_set_runs_with_workers(streamed_roots, tmp_path, capsys, name, network):
    done = call(capsys, META_TRAIN, "--network", network, "--dataset", name, "--data-root", streamed_roots[name],
                "--image-size", "64", "--batch-size", "7", "--num-meta", "3", "--num-epoch", "1", "--t-val", "1",
                "--workers", "2", "--device", "cpu", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert len(results(tmp_path / "run")[0]) == 2


@pytest.mark.parametrize(("name", "spoil", "message"), [
    ("tinyimagenet", lambda root: (root / "tiny-imagenet-200").mkdir(), "expected class folders"),
    ("tinyimagenet", lambda root: None, "could not be downloaded"),
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


def write_cifar(folder, files, labels_key, classes, meta, rng):
    folder.mkdir(parents=True)
    for file in files:
        pixels, labels = rng.integers(0, 256, (20, 3072), dtype=np.uint8), [number % classes for number in range(20)]
        (folder / file).write_bytes(pickle.dumps({"data": pixels, labels_key: labels}))
    name, key = meta
    (folder / name).write_bytes(pickle.dumps({key: [f"class {n}" for n in range(classes)]}))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_files_in_the_format_of_the_published_data_sets_are_read(tmp_path, monkeypatch, name):
    rng, number, classes = np.random.default_rng(0), 20, 10
    for module in ("cifar", "svhn", "utils"):  # files that a test writes have other check sums
        monkeypatch.setattr(getattr(torchvision.datasets, module), "check_integrity", lambda *args: True)
    if name == "cifar10":
        files, number = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"], 100
        write_cifar(tmp_path / "cifar-10-batches-py", files, "labels", 10, ("batches.meta", "label_names"), rng)
    elif name == "cifar100":
        classes = 100
        write_cifar(tmp_path / "cifar-100-python", ["train", "test"], "fine_labels", 100,
                    ("meta", "fine_label_names"), rng)
    else:
        for split in ("train", "test"):
            images = rng.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
            scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": np.arange(20)[:, None] % 10 + 1})
    task = build_task(name, tmp_path, seed=0, batch_size=8, device=torch.device("cpu"))
    assert (len(task.train_indices), len(task.test_indices), task.num_classes) == (number, 20, classes)
    batch = next(task.train_batches(0))
    assert batch.inputs.shape == (8, 3, 32, 32) and 0 <= batch.targets.min() and batch.targets.max() < classes
    assert batch.inputs.abs().max() < 3 and task.train.augment == (name != "svhn")
