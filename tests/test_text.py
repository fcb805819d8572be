"""Language modelling: its data, its exact perplexity, its hidden state, and its hypergradient."""

import itertools
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

import data.text
from data import build_task
from data.text import TextData, TextTask
from mlr_snet import hypergradient, lookahead
from mlr_snet_optim.directions import update_directions
from models import build_network

CPU = torch.device("cpu")


def random_text(tokens, seed=0, vocabulary=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (tokens + 1,), generator=generator)


def small_task(**options):
    data = TextData(random_text(501), random_text(203, 1), random_text(97, 2), list("abcdefghi"))
    return TextTask(data, **{"batch_size": 4, "seq_len": 7, "device": CPU, "evaluation_columns": 3, **options})


def small_network(dropout=0.5):
    torch.manual_seed(0)
    return build_network("lstm2", 9, embed_size=6, dropout=dropout).double()


def write_splits(folder, **content):
    folder.mkdir(exist_ok=True)
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text(content.get(split, "a b c\nd e\n" * 50), encoding="utf-8")


def test_the_vocabulary_is_the_training_splits_and_the_rest_is_unk(tmp_path):
    write_splits(tmp_path, valid="a zebra\n")
    read = data.text.text_folder(tmp_path, "word")
    assert read.vocabulary == ["<eos>", "<unk>", "a", "b", "c", "d", "e"]
    assert [read.vocabulary[index] for index in read.valid] == ["<eos>", "a", "<unk>", "<eos>"]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_unknown_tokens_are_counted_where_nothing_teaches_unk(tmp_path, capsys, split):
    write_splits(tmp_path, **{"valid": "a\n", "test": "a\n", split: "a zebra b\n"})
    data.text.text_folder(tmp_path, "word")
    assert capsys.readouterr().err.count(f"1 of 4 {split} tokens are not in the training text") == 1
    write_splits(tmp_path, **{"train": "a <unk>\n", "valid": "a\n", "test": "a\n", split: "a zebra b\n"})
    data.text.text_folder(tmp_path, "word")
    assert not capsys.readouterr().err


def test_a_line_that_ends_with_eos_has_one(tmp_path):
    write_splits(tmp_path, test="a b <eos>\nd <eos> \n")
    read = data.text.text_folder(tmp_path, "word")
    assert [read.vocabulary[index] for index in read.test] == ["<eos>", "a", "b", "<eos>", "d", "<eos>"]


def test_characters_can_be_the_tokens(tmp_path):
    write_splits(tmp_path, test="a b\n")
    read = data.text.text_folder(tmp_path, "char")
    assert [read.vocabulary[index] for index in read.test] == ["<eos>", "a", " ", "b", "<eos>"]


@pytest.mark.parametrize("tokens", ["word", "char"])
@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa b c\nd e\n", b"a b c\n\xef\xbb\xbfd e\n", b"a b c\r\nd e\r\n",
                                     b"\xef\xbb\xbfa b c\r\n\xef\xbb\xbfd e"])
def test_byte_order_marks_and_the_line_ends_of_other_systems_change_nothing(tmp_path, tokens, content):
    (tmp_path / "file.txt").write_text("a b c\nd e\n")
    expected = data.text.read(tmp_path / "file.txt", tokens)
    (tmp_path / "file.txt").write_bytes(content)
    assert data.text.read(tmp_path / "file.txt", tokens) == expected


@pytest.mark.parametrize("character", "\f\v\x1c\x1d\x1e\x85\u2028\u2029", ids=ascii)
def test_characters_that_separate_text_without_ending_a_line_do_not_end_one(tmp_path, character):
    (tmp_path / "file.txt").write_text(f"a b{character}c\n\nd e", encoding="utf-8")
    assert data.text.read(tmp_path / "file.txt", "word") == [["a", "b", "c"], [], ["d", "e"]]
    assert data.text.read(tmp_path / "file.txt", "char") == [["a", " ", "b", character, "c"], [], ["d", " ", "e"]]


@pytest.mark.parametrize("columns", [1, 3, 4])
def test_every_token_is_a_target_exactly_once_and_follows_its_input(columns):
    ids = torch.arange(96)
    text = data.text.Columns(ids, columns, 7, CPU)
    pieces = [text.piece(index) for index in range(text.num_pieces)]
    counted = [piece.targets[piece.targets >= 0] for piece in pieces]
    assert sorted(torch.cat(counted).tolist()) == list(range(1, 96))
    assert [len(values) for values in counted] == [piece.size for piece in pieces]
    for piece in pieces:
        valid = piece.targets >= 0
        assert torch.equal(piece.inputs[valid] + 1, piece.targets[valid])


