"""MLR-SNet in the Hugging Face Trainer: a small language model of Python's documentation. Add "learn" to learn."""

import pydoc_data.topics
import tempfile

import torch
from example_data import use_or_learn
from mlr_snet_transformers import MLRSNetTrainer
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

if __name__ == "__main__":
    text = "".join(pydoc_data.topics.topics.values())[: 64 * 1020]
    characters = sorted(set(text))
    rows = torch.tensor([characters.index(character) for character in text]).view(-1, 64)
    train_rows = [{"input_ids": row, "labels": row} for row in rows[:960]]
    held_out = rows[960:]

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(characters), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    ))

    def meta_loss():
        return model(input_ids=held_out, labels=held_out).loss

    schedule = use_or_learn(model, meta_loss, num_classes=len(characters), perplexity=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=2, per_device_train_batch_size=8, gradient_accumulation_steps=2, optim="sgd",
            max_grad_norm=0.5, warmup_steps=5, use_cpu=True, report_to="none", save_strategy="no", logging_steps=20,
        )
        trainer = MLRSNetTrainer(model, arguments, train_dataset=train_rows, schedule=schedule)
        trainer.train()
    with torch.no_grad():
        perplexity = meta_loss().exp().item()
    print(f"{trainer.state.global_step} steps, held-out perplexity {perplexity:.1f}")
