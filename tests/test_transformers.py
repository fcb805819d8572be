"""MLR-SNet in the Hugging Face Trainer: bit-identical to a plain loop, with the Trainer's own arguments; and misuse."""

import copy
import functools
import pydoc_data.topics
from functools import partial

import pytest
import torch
from integrating import (
    ACCUMULATION,
    CLIP,
    KINDS,
    NUM_EPOCHS,
    STEPS_PER_EPOCH,
    assert_equal,
    build_network,
    build_optimizer,
    make_schedule,
    measuring,
    plain_run,
    rates_of,
    readme_code,
    recorded,
    run_of,
)

from mlr_snet import MLRSNetLR

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
transformers.logging.set_verbosity_error()
from mlr_snet_transformers import MLRSNetTrainer


@functools.cache
def texts():
    """Rows of 32 characters from Python's documentation, as the Trainer wants them; and the size of the vocabulary."""
    text = "".join(pydoc_data.topics.topics[name] for name in ("assert", "assignment", "booleans"))
    characters = sorted(set(text))
    number = 4 * STEPS_PER_EPOCH * ACCUMULATION
    ids = torch.tensor([characters.index(character) for character in text[: (number + 8) * 32]]).view(-1, 32)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return rows[:number], ids[number:], len(characters)


def build_model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=texts()[2], max_position_embeddings=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    ))


def held_out_loss_of(model):
    held_out = texts()[1]
    return lambda: model(input_ids=held_out, labels=held_out).loss


def text_schedule(kind, model, **options):
    return make_schedule(kind, model, held_out_loss_of(model), num_classes=texts()[2], perplexity=True, **options)


def text_measuring(model, calls):
    rows = texts()[0]

    def next_loss():
        start = int(torch.randint(len(rows) - 8, ()))
        ids = torch.stack([row["input_ids"] for row in rows[start : start + 8]])
        return model(input_ids=ids, labels=ids).loss

    return measuring(model, calls, next_loss)


def build_trainer(folder, make, trainer_class=MLRSNetTrainer, optimizers=None, optimizer_kind="sgd", **options):
    """`make` is called with the model and returns the function that makes the schedule; None for a plain Trainer."""

    class InOrder(trainer_class):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = build_model()
    arguments = transformers.TrainingArguments(**{
        "output_dir": str(folder), "num_train_epochs": NUM_EPOCHS, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": ACCUMULATION, "max_grad_norm": CLIP, "use_cpu": True, "disable_tqdm": True,
        "report_to": "none", "logging_steps": 1, "save_steps": 4,
    } | options)
    schedule = {"schedule": make(model)} if make else {}
    return InOrder(
        model, arguments, train_dataset=texts()[0], eval_dataset=texts()[0][:8],
        optimizers=optimizers or (build_optimizer(model, optimizer_kind), None), **schedule,
    )


def run(folder, make, resume_from=None, **options):
    trainer = build_trainer(folder, make, **options)
    rates = rates_of(trainer.optimizer)
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[-len(rates) :] == [rate for rate, _ in rates]  # the logged rate is the applied one
    return run_of(trainer.model, trainer.lr_scheduler.schedule, rates)


