"""ORPO against TRL's ORPOTrainer: loss, gradient and metrics on one batch of logits; then runs on the batches that TRL trained on.

SimPO's run is here too: TRL prepares both alike.
"""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from test_dpo import (
    CHOSEN,
    OPTIMIZER,
    PLAIN,
    PROMPTS,
    REJECTED,
    assert_same_metrics,
    assert_same_steps,
    difference,
    micro_batch,
    pairs,
    stacked,
    stub,
    with_gradient,
)
from test_kto import train_on
from test_simpo import VOCABULARY, as_trl, logps_of
from transformers import AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from algorithms import orpo, simpo
from train import batches


@pytest.mark.parametrize("beta", [0.1, 1.0, 0.0])
@pytest.mark.parametrize("likely", [0.2, 4.0])  # scale of the logits: probabilities on either side of 1/2
def test_loss_of_logits_equals_trl(likely, beta):
    """get_batch_loss_metrics: the cross-entropy of prompt and chosen response, the odds ratio, and the metrics."""
    cfg = orpo.Config(beta=beta)
    batch = prompts_scored(micro_batch(PROMPTS, CHOSEN, REJECTED)[1])
    batch["input_ids"] %= VOCABULARY
    logits = likely * torch.randn(*batch["input_ids"].shape, VOCABULARY, generator=torch.Generator().manual_seed(1))  # (2P, T, V)
    logits += likely * torch.nn.functional.one_hot(batch["input_ids"].roll(-1, 1), VOCABULARY)
    loss, gradient, metrics = with_gradient(ours, logits, batch, cfg)
    expected, expected_gradient, expected_metrics = with_gradient(theirs, logits, batch, cfg)
    assert difference(loss, expected) < 1e-6
    assert difference(gradient, expected_gradient) < 1e-6
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

    loss, gradient, metrics = with_gradient(lambda x: orpo.loss(x, batch, totals_of(batch), cfg), logps)
    expected, expected_gradient, expected_metrics = with_gradient(theirs, logps)
    assert difference(loss, expected) < 1e-6
    assert difference(gradient, expected_gradient) < 1e-6
    assert_same_metrics(metrics, expected_metrics)


def ours(logits, batch, cfg):
    return orpo.loss(logps_of(logits, batch), batch, totals_of(batch), cfg)


def theirs(logits, batch, cfg):
    trainer = stub(ORPOTrainer, beta=cfg.beta, is_encoder_decoder=False, padding_value=0)
    return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=stacked(logits)), as_trl(batch))


def totals_of(batch):
    return {name: float(value) for name, value in orpo.counts(batch).items()}


def prompts_scored(batch):
    """The batch with the score_mask of train.data.scoring_prompts."""
    score = batch["loss_mask"].clone()
    score[0::2] = batch["attention_mask"][0::2]
    score[:, 0] = False
    return batch | {"score_mask": score}


# ---- whole runs --------------------------------------------------------------------------------------------------------------

BATCH = 6  # pairs of a step
SIMPO = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.5}


@pytest.mark.parametrize(
    "algorithm, settings, trainer, arguments",
    [(orpo, {"beta": 0.5}, ORPOTrainer, ORPOConfig), (simpo, SIMPO, CPOTrainer, CPOConfig)],
    ids=["orpo", "simpo"],
)
def test_run_equals_trl(algorithm, settings, trainer, arguments, model_folder, one_rank, tmp_path):
    """TRL tokenises and chooses rows; ours trains on its ids and masks, each step in two micro-batches."""
    folder, batches_seen = model_folder("llama"), []

    class Recorded(trainer):
        def training_step(self, model, inputs, *args):
            batches_seen.append(inputs)
            return super().training_step(model, inputs, *args)

    made = Recorded(
        model=folder,
        args=arguments(str(tmp_path), per_device_train_batch_size=BATCH, max_length=34, **settings, **OPTIMIZER, **PLAIN),
        train_dataset=Dataset.from_list(pairs(5 * BATCH)),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    made.train()
    expected = [entry for entry in made.state.log_history if "grad_norm" in entry]
    metrics = train_on([as_step(inputs) for inputs in batches_seen], algorithm, algorithm.Config(**settings), folder, one_rank)
    assert_same_steps(metrics, expected, absent={"logits/chosen", "logits/rejected"})


def as_step(inputs):
    """TRL's batch as a step of two micro-batches of alternating rows."""
    width = max(inputs[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))

    def rows_of(name, padding):
        sides = [inputs[f"{side}_{name}"] for side in ("chosen", "rejected")]
        sides = [torch.nn.functional.pad(side, (0, width - side.shape[1]), value=padding) for side in sides]
        return torch.stack(sides, 1).flatten(0, 1)  # (2P, T)

    batch = {
        "input_ids": rows_of("input_ids", 0),
        "attention_mask": rows_of("attention_mask", 0).bool(),
        "loss_mask": rows_of("labels", -100) != -100,
    }
    batch = prompts_scored(batch)
    cuts = [slice(0, 4), slice(4, None)]
    return batches.Step([{name: value[cut] for name, value in batch.items()} for cut in cuts], BATCH, {})