def test_the_fingerprint_depends_on_tokens_and_vocabulary_alone():
    reference = small_task().fingerprint()
    assert small_task(batch_size=2, seq_len=5).fingerprint() == reference
    assert small_task(limit_train=400).fingerprint() != reference
    texts = [random_text(501), random_text(203, 1), random_text(97, 2)]
    assert TextTask(TextData(*texts, list("abcdefghj")), batch_size=4, seq_len=7, device=CPU).fingerprint() != reference
    texts[2][5] = (texts[2][5] + 1) % 9
    assert TextTask(TextData(*texts, list("abcdefghi")), batch_size=4, seq_len=7, device=CPU).fingerprint() != reference


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity():
    network = small_network()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    metrics = small_task().evaluate(network)
    assert metrics["test_ppl"] == pytest.approx(9, rel=1e-6) and metrics["valid_ppl"] == pytest.approx(9, rel=1e-6)


def test_carrying_the_hidden_state_equals_one_long_pass():
    network, task = small_network().eval(), small_task(evaluation_columns=1)
    ids = random_text(97, 2)
    logits, _ = network(ids[:-1, None])
    whole = nn.functional.cross_entropy(logits.squeeze(1), ids[1:])
    # the task measures the loss in single precision
    assert task.evaluate(network)["test_loss"] == pytest.approx(whole.item(), rel=1e-6)


def test_training_batches_keep_the_hidden_state_within_an_epoch_and_start_the_next_without():
    task, network = small_task(), small_network(dropout=0.0)
    batches, hidden = task.train_batches(task.steps_per_epoch - 1), None
    _, _, hidden = task.loss(network, next(batches), hidden)
    begins = next(batches)
    assert begins.first and torch.equal(begins.inputs, task.train.piece(0).inputs)
    fresh, continued = task.loss(network, begins, None)[0], task.loss(network, begins, hidden)[0]
    assert torch.equal(fresh, continued)
    second = next(batches)
    assert not torch.equal(task.loss(network, second, None)[0], task.loss(network, second, hidden)[0])
    assert not any(state.requires_grad for state in hidden)


def test_the_meta_stream_cycles_over_the_validation_text():
    task = small_task()
    pieces = task.meta.num_pieces
    batches = list(itertools.islice(task.meta_batches(0), pieces + 2))
    assert [batch.first for batch in batches] == [True] + [False] * (pieces - 1) + [True, False]
    assert torch.equal(batches[1].targets, batches[pieces + 1].targets)
    assert torch.equal(batches[3].targets, next(task.meta_batches(3)).targets)


def test_hypergradient_equals_autograd_through_the_lookahead_with_clip_hidden_state_and_dropout_mask():
    network, generator = small_network(), torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9, weight_decay=0.01)

    def tokens():
        return torch.randint(9, (7, 4), generator=generator)

    train_inputs, train_targets, meta_inputs, meta_targets = (tokens() for _ in range(4))
    hidden = tuple(0.3 * torch.randn(2, 4, 6, dtype=torch.float64, generator=generator) for _ in range(2))

    def loss(call, inputs, targets, mask):
        torch.manual_seed(mask)
        return nn.functional.cross_entropy(call(inputs, hidden)[0].flatten(0, 1), targets.flatten())

    for _ in range(2):
        optimizer.zero_grad()
        loss(network, train_inputs, train_targets, 1).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        if not optimizer.state:
            optimizer.step()
    slope = hypergradient(network, optimizer, 2.0, lambda: loss(network, meta_inputs, meta_targets, 2))

    lr = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    parameters = dict(network.named_parameters())  # the tied weight once
    assert sum(value.shape == (9, 6) for value in parameters.values()) == 1
    gradients = torch.autograd.grad(
        loss(lambda *x: functional_call(network, parameters, x), train_inputs, train_targets, 1),
        list(parameters.values()), create_graph=True,
    )
    norm = math.sqrt(sum(gradient.detach().square().sum().item() for gradient in gradients))
    assert norm > 0.1  # so that the clip bites
    ahead = {}
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        decayed = gradient * (0.1 / (norm + 1e-6)) + 0.01 * parameter
        ahead[name] = parameter - lr * (0.9 * optimizer.state[parameter]["momentum_buffer"] + decayed)
    loss(lambda *x: functional_call(network, ahead, x), meta_inputs, meta_targets, 2).backward()
    assert slope.item() == pytest.approx(lr.grad.item(), rel=1e-8)


