"""What every algorithm promises: micro-batches add up to the step, a masked row weighs nothing, losses are pure, settings are checked."""

import inspect
import math
import re
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import algorithms
from algorithms import dpo, kto, orpo, sft, simpo
from launch.train import ALGORITHMS
from train import batches, data

EXAMPLES = 6
SPLITS = [[6], [4, 2], [2, 1, 3], [1] * 6]  # examples of each micro-batch
SMOOTHED = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}
SUM = {"loss_type": ["robust", "sft", "aot"], "loss_weights": [1.0, 0.5, 2.0], "label_smoothing": 0.1, "ld_alpha": 0.3}
SETTINGS = {
    sft: [{"loss_type": "nll"}, {"loss_type": "dft"}],
    dpo: [
        *({"loss_type": [name], "label_smoothing": 0.1 if name in SMOOTHED else 0.0} for name in dpo.LOSSES),
        *({"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")),
        *({"loss_type": ["sigmoid", "sft"], "use_weighting": True}, SUM),
    ],
    simpo: [
        *({"loss_type": name, "beta": 0.1} for name in ("simpo", "sigmoid", "hinge", "ipo")),
        {"cpo_alpha": 0.5, "alpha": 0.2, "label_smoothing": 0.1},
    ],
    kto: [{"loss_type": "kto", "undesirable_weight": 0.5}, {"loss_type": "apo_zero_unpaired"}],
    orpo: [{"beta": 0.3}],
}
CASES = [(algorithm, settings) for algorithm, several in SETTINGS.items() for settings in several]


def named(value):
    if isinstance(value, dict):
        return "-".join("+".join(map(str, v)) if isinstance(v, list) else str(v) for v in value.values())
    return value.__name__.removeprefix("algorithms.") if inspect.ismodule(value) else str(value)


def test_every_algorithm_and_loss_is_here():
    assert set(SETTINGS) == set(ALGORITHMS.values())
    assert {name for settings in SETTINGS[dpo] for name in settings.get("loss_type", [])} == set(dpo.LOSSES)
    for algorithm, several in SETTINGS.items():
        kind = next((f.type for f in fields(algorithm.Config) if f.name == "loss_type"), None)
        if algorithm is not dpo and kind:
            assert {settings["loss_type"] for settings in several if "loss_type" in settings} == set(kind.__args__)


# ---- sums --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS[1:], ids=named)
@pytest.mark.parametrize("algorithm, settings", CASES, ids=named)
def test_micro_batches_add_up_to_the_step(algorithm, settings, split):
    cfg = algorithm.Config(**settings)
    whole, gradient, metrics = step(algorithm, cfg, SPLITS[0])
    parts, parts_gradient, parts_metrics = step(algorithm, cfg, split)
    assert metrics.keys() == parts_metrics.keys()
    assert float(gradient.norm()) > 0 and all(map(math.isfinite, metrics.values()))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(parts_gradient, gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))
    for name, value in metrics.items():
        assert parts_metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("algorithm, settings", CASES, ids=named)
def test_placeholder_is_finite_and_weighs_nothing(algorithm, settings):
    """A micro-batch without an example, which keeps a rank in step with the others."""
    cfg = algorithm.Config(**settings)
    whole, gradient, metrics = step(algorithm, cfg, [6])
    padded, padded_gradient, padded_metrics = step(algorithm, cfg, [6, 0])
    assert torch.equal(padded, whole) and torch.equal(padded_gradient, gradient) and padded_metrics == metrics


@pytest.mark.parametrize("others", [[], [2, 3, 4, 5]], ids=["alone", "beside others"])
@pytest.mark.parametrize("algorithm, settings", CASES, ids=named)
def test_masked_rows_are_finite(algorithm, settings, others):
    """Two examples that train nothing, also where they have weight: no gradient, and none of the others' is lost."""
    cfg, rows = algorithm.Config(**settings), rows_of(algorithm)
    leaf = rows.per_token["logps"].clone().requires_grad_()
    batch = batches.collate(with_logps(rows, leaf), range(EXAMPLES), [0, 1, *others])
    masked = 2 * rows.rows_per_example
    for name in {"loss_mask", "score_mask"} & batch.keys():
        batch[name] = torch.cat([torch.zeros_like(batch[name][:masked]), batch[name][masked:]])
    batch = complete([batch], algorithm, cfg)[0]
    totals = {name: max(float(value), 1.0) for name, value in algorithm.counts(batch).items()}
    loss, metrics = algorithm.loss(batch.pop("logps"), batch, totals, cfg)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert math.isfinite(loss) and all(math.isfinite(value) for value in metrics.values())
    nothing, trained = gradient.tensor_split([int(rows.offsets[masked])])
    assert not nothing.any() and trained.isfinite().all() and bool(trained.any()) == bool(others)


