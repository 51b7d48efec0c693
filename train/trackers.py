"""Where a run's numbers go beside metrics.jsonl: a class per name of `log.report_to`, over its own library, imported only when named.

Each has `scalars(step, numbers)`, `samples(step, samples)` and `close()`. A run that goes on after a kill goes on in its old page there.
Addresses and keys are the libraries' own business: WANDB_MODE, WANDB_API_KEY, MLFLOW_TRACKING_URI, TRACKIO_DIR and their like.
"""

import html
import importlib
import json
import os
import re
from pathlib import Path

from train import config


def library(name, package):
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise ValueError(f"log.report_to: {name.partition('.')[0]} is not installed ({e}): pip install {package}") from e


def open_all(output_dir, log, settings, first):
    """The trackers of `log.report_to`. settings: the run's, nested; first: the step that comes next."""
    return [TRACKERS[name](Path(output_dir), log, settings, first) for name in log.report_to]


def check(log):
    """ValueError where a library that `log.report_to` names is not there."""
    for name in log.report_to:
        library(*TRACKERS[name].library)


def escaped(value):
    """A cell of a Markdown table, shown letter by letter."""
    return re.sub(r"([\\|*_`])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def as_text(sample):
    return "\n\n".join(f"**{name}**: {value}" for name, value in sample.items())


class TensorBoard:
    library = "torch.utils.tensorboard", "tensorboard"

    def __init__(self, folder, log, settings, first):
        self.board = library(*self.library).SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        if first == 1:
            rows = "\n".join(f"| {name} | {escaped(value)} |" for name, value in config.flat(settings).items())
            self.board.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", 0)

    def scalars(self, step, numbers):
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)

    def samples(self, step, samples):
        for i, sample in enumerate(samples[:3]):
            self.board.add_text(f"samples/{i}", as_text(sample), step)

    def close(self):
        self.board.close()


class Wandb:
    library = "wandb", "wandb"

    def __init__(self, folder, log, settings, first):
        self.wandb = library(*self.library)
        self.run = self.wandb.init(
            project=log.project,
            name=log.run_name or folder.name,
            id=remembered(folder, "wandb", first, lambda: os.urandom(4).hex()),
            resume="allow",
            dir=str(folder),
            config=settings,
        )

    def scalars(self, step, numbers):
        self.run.log(numbers, step=step)

    def samples(self, step, samples):
        table = self.wandb.Table(columns=list(samples[0]), data=[list(map(str, sample.values())) for sample in samples])
        self.run.log({"samples": table}, step=step)

    def close(self):
        self.run.finish()


class Mlflow:
    library = "mlflow", "mlflow-skinny"

    def __init__(self, folder, log, settings, first):
        self.mlflow = library(*self.library)
        experiment = self.mlflow.set_experiment(log.project).experiment_id

        def begin():
            return self.mlflow.MlflowClient().create_run(experiment, run_name=log.run_name or folder.name).info.run_id

        self.mlflow.start_run(remembered(folder, "mlflow", first, begin))
        if first == 1:
            self.mlflow.log_params({name: str(value)[:6000] for name, value in config.flat(settings).items()})  # MLflow's limit

    def scalars(self, step, numbers):
        self.mlflow.log_metrics(numbers, step=step, synchronous=False)

    def samples(self, step, samples):
        self.mlflow.log_text("\n".join(json.dumps(s, ensure_ascii=False) for s in samples), f"samples/{step}.jsonl")

    def close(self):
        self.mlflow.end_run()


class Trackio:
    library = "trackio", "trackio"

    def __init__(self, folder, log, settings, first):
        self.trackio = library(*self.library)
        name = remembered(folder, "trackio", first, lambda: f"{log.run_name or folder.name}-{os.urandom(2).hex()}")
        self.trackio.init(project=log.project, name=name, config=config.flat(settings), resume="allow" if first > 1 else "never")

    def scalars(self, step, numbers):
        self.trackio.log(numbers, step=step)

    def samples(self, step, samples):
        table = self.trackio.Table(columns=list(samples[0]), data=[list(map(str, sample.values())) for sample in samples])
        self.trackio.log({"samples": table}, step=step)

    def close(self):
        self.trackio.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def remembered(folder, name, first, make):
    """The run's number in a tracker, kept in output_dir/trackers.json; a new one where the run begins anew."""
    path = folder / "trackers.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if first == 1 or name not in known:
        known[name] = make()
        path.write_text(json.dumps(known) + "\n")
    return known[name]