def test_tied_weights_stay_tied_through_the_lookahead():
    network, task = small_network(), small_task()
    task.loss(network, task.train.piece(0), None)[0].backward()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    before = network.embedding.weight.clone()
    with lookahead(network, update_directions(optimizer), 0.5):
        assert network.decoder.weight is network.embedding.weight
        assert torch.allclose(network.embedding.weight, before - 0.5 * network.embedding.weight.grad)
    assert network.decoder.weight is network.embedding.weight and torch.equal(network.embedding.weight, before)


def test_the_language_models_have_their_size_and_initialisation():
    network = build_network("lstm2", 1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 1000 * 512 + 1000 + 2 * 4 * 512 * (1024 + 2)
    assert network.embedding.weight.abs().max() <= 0.1 and not network.decoder.bias.any()
    assert build_network("lstm3", 10, embed_size=8).lstm.num_layers == 3


def test_pydoc_needs_no_download_and_its_splits_share_no_paragraph():
    read = data.text.pydoc(Path(), "word")
    assert len(read.train) > 20_000 and len(read.test) > 2_000 and len(read.valid) > 2_000
    end = read.vocabulary.index("<eos>")
    unknown = read.vocabulary.index("<unk>")

    def paragraphs(ids):
        words = " ".join(map(str, ids.tolist())).split(f" {end} ")
        return {line for line in words if len(line.split()) > 8 and str(unknown) not in line.split()}

    assert not paragraphs(read.train) & paragraphs(read.test)


def test_penn_treebank_files_are_found_under_either_name_or_downloaded_with_their_md5(tmp_path, monkeypatch, capsys):
    write_splits(tmp_path / "here")
    (tmp_path / "here" / "train.txt").rename(tmp_path / "here" / "ptb.train.txt")
    assert len(data.text.ptb(tmp_path / "here", "word").train) == 1 + 7 * 50
    assert "md5" in capsys.readouterr().err

    asked = []

    def download(url, root, filename, md5):
        asked.append((filename, md5))
        Path(root).mkdir(parents=True, exist_ok=True)
        (Path(root) / filename).write_text("a b\n")

    monkeypatch.setattr(data.text, "download_url", download)
    data.text.ptb(tmp_path / "there", "word")
    assert asked == [(f"ptb.{split}.txt", md5) for split, md5 in data.text.PTB_MD5.items()]
    data.text.ptb(tmp_path / "there", "word")  # as an interrupted download leaves them
    assert asked[3:] == asked[:3]


def refuse_download(*args):
    raise OSError("no network\nmore")


@pytest.mark.parametrize(("name", "spoil", "message"), [
    ("text", lambda root: (root / "valid.txt").write_text(" \n"), "valid.txt: holds no text"),
    ("text", lambda root: (root / "test.txt").unlink(), "test.txt"),
    ("text", lambda root: (root / "valid.txt").write_bytes(b"\xef\xbb\xbf\n"), "valid.txt: holds no text"),
    ("text", lambda root: (root / "valid.txt").write_bytes(b""), "valid.txt: holds no text"),
    ("text", lambda root: (root / "train.txt").write_bytes(b"abc \xff\xfe"), "not UTF-8 at byte 4"),
    ("text", lambda root: (root / "train.txt").write_text("a b c", encoding="utf-16"), "not UTF-8 at byte 0"),
    ("text", lambda root: (root / "train.txt").write_text("a b c\n" * 50, encoding="utf-16-le"), "holds NUL"),
    ("text", lambda root: (root / "test.txt").write_text("a b c\n" * 50, encoding="utf-32-be"), "holds NUL"),
    ("text", lambda root: (root / "train.txt").write_text("a b c\0\n" * 50), "holds NUL"),
    ("text", lambda root: ((root / "test.txt").unlink(), os.mkfifo(root / "test.txt")), "not a regular file"),
    ("text", lambda root: (root / "valid.txt").write_text("a b"), "valid text has 3 tokens"),
    ("ptb", lambda root: (root / "test.txt").unlink(), "pydoc"),
])
def test_text_that_cannot_be_used_is_one_clear_line(tmp_path, monkeypatch, name, spoil, message):
    monkeypatch.setattr(data.text, "download_url", refuse_download)
    write_splits(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        build_task(name, tmp_path, batch_size=2, seq_len=5, device=CPU)
    assert "\n" not in str(error.value)
