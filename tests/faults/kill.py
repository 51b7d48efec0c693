"""Kill runs at random moments, 200 times, and compare what they come to with a run that nothing disturbed.

python tests/faults/kill.py --kills 200          # SIGKILL to both ranks, every second time once a save has begun
python tests/faults/kill.py --clean 50    # runs that nothing disturbs: exit codes
python tests/faults/kill.py --steps 2000  # one long run: memory and open files
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import psutil  # noqa: E402
from nursery import Nursery  # noqa: E402

from tests.conftest import SHAPES, plain  # noqa: E402

STEPS = 24


def expected_of(run):
    """What a run came to that nothing disturbed."""
    samples = run.folder / "samples.jsonl"
    return {"rows": run.metrics(), "final": run.folder / "final", "samples": samples.read_bytes() if samples.exists() else b""}


def difference(run, expected):
    """What differs from it, or None: every line but its timings, every byte of what was trained, every sampled answer."""
    if [json.dumps(plain(row)) for row in run.metrics()] != [json.dumps(plain(row)) for row in expected["rows"]]:
        return "metrics.jsonl"
    for path in sorted(expected["final"].glob("*.safetensors")):
        if (run.folder / "final" / path.name).read_bytes() != path.read_bytes():
            return path.name
    samples = run.folder / "samples.jsonl"
    return None if (samples.read_bytes() if samples.exists() else b"") == expected["samples"] else "samples.jsonl"


def assert_same(run, expected):
    different = difference(run, expected)
    assert different is None, f"{different} differs\n{run.console.read_text()[-3000:]}"


def settings_of(folder, inputs, steps, **changes):
    known = {
        "output_dir": str(folder),
        "model.model_name_or_path": f"{inputs}/model",
        "data.train": f"{inputs}/rows.jsonl",
        "train.global_batch_size": 8,
        "train.micro_batch_tokens": 256,
        "train.max_steps": steps,
        "train.learning_rate": 1e-3,
        "checkpoint.save_steps": 1,
        "log.report_to": [],
    }
    return known | {key.replace("__", "."): value for key, value in changes.items()}


def make_inputs(folder):
    """A tiny model with weights, and rows."""
    import torch
    from transformers import AutoModelForCausalLM

    from train import toy

    toy.write_model("tiny", folder / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPES["llama"], dtype=torch.float32).save_pretrained(folder / "model")
    stream = random.Random(0)
    rows = [{"prompt": "ab:", "completion": "".join(stream.choices("abcdefgh", k=stream.randint(2, 20)))} for _ in range(50)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def kills(nursery, folder, number, seconds):
    """Print what came of it; returns whether all was well."""
    expected = expected_of(nursery.start(settings_of(folder / "whole", folder, STEPS), 2).good())
    stream, began = random.Random(0), time.monotonic()
    killed = inside = runs = different = unloadable = lost = 0
    while killed < number and time.monotonic() - began < seconds:
        given = settings_of(folder / f"run{runs}", folder, STEPS, checkpoint__async_save=runs % 2 == 1)
        runs += 1
        for _ in range(6):
            started = time.time()
            run = nursery.start(given, 2)
            done = len(run.metrics())
            while len(run.metrics()) == done and not run.ended():
                time.sleep(0.002)
            time.sleep(stream.random() * 0.15)
            while killed % 2 and not run.ended() and not [*run.folder.glob(".tmp-checkpoint-*")]:
                time.sleep(0.0005)
            if run.ended():
                break
            run.kill()
            killed, inside = killed + 1, inside + any(p.stat().st_mtime > started for p in run.folder.glob(".tmp-checkpoint-*"))
            newest = max((int(p.name.partition("-")[2]) for p in run.folder.glob("checkpoint-*")), default=0)
            lost = max(lost, len(run.metrics()) - newest)
        last = nursery.start(given, 2)
        unloadable += set(last.wait(120)) != {0} or "rejected" in last.console.read_text()
        different += difference(last, expected) is not None
        shutil.rmtree(run.folder)
        print(
            f"{killed} kills in {runs} runs, {inside} of them inside a save; unloadable: {unloadable}; different: {different}", flush=True
        )
    print(
        f"{killed} kills, {inside} inside a save, {unloadable} unloadable checkpoints, {different} different trajectories of {runs}, "
        f"at most {lost} steps lost; {time.monotonic() - began:.0f} s"
    )
    if inside < 0.3 * killed:
        print("too few kills were inside a save for this to say much")
    return not (unloadable or different or lost > 1 or inside < 0.3 * killed)


def clean(nursery, folder, number):
    codes = [nursery.start(settings_of(folder / f"clean{i}", folder, 2), 2).wait() for i in range(number)]
    good = sum(set(pair) == {0} for pair in codes)
    print(f"{good} of {number} clean runs of two ranks ended with code 0")
    return good == number


def long_run(nursery, folder, steps):
    """Resident memory and open files of rank 0 over a run."""
    run = nursery.start(settings_of(folder / "long", folder, steps, checkpoint__save_steps=200, log__logging_steps=200), 2)
    process, seen = psutil.Process(run.pids[0]), []
    while not run.ended():
        step = len(run.metrics())
        if step >= 200 and (not seen or step > seen[-1][0]):
            try:
                seen.append((step, process.memory_info().rss, process.num_fds()))
            except psutil.NoSuchProcess:
                break
        time.sleep(0.5)
    run.good()
    slope = statistics.linear_regression([s for s, _, _ in seen], [r for _, r, _ in seen]).slope
    files = [n for _, _, n in seen]
    times = sorted(row["step_time"] for row in run.metrics()[200:])
    p95 = times[int(0.95 * len(times))] / statistics.median(times)
    print(f"{steps} steps: {slope / 1024:.2f} KiB a step, {min(files)} to {max(files)} open files, 95th percentile {p95:.2f} x median step")
    return slope < 1024 and min(files) == max(files)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--clean", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=7200, help="stop killing after so long")
    args = parser.parse_args()
    folder, nursery = Path(tempfile.mkdtemp()), Nursery()
    make_inputs(folder)
    good = [
        not args.kills or kills(nursery, folder, args.kills, args.seconds),
        not args.clean or clean(nursery, folder, args.clean),
        not args.steps or long_run(nursery, folder, args.steps),
    ]
    nursery.close()
    shutil.rmtree(folder)
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