@pytest.mark.parametrize("certain", [(0, 1), (0,), (1,)], ids=["both", "chosen", "rejected"])
@pytest.mark.parametrize("algorithm, settings", CASES, ids=named)
def test_certain_responses_are_finite(algorithm, settings, certain):
    """Log-probs of exactly 0, which float32 gives to a token that leads the others by 17 nats."""
    cfg, rows = algorithm.Config(**settings), rows_of(algorithm)
    logps = rows.per_token["logps"].clone()
    for i in range(len(rows.offsets) - 1):
        if i % 2 in certain:
            logps[rows.offsets[i] : rows.offsets[i + 1]] = 0
    leaf = logps.requires_grad_()
    batch = complete([batches.collate(with_logps(rows, leaf), range(EXAMPLES), range(EXAMPLES))], algorithm, cfg)[0]
    totals = {name: float(value) for name, value in algorithm.counts(batch).items()}
    loss, metrics = algorithm.loss(batch["logps"], batch, totals, cfg)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert math.isfinite(loss) and gradient.isfinite().all() and all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("algorithm, settings", CASES, ids=named)
def test_loss_writes_to_no_argument(algorithm, settings):
    cfg = algorithm.Config(**settings)
    batch = complete([batches.collate(rows_of(algorithm), range(EXAMPLES), range(EXAMPLES))], algorithm, cfg)[0]
    totals = {name: float(value) for name, value in algorithm.counts(batch).items()}
    before = {name: value.clone() for name, value in batch.items()}, dict(totals)
    algorithm.loss(batch["logps"], batch, totals, cfg)
    if getattr(algorithm, "needs_step", lambda _: False)(cfg):
        table = algorithm.summary(batch["logps"], batch, cfg)
        kept = table.clone()
        algorithm.spread(table, cfg)
        assert torch.equal(table, kept)
    assert batch.keys() == before[0].keys() and totals == before[1]
    for name, value in batch.items():
        assert torch.equal(value, before[0][name]), name


def step(algorithm, cfg, split):
    """(loss, gradient, metrics) of a step as the loop sums it, over micro-batches of `split` examples each; 0: a placeholder."""
    leaf = rows_of(algorithm).per_token["logps"].clone().requires_grad_()  # (N,)
    rows = with_logps(rows_of(algorithm), leaf)
    ends = [sum(split[:i]) for i in range(len(split) + 1)]
    micro = [batches.collate(rows, range(EXAMPLES), list(range(first, end))) for first, end in pairwise(ends)]
    weights = [0.0 if "placeholder" in batch else 1.0 for batch in micro]
    totals, losses, metrics = {}, [], {}
    for batch, weight in zip(micro, weights):
        for name, value in algorithm.counts(batch).items():
            totals[name] = totals.get(name, 0.0) + weight * float(value)
    for batch, weight in zip(complete(micro, algorithm, cfg), weights):
        loss, own = algorithm.loss(batch["logps"], batch, totals, cfg)
        assert math.isfinite(loss) and loss.requires_grad and not any(getattr(v, "requires_grad", False) for v in own.values())
        losses.append(loss * weight)
        metrics = {name: metrics.get(name, 0.0) + weight * float(value) for name, value in own.items()}
    loss = sum(losses)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.isfinite().all()
    return loss.detach(), gradient, metrics


def complete(micro, algorithm, cfg):
    """Micro-batches with what their losses need of the whole step, as train.batches.with_statistics gives it to them."""
    if not getattr(algorithm, "needs_step", lambda _: False)(cfg):
        return micro
    with torch.no_grad():
        table = torch.cat([algorithm.summary(b["logps"], b, cfg) for b in micro if "placeholder" not in b]).double()
    columns = {name: column.float() for name, column in algorithm.spread(table, cfg).items()}
    return [batch | {name: column[batch["positions"]] for name, column in columns.items()} for batch in micro]


