"""Is this machine fit to train? `python launch/doctor.py`, or across ranks and hosts `torchrun ... launch/doctor.py [--disk runs]`.

Looks at versions, devices, the disk, the hub and optional packages; sends a message between each two ranks and trains one real step. Ends
with what to fix, and with code 1 if that keeps a run from working.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from huggingface_hub import HfApi, get_token
from packaging.requirements import Requirement
from packaging.version import Version

from launch import train as launcher
from models import sharding
from train import config
from train.log import say

OPTIONAL = {  # what can be imported: what it is for, and how it comes
    "bitsandbytes": ("4-bit weights and 8-bit optimizers", "pip install -e '.[bnb]'"),
    "math_verify": ("answers that are formulas", "pip install -e '.[math]'"),
    "wandb": ("log.report_to: wandb", "pip install -e '.[trackers]'"),
    "mlflow": ("log.report_to: mlflow", "pip install -e '.[trackers]'"),
    "trackio": ("log.report_to: trackio", "pip install -e '.[trackers]'"),
    "matplotlib": ("launch/plot.py", "pip install -e '.[plot]'"),
}
BAD = [  # package, versions that fail, what then happens
    ("liger-kernel", "<0.8.5", "its fused cross-entropy has wrong gradients with reduction none; take 0.8.5 or later"),
    (
        "nvidia-nccl-cu13",
        ">=2.27,<=2.29.6",
        "its averages over one rank are corrupted (NVIDIA/nccl#1950): code of your own must sum",
    ),
]
MESSAGE = 2**20  # float32 numbers of the larger ping: 4 MiB


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", default="runs", help="folder that runs will write to")
    parser.add_argument("--gib", type=float, default=20, help="free space wanted there, GiB: what --dry_run says of a recipe")
    args = parser.parse_args()
    fatal, advice = [], []
    device = sharding.start_ranks(timeout_seconds=120)
    for part in (versions, devices, packages, lambda *problems: disk(args.disk, args.gib, *problems), hub):
        part(fatal, advice)
    ping(device)
    train(device, args.disk)
    fatal = [problem for problems in gathered([f"{text} (host {platform.node()})" for text in fatal]) for problem in problems]
    fatal = list(dict.fromkeys(fatal))  # the ranks of a host have the same
    say("\nto fix:" if fatal else "\nnothing has to be fixed")
    for problem in fatal:
        say(f"- {problem}")
    for problem in advice:
        say(f"- if you need it: {problem}")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(bool(fatal))  # a bare interpreter exit after gloo sometimes aborts


def versions(fatal, advice):
    """The packages that pyproject.toml asks for, and those known to be bad."""
    say(f"python {platform.python_version()}, {platform.platform()}")
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    asked = [Requirement(line.split('"')[1]) for line in text.split("dependencies = [")[1].split("\n]")[0].splitlines() if '"' in line]
    for wanted in asked:
        have = version_of(wanted.name)
        good = have and wanted.specifier.contains(have.base_version)
        say(f"{wanted.name} {have or 'missing'}{'' if good else f', expected {wanted.specifier}'}")
        if not good:
            fatal.append(f"{wanted.name} {have or 'is missing'}: pip install '{wanted}'")
    for name, bad, problem in BAD:
        have = version_of(name)
        if have and Requirement(name + bad).specifier.contains(have.base_version):
            advice.append(f"{name} {have}: {problem}")


def version_of(name):
    try:
        return Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return None


def devices(fatal, advice):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    say(f"{os.cpu_count()} CPU cores, {memory:.0f} GiB; torch built for {torch.version.cuda or torch.version.hip or 'CPU'}")
    driver = Path("/proc/driver/nvidia/version")
    if torch.cuda.is_available():
        version = driver.read_text().splitlines()[0] if driver.exists() else "unknown"
        say(f"driver: {version}; NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    for i in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(i)
        free = torch.cuda.mem_get_info(i)[0] / 2**30
        attention = "varlen" if known.major >= 8 else "sdpa"
        room = f"{known.total_memory / 2**30:.0f} GiB, {free:.0f} free"
        say(f"cuda:{i} {known.name}, {room}, compute capability {known.major}.{known.minor}, {attention} attention")
        if free < 0.9 * known.total_memory / 2**30:
            advice.append(f"cuda:{i} has only {free:.0f} GiB free: another process holds the rest (nvidia-smi)")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available() and local > torch.cuda.device_count():
        fatal.append(f"{local} ranks for {torch.cuda.device_count()} GPUs: set --nproc-per-node to that number")
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        fatal.append("there is an NVIDIA driver, but torch sees no GPU: install a torch built for CUDA that this driver supports")


def packages(fatal, advice):
    for name, (purpose, cure) in OPTIONAL.items():
        try:
            importlib.import_module(name)
            say(f"{name}: yes")
        except Exception as e:  # a kernel package can fail at import in any way
            say(f"{name}: no ({type(e).__name__})")
            advice.append(f"{name} for {purpose}: {cure}")


def disk(folder, wanted, fatal, advice):
    """Free room where runs will be written, and whether that can be done."""
    there = next(p for p in (Path(folder).resolve(), *Path(folder).resolve().parents) if p.is_dir())
    free = shutil.disk_usage(there).free / 2**30
    say(f"disk: {free:.0f} GiB free for {folder}")
    if free < wanted:
        fatal.append(f"{free:.0f} GiB free for {folder}, {wanted:g} wanted: make room, or name another folder with --disk")
    if not os.access(there, os.W_OK):
        fatal.append(f"{there} cannot be written to: choose another output_dir")


def hub(fatal, advice):
    """Whether the model hub answers, and whether there is a token; never which."""
    say(f"hub token: {'yes' if get_token() else 'no'}")
    began = time.perf_counter()
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("1", "true", "TRUE", "yes", "ON"):
        say("hub: switched off by HF_HUB_OFFLINE")
        return
    try:
        HfApi().model_info("Qwen/Qwen3-0.6B", timeout=10)
        say(f"hub: answers in {time.perf_counter() - began:.1f} s")
    except Exception as e:
        say(f"hub: no answer ({type(e).__name__})")
        advice.append("the hub cannot be reached: name local folders and files, or set HF_ENDPOINT or https_proxy")


def ping(device):
    """Each rank with each, there and back: one number for the delay, 4 MiB for the speed. The slowest pairs show a bad link."""
    rank, ranks, mine = dist.get_rank(), dist.get_world_size(), []
    for a, b in itertools.combinations(range(ranks), 2):
        for size in (1, 1, MESSAGE) if rank in (a, b) else ():  # the first makes the connection
            message = torch.ones(size, device=device)
            began = time.perf_counter()
            for source, target in ((a, b), (b, a)):
                dist.send(message, target) if rank == source else dist.recv(message, source)
            float(message[0])  # waits for the device
            mine.append((time.perf_counter() - began, size, f"{a}-{b}"))
        dist.barrier()
    pings = [p for part in gathered(mine) for p in part]
    if not pings:
        say("ping: one rank alone; under torchrun each pair of ranks is tried")
        return
    delays, copies = ([p for p in pings if p[1] == size] for size in (1, MESSAGE))
    connected = sorted({pair: seconds for seconds, _, pair in delays}.items(), key=lambda p: -p[1])  # the second time of each
    speeds = sorted((2 * MESSAGE * 4 / 2**30 / seconds, pair) for seconds, _, pair in copies)
    say(f"ping of {len(connected)} pairs of ranks: slowest " + ", ".join(f"{pair} {1e3 * s:.2f} ms" for pair, s in connected[:3]))
    say("4 MiB there and back: slowest " + ", ".join(f"{pair} {speed:.2f} GiB/s" for speed, pair in speeds[:3]))


def gathered(value):
    """Every rank's value, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def train(device, folder):
    """Two real steps of the embedded default over all ranks, in a folder beside the runs that is then removed."""
    folder = gathered(str(Path(folder, f".doctor-{os.urandom(4).hex()}")))[0]
    options = f"--algorithm sft --train.max_steps 2 --data.eval null --evaluation.generate 0 --log.report_to [] --output_dir {folder}"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            launcher.run(config.parse(options.split()), device, {})
        last = json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-1])
        dist.barrier()
    except Exception as e:
        print(f"to fix:\n- a training step fails on {device}, rank {dist.get_rank()}: {type(e).__name__}: {e}", flush=True)
        os._exit(1)  # the launcher ends the other ranks, which may wait for this one
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    say(f"trained 2 steps on {dist.get_world_size()} x {device.type}: loss {last['loss']:.3f}, {last['tokens_per_second']:.0f} tokens/s")


if __name__ == "__main__":
    main()
