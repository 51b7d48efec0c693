"""SimPO and its kin against TRL's CPOTrainer: loss, gradient and metrics on one batch of logits."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_dpo import CHOSEN, PROMPTS, REJECTED, assert_same_metrics, difference, micro_batch, stacked, stub, with_gradient
from trl.experimental.cpo import CPOTrainer
from trl.trainer.utils import selective_log_softmax

from algorithms import simpo

VOCABULARY = 13
VARIANTS = [
    {"loss_type": "simpo"},
    {"loss_type": "simpo", "simpo_gamma": 0.5, "beta": 10.0},
    {"loss_type": "simpo", "label_smoothing": 0.1},
    {"loss_type": "simpo", "cpo_alpha": 0.7},
    {"loss_type": "simpo", "alpha": 0.25},  # AlphaPO
    {"loss_type": "simpo", "alpha": -0.5, "cpo_alpha": 1.0, "label_smoothing": 0.2},
    {"loss_type": "sigmoid", "beta": 0.1},
    {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1, "cpo_alpha": 1.0},
    {"loss_type": "sigmoid", "beta": 0.1, "alpha": 0.05},
    {"loss_type": "hinge", "beta": 0.1},
    {"loss_type": "hinge", "beta": 0.1, "cpo_alpha": 1.0},
    {"loss_type": "ipo", "beta": 0.5},
    {"loss_type": "ipo", "beta": 0.5, "cpo_alpha": 0.3, "alpha": 0.1},
]


def named(settings):
    return "-".join(f"{k}={v}" if k != "loss_type" else v for k, v in settings.items())


@pytest.mark.parametrize("settings", VARIANTS, ids=named)
def test_loss_of_log_probs_equals_trl(settings):
    """cpo_loss alone: per-pair losses from log-probs of responses, here of one token each."""
    cfg = simpo.Config(**{k: v for k, v in settings.items() if k != "cpo_alpha"})
    logps, batch = micro_batch([1] * 9, [1] * 9, [1] * 9)

    def theirs(logps):
        losses, chosen, rejected = stub(CPOTrainer, **vars(cfg)).cpo_loss(logps[0::2, 1], logps[1::2, 1])
        return losses.mean(), {"rewards/chosen": float(chosen.mean()), "rewards/rejected": float(rejected.mean())}

    loss, gradient, metrics = with_gradient(lambda x: simpo.loss(x, batch, totals_of(batch), cfg), logps)
    expected, expected_gradient, rewards = with_gradient(theirs, logps)
    assert difference(loss, expected) < 1e-6
    assert difference(gradient, expected_gradient) < 1e-6
    assert_same_metrics(metrics, rewards)


@pytest.mark.parametrize("settings", VARIANTS, ids=named)
def test_loss_of_logits_equals_trl(settings):
    """get_batch_loss_metrics: the whole loss with its cross-entropy, from logits to metrics."""
    cfg = simpo.Config(**settings)
    _, batch = micro_batch(PROMPTS, CHOSEN, REJECTED)
    batch["input_ids"] %= VOCABULARY
    logits = torch.randn(*batch["input_ids"].shape, VOCABULARY, generator=torch.Generator().manual_seed(1))  # (2P, T, V)
    loss, gradient, metrics = with_gradient(lambda z: simpo.loss(logps_of(z, batch), batch, totals_of(batch), cfg), logits)
    expected, expected_gradient, expected_metrics = with_gradient(lambda z: theirs(z, batch, cfg), logits)
    assert difference(loss, expected) < 1e-6
    assert difference(gradient, expected_gradient) < 1e-6
    ours_alone = {"entropy", "mean_token_accuracy"}
    assert metrics.keys() - ours_alone == expected_metrics.keys()
    other = {"logits/chosen", "logits/rejected"}  # TRL's cover prompts and padding too
    other |= set() if cfg.cpo_alpha else {"nll_loss"}  # TRL's is 0 where it is not trained
    assert_same_metrics(metrics, {name: value for name, value in expected_metrics.items() if name not in other})


def totals_of(batch):
    return {name: float(value) for name, value in simpo.counts(batch).items()}


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
