"""Is this machine fit to train? `python launch/doctor.py`, or across ranks and hosts `torchrun ... launch/doctor.py [--config RECIPE]`.

Looks at versions, devices, optional packages, the hub and the disk; sends a message between each two ranks and trains one real step, over
all ranks or, alone, on each GPU in turn. Ends with what to fix, and with code 1 if that keeps a run from working.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import itertools
import json
import operator
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:
    sys.exit(f"to fix:\n- python {sys.version.split()[0]} is too old: make an environment of 3.11 or 3.12")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Nothing but the standard library is imported up here: a package that is missing or broken must be said, not raised.

OPTIONAL = {  # what can be imported: what it is for, and how it comes; attention packages stand in models/attention.py
    "liger_kernel.transformers": ("model.kernels", "pip install -e '.[liger]'"),
    "torchao.float8": ("model.float8", "pip install -e '.[float8]'"),
    "bitsandbytes": ("4-bit weights and 8-bit optimizers", "pip install -e '.[bnb]'"),
    "math_verify": ("answers that are formulas", "pip install -e '.[math]'"),
    "wandb": ("log.report_to: wandb", "pip install -e '.[trackers]'"),
    "mlflow": ("log.report_to: mlflow", "pip install -e '.[trackers]'"),
    "trackio": ("log.report_to: trackio", "pip install -e '.[trackers]'"),
    "matplotlib": ("launch/plot.py", "pip install -e '.[plot]'"),
}
NCCL = "its averages over one rank are corrupted (NVIDIA/nccl#1950): code of your own must sum"
BAD = [  # versions that fail, of one package or together; what then happens
    ({"liger-kernel": "<0.8.5"}, "its fused cross-entropy has wrong gradients with reduction none; take 0.8.5 or later"),
    ({"nvidia-nccl-cu12": ">=2.27,<=2.29.6"}, NCCL),
    ({"nvidia-nccl-cu13": ">=2.27,<=2.29.6"}, NCCL),
    ({"triton": ">=3.6,<3.7", "numpy": ">=2.5"}, "under TRITON_INTERPRET=1, Liger's cross-entropy fails on arrays; take numpy 2.4"),
]
MODULES = {"pyyaml": "yaml"}  # packages whose module is not called as they are
COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt}
MESSAGE = 2**20  # float32 numbers of the larger ping: 4 MiB


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="RECIPE", help="YAML file of a run: is there room for what it will write?")
    parser.add_argument("--disk", metavar="FOLDER", help="where runs will be written; default: the recipe's output_dir, or runs")
    args = parser.parse_args()
    fatal, advice = [], []
    for part in (versions, imports):
        part(fatal, advice)
        if fatal:  # nothing below would work
            end(fatal, advice, speaks=is_first("LOCAL_RANK"))
    for part in (devices, packages, hub):
        try:
            part(fatal, advice)
        except Exception as e:  # of a driver, or of what a package brings along
            fatal.append(f"{part.__name__} cannot be looked at: {in_a_line(e)}")
    folder = disk(args.config, args.disk, fatal, advice)
    device = start(fatal)
    if device is None:
        end(fatal, advice, speaks=is_first("LOCAL_RANK"))
    for what, part in (("a message between ranks", lambda: ping(device)), ("a training step", lambda: train(device, folder, fatal))):
        try:
            part()
        except Exception as e:  # of any type, from the network to a kernel
            fatal.append(f"{what} fails on {device}, rank {os.environ.get('RANK', '0')}: {in_a_line(e)}")
            end(fatal, advice, speaks=True)  # the launcher ends the other ranks, which may wait for this one
    end(fatal, advice, speaks=is_first(), together=True)


def say(text):
    if is_first():
        print(text, flush=True)


def is_first(of="RANK"):
    return os.environ.get(of, "0") == "0"


def in_a_line(error):
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def end(fatal, advice, speaks, together=False):
    """Say what is to fix, and end this process. together: all ranks are here, and the first speaks for them."""
    fatal = [f"{problem} (host {platform.node()})" for problem in fatal]
    if together:
        import torch.distributed as dist

        fatal = list(dict.fromkeys(itertools.chain(*gathered(fatal))))  # the ranks of a host have the same
        dist.barrier()
        dist.destroy_process_group()
    if speaks:
        lines = ["to fix:" if fatal else "nothing has to be fixed", *(f"- {problem}" for problem in fatal)]
        print("\n" + "\n".join([*lines, *(f"- if you need it: {problem}" for problem in advice)]), flush=True)
    os._exit(bool(fatal))  # a bare interpreter exit after gloo sometimes aborts


def versions(fatal, advice):
    """Python and the packages that pyproject.toml asks for, and versions that are known to be bad."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    say(f"python {platform.python_version()}, {platform.platform()}")
    if not fits(platform.python_version(), project["requires-python"]):
        fatal.append(f"python {platform.python_version()}, expected {project['requires-python']}: make an environment of such a one")
    for wanted in project["dependencies"]:
        name, bounds = parts_of(wanted)
        have = version_of(name)
        good = have and fits(have, bounds)
        say(f"{name} {have or 'missing'}{'' if good else f', expected {bounds}'}")
        if not good:
            fatal.append(f"{name} {have or 'is missing'}: pip install '{wanted}'")
    for pair, problem in BAD:
        have = {name: version_of(name) for name in pair}
        if all(version and fits(version, pair[name]) for name, version in have.items()):
            advice.append(f"{' with '.join(f'{name} {version}' for name, version in have.items())}: {problem}")


