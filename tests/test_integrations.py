"""The schedules in Lightning, transformers, Accelerate, timm and ignite: bit-identical to a plain loop; and misuse.

Every run has two epochs of six steps, of two micro-batches each, with clipping. The plain loop below is the oracle. The
examples for Accelerate, timm, ignite and a plain loop are tested through their own train().
"""

import contextlib
import copy
import importlib
import json
import math
import os
import pydoc_data.topics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from mlr_snet import MetaMLRSNetLR, MLRSNet, MLRSNetLR, load_schedule, load_schedules

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
    options.setdefault("gamma", "paper")
    if kind == "use":
        return partial(MLRSNetLR, nets=load_schedules(), num_classes=num_classes, **options)
    torch.manual_seed(1)
    net = MLRSNet(8)
    meta_loss = loss_of_network or (lambda: loss_of(network, held_out()))
    options |= {"num_classes": num_classes, "t_val": 2, "lr": 0.1}
    return partial(MetaMLRSNetLR, net=net, network=network, meta_loss=meta_loss, **options)


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
    return pytest.importorskip("lightning.pytorch", reason="lightning is not installed")


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

        def training_step(self, batch, batch_idx):
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


def test_lightnings_average_of_the_weights_leaves_the_rates_as_they_are(lightning, tmp_path):
    from mlr_snet_lightning import MLRSNetCallback

    if not hasattr(lightning.callbacks, "EMAWeightAveraging"):
        pytest.skip("Lightning has EMAWeightAveraging since 2.6")
    module = lightning_module(lightning)
    callback = MLRSNetCallback(make_schedule("learn", module.network))
    lightning.Trainer(
        **quiet(tmp_path), max_epochs=NUM_EPOCHS, accumulate_grad_batches=ACCUMULATION, gradient_clip_val=CLIP,
        callbacks=[callback, lightning.callbacks.EMAWeightAveraging(decay=0.5)],
    ).fit(module, Loader())
    expected = plain_run("learn")
    assert module.rates == expected["rates"]
    assert not torch.equal(module.network[0].weight, expected["weights"]["0.weight"])  # it ends with the average


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


