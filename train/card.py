"""The model card, `final/README.md`: from what, on what and how the model was trained, and how the run ended."""

import json
from pathlib import Path

import torch
import transformers
import yaml

from train import config, data

TIMINGS = ("time", "per_second", "gib")  # they change from run to run, and nothing else in final/ does


def write(cfg, fingerprint, report):
    """fingerprint: of the tokenised rows that were trained on; report: how they came about."""
    last = json.loads(Path(cfg.output_dir, "metrics.jsonl").read_text().splitlines()[-1])
    head = {
        "library_name": "peft" if cfg.lora.r else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["baretune", cfg.algorithm],
    }
    base = cfg.model.model_name_or_path
    if base.count("/") == 1 and not Path(base).exists():
        head["base_model"] = base
    settings = {name: value for name, value in config.as_dict(cfg).items() if name not in ("output_dir", "checkpoint", "log")}
    sources = ", ".join(source for source, _, _ in data.sources_of(cfg.data, "train"))
    numbers = "\n".join(f"| {name} | {value:.6g} |" for name, value in last.items() if is_shown(name, value))
    text = f"""---
{yaml.safe_dump(head, sort_keys=False)}---

# {cfg.log.run_name or Path(cfg.output_dir).name}

{base}, trained by {cfg.algorithm} for {last["step"]} steps on {sources} ({report["kept"]} examples).

Licence: not chosen here. The licences of {base} and of {sources} hold for what was made from them; add `license:` above.

| at the last step | |
|---|---|
{numbers}

The tokenised examples have SHA-256 `{fingerprint}`. Made with torch {torch.__version__.partition("+")[0]} and transformers
{transformers.__version__}, and these settings:

```yaml
{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```
"""
    Path(cfg.output_dir, "final", "README.md").write_text(text)


def is_shown(name, value):
    return isinstance(value, (int, float)) and not name.endswith(TIMINGS)
