"""MIGRATION.md, row by row, and ways to get a config, a data file or the number of ranks wrong: each ends in one line that says where,
and names the cure."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from algorithms import sft
from models import sharding
from tests.conftest import ROOT
from tests.train.test_config import OK, refusal, write  # noqa: F401  fixtures
from train import config, dry_run

PAGE = (ROOT / "MIGRATION.md").read_text()
ROWS = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| `")]
KNOWN = config.settings(config.Config)
BLOCKS = {key for key in KNOWN if not config.is_setting(key, KNOWN)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_a_row(row):
    """The settings of the right column exist, and each name of the left one that is none of ours is refused with one of them."""
    old, new = (re.findall(r"`([^`]+)`", cell) for cell in row)
    new = [name for name in new if re.fullmatch(r"[a-z]+\.[a-z_0-9]+|algorithm", name)]
    assert all(config.is_setting(name, KNOWN) for name in new), new
    ours = {key.rpartition(".")[2] for key in KNOWN}
    for name in old:
        if re.fullmatch("[a-z_0-9]+", name) and name not in ours:
            cure = config.nearest(name, KNOWN)
            assert any(setting in cure for setting in new) if new else "nothing" in cure or "never" in cure, (name, cure)


def test_names_that_two_cures_claim():
    names = [name for names in config.OLD_NAMES.values() for name in names.split()]
    assert sorted(set(names)) == sorted(names)


WRONG_CONFIGS = [  # lines after the five of OK, or options; what the refusal must contain
    ("train: {learning_rte: 1e-5}", "did you mean train.learning_rate?"),
    ("lora: {lora_r: 8}", "unknown key 'lora.lora_r'; set lora.r"),
    ("learning_rate: 1e-5", "did you mean train.learning_rate?"),
    ("per_device_train_batch_size: 4", "set train.global_batch_size and train.micro_batch_tokens"),
    ("use_peft: true", "set lora.r"),
    ("warmup_ratio: 0.1", "set train.warmup_steps (a fraction below 1)"),
    ("gradient_checkpointing: true", "set fsdp.activation_checkpointing"),
    ("tokenizer: {path: x}", "the tokenizer's chat template is used"),
    ("checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer}", "set model.model_name_or_path"),
    ("metric_logger: {log_dir: x}", "set log.report_to"),
    ("sequence_len: 2048", "set data.max_length"),
    ("sample_packing: true", "rows are always packed"),
    ("rl: dpo", "set algorithm"),
    ("val_set_size: 0.05", "set data.eval"),
    ("train: {learning_rate: 5e-5x}", "expected a number"),
    ("train: {max_steps: many}", "expected a whole number or null"),
    ("log: {report_to: wandb}", "expected a list"),
    ("dpo: {beta: 0.1}", "belongs to another algorithm than sft"),
    ("lora: {lora_alpha: 16}", "set lora.r"),
    ("evaluation: {steps: 10}", "set data.eval"),
    ("algorithm: ppo", "expected one of sft, dpo"),
    ("fsdp_config: {fsdp_version: 2}", "weights are always sharded over all of torchrun's ranks"),
    ("load_in_4bit: true", "set model.quantization to nf4"),
    ("rlhf_beta: 0.1", "--help lists them all"),
    ("fsdp: {replicas: 0}", "expected a number from 1 up"),
    ("train: {lr_scheduler_type: cosin}", "did you mean cosine?"),
    ("train: [1, 2]", "got a list, expected lines of `name: value`"),
    ("seed: 42\nseed: 43", "set twice, first on line 6; keep one"),
    ("model: {quantization: nf4", "not plain YAML"),
    ("train: {optim: adamw_torch_fused}", "did you mean adamw?"),
    ("train: {optim: adamw_bnb_8bit}", "did you mean adamw_8bit?"),
    ("fsdp: {reduce_dtype: bf16}", "did you mean bfloat16?"),
    ("beta: 0.1", "did you mean dpo.beta or simpo.beta or kto.beta or orpo.beta or grpo.beta?"),
    ("loss_type: sigmoid", "did you mean sft.loss_type or dpo.loss_type or"),
    ("loss: {_component_: torchtune.rlhf.loss.DPOLoss}", "set algorithm, and loss_type in the block of its name"),
    ("save_safetensors: true", "checkpoints are always safetensors"),
    ("special_tokens: {pad_token: x}", "the tokenizer's"),
    ("device: cuda", "a run uses the GPUs that torchrun gives it"),
    ("remove_unused_columns: false", "left out by themselves"),
    ("neftune_noise_alpha: 5", "nothing like it here"),
    ("lora: {target_modules: [{path: q_proj}]}", "what belongs to an item is a setting beside it"),
]
WRONG_DATA = [  # file name, its text (None: no file), options, what the refusal must contain
    ("a.jsonl", None, "", "no such file"),
    ("a.csv", "a,b\n", "", "expected .jsonl, .json or .parquet"),
    ("a.jsonl", "", "", "there are no rows in it"),
    ("a.jsonl", '{"text": "ab"\n', "", "a.jsonl:1: broken JSON"),
    ("a.jsonl", '{"question": "a", "answer": "b"}\n', "", "data.columns: {prompt: question, completion: answer} renames them"),
    ("a.jsonl", '{"text": 5}\n', "", "a.jsonl:1: not a string"),
    ("a.jsonl", '{"text": "ab"}\n', "--data.columns.prompt question", "data.columns renames question, but the row has columns text"),
    ("a.jsonl", '{"messages": [{"role": "human", "content": "a"}]}\n', "", "human is user, gpt and model are assistant"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', "", "an assistant message after the prompt"),
    ("a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "--algorithm dpo", "two different answers"),
    ("a.jsonl", '{"prompt": "a", "completion": "b"}\n', "--algorithm dpo", "expected prompt and chosen and rejected"),
    ("a.jsonl", '{"prompt": "a", "completion": "b", "label": "yes"}\n', "--algorithm kto", "true or false in label"),
    (
        "a.jsonl",
        '{"text": "%s"}\n' % ("a" * 99),
        "--train.micro_batch_tokens 9",
        "the 100 tokens of the longest example; raise it",
    ),
    ("a.jsonl", '{"text": "ab"}\n', "--model.model_name_or_path ./nowhere", "'./nowhere' cannot be read"),
    ("a.jsonl", '{"text": "ab"}\n', "--model.chat_template_path no.jinja", "'no.jinja' cannot be read: No such file"),
    ("a.jsonl", '{"text": "ab"}\n', "--data.eval b.jsonl", "b.jsonl: no such file; the nearest name in . is a.jsonl"),
    ("a.jsonl", '{"text": "ab"}\n', "--data.train nobody/nothing", "no such file or folder, and the hub dataset cannot be loaded"),
    ("a.jsonl", '{"text": "ab"}\n', "--data.train builtin:digits", "there is builtin:letters, builtin:capitals"),
    ("a.jsonl", "ab\ncd\n", "", "a.jsonl:1: broken JSON"),
    ("a.jsonl", '["ab"]\n', "", 'expected a JSON object such as {"text": ...}'),
    ("a.json", '[{"text": "ab"},]', "", "a.json:1: broken JSON"),
    ("a.parquet", '{"text": "ab"}\n', "", "a.parquet: not a Parquet file; write it anew, or name it .jsonl"),
    ("a.jsonl", '{"text": "ab"}\n{"text": null}\n', "", "a.jsonl:2: not a string"),
    ("a.jsonl", '{"messages": "ab"}\n', "", "a.jsonl:1: not a list of messages"),
    ("a.jsonl", '{"messages": ["ab"]}\n', "", "expected an object with role and content"),
    (
        "a.jsonl",
        '{"instruction": "a", "output": "b"}\n',
        "",
        "a.jsonl:1: the columns instruction, output are alpaca's; set data.format: alpaca",
    ),
    ("a.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "", "from such pairs dpo, simpo, kto and orpo learn: set algorithm"),
    ("a.jsonl", '{"prompt": "a", "chosen": ["b"], "rejected": "c"}\n', "--algorithm dpo", "two texts, or two lists of messages"),
    ("a.jsonl", '{"prompt": "a", "completion": "b"}\n', "--algorithm kto", "data.columns: {label: NAME} renames them"),
    ("a.jsonl", '{"question": "a"}\n', "--algorithm grpo --grpo.reward_funcs [length]", "data.columns: {prompt: question} renames them"),
    ("a.jsonl", '{"prompt": "a"}\n', "--algorithm grpo --grpo.reward_funcs [exact]", "did you mean exact_match?"),
    ("a.jsonl", '{"prompt": "a"}\n', "--algorithm grpo --grpo.reward_funcs [./no.py:f]", "there is no file"),
]
WRONG_RANKS = [  # torchrun's --nproc-per-node, options, what the refusal must contain
    (2, "--fsdp.replicas 3", "fsdp.replicas: got 3, expected a divisor of the run's 2 ranks; change it, or --nproc-per-node"),
]
WHERE = re.compile(r"x\.yaml(:\d+)?: |[ab]\.(jsonl?|csv|parquet)(:\d+)?: |--?[a-z.]+: |[a-z]+\.[a-z_]+: |(builtin:|nobody/)\w+: ")


@pytest.mark.parametrize(("lines", "cure"), WRONG_CONFIGS)
def test_wrong_config(write, refusal, lines, cure):  # noqa: F811
    write(f"{OK}{lines}\n")
    line = refusal("--config", "x.yaml")
    assert cure in line and re.match(r"(--algorithm|x\.yaml:\d+|x\.yaml: )", line), line


@pytest.mark.parametrize(("name", "text", "options", "cure"), WRONG_DATA)
def test_wrong_data(write, capsys, name, text, options, cure):  # noqa: F811
    from launch.train import ALGORITHMS

    if text is not None:
        Path(name).write_text(text)
    write(json.dumps({"output_dir": "r", "model": {"model_name_or_path": "builtin:tiny"}, "data": {"train": name}}))
    cfg = config.parse(["--config", "x.yaml", *options.split()])
    assert dry_run.show(cfg, ALGORITHMS[cfg.algorithm], 1, "cpu") == 2
    err = capsys.readouterr().err
    assert cure in err and WHERE.match(err) and err.count("\n") == 1, err


@pytest.mark.parametrize(("ranks", "options", "cure"), WRONG_RANKS)
def test_wrong_world_size(write, capsys, ranks, options, cure):  # noqa: F811
    """Under torchrun, before anything is read or written, and in a dry run."""
    write(OK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), ROOT / "launch/train.py"]
    run = subprocess.run([*torchrun, "--config", "x.yaml", *options.split()], capture_output=True, text=True)
    said = [line for line in run.stderr.splitlines() if line.startswith("train.py: ")]
    assert run.returncode == 1 and set(said) == {f"train.py: {cure}"} and 'launch/train.py", line' not in run.stderr
    assert not Path("runs").exists()
    cfg = config.parse(["--config", "x.yaml", *options.split()])
    assert dry_run.show(cfg, sft, ranks, "cpu") == 2 and capsys.readouterr().err == f"{cure}\n"


@pytest.mark.parametrize("local", ["0", "2"])
def test_more_ranks_than_gpus(monkeypatch, local):
    """Each rank refuses, so that none waits for another."""
    monkeypatch.setattr(sharding.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sharding.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "environ", os.environ | {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": "4"})
    with pytest.raises(ValueError, match="--nproc-per-node: got 4 ranks on this host, expected at most 2, one for each of its GPUs"):
        sharding.start_ranks(60)


def test_names_in_the_algorithms_page():
    """Settings, recipes and metrics that ALGORITHMS.md names exist; each algorithm has a section with its file."""
    page, readme = (ROOT / "ALGORITHMS.md").read_text(), (ROOT / "README.md").read_text()
    names = set(re.findall(r"`([^`]+)`", page))
    dotted = {name.split()[0].rstrip(":") for name in names if re.match(r"[a-z]+\.[a-z_]+\b(?!l)", name)} - {"samples.jsonl"}
    assert all(config.is_setting(name, KNOWN) for name in dotted), dotted
    recipes = {name for text in re.findall(r"recipes? (.*?)\.\n", page, re.S) for name in re.findall(r"`([^`]+)`", text)}
    assert recipes and recipes <= {path.stem for path in (ROOT / "launch" / "recipes").glob("*.yaml")}
    metrics = {name for name in names if "/" in name and " " not in name} - {"eval/loss"}
    assert [name for name in metrics if name.replace("<name>/mean", "<name>/mean") not in readme] == []
    for algorithm in config.get_args(config.AlgorithmName):
        assert f"({'algorithms'}/{algorithm}.py)" in page
