"""The image task: its splits, its stateless streams, and the class-folder layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from data import build_task


def digits_task(**options):
    return build_task("digits", Path(), **{"seed": 3, "batch_size": 64, "device": torch.device("cpu"), **options})


def test_the_meta_set_is_balanced_and_apart_from_the_training_set():
    task = digits_task(num_meta=100, limit_train=500)
    assert not set(task.meta_indices.tolist()) & set(task.train_indices.tolist())
    assert task.labels[task.meta_indices].bincount().tolist() == [10] * 10
    assert task.labels[task.train_indices].bincount().tolist() == [50] * 10


@pytest.mark.parametrize("start", [1, 7, 8, 20])
def test_a_stream_begun_at_any_step_gives_the_same_batches(start):
    task = digits_task(limit_train=500)
    task.augment = True
    whole = task.train_batches(0)
    for _ in range(start):
        next(whole)
    for one, other, _ in zip(whole, task.train_batches(start), range(10), strict=False):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("options", [{"num_meta": 1437}, {"limit_train": 2000}, {"limit_test": 361}, {"batch_size": 0}])
def test_sizes_that_the_data_cannot_give_are_refused(options):
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
    assert len(task.test_labels) == (20 if len(splits) == 2 else 4)


def test_data_that_cannot_be_had_are_one_clear_line(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no network\nmore")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    for name in ("cifar10", "folder"):
        with pytest.raises(ValueError) as error:
            build_task(name, tmp_path, seed=0, batch_size=4, device=torch.device("cpu"))
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