def expected_run(kind, **options):
    model = build_model()
    rows = torch.stack([row["input_ids"] for row in texts()[0]]).split(4)
    targets = 4 * 31 * ACCUMULATION  # of a window

    def part_of_loss(ids):
        return model(input_ids=ids, labels=ids, num_items_in_batch=targets).loss

    return plain_run(
        kind, model, list(rows), part_of_loss, loss_of_network=held_out_loss_of(model), num_classes=texts()[2],
        perplexity=True, **options,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_equals_the_plain_loop_and_so_does_one_resumed_in_the_middle(tmp_path, kind):
    expected = expected_run(kind)
    assert_equal(expected, run(tmp_path, partial(text_schedule, kind)))
    assert_equal(expected, run(tmp_path, partial(text_schedule, kind), tmp_path / "checkpoint-4"), since=4)


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_keeps_its_measured_scale_and_does_not_measure_again(tmp_path, step):
    calls = []
    make = partial(text_measuring, calls=calls)
    whole = run(tmp_path, make)
    assert len(calls) == 1 and whole["schedule"]["gamma"] == calls[0]
    assert_equal(whole, run(tmp_path, make, tmp_path / f"checkpoint-{step}"), since=step)
    assert len(calls) == 1


def test_a_function_that_measures_is_given_the_bare_optimizer(tmp_path):
    given = []
    trainer = build_trainer(tmp_path, lambda model: lambda optimizer, num_steps: given.append(optimizer) or recorded(
        optimizer=optimizer, num_steps=num_steps
    ), max_steps=1, save_strategy="no")
    bare = trainer.optimizer
    trainer.train()
    assert given == [bare] and trainer.optimizer is not bare  # Accelerate has wrapped it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [4, 8])
def test_a_checkpoint_without_a_schedule_is_resumed_at_its_step_of_the_plan_with_a_warning(tmp_path, step, kind):
    build_trainer(tmp_path, None, transformers.Trainer, lr_scheduler_type="constant").train()
    with pytest.warns(UserWarning, match=f"no state of a schedule: it starts at step {step} of the 12 planned"):
        resumed = run(tmp_path, partial(text_schedule, kind), tmp_path / f"checkpoint-{step}")
    assert_equal(expected_run(kind, since=step), resumed, since=step)


@pytest.mark.parametrize("options", [
    {"lr_scheduler_type": "cosine"}, {"save_only_model": True},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 4},
])
def test_a_checkpoint_of_any_other_scheduler_or_of_the_model_only_is_resumed_in_the_same_way(tmp_path, options):
    build_trainer(tmp_path, None, transformers.Trainer, **options).train()
    trainer = build_trainer(tmp_path, partial(text_schedule, "use"))
    with pytest.warns(UserWarning, match="no state of a schedule: it starts at step 8"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert trainer.lr_scheduler.schedule.steps_taken == 12


# ---------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("plan", [
    {"num_train_epochs": 2}, {"num_train_epochs": 0.5}, {"max_steps": 9}, {"num_train_epochs": 100, "max_steps": 7},
    {"gradient_accumulation_steps": 5},
])
def test_the_schedule_plans_the_steps_that_the_run_takes(tmp_path, plan):
    trainer = build_trainer(tmp_path, lambda model: recorded, save_strategy="no", **plan)
    trainer.train()
    assert trainer.lr_scheduler.schedule.num_steps == trainer.state.global_step == len(
        trainer.lr_scheduler.schedule.losses
    )


def test_a_run_of_one_epoch_has_all_its_nets(tmp_path):
    phases = []

    class Watching(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, lr_scheduler, **kwargs):
            phases.append(lr_scheduler.schedule.phase)

    trainer = build_trainer(tmp_path, partial(text_schedule, "use"), num_train_epochs=1, save_strategy="no")
    trainer.add_callback(Watching)
    trainer.train()
    assert phases == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("warmup", [{"warmup_steps": 5}, {"warmup_steps": 0.25}, {"warmup_steps": 1}])
def test_the_trainers_warm_up_becomes_the_schedules(tmp_path, warmup):
    warmup_steps = {5: 5, 0.25: 3, 1: 1}[warmup["warmup_steps"]]
    given = run(tmp_path, partial(text_schedule, "use", warmup=0.0), save_strategy="no", **warmup)
    assert_equal(expected_run("use", warmup=warmup_steps / 12), given)
    levels = [rate for rate, _ in given["rates"]]
    assert levels[0] < 0.6 * max(levels)


def test_a_schedule_keeps_a_warm_up_of_its_own(tmp_path):
    own = run(tmp_path, partial(text_schedule, "use", warmup=0.5, cooldown=0.5), save_strategy="no", warmup_steps=11)
    assert_equal(expected_run("use", warmup=0.5, cooldown=0.5), own)


