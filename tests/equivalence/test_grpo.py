"""GRPO against TRL's GRPOTrainer: rollouts turned into batches, every loss with its gradients and metrics, advantages.

TRL's own `_generate_and_score_completions` and `_compute_loss` run here on a trainer that was never set up: its sampler, model and
rewards give the numbers of `ROLLOUT`. Whole runs cannot be compared step by step: TRL shuffles the rows of a rollout with torch's global
random state, which sampling has consumed before, so no other trainer can know which rows make its micro-batches.
"""

import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from test_dpo import difference, logged, stub
from trl import GRPOTrainer

from algorithms import grpo
from train import batches, data
from train.rollouts import Answers, Rollouts

G, STOP, LIMIT = 4, 0, 40
PROMPTS = [3, 1, 6]  # tokens of each prompt
LENGTHS = [5, 1, 12, 7, 40, 1, 2, 9, 3, 40, 1, 16]  # of the completions: of one token, and as long as they may be
CUT = [4, 5, 9, 10]  # these ended with no stop token
NONE = math.nan
REWARDS = (
    torch.tensor([[1.0, 0, 0, 1, 0.5, 0, 1, 0.25, 0, 1, 0, 0], [0.1, 0.3, 0, 0.2, 0.7, 0.1, 0.9, 0, 0.8, 0, 0.4, 0.6]]).double().T
)  # (N, 2)
CLIPPED = [name for name, function in grpo.LOSSES.items() if function is grpo.clipped]
PAIRS = [(name, level) for name in grpo.LOSSES for level in ("token", "sequence") if (name, level) != ("vespo", "sequence")]
MODES = grpo.Correction.__args__


def noise(low, high, seed):
    """(N, LIMIT) multiples of 1/1024, so that sums are exact in any order."""
    return torch.randint(int(low * 1024), int(high * 1024), (len(LENGTHS), LIMIT), generator=torch.Generator().manual_seed(seed)) / 1024


LOGPS, ENTROPY = noise(-4, -0.1, 0), noise(0, 4, 1)
DRIFT = torch.tensor([0.25, -0.25, -0.375, 0.375, -0.125, 0.5, -0.5, 0.25, 0.25, -0.25, 0.375, 0])[:, None]  # of whole rows
OLD, REF = LOGPS + DRIFT + noise(-0.4, 0.4, 2), LOGPS + noise(-1, 1, 3)
SAMPLED = OLD + noise(-0.2, 0.2, 4)
IDS = torch.randint(3, 100, LOGPS.shape, generator=torch.Generator().manual_seed(5), dtype=torch.int32)
for row, n in enumerate(LENGTHS):
    if row not in CUT:
        IDS[row, n - 1] = STOP

ADVANTAGES = torch.tensor([2.5, -0.25, 1.75, -0.5, 1.5, -0.75, 0.0, 1.25, 2.0, -0.5, 1.0, -0.125])  # their losses do not cancel out
EXTRAS = {
    "plain": {},
    "clip-higher": {"epsilon": 0.1, "epsilon_high": 0.3},
    "kl": {"beta": 0.1},
    "k3": {"beta": 0.1, "use_bias_correction_kl": False},
    "lively": {"top_entropy_quantile": 0.3},
    "bonus": {"entropy_coef": 0.01},
    "lively bonus": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01, "beta": 0.1},
    "close": {"off_policy_mask_threshold": 0.02},
    "ended": {"mask_truncated_completions": True, "beta": 0.1, "entropy_coef": 0.01},
    "all": {
        "epsilon": 0.1,
        "epsilon_high": 0.3,
        "beta": 0.1,
        "top_entropy_quantile": 0.5,
        "entropy_coef": 0.01,
        "off_policy_mask_threshold": 0.02,
        "mask_truncated_completions": True,
    },
}


def same(name, level, settings, foreign=False, near_policy=True):
    """Loss, gradients and metrics of one step on ROLLOUT, ours and TRL's; every pass over it but the first is off-policy."""
    unread = set() if name in CLIPPED else {"epsilon"} if name == "cispo" else {"epsilon", "epsilon_high"}
    changes = {key: value for key, value in settings.items() if key not in unread} | {"loss_type": name, "importance_sampling_level": level}
    changes |= {"num_iterations": 1 if near_policy else 2, "reward_weights": [1.0, 0.5], "reward_funcs": ["right", "short"]}
    if name == "vespo" and not foreign:
        changes |= {"vllm_importance_sampling_mode": "token_mask"}
    cfg = grpo.Config(num_generations=G, max_completion_length=LIMIT, **changes)
    leaf = torch.stack([LOGPS, ENTROPY])  # (2, N, LIMIT)
    loss, gradient, metrics = with_gradient(ours, leaf, cfg, foreign)
    expected, expected_gradient, expected_metrics = with_gradient(theirs, leaf, cfg, foreign)
    assert float(expected_gradient[0].norm()) > 0 and (float(expected_gradient[1].norm()) > 0) == (cfg.entropy_coef > 0)
    assert difference(loss, expected) < 1e-6
    for mine, other in zip(gradient, expected_gradient):
        assert difference(mine, other) < 1e-6 if other.any() else not mine.any()
    absent = {"clip_ratio/low_min", "clip_ratio/high_max", "entropy_coef"}  # extremes over rows; a setting
    absent |= {
        f"sampling/{name}" for name in ("sampling_logp_difference/max", "importance_sampling_ratio/min", "importance_sampling_ratio/max")
    }
    assert expected_metrics.keys() - absent <= metrics.keys()
    for key in expected_metrics.keys() - absent:
        assert float(metrics[key]) == pytest.approx(expected_metrics[key], rel=1e-6, abs=1e-9), key
    return expected_metrics


