"""--help of the scripts: short, in groups, and nothing twice."""

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torchvision

from training.command_line import Parser

ROOT = Path(__file__).resolve().parents[1]
META_TRAIN = "meta-train/meta-train.py"


def load(script):
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[META_TRAIN, "meta-test/meta-test.py", "tables/tables.py"])
def parser(request, monkeypatch):
    """The script's parser, in a terminal of 100 columns."""
    parsers = []

    def leave(parser, argv):
        parsers.append(parser)
        sys.exit()

    monkeypatch.setattr(Parser, "parse_args", leave)
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        load(request.param).parse_args([])
    return parsers[0]


def test_every_flag_stands_once_in_a_group(parser):
    flags = [line.split()[0] for line in parser.format_help().splitlines() if line.startswith("  --")]
    assert sorted(flags) == sorted(
        action.option_strings[0] for action in parser._actions if action.help != argparse.SUPPRESS
    )
    assert "options:" not in parser.format_help()


def test_no_list_of_choices_stands_twice(parser):
    text = " ".join(parser.format_help().split()).replace("- ", "-")  # lines also break at hyphens
    assert "{" not in text
    for action in parser._actions:
        if action.choices and len(action.choices) > 3:  # fewer are words of a sentence
            assert text.count(", ".join(list(action.choices)[-2:])) == 1


def test_the_help_is_not_wide_and_ends_with_an_example(parser):
    lines = parser.format_help().splitlines()
    assert max(len(line) for line in lines) <= 100
    assert lines[-1].startswith("  python ")


def test_meta_train_without_arguments_or_a_network_offers_a_command_that_needs_no_download(
    tmp_path, monkeypatch, capsys
):
    def fail(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(SystemExit) as exit:
        load(META_TRAIN).main(["--data-root", str(tmp_path), "--out", str(tmp_path / "run")])
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "try --dataset digits, which needs no download" in lines[0]
