"""All benchmarks, one after another, and one table of what they found: `python tests/benchmarks/run.py [--output FILE] [--only sft]`

Each runs ours and its peer in turn, in processes of their own, and compares their loss curves before it prints a ratio (GRPO's sides draw
other completions, so there only costs are compared). One that fails is named in the table, and the others still run. About an hour on two
CPU cores; nothing else should run beside them.
"""

import argparse
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).parent
BENCHMARKS = {
    "sft": "sft_vs_trl.py",
    "sft of adapters": "sft_vs_trl.py --lora",
    "preference": "preference_vs_trl.py",
    "grpo": "grpo_vs_trl.py",
}
SMALLEST = {  # to see that they run; the figures mean nothing
    "sft": "--steps 4 --repeats 1 --trial-steps 0",
    "sft of adapters": "--steps 4 --repeats 1 --trial-steps 0",
    "preference": "--steps 4 --repeats 1 --algorithms dpo",
    "grpo": "--steps 4 --repeats 1 --prompts 1 --tokens 16",
}


def measure(name, arguments):
    """Run one benchmark; returns its part of the table: what it was called with, and the rows that it printed."""
    script, *given = f"{BENCHMARKS[name]} {arguments}".split()
    command = [sys.executable, str(HERE / script), *given]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    kept = [line for line in lines if line.startswith("|") or "largest difference" in line]
    if process.returncode:
        kept.append(f"failed with exit code {process.returncode}: {next((line for line in reversed(lines) if line), '')}")
    return [f"`python tests/benchmarks/{' '.join([script, *given])}`", "", *spaced(kept), ""], process.returncode


def spaced(lines):
    """The lines with a blank one wherever a table begins or ends, as markdown wants it."""
    out = []
    for line in lines:
        if out and line.startswith("|") != out[-1].startswith("|"):
            out.append("")
        out.append(line)
    return out


def machine():
    """What the figures were taken on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads of {platform.processor()}"
    return f"{device}; " + ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "trl"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks.md", help="file for the table")
    parser.add_argument("--only", choices=list(BENCHMARKS), action="append", help="may be given more than once")
    parser.add_argument("--smallest", action="store_true", help="the smallest sizes, to see that everything runs")
    options = parser.parse_args()
    text, failed = [machine(), ""], 0
    for name in options.only or BENCHMARKS:
        part, code = measure(name, SMALLEST[name] if options.smallest else "")
        text, failed = text + part, failed or code
        Path(options.output).write_text("\n".join(text))
    print(f"\n{Path(options.output).read_text()}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
