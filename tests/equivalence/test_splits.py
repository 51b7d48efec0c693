"""How a step is split into micro-batches: nothing to ours, but a different loss and gradient to TRL's, shown by how much.

Seven pairs make the step, once whole and once as four and three, as at an epoch's end under gradient accumulation.
"""

import pytest
from test_dpo import MAX_LENGTH, OPTIMIZER, pairs, train_trl, write
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

PAIRS = 7
CASES = {
    "simpo": ("simpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0}, CPOTrainer, CPOConfig, {"cpo_alpha": 0.0}),
    "cpo": ("simpo", {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0}, CPOTrainer, CPOConfig, {}),
    "orpo": ("orpo", {"beta": 0.5}, ORPOTrainer, ORPOConfig, {}),
    "dpo-sft": ("dpo", {"loss_type": ["sigmoid", "sft"]}, DPOTrainer, DPOConfig, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_split_matters_to_trl_alone(name, model_folder, train_here, tmp_path):
    algorithm, settings, trainer, arguments, more = CASES[name]
    folder, file = model_folder("llama"), write(tmp_path, pairs(PAIRS))
    splits = {"whole": {"per_device_train_batch_size": 8}, "split": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}}
    theirs = {
        split: train_trl(trainer, arguments, folder, pairs(PAIRS), tmp_path / split, **{**settings, **more, **given, "max_steps": 1})
        for split, given in splits.items()
    }
    assert [len(theirs[split][1]) for split in splits] == [1, 2]  # micro-batches
    common = {
        "algorithm": algorithm,
        "model.model_name_or_path": folder,
        "data.train": file,
        "data.max_length": MAX_LENGTH,
        "train.global_batch_size": 8,
        "log.report_to": [],
        **{f"train.{name}": value for name, value in OPTIMIZER.items()},
        **{f"{algorithm}.{name}": value for name, value in settings.items()},
        "train.max_steps": 1,
    }
    ours = {
        tokens: train_here(common | {"output_dir": str(tmp_path / f"ours-{tokens}"), "train.micro_batch_tokens": tokens})[0]
        for tokens in (1 << 20, 160, 68)
    }
    for key in ("loss", "grad_norm"):
        whole, split = (theirs[split][0][0][key] for split in splits)
        print(f"{name}: the split changes TRL's {key} by {abs(split / whole - 1):.1e} of it")
        assert abs(split / whole - 1) > 1e-3
        for mine in ours.values():
            assert mine[key] == pytest.approx(ours[1 << 20][key], rel=1e-6)
