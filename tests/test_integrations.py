"""The schedules in Lightning, transformers, Accelerate, timm and ignite: bit-identical to a plain loop; and misuse.

Every run has two epochs of six steps, of two micro-batches each, with clipping. The plain loop below is the oracle.
"""

import copy
import pydoc_data.topics
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, load_schedules

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integrations"))

NUM_EPOCHS, STEPS_PER_EPOCH, ACCUMULATION, CLIP = 2, 6, 2, 0.5
KINDS = ["use", "learn"]


def batches():
    """The micro-batches of an epoch: handwritten digits (20, 1, 8, 8) and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    size, number = 20, STEPS_PER_EPOCH * ACCUMULATION
    return list(zip(images.split(size), torch.tensor(labels).split(size), strict=True))[:number]


def held_out():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[-50:], dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels[-50:])


def build_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)
    )


def build_optimizer(network, kind="sgd"):
    """Two parameter groups, the second at half the rate."""
    parameters = list(network.parameters())
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.05}]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.1, fused=kind == "fused")


def loss_of(network, batch):
    return functional.cross_entropy(network(batch[0]), batch[1])


def make_schedule(kind, network, loss_of_network=None, num_classes=10, **options):
    """A function from optimizer, num_epochs and steps_per_epoch to a schedule that is used or learns."""
    if kind == "use":
        return partial(MLRSNetLR, nets=load_schedules(), num_classes=num_classes, **options)
    torch.manual_seed(1)
    net = MLRSNet(8)
    meta_loss = loss_of_network or (lambda: loss_of(network, held_out()))
    return partial(
        MetaMLRSNetLR, net=net, network=network, meta_loss=meta_loss, num_classes=num_classes, t_val=2, lr=0.1,
        **options,
    )


def rates_of(optimizer):
    """The rates of the steps that the optimizer will take, as a list that grows."""
    rates = []
    optimizer.register_step_post_hook(lambda *_: rates.append([group["lr"] for group in optimizer.param_groups]))
    return rates


def run_of(network, schedule, rates):
    """What two runs are compared by. Copies: the next run may move the same tensors."""
    state = {name: value for name, value in schedule.state_dict().items() if name != "adam"}
    return copy.deepcopy({"rates": rates, "weights": dict(network.state_dict()), "schedule": state})


def assert_equal(one, other, since=0):
    """Bit for bit; `since` is the step that a resumed run continued from."""
    assert other["rates"] == one["rates"][since:]
    torch.testing.assert_close(other["weights"], one["weights"], rtol=0, atol=0)
    torch.testing.assert_close(other["schedule"], one["schedule"], rtol=0, atol=0)


def plain_run(kind, network=None, micro_batches=None, part_of_loss=None, num_epochs=NUM_EPOCHS, **options):
    """The oracle: an explicit loop. part_of_loss is a micro-batch's part of the mean over the window."""
    network = network or build_network()
    micro_batches = micro_batches or batches()
    part_of_loss = part_of_loss or (lambda batch: loss_of(network, batch) / ACCUMULATION)
    optimizer = build_optimizer(network)
    schedule = make_schedule(kind, network, **options)(
        optimizer=optimizer, num_epochs=NUM_EPOCHS, steps_per_epoch=STEPS_PER_EPOCH
    )
    rates = rates_of(optimizer)
    for _ in range(num_epochs):
        for start in range(0, len(micro_batches), ACCUMULATION):
            optimizer.zero_grad()
            window_loss = 0.0
            for batch in micro_batches[start : start + ACCUMULATION]:
                loss = part_of_loss(batch)
                loss.backward()
                window_loss += loss.detach()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            schedule.step(window_loss)
            optimizer.step()
    return run_of(network, schedule, rates)


# ---------------------------------------------------------------------------------------------- Lightning


@pytest.fixture
def lightning():
    module = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    return module


