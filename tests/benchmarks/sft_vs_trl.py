"""SFT, ours against TRL's SFTTrainer: tokens a second and peak memory. `python tests/benchmarks/sft_vs_trl.py`

The same model, rows, float type and threads; whole processes in turn, medians over the repeats. TRL runs in three ways: with
its defaults, packed (each of the `packings` is tried once, and the fastest is the opponent), and row by row without
checkpointing, which wastes little on a CPU either. No ratio is printed before ours and TRL's defaults agree in every step's loss.

A step's tokens are those that are not padding, its time is the whole step, data included; the first steps are left out. Memory
is the peak of the training process: VmHWM on a CPU, what torch took of a GPU. TRL saves nothing, ours all that it writes.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT))
CORES = len(os.sched_getaffinity(0))
WARM_UP = 2  # first steps that no number counts
ROWS_PER_STEP = 8  # TRL's default per_device_train_batch_size
LENGTHS = (50, 800)  # tokens of a row
VOCABULARY = 8192
OURS = {"cpu": {"train": {"micro_batch_tokens": 1024}}, "cuda": {}}  # more is no faster on a CPU
ADAPTERS = {"r": 16, "lora_alpha": 32}
PEFT = {"adapters": ADAPTERS | {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}}  # the same to TRL
UNCHECKED = {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {}}
ROW_BY_ROW = UNCHECKED | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS_PER_STEP}


def make_model(folder, layers=8, smollm2=False):
    """A Llama of random weights, 8 million in 8 layers, a quarter of them the tied head, as in SmolLM2-135M, or of that model's own shape.

    Its tokens are words.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from train.toy import CHATML

    words = ["<|im_end|>", "<|im_start|>", "<|pad|>", "<|unk|>", "system", "user", "assistant"]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": words[0], "pad_token": words[2], "unk_token": words[3], "additional_special_tokens": words[1:2]}
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **special).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    if smollm2:
        shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        heads |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**shape, **heads, **ids, tie_word_embeddings=True)).save_pretrained(folder)


