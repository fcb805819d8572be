"""The data of the committed results."""

import types

import numpy as np
import prepare
import pytest
import torch
from PIL import Image

from data import build_task


def test_wikitext2_keeps_the_words_that_occur_three_times_in_what_trains(tmp_path):
    (tmp_path / "wiki.valid.tokens").write_text(" \n often often often rare rare \n")
    (tmp_path / "wiki.test.tokens").write_text("\n".join(f"often new {number}" for number in range(500)))
    assert prepare.main(["wikitext-2", str(tmp_path / "out"), "--source", str(tmp_path)]) == 0
    texts = {split: (tmp_path / "out" / f"{split}.txt").read_text() for split in ("train", "valid", "test")}
    assert texts["train"] == "\noften often often <unk> <unk>\n\n"
    assert texts["valid"] == "often <unk> <unk>\n" * 200 and texts["test"] == "often <unk> <unk>\n" * 250


def test_cifar10_becomes_class_folders(tmp_path, monkeypatch):
    def fake(root, train, download):
        pixels = np.full((4, 32, 32, 3), 200 if train else 100, dtype=np.uint8)
        return types.SimpleNamespace(data=pixels, targets=[0, 1, 1, 0], classes=["cat", "dog"])

    monkeypatch.setattr(prepare, "CIFAR10", fake)
    assert prepare.main(["cifar10", str(tmp_path)]) == 0
    assert np.asarray(Image.open(tmp_path / "test" / "dog" / "00001.jpg")).mean() == 100
    task = build_task("folder", tmp_path, batch_size=2, seed=0, device=torch.device("cpu"))
    assert task.in_words() == "4 training, 0 held-out and 4 test images"


def test_text_that_is_missing_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        prepare.main(["wikitext-2", str(tmp_path), "--source", str(tmp_path)])
    assert end.value.code == 2 and "wiki.valid.tokens" in capsys.readouterr().err
