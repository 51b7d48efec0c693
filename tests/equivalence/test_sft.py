"""SFT against TRL's SFTTrainer: loss, gradient and metrics on one batch; then whole runs of the same model, file and seed."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_dpo import assert_same_metrics, deviations, every, fields_of, fused_model, logged, micro_batch, named, stub, with_gradient
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from algorithms import sft
from train import batches

ROWS = {  # tokens of each row's prompt and response
    "short": ([3, 1, 5, 2, 4, 1, 3], [4, 9, 2, 12, 6, 1, 7]),
    "one token and very long": ([3, 1, 5], [1, 2000, 6]),
}
VARIANTS = {name: (f"loss_type {name}", [{"loss_type": name}]) for name in ("nll", "dft")}  # name -> (what it is in TRL, settings of it)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("settings", every(VARIANTS), ids=named)
def test_loss_equals_trl(settings, rows):
    (*mine, metrics), (*expected, expected_metrics) = both(settings, ROWS[rows])
    assert all(d < 1e-6 for d in deviations(mine, expected))
    assert float(expected[1].norm()) > 0
    assert metrics.keys() == expected_metrics.keys()
    assert_same_metrics(metrics, expected_metrics)


def test_no_loss_of_trl_is_missing():
    assert set(VARIANTS) | {"chunked_nll"} == set(fields_of(SFTConfig)["loss_type"].metadata["choices"])  # a deprecated name of nll


def both(settings, rows):
    """(loss, gradient in the log-probs, metrics) of ours, and of TRL's."""
    logps, batch = micro_batch(*rows)
    return (with_gradient(side, logps, batch, settings) for side in (ours, theirs))


def ours(logps, batch, settings):
    return sft.loss(logps, batch, {"tokens": float(sft.counts(batch)["tokens"])}, sft.Config(**settings))


def theirs(logps, batch, settings):
    args = SimpleNamespace(**settings, average_tokens_across_devices=True)
    trainer = stub(SFTTrainer, args=args, compute_loss_func=None, label_smoother=None, is_deepspeed_enabled=False)
    loss = trainer.compute_loss(
        fused_model(logps, batch), {"attention_mask": batch["attention_mask"]}, num_items_in_batch=batch["loss_mask"].sum()
    )
    return loss, logged(trainer)


# ---- whole runs --------------------------------------------------------------------------------------------------------------

STEPS = 5
BATCH = 8  # rows of a step
COUNT = 21  # two full steps and a short one make an epoch
MAX_LENGTH = 44  # shorter than some rows, so that both sides must cut them


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("form, shape", [("completion", "llama"), ("text", "qwen3")])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_run_equals_trl(packing, accumulation, form, shape, loss_type, model_folder, data_file, train_here, tmp_path, monkeypatch):
    """Unpacked, both sides choose each step's rows; packed, TRL chooses, and ours takes the same rows from its own file."""
    folder, file = model_folder(shape), data_file(form, COUNT)
    expected, steps, weights = train_trl(folder, file, packing, accumulation, loss_type, tmp_path / "trl")
    if packing:
        assert max(map(len, steps)) > BATCH, "nothing was packed"
        take_rows_of(steps, monkeypatch)
    settings = {
        "output_dir": str(tmp_path / "ours"),
        "model.model_name_or_path": folder,
        "data.train": file,
        "data.max_length": MAX_LENGTH,
        "train.global_batch_size": BATCH,
        "train.micro_batch_tokens": 130,  # other micro-batches than TRL's
        "train.max_steps": STEPS,
        "train.learning_rate": 1e-3,
        "train.warmup_steps": 2,
        "train.weight_decay": 0.1,
        "sft.loss_type": loss_type,
        "log.report_to": [],
    }
    ours = train_here(settings)
    for step in range(STEPS):
        for key, tolerance in (("loss", 1e-6), ("grad_norm", 1e-6), ("learning_rate", 1e-12)):
            assert ours[step][key] == pytest.approx(expected[step][key], rel=tolerance), f"{key} of step {step + 1}"
    assert [row["num_tokens"] for row in ours] == [row["num_tokens"] for row in expected]
    assert loss_type == "dft" or all(row["grad_norm"] > 1 for row in ours), "clipping is not part of the comparison"
    final = load_file(tmp_path / "ours" / "final" / "model.safetensors")
    assert final.keys() <= weights.keys()
    for name, weight in final.items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def train_trl(folder, file, packing, accumulation, loss_type, output_dir):
    """TRL's run: what it logged of each step, the documents of each step, its last weights."""
    settings = SFTConfig(
        output_dir=str(output_dir),
        loss_type=loss_type,
        packing=packing,
        max_length=MAX_LENGTH,
        per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=1.0,
        seed=42,
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    rows = Dataset.from_json(file, cache_dir=str(output_dir))
    trainer = Recorded(model=folder, args=settings, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(folder))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return logged, trainer.documents, trainer.model.state_dict()


class Recorded(SFTTrainer):
    """Keeps the documents of each step, [[(ids, trained positions), ...], ...]."""

    def train(self):
        self.documents = [[] for _ in range(STEPS)]
        super().train()

    def training_step(self, model, inputs, *args):
        self.documents[self.state.global_step] += documents_of(inputs)
        return super().training_step(model, inputs, *args)


def documents_of(inputs):
    """The rows of TRL's batch: padded rows with an attention mask, or one row of documents with restarting positions."""
    ids, labels = inputs["input_ids"], inputs["labels"]  # (R, T)
    if "attention_mask" in inputs:
        parts = [(i[real], t[real]) for i, t, real in zip(ids, labels, inputs["attention_mask"].bool())]
    else:
        starts = (inputs["position_ids"][0] == 0).nonzero()[1:, 0].tolist()
        parts = zip(ids[0].tensor_split(starts), labels[0].tensor_split(starts))
    return [(tuple(i.tolist()), tuple((t[1:] != -100).tolist())) for i, t in parts]


def take_rows_of(steps, monkeypatch):
    """Each step of our run takes the rows that TRL had in it, found by their ids and masks."""
    offline_steps = batches.offline_steps

    def source(rows, *rest):
        index = {}
        for i in range(len(rows)):
            ids, mask = rows.row(i)
            index[tuple(ids.tolist()), tuple(mask[1:].tolist())] = i
        monkeypatch.setattr(batches, "examples_of", lambda step, *_: [index[document] for document in steps[step - 1]])
        return offline_steps(rows, *rest)

    monkeypatch.setattr(batches, "offline_steps", source)
