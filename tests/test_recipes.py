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
    if card := re.search(r"(\d+)(?: or \d+)? GB", text):  # the smallest GPU that the header names
        assert float(found[0]) + 1 < 0.97 * int(card[1]), "with CUDA's own, this does not fit"


def test_what_people_start_from():
    """Each algorithm, size, family and way to train has a recipe, and so have one GPU, eight, and several hosts."""
    commands, known = {}, set()
    for path in RECIPES:
        cfg, commands[path.stem] = config.parse(["--config", str(path)]), path.read_text().splitlines()[0]
        way = "qlora" if cfg.model.quantization else "lora" if cfg.lora.r else "full"
        known.add((cfg.model.model_name_or_path.rpartition("/")[2], cfg.algorithm, way))
    wanted = {(f"Qwen3-{size}", "sft") for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")}
    wanted |= {(f"Llama-3.{size}-Instruct", "sft") for size in ("2-1B", "2-3B", "1-8B", "3-70B")}
    wanted |= {("gemma-3-270m-it", "sft"), ("gemma-3-1b-it", "sft"), ("Mistral-7B-Instruct-v0.3", "sft"), ("SmolLM2-135M-Instruct", "dpo")}
    wanted |= {("Llama-3.1-8B-Instruct", "grpo"), ("Qwen3-1.7B-Base", "grpo"), ("Qwen3-8B", "kto"), ("Qwen3-8B", "simpo")}
    assert wanted | {("Qwen3-8B-Base", "orpo")} <= {(name, algorithm) for name, algorithm, _ in known}
    families = {(family, way) for name, _, way in known for family in ("Qwen3", "Llama", "gemma", "Mistral") if name.startswith(family)}
    assert {(family, way) for family in ("Qwen3", "Llama", "gemma", "Mistral") for way in ("full", "lora")} <= families
    assert {("Llama", "qlora"), ("Mistral", "qlora")} <= families
    assert {1, 8, 16, 32} <= {ranks_of(command) for command in commands.values()}


def test_the_readme_says_what_the_headers_say():
    """Of memory that is estimated."""
    row = re.search(r"^\| ([^|]*) \| estimated by `--dry_run`: ([^|]*) GiB \|$", (ROOT / "README.md").read_text(), re.M)
    names, numbers = re.findall(r"\w+_\w+", row[1]), re.findall(r"\d+", row[2])
    assert len(names) == 3
    for name, number in zip(names, numbers, strict=True):
        header = (ROOT / "launch" / "recipes" / f"{name}.yaml").read_text()
        assert f": {number} GiB" in next(line for line in header.splitlines() if line.startswith("# Memory")), name
