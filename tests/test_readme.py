"""What the README tells people to do."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


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
    settings += [*("--train.max_steps", "1", "--output_dir", str(tmp_path / "run"), "--data.eval", "null")]
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