def build_trainer(transformers, folder, kind, optimizers=None, optimizer_kind="sgd", **options):
    from mlr_snet_transformers import MLRSNetTrainer

    class InOrder(MLRSNetTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows, held_out_ids, vocabulary = texts()
    model = build_language_model(vocabulary)
    optimizer = build_optimizer(model, optimizer_kind)
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


# ---------------------------------------------------------------------------------------------- the examples' own loops


def loader_of(micro_batches):
    images, labels = (torch.cat(parts) for parts in zip(*micro_batches, strict=True))
    return DataLoader(TensorDataset(images, labels), batch_size=len(micro_batches[0][0]))


def example_run(example, kind, network, parts, folder):
    """Call the example's train() on one part of the run after the other, each time with all objects made anew."""
    rates, checkpoint = [], folder / "checkpoint.pt"
    for part in parts:
        fresh = copy.deepcopy(network)
        optimizer = build_optimizer(fresh)
        schedule = make_schedule(kind, fresh)(
            optimizer=optimizer, num_epochs=NUM_EPOCHS, steps_per_epoch=STEPS_PER_EPOCH
        )
        rates_of_part = rates_of(optimizer)
        example.train(fresh, optimizer, schedule, loader_of(part), 1, checkpoint, ACCUMULATION, CLIP)
        rates += rates_of_part
    return run_of(fresh, schedule, rates)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("framework", ["plain", "accelerate", "timm", "ignite"])
def test_an_example_equals_the_plain_loop_and_so_does_a_run_resumed_in_the_middle_of_an_epoch(
    tmp_path, framework, kind
):
    if framework != "plain":
        pytest.importorskip(framework, reason=f"{framework} is not installed")
    example = importlib.import_module(f"{framework}_example")
    torch.manual_seed(0)
    network = example.timm.create_model("test_resnet", in_chans=1, num_classes=10) if framework == "timm" else None
    network = network or build_network()
    expected = plain_run(kind, copy.deepcopy(network))
    run = batches() * NUM_EPOCHS
    for name, parts in {"whole": [run], "resumed": [run[:8], run[8:]]}.items():
        folder = tmp_path / name
        folder.mkdir()
        assert_equal(expected, example_run(example, kind, network, parts, folder))


ON_RANKS = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import json
from pathlib import Path
import torch
import accelerate_example as example
import test_integrations as tests

torch.manual_seed(0)  # no BatchNorm, which normalizes a rank's share by itself
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).double()
optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
batches = [(images.double(), labels) for images, labels in tests.batches()]
meta_loss = lambda: tests.loss_of(network, batches[0])
net = torch.manual_seed(1) and tests.MLRSNet(8).double()
schedule = tests.MetaMLRSNetLR(
    optimizer, net, network, meta_loss, num_classes=10, num_epochs=1, steps_per_epoch=3, t_val=1, lr=0.1,
    gamma="paper",
)
rates = tests.rates_of(optimizer)
accumulation = int(sys.argv[3])
example.train(network, optimizer, schedule, tests.loader_of(batches), 1, Path("checkpoint"), accumulation, 0.5)
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
Path(f"rates_{rank}.json").write_text(json.dumps(rates))
"""


@pytest.mark.slow
def test_two_ranks_of_accelerate_take_the_steps_of_one_process(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    here = Path(__file__).parent
    (tmp_path / "on_ranks.py").write_text(ON_RANKS)
    rates = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*(launch if ranks > 1 else [sys.executable]), str(tmp_path / "on_ranks.py")]
        # the same micro-batches in a window: four of one rank, or two of each
        command += [str(here), str(here.parent / "integrations"), str(4 // ranks)]
        environment = os.environ | {"PYTHONPATH": str(here.parent), "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        rates[ranks] = [json.loads((folder / f"rates_{rank}.json").read_text()) for rank in range(ranks)]
    assert rates[2][0] == rates[2][1]
    # the ranks' losses and gradients are added up in another order than one process's
    torch.testing.assert_close(torch.tensor(rates[2][0]), torch.tensor(rates[1][0]), rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------- GradScaler


def scaled_run(kind, optimizer_kind, clip=CLIP, skip=None, unscale=True):
    """Two epochs under a GradScaler that hides the place before the update; step number `skip` overflows."""
    network, scaler, losses = build_network(), torch.amp.GradScaler("cpu"), []
    optimizer = build_optimizer(network, optimizer_kind)
    schedule = make_schedule(kind, network)(optimizer=optimizer, num_epochs=2, steps_per_epoch=STEPS_PER_EPOCH)
    schedule.attach(lambda: losses[-1])
    rates = rates_of(optimizer)
    for number, batch in enumerate(batches()):
        optimizer.zero_grad()
        losses.append(loss_of(network, batch))
        scaler.scale(losses[-1]).backward()
        if number == skip:
            network[0].weight.grad[0] = math.inf
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
    return run_of(network, schedule, rates)


@pytest.mark.parametrize("optimizer_kind", ["sgd", "fused"])
@pytest.mark.parametrize("clip", [CLIP, math.inf])
def test_under_grad_scaler_the_meta_update_sees_unscaled_and_clipped_gradients(optimizer_kind, clip):
    network = build_network()
    optimizer = build_optimizer(network, optimizer_kind)
    schedule = make_schedule("learn", network)(optimizer=optimizer, num_epochs=2, steps_per_epoch=STEPS_PER_EPOCH)
    rates = rates_of(optimizer)
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_of(network, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        schedule.step(loss)
        optimizer.step()
    # the scale is a power of two, so that it leaves no rounding
    assert_equal(run_of(network, schedule, rates), scaled_run("learn", optimizer_kind, clip))


@pytest.mark.parametrize("optimizer_kind", ["sgd", "fused"])
def test_a_step_that_grad_scaler_skips_does_not_advance_the_schedule(optimizer_kind):
    run = scaled_run("use", optimizer_kind, skip=3)
    assert run["schedule"]["num_steps"] == len(batches()) - 1
    assert all(weights.isfinite().all() for weights in run["weights"].values())


def test_a_fused_optimizer_whose_gradients_are_still_scaled_cannot_learn_a_schedule():
    scaled_run("use", "fused", unscale=False)
    with pytest.raises(RuntimeError, match="unscale_"):
        scaled_run("learn", "fused", unscale=False)


def test_the_trial_steps_that_measure_an_optimizer_do_not_step_an_attached_schedule():
    class Unknown(torch.optim.SGD):
        """An optimizer without an entry of its own in DIRECTIONS."""

    network = build_network()
    optimizer = Unknown(network.parameters(), lr=0.1)
    schedule = make_schedule("learn", network)(optimizer=optimizer, num_epochs=1, steps_per_epoch=4)
    schedule.attach(lambda: loss)
    for batch in batches()[:4]:
        loss = loss_of(network, batch)
        loss.backward()
        optimizer.step()
    assert schedule.num_steps == 4


def test_lightning_under_fp16_equals_the_plain_loop(lightning, tmp_path):
    precision = lightning.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    precision.forward_context = contextlib.nullcontext  # keep fp32's numbers, so that they can be compared
    assert_equal(plain_run("learn"), lightning_run(lightning, tmp_path, "learn", plugins=[precision]))


class Recorded(MLRSNetLR):
    """Keeps the losses that it was stepped with."""

    def step(self, loss=None):
        self.__dict__.setdefault("losses", []).append(float(loss))
        super().step(loss)


def test_lightning_drops_the_loss_of_a_step_that_fp16_skips(lightning, tmp_path):
    from mlr_snet_lightning import MLRSNetCallback

    precision = lightning.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    precision.forward_context = contextlib.nullcontext
    module, losses = lightning_module(lightning), []

    def training_step(batch, batch_idx):
        loss = loss_of(module.network, batch)
        losses.append(loss.item())
        return loss * math.inf if batch_idx == 7 else loss  # the second micro-batch of the fourth step

    module.training_step = training_step
    callback = MLRSNetCallback(partial(Recorded, nets=load_schedules(), num_classes=10, gamma=0.1))
    lightning.Trainer(
        **quiet(tmp_path), max_epochs=1, accumulate_grad_batches=2, plugins=[precision], callbacks=[callback]
    ).fit(module, Loader())
    means = [(first + second) / 2 for first, second in zip(losses[::2], losses[1::2], strict=True)]
    assert callback.schedule.losses == pytest.approx(means[:3] + means[4:], rel=1e-6)


def test_the_trainer_drops_the_loss_of_a_step_that_fp16_skips(transformers, tmp_path):
    class Overflow(transformers.TrainerCallback):
        """As GradScaler tells a fused optimizer, the Trainer's default, to skip the fourth step."""

        def on_pre_optimizer_step(self, arguments, state, control, optimizer, **kwargs):
            if state.global_step == 3:
                optimizer.optimizer.found_inf = torch.tensor(1.0)

        def on_optimizer_step(self, arguments, state, control, optimizer, **kwargs):
            optimizer.optimizer.__dict__.pop("found_inf", None)

    trainer = build_trainer(transformers, tmp_path, "use", optimizer_kind="fused", save_strategy="no")
    trainer.add_callback(Overflow)
    trainer.make_schedule = partial(Recorded, nets=load_schedules(), num_classes=10, gamma=0.01)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.lr_scheduler.schedule.losses == pytest.approx(logged[:3] + logged[4:], rel=1e-6)


