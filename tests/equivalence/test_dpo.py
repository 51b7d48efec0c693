"""DPO against TRL's DPOTrainer: every loss, its gradient and its metrics on one batch; then a whole run.

The other preference tests of this folder take their helpers from here.
"""

import gc
import json
import random
import re
from collections import defaultdict
from dataclasses import asdict, fields
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from algorithms import dpo
from models import load
from train import batches, config, loop, optim, reference, toy

ROWS = {  # tokens of each pair's prompt, of its chosen and of its rejected response: longer, shorter and of equal length
    "short": ([3, 1, 5, 2, 4, 1, 3], [4, 9, 2, 12, 6, 1, 7], [7, 3, 2, 5, 11, 8, 7]),
    "one token and very long": ([3, 1, 5, 2], [1, 2000, 6, 1], [2000, 1, 1, 9]),
}

EVERY = [{"loss_type": [name], "label_smoothing": 0.2 if name == "exo_pair" else 0.0} for name in dpo.LOSSES if name != "dpop"]
SMOOTHED = [{"loss_type": [name], "label_smoothing": 0.1} for name in ("robust", "exo_pair", "aot", "aot_unpaired")]
DIVERGENT = [settings for settings in EVERY if set(settings["loss_type"]) <= dpo.ANY_DIVERGENCE]
DIVERGENCES = {name: [settings | {"f_divergence_type": name} for settings in DIVERGENT] for name in ("forward_kl", "js_divergence")}
ALPHAS = [
    settings | {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    # alpha 1 is reverse_kl; at alpha 60 some exponents exceed 80
    for settings, alphas in [(DIVERGENT[0], (1.0, 1 + 1e-7, 60.0)), *((settings, (1.7, 0.5)) for settings in DIVERGENT)]
    for alpha in alphas
]
LENGTHS = [settings | {"ld_alpha": alpha} for settings in EVERY for alpha in (0.0, 0.5)]
WEIGHTED = [  # not hinge and sft, where TRL's multiplication in place breaks autograd
    settings | {"use_weighting": True} for settings in EVERY if not set(settings["loss_type"]) & {*dpo.SORTED, "hinge", "sft"}
]
SUMS = [
    {"loss_type": ["robust", "aot", "hinge"], "label_smoothing": 0.1, "ld_alpha": 0.5},
    {"loss_type": ["apo_down", "ipo"], "loss_weights": [0.3, 2.0], "use_weighting": True, "ld_alpha": 0.5},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},  # MPO
]
VARIANTS = {  # name -> (what it is in TRL, settings of it)
    **{settings["loss_type"][0]: (f"loss_type {settings['loss_type'][0]}", [settings]) for settings in EVERY},
    "label smoothing": ("label_smoothing", SMOOTHED),
    **{name: (f"f_divergence_type {name}", several) for name, several in (DIVERGENCES | {"alpha_divergence": ALPHAS}).items()},
    "LD-DPO": ("ld_alpha", LENGTHS),
    "WPO": ("use_weighting", WEIGHTED),
    "sums (MPO)": ("several loss_types, loss_weights", SUMS),
}


def every(variants):
    """The settings of all variants."""
    return [settings for _, several in variants.values() for settings in several]


def named(value):
    """Part of a test's id: of a variant its settings."""
    if not isinstance(value, dict):
        return str(value)
    parts = [(k, "+".join(map(str, v)) if isinstance(v, list) else v) for k, v in value.items()]
    return "-".join(f"{v}" if k == "loss_type" else f"{k}={v}" for k, v in parts)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("settings", every(VARIANTS), ids=named)
def test_loss_equals_trl(settings, rows):
    (*mine, metrics), (*expected, expected_metrics) = both(settings, ROWS[rows])
    assert all(d < 1e-6 for d in deviations(mine, expected))
    assert float(expected[1].norm()) > 0
    assert metrics.keys() == expected_metrics.keys()
    assert_same_metrics(metrics, expected_metrics)


def test_no_loss_of_trl_is_missing():
    assert {settings["loss_type"][0] for settings in EVERY} == documented("loss_type")
    assert {"reverse_kl", "alpha_divergence", *DIVERGENCES} == documented("f_divergence_type")


