"""SimPO and its kin against TRL's CPOTrainer: loss, gradient and metrics on one batch of logits; then whole runs."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_dpo import (
    ROWS,
    assert_same_metrics,
    assert_same_steps,
    assert_same_weights,
    cut,
    deviations,
    every,
    fields_of,
    micro_batch,
    named,
    pairs,
    stacked,
    stub,
    train_on,
    train_trl,
    with_gradient,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.trainer.utils import selective_log_softmax

from algorithms import simpo

VOCABULARY = 13
VARIANTS = {  # name -> (what it is in TRL, settings of it)
    "simpo": (
        "loss_type simpo, cpo_alpha 0",
        [
            {"loss_type": "simpo", "label_smoothing": 0.1},
            {"loss_type": "simpo", "simpo_gamma": 0.5, "beta": 10.0},
            {"loss_type": "simpo"},
        ],
    ),
    "CPO-SimPO": ("loss_type simpo, cpo_alpha", [{"loss_type": "simpo", "cpo_alpha": 0.7}]),
    "AlphaPO": (
        "loss_type alphapo, alpha",
        [{"loss_type": "simpo", "alpha": -0.5, "cpo_alpha": 1.0, "label_smoothing": 0.2}, {"loss_type": "simpo", "alpha": 0.25}],
    ),
    "CPO sigmoid": (
        "loss_type sigmoid",
        [
            {"loss_type": "sigmoid", "beta": 0.1},
            {"loss_type": "sigmoid", "beta": 0.1, "alpha": 0.05},
            {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1, "cpo_alpha": 1.0},
        ],
    ),
    "CPO hinge": ("loss_type hinge", [{"loss_type": "hinge", "beta": 0.1}, {"loss_type": "hinge", "beta": 0.1, "cpo_alpha": 1.0}]),
    "CPO ipo": ("loss_type ipo", [{"loss_type": "ipo", "beta": 0.5}, {"loss_type": "ipo", "beta": 0.5, "cpo_alpha": 0.3, "alpha": 0.1}]),
}


@pytest.mark.parametrize("settings", every(VARIANTS), ids=named)
def test_loss_of_log_probs_equals_trl(settings):
    """cpo_loss alone: per-pair losses from log-probs of responses, here of one token each."""
    cfg = simpo.Config(**{k: v for k, v in settings.items() if k != "cpo_alpha"})
    logps, batch = micro_batch([1] * 9, [1] * 9, [1] * 9)

    def theirs(logps):
        losses, chosen, rejected = stub(CPOTrainer, **vars(cfg)).cpo_loss(logps[0::2, 1], logps[1::2, 1])
        return losses.mean(), {"rewards/chosen": float(chosen.mean()), "rewards/rejected": float(rejected.mean())}

    *mine, metrics = with_gradient(lambda x: simpo.loss(x, batch, totals_of(simpo, batch), cfg), logps)
    *expected, rewards = with_gradient(theirs, logps)
    assert all(d < 1e-6 for d in deviations(mine, expected))
    assert_same_metrics(metrics, rewards)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("settings", every(VARIANTS), ids=named)
def test_loss_of_logits_equals_trl(settings, rows):
    """get_batch_loss_metrics: the whole loss with its cross-entropy, from logits to metrics."""
    (*mine, metrics), (*expected, expected_metrics) = both(settings, ROWS[rows])
    assert all(d < 1e-6 for d in deviations(mine, expected))
    assert float(expected[1].norm()) > 0
    ours_alone = {"entropy", "mean_token_accuracy"}
    assert metrics.keys() - ours_alone == expected_metrics.keys()
    other = {"logits/chosen", "logits/rejected"}  # TRL's cover prompts and padding too
    other |= set() if settings.get("cpo_alpha") else {"nll_loss"}  # TRL's is 0 where it is not trained
    assert_same_metrics(metrics, {name: value for name, value in expected_metrics.items() if name not in other})


def test_no_loss_of_trl_is_missing():
    ours = {settings["loss_type"] for settings in every(VARIANTS)}
    assert ours | {"alphapo"} == set(fields_of(CPOConfig)["loss_type"].metadata["choices"])  # a name for simpo with alpha


def both(settings, rows):
    """(loss, gradient in the logits, metrics) of ours, and of TRL's."""
    cfg, (batch, logits) = simpo.Config(**settings), batch_and_logits(rows)
    mine = with_gradient(lambda z: simpo.loss(logps_of(z, batch), batch, totals_of(simpo, batch), cfg), logits)
    return mine, with_gradient(lambda z: theirs(z, batch, cfg), logits)


def batch_and_logits(rows, likely=0.0):
    """A batch, and logits (2P, T, V) that make each token likelier: by `likely`, from the tenth on, where sums would overflow, by 8."""
    batch = micro_batch(*rows)[1]
    batch["input_ids"] %= VOCABULARY
    logits = torch.randn(*batch["input_ids"].shape, VOCABULARY, generator=torch.Generator().manual_seed(1))
    more = torch.where(torch.arange(logits.shape[1]) < 10, likely, 8.0)  # (T,)
    return batch, logits + more[:, None] * F.one_hot(batch["input_ids"].roll(-1, 1), VOCABULARY)


def totals_of(algorithm, batch):
    return {name: float(value) for name, value in algorithm.counts(batch).items()}


def logps_of(logits, batch):
    """Log-probs (R, T) of the batch's tokens; those of the first, which nothing predicts, are 0."""
    return F.pad(selective_log_softmax(logits[:, :-1], batch["input_ids"][:, 1:]), (1, 0))


def theirs(logits, batch, cfg):
    trainer = stub(CPOTrainer, **vars(cfg), is_encoder_decoder=False, pad_token_id=0)
    return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=stacked(logits)), as_trl(batch))


def as_trl(batch):
    """TRL's batch: both sides with ids, masks, and labels -100 where nothing is trained."""
    columns = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"].long(),
        "labels": batch["input_ids"].where(batch["loss_mask"], -100),
    }
    return {f"{side}_{name}": x[i::2] for i, side in enumerate(("chosen", "rejected")) for name, x in columns.items()}


# ---- whole runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_run_equals_trl(name, model_folder, one_rank, tmp_path):
    """TRL tokenises and chooses rows; ours trains on its ids and masks, each step in two micro-batches."""
    settings, folder = VARIANTS[name][1][-1], model_folder("llama")
    cfg = simpo.Config(**settings)
    expected, inputs, weights = train_trl(CPOTrainer, CPOConfig, folder, pairs(15), tmp_path, per_device_train_batch_size=3, **vars(cfg))
    metrics, final = train_on([as_step(batch) for batch in inputs], simpo, cfg, folder, one_rank)
    absent = {"logits/chosen", "logits/rejected"} | (set() if cfg.cpo_alpha else {"nll_loss"})
    assert_same_steps(metrics, expected, absent)
    assert_same_weights(final, weights)


def as_step(inputs, complete=lambda batch: batch):
    """TRL's batch, `complete`d, as a step of two micro-batches of alternating rows."""
    width = max(inputs[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))

    def rows_of(name, padding):
        sides = [inputs[f"{side}_{name}"] for side in ("chosen", "rejected")]
        sides = [F.pad(side, (0, width - side.shape[1]), value=padding) for side in sides]
        return torch.stack(sides, 1).flatten(0, 1)  # (2P, T)

    batch = {
        "input_ids": rows_of("input_ids", 0),
        "attention_mask": rows_of("attention_mask", 0).bool(),
        "loss_mask": rows_of("labels", -100) != -100,
    }
    return cut(complete(batch))
