"""The image task: its splits, its stateless streams, and the files of the published data sets."""

import itertools
import pickle
import threading
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from test_files import write_class_folder

import utils
from data import build_task
from data.files import downloading


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


def test_classes_that_a_limit_leaves_without_a_training_image_are_told(capsys):
    build_task("digits", Path(), batch_size=5, limit_train=7, device=torch.device("cpu"))
    assert "7 training images leave out 3 of 10 classes" in capsys.readouterr().err
    build_task("digits", Path(), batch_size=5, limit_train=10, device=torch.device("cpu"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "option", "value"), [
    ("pydoc", "corruption", "contrast"), ("pydoc", "label_noise", 0.1), ("pydoc", "image_size", 8),
    ("pydoc", "workers", 2), ("pydoc", "predict", "angle"), ("digits", "tokens", "char"),
])
def test_options_of_another_modality_are_refused(name, option, value):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        build_task(name, Path(), batch_size=5, device=torch.device("cpu"), **{option: value})


@pytest.mark.parametrize(("name", "option", "value"), [("pydoc", "tokens", "bytes"), ("digits", "predict", "nonsense")])
def test_units_and_targets_that_do_not_exist_are_refused(name, option, value):
    with pytest.raises(ValueError, match=f"{option} '{value}': choose from"):
        build_task(name, Path(), batch_size=5, device=torch.device("cpu"), **{option: value})


def test_processes_that_look_for_the_same_files_take_turns(tmp_path):
    has_entered = threading.Event()

    def enter():
        with downloading("cifar10", tmp_path, "cifar*", "digits"):
            has_entered.set()

    with downloading("cifar10", tmp_path, "cifar*", "digits"):
        other = threading.Thread(target=enter)
        other.start()
        assert not has_entered.wait(0.3)
    assert has_entered.wait(30)


@pytest.mark.parametrize(("name", "size"), [("folder", 10_000_000), ("digits", 1_000_000)])
def test_sizes_that_do_not_fit_in_memory_are_refused_before_any_work(tmp_path, name, size):
    with pytest.raises(ValueError, match="GiB of memory"):
        build_task(
            name, write_class_folder(tmp_path), image_size=size, seed=0, batch_size=4, device=torch.device("cpu")
        )


@pytest.mark.parametrize(("limit", "sizes"), [
    (1, [1]), (2, [2]), (5, [5]), (7, [4, 3]), (8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]),
])
def test_a_batch_of_one_image_is_never_made_unless_the_data_hold_one(limit, sizes):
    task = digits_task(limit_train=limit, batch_size=4)
    assert task.steps_per_epoch == len(sizes)
    batches = list(itertools.islice(task.train_batches(0), 2 * len(sizes)))
    assert [batch.size for batch in batches] == [len(batch.inputs) for batch in batches] == 2 * sizes


def test_a_batch_size_of_one_is_kept():
    task = digits_task(limit_train=3, batch_size=1)
    assert task.steps_per_epoch == 3
    assert [batch.size for batch in itertools.islice(task.train_batches(0), 4)] == [1] * 4


# ---------------------------------------------------------------------------------------------- the meta stream


@pytest.mark.parametrize(("num_meta", "batch_size", "sizes"), [
    (1000, 128, [128] * 7 + [104]), (100, 64, [64, 36]), (100, 50, [50, 50]), (100, 33, [33, 33, 34]), (1, 64, [1]),
    (10, 64, [10]), (3, 1, [1, 1, 1]), (65, 64, [65]),
])
def test_a_pass_over_the_meta_set_uses_every_image_once_and_makes_no_batch_of_one_left_over(
    num_meta, batch_size, sizes
):
    task = digits_task(num_meta=num_meta, batch_size=batch_size)
    batches = list(itertools.islice(task.meta_batches(0), 2 * len(sizes)))
    assert [batch.size for batch in batches] == [len(batch.inputs) for batch in batches] == 2 * sizes
    for one_pass in (batches[: len(sizes)], batches[len(sizes) :]):
        seen = torch.cat([batch.inputs for batch in one_pass]).flatten(1)
        images = (task.train.images[task.meta_indices] - task.train.mean) / task.train.std
        assert sorted(seen.tolist()) == sorted(images.flatten(1).tolist())


@pytest.mark.parametrize("start", [1, 2, 3, 7, 1000])
def test_a_meta_stream_started_at_any_number_gives_the_same_batches(start):
    task = digits_task(num_meta=150)  # 64, 64 and 22 images
    task.train.augment = True
    whole = itertools.islice(task.meta_batches(0), start, start + 7)
    for one, other in zip(whole, task.meta_batches(start), strict=False):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


def test_without_meta_images_there_is_no_meta_stream():
    with pytest.raises(ValueError, match="num_meta 0: .*give at least 1"):
        next(digits_task(num_meta=0).meta_batches(0))


class Logits(torch.nn.Module):
    """The sum of each third of the pixels, so that the loss of an image depends on that image."""

    def forward(self, images):
        return images.double().flatten(1).unflatten(1, (3, -1)).sum(2).repeat(1, 4)[:, :10] / 64


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_last_meta_batch_may_be_smaller_than_the_number_of_ranks(monkeypatch, ranks):
    task = digits_task(num_meta=34, batch_size=16)  # 16, 16 and 2 images
    alone = [task.loss(Logits(), batch, None)[0] for batch in itertools.islice(task.meta_batches(0), 6)]
    monkeypatch.setattr(utils, "world_size", lambda: ranks)
    monkeypatch.setattr("data.images.world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(utils, "rank", lambda rank=rank: rank)
        batches = list(itertools.islice(task.meta_batches(0), 6))
        assert [batch.size for batch in batches] == [16, 16, 2] * 2
        assert min(len(batch.inputs) for batch in batches) >= 1  # so that every rank takes part
        shares.append(torch.stack([task.loss(Logits(), batch, None)[0] for batch in batches]))
    torch.testing.assert_close(torch.stack(shares).mean(0), torch.stack(alone), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------- published files


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


def refuse_download(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    for module in ("cifar", "svhn", "utils"):
        for name in ("download_and_extract_archive", "download_url"):
            monkeypatch.setattr(getattr(torchvision.datasets, module), name, refuse, raising=False)


@pytest.mark.parametrize(("name", "file"), [
    ("cifar10", "cifar-10-python.tar.gz"), ("cifar10", "cifar-10-batches-py/data_batch_3"),
    ("cifar100", "cifar-100-python.tar.gz"), ("cifar100", "cifar-100-python/train"), ("svhn", "train_32x32.mat"),
    ("svhn", "test_32x32.mat"),
])
@pytest.mark.parametrize("content", [b"the first half", b""])
def test_a_damaged_file_of_a_published_data_set_is_not_called_missing(tmp_path, monkeypatch, name, file, content):
    refuse_download(monkeypatch)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: damaged or incomplete in ") as error:
        build_task(name, tmp_path, seed=0, batch_size=4, device=torch.device("cpu"))
    assert file.split("/")[0] in str(error.value) and "\n" not in str(error.value)


def test_a_published_data_set_is_not_mistaken_for_another(tmp_path, monkeypatch):
    refuse_download(monkeypatch)
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="cifar10: not in "):
        build_task("cifar10", tmp_path, seed=0, batch_size=4, device=torch.device("cpu"))
