"""KTO against TRL's KTOTrainer: losses, gradients and metrics on one batch; then whole runs."""

from types import SimpleNamespace

import pytest
import torch
from test_dpo import (
    assert_same_metrics,
    assert_same_steps,
    assert_same_weights,
    deviations,
    every,
    fields_of,
    fused_model,
    logged,
    micro_batch,
    named,
    pairs,
    stub,
    train_on,
    train_trl,
    with_gradient,
)
from torch.nn.utils.rnn import pad_sequence
from trl import KTOConfig, KTOTrainer

from algorithms import kto
from train import batches

ROWS = {  # tokens of each row's prompt and response
    "short": ([3, 1, 5, 2, 4, 1, 3], [4, 9, 2, 12, 6, 1, 7]),
    "one token and very long": ([3, 1, 5, 2, 4, 1, 3], [1, 2000, 6, 1, 3, 2000, 1]),
}
LABELS = {"mixed": [1, 0, 0, 1, 1, 0, 1], "good": [1] * 7, "bad": [0] * 7}
WEIGHTS = [{}, {"desirable_weight": 1.33, "undesirable_weight": 0.5}]
VARIANTS = {  # name -> (what it is in TRL, settings of it)
    name: (f"loss_type {name}", [{"loss_type": name, "beta": 0.3} | weights for weights in WEIGHTS])
    for name in ("kto", "apo_zero_unpaired")
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shift", [1.5, -1.5])  # of the mismatched rows' log-ratios: the baseline is positive, or held at 0
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("settings", every(VARIANTS), ids=named)
def test_loss_equals_trl(settings, labels, shift, rows):
    """Where a side has no row, TRL leaves out its metrics and the margin; ours are 0, and the other side's reward."""
    (*mine, metrics), (*expected, expected_metrics) = both(settings, ROWS[rows], labels, shift)
    assert all(d < 1e-6 for d in deviations(mine, expected))
    assert float(expected[1].norm()) > 0
    baseline = expected_metrics["kl"] if settings["loss_type"] == "kto" else expected_metrics.pop("kl")
    assert (baseline > 0) == (settings["loss_type"] == "kto" and shift > 0)
    assert_same_metrics(metrics, expected_metrics)
    absent = {"good": "rejected", "bad": "chosen"}.get(labels)
    names = {f"{name}/{absent}" for name in ("rewards", "logps", "logits")} | {"rewards/margins"} if absent else set()
    assert metrics.keys() - expected_metrics.keys() == names
    assert not any(metrics[name] for name in names - {"rewards/margins"})


def test_no_loss_of_trl_is_missing():
    assert set(VARIANTS) == set(fields_of(KTOConfig)["loss_type"].metadata["choices"])


def both(settings, rows, labels="mixed", shift=1.5):
    """(loss, gradient in the log-probs, metrics) of ours, and of TRL's."""
    logps, batch = micro_batch(*rows)
    batch["desirable"] = torch.tensor(LABELS[labels]).bool()
    mismatched = micro_batch(rows[0], rows[1][::-1], seed=1)
    mask = mismatched[1]["loss_mask"]
    mismatched[1]["ref_logps"] = (mismatched[1]["ref_logps"] - shift / 4 * (mask.cumsum(-1) <= 12)).where(mask, 0)
    return (with_gradient(side, logps, batch, mismatched, kto.Config(**settings)) for side in (ours, theirs))


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


# ---- whole runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", VARIANTS)
def test_run_equals_trl(loss_type, model_folder, one_rank, tmp_path):
    """TRL chooses rows and mismatched rows; ours trains on them, each step in two micro-batches."""
    folder, settings = model_folder("llama"), {"loss_type": loss_type, "beta": 0.1, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 > 0} for i, r in enumerate(pairs(30))]
    expected, inputs, weights = train_trl(KTOTrainer, KTOConfig, folder, rows, tmp_path, per_device_train_batch_size=6, **settings)
    metrics, final = train_on([as_step(batch) for batch in inputs], kto, kto.Config(**settings), folder, one_rank)
    assert_same_steps(metrics, expected, absent={"kl"} if loss_type == "apo_zero_unpaired" else ())
    assert_same_weights(final, weights)
    assert loss_type != "kto" or max(row["kl"] for row in metrics) > 0.01, "the baseline is not part of the comparison"
    assert [row["num_tokens"] for row in metrics] == [row["num_tokens"] for row in expected]


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