def documented(name):
    """The values of a setting in TRL's help."""
    text = re.search(r"Possible values are: (.*?)\. ", fields_of(DPOConfig)[name].metadata["help"])[1]
    return set(re.findall(r"[`']+(\w+)[`']+", text))


def fields_of(config):
    return {field.name: field for field in fields(config)}


def both(settings, rows):
    """(loss, gradient in the log-probs, metrics) of ours, and of TRL's."""
    cfg = dpo.Config(beta=0.5, **settings)
    return (with_gradient(side, *micro_batch(*rows), cfg) for side in (ours, theirs))


def ours(logps, batch, cfg):
    """algorithms.dpo as the loop calls it, with the micro-batch as the whole step."""
    totals = {name: float(value) for name, value in dpo.counts(batch).items()}
    if dpo.needs_step(cfg):
        step = dpo.spread(dpo.summary(logps.detach(), batch, cfg).double(), cfg)
        batch = batch | {name: column.float() for name, column in step.items()}
    return dpo.loss(logps, batch, totals, cfg)


def theirs(logps, batch, cfg):
    """DPOTrainer._compute_loss with a model and a reference that return the batch's numbers."""
    trainer = stub(
        DPOTrainer,
        **asdict(cfg) | {"loss_types": cfg.loss_type, "loss_weights": cfg.loss_weights or [1.0] * len(cfg.loss_type)},
        args=SimpleNamespace(discopop_tau=cfg.discopop_tau, gradient_checkpointing_kwargs=None),
        ref_model=lambda **_: SimpleNamespace(log_probs=predicted(stacked(batch["ref_logps"] * batch["loss_mask"]))),
    )
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "completion_mask": batch["loss_mask"].long()}
    inputs = {name: stacked(value) for name, value in inputs.items()}
    loss = trainer._compute_loss(fused_model(logps, batch, stacked), inputs, return_outputs=False)
    return loss, logged(trainer)


