"""ORPO against TRL's ORPOTrainer: loss, gradient and metrics on one batch of logits; then a whole run."""

from types import SimpleNamespace

import pytest
import torch
from test_dpo import (
    ROWS,
    assert_same_metrics,
    assert_same_steps,
    assert_same_weights,
    deviations,
    every,
    micro_batch,
    named,
    pairs,
    stacked,
    stub,
    train_on,
    train_trl,
    with_gradient,
)
from test_simpo import as_step, as_trl, batch_and_logits, logps_of, totals_of
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from algorithms import orpo

VARIANTS = {"orpo": ("beta", [{"beta": 1.0}, {"beta": 0.0}, {"beta": 0.1}])}  # name -> (what it is in TRL, settings of it)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("likely", [0.2, 4.0])  # probabilities on either side of 1/2
@pytest.mark.parametrize("settings", every(VARIANTS), ids=named)
def test_loss_of_logits_equals_trl(settings, likely, rows):
    """get_batch_loss_metrics: the cross-entropy of prompt and chosen response, the odds ratio, and the metrics."""
    (*mine, metrics), (*expected, expected_metrics) = both(settings, ROWS[rows], likely)
    assert all(d < 1e-6 for d in deviations(mine, expected))
    ours_alone, other = {"entropy", "mean_token_accuracy"}, {"logits/chosen", "logits/rejected"}  # TRL's cover prompts and padding too
    assert metrics.keys() - ours_alone == expected_metrics.keys()
    assert_same_metrics(metrics, {name: value for name, value in expected_metrics.items() if name not in other})


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_odds_ratio_equals_trl(beta):
    """odds_ratio_loss alone, on responses of one token whose probabilities reach from 0.9999 to e^-30."""
    cfg, values = orpo.Config(beta=beta), torch.tensor([-1e-4, -0.01, -0.3, -0.692, -0.694, -1.5, -5.0, -12.0, -30.0, -0.7])
    _, batch = micro_batch([1] * 5, [1] * 5, [1] * 5)
    batch["score_mask"] = torch.zeros_like(batch["loss_mask"])  # no cross-entropy
    logps = torch.zeros(batch["loss_mask"].shape).masked_scatter(batch["loss_mask"], values)

    def theirs(logps):
        losses, _, _, ratio, odds = stub(ORPOTrainer, beta=beta).odds_ratio_loss(logps[0::2, 1], logps[1::2, 1])
        return -losses.mean(), {"log_odds_ratio": float(ratio), "log_odds_chosen": float(odds)}

    *mine, metrics = with_gradient(lambda x: orpo.loss(x, batch, totals_of(orpo, batch), cfg), logps)
    *expected, expected_metrics = with_gradient(theirs, logps)
    assert all(d < 1e-6 for d in deviations(mine, expected))
    assert_same_metrics(metrics, expected_metrics)


def both(settings, rows, likely=0.2):
    """(loss, gradient in the logits, metrics) of ours, and of TRL's."""
    cfg, (batch, logits) = orpo.Config(**settings), batch_and_logits(rows, likely)
    batch = prompts_scored(batch)
    mine = with_gradient(lambda z: orpo.loss(logps_of(z, batch), batch, totals_of(orpo, batch), cfg), logits)
    return mine, with_gradient(lambda z: theirs(z, batch, cfg), logits)


def theirs(logits, batch, cfg):
    trainer = stub(ORPOTrainer, beta=cfg.beta, is_encoder_decoder=False, padding_value=0)
    return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=stacked(logits)), as_trl(batch))


def prompts_scored(batch):
    """The batch with the score_mask of train.data.scoring_prompts."""
    score = batch["loss_mask"].clone()
    score[0::2] = batch["attention_mask"][0::2]
    score[:, 0] = False
    return batch | {"score_mask": score}


def test_run_equals_trl(model_folder, one_rank, tmp_path):
    """TRL tokenises and chooses rows; ours trains on its ids and masks, each step in two micro-batches."""
    folder, settings = model_folder("llama"), {"beta": 0.5}
    expected, inputs, weights = train_trl(ORPOTrainer, ORPOConfig, folder, pairs(30), tmp_path, per_device_train_batch_size=6, **settings)
    steps = [as_step(batch, prompts_scored) for batch in inputs]
    metrics, final = train_on(steps, orpo, orpo.Config(**settings), folder, one_rank)
    assert_same_steps(metrics, expected, absent={"logits/chosen", "logits/rejected"})
    assert_same_weights(final, weights)
