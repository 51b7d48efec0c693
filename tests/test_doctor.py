"""launch/doctor.py as a person runs it: alone, and over two ranks."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECRET = "hf_" + "q" * 34


def doctor(tmp_path, *command):
    environment = os.environ | {"HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180)


def test_two_ranks_ping_and_train(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = doctor(tmp_path, *torchrun, str(ROOT / "launch" / "doctor.py"), "--gib", "0")
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert [line for line in lines if line.startswith("ping of 1 pairs of ranks: slowest 0-1 ")], run.stdout
    assert [line for line in lines if line.startswith("trained 2 steps on 2 x ")] and "nothing has to be fixed" in lines
    assert "hub token: yes" in lines and SECRET not in run.stdout + run.stderr
    assert list(Path(tmp_path, "runs").glob("*")) + list(Path(tmp_path, "runs").glob(".*")) == []


def test_alone_on_a_full_disk(tmp_path):
    run = doctor(tmp_path, str(ROOT / "launch" / "doctor.py"), "--gib", "1e9")
    assert run.returncode == 1, run.stdout + run.stderr
    (problem,) = [line for line in run.stdout.split("to fix:")[1].splitlines() if line.startswith("- ") and "if you need it" not in line]
    assert "GiB free for runs, 1e+09 wanted: make room, or name another folder with --disk" in problem
    assert "trained 2 steps on 1 x " in run.stdout