# ---------------------------------------------------------------------------------------------- the other semantics


def test_training_past_the_planned_end_keeps_the_last_net():
    network = build_network()
    schedule = make_schedule("use", network)(optimizer=build_optimizer(network), num_epochs=3, steps_per_epoch=1)
    for _ in range(9):
        schedule.step(2.3)
    assert schedule.net is schedule.nets[2]


def test_parameter_groups_keep_their_ratios():
    run = plain_run("use")
    assert all(second == first / 2 for first, second in run["rates"])


def test_a_run_planned_in_steps_changes_its_nets_at_the_thirds_of_its_steps(lightning, tmp_path):
    from mlr_snet_lightning import MLRSNetCallback

    module = lightning_module(lightning)
    callback = MLRSNetCallback(make_schedule("use", module.network))
    numbers = []
    module.on_before_zero_grad = lambda _: numbers.append(callback.schedule.phase)
    lightning.Trainer(**quiet(tmp_path), max_steps=9, callbacks=[callback]).fit(module, Loader())
    assert numbers[1:] == [0, 0, 0, 1, 1, 1, 2, 2]  # before steps 2 to 9


def test_lightnings_short_last_window_of_an_epoch_gives_its_mean_loss(lightning, tmp_path):
    from mlr_snet_lightning import MLRSNetCallback

    module, losses = lightning_module(lightning), []

    def training_step(batch, batch_idx):
        loss = loss_of(module.network, batch)
        losses.append(loss.item())
        return loss

    module.training_step = training_step
    callback = MLRSNetCallback(partial(Recorded, nets=load_schedules(), num_classes=10, gamma=0.1))
    lightning.Trainer(
        **quiet(tmp_path), max_epochs=1, accumulate_grad_batches=5, callbacks=[callback]
    ).fit(module, Loader())
    windows = [losses[:5], losses[5:10], losses[10:]]  # of 12 micro-batches
    means = [sum(window) / len(window) for window in windows]
    assert callback.schedule.losses == pytest.approx(means, rel=1e-6)


