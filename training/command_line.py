"""The command line: number types, the parser, and errors as one line and an exit status."""

import argparse
import contextlib
import ctypes
import io
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from data.files import ImageFileError
from utils import all_gather, first_line, rank, world_size

SECONDS_TO_END = 10  # that torchrun has to end the other ranks when one has ended


def number(
    kind: type, low: float, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Callable[[str], Any]:
    """An argparse type: a finite number of `kind` in [low, high]; `above` leaves out low, `below` high."""
    limits = f"{'above' if above else 'at least'} {low:g}"
    if high < math.inf:
        limits += f", {'below' if below else 'at most'} {high}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            is_finite = math.isfinite(value)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}") from None
        if not is_finite or value < low or value > high or (above and value == low) or (below and value == high):
            raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
        return value

    return parse


def number_or(parse: Callable[[str], Any], *words: str) -> Callable[[str], Any]:
    """An argparse type: one of the words, or what `parse` takes."""
    return lambda text: text if text in words else parse(text)


def folder(text: str) -> Path:
    """An argparse type: the path of a folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path; give a folder")
    return Path(text)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows a flag by its first spelling only; the others are the authors'."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        text = action.option_strings[0]
        if action.nargs != 0:
            text += f" {action.metavar}"
        if action.nargs == "+":
            text += " ..."
        return text


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and, under torchrun, reports an error of all ranks once.

    `files`, on what the script writes, and `examples` are shown below the help. The usage line lists no flags, since
    all of them, including --help, are in their groups.
    """

    def __init__(self, description: str | None, examples: str, files: str = ""):
        super().__init__(
            description=description, epilog=f"{files}examples:\n{examples}", usage="%(prog)s [FLAG ...]",
            allow_abbrev=False, add_help=False, formatter_class=HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        _let_first_rank_speak()
        super().error(message)


def _let_first_rank_speak() -> None:
    """Wait, on every rank but the first, which prints an error common to all ranks, and whose exit ends the others."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        time.sleep(SECONDS_TO_END)


def in_flags(message: str, names: Iterable[str]) -> str:
    """A library's message; names of arguments in it, its first word or words_with_underscores, become --flags."""
    flags = {name: f"--{name.replace('_', '-')}" for name in names}
    first, space, rest = message.partition(" ")
    message = flags.get(first, first) + space + rest
    message = re.sub(r"\b(try|needs) (dataset|corruption)\b", r"\1 --\2", message)
    return re.sub(r"(?<![\w/.-])\w+_\w+(?![\w/.])", lambda word: flags.get(word[0], word[0]), message)


@contextlib.contextmanager
def user_errors(args: argparse.Namespace | None = None) -> Iterator[None]:
    """Wraps a script's setup: an error that the user can mend ends it with one line and exit status 2.

    Names of arguments are shown as flags. With several ranks, an error of one of them ends all, and is printed once. A
    collective inside, other than agree(), has to be one that ends its rank where it fails.
    """
    mine = ""
    try:
        yield
    except (ValueError, OSError) as error:
        mine = in_flags(" ".join(str(error).split()), vars(args) if args else ())
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        mine = f"this does not fit in memory ({first_line(error)}); lower the sizes"
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    agree(mine)


def agree(error: str = "", **facts: Any) -> None:
    """End all ranks with one line and exit status 2, where one of them has an error, or where their facts differ.

    Every rank has to call this equally often, or to end in user_errors().
    """
    everyone = all_gather((error, facts))
    errors = [theirs for theirs, _ in everyone if theirs]
    if not errors:
        for name in facts:
            values = list(dict.fromkeys(str(theirs[name]) for _, theirs in everyone))
            if len(values) > 1:
                errors.append(f"{name} differs from rank to rank ({', '.join(values)}); give all the same")
    if errors:
        if world_size() == 1:  # alone, or not yet connected
            _let_first_rank_speak()
        if rank() == 0:
            print(f"{Path(sys.argv[0]).name}: error: {errors[0]}", file=sys.stderr)
        sys.exit(2)


class _Unfailing(io.RawIOBase):
    """Takes all that it is given: what its stream cannot write is lost."""

    def __init__(self, stream: Any):
        self.stream = stream

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def write(self, content: Any) -> int:
        try:
            written = self.stream.write(content)
        except OSError:
            written = None
        return len(content) if written is None else written


def show_safely() -> None:
    """For this process: what is only shown never ends it.

    A closed, full or broken stdout or stderr loses what is written to it; letters that a terminal lacks are escaped.
    """
    while os.open(os.devnull, os.O_RDWR) < 3:  # else a file could take the place of a closed stderr, where torch writes
        pass
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream:
            raw, encoding = getattr(stream.buffer, "raw", stream.buffer), stream.encoding
        else:
            raw, encoding = open(os.devnull, "wb", buffering=0), "utf-8"
        buffer = io.BufferedWriter(_Unfailing(raw))
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether sizes do not fit in memory, or in the integers that count it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("allocate memory", "out of memory", "calculation overflow", "multiplication overflow", "buffer size")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def outside_cause(error: Exception, args: argparse.Namespace) -> str:
    """What outside the program has ended a run, in one line; nothing for an error of the program itself."""
    text = " ".join(str(error).split())
    # torch has no class of its own for a batch of one image, nor gloo for a rank that has ended
    if isinstance(error, ValueError) and "more than 1 value per channel" in text:
        text = "BatchNorm cannot train on a batch of one image; change batch_size, num_meta or limit_train"
    elif is_out_of_memory(error):
        text = f"this does not fit in memory ({first_line(error)}); lower batch_size"
    elif world_size() > 1 and isinstance(error, RuntimeError) and any(
        word in text.lower() for word in ("gloo", "nccl", "connection", "timed out")
    ):
        text = "another rank has ended; continue with --resume"
    elif isinstance(error, ImageFileError):
        text += ", and start a new run"
    elif not isinstance(error, OSError):
        return ""
    return in_flags(text, vars(args))


def end_with_launcher() -> None:
    """Under torchrun on Linux: be stopped by SIGTERM when the launcher ends, so that no rank stays behind."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
