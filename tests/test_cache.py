"""The cache of decoded images: it changes no result, and touches nothing that is not its own."""

import errno
import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from test_files import folder_task, write_class_folder

import data.cache
import data.files

HEADER_BYTES = len(data.cache.HEADER) + data.cache.DIGEST_BYTES


@pytest.fixture
def class_folder(tmp_path):
    return write_class_folder(tmp_path / "data")


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
    shutil.copytree(class_folder / "train", class_folder / "test")
    capsys.readouterr()
    folder_task(class_folder)  # with two splits
    line, = capsys.readouterr().err.splitlines()
    assert f"not cached in {cache_folder} (File exists); set MLR_SNET_CACHE to another folder" in line
    shutil.rmtree(class_folder / "test")
    assert folder_task(class_folder).fingerprint() == reference


def test_folders_with_skipped_images_are_cached_without_them(class_folder, cache_folder):
    (class_folder / "train" / "cat" / "0.png").write_text("no image")
    prints = {folder_task(class_folder, skip_bad_images=True).fingerprint() for _ in range(2)}
    assert len(prints) == 1 and len(list(cache_folder.iterdir())) == 1


def test_the_entries_unused_for_longest_make_room(class_folder, cache_folder, monkeypatch):
    monkeypatch.setattr(data.cache, "MOST_BYTES", 20 * 3 * 16 * 16 + 20 * 3 * 8 * 8 + 200)
    for size in (16, 8, 9):
        folder_task(class_folder, image_size=size)
    sizes = sorted(path.stat().st_size - HEADER_BYTES for path in cache_folder.iterdir())
    assert sizes == [20 * 3 * 8 * 8, 20 * 3 * 9 * 9]


def test_processes_that_fill_the_cache_at_the_same_time_do_not_disturb_each_other(class_folder, cache_folder):
    with ThreadPoolExecutor(4) as pool:  # the file system sees no difference between threads and processes
        prints = list(pool.map(lambda _: folder_task(class_folder, image_size=64).fingerprint(), range(8)))
    assert len(set(prints)) == 1 and len(list(cache_folder.iterdir())) == 1


# ---------------------------------------------------------------------------------------------- what is not ours


def tree(folder):
    """Kind, content and time of all that lies in a folder."""
    found = {}
    for path in folder.rglob("*"):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[path] = content, path.lstat().st_mtime_ns
    return found


def entry_of(class_folder, cache_folder):
    """The name that the entry of the class folder has, at the size of folder_task."""
    folder_task(class_folder)
    entry, = cache_folder.iterdir()
    entry.unlink()
    return entry


def put_file(cache):
    (cache / "thesis.tex").write_text("ten years of work")


def put_temporary_of_another_program(cache):
    (cache / "download.tmp").write_text("half of it")
    (cache / ("f" * 32)).write_text("some other cache's entry")


def put_folder(cache):
    (cache / "photos").mkdir()
    (cache / "photos" / "1.png").write_text("a photo")


@pytest.mark.parametrize("put", [put_file, put_temporary_of_another_program, put_folder])
def test_files_of_others_are_neither_deleted_nor_overwritten_nor_counted(
    class_folder, cache_folder, tmp_path, monkeypatch, put
):
    entry_of(class_folder, cache_folder)
    put(cache_folder)
    for path in cache_folder.iterdir():  # they are the oldest
        os.utime(path, ns=(0, 0), follow_symlinks=False)
    (cache_folder / "large").write_bytes(bytes(100_000))
    before = tree(tmp_path)
    monkeypatch.setattr(data.cache, "MOST_BYTES", 20 * 3 * 32 * 32 + 200)  # one entry: each makes room for the next
    for size in (32, 16, 30, 31):
        folder_task(class_folder, image_size=size)
    left = tree(tmp_path)
    del before[cache_folder], left[cache_folder]  # its time changes
    assert {path: left[path] for path in before} == before
    assert len(left) == len(before) + 1  # our last entry


def no_home(monkeypatch, tmp_path):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user that the system does not know


def home_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def folder_of_another_user(monkeypatch, tmp_path):
    monkeypatch.setenv("MLR_SNET_CACHE", str(tmp_path / "denied"))

    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied", args)

    monkeypatch.setattr(data.cache.tempfile, "mkstemp", refuse)


@pytest.mark.parametrize("spoil", [no_home, home_that_cannot_be_written, folder_of_another_user])
def test_without_a_place_for_the_cache_the_run_goes_on_with_one_line(
    class_folder, tmp_path, monkeypatch, capsys, spoil
):
    reference = folder_task(class_folder).fingerprint()
    shutil.copytree(class_folder / "train", class_folder / "test")
    monkeypatch.delenv("MLR_SNET_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    spoil(monkeypatch, tmp_path)
    capsys.readouterr()
    folder_task(class_folder)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: decoded images are not cached") and "set MLR_SNET_CACHE to" in line
    shutil.rmtree(class_folder / "test")
    assert folder_task(class_folder).fingerprint() == reference


def test_a_full_disk_costs_the_cache_only(class_folder, cache_folder, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may be longer
    try:
        folder_task(class_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _, line = capsys.readouterr().err.splitlines()  # the first is on the split
    assert f"not cached in {cache_folder} (File too large)" in line and not list(cache_folder.iterdir())


def test_a_tilde_in_the_name_of_the_cache_is_the_home_folder(class_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLR_SNET_CACHE", "~/images")  # where no shell has expanded it
    folder_task(class_folder)
    assert len(list((tmp_path / "home" / "images").iterdir())) == 1


def test_an_entry_that_a_killed_process_has_left_unfinished_makes_room_like_any_other(
    class_folder, cache_folder, monkeypatch
):
    entry = entry_of(class_folder, cache_folder)
    unfinished = entry.with_name(f"{entry.name}.k3x_9a.tmp")
    unfinished.write_bytes(data.cache.HEADER + bytes(100_000))
    monkeypatch.setattr(data.cache, "MOST_BYTES", 100_000)
    folder_task(class_folder)
    assert list(cache_folder.iterdir()) == [entry]