def micro_batch(prompts, *completions, seed=0):
    """(logps, batch) of rows that take turns, one of each list of completion lengths; (R, T) float32 with a first token to spare.

    Where nothing is trained stands noise, which no loss may read. All are multiples of 1/1024, whose sums are exact in any order. The
    reference differs in the first tokens of a response alone, so that the log-ratios of a long one are of ordinary size.
    """
    completions = torch.tensor(completions).T.flatten()  # (R,)
    starts = torch.tensor(prompts).repeat_interleave(len(completions) // len(prompts))  # (R,)
    width, stream = int((starts + completions).max()) + 1, torch.Generator().manual_seed(seed)  # a column of padding
    t = torch.arange(width)
    real = t < (starts + completions)[:, None]  # (R, T)

    def noise(low, high):
        return torch.randint(int(low * 1024), int(high * 1024), real.shape, generator=stream) / 1024

    logps = noise(-4, -0.1)
    batch = {
        "input_ids": torch.randint(3, 100, real.shape, generator=stream),
        "attention_mask": real,
        "loss_mask": real & (t >= starts[:, None]),
        "ref_logps": logps + noise(-1, 1) * (t < starts[:, None] + 12),
        "entropy": noise(0, 4),
        "is_top1": (noise(0, 1) < 0.5).float(),
        "mean_logits": noise(-3, 3),
        "log_sum_sq": noise(-3, -0.1),
    }
    return logps, batch


def stacked(x):
    """Rows that alternate chosen, rejected, as TRL has them: all chosen ones first."""
    return torch.cat([x[0::2], x[1::2]])


def predicted(x):
    """(R, T) aligned with the tokens -> (R, T - 1), as TRL aligns its log-probs."""
    return x[:, 1:]


def fused_model(logps, batch, arrange=lambda x: x):
    """A model whose output is what TRL's fused head makes of the batch: 0 where nothing is trained."""
    mask = batch["loss_mask"]
    values = {"log_probs": logps, "log_sum_sq_probs": batch["log_sum_sq"], "entropy": batch["entropy"], "mean_logits": batch["mean_logits"]}
    output = {name: predicted(arrange(value * mask)) for name, value in values.items()} | {"label_mask": predicted(arrange(mask))}
    output["is_top1"] = predicted(arrange(batch["is_top1"] * mask)).bool()
    return lambda **_: SimpleNamespace(**output)


def stub(trainer, **attributes):
    """A trainer that was never set up and knows but what its loss reads."""
    made = trainer.__new__(trainer)
    gathers = {"gather": lambda x: x, "gather_for_metrics": lambda x: x}
    model = torch.nn.Module()
    model.is_gradient_checkpointing = False
    vars(made).update(
        model=model,
        accelerator=SimpleNamespace(device=torch.device("cpu"), num_processes=1, parallelism_config=None, **gathers),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    vars(made).update(attributes)
    return made


def logged(trainer):
    """What the trainer's loss logged, but for the number of tokens."""
    return {name: values[-1] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}


def with_gradient(function, leaf, *args):
    """(loss, its gradient in `leaf`, metrics) of function(leaf, *args)."""
    leaf = leaf.clone().requires_grad_()
    loss, metrics = function(leaf, *args)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, metrics


def assert_same_metrics(ours, expected):
    """Every expected metric to 1e-6, relative; differences relative to what they are the difference of."""
    for name, value in expected.items():
        scale = expected.get({"rewards/margins": "rewards/chosen", "log_odds_chosen": "logps/chosen"}.get(name), value)
        assert float(ours[name]) == pytest.approx(value, rel=0, abs=1e-6 * abs(scale)), name


def deviations(ours, expected):
    """Of loss and gradient: largest difference, relative to the largest expected value."""
    return [difference(*values) for values in zip(ours[:2], expected[:2], strict=True)]


def difference(ours, expected):
    """Largest difference, relative to the largest expected value."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype == torch.float32 and expected.isfinite().all()
    return float((ours - expected).abs().max() / expected.abs().max())


# ---- whole runs --------------------------------------------------------------------------------------------------------------

STEPS = 5
BATCH = 8  # pairs of a step
MAX_LENGTH = 34  # shorter than some rows
OPTIMIZER = {"max_steps": STEPS, "learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.1}
DIFFERENCES = ("rewards/", "kl", "log_odds", "logits/")  # small differences of sums of up to 100 nats, which float32 rounds to 8e-6
PLAIN = {  # what TRL does otherwise by default
    "seed": 42,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


def test_run_equals_trl(model_folder, train_here, tmp_path):
    """The same model, file and seed: losses, gradient norms and metrics of five steps, over an epoch's end. Ours splits its steps."""
    folder, file = model_folder("llama"), write(tmp_path, pairs(21))  # two full steps and a short one make an epoch
    expected, _, weights = train_trl(DPOTrainer, DPOConfig, folder, pairs(21), tmp_path, per_device_train_batch_size=BATCH)
    settings = {
        "algorithm": "dpo",
        "output_dir": str(tmp_path / "ours"),
        "model.model_name_or_path": folder,
        "data.train": file,
        "data.max_length": MAX_LENGTH,
        "train.global_batch_size": BATCH,
        "train.micro_batch_tokens": 150,
        "log.report_to": [],
    }
    ours = train_here(settings | {f"train.{name}": value for name, value in OPTIMIZER.items()})
    assert_same_steps(ours, expected)
    assert_same_weights(load_file(tmp_path / "ours" / "final" / "model.safetensors"), weights)
    assert ours[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert all(row["grad_norm"] > 0.1 for row in ours), "clipping is not part of the comparison"
    assert [row["num_tokens"] for row in ours] == [row["num_tokens"] for row in expected]


@pytest.mark.parametrize("name", VARIANTS)
def test_run_of_every_variant_equals_trl(name, model_folder, one_rank, tmp_path):
    """TRL chooses the rows; ours trains on its ids and masks, each step in two micro-batches."""
    settings, folder = VARIANTS[name][1][-1], model_folder("llama")
    expected, inputs, weights = train_trl(DPOTrainer, DPOConfig, folder, pairs(15), tmp_path, per_device_train_batch_size=3, **settings)
    metrics, final = train_on([as_step(batch) for batch in inputs], dpo, dpo.Config(**settings), folder, one_rank)
    assert_same_steps(metrics, expected, tolerance=1e-4 if name == "discopop" else 1e-5)  # 1 / tau multiplies what rounding does by 20
    assert_same_weights(final, weights)


def as_step(inputs):
    """TRL's batch as a step of two micro-batches of alternating rows."""
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask", "loss_mask": "completion_mask"}
    batch = {ours: torch.stack(inputs[theirs].chunk(2), 1).flatten(0, 1) for ours, theirs in names.items()}  # (2P, T)
    return cut(batch | {name: batch[name].bool() for name in ("attention_mask", "loss_mask")})


def cut(batch):
    """A batch of pairs as a step of two micro-batches."""
    count = len(batch["input_ids"]) // 2
    parts = [range(1), range(1, count)]
    micro = [{k: x[2 * part.start : 2 * part.stop] for k, x in batch.items()} | {"positions": torch.tensor(part)} for part in parts]
    return batches.Step(micro, count, {})


def train_trl(trainer, arguments, folder, rows, output_dir, **settings):
    """TRL's run of five steps: what it logged of each, its batches, its last weights."""
    inputs = []

    class Recorded(trainer):
        def training_step(self, model, batch, *args):
            inputs.append(dict(batch))
            return super().training_step(model, batch, *args)

    made = Recorded(
        model=folder,
        args=arguments(str(output_dir / "trl"), max_length=MAX_LENGTH, **OPTIMIZER | PLAIN | settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    gc.freeze()  # accelerate collects garbage at both ends, half a second each if that looks at all modules
    made.train()
    gc.unfreeze()
    return [entry for entry in made.state.log_history if "grad_norm" in entry], inputs, made.model.state_dict()


def train_on(steps, algorithm, settings, folder, device):
    """Metrics of the loop's steps on given micro-batches, with the initial model as a live reference, and the last weights."""
    train = config.Train(**{name: value for name, value in OPTIMIZER.items() if name != "max_grad_norm"})
    model, initial = (load.build(config.Model(folder), folder, config.Fsdp(), device, 0) for _ in range(2))
    seen = []

    def source():
        for step in steps:
            step = reference.live(step, initial) if algorithm.REFERENCE else step
            needed = getattr(algorithm, "needs_step", lambda _: False)(settings)
            yield batches.with_statistics(step, model, algorithm, settings) if needed else step

    optimizer, rate = optim.make_optimizer(model, train), lambda step: optim.learning_rate(train, len(steps), step)
    loop.train(
        *(model, algorithm, settings, source(), optimizer, rate, 1, len(steps)),
        num_tokens=0,
        max_grad_norm=OPTIMIZER["max_grad_norm"],
        stopping=lambda: False,
        check=lambda *_: None,
        report=lambda step, metrics, _: seen.append(metrics),
    )
    return seen, {name: p.detach().full_tensor() for name, p in model.named_parameters()}


def assert_same_weights(ours, expected):
    """AdamW's last weights to a hundredth of a step."""
    assert ours and ours.keys() <= expected.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_steps(ours, expected, absent=(), tolerance=1e-5):
    """Every number that TRL logged of each step, but for the names in `absent`."""
    names = expected[0].keys() - {"epoch", "step", "num_tokens", *absent}
    assert len(ours) == len(expected) and len(names) > 8
    for step, (mine, other) in enumerate(zip(ours, expected), 1):
        for name in names:
            near_zero = 5e-6 if name.startswith(DIFFERENCES) else 0.0
            assert mine[name] == pytest.approx(other[name], rel=tolerance, abs=near_zero), f"{name} of step {step}"


def pairs(count):
    """Conversations with a preferred and another answer, of random letters."""
    stream = random.Random(count)

    def turn(role, longest):
        return [{"role": role, "content": "".join(stream.choices(toy.LETTERS, k=stream.randint(1, longest)))}]

    return [{"prompt": turn("user", 12), "chosen": turn("assistant", 14), "rejected": turn("assistant", 14)} for _ in range(count)]


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