def test_the_trainers_scheduler_slot_does_nothing_on_a_bare_step(transformers, tmp_path):
    trainer = build_trainer(transformers, tmp_path, "use")
    slot = trainer.create_scheduler(num_training_steps=12)
    before = copy.deepcopy(slot.state_dict())
    slot.step()
    torch.testing.assert_close(slot.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_a_second_training_by_the_same_trainer_has_a_schedule_of_its_own(transformers, tmp_path):
    trainer = build_trainer(transformers, tmp_path, "use", save_strategy="no", max_steps=1)
    trainer.make_schedule = partial(Recorded, nets=load_schedules(), num_classes=10, gamma=0.01)
    losses = []
    for _ in range(2):
        trainer.train()
        losses += trainer.lr_scheduler.schedule.losses
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and losses[1] == pytest.approx(logged[-1], rel=1e-6)


def test_another_trainer_gets_a_schedule_by_inheritance(transformers, tmp_path):
    from mlr_snet_transformers import MLRSNetTrainer

    class SequenceTrainer(MLRSNetTrainer, transformers.Seq2SeqTrainer):
        pass

    rows, _, vocabulary = texts()
    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no"
    )
    schedule = partial(MLRSNetLR, nets=load_schedules(), num_classes=vocabulary, perplexity=True, gamma=0.01)
    trainer = SequenceTrainer(build_language_model(vocabulary), arguments, train_dataset=rows, schedule=schedule)
    trainer.train()
    assert trainer.lr_scheduler.schedule.num_steps == 2


# ---------------------------------------------------------------------------------------------- misuse, in one sentence


def a_schedule(lr=0.1):
    optimizer = torch.optim.SGD(build_network().parameters(), lr=lr)
    return MLRSNetLR(optimizer, load_schedules(), num_classes=10, num_epochs=3, steps_per_epoch=1, gamma=0.1)


def test_a_step_without_a_loss_says_where_to_call_it():
    with pytest.raises(TypeError, match=r"step\(loss\) after backward\(\), before optimizer.step\(\)"):
        a_schedule().step()


def test_a_loss_that_is_not_0_d_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"shape \(20,\): give the mean"):
        a_schedule().step(torch.ones(20))


def test_an_optimizer_whose_rates_are_all_zero_is_refused():
    with pytest.raises(ValueError, match="rates are all zero; give at least one group a positive lr"):
        a_schedule(lr=0.0)


def test_a_net_file_that_is_none_is_refused_by_its_name(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: not an MLR-SNet"):
        load_schedule(tmp_path / "other.pth")


def test_a_second_scheduler_that_overwrites_the_rate_is_noticed_at_the_next_step():
    schedule = a_schedule()
    other = torch.optim.lr_scheduler.StepLR(schedule.optimizer, 1)
    schedule.step(2.3)
    schedule.optimizer.step()
    other.step()
    with pytest.raises(RuntimeError, match="remove the other scheduler"):
        schedule.step(2.3)


def fit(lightning, folder, module, **options):
    from mlr_snet_lightning import MLRSNetCallback

    callback = MLRSNetCallback(make_schedule("use", module.network))
    lightning.Trainer(**quiet(folder) | {"max_epochs": 1, "callbacks": [callback]} | options).fit(module, Loader())


def test_lightning_with_manual_optimization_is_refused(lightning, tmp_path):
    module = lightning_module(lightning, automatic_optimization=False)
    with pytest.raises(ValueError, match="between manual_backward"):
        fit(lightning, tmp_path, module)


def test_lightning_with_a_scheduler_of_its_own_is_refused(lightning, tmp_path):
    module = lightning_module(lightning)
    other = torch.optim.lr_scheduler.StepLR(module.optimizer, 1)
    module.configure_optimizers = lambda: ([module.optimizer], [other])
    with pytest.raises(ValueError, match="return the optimizer alone"):
        fit(lightning, tmp_path, module)


def test_a_lightning_run_without_an_end_is_refused(lightning, tmp_path):
    with pytest.raises(ValueError, match="the run has no end"):
        fit(lightning, tmp_path, lightning_module(lightning), max_epochs=-1)


def test_a_trainer_with_another_scheduler_is_refused(transformers, tmp_path):
    optimizer = build_optimizer(build_network())
    other = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match=r"give \(optimizer, None\)"):
        build_trainer(transformers, tmp_path, "use", optimizers=(optimizer, other))


def test_a_trainer_with_warm_up_is_refused(transformers, tmp_path):
    trainer = build_trainer(transformers, tmp_path, "use", warmup_steps=5)
    with pytest.raises(ValueError, match="5 warm-up steps"):
        trainer.train()