def parts_of(requirement):
    """torch>=2.11,<=2.13.0 as its name and its bounds."""
    return re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()


def fits(version, bounds):
    """Whether a version, by its numbers alone, lies in bounds such as >=2.11,<2.14; `packaging` may be what is missing."""

    def numbers(text):
        found = [int(n) for n in re.match(r"\d+(?:\.\d+)*", text)[0].split(".")]
        while found and not found[-1]:  # 2.13.0 is 2.13
            found.pop()
        return found

    tests = (re.fullmatch(r"([<>=!]+)(.+)", bound.strip()).groups() for bound in bounds.split(","))
    return all(COMPARE[sign](numbers(version), numbers(limit)) for sign, limit in tests)


def version_of(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def imports(fatal, advice):
    """Whether the required packages can be imported, and then the project; the first that cannot, as others may need it."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, _ in map(parts_of, required):
        try:
            importlib.import_module(MODULES.get(name, name))
        except Exception as e:  # a broken package can fail in any way
            cure = f"pip install --force-reinstall {name}"
            fatal.append(f"{name} {version_of(name)} is there, but cannot be imported: {in_a_line(e)}; {cure}")
            return
    try:
        importlib.import_module("launch.train")
    except Exception as e:
        fatal.append(f"{ROOT / 'launch' / 'train.py'} cannot be imported: {in_a_line(e)}")


def devices(fatal, advice):
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    say(f"{os.cpu_count()} CPU cores, {memory:.0f} GiB; torch built for {torch.version.cuda or torch.version.hip or 'CPU'}")
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            fatal.append("there is an NVIDIA driver, but torch sees no GPU: install a torch built for CUDA that this driver supports")
        return
    for i in range(torch.cuda.device_count()):
        try:
            known, free = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)[0] / 2**30
        except Exception as e:  # of the driver
            fatal.append(f"cuda:{i} does not answer: {in_a_line(e)}; see nvidia-smi, and leave it out with CUDA_VISIBLE_DEVICES")
            continue
        room = f"{known.total_memory / 2**30:.0f} GiB, {free:.0f} free"
        attention = "varlen" if known.major >= 8 else "sdpa"
        say(f"cuda:{i} {known.name}, {room}, compute capability {known.major}.{known.minor}, {attention} attention")
        if free < 0.9 * known.total_memory / 2**30:
            advice.append(f"cuda:{i} has only {free:.0f} GiB free: another process holds the rest (nvidia-smi)")
    driver = Path("/proc/driver/nvidia/version")
    version = driver.read_text().splitlines()[0] if driver.exists() else "unknown"
    say(f"driver: {version}; NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")


def packages(fatal, advice):
    """Optional packages, each really imported: that one is installed does not say that it works with this torch."""
    import torch

    from models import attention

    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    kernels = {module: (f"model.attn_implementation: {name}", cure) for name, (*_, module, cure) in attention.KERNELS.items() if module}
    elsewhere = {module for low, high, _, module, _ in attention.KERNELS.values() if not low <= major <= high}  # for other GPUs
    for name, (purpose, cure) in (kernels | OPTIONAL).items():
        try:
            importlib.import_module(name)
            say(f"{name}: importable yes")
        except Exception as e:  # a kernel package can fail at import in any way
            say(f"{name}: importable no ({in_a_line(e)})")
            missing = isinstance(e, ModuleNotFoundError) and name.startswith(e.name or "?")
            if name not in elsewhere:
                advice.append(f"{name} for {purpose}: {cure}" + ("" if missing else f"; it is there, but fails: {in_a_line(e)}"))


def hub(fatal, advice):
    """Whether the model hub answers, and whether there is a token; never which."""
    from huggingface_hub import HfApi, get_token

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


def disk(recipe, folder, fatal, advice):
    """Whether there is room for what a recipe will write, by the dry run's count; returns the folder that runs stand in."""
    from launch import train as launcher
    from train import checkpoint, config, dry_run

    cfg = config.parse(["--config", recipe]) if recipe else None
    place = folder or (cfg.output_dir if cfg else "runs")
    there = next(p for p in (Path(place).resolve(), *Path(place).resolve().parents) if p.exists())
    free = checkpoint.free_bytes(place)
    say(f"disk: {dry_run.in_words(free)} free for {place}")
    if not os.access(there, os.W_OK):
        fatal.append(f"{there} cannot be written to: choose another output_dir")
    if free < 2**30:
        advice.append(f"only {dry_run.in_words(free)} free for {place}: --config RECIPE says whether its run has room there")
    if cfg is None:
        return place
    try:
        size, saves, final = dry_run.written(cfg, launcher.ALGORITHMS[cfg.algorithm])
        coming, need = checkpoint.needed(place, cfg.checkpoint, size, final, saves)
        words = f"{dry_run.in_words(need)} for {coming} checkpoints of {dry_run.in_words(size)} and {dry_run.in_words(final)} of final/"
        say(f"{recipe} will write {words}")
        if need > free:
            cure = "make room, lower checkpoint.save_total_limit, or choose another output_dir"
            fatal.append(f"{recipe} needs {words}, but {dry_run.in_words(free)} are free for {place}: {cure}")
    except ValueError as e:
        fatal.append(f"{recipe} would be refused: {str(e).splitlines()[0]}")
    return folder or str(Path(cfg.output_dir).parent)


def start(fatal):
    """This rank's device, in a process group of all ranks; or None, and the reason is in `fatal`."""
    from models import sharding

    try:
        return sharding.start_ranks(timeout_seconds=120)
    except (ValueError, RuntimeError) as e:  # more ranks than GPUs; ranks that do not meet
        fatal.append(f"the ranks cannot start: {str(e).splitlines()[0]}")


def ping(device):
    """Each rank with each, there and back: one number for the delay, 4 MiB for the speed. The slowest pairs show a bad link."""
    import torch
    import torch.distributed as dist

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
    import torch.distributed as dist

    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def train(device, folder, fatal):
    """Two real steps over all ranks; alone, on each GPU in turn, where one that fails is noted and the next tried."""
    import torch
    import torch.distributed as dist

    if dist.get_world_size() > 1 or device.type != "cuda":
        step(device, folder)
        return
    for i in range(torch.cuda.device_count()):
        try:
            torch.cuda.set_device(i)
            step(torch.device("cuda", i), folder)
        except Exception as e:
            fatal.append(f"a training step fails on cuda:{i}: {in_a_line(e)}; if the others work, leave it out with CUDA_VISIBLE_DEVICES")
    torch.cuda.set_device(device)


def step(device, folder):
    """Two steps of the embedded default, in a folder beside the runs that is then removed."""
    import torch.distributed as dist

    from launch import train as launcher
    from train import config

    folder = gathered(str(Path(folder, f".doctor-{os.urandom(4).hex()}")))[0]
    options = f"--algorithm sft --train.max_steps 2 --data.eval null --evaluation.generate 0 --log.report_to [] --output_dir {folder}"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            launcher.run(config.parse(options.split()), device, {})
        last = json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-1])
        dist.barrier()
    finally:
        if is_first():
            shutil.rmtree(folder, ignore_errors=True)
    where = f"{dist.get_world_size()} x {device.type}" if dist.get_world_size() > 1 else str(device)
    say(f"trained 2 steps on {where}: loss {last['loss']:.3f}, {last['tokens_per_second']:.0f} tokens/s")


if __name__ == "__main__":
    main()
