"""The model card of a real run."""

import re
from pathlib import Path

import yaml

from train import data


def test_a_card(train_here, tmp_path):
    settings = {"output_dir": str(tmp_path / "mine"), "model.model_name_or_path": "builtin:tiny", "data.train": "builtin:letters"}
    metrics = train_here(settings | {"train.max_steps": 1, "train.global_batch_size": 4, "log.report_to": []})
    text = (tmp_path / "mine" / "final" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["baretune", "sft"]}
    assert "# mine\n\nbuiltin:tiny, trained by sft for 1 steps on builtin:letters (12000 examples)." in body and "Licence: " in body
    rows = data.Rows.load(Path(tmp_path, "mine", "data", "train.safetensors"))
    assert f"`{rows.fingerprint}`" in body and f"| loss | {metrics[0]['loss']:.6g} |" in body
    assert "step_time" not in body and "tokens_per_second" not in body and str(tmp_path) not in body
    written = yaml.safe_load(re.search(r"```yaml\n(.*)```", body, re.S)[1])
    assert written["train"]["global_batch_size"] == 4 and "dpo" not in written
