"""What the README tells people to do."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import torch
import yaml

from tests.conftest import ROOT
from train.config import AlgorithmName

README = (ROOT / "README.md").read_text()
ELSEWHERE = {  # how a command begins: what runs it instead, or what it would need
    "pip install": ".ci/run, in an environment of its own",
    "uv run": "a download of torch for CUDA",
    "docker build": "test_clusters.py",
    "kubectl apply": "test_clusters.py",
    "sky jobs": "test_clusters.py",
    "sbatch": "test_clusters.py",
    "python launch/get_smollm2.py": "a download",
    "python launch/train.py --config launch/recipes/llama3_8b_sft_full.yaml --dry_run": "a gated config; see test_recipes.py",
    "torchrun --max-restarts 3": "tests/faults",
    "torchrun ... launch/train.py": "each_algorithm",
    "pytest tests/": "the tests themselves",
    "python tests/": "a machine with nothing else to do",
}
SMALL = "--train.max_steps 3 --checkpoint.save_steps 3 --evaluation.generate 2"
BEFORE = {  # how a command begins: what there must be
    "python launch/plot.py runs/dpo runs/simpo": [f"python launch/train.py --algorithm simpo {SMALL}"],
    "python launch/export.py runs/x/checkpoint-300": [
        f"python launch/train.py --lora.r 4 --model.model_name_or_path runs/sft/final --output_dir runs/x {SMALL}"
    ],
}


def commands():
    """Every command of the README: of its blocks, and of code in its text."""
    lines = []
    for block in re.findall(r"```\n(.*?)```", README, re.S):
        lines += [re.sub(r"(^|\s+)# .*", "", line) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.S).replace("\n", " "))
    begins = re.compile(r"(pip install|python|torchrun|uv run|sbatch|docker|kubectl|sky|pytest|cat >) ")
    return list(dict.fromkeys(" ".join(line.split()) for line in lines if begins.match(line)))


def shortened(command):
    """The command as it is run here: few steps; recipes of other machines' models and data are only resolved."""
    command = (
        command.removeprefix("pip install -e . && ").replace("-300", "-3").replace("-60", "-3").replace("FOLDER --merge", "MERGED --merge")
    )
    if "--config" in command:
        return re.sub(r"^torchrun .* launch/train.py", "python launch/train.py", command) + " --print_config"
    return f"{command} {SMALL}" if "launch/train.py" in command else command


def each_algorithm():
    """From data to an answer, for each algorithm; SFT's model is where the others start."""
    for name in get_args(AlgorithmName):
        start = f" --algorithm {name} --model.model_name_or_path runs/sft/final" if name != "sft" else ""
        yield f"python launch/train.py{start} --output_dir runs/all/{name} {SMALL}"
        yield f"python launch/export.py runs/all/{name}/checkpoint-3 runs/all/{name}/exported"
        yield f'python launch/chat.py runs/all/{name}/exported --prompt "Sort: dcba" --max_new_tokens 5'


def test_every_command(tmp_path):
    """In a copy of the project: they end well, in the README's order but for those in its text, which come last."""
    for part in ("algorithms", "launch", "models", "train"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shell = {"cwd": tmp_path, "shell": True, "executable": "/bin/bash", "capture_output": True, "text": True}
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    known, used = commands(), set()
    assert len(known) > 15 and known[0].startswith("pip install -e . && torchrun")
    for command in known:
        begun = [words for words in ELSEWHERE if command.startswith(words) and "&& torchrun" not in command]
        used.update(begun)
        needed = [line for words, lines in BEFORE.items() if command.startswith(words) for line in lines]
        for line in () if begun else (*needed, shortened(command)):
            run = subprocess.run(line, env=env, **shell)
            assert run.returncode == 0, f"{line}\n{run.stdout[-2000:]}\n{run.stderr[-3000:]}"
    assert used == ELSEWHERE.keys(), "no longer in the README"
    for line in each_algorithm():
        run = subprocess.run(line, env=env, **shell)
        assert run.returncode == 0, f"{line}\n{run.stdout[-2000:]}\n{run.stderr[-3000:]}"
    assert (tmp_path / "runs" / "sft" / "final" / "model.safetensors").exists() and (tmp_path / "curves.png").exists()
    assert all((tmp_path / folder / "model.safetensors").exists() for folder in ("FOLDER", "MERGED"))


def test_change_a_loss(tmp_path):
    """The README's new loss, pasted where it says, trains under its name; the first step's value is known: margins are 0, so it is 1."""
    function = re.search(r"```python\n(def .*?)```", README, re.S)[1]
    name = re.match(r"def (\w+)", function)[1]
    assert f"[{name}]" in README
    for part in ("algorithms", "launch", "models", "train"):
        shutil.copytree(ROOT / part, tmp_path / part)
    path = tmp_path / "algorithms" / "dpo.py"
    source = path.read_text()
    before, table = source.split("LOSSES = {")
    path.write_text(f"{before}{function}\n\nLOSSES = {{" + table.replace("sigmoid_norm, dpop)", f"sigmoid_norm, dpop, {name})", 1))
    settings = [*("--algorithm", "dpo", "--dpo.loss_type", f"[{name}]", "--model.model_name_or_path", "builtin:tiny")]
    settings += [*("--train.max_steps", "1", "--output_dir", str(tmp_path / "run"), "--evaluation.generate", "2")]
    run = subprocess.run([sys.executable, str(tmp_path / "launch" / "train.py"), *settings], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    torch.testing.assert_close(metrics["loss"], 1.0, rtol=1e-5, atol=0)


def test_files_and_recipes_exist():
    """Every file of the file tree and of the tables is there, and none of the folders' files is left out of the tree."""
    tree = README.split("## Files")[1].split("## ")[0]
    for folder in ("launch", "train", "algorithms", "models"):
        files = {p.name for p in (ROOT / folder).glob("*.py")} - {"__init__.py"}
        assert files <= set(re.findall(r"\w+\.py", tree)), files
    rows = re.findall(r"^\|.*\.py\].*$", README, re.M)
    recipes = {name for row in rows for name in row.split("|")[3].replace(" ", "").split(",")}
    assert recipes <= {p.stem for p in (ROOT / "launch" / "recipes").glob("*.yaml")}
    for path in (ROOT / "launch" / "recipes").glob("*.yaml"):
        text = path.read_text()
        assert f"--config launch/recipes/{path.name}" in text.splitlines()[0], path.name
        assert yaml.safe_load(text)["output_dir"].startswith("runs/")
