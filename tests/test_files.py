"""Image files of every mode, bad files, and class folders with all that other programs leave in them."""

import errno
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data.files
from data import build_task
from data.files import class_folders, read_image


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


def write_class_folder(root):
    """20 images of 20×20 pixels in root/train/cat and root/train/dog."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for index in range(10):
            write_image(root / "train" / name / f"{index}.png", 20, rng)
    return root


@pytest.fixture
def class_folder(tmp_path):
    return write_class_folder(tmp_path)


def folder_task(root, **options):
    return build_task("folder", root, **{"seed": 0, "batch_size": 4, "device": torch.device("cpu"), **options})


@pytest.mark.parametrize(("spoil", "cause"), BAD_FILES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_image_is_named_with_its_cause_or_skipped_and_reported(class_folder, capsys, spoil, cause):
    bad = class_folder / "train" / "dog" / "3.png"
    spoil(bad)
    with pytest.raises(ValueError, match=cause) as error:
        folder_task(class_folder)
    assert str(error.value).startswith(str(bad)) and "pass skip_bad_images" in str(error.value)
    assert "\n" not in str(error.value)
    task = folder_task(class_folder, skip_bad_images=True)
    assert len(task.train_indices) + len(task.test_indices) == 19
    report = capsys.readouterr().err
    assert cause in report and str(bad) in report and "skipped 1 of 20" in report


def test_a_folder_without_a_readable_image_is_refused(class_folder):
    for path in class_folder.rglob("*.png"):
        path.write_text("")
    with pytest.raises(ValueError, match="none of its 20 images"):
        folder_task(class_folder, skip_bad_images=True)


@pytest.mark.parametrize("name", ["digits", "cifar10-c"])
def test_bad_images_cannot_be_skipped_where_there_are_no_image_files(name):
    with pytest.raises(ValueError, match="skip_bad_images is for folder"):
        build_task(name, Path(), skip_bad_images=True, batch_size=4, device=torch.device("cpu"))


@pytest.mark.parametrize("cause", [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOMEM, ""),
                                   MemoryError()])
def test_an_image_is_not_skipped_as_bad_where_the_process_holds_too_much(class_folder, monkeypatch, cause):
    def fail(path):
        raise cause

    monkeypatch.setattr(data.files.Image, "open", fail)
    with pytest.raises(type(cause)):
        folder_task(class_folder, skip_bad_images=True)


# ---------------------------------------------------------------------------------------------- class folders


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


def test_a_folder_without_a_test_split_is_split_the_same_for_every_seed_and_within_each_class(class_folder, capsys):
    for index in range(4, 10):
        (class_folder / "train" / "dog" / f"{index}.png").unlink()
    tasks = [folder_task(class_folder, seed=seed) for seed in (0, 1)]
    assert torch.equal(tasks[0].test.images, tasks[1].test.images)
    assert tasks[0].test.labels.tolist() == [0, 0, 1]  # a fifth of 10, and one of 4
    assert "a fifth of each class" in capsys.readouterr().err


def test_a_folder_of_train_and_val_is_tested_on_val(class_folder, capsys):
    shutil.copytree(class_folder / "train", class_folder / "val")
    task = folder_task(class_folder)
    assert (len(task.train_indices), len(task.test_indices)) == (20, 20) and not capsys.readouterr().err


def test_a_class_that_has_no_image_to_train_on_is_an_error_and_one_that_has_few_is_said(class_folder, capsys):
    shutil.copytree(class_folder / "train", class_folder / "test")
    for index in range(4, 10):
        (class_folder / "train" / "dog" / f"{index}.png").unlink()
    with pytest.raises(ValueError, match="num_meta 8: holds out all 4 images of class 1"):
        folder_task(class_folder, num_meta=8)
    folder_task(class_folder, num_meta=6)
    assert "in 1 of 2 classes, such as 3 and 1 of class 1" in capsys.readouterr().err
    for index in range(4):
        (class_folder / "train" / "dog" / f"{index}.png").write_text("")
    with pytest.raises(ValueError, match="class 1, counted from 0, has 10 images to test on and none to train on"):
        folder_task(class_folder, skip_bad_images=True)


def listed(root, **options):
    """Class and name of every image of root/train."""
    classes, samples = class_folders(root / "train", **options)
    return [(classes[label], os.path.relpath(path, root / "train")) for path, label in samples]


def test_classes_and_images_come_in_the_order_of_torchvision(tmp_path):
    image = Image.new("RGB", (4, 4))
    for name in ("b/0.png", "a/x/1.png", "a/x-y.png", "a/x.JPG", "a-b/1.webp", "a/x/deep/2.jpeg", "a/z.tiff", "B/0.bmp",
                 "c c/é.ppm"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "train" / name)
    (tmp_path / "elsewhere" / "far").mkdir(parents=True)
    image.save(tmp_path / "elsewhere" / "far" / "9.png")
    (tmp_path / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "b" / "5.png").symlink_to(tmp_path / "train" / "b" / "0.png")
    expected = torchvision.datasets.ImageFolder(str(tmp_path / "train"))
    assert class_folders(tmp_path / "train") == (expected.classes, expected.samples)


FOREIGN = ["cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "cat/._0.png",
           ".ipynb_checkpoints/0.png", "@eaDir/0.png", "#recycle/0.png", "$RECYCLE.BIN/0.png", ".Trash-1000/0.png",
           "__MACOSX/cat/._0.png", "dog/.stversions/0.png", "dog/@Recycle/0.png", "dog/.thumbnails/0.png",
           "cat/Thumbs.db", "cat/.DS_Store", "dog/desktop.ini", "System Volume Information/0.png", "cat/.0.png.icloud"]


@pytest.mark.parametrize("name", FOREIGN)
def test_what_other_programs_leave_is_neither_image_nor_class_and_is_counted(class_folder, capsys, name):
    reference = listed(class_folder)
    path = class_folder / "train" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(class_folder / "train" / "cat" / "0.png", path)
    capsys.readouterr()
    assert listed(class_folder) == reference
    line, = capsys.readouterr().err.splitlines()
    assert "skipped: 1 (1 hidden or of the system)" in line


def test_all_that_is_skipped_is_one_line_with_its_causes(class_folder, capsys):
    for name in ("cat/a.avif", "cat/b.AVIF", "dog/c.gif", "dog/d", "stray.png", "cat/.hidden.png", "cat/@eaDir/1.png"):
        (class_folder / "train" / name).parent.mkdir(exist_ok=True)
        (class_folder / "train" / name).write_bytes(b"x")
    assert len(listed(class_folder)) == 20
    line, = capsys.readouterr().err.splitlines()
    for cause in ("2 .avif", "1 .gif", "1 without an ending", "1 outside the class folders", "2 hidden"):
        assert cause in line
    assert "skipped: 7 (" in line and ".webp" in line
    listed(class_folder)
    assert not capsys.readouterr().err  # it is said once


def test_clean_folders_are_not_worth_a_word(class_folder, capsys):
    assert len(listed(class_folder)) == 20 and not capsys.readouterr().err


def link_to_parent(train):
    (train / "cat" / "again").symlink_to(train)


def link_to_itself(train):
    (train / "cat" / "again").symlink_to("../cat")


def links_in_a_ring(train):
    (train / "cat" / "to_dog").symlink_to(train / "dog")
    (train / "dog" / "to_cat").symlink_to(train / "cat")


def link_above(train):
    (train / "dog" / "up").symlink_to(train.parent)


def class_twice(train):
    (train / "feline").symlink_to(train / "cat")


@pytest.mark.parametrize("spoil", [link_to_parent, link_to_itself, links_in_a_ring, link_above, class_twice])
@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_folders_that_links_reach_twice_are_refused(class_folder, name, spoil):
    shutil.copytree(class_folder / "train", class_folder / "val")
    spoil(class_folder / "train")
    with pytest.raises(ValueError, match="again; remove the link") as error:
        build_task(name, class_folder, seed=0, batch_size=4, device=torch.device("cpu"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("link", ["test", "test/dog"])
def test_a_test_split_that_is_the_training_images_is_refused(class_folder, link):
    if "/" in link:
        shutil.copytree(class_folder / "train" / "cat", class_folder / "test" / "cat")
    (class_folder / link).symlink_to(class_folder / link.replace("test", "train"))
    with pytest.raises(ValueError, match="again; remove the link"):
        folder_task(class_folder)


@pytest.mark.parametrize("where", ["train/mouse", "train/cat/more", "test"])
def test_a_link_that_leads_nowhere_is_not_taken_for_a_missing_class_or_split(class_folder, where):
    (class_folder / where).symlink_to("/nowhere/at/all")
    with pytest.raises(ValueError, match=f"{where}: (a link that leads nowhere|expected class folders)"):
        folder_task(class_folder)


@pytest.mark.parametrize("place", ["train", "train/cat", "train/dog/deep"])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(class_folder, monkeypatch, place):
    (class_folder / "train" / "dog" / "deep").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path) == class_folder / place:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=f"Permission denied: '{class_folder / place}'"):
        folder_task(class_folder)


@pytest.mark.parametrize("ending", ["avif", "heic", "txt"])
def test_a_class_without_an_image_that_is_read_is_refused_with_the_reason(class_folder, ending):
    (class_folder / "train" / "mouse").mkdir()
    (class_folder / "train" / "mouse" / f"0.{ending}").write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"none in mouse; skipped: 1 \(1 .{ending}\)"):
        folder_task(class_folder)


@pytest.mark.parametrize(("one", "other"), [
    ("cat", "Cat"), (unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")), ("ﬁsh", "FISH"),
])
def test_classes_that_differ_only_in_case_or_unicode_form_are_named(class_folder, capsys, one, other):
    for name in (one, other):
        shutil.copytree(class_folder / "train" / "dog", class_folder / "train" / name, dirs_exist_ok=True)
    classes, _ = class_folders(class_folder / "train")
    assert {one, other} <= set(classes)  # letters of both cases may be classes
    line, = capsys.readouterr().err.splitlines()
    assert "differ only in case or Unicode form" in line and ascii(one) in line and ascii(other) in line


@pytest.mark.parametrize(("name", "test"), [("folder", "test"), ("imagenet", "val")])
def test_splits_of_different_classes_name_these(class_folder, name, test):
    for label in ("cat", "dog", unicodedata.normalize("NFC", "café")):
        shutil.copytree(class_folder / "train" / "cat", class_folder / test / label)
    shutil.copytree(class_folder / "train" / "cat", class_folder / "train" / unicodedata.normalize("NFD", "café"))
    with pytest.raises(ValueError, match="different class folders") as error:
        build_task(name, class_folder, seed=0, batch_size=4, device=torch.device("cpu"))
    assert r"'caf\xe9'" in str(error.value) and r"'cafe\u0301'" in str(error.value)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_file_names_that_are_not_utf_8_are_read(class_folder, monkeypatch, name):
    monkeypatch.setenv("MLR_SNET_CACHE", str(class_folder / "cache"))
    source = os.fsencode(class_folder / "train" / "cat" / "0.png")
    shutil.copy(source, source.replace(b"0.png", b"caf\xe9.png"))
    shutil.copytree(class_folder / "train", class_folder / "val")
    task = build_task(name, class_folder, image_size=32, seed=0, batch_size=4, device=torch.device("cpu"))
    assert len(task.fingerprint()) == 16
