"""launch/doctor.py as a person runs it: alone, over two ranks, and where something is wrong."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from algorithms import sft
from launch import doctor as product

ROOT = Path(__file__).resolve().parents[1]
SECRET = "hf_" + "q" * 34
DOCTOR = str(ROOT / "launch" / "doctor.py")


def doctor(tmp_path, *command, **environment):
    environment = os.environ | {"HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run([sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)


def to_fix(run):
    """What it ends with, hosts left out. It never ends in a traceback."""
    assert run.returncode == 1 and "Traceback" not in run.stdout + run.stderr, run.stdout + run.stderr
    lines = run.stdout.split("to fix:\n")[1].splitlines()
    return [line.removeprefix("- ").rpartition(" (host ")[0] for line in lines if "if you need it" not in line]


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A function that makes a folder of this environment's packages, some of them left out, older, or broken."""

    def make(without):
        folder = tmp_path_factory.mktemp("packages")
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if not path.name.lower().startswith((without, f"{without}-")):
                (folder / path.name).symlink_to(path)
        return folder

    return make


def test_two_ranks_ping_and_train(tmp_path):
    """Also for a recipe whose run has room; the hub's token is not shown."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = doctor(tmp_path, *torchrun, DOCTOR, "--config", str(ROOT / "launch" / "recipes" / "sft.yaml"))
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert [line for line in lines if line.startswith("ping of 1 pairs of ranks: slowest 0-1 ")], run.stdout
    assert [line for line in lines if line.startswith("trained 2 steps on 2 x ")] and "nothing has to be fixed" in lines
    assert [line for line in lines if "sft.yaml will write " in line and " for 3 checkpoints of " in line], run.stdout  # two kept, one new
    assert "hub token: yes" in lines and SECRET not in run.stdout + run.stderr
    assert list(Path(tmp_path, "runs").glob("*")) + list(Path(tmp_path, "runs").glob(".*")) == []


@pytest.mark.parametrize("name", ["torch", "peft"])
def test_a_missing_package(tmp_path, packages, name):
    run = doctor(tmp_path, "-S", DOCTOR, PYTHONPATH=str(packages(name)))
    (problem,) = to_fix(run)
    assert problem.startswith(f"{name} is missing: pip install '{name}>=")


def test_a_wrong_version_and_a_missing_one(tmp_path, packages):
    folder = packages("tqdm")
    (link,) = folder.glob("peft-*.dist-info")
    link.unlink()
    old = folder / "peft-0.9.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.9.0\n")
    run = doctor(tmp_path, "-S", DOCTOR, PYTHONPATH=str(folder))
    assert to_fix(run) == ["peft 0.9.0: pip install 'peft>=0.21'", "tqdm is missing: pip install 'tqdm>=4.66'"]
    assert "peft 0.9.0, expected >=0.21\n" in run.stdout


def test_a_package_that_is_there_but_broken(tmp_path, packages):
    folder = packages("safetensors/")
    (folder / "safetensors").unlink()
    (folder / "safetensors").mkdir()
    (folder / "safetensors" / "__init__.py").write_text("raise ImportError('libfast.so: cannot open shared object file\\nmore')\n")
    (problem,) = to_fix(doctor(tmp_path, "-S", DOCTOR, PYTHONPATH=str(folder)))
    # whichever of the required packages meets it first is named, with the cause
    assert "is there, but cannot be imported: ImportError: libfast.so: cannot open shared object file; pip install --force-rei" in problem


def test_versions():
    assert product.parts_of("torch>=2.11,<=2.13.0") == ("torch", ">=2.11,<=2.13.0")
    for version, bounds, good in (
        ("2.13.0+cpu", ">=2.11,<=2.13.0", True),
        ("2.13", "<=2.13.0", True),
        ("2.13.1", "<=2.13.0", False),
        ("2.9.1", ">=2.11", False),
        ("5.24.0.dev0", ">=5.17,<5.24", False),
        ("0.8.5.post1", "<0.8.5", False),
    ):
        assert product.fits(version, bounds) == good, (version, bounds)


def test_bad_pairs(monkeypatch):
    """Both of a pair must be bad; nothing is said of what is not installed."""
    known, advice = {"triton": "3.6.0", "numpy": "2.5.1", "liger-kernel": "0.8.4", "nvidia-nccl-cu12": "2.29.7"}, []
    monkeypatch.setattr(product, "version_of", known.get)
    product.versions([], advice)
    assert [line.split(":")[0] for line in advice] == ["liger-kernel 0.8.4", "triton 3.6.0 with numpy 2.5.1"]
    known |= {"numpy": "2.4.6", "liger-kernel": "0.8.5"}
    product.versions([], again := [])
    assert again == []


RANKS = """
import os, runpy, sys, torch, launch.train
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_more_ranks_than_gpus(tmp_path):
    """All that is made up is that torch counts one GPU; it does not answer, and it is one for two ranks. One rank of the host speaks."""
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}
    ranks["PYTHONPATH"] = str(ROOT)
    run = doctor(tmp_path, "-c", RANKS, DOCTOR, LOCAL_RANK="0", **ranks)
    problem = "the ranks cannot start: --nproc-per-node: got 2 ranks on this host, expected at most 1, one for each of its GPUs"
    assert to_fix(run)[-1] == problem and [text for text in to_fix(run) if text.startswith("cuda:0 does not answer: ")], run.stdout
    run = doctor(tmp_path, "-c", RANKS, DOCTOR, LOCAL_RANK="1", **ranks | {"RANK": "1"})
    assert run.returncode == 1 and "to fix" not in run.stdout and "Traceback" not in run.stderr


