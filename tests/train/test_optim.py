"""The learning rate and the weight-decay groups, against those of transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, get_scheduler

from train import config, optim

TOTAL, PEAK = 20, 1e-3


def schedule_of_transformers(name, warmup_steps, kwargs):
    """Learning rates of steps 1 to TOTAL, warm-up and all as its Trainer sets them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    warmup = TrainingArguments("unused", warmup_steps=warmup_steps, bf16=False, use_cpu=True).get_warmup_steps(TOTAL)
    scheduler = get_scheduler(name, optimizer, warmup, TOTAL, kwargs)
    rates = []
    for _ in range(TOTAL):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def schedule_of_ours(train):
    return [optim.learning_rate(train, TOTAL, step) for step in range(1, TOTAL + 1)]


@pytest.mark.parametrize("warmup_steps", [0, 1, 6, 0.26, TOTAL])  # 0.26: 5.2 of 20 steps, rounded up
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_learning_rate_is_that_of_transformers(name, warmup_steps):
    train = config.Train(learning_rate=PEAK, lr_scheduler_type=name, warmup_steps=warmup_steps)
    expected = schedule_of_transformers({"constant": "constant_with_warmup"}.get(name, name), warmup_steps, None)
    assert schedule_of_ours(train) == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("warmup_steps", [0, 6, 0.26])
@pytest.mark.parametrize("decay_steps, count", [(0, 0), (1, 1), (5, 5), (0.31, 7), (18, 18)])  # 18: begins within the warm-up
def test_warmup_stable_decay_is_that_of_transformers(warmup_steps, decay_steps, count):
    name = "warmup_stable_decay"
    train = config.Train(learning_rate=PEAK, lr_scheduler_type=name, warmup_steps=warmup_steps, decay_steps=decay_steps)
    expected = schedule_of_transformers(name, warmup_steps, {"num_decay_steps": count})
    assert schedule_of_ours(train) == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gemma3"])
def test_decayed_parameters_are_those_of_transformers(shape, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder(shape))
    optimizer = optim.make_optimizer(model, config.Train(weight_decay=0.1))
    names = {p: name for name, p in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = set(Trainer.get_decay_parameter_names(None, model))
    assert decay == {name: 0.1 if name in expected else 0.0 for name in names.values()}
    assert 0 < len(expected & decay.keys()) < len(decay)
