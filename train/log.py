"""What a run tells: metrics.jsonl and the trackers, lines or a progress bar on the console, run_status.json. Rank 0 writes."""

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from train import trackers

SHOWN = ("loss", "reward", "completions/mean_length", "grad_norm", "learning_rate", "mean_token_accuracy", "tokens_per_second")


def say(text=""):
    """A line on the console, from rank 0, without breaking a progress bar."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def write_json(path, value):
    """A whole JSON file or none."""
    temporary = Path(f"{path}.{os.urandom(4).hex()}")  # several ranks may fail at once
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def write_status(output_dir, state, step, error=None):
    """run_status.json: for scripts, as torchrun turns every exit code into 1. state: running, finished, preempted or failed."""
    if dist.is_initialized() and dist.get_rank() != 0 and error is None:
        return
    path = Path(output_dir, "run_status.json")
    if error and path.exists() and json.loads(path.read_text())["state"] == "failed":
        return  # the first rank's cause; the others only lost their peer
    write_json(path, {"state": state, "step": step, "error": error, "time": time.time()})


class Log:
    """The open files of a run's metrics."""

    def __init__(self, output_dir, cfg, settings, first, last, again=None):
        """settings: the run's, for the trackers. first: the step that comes next; lines of it and later ones, left by a killed run, are
        taken out of the .jsonl files.

        again: the step before, if its evaluation is yet to come; then its lines too, but for a rollout's samples.
        """
        self.path, self.every, self.last = Path(output_dir, "metrics.jsonl"), cfg.logging_steps, last
        self.bar, self.file, self.trackers = None, None, []
        if dist.get_rank() != 0:
            return
        for path in (self.path, self.path.with_name("samples.jsonl")):
            rows = [(line, json.loads(line)) for line in complete_lines(path) if first > 1]
            kept = [line for line, row in rows if row["step"] < first and (row["step"] != again or "advantage" in row)]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            os.replace(temporary, path)
        self.file = open(self.path, "a")  # noqa: SIM115  open for as long as the run
        self.trackers = trackers.open_all(output_dir, cfg, settings, again or first)
        if sys.stderr.isatty():
            self.bar = tqdm(total=last, initial=first - 1, unit="step", dynamic_ncols=True)

    def write(self, step, metrics):
        """One object of metrics.jsonl, and its numbers to the trackers."""
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step} | metrics) + "\n")
        self.file.flush()
        self.scalars(step, metrics)
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix({k: f"{metrics[k]:.4g}" for k in SHOWN[:3]}, refresh=False)
        elif step % self.every == 0 or step == self.last:
            say(f"step {step}/{self.last}  " + "  ".join(f"{k} {metrics[k]:.4g}" for k in SHOWN if k in metrics))

    def scalars(self, step, metrics):
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        for tracker in self.trackers if numbers else ():
            tracker.scalars(step, numbers)

    def samples(self, step, samples):
        """Generated answers, each a dict of strings: to samples.jsonl and the trackers."""
        if self.file is None or not samples:
            return
        with open(self.path.with_name("samples.jsonl"), "a") as f:
            f.writelines(json.dumps({"step": step} | s, ensure_ascii=False) + "\n" for s in samples)
        for tracker in self.trackers:
            tracker.samples(step, samples)

    def close(self):
        for part in (self.bar, self.file, *self.trackers):
            if part is not None:
                part.close()


def complete_lines(path):
    """Lines of a JSONL file without the half-written last one that a kill may leave."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