def rows_of(algorithm):
    """Examples of unequal lengths with random log-probs and by-products in place of a model's; noise where nothing is trained."""
    per_example, stream = 2 if algorithm.ROWS == "pairs" else 1, torch.Generator().manual_seed(3)
    count = EXAMPLES * per_example
    prompts, completions = (torch.randint(low, high, (count,), generator=stream) for low, high in ((1, 5), (1, 13)))
    prompts = prompts[0::per_example].repeat_interleave(per_example)
    masks = [torch.arange(p + c) >= p for p, c in zip(prompts.tolist(), completions.tolist())]
    mask = torch.cat(masks)  # (N,)

    def noise(low, high):
        return low + (high - low) * torch.rand(len(mask), generator=stream)

    logps = noise(-3, -0.1)
    per_token = {"logps": logps, "ref_logps": logps + noise(-1, 1), "entropy": noise(0, 4), "mean_logits": noise(-3, 3)}
    per_token |= {"is_top1": (noise(0, 1) < 0.5).float(), "log_sum_sq": noise(-3, -0.1)}
    columns = {"desirable": torch.tensor([True, False, False, True, False, True])} if algorithm.ROWS == "labelled" else {}
    offsets = torch.tensor([0, *map(len, masks)]).cumsum(0)
    rows = data.Rows(torch.ones(len(mask), dtype=torch.int32), mask, offsets, per_example, columns, {}, "", per_token)
    return data.scoring_prompts(rows) if getattr(algorithm, "SCORES_PROMPT", False) else rows


def with_logps(rows, logps):
    return replace(rows, per_token=rows.per_token | {"logps": logps})


# ---- numbers worked by hand --------------------------------------------------------------------------------------------------


def batch_of(*rows, **columns):
    """(logps, batch) of rows of trained log-probs, of equal length, each after an untrained token."""
    logps = torch.nn.functional.pad(torch.tensor(rows), (1, 0))  # (R, T)
    mask = torch.ones(logps.shape, dtype=torch.bool)
    mask[:, 0] = False
    nothing = torch.zeros(logps.shape)
    batch = {"loss_mask": mask, "ref_logps": nothing, "entropy": nothing, "is_top1": nothing, "mean_logits": nothing}
    return logps, batch | {name: torch.tensor(value) for name, value in columns.items()}


def loss_of(algorithm, cfg, logps, batch):
    totals = {name: float(value) for name, value in algorithm.counts(batch).items()}
    return float(algorithm.loss(logps, batch, totals, cfg)[0])


LN2, LN4 = math.log(2), math.log(4)
BY_HAND = [
    (sft, {"loss_type": "nll"}, batch_of([-LN2, -LN4]), 1.0397),
    (sft, {"loss_type": "dft"}, batch_of([-LN2, -LN4]), 0.3466),
    *((dpo, {"loss_type": [name]}, batch_of([1.0], [-1.0]), v) for name, v in (("sigmoid", 0.5981), ("hinge", 0.8), ("nca_pair", 1.3388))),
    (simpo, {"beta": 2.0, "simpo_gamma": 1.0}, batch_of([-1.0, -1.0], [-2.0, -4.0]), 0.0486),
    (kto, {"beta": 1.0}, batch_of([2.0], desirable=[True], kl=[1.0]), 0.2689),
    (kto, {"beta": 1.0}, batch_of([2.0], desirable=[False], kl=[1.0]), 0.7311),
]


@pytest.mark.parametrize("algorithm, settings, batch, value", BY_HAND, ids=named)
def test_numbers_of_the_docstrings(algorithm, settings, batch, value):
    assert loss_of(algorithm, algorithm.Config(**settings), *batch) == pytest.approx(value, abs=5e-5)
    assert str(value) in algorithm.loss.__doc__, "the docstring works out another number"


def test_number_of_orpos_docstring():
    """Beside the cross-entropy, here ln 2."""
    logps, batch = batch_of([-LN2, -LN2], [-LN4, -LN4])
    value = loss_of(orpo, orpo.Config(beta=0.5), logps, batch | {"score_mask": batch["loss_mask"]})
    assert value == pytest.approx(LN2 + 0.5 * 0.2877, abs=5e-5)
    assert "= 0.2877" in orpo.loss.__doc__


