"""KTO against TRL's KTOTrainer: losses, gradients and metrics on one batch; then a run on the batches that TRL trained on."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from test_dpo import (
    OPTIMIZER,
    PLAIN,
    assert_same_metrics,
    assert_same_steps,
    difference,
    fused_model,
    logged,
    micro_batch,
    pairs,
    stub,
    with_gradient,
)
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer
from trl import KTOConfig, KTOTrainer

from algorithms import kto
from models import load
from train import batches, config, loop, optim, reference

PROMPTS, COMPLETIONS = [3, 1, 5, 2, 4, 1, 3], [4, 9, 2, 12, 6, 1, 7]  # tokens of each row
LABELS = {"mixed": [1, 0, 0, 1, 1, 0, 1], "good": [1] * 7, "bad": [0] * 7}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.5)])
@pytest.mark.parametrize("shift", [1.5, -1.5])  # of the mismatched rows' log-ratios: the baseline is positive, or held at 0
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_loss_equals_trl(loss_type, labels, shift, weights):
    """Where a side has no row, TRL leaves out its metrics and the margin; ours are 0, and the other side's reward."""
    cfg = kto.Config(loss_type=loss_type, beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1])
    logps, batch = micro_batch(PROMPTS, COMPLETIONS)
    batch["desirable"] = torch.tensor(LABELS[labels]).bool()
    mismatched = micro_batch(PROMPTS, COMPLETIONS[::-1], seed=1)
    mismatched[1]["ref_logps"] = (mismatched[1]["ref_logps"] - shift / 4).where(mismatched[1]["loss_mask"], 0)
    loss, gradient, metrics = with_gradient(ours, logps, batch, mismatched, cfg)
    expected, expected_gradient, expected_metrics = with_gradient(theirs, logps, batch, mismatched, cfg)
    assert difference(loss, expected) < 1e-6
    assert difference(gradient, expected_gradient) < 1e-6
    baseline = expected_metrics["kl"] if loss_type == "kto" else expected_metrics.pop("kl")
    assert (baseline > 0) == (loss_type == "kto" and shift > 0)
    assert_same_metrics(metrics, expected_metrics)
    absent = {"good": "rejected", "bad": "chosen"}.get(labels)
    names = {f"{name}/{absent}" for name in ("rewards", "logps", "logits")} | {"rewards/margins"} if absent else set()
    assert metrics.keys() - expected_metrics.keys() == names
    assert not any(metrics[name] for name in names - {"rewards/margins"})


def ours(logps, batch, mismatched, cfg):
    """algorithms.kto as the loop calls it, with the micro-batch as the whole step."""
    totals = {name: float(value) for name, value in kto.counts(batch).items()}
    step = kto.spread(kto.summary(*mismatched, cfg).double(), cfg) if kto.needs_step(cfg) else {}
    return kto.loss(logps, batch | {name: column.float() for name, column in step.items()}, totals, cfg)


def theirs(logps, batch, mismatched, cfg):
    """KTOTrainer._compute_loss with a model and a reference that return the numbers of a batch and of its mismatched rows."""
    both = {"": (logps, batch), "KL_": mismatched}
    inputs = {"label": batch["desirable"]}
    for prefix, (_, rows) in both.items():
        masks = {"attention_mask": rows["attention_mask"].long(), "completion_mask": rows["loss_mask"].long()}
        inputs |= {f"{prefix}{name}": value for name, value in (masks | {"input_ids": rows["input_ids"]}).items()}

    def model(input_ids, of=lambda logps, rows: logps, **_):
        rows = both["KL_" if input_ids is inputs["KL_input_ids"] else ""]
        return fused_model(of(*rows), rows[1])()

    def reference_model(input_ids, **_):
        return model(input_ids, of=lambda logps, rows: rows["ref_logps"])

    trainer = stub(
        KTOTrainer,
        **vars(cfg),
        calculate_KL=cfg.loss_type == "kto",
        ref_model=reference_model,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    return loss, logged(trainer)


# ---- a whole run -------------------------------------------------------------------------------------------------------------

BATCH = 6  # rows of a step


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_run_equals_trl(loss_type, model_folder, one_rank, tmp_path):
    """TRL chooses rows and mismatched rows; ours trains on them, each step in two micro-batches."""
    folder, args = model_folder("llama"), OPTIMIZER | PLAIN | {"max_length": 34, "per_device_train_batch_size": BATCH}
    settings = {"loss_type": loss_type, "beta": 0.1, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 > 0} for i, r in enumerate(pairs(5 * BATCH))]
    trainer = Recorded(
        model=folder,
        args=KTOConfig(str(tmp_path), **settings, **args),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    expected = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    steps = [as_step(inputs) for inputs in trainer.inputs]
    metrics = train_on(steps, kto, kto.Config(**settings), folder, one_rank)
    assert_same_steps(metrics, expected, absent={"kl"} if loss_type == "apo_zero_unpaired" else ())
    assert loss_type != "kto" or max(row["kl"] for row in metrics) > 0.01, "the baseline is not part of the comparison"
    assert [row["num_tokens"] for row in metrics] == [row["num_tokens"] for row in expected]


class Recorded(KTOTrainer):
    """Keeps the batch of each step."""

    def train(self):
        self.inputs = []
        super().train()

    def training_step(self, model, inputs, *args):
        self.inputs.append(inputs)
        return super().training_step(model, inputs, *args)


def as_step(inputs):
    """TRL's batch as a step of two micro-batches, each row followed by its mismatched one where there are such."""
    prefixes = [prefix for prefix in ("", "KL_") if f"{prefix}input_ids" in inputs]

    def rows_of(name):
        sides = [inputs[f"{prefix}{name}"] for prefix in prefixes]
        return [side[i] for i in range(len(sides[0])) for side in sides]

    names = {"input_ids": "input_ids", "attention_mask": "attention_mask", "loss_mask": "completion_mask"}
    batch = {ours: pad_sequence(rows_of(theirs), batch_first=True) for ours, theirs in names.items()}  # (R, T)
    batch |= {name: batch[name].bool() for name in ("attention_mask", "loss_mask")}
    batch["desirable"] = inputs["label"].bool().repeat_interleave(len(prefixes))  # (R,)
    examples = len(inputs["label"])
    cuts = [range(examples // 3), range(examples // 3, examples)]
    micro = []
    for cut in cuts:
        part = slice(cut.start * len(prefixes), cut.stop * len(prefixes))
        micro.append({name: value[part] for name, value in batch.items()} | {"positions": torch.tensor(cut)})
    return batches.Step(micro, examples, {})


def train_on(steps, algorithm, settings, folder, device):
    """Metrics of the loop's steps on given micro-batches, with the initial model as a live reference."""
    train = config.Train(**{name: value for name, value in OPTIMIZER.items() if name != "max_grad_norm"})
    model, initial = (load.build(config.Model(folder), folder, config.Fsdp(), device, 0) for _ in range(2))
    seen = []

    def source():
        for step in steps:
            step = reference.live(step, initial) if algorithm.REFERENCE else step
            yield batches.with_statistics(step, model, algorithm, settings)

    optimizer, rate = optim.make_optimizer(model, train), lambda step: optim.learning_rate(train, len(steps), step)
    loop.train(
        *(model, algorithm, settings, source(), optimizer, rate, 1, len(steps)),
        num_tokens=0,
        max_grad_norm=OPTIMIZER["max_grad_norm"],
        stopping=lambda: False,
        check=lambda *_: None,
        report=lambda step, metrics, _: seen.append(metrics),
    )
    return seen