@pytest.mark.gpu
def test_more_ranks_than_real_gpus(tmp_path):
    ranks = str(torch.cuda.device_count() + 1)
    run = doctor(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, DOCTOR)
    assert run.returncode == 1 and run.stdout.count(f"got {ranks} ranks on this host") == 1 and 'doctor.py", line' not in run.stderr


@pytest.mark.gpu
def test_each_gpu_in_turn(tmp_path):
    run = doctor(tmp_path, DOCTOR)
    assert run.returncode == 0, run.stdout + run.stderr
    for i in range(torch.cuda.device_count()):
        assert f"trained 2 steps on cuda:{i}: loss " in run.stdout


def test_a_failing_step(tmp_path):
    """Of two ranks, where a file stands in the way of `runs`: said once or twice, as a finding."""
    (tmp_path / "runs").write_text("")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = doctor(tmp_path, *torchrun, DOCTOR)
    assert run.returncode == 1 and 'doctor.py", line' not in run.stderr, run.stdout + run.stderr
    found = [line for line in run.stdout.splitlines() if line.startswith("- a training step fails on cpu, rank ")]
    assert found and all("ValueError: output_dir: runs/.doctor-" in line and "Not a directory" in line for line in found), run.stdout


def test_each_device_has_its_turn(monkeypatch, tmp_path, one_rank):
    """Two GPUs, alone: the steps are the CPU's here; the loss fails on the second device, which is named, and the third is tried."""
    fatal, turns, step, loss = [], [], product.step, sft.loss
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", turns.append)
    monkeypatch.setattr(product, "step", lambda device, folder: step(one_rank, folder))

    def failing(*args):
        if turns == [0, 1]:
            raise RuntimeError("no kernel image is available\nlong text")
        return loss(*args)

    monkeypatch.setattr(sft, "loss", failing)
    product.train(torch.device("cuda", 0), str(tmp_path), fatal)
    assert turns[:3] == [0, 1, 2] and list(tmp_path.iterdir()) == []
    words = "a training step fails on cuda:1: RuntimeError: no kernel image is available; if the others work, "
    assert len(fatal) == 1 and fatal[0].startswith(words)


def test_room_for_a_recipe(tmp_path, monkeypatch):
    """A run of ten million checkpoints has none; a folder of half a GiB is enough for the default, and is warned of without a recipe."""
    recipe, fatal, advice = tmp_path / "huge.yaml", [], []
    text = (ROOT / "launch" / "recipes" / "sft.yaml").read_text().replace("max_steps: 400", "max_steps: 10000000")
    recipe.write_text(text.replace("save_steps: 100", "save_steps: 1\n  save_total_limit: null"))
    monkeypatch.chdir(tmp_path)
    assert product.disk(str(recipe), None, fatal, advice) == "runs"
    problem = fatal.pop()
    assert " for 10000000 checkpoints of " in problem and " are free for runs/sft: make room, " in problem
    assert product.disk(None, None, fatal, advice) == "runs"
    assert fatal + advice == []
    usage = product.shutil.disk_usage("/")._replace(free=2**29)
    monkeypatch.setattr(product.shutil, "disk_usage", lambda path: usage)
    product.disk(None, None, fatal, advice)
    assert fatal == [] and advice == ["only 0.50 GiB free for runs: --config RECIPE says whether its run has room there"]
    product.disk(str(ROOT / "launch" / "recipes" / "sft.yaml"), "elsewhere", fatal, [])
    assert fatal == []


def test_a_recipe_that_would_be_refused(tmp_path):
    recipe = tmp_path / "x.yaml"
    recipe.write_text("output_dir: runs/x\nmodel: {model_name_or_path: builtin:tiny}\ndata: {train: nowhere.jsonl}\n")
    product.disk(str(recipe), str(tmp_path), fatal := [], [])
    assert len(fatal) == 1 and fatal[0].startswith(f"{recipe} would be refused: nowhere.jsonl: no such file; ")
