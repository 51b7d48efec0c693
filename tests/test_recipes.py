"""Every recipe, resolved and described with the real architecture's shape, on the meta device."""

import re
from dataclasses import replace

import pytest
from architectures import SHAPES, SIZES
from transformers import AutoConfig

from launch.train import ALGORITHMS
from tests.conftest import ROOT
from train import config, dry_run, toy

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


def ranks_of(command):
    return int(re.search(r"--nproc-per-node (\d+)", command)[1]) * int((re.search(r"--nnodes (\d+)", command) or [0, 1])[1])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe(path, tmp_path):
    """It resolves; with data made in place the run can be described; and what its header says of memory is what is found now."""
    cfg, text = config.parse(["--config", str(path)]), path.read_text()
    assert cfg.output_dir.startswith("runs/") and path.stem.startswith(cfg.output_dir.removeprefix("runs/"))
    name = cfg.model.model_name_or_path
    if not name.startswith("builtin:"):
        toy.write_model("tiny", tmp_path / "model")  # for the tokenizer
        settings = dict(SHAPES[name])
        AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(tmp_path / "model")
        pairs = ALGORITHMS[cfg.algorithm].ROWS in ("pairs", "labelled")
        data = config.Data(train="builtin:capitals" if pairs else "builtin:letters")
        model = replace(cfg.model, model_name_or_path=str(tmp_path / "model"))
        cfg = replace(cfg, model=model, data=data, evaluation=config.Evaluation())
    lines = list(dry_run.describe(cfg, ALGORITHMS[cfg.algorithm], ranks_of(text.splitlines()[0]), "cuda"))
    (found,) = re.findall(r"^memory .* peak ([\d.]+) (GiB|MiB)", "\n".join(lines), re.M)
    (parameters,) = re.findall(r"^model: .* ([\d,]+) parameters", "\n".join(lines), re.M)
    if name in SIZES:
        assert 0.995 < int(parameters.replace(",", "")) / SIZES[name] < (1.04 if cfg.lora.r else 1.005)
    said = re.search(r"# Memory, (?:estimated|measured)[^:]*: ([\d.]+) GiB", text)
    print(path.stem, *found, said and said[1])
    if said:
        assert found[1] == "GiB" and abs(float(found[0]) / float(said[1]) - 1) < 0.15, (found, said[1])