def make_rows(path, count):
    """`count` conversations of log-uniform length, of Zipf-distributed words."""
    stream, words = random.Random(0), [f"w{i}" for i in range(VOCABULARY - 7)]
    weights = [1 / (i + 10) for i in range(len(words))]
    with open(path, "w") as f:
        for _ in range(count):
            left, messages = int(LENGTHS[0] * (LENGTHS[1] / LENGTHS[0]) ** stream.random()), []
            for turn in range(n := 2 * stream.randint(1, 2)):
                size = max(1, (left - 3 * (n - turn)) // (n - turn))  # a message adds three tokens of its own
                text = " ".join(stream.choices(words, weights, k=size))
                messages.append({"role": ("user", "assistant")[turn % 2], "content": text})
                left -= size + 3
            f.write(json.dumps({"messages": messages}) + "\n")


def make_clock():
    """A callback for TRL's trainers: `logs`, what was logged of each step, and `seconds()`, how long each took."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends, self.logs = [], []

        def on_train_begin(self, *_, **__):
            self.ends.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs, **_):
            self.logs += [logs] if "loss" in logs else []

        def seconds(self):
            return [b - a for a, b in pairwise(self.ends)]

    return Clock()


def trl_side(job):
    """Train with TRL in this process, as `job` says; writes its numbers to job["result"]."""
    import datasets
    import peft
    import torch
    from trl import SFTConfig, SFTTrainer

    cuda, clock, dtypes = torch.cuda.is_available(), make_clock(), set()

    class Watched(SFTTrainer):
        def compute_loss(self, model, *args, **kwargs):
            def look(_, __, out):
                dtypes.add(str((out.log_probs if hasattr(out, "log_probs") else out.logits).dtype).removeprefix("torch."))

            hook = model.register_forward_hook(look)  # behind FSDP's own, so it sees what the loss sees
            loss = super().compute_loss(model, *args, **kwargs)
            hook.remove()
            return loss

    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    common = {"output_dir": job["output_dir"], "max_steps": job["steps"], "use_cpu": not cuda, "bf16": cuda}
    config = SFTConfig(**quiet, **common, **job["settings"])
    rows = datasets.Dataset.from_json(job["data"], cache_dir=job["output_dir"])
    adapters = peft.LoraConfig(**job["adapters"]) if "adapters" in job else None
    Watched(job["model"], config, train_dataset=rows, callbacks=[clock], peft_config=adapters).train()
    losses, totals = ([entry[name] for entry in clock.logs] for name in ("loss", "num_tokens"))
    result = {"losses": losses, "tokens": [b - a for a, b in zip((0, *totals), totals)], "seconds": clock.seconds()}
    result["dtypes"] = sorted(dtypes)  # of its log-probs
    result["device_gib"] = torch.cuda.max_memory_reserved() / 2**30 if cuda else None
    Path(job["result"]).write_text(json.dumps(result))


def measure(side, settings, options, steps):
    """Run one side in a process of its own. Returns losses, tokens and seconds of each step, speed and best (tokens/s), gib."""
    folder = Path(tempfile.mkdtemp(dir=options.work))
    result = folder / "result.json"
    job = {"output_dir": str(folder / "run"), "model": options.model, "data": options.data, "steps": steps, "result": str(result)}
    if side == "ours":
        (folder / "recipe.yaml").write_text(json.dumps(recipe(job, settings)))
        command = [str(ROOT / "launch/train.py"), "--config", str(folder / "recipe.yaml")]
    else:
        settings = dict(settings)
        adapters = {"adapters": settings.pop("adapters")} if "adapters" in settings else {}
        command = [str(HERE), "--side", "trl", "--job", json.dumps(job | adapters | {"settings": settings})]
    host_gib = run(command, folder / "output.txt")
    if side == "ours":
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        totals = [line["num_tokens"] for line in lines]
        out = {"losses": [line["loss"] for line in lines], "seconds": [line["step_time"] for line in lines]}
        out["tokens"] = [b - a for a, b in zip((0, *totals), totals)]
        out["mfu"] = statistics.median(line.get("mfu", 0) for line in lines[WARM_UP:])
        out["device_gib"] = lines[-1].get("reserved_memory_gib")
    else:
        out = json.loads(result.read_text())
    shutil.rmtree(folder)
    out["speed"] = sum(out["tokens"][WARM_UP:]) / sum(out["seconds"][WARM_UP:])  # tokens/s
    out["best"] = max(n / t for n, t in list(zip(out["tokens"], out["seconds"]))[WARM_UP:])  # hardly feels what else runs
    out["gib"] = out["device_gib"] or host_gib
    return out


def recipe(job, settings):
    """The config of our run: the defaults of train/config.py, but for `settings`."""
    own = {"model": {"model_name_or_path": job["model"]}, "data": {"train": job["data"]}, "log": {"report_to": []}}
    own |= {"train": {"global_batch_size": ROWS_PER_STEP, "max_steps": job["steps"]}}
    return {"output_dir": job["output_dir"]} | {block: own.get(block, {}) | settings.get(block, {}) for block in own | settings}


def run(command, output, gpus=1):
    """Run a Python script to its end; returns the most memory that its process held, GiB (VmHWM)."""
    environment = os.environ | {"OMP_NUM_THREADS": str(CORES), "TOKENIZERS_PARALLELISM": "false"}
    environment["OMP_WAIT_POLICY"] = "passive"  # spinning threads make every timing worthless where another process runs too
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(seen[:gpus])
    peak = 0
    with open(output, "w") as f, subprocess.Popen([sys.executable, *command], stdout=f, stderr=f, env=environment) as process:
        while process.poll() is None:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = int(found[1]) if found else peak  # a process that has just ended has no memory
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{Path(output).read_text()[-3000:]}\nexit code {process.returncode}")
    return peak / 2**20


def packings():
    """TRL's settings that avoid padding: name -> SFTConfig fields. A step has about as many tokens in all of them."""
    flash = importlib.util.find_spec("flash_attn") is not None
    fused = {"model_init_kwargs": {"attn_implementation": "flash_attention_2" if flash else "sdpa"}}
    eager = {"model_init_kwargs": {"attn_implementation": "eager"}}
    two = {"packing": True, "per_device_train_batch_size": 2}
    one = {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    free = {"padding_free": True, "max_length": None, "per_device_train_batch_size": ROWS_PER_STEP}
    kernel = fused["model_init_kwargs"]["attn_implementation"]
    return {
        f"one pack of 1024 at once, {kernel}": one | fused | UNCHECKED,
        f"one pack of 1024 at once, {kernel}, gradient checkpointing": one | fused,
        "one pack of 1024 at once, eager": one | eager | UNCHECKED,
        f"two packs of 1024 at once, {kernel}": two | fused | UNCHECKED,
        f"padding-free, {ROWS_PER_STEP} rows at once, {kernel}": free | fused | UNCHECKED,
    }


def check_curves(runs, tolerance):
    """Refuse to compare runs that do not train alike: tokens of each step equal, losses equal to `tolerance`."""
    ours, theirs = runs["ours"][0], (runs.get("trl") or runs["rows"])[0]
    if ours["tokens"] != theirs["tokens"]:
        raise SystemExit(f"the steps differ: tokens {ours['tokens']} (ours), {theirs['tokens']} (TRL)")
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"]))
    first, last = theirs["losses"][0], theirs["losses"][-1]
    text = f"loss curves, {len(ours['losses'])} steps from {first:.4f} to {last:.4f}: largest difference {worst:.1e} of the loss"
    if worst > tolerance:
        raise SystemExit(f"{text}, more than {tolerance:.0e}\n{ours['losses']}\n{theirs['losses']}")
    print(text)


def table(runs, names):
    """Medians, and the ratios of ours to the others, as markdown; then the raw numbers."""
    speed, gib = ({side: statistics.median(r[key] for r in rs) for side, rs in runs.items()} for key in ("speed", "gib"))
    print("\n| | tokens/s | peak GiB | speed, ours to this | memory, ours to this |\n|---|---|---|---|---|")
    for side in runs:
        ratios = f"{speed['ours'] / speed[side]:.2f}x | {gib['ours'] / gib[side]:.2f}x"
        print(f"| {names[side]} | {speed[side]:.0f} | {gib[side]:.2f} | {ratios} |")
    print()
    for side, rs in runs.items():
        print(f"{names[side]}: " + "; ".join(f"{r['speed']:.1f} tokens/s, {r['gib']:.3f} GiB" for r in rs))


def compare(options, device):
    candidates, tried = packings(), {}
    for name, settings in candidates.items() if options.trial_steps else ():
        tried[name] = measure("trl", settings, options, options.trial_steps)
        print(f"tried TRL, {name}: {tried[name]['best']:.1f} tokens/s at best, {tried[name]['gib']:.3f} GiB", flush=True)
    best = max(tried, key=lambda name: tried[name]["best"]) if tried else next(iter(candidates))
    names = {"ours": "ours", "trl": "TRL, its defaults", "packed": f"TRL, {best}", "rows": "TRL, one row at once"}
    settings = {"ours": OURS[device], "trl": {}, "packed": candidates[best], "rows": ROW_BY_ROW}
    if options.lora:
        settings = {side: s | ({"lora": ADAPTERS} if side == "ours" else PEFT) for side, s in settings.items()}
    runs = {side: [] for side in names if side not in options.without}
    for _ in range(options.repeats):
        for side in runs:
            runs[side].append(measure(side, settings[side], options, options.steps))
            print(f"{names[side]}: {runs[side][-1]['speed']:.1f} tokens/s, {runs[side][-1]['gib']:.3f} GiB", flush=True)
    check_curves(runs, 1e-4 if device == "cpu" else 1e-2)
    table(runs, names)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help=f"steps of a process; the first {WARM_UP} are left out")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument("--trial-steps", type=int, default=6, help="steps of each try at packing; 0: take the first")
    parser.add_argument("--smollm2", action="store_true", help="the shape of SmolLM2-135M, with random weights")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 16 instead of all weights")
    parser.add_argument("--without", nargs="+", choices=["trl", "packed"], default=[], help="sides to leave out")
    parser.add_argument("--model", help="folder or hub name; default: a Llama of 8 million random weights")
    parser.add_argument("--data", help=".jsonl, rows of at most 1024 tokens; default: conversations of 50 to 800 random words")
    parser.add_argument("--side", choices=["trl"], help=argparse.SUPPRESS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return trl_side(options.job)
    import torch

    with tempfile.TemporaryDirectory() as options.work:
        if not options.data:
            options.data = f"{options.work}/rows.jsonl"
            make_rows(options.data, options.steps * ROWS_PER_STEP)
        if not options.model:
            options.model = f"{options.work}/model"
            make_model(options.model, smollm2=options.smollm2)
        compare(options, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