def test_conservative_dpo_by_hand():
    """Log-ratios 3 and 1 at beta 0.5: h = 1; a tenth of the labels flipped: 0.9 * 0.3133 + 0.1 * 1.3133 = 0.4133."""
    cfg = dpo.Config(beta=0.5, label_smoothing=0.1)
    assert loss_of(dpo, cfg, *batch_of([3.0], [1.0])) == pytest.approx(0.4133, abs=5e-5)


@pytest.mark.parametrize("chosen, value", [(0.1, 0.6444), (-0.1, 2.4868)])
def test_dpop_by_hand(chosen, value):
    """Beta 0.5 and a margin of 0.2 nats: -log sigmoid(0.1). A chosen log-ratio of -0.1 costs 50 * 0.1 nats: -log sigmoid(0.1 - 2.5)."""
    cfg = dpo.Config(loss_type=["dpop"], beta=0.5)
    assert loss_of(dpo, cfg, *batch_of([chosen], [chosen - 0.2])) == pytest.approx(value, abs=5e-5)


# ---- sources and settings ----------------------------------------------------------------------------------------------------


def test_no_mean_and_no_ranks():
    """A mean over rows or tokens would depend on the micro-batch; ranks are the loop's business."""
    for path in Path(algorithms.__file__).parent.glob("*.py"):
        found = re.findall(r"\.mean\(|nanmean|distributed|\bdist\b", path.read_text())
        assert not found, f"{path.name}: {found}"


NAN = math.nan
BAD = [
    (dpo, {"loss_type": []}, "dpo.loss_type"),
    (dpo, {"loss_type": ["hinge", "hinge"]}, "dpo.loss_type"),
    (dpo, {"loss_type": ["hinge", "ipo"], "loss_weights": [1.0]}, "dpo.loss_weights"),
    (dpo, {"beta": 0.0}, "dpo.beta"),
    (dpo, {"label_smoothing": 0.5}, "dpo.label_smoothing"),
    (dpo, {"label_smoothing": -0.1}, "dpo.label_smoothing"),
    (dpo, {"loss_type": ["sigmoid", "exo_pair"]}, "dpo.label_smoothing"),
    *(
        (dpo, {"loss_type": [n], "f_divergence_type": "forward_kl"}, "dpo.f_divergence_type")
        for n in sorted(set(dpo.LOSSES) - dpo.ANY_DIVERGENCE)
    ),
    (dpo, {"loss_type": ["aot"], "use_weighting": True}, "dpo.use_weighting"),
    (dpo, {"loss_type": ["sigmoid", "aot_unpaired"], "use_weighting": True}, "dpo.use_weighting"),
    (dpo, {"loss_type": ["hinge", "ipo"], "label_smoothing": 0.1}, "dpo.label_smoothing"),  # neither reads it
    (dpo, {"loss_weights": [NAN]}, "dpo.loss_weights"),
    (dpo, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": NAN}, "dpo.f_alpha_divergence_coef"),
    *((dpo, {"ld_alpha": value}, "dpo.ld_alpha") for value in (-0.5, NAN)),
    (dpo, {"loss_type": ["discopop"], "discopop_tau": 0.0}, "dpo.discopop_tau"),
    (dpo, {"loss_type": ["dpop"], "dpop_lambda": -1.0}, "dpo.dpop_lambda"),
    *((a, {"beta": value}, f"{a.__name__.removeprefix('algorithms.')}.beta") for a in (dpo, simpo, kto, orpo) for value in (NAN, math.inf)),
    *((simpo, {name: NAN}, f"simpo.{name}") for name in ("simpo_gamma", "cpo_alpha", "alpha")),
    *((kto, {name: NAN}, f"kto.{name}") for name in ("desirable_weight", "undesirable_weight")),
    (simpo, {"beta": -1.0}, "simpo.beta"),
    (simpo, {"label_smoothing": 0.5}, "simpo.label_smoothing"),
    (simpo, {"loss_type": "hinge", "label_smoothing": 0.1}, "simpo.label_smoothing"),
    (simpo, {"loss_type": "ipo", "label_smoothing": 0.1}, "simpo.label_smoothing"),
    *((kto, {name: 0.0}, f"kto.{name}") for name in ("beta", "desirable_weight", "undesirable_weight")),
    (orpo, {"beta": -0.1}, "orpo.beta"),
]


@pytest.mark.parametrize("algorithm, settings, key", BAD, ids=named)
def test_bad_settings_are_refused_by_name(algorithm, settings, key):
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}: got "):
        algorithm.Config(**settings)
