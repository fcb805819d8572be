"""Write the data of the committed results: CIFAR-10 as JPEG class folders, or a small WikiText-2 as a text folder."""

import argparse
import sys
from collections import Counter
from pathlib import Path

SCRIPT = Path(__file__).resolve()
sys.path[:0] = [str(SCRIPT.parents[1]), str(SCRIPT.parent)]

from PIL import Image
from torchvision.datasets import CIFAR10

from training.command_line import show_safely, user_errors
from utils import ROOT, write_atomically

LEAST = 3  # times that a word of the training text occurs; a rarer one is <unk>
VALID_LINES = 200


def write_cifar10(downloads: Path, folder: Path) -> None:
    """folder/{train,test}/CLASS/INDEX.jpg of quality 75. Downloads CIFAR-10 where it is missing."""
    for split in ("train", "test"):
        data = CIFAR10(str(downloads), train=split == "train", download=True)
        for name in data.classes:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        for index, (pixels, label) in enumerate(zip(data.data, data.targets, strict=True)):
            Image.fromarray(pixels).save(folder / split / data.classes[label] / f"{index:05d}.jpg", quality=75)


def write_wikitext2(source: Path, folder: Path) -> None:
    """folder/{train,valid,test}.txt: the validation text; the first 200 lines of the test text; its second half.

    OSError where wiki.valid.tokens or wiki.test.tokens is missing in `source`.
    """
    train = (source / "wiki.valid.tokens").read_text("utf-8")
    test = (source / "wiki.test.tokens").read_text("utf-8").split("\n")
    counts = Counter(train.split())
    splits = {"train": train.split("\n"), "valid": test[:VALID_LINES], "test": test[len(test) // 2 :]}
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        words = [[word if counts[word] >= LEAST else "<unk>" for word in line.split()] for line in lines]
        write_atomically(folder / f"{split}.txt", ("\n".join(map(" ".join, words)) + "\n").encode())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("data", choices=["cifar10", "wikitext-2"])
    parser.add_argument("folder", type=Path, help="where to write them")
    parser.add_argument(
        "--source", type=Path, default=ROOT / "data" / "downloads", metavar="DIR",
        help="CIFAR-10, or where to download it; or WikiText-2's wiki.valid.tokens and wiki.test.tokens "
        "(default: data/downloads)",
    )
    args = parser.parse_args(argv)
    with user_errors(args):
        write = write_cifar10 if args.data == "cifar10" else write_wikitext2
        write(args.source, args.folder)
    return 0


if __name__ == "__main__":
    show_safely()
    sys.exit(main())
