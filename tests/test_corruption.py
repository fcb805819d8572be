"""Corrupted training data: damaged images, wrong labels, and the files of CIFAR-10-C and CIFAR-100-C."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import META_TEST, META_TRAIN, call, results
from torch import nn

import data.in_memory
from data import build_task
from data.corruption import CORRUPTIONS, NOISE_KINDS, PER_SEVERITY, Corruption, noisy_labels
from data.images import ImageData, ImageTask
from mlr_snet import train

CPU = torch.device("cpu")


def digits_task(**options):
    return build_task("digits", Path(), **{"seed": 3, "batch_size": 64, "num_meta": 100, "device": CPU, **options})


def picture(size=32):
    return torch.randint(256, (3, size, size), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_depends_on_seed_and_index_alone_and_grows_with_its_severity(name):
    image = torch.nn.functional.interpolate(picture(8)[None], size=(32, 32))[0]  # has edges and flat areas
    torch.manual_seed(0)
    before = torch.get_rng_state()
    damage = []
    for severity in range(6):
        one = Corruption(name, severity, seed=1)(image, 5)
        torch.rand(3)
        assert torch.equal(one, Corruption(name, severity, seed=1)(image, 5))
        assert one.dtype == torch.uint8 and one.shape == image.shape
        damage.append((one.float() - image.float()).square().mean().item())
    assert damage[0] == 0 < damage[1] < damage[5]
    torch.set_rng_state(before)
    Corruption(name, 3, seed=1)(image, 5)
    assert torch.equal(before, torch.get_rng_state())
    if "noise" in name:
        assert not torch.equal(Corruption(name, 3, seed=1)(image, 5), Corruption(name, 3, seed=1)(image, 6))
        assert not torch.equal(Corruption(name, 3, seed=1)(image, 5), Corruption(name, 3, seed=2)(image, 5))


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 2, 5)])
def test_a_corruption_takes_images_of_any_size(name, shape):
    assert Corruption(name, 5, seed=0)(torch.full(shape, 100, dtype=torch.uint8), 0).shape == shape


def test_the_noises_have_the_deviation_of_cifar_10_c():
    gray = torch.full((3, 200, 200), 128, dtype=torch.uint8)
    for name, expected in (("gaussian_noise", 0.08), ("shot_noise", (128 / 255 / 100) ** 0.5)):
        deviation = (Corruption(name, 3, seed=0)(gray, 0) / 255).std().item()
        assert deviation == pytest.approx(expected, rel=0.02)
    impulses = Corruption("impulse_noise", 3, seed=0)(gray, 0)
    assert (impulses == 0).float().mean().item() == pytest.approx(0.015, rel=0.1)
    assert (impulses == 255).float().mean().item() == pytest.approx(0.015, rel=0.1)


def test_contrast_and_brightness_are_those_of_cifar_10_c():
    image = torch.tensor([[[40, 200]], [[20, 100]], [[0, 50]]]).byte()
    assert Corruption("contrast", 2, 0)(image, 0)[0].tolist() == [[80, 160]]  # halfway to the mean of 120
    brighter = Corruption("brightness", 4, 0)(image, 0).float()  # the largest channel rises by 0.2 · 255 = 51
    assert brighter[0].tolist() == [[91, 251]]
    assert (2 * brighter[1] - brighter[0]).abs().max() <= 1  # still half of it, but for rounding: the hue stays
    assert Corruption("brightness", 4, 0)(torch.zeros(3, 1, 1).byte(), 0).flatten().tolist() == [51, 51, 51]


def test_pixelation_and_jpeg_agree_with_pillow():
    image = picture()
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    small = pillow.resize((24, 24), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
    assert np.array_equal(Corruption("pixelate", 4, 0)(image, 0).permute(1, 2, 0).numpy(), np.array(small))
    file = io.BytesIO()
    pillow.save(file, "JPEG", quality=40)
    compressed = Corruption("jpeg_compression", 5, 0)(image, 0)
    assert np.array_equal(compressed.permute(1, 2, 0).numpy(), np.array(Image.open(file)))


def test_only_training_images_are_damaged_and_each_as_it_would_be_in_any_other_run():
    clean, damaged = digits_task(), digits_task(corruption="gaussian_noise", severity=5)
    assert torch.equal(clean.test.images, damaged.test.images)
    assert torch.equal(clean.train.images[clean.meta_indices], damaged.train.images[clean.meta_indices])
    for index in clean.train_indices[:20]:
        assert not torch.equal(clean.train.images[index], damaged.train.images[index])
    few = digits_task(corruption="gaussian_noise", severity=5, limit_train=10)
    assert torch.equal(few.train.images[few.train_indices], damaged.train.images[few.train_indices])
    assert clean.fingerprint() != damaged.fingerprint()


def test_a_data_set_is_not_changed_by_the_task_that_corrupts_it():
    data_set = data.in_memory.digits(Path(), None, 0)
    images, labels = data_set.train_images.clone(), data_set.train_labels.clone()
    ImageTask(data_set, seed=0, batch_size=4, device=CPU, corruption=Corruption("contrast", 5, 0), label_noise=0.5)
    assert torch.equal(images, data_set.train_images) and torch.equal(labels, data_set.train_labels)


def test_severity_0_and_noise_of_rate_0_are_bit_identical_to_none():
    clean = digits_task()
    none = digits_task(corruption="gaussian_noise", severity=0, label_noise=0.0, noise_kind="flip")
    assert none.fingerprint() == clean.fingerprint() and none.train.true_labels is None
    assert torch.equal(next(clean.train_batches(5)).inputs, next(none.train_batches(5)).inputs)


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize("rate", [0.2, 0.4, 1.0])
def test_label_noise_has_exactly_its_rate_and_spares_meta_and_test_labels(kind, rate):
    clean, noisy = digits_task(limit_train=500), digits_task(limit_train=500, label_noise=rate, noise_kind=kind)
    differs = clean.train.labels != noisy.train.labels
    assert int(differs.sum()) == round(rate * 500)
    assert set(differs.nonzero().flatten().tolist()) <= set(noisy.train_indices.tolist())
    assert torch.equal(noisy.train.true_labels, clean.train.labels)
    assert torch.equal(noisy.test.labels, clean.test.labels)
    again = digits_task(limit_train=500, label_noise=rate, noise_kind=kind)
    assert torch.equal(again.train.labels, noisy.train.labels)


@pytest.mark.parametrize(("kind", "others"), [("uniform", 9), ("flip", 1), ("flip2", 2)])
def test_wrong_labels_are_spread_evenly_over_the_other_classes_of_their_kind(kind, others):
    labels = torch.arange(20_000) % 10
    noisy = noisy_labels(labels, torch.arange(20_000), 10, 0.5, kind, seed=0)
    for label in range(10):
        count = noisy[(labels == label) & (noisy != label)].bincount(minlength=10)
        assert int((count > 0).sum()) == others and count[label] == 0
        assert count[count > 0].min() > 0.6 * count.max()


class Constant(nn.Module):
    """Guesses one class for every image."""

    def __init__(self, label):
        super().__init__()
        self.scale, self.guess = nn.Parameter(torch.ones(())), nn.functional.one_hot(torch.tensor(label), 10).float()

    def forward(self, images):
        return self.scale * self.guess.expand(len(images), 10)


class Fixed:
    second_order = False

    def prepare(self): ...

    def step(self, loss): ...

    def get_last_lr(self):
        return [0.0]


def test_the_loop_reports_the_accuracy_on_noisy_and_on_true_labels():
    task = digits_task(label_noise=0.6, noise_kind="flip")
    network = Constant(4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    totals = torch.zeros(2)
    for step in train(network, task, optimizer, Fixed(), 1):
        totals += step.accuracy * step.size
    own = task.train_indices
    expected = [(labels[own] == 4).float().mean() * 100 for labels in (task.train.labels, task.train.true_labels)]
    torch.testing.assert_close(totals / len(own), torch.stack(expected))
    row = task.train_metrics(1.0, *(totals / len(own)).tolist())
    assert list(row) == ["train_loss", "train_acc", "train_clean_acc"]


def test_a_run_with_noise_has_the_accuracy_on_true_labels_in_its_metrics_and_resumes(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--network", "resnet8", "--dataset", "digits", "--limit-train", "100", "--limit-test", "20",
                 "--num-meta", "40", "--batch-size", "50", "--num-epoch", "2", "--t-val", "1", "--device", "cpu"]
    done = call(capsys, META_TRAIN, *arguments, "--corruption", "shot_noise", "--label-noise", "0.4", "--out", out)
    assert done.returncode == 0, done.stderr
    header, *rows = results(out)[0]
    assert "train_acc,train_clean_acc" in header and len(rows) == 2
    assert call(capsys, META_TRAIN, *arguments[:4], "--resume", "--out", out).returncode == 0


@pytest.mark.parametrize(("options", "message"), [
    ({"corruption": "nonsense"}, "nonsense: unknown; choose from gaussian_noise"),
    ({"corruption": "fog"}, "fog comes with cifar10-c and cifar100-c only; choose from"),
    ({"corruption": "contrast", "severity": 6}, "severity 6"),
    ({"severity": 3}, "severity belongs to corruption"),
    ({"label_noise": 1.5}, "label_noise 1.5"),
    ({"label_noise": -0.1}, "label_noise -0.1"),
    ({"label_noise": 0.5, "noise_kind": "swap"}, "noise_kind swap: choose from"),
    ({"noise_kind": "flip"}, "noise_kind belongs to label_noise"),
])
def test_corruptions_that_do_not_exist_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        digits_task(**options)
    assert "\n" not in str(error.value)


def test_label_noise_needs_enough_classes():
    with pytest.raises(ValueError, match="2 classes are too few"):
        noisy_labels(torch.tensor([0, 1]), torch.arange(2), 2, 0.5, "flip2", 0)


@pytest.mark.parametrize("flags", [["--corruption", "contrast"], ["--label-noise", "0.2"]])
def test_text_cannot_be_corrupted(tmp_path, capsys, flags):
    done = call(capsys, META_TEST, "--network", "lstm2", "--dataset", "pydoc", *flags, "--out", tmp_path / "run")
    assert done.returncode == 2 and f"{flags[0]} does not apply to --dataset pydoc" in done.stderr


# ---------------------------------------------------------------------------------------------- CIFAR-10-C, CIFAR-100-C


@pytest.fixture(scope="module")
def cifar_c(tmp_path_factory):
    """The published layout with one corruption, whose pixels are the severity's number; files of almost no size."""
    root = tmp_path_factory.mktemp("cifar_c")
    for name, classes in (("CIFAR-10-C", 10), ("CIFAR-100-C", 100)):
        (root / name).mkdir()
        images = np.lib.format.open_memmap(root / name / "fog.npy", "w+", np.uint8, (5 * PER_SEVERITY, 32, 32, 3))
        for severity in range(1, 6):
            images[(severity - 1) * PER_SEVERITY : severity * PER_SEVERITY, 0, 0] = [severity, 0, 7]
        labels = np.arange(PER_SEVERITY) * 7 % classes
        np.save(root / name / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    return root


@pytest.fixture
def clean_cifar(monkeypatch):
    """Clean CIFAR-10 and CIFAR-100 in little: every pixel is 200."""

    def loader(classes):
        def load(root, image_size, seed):
            size = image_size or 32
            return ImageData(
                torch.full((20 * classes, 3, size, size), 200, dtype=torch.uint8), torch.arange(20 * classes) % classes,
                torch.full((50, 3, size, size), 200, dtype=torch.uint8), torch.arange(50) % classes,
                classes, data.in_memory.HALF, augment=True,
            )
        return load

    monkeypatch.setattr(data.in_memory, "cifar10", loader(10))
    monkeypatch.setattr(data.in_memory, "cifar100", loader(100))


def cifar_c_task(root, name="cifar10-c", **options):
    return build_task(name, root, **{"corruption": "fog", "severity": 2, "seed": 0, "batch_size": 64, "device": CPU,
                                     **options})


@pytest.mark.parametrize(("name", "classes"), [("cifar10-c", 10), ("cifar100-c", 100)])
def test_the_published_files_are_trained_on_and_clean_images_steer_and_test(cifar_c, clean_cifar, name, classes):
    task = cifar_c_task(cifar_c, name, num_meta=10 * classes)
    assert len(task.train_indices) == PER_SEVERITY and task.num_classes == classes
    assert (task.train.images[task.train_indices][:, :, 0, 0] == torch.tensor([2, 0, 7])).all()
    assert task.train.labels[task.train_indices].tolist() == (np.arange(PER_SEVERITY) * 7 % classes).tolist()
    assert (task.train.images[task.meta_indices] == 200).all() and (task.test.images == 200).all()
    assert task.train.labels[task.meta_indices].bincount().tolist() == [10] * classes
    assert cifar_c_task(cifar_c, name, num_meta=0).train_indices.tolist() == task.train_indices.tolist()


def test_the_published_files_can_be_resized_and_given_label_noise(cifar_c, clean_cifar):
    task = cifar_c_task(cifar_c, image_size=8, num_meta=100, label_noise=0.3)
    assert next(task.train_batches(0)).inputs.shape == (64, 3, 8, 8)
    assert int((task.train.labels != task.train.true_labels).sum()) == 3000


def replaced(path, array):
    path.unlink()
    np.save(path, array)


@pytest.mark.parametrize(("spoil", "options", "message"), [
    (lambda folder: None, {"corruption": "nonsense"}, "nonsense: choose from brightness"),
    (lambda folder: None, {"corruption": None, "severity": None}, "cifar10-c needs corruption; choose from"),
    (lambda folder: None, {"severity": 0}, "severity 0: must be from 1 to 5"),
    (lambda folder: None, {"num_meta": 101}, "num_meta 101: must be from 0 to 100"),
    (lambda folder: None, {"corruption": "snow"}, "snow.npy: not found"),
    (lambda folder: (folder / "labels.npy").unlink(), {}, "labels.npy: not found"),
    (lambda folder: replaced(folder / "labels.npy", np.zeros(50_000)), {}, "labels.npy: holds float64"),
    (lambda folder: replaced(folder / "labels.npy", np.full(50_000, 10, np.uint8)), {}, "holds label 10"),
    (lambda folder: replaced(folder / "fog.npy", np.zeros((10, 32, 32, 3), np.uint8)), {}, "expected uint8"),
    (lambda folder: replaced(folder / "fog.npy", np.array([{}])), {}, "not a readable .npy file"),
    (lambda folder: ((folder / "fog.npy").unlink(), (folder / "fog.npy").write_text("x")), {}, "not a readable .npy"),
])
def test_published_files_that_cannot_be_used_are_one_clear_line(
    cifar_c, clean_cifar, tmp_path, spoil, options, message
):
    (tmp_path / "CIFAR-10-C").mkdir()
    for file in ("fog.npy", "labels.npy"):
        (tmp_path / "CIFAR-10-C" / file).symlink_to(cifar_c / "CIFAR-10-C" / file)
    spoil(tmp_path / "CIFAR-10-C")
    with pytest.raises(ValueError, match=message) as error:
        cifar_c_task(tmp_path, **options)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- streamed data sets


def test_a_streamed_data_set_is_corrupted_the_same_way_with_any_number_of_workers(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 3)):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{index}.png")

    def task(workers, **options):
        return build_task("imagenet", tmp_path, image_size=16, seed=1, batch_size=4, num_meta=4, workers=workers,
                          device=CPU, **options)

    noise = {"corruption": "gaussian_noise", "severity": 5, "label_noise": 0.5}
    alone, helped, clean = task(0, **noise), task(2, **noise), task(0)
    whole = list(itertools.islice(alone.train_batches(0), 2 * alone.steps_per_epoch))
    for one, other in zip(whole[2:], helped.train_batches(2), strict=False):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)
        assert torch.equal(one.true_targets, other.true_targets)
    assert not torch.equal(whole[0].inputs, next(clean.train_batches(0)).inputs)
    assert torch.equal(next(alone.meta_batches(0)).inputs, next(clean.meta_batches(0)).inputs)
    assert torch.equal(next(alone.meta_batches(0)).targets, next(clean.meta_batches(0)).targets)
    assert alone.fingerprint() == helped.fingerprint() != clean.fingerprint()