@pytest.mark.parametrize("warmup_steps, cooldown", [(11, 0.2), (13, 0.0), (1, 1.0)])
def test_more_warm_up_and_cool_down_than_the_run_has_steps_is_refused(tmp_path, warmup_steps, cooldown):
    make = partial(text_schedule, "use", warmup=0.0, cooldown=cooldown)
    with pytest.raises(ValueError, match=f"warmup_steps {warmup_steps} and .* cooldown {cooldown}: together more than"):
        build_trainer(tmp_path, make, warmup_steps=warmup_steps).train()


# ---------------------------------------------------------------------------------------------- the Trainer's own ways


def test_the_loss_of_a_step_that_fp16_skips_is_dropped(tmp_path):
    class Overflow(transformers.TrainerCallback):
        """As GradScaler tells a fused optimizer, the Trainer's default, to skip the fourth step."""

        def on_pre_optimizer_step(self, arguments, state, control, optimizer, **kwargs):
            if state.global_step == 3:
                optimizer.optimizer.found_inf = torch.tensor(1.0)

        def on_optimizer_step(self, arguments, state, control, optimizer, **kwargs):
            optimizer.optimizer.__dict__.pop("found_inf", None)

    trainer = build_trainer(tmp_path, lambda model: recorded, optimizer_kind="fused", save_strategy="no")
    trainer.add_callback(Overflow)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.lr_scheduler.schedule.losses == pytest.approx(logged[:3] + logged[4:], rel=1e-6)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"gradient_accumulation_steps": 5}])
def test_the_schedule_reads_the_loss_that_the_trainer_logs(tmp_path, options):
    trainer = build_trainer(tmp_path, lambda model: recorded, save_strategy="no", **options)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.lr_scheduler.schedule.losses == pytest.approx(logged, rel=1e-6)


def test_load_best_model_at_end_leaves_the_rates_as_they_are(tmp_path):
    best = run(
        tmp_path, partial(text_schedule, "use"), load_best_model_at_end=True, eval_strategy="steps", eval_steps=4
    )
    assert best["rates"] == expected_run("use")["rates"]


def test_the_scheduler_slot_does_nothing_on_a_bare_step(tmp_path):
    trainer = build_trainer(tmp_path, partial(text_schedule, "use"))
    slot = trainer.create_scheduler(num_training_steps=12)
    before = copy.deepcopy(slot.state_dict())
    slot.step()
    torch.testing.assert_close(slot.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_a_second_training_by_the_same_trainer_has_a_schedule_of_its_own(tmp_path):
    trainer = build_trainer(tmp_path, lambda model: recorded, save_strategy="no", max_steps=1)
    losses = []
    for _ in range(2):
        trainer.train()
        losses += trainer.lr_scheduler.schedule.losses
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and losses[1] == pytest.approx(logged[-1], rel=1e-6)


def test_another_trainer_gets_a_schedule_by_inheritance(tmp_path):
    class SequenceTrainer(MLRSNetTrainer, transformers.Seq2SeqTrainer):
        pass

    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no"
    )
    schedule = partial(MLRSNetLR, nets="recommended", gamma=0.01)
    trainer = SequenceTrainer(build_model(), arguments, train_dataset=texts()[0], schedule=schedule)
    trainer.train()
    assert trainer.lr_scheduler.schedule.steps_taken == 2


def test_a_trainer_with_another_scheduler_is_refused(tmp_path):
    optimizer = build_optimizer(build_network())
    other = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match=r"give \(optimizer, None\)"):
        build_trainer(tmp_path, partial(text_schedule, "use"), optimizers=(optimizer, other))


# ---------------------------------------------------------------------------------------------- the README's lines


def test_the_readmes_lines_train_by_the_planned_steps(tmp_path):
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no"
    )
    names = {"model": build_model(), "arguments": arguments, "texts": texts()[0]}
    exec(readme_code("Hugging Face Trainer")[0], names)
    schedule = names["trainer"].lr_scheduler.schedule
    assert schedule.num_steps == schedule.steps_taken == 3
