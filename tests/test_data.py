"""The image task: its splits, its stateless streams, and the class-folder layout."""

import itertools
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from test_scripts import META_TEST, META_TRAIN, call, results

import data.cache
import data.files
import data.streamed
from data import build_task
from data.files import read_image
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


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def rgba(alpha):
    return Image.fromarray(np.dstack([RAMP, RAMP, RAMP, alpha]), "RGBA")


@pytest.mark.parametrize(("image", "file", "expected"), [
    (Image.fromarray(RAMP.astype(np.uint16) * 257), "deep.png", RAMP),
    (Image.fromarray(RAMP.astype(np.uint16) * 257), "deep.tif", RAMP),
    (Image.fromarray(RAMP), "gray.png", RAMP),
    (Image.fromarray(RAMP > 127), "bits.png", np.where(RAMP > 127, 255, 0)),
    (Image.fromarray(RAMP).convert("P"), "palette.png", RAMP),
    (Image.fromarray(255 - np.dstack([RAMP, RAMP, RAMP, np.full_like(RAMP, 255)]), "CMYK"), "print.tif", RAMP),
    (rgba(np.full_like(RAMP, 255)), "opaque.png", RAMP),
    (rgba(np.zeros_like(RAMP)), "transparent.png", np.full_like(RAMP, 255)),
    (rgba(np.zeros_like(RAMP)).convert("LA"), "transparent_gray.png", np.full_like(RAMP, 255)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_images_of_every_mode_are_read_as_rgb_of_8_bits(tmp_path, image, file, expected):
    image.save(tmp_path / file)
    read = read_image(str(tmp_path / file))
    assert read.mode == "RGB"
    for channel in np.array(read).transpose(2, 0, 1):
        assert np.array_equal(channel, expected)


def test_a_transparent_colour_of_a_palette_becomes_white(tmp_path):
    Image.fromarray(RAMP).convert("P").save(tmp_path / "palette.png", transparency=7)
    assert np.array(read_image(str(tmp_path / "palette.png")))[0, 6:9, 0].tolist() == [6, 255, 8]


def spoil_truncate(path):
    path.write_bytes(path.read_bytes()[:-60])


def spoil_oversize(path):
    Image.new("1", (15_000, 15_000)).save(path)


def spoil_fifo(path):
    path.unlink()
    os.mkfifo(path)


def spoil_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def spoil_text(path):
    path.write_text("no image")


def spoil_float(path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(path, format="TIFF")


BAD_FILES = [(spoil_truncate, "truncated"), (spoil_oversize, "exceeds limit"), (spoil_fifo, "not a regular file"),
             (spoil_device, "not a regular file"), (spoil_text, "cannot identify"), (spoil_float, "32-bit pixels")]


@pytest.fixture
def class_folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for index in range(10):
            write_image(tmp_path / "train" / name / f"{index}.png", 20, rng)
    return tmp_path


def folder_task(root, **options):
    return build_task("folder", root, **{"seed": 0, "batch_size": 4, "device": torch.device("cpu"), **options})


@pytest.mark.parametrize(("spoil", "cause"), BAD_FILES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_image_is_named_with_its_cause_or_skipped_and_reported(class_folder, capsys, spoil, cause):
    bad = class_folder / "train" / "dog" / "3.png"
    spoil(bad)
    with pytest.raises(ValueError, match=cause) as error:
        folder_task(class_folder)
    assert str(error.value).startswith(str(bad)) and "--skip-bad-images" in str(error.value)
    assert "\n" not in str(error.value)
    task = folder_task(class_folder, skip_bad_images=True)
    assert len(task.train_indices) + len(task.test_indices) == 19
    report = capsys.readouterr().err
    assert cause in report and str(bad) in report and "skipped 1 of 20" in report


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLR_SNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_gives_the_same_images_and_labels_without_reading_the_files(class_folder, cache_folder, monkeypatch):
    decoded = folder_task(class_folder)
    assert len(list(cache_folder.iterdir())) == 1
    monkeypatch.setattr(data.files, "read_image", None)
    cached = folder_task(class_folder)
    for one, other in ((decoded.train, cached.train), (decoded.test, cached.test)):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert decoded.fingerprint() == cached.fingerprint()


def test_a_file_rewritten_with_its_old_size_and_time_is_decoded_again(class_folder, cache_folder):
    file = class_folder / "train" / "cat" / "0.bmp"
    Image.new("RGB", (20, 20)).save(file)
    before, times = folder_task(class_folder), file.stat()
    Image.new("RGB", (20, 20), "white").save(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert folder_task(class_folder).fingerprint() != before.fingerprint()


def test_other_sizes_have_entries_of_their_own(class_folder, cache_folder):
    assert [folder_task(class_folder, image_size=size).train.images.shape[-1] for size in (8, 16, 8)] == [8, 16, 8]
    assert len(list(cache_folder.iterdir())) == 2


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: b"", lambda content: content[:100] + b"\1\2\3" + content[103:],
])
def test_a_damaged_cache_is_ignored_and_rewritten(class_folder, cache_folder, damage):
    reference = folder_task(class_folder).fingerprint()
    entry, = cache_folder.iterdir()
    content = entry.read_bytes()
    entry.write_bytes(damage(content))
    assert folder_task(class_folder).fingerprint() == reference
    assert entry.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_reported_and_does_no_harm(class_folder, cache_folder, capsys):
    reference = folder_task(class_folder).fingerprint()
    shutil.rmtree(cache_folder)
    cache_folder.write_text("a file in its place")
    assert folder_task(class_folder).fingerprint() == reference
    assert "not cached" in capsys.readouterr().err


def test_folders_with_skipped_images_are_not_cached(class_folder, cache_folder):
    (class_folder / "train" / "cat" / "0.png").write_text("no image")
    folder_task(class_folder, skip_bad_images=True)
    assert not cache_folder.exists()


def test_the_entries_unused_for_longest_make_room(class_folder, cache_folder, monkeypatch):
    monkeypatch.setattr(data.cache, "MOST_BYTES", 20 * 3 * 16 * 16 + 20 * 3 * 8 * 8 + 100)
    for size in (16, 8, 9):
        folder_task(class_folder, image_size=size)
    assert sorted(path.stat().st_size for path in cache_folder.iterdir()) == [32 + 60 * 64, 32 + 60 * 81]


def test_processes_that_fill_the_cache_at_the_same_time_do_not_disturb_each_other(class_folder, cache_folder):
    with ThreadPoolExecutor(4) as pool:  # the file system sees no difference between threads and processes
        prints = list(pool.map(lambda _: folder_task(class_folder, image_size=64).fingerprint(), range(8)))
    assert len(set(prints)) == 1 and len(list(cache_folder.iterdir())) == 1


def test_a_folder_without_a_readable_image_is_refused(class_folder):
    for path in class_folder.rglob("*.png"):
        path.write_text("")
    with pytest.raises(ValueError, match="none of its 20 images"):
        folder_task(class_folder, skip_bad_images=True)


def test_bad_images_cannot_be_skipped_where_there_are_no_image_files():
    with pytest.raises(ValueError, match="--skip-bad-images is for folder"):
        digits_task(skip_bad_images=True)


@pytest.mark.parametrize(("name", "size"), [("folder", 10_000_000), ("digits", 1_000_000)])
def test_sizes_that_do_not_fit_in_memory_are_refused_before_any_work(class_folder, name, size):
    with pytest.raises(ValueError, match="GiB of memory"):
        build_task(name, class_folder, image_size=size, seed=0, batch_size=4, device=torch.device("cpu"))


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


@pytest.mark.parametrize("name", ["imagenet", "tinyimagenet"])
def test_an_epoch_on_a_streamed_data_set_runs_with_workers(streamed_roots, tmp_path, capsys, name):
    done = call(capsys, META_TRAIN, "--network", "resnet8", "--dataset", name, "--data-root", streamed_roots[name],
                "--image-size", "16", "--batch-size", "7", "--num-meta", "3", "--num-epoch", "1", "--t-val", "1",
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
