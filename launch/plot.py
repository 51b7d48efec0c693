"""Curves of one or several runs in one PNG: `python launch/plot.py runs/dpo runs/simpo [--output curves.png] [--metrics loss grad_norm]`.

Reads each run's metrics.jsonl, also while it is being written. Held-out values are dots, everything else is a line, smoothed where a run
is long, with the raw one faint behind it. Needs matplotlib: pip install -e '.[plot]'.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

SHOWN = {  # metric: what its axis is called, whatever the algorithm; those that no run has are left out
    "loss": "loss",
    "nll_loss": "cross-entropy, nats a token",
    "reward": "mean reward",
    "frac_reward_zero_std": "share of prompts, same reward",
    "rewards/chosen": "mean reward",
    "rewards/rejected": "mean reward",
    "rewards/margins": "mean reward margin",
    "rewards/accuracies": "share of pairs ranked right",
    "log_odds_chosen": "log odds ratio, nats",
    "logps/chosen": "mean log-prob, nats",  # an answer's, or with SimPO and ORPO a token's
    "logps/rejected": "mean log-prob, nats",
    "exact_match": "share of right answers",
    "mean_token_accuracy": "share of tokens ranked first",
    "grad_norm": "gradient norm",
    "completions/mean_length": "mean answer length, tokens",
    "kl": "KL divergence, nats",
    "entropy": "entropy, nats a token",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens/s",
    "peak_memory_gib": "peak memory of a rank, GiB",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output_dir of a run")
    parser.add_argument("--output", default="curves.png", help="file to write; its suffix says the format")
    parser.add_argument("--metrics", nargs="+", help="names in metrics.jsonl, instead of the usual ones that the runs have")
    args = parser.parse_args()
    try:
        draw({run: read(run) for run in args.runs}, args.metrics, args.output)
    except ValueError as e:
        sys.exit(f"plot.py: {e}")
    print(f"wrote {args.output}")


def read(run):
    """{metric: ([steps], [values])} of a run's metrics.jsonl."""
    path, curves = Path(run, "metrics.jsonl"), {}
    if not path.exists():
        raise ValueError(f"{run} has no metrics.jsonl; name the output_dir of a run")
    for line in path.read_text().splitlines(keepends=True):
        for name, value in json.loads(line).items() if line.endswith("\n") else ():  # the last line may be half-written
            if isinstance(value, (int, float)) and name != "step":
                steps, values = curves.setdefault(name, ([], []))
                steps.append(json.loads(line)["step"])
                values.append(value)
    return curves


def names_of(runs):
    """{run: the end of its path, as short as tells it from the others}."""
    paths = {run: Path(os.path.abspath(run)).parts for run in runs}

    def name(run):
        same = [parts for parts in paths.values() if parts != paths[run]]
        ends = (paths[run][-n:] for n in range(1, len(paths[run]) + 1))
        return next((end for end in ends if end not in [parts[-len(end) :] for parts in same]), paths[run])

    return {run: str(Path(*name(run))) for run in runs}


def smoothed(values, width):
    """Means of what lies within `width` before and behind each value."""
    return [sum(near) / len(near) for near in (values[max(0, i - width) : i + width + 1] for i in range(len(values)))]


def draw(runs, metrics, output):
    """One panel a metric, one colour a run. ValueError: a metric that no run has, or no matplotlib."""
    try:
        import matplotlib
    except ImportError as e:
        raise ValueError("needs matplotlib: pip install -e '.[plot]'") from e
    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    known = {name for curves in runs.values() for name in curves}
    if unknown := [name for name in metrics or () if not {name, f"eval/{name}"} & known]:
        raise ValueError(f"no run has {unknown[0]}; there are {', '.join(sorted(known))}")
    names = metrics or [name for name in SHOWN if {name, f"eval/{name}"} & known]
    last = max((steps[-1] for curves in runs.values() for steps, _ in curves.values()), default=1)
    if not names:
        raise ValueError(f"{', '.join(runs)}: no step is written yet")
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)  # inches
    called, legend = names_of(runs), {}
    for axis, name in zip(axes.flat, names):
        for (run, curves), colour in zip(runs.items(), pyplot.get_cmap("tab10").colors * len(runs)):
            steps, values = curves.get(name, ((), ()))
            width = len(values) // 100
            axis.plot(steps, values, color=colour, alpha=0.25 if width else 1, label=called[run] if steps and not width else None)
            if width:
                axis.plot(steps, smoothed(values, width), color=colour, label=called[run])
            held_out = curves.get(f"eval/{name}", ((), ()))
            axis.plot(*held_out, "o:", color=colour, label=f"{called[run]}, held-out" if held_out[0] else None)
        axis.set(xlabel="step", title=name, xlim=(-0.03 * last, 1.03 * last))
        axis.set_ylabel(SHOWN.get(name, name), fontsize="small")
        if SHOWN.get(name, "").startswith("share of"):
            axis.set_ylim(-0.05, 1.05)
        axis.grid(alpha=0.3)
        for line, label in zip(*axis.get_legend_handles_labels()):  # a panel may lack what others show
            legend.setdefault(label, line)
        if name == "learning_rate":
            axis.ticklabel_format(axis="y", scilimits=(0, 0))
    for axis in axes.flat[len(names) :]:
        axis.remove()
    order = [label for name in called.values() for label in (name, f"{name}, held-out") if label in legend]
    figure.legend([legend[label] for label in order], order, loc="outside upper center", ncols=4)
    figure.savefig(output, dpi=90)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
