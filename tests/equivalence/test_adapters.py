"""LoRA against TRL with the same peft config: first weights, losses and gradient norms of whole SFT and DPO runs, last adapters."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from test_dpo import BATCH, OPTIMIZER, PLAIN, STEPS, pairs, write
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

VARIANTS = {
    "lora": {"r": 4, "lora_alpha": 16},
    "dora": {"r": 4, "use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]},
}


def of_peft(tensors):
    """A state dict's adapters under the names that peft gives them in a file."""
    names = {name: name.replace(".default", "").replace("modules_to_save.", "") for name in tensors}
    names = {name: short.replace("magnitude_vector.weight", "magnitude_vector") for name, short in names.items()}
    return {names[name]: t.clone() for name, t in tensors.items() if ".default" in name}


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_run_equals_trl(variant, algorithm, model_folder, data_file, train_here, tmp_path):
    """Over an epoch's end, clipped, with weight decay; ours cuts its steps into other micro-batches."""
    folder, lora = model_folder("llama"), VARIANTS[variant]
    file = data_file("completion", 21) if algorithm == "sft" else write(tmp_path, pairs(21))
    trainer, config = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[algorithm]
    theirs = trainer(
        model=folder,
        args=config(str(tmp_path / "trl"), per_device_train_batch_size=BATCH, **OPTIMIZER, **PLAIN),
        train_dataset=Dataset.from_json(file, cache_dir=str(tmp_path)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(**{"target_modules": "all-linear"} | lora, task_type="CAUSAL_LM"),
    )
    first = of_peft(theirs.model.state_dict())
    theirs.train()
    expected = [entry for entry in theirs.state.log_history if "grad_norm" in entry]
    settings = {
        "algorithm": algorithm,
        "model.model_name_or_path": folder,
        "data.train": file,
        "train.global_batch_size": BATCH,
        "train.micro_batch_tokens": 130,
        "log.report_to": [],
    }
    settings |= {f"train.{name}": value for name, value in OPTIMIZER.items()} | {f"lora.{name}": value for name, value in lora.items()}
    ours = train_here(settings | {"output_dir": str(tmp_path / "ours")})
    for step in range(STEPS):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert ours[step][key] == pytest.approx(expected[step][key], rel=1e-5), f"{key} of step {step + 1}"
    assert any(row["grad_norm"] > OPTIMIZER["max_grad_norm"] for row in ours), "clipping is not part of the comparison"
    assert_same(load_file(tmp_path / "ours" / "final" / "adapter_model.safetensors"), of_peft(theirs.model.state_dict()), 1e-5)
    train_here(settings | {"output_dir": str(tmp_path / "still"), "train.max_steps": 1, "train.learning_rate": 0.0})
    assert_same(load_file(tmp_path / "still" / "final" / "adapter_model.safetensors"), first, 0)


def assert_same(ours, expected, tolerance):
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