class Loader:
    """Micro-batches in order, from where a restored state says."""

    def __init__(self):
        self.batches, self.position = batches(), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for position in range(self.position % len(self.batches), len(self.batches)):
            self.position = position + 1
            yield self.batches[position]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def lightning_module(lightning, optimizer_kind="sgd", **attributes):
    class Digits(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = build_network()
            self.optimizer = build_optimizer(self.network, optimizer_kind)
            self.rates = rates_of(self.optimizer)

        def training_step(self, batch, batch_index):
            return loss_of(self.network, batch)

        def configure_optimizers(self):
            return self.optimizer

    module = Digits()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def lightning_run(lightning, folder, kind, resume_from=None, **options):
    from mlr_snet_lightning import MLRSNetCallback

    module = lightning_module(lightning)
    callback = MLRSNetCallback(make_schedule(kind, module.network))
    checkpoints = lightning.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = lightning.Trainer(**quiet(folder) | {
        "max_epochs": NUM_EPOCHS, "accumulate_grad_batches": ACCUMULATION, "gradient_clip_val": CLIP,
        "callbacks": [callback, checkpoints], "enable_checkpointing": True,
    } | options)
    trainer.fit(module, Loader(), ckpt_path=resume_from)
    assert trainer.callback_metrics["lr"].item() == pytest.approx(module.rates[-1][0])
    return run_of(module.network, callback.schedule, module.rates)


def quiet(folder):
    return {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "default_root_dir": folder,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_lightning_equals_the_plain_loop_and_so_does_a_run_resumed_in_the_middle_of_an_epoch(lightning, tmp_path, kind):
    expected = plain_run(kind)
    assert_equal(expected, lightning_run(lightning, tmp_path, kind))
    assert_equal(expected, lightning_run(lightning, tmp_path, kind, resume_from=tmp_path / "step=4.ckpt"), since=4)


# ---------------------------------------------------------------------------------------------- transformers


def texts():
    """Rows of 32 characters from Python's documentation, as the Trainer wants them; and the size of the vocabulary."""
    text = "".join(pydoc_data.topics.topics[name] for name in ("assert", "assignment", "booleans"))
    characters = sorted(set(text))
    number = 4 * STEPS_PER_EPOCH * ACCUMULATION
    ids = torch.tensor([characters.index(character) for character in text[: (number + 8) * 32]]).view(-1, 32)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return rows[:number], ids[number:], len(characters)


def build_language_model(vocabulary):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    ))


def text_schedule(kind, model, held_out_ids, vocabulary):
    def meta_loss():
        return model(input_ids=held_out_ids, labels=held_out_ids).loss

    return make_schedule(kind, model, meta_loss, num_classes=vocabulary, perplexity=True)


@pytest.fixture
def transformers():
    module = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    module.logging.set_verbosity_error()
    return module


def build_trainer(transformers, folder, kind, optimizers=None, **options):
    from mlr_snet_transformers import MLRSNetTrainer

    class InOrder(MLRSNetTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows, held_out_ids, vocabulary = texts()
    model = build_language_model(vocabulary)
    optimizer = build_optimizer(model)
    arguments = transformers.TrainingArguments(**{
        "output_dir": str(folder), "num_train_epochs": NUM_EPOCHS, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": ACCUMULATION, "max_grad_norm": CLIP, "use_cpu": True, "disable_tqdm": True,
        "report_to": "none", "logging_steps": 1, "save_steps": 4,
    } | options)
    return InOrder(
        model, arguments, train_dataset=rows, optimizers=optimizers or (optimizer, None),
        schedule=text_schedule(kind, model, held_out_ids, vocabulary),
    )


def trainer_run(transformers, folder, kind, resume_from=None):
    trainer = build_trainer(transformers, folder, kind)
    rates = rates_of(trainer.optimizer)
    trainer.train(resume_from_checkpoint=resume_from)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[-len(rates) :] == [rate for rate, _ in rates]  # the logged rate is the applied one
    return run_of(trainer.model, trainer.lr_scheduler.schedule, rates)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_equals_the_plain_loop_and_so_does_a_run_resumed_in_the_middle(transformers, tmp_path, kind):
    rows, held_out_ids, vocabulary = texts()
    model = build_language_model(vocabulary)
    rows = torch.stack([row["input_ids"] for row in rows]).split(4)
    targets = 4 * 31 * ACCUMULATION  # of a window

    def part_of_loss(ids):
        return model(input_ids=ids, labels=ids, num_items_in_batch=targets).loss

    expected = plain_run(
        kind, model, rows, part_of_loss, num_classes=vocabulary, perplexity=True,
        loss_of_network=lambda: model(input_ids=held_out_ids, labels=held_out_ids).loss,
    )
    assert_equal(expected, trainer_run(transformers, tmp_path, kind))
    assert_equal(expected, trainer_run(transformers, tmp_path, kind, str(tmp_path / "checkpoint-4")), since=4)