@pytest.mark.parametrize("near_policy", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name, level", PAIRS)
def test_loss_equals_trl(name, level, extra, near_policy):
    metrics = same(name, level, EXTRAS[extra], near_policy=near_policy)
    if name in CLIPPED:
        assert (metrics["clip_ratio/region_mean"] > 0) == (not near_policy), "nothing was clipped"


@pytest.mark.parametrize("delta", [1.25, 1.5])
@pytest.mark.parametrize("name, level", [pair for pair in PAIRS if pair[0] in CLIPPED])
def test_two_sided_clipping_equals_trl(name, level, delta):
    same(name, level, {"delta": delta, "epsilon": 0.05}, near_policy=False)


@pytest.mark.parametrize("near_policy", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("bounds", [(None, 3.0), (0.8, 1.2), (0.9, None)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name, level", PAIRS)
def test_correction_for_another_sampler_equals_trl(name, level, mode, bounds, near_policy):
    if name == "vespo" and mode.startswith("sequence"):
        pytest.skip("refused by both")
    low, high = bounds
    settings = {"vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    settings |= {"vllm_importance_sampling_mode": mode, "off_policy_mask_threshold": 0.02, "beta": 0.1}
    metrics = same(name, level, settings, foreign=True, near_policy=near_policy)
    assert metrics["sampling/importance_sampling_ratio/mean"] != 1


@pytest.mark.parametrize("name", ["cispo", "sapo", "vespo"])
def test_settings_of_one_loss_equal_trl(name):
    """What only this loss reads, away from its default."""
    own = {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.7} if name == "sapo" else {}
    own |= {"epsilon_high": 0.9} if name == "cispo" else {}
    own |= {"vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 1.5, "vespo_lambda_neg": 0.5} if name == "vespo" else {}
    same(name, "token", own, near_policy=False)


# ---- advantages --------------------------------------------------------------------------------------------------------------

KNOWN = {  # completions and rewards that are None
    "all": [],
    "some": [(0, 0), (3, 1), (6, 0), (7, 0)],
    "a row": [(2, 0), (2, 1)],
    "all but one of a group": [(row, k) for row in (4, 5, 6) for k in (0, 1)],
    "a group": [(row, k) for row in range(8, 12) for k in (0, 1)],
    "one reward of a group": [(row, 1) for row in range(4)],
}


@pytest.mark.parametrize("weights", [None, [1.0, 0.5], [0.3, -2.0]])
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize(
    "together, scale", [*(("sum_then_normalize", scale) for scale in ("group", "batch", "none")), ("normalize_then_sum", "group")]
)
def test_advantages_and_reward_metrics_equal_trl(together, scale, known, weights):
    """frac_reward_zero_std is the share of groups here; TRL's is all or nothing in the modes where it has one deviation for all."""
    cfg = grpo.Config(
        reward_funcs=["right", "short"],
        reward_weights=weights,
        num_generations=G,
        max_completion_length=LIMIT,
        scale_rewards=scale,
        multi_objective_aggregation=together,
    )
    rewards = REWARDS.clone()
    rewards[[row for row, _ in KNOWN[known]], [k for _, k in KNOWN[known]]] = NONE
    rewards[4:8] = rewards[4] if known == "all" else rewards[4:8]  # a group whose rewards are all equal
    inputs, expected = scored(cfg, False, rewards)
    found, flat = grpo.advantages(rewards, cfg)
    torch.testing.assert_close(found.float(), inputs["advantages"], rtol=2e-6, atol=2e-6)
    metrics = Rollouts.metrics(rollouts(cfg), answers(rewards), flat)
    for name in ("reward", "reward_std", *(f"rewards/{name}/{kind}" for name in cfg.reward_funcs for kind in ("mean", "std"))):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-7), name
    if known == "all":
        assert flat.tolist() == [False, True, False]
        if together == "sum_then_normalize" and scale != "batch":
            assert metrics["frac_reward_zero_std"] == pytest.approx(expected["frac_reward_zero_std"])


# ---- one rollout, ours and TRL's ---------------------------------------------------------------------------------------------


def answers(rewards):
    return Answers(list(range(len(PROMPTS))), IDS, torch.tensor(LENGTHS), SAMPLED, rewards)


def rollouts(cfg):
    """A Rollouts that knows its settings and its prompts, and has no model."""
    made = Rollouts.__new__(Rollouts)
    ids = torch.arange(3, 3 + sum(PROMPTS), dtype=torch.int32)
    prompts = data.Rows.of(ids, torch.zeros(len(ids), dtype=torch.bool), torch.tensor([0, *PROMPTS]).cumsum(0), {})
    judges = SimpleNamespace(names=cfg.reward_funcs)
    vars(made).update(cfg=SimpleNamespace(grpo=cfg), rows=prompts, stops=[STOP], rewards=judges, server=None)
    return made


def ours(leaf, cfg, foreign):
    """algorithms.grpo as the loop calls it, on the rows of the rollout as one micro-batch."""
    rows = rollouts(cfg).as_rows(answers(REWARDS), ADVANTAGES.double())
    if foreign:
        rows.constants["foreign_sampler"] = torch.tensor(True)
    batch = batches.collate(rows, range(len(LENGTHS)), range(len(LENGTHS)))
    starts = torch.tensor(PROMPTS).repeat_interleave(G)[:, None]  # (N, 1)
    written = batch["attention_mask"] & (torch.arange(batch["input_ids"].shape[1]) >= starts)  # (N, T)
    real = torch.arange(LIMIT) < torch.tensor(LENGTHS)[:, None]  # (N, LIMIT)

    def placed(x):
        return torch.zeros(written.shape).masked_scatter(written, x[real])  # (N, T)

    assert torch.equal(batch["sampling_logps"], placed(SAMPLED))
    batch |= {"ref_logps": placed(REF), "live_entropy" if cfg.entropy_coef else "entropy": placed(leaf[1])}
    if foreign or cfg.num_iterations > 1:
        batch["old_logps"] = placed(OLD)
    if grpo.needs_step(cfg):
        step = grpo.spread(grpo.summary(None, batch | {"entropy": placed(leaf[1].detach())}, cfg).double(), cfg)
        batch |= {name: column.float() for name, column in step.items()}
    totals = {name: float(value) for name, value in grpo.counts(batch).items()}
    return grpo.loss(placed(leaf[0]), batch, totals, cfg)


def theirs(leaf, cfg, foreign):
    inputs, metrics = scored(cfg, foreign, REWARDS)
    trainer = trainer_of(cfg, foreign)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (leaf[0], leaf[1], None)
    loss = trainer._compute_loss(None, inputs | {"advantages": ADVANTAGES})
    return loss, logged(trainer) | {name: value for name, value in metrics.items() if name.startswith("sampling/")}


def scored(cfg, foreign, rewards):
    """(what TRL makes of the rollout, what it logs of it)."""
    trainer = trainer_of(cfg, foreign)
    ids = [row[:n].tolist() for row, n in zip(IDS, LENGTHS)]
    prompts, firsts = [], torch.tensor([0, *PROMPTS]).cumsum(0) + 3
    for first, n in zip(firsts.tolist(), PROMPTS):
        prompts += [list(range(first, first + n))] * G
    sampled = [row[:n].tolist() for row, n in zip(SAMPLED, LENGTHS)] if foreign else None
    trainer._generate = lambda _: (prompts, ids, None, ids, sampled, {}, None, None)
    given = {"old": OLD, "ref": REF}
    trainer._get_per_token_logps_and_entropies = lambda model, *_, **__: (given["ref" if model is trainer.ref_model else "old"], None, None)
    trainer._calculate_rewards = lambda *_: rewards.float()
    inputs = trainer._generate_and_score_completions([{"prompt": "words"}] * len(LENGTHS))
    return inputs, logged(trainer)


class Logs(dict):
    def __missing__(self, name):
        return self.setdefault(name, Logs() if name in ("rewards", "extra") else [])


def trainer_of(cfg, foreign):
    cap = cfg.cispo_cap if cfg.loss_type == "cispo" else cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high
    args = SimpleNamespace(gradient_accumulation_steps=1, per_device_train_batch_size=len(LENGTHS), gradient_checkpointing_kwargs=None)
    vars(args).update(asdict(cfg))
    trainer = stub(
        GRPOTrainer,
        **asdict(cfg)
        | {
            "args": args,
            "epsilon_low": cfg.epsilon,
            "epsilon_high": cap,
            "use_vllm": foreign,
            "ref_model": object(),
            "reward_weights": torch.tensor(cfg.reward_weights or [1.0] * len(cfg.reward_funcs)),
            "reward_func_names": cfg.reward_funcs,
            "current_gradient_accumulation_steps": 1,
            "use_adaptive_entropy": False,
            "_entropy_bonus_enabled": cfg.entropy_coef > 0,
            "environment_factories": None,
            "environments": None,
            "tools": None,
            "pad_to_multiple_of": None,
            "_tokenizer": SimpleNamespace(pad_token_id=2),
            "eos_token_ids": [STOP],
            "_logs": Logs(),
            "_pending_extra_logs": {},
            "_pending_metrics": {},
        },
    )
    vars(trainer.accelerator).update(
        process_index=0,
        num_processes=1,
        sync_gradients=True,
        reduce=lambda x, **_: x,
        pad_across_processes=lambda x, **_: x,
    )
    return trainer


def with_gradient(function, leaf, *args):
    """(loss, its gradients in `leaf`, metrics) of function(leaf, *args)."""
    leaf = leaf.clone().requires_grad_()
    loss, metrics = function(leaf, *args)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, metrics
