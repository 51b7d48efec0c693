"""What the config accepts, and word for word what it says of everything else."""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal, get_args

import pytest
import yaml

from train import config

ROOT = Path(config.__file__).parents[1]

OK = """\
output_dir: runs/x
model:
  model_name_or_path: builtin:tiny
data:
  train: builtin:letters
"""  # five lines: what a test adds begins on line 6


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Runs in an empty folder and writes x.yaml there, so that messages name it without a folder."""
    monkeypatch.chdir(tmp_path)
    return lambda text, name="x.yaml": Path(name).write_text(text)


@pytest.fixture
def refusal(capsys):
    """The one line that `parse` ends with."""

    def run(*argv):
        with pytest.raises(SystemExit) as end:
            config.parse(list(argv))
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (2, "", 1), err
        return err.rstrip("\n")

    return run


def test_reads_yaml_with_the_command_line_over_it(write):
    write(OK + "train:\n  learning_rate: 1e-6\n  max_steps: 7\n  warmup_steps: 3\n")
    cfg = config.parse(["--config", "x.yaml"])
    assert (cfg.output_dir, cfg.model.model_name_or_path, cfg.data.train) == ("runs/x", "builtin:tiny", "builtin:letters")
    assert cfg.train.learning_rate == 1e-6 and type(cfg.train.learning_rate) is float  # PyYAML reads a string
    assert type(cfg.train.warmup_steps) is float
    assert (cfg.train.max_steps, cfg.train.global_batch_size, cfg.sft.loss_type) == (7, 64, "nll")
    before = config.parse(["--train.max_steps", "5", "--config=x.yaml"])
    after = config.parse(["--config", "x.yaml", "--train.max_steps=5"])
    assert before == after and after.train.max_steps == 5 and after.train.learning_rate == 1e-6
    assert config.parse(["--config", "x.yaml", "--train.max_steps", "null"]).train.max_steps is None
    assert config.parse(["--config", "x.yaml", "--train.max_steps", "5", "--train.max_steps", "6"]).train.max_steps == 6


def test_reads_the_command_line_of_the_process(write, monkeypatch):
    write(OK)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "x.yaml", "--seed", "3"])
    assert config.parse().seed == 3


def test_values_of_each_kind_on_the_command_line(write):
    write(OK + "  columns: {prompt: question}\n")
    options = "--model.trust_remote_code=false --model.model_revision 1e5 --output_dir 2024 --log.report_to [] --fsdp.timeout_seconds 9"
    cfg = config.parse(["--config", "x.yaml", *options.split(), "--evaluation.answer_pattern", "-?[0-9]+"])
    assert cfg.model.trust_remote_code is False and cfg.fsdp.timeout_seconds == 9
    assert (cfg.model.model_revision, cfg.output_dir) == ("1e5", "2024")  # what is text stays text
    assert cfg.log.report_to == [] and cfg.evaluation.answer_pattern == "-?[0-9]+"
    assert config.parse(["--config", "x.yaml", "--log.report_to", "[]", "--log.report_to+", "tensorboard"]).log.report_to == ["tensorboard"]
    whole = config.parse(["--config", "x.yaml", "--data.columns", "{prompt: a b, completion: answer}"])
    assert whole.data.columns == {"prompt": "a b", "completion": "answer"}
    entry = config.parse(["--config", "x.yaml", "--data.columns.completion", "answer", "--data.columns.n=3"])
    assert entry.data.columns == {"prompt": "question", "completion": "answer", "n": "3"}


def test_appending_keeps_the_default(write, monkeypatch):
    @dataclass(frozen=True)
    class Wide(config.Config):
        names: list[str] = field(default_factory=lambda: ["q_proj"])

    monkeypatch.setattr(config, "Config", Wide)
    write(OK)
    assert config.parse(["--config", "x.yaml", "--names+=o_proj"]).names == ["q_proj", "o_proj"]
    assert config.parse(["--config", "x.yaml"]).names == ["q_proj"]


def test_default_recipe(write, monkeypatch, refusal, tmp_path):
    monkeypatch.setattr(config, "RECIPES", tmp_path / "recipes")
    missing = f"{tmp_path}/recipes/sft.yaml: cannot be read: No such file or directory"
    assert refusal() == missing
    assert refusal("--algorithm", "stf") == "--algorithm: got 'stf', expected one of sft, dpo, simpo, kto, orpo, grpo; did you mean sft?"
    (tmp_path / "recipes").mkdir()
    write(OK, "recipes/sft.yaml")
    assert config.parse([]) == config.parse(["--algorithm", "sft"]) == config.parse(["--config", "recipes/sft.yaml"])
    assert config.parse(["--data.train", "a.jsonl"]).data.train == "a.jsonl"


TRACKERS = "a list, each item one of tensorboard, wandb, mlflow, trackio"
YAML_ERRORS = [
    (OK + "train:\n  learning_rte: 1\n", "x.yaml:7: unknown key 'train.learning_rte'; did you mean train.learning_rate?"),
    (OK + "trian:\n  max_steps: 1\n", "x.yaml:6: unknown key 'trian'; did you mean train?"),
    (OK + "  trian: d\n", "x.yaml:6: unknown key 'data.trian'; did you mean data.train?"),
    (OK + "learning_rate: 1\n", "x.yaml:6: unknown key 'learning_rate'; did you mean train.learning_rate?"),
    (OK + "train:\n  lr: 1\n", "x.yaml:7: unknown key 'train.lr'; set train.learning_rate"),
    (OK + "optimizer_thing: 1\n", "x.yaml:6: unknown key 'optimizer_thing'; --help lists them all"),
    (OK + "? [a]\n: 1\n", "x.yaml:6: unknown key \"[ScalarNode(tag='tag:yaml.org,2002:str', value='a')]\"; --help lists them all"),
    (OK + "train:\n  learning_rate: fast\n", "x.yaml:7: train.learning_rate: got 'fast', expected a number"),
    (OK + "train:\n  learning_rate: null\n", "x.yaml:7: train.learning_rate: got null, expected a number"),
    (OK + "train:\n  max_steps: 5.5\n", "x.yaml:7: train.max_steps: got 5.5, expected a whole number or null"),
    (OK + "train:\n  max_steps: true\n", "x.yaml:7: train.max_steps: got True, expected a whole number or null"),
    (OK + "train:\n  max_steps: {a: 1}\n", "x.yaml:7: train.max_steps: got {'a': 1}, expected a whole number or null"),
    (OK + "train:\n  max_steps: 0\n", "x.yaml:7: train.max_steps: got 0, expected a number from 1 up"),
    (OK + "  assistant_only_loss: 1\n", "x.yaml:6: data.assistant_only_loss: got 1, expected true or false"),
    (OK + "  columns: {prompt: 1}\n", "x.yaml:6: data.columns: got {'prompt': 1}, expected a mapping of text to text; quote it"),
    (OK + "  columns: {1: a}\n", "x.yaml:6: data.columns: got {1: 'a'}, expected names of columns; quote them"),
    (OK + "  columns: null\n", "x.yaml:6: data.columns: got null, expected a mapping of text to text"),
    (OK + "  columns: &a {b: *a}\n", "x.yaml:6: data.columns: got {'b': {...}}, expected a mapping of text to text; quote it"),
    (OK + "  eval: 2024\n", "x.yaml:6: data.eval: got 2024, expected text or null; quote it"),
    (OK + "  eval: 2024-13-45\n", "x.yaml:6: data.eval: got '2024-13-45', which is no value of YAML: month must be in 1..12"),
    (
        "model:\n  dtype: float16\n",
        "x.yaml:2: model.dtype: got 'float16', expected one of auto, float32, bfloat16; did you mean bfloat16?",
    ),
    (OK + "log:\n  report_to: wandb\n", f"x.yaml:7: log.report_to: got 'wandb', expected {TRACKERS}"),
    (OK + "log:\n  report_to: [comet]\n", f"x.yaml:7: log.report_to: got ['comet'], expected {TRACKERS}"),
    (OK + "algorithm: sftt\n", "x.yaml:6: algorithm: got 'sftt', expected one of sft, dpo, simpo, kto, orpo, grpo; did you mean sft?"),
    (OK + "train:\n", "x.yaml:6: train: got nothing, expected lines of `name: value`"),
    (OK + "train: 3\n", "x.yaml:6: train: got '3', expected lines of `name: value`"),
    (OK + "train: [3]\n", "x.yaml:6: train: got a list, expected lines of `name: value`"),
    (OK + "seed: 1\nseed: 2\n", "x.yaml:7: seed is set twice, first on line 6; keep one"),
    (OK + "  columns: {a: b,\n    a: c}\n", "x.yaml:7: data.columns.a is set twice, first on line 6; keep one"),
    (OK + "data:\n  train: d\n", "x.yaml:6: data is set twice, first on line 4; keep one"),
    (OK + "seed: *x\n", "x.yaml:6: not plain YAML: found undefined alias 'x'"),
    (OK + "seed: b: c\n", "x.yaml:6: not plain YAML: mapping values are not allowed here"),
    (OK + "data: [1\n", "x.yaml:7: not plain YAML: expected ',' or ']', but got '<stream end>'"),
    (OK + "---\nseed: 1\n", "x.yaml:6: not plain YAML: but found another document"),
    (
        "output_dir: r\ndata: {train: d}\n",
        "x.yaml: model.model_name_or_path is missing, expected text; set it there or as --model.model_name_or_path",
    ),
    ("model: {model_name_or_path: m}\ndata: {train: d}\n", "x.yaml: output_dir is missing, expected text; set it there or as --output_dir"),
    ("", "x.yaml:1: empty, expected settings such as `output_dir: runs/first`"),
    ("# nothing\n", "x.yaml:1: empty, expected settings such as `output_dir: runs/first`"),
    ("- a\n", "x.yaml:1: settings: got a list, expected lines of `name: value`"),
    ("\njust text\n", "x.yaml:2: settings: got 'just text', expected lines of `name: value`"),
]


@pytest.mark.parametrize(("text", "line"), YAML_ERRORS)
def test_yaml_error(write, refusal, text, line):
    write(text)
    assert refusal("--config", "x.yaml") == line


SHOWN = "holds a password or a key, which config.yaml, checkpoints and trackers would show; remove it"
OPTION_ERRORS = [
    ("--data.train https://me:canary@example.org/a.jsonl", f"--data.train: {SHOWN}"),
    ("--data.train https://ghp_canary@example.org/a.jsonl", f"--data.train: {SHOWN}"),
    ("--rollout.vllm_extra_args [--api-key=canary]", f"--rollout.vllm_extra_args: {SHOWN}"),
    ("--log.project hf_canary5678901234567890123456789012", f"--log.project: {SHOWN}"),
    ('--grpo.reward_funcs ["judge(key=sk-canary5678901234567890123456789012)"]', f"--grpo.reward_funcs: {SHOWN}"),
    ("--train.max_stps 4", "unknown option --train.max_stps; did you mean --train.max_steps?"),
    ("--train.max-steps=4", "unknown option --train.max-steps; did you mean --train.max_steps?"),
    ("--learning_rate 4", "unknown option --learning_rate; did you mean --train.learning_rate?"),
    ("--train.max_steps+ 4", "unknown option --train.max_steps+; did you mean --train.max_steps?"),
    ("--model m", "unknown option --model; set model.model_name_or_path"),
    ("--zzz 4", "unknown option --zzz; --help lists them all"),
    ("train.max_steps=4", "'train.max_steps=4' is not an option, expected --train.max_steps 5 or --train.max_steps=5"),
    ("-c x.yaml", "'-c' is not an option, expected --train.max_steps 5 or --train.max_steps=5"),
    ("--train.max_steps", "--train.max_steps: got nothing, expected a whole number or null"),
    ("--train.max_steps --seed 1", "--train.max_steps: got nothing, expected a whole number or null"),
    ("--train.max_steps x", "--train.max_steps: got 'x', expected a whole number or null"),
    ("--train.max_steps=", "--train.max_steps: got '', expected a whole number or null"),
    ("--train.learning_rate null", "--train.learning_rate: got 'null', expected a number"),
    ("--train.learning_rate -1", "--train.learning_rate: got -1.0, expected a number from 0 up"),
    ("--model.dtype bf16", "--model.dtype: got 'bf16', expected one of auto, float32, bfloat16; did you mean bfloat16?"),
    ("--model.trust_remote_code maybe", "--model.trust_remote_code: got 'maybe', expected true or false"),
    (
        "--log.report_to [tensorbord]",
        f"--log.report_to: got '[tensorbord]', expected {TRACKERS}; did you mean tensorboard?",
    ),
    ("--data.columns {a:null}", "--data.columns: got '{a:null}', expected a mapping of text to text"),
    ("--algorithm stf", "--algorithm: got 'stf', expected one of sft, dpo, simpo, kto, orpo, grpo; did you mean sft?"),
    ("--config x.yaml", "--config: given twice, expected one YAML file"),
    ("--config=", "--config: got nothing, expected one YAML file"),
    ("--print_config=x", "--print_config: got 'x', expected nothing"),
    ("--dry_run=x", "--dry_run: got 'x', expected nothing, or ranks, as in --dry_run=64 or --dry_run=64xcuda"),
    ("--dry_run=8xtpu", "--dry_run: got '8xtpu', expected nothing, or ranks, as in --dry_run=64 or --dry_run=64xcuda"),
]


@pytest.mark.parametrize(("options", "line"), OPTION_ERRORS)
def test_option_error(write, refusal, options, line):
    write(OK)
    assert refusal("--config", "x.yaml", *options.split()) == line


def test_file_that_cannot_be_read(write, refusal):
    assert refusal("--config", "nope.yaml") == "nope.yaml: cannot be read: No such file or directory"
    assert refusal("--config") == "--config: got nothing, expected a YAML file"
    assert refusal("--config", ".") == ".: cannot be read: Is a directory"
    Path("latin.yaml").write_bytes(b"output_dir: \xe9\n")
    assert refusal("--config", "latin.yaml").startswith("latin.yaml: cannot be read: 'utf-8' codec can't decode byte 0xe9")


def test_the_file_is_named_when_it_is_the_file_that_is_wrong(write, refusal):
    write(OK + "train:\n  max_steps: x\n")
    assert refusal("--config", "x.yaml", "--train.max_steps", "5") == "x.yaml:7: train.max_steps: got 'x', expected a whole number or null"


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("per_device_train_batch_size", "set train.global_batch_size and train.micro_batch_tokens"),
        ("gradient_accumulation_steps", "set train.global_batch_size and train.micro_batch_tokens"),
        ("batch_size", "set train.global_batch_size and train.micro_batch_tokens"),
        ("epochs", "set train.num_train_epochs"),
        ("warmup_ratio", "set train.warmup_steps (a fraction below 1)"),
        ("packing", "rows are always packed, nothing to set"),
        ("bf16", "set model.dtype"),
        ("torch_dtype", "set model.dtype"),
        ("max_seq_length", "set data.max_length"),
        ("load_in_4bit", "set model.quantization to nf4"),
        ("lora_r", "set lora.r"),
        ("optimizer", "set train.optim"),
    ],
)
def test_names_of_other_trainers(write, refusal, name, cure):
    write(f"{OK}{name}: 1\n")
    assert refusal("--config", "x.yaml") == f"x.yaml:6: unknown key {name!r}; {cure}"
    assert refusal(f"--train.{name}=1") == f"unknown option --train.{name}; {cure}"


def test_cures_for_old_names_name_settings():
    known = config.settings(config.Config)
    leaves = {key.rpartition(".")[2] for key in known if config.is_setting(key, known)}
    for cure, names in config.OLD_NAMES.items():
        assert all(config.is_setting(key, known) for key in re.findall(r"[a-z_]+\.[a-z_0-9]+", cure)), cure
        assert not leaves & set(names.split()), "a name of ours needs no translation"


OUT_OF_RANGE = [
    ("model.model_name_or_path", "", "a hub name, a local folder or builtin:tiny"),
    ("data.train", "", "a file, a hub dataset or builtin:letters"),
    ("output_dir", "", "a folder"),
    ("data.max_length", 1, "a number from 2 up"),
    ("train.global_batch_size", 0, "a number from 1 up"),
    ("train.micro_batch_tokens", 1, "a number from 2 up"),
    ("train.max_steps", 0, "a number from 1 up"),
    ("train.num_train_epochs", 0.0, "a number above 0"),
    ("train.num_train_epochs", float("inf"), "a number above 0"),
    ("train.learning_rate", -1e-6, "a number from 0 up"),
    ("train.learning_rate", float("inf"), "a number from 0 up"),
    ("train.learning_rate", float("nan"), "a number from 0 up"),
    ("train.warmup_steps", -1.0, "a number from 0 up"),
    ("train.warmup_steps", 1.5, "whole steps, or a fraction of all steps below 1"),
    ("train.decay_steps", -0.1, "a number from 0 up"),
    ("train.weight_decay", -0.1, "a number from 0 up"),
    ("train.adam_beta1", 1.0, "a number from 0 up to, not including, 1"),
    ("train.adam_beta2", -0.1, "a number from 0 up to, not including, 1"),
    ("train.adam_epsilon", 0.0, "a number above 0"),
    ("train.max_grad_norm", -1.0, "a number from 0 up"),
    ("evaluation.steps", -1, "a number from 0 up"),
    ("evaluation.generate", -1, "a number from 0 up"),
    ("evaluation.max_new_tokens", 0, "a number from 1 up"),
    ("evaluation.answer_pattern", "(a", "a regular expression (missing ), unterminated subpattern at position 0)"),
    ("evaluation.steps", 10, "0 while data.eval is null; set data.eval"),
    ("evaluation.generate", 10, "0 while data.eval is null; set data.eval"),
    ("fsdp.replicas", 0, "a number from 1 up"),
    ("fsdp.prefetch", -1, "a number from 0 up"),
    ("fsdp.timeout_seconds", 0, "a number from 1 up"),
    ("checkpoint.save_steps", -1, "a number from 0 up"),
    ("checkpoint.save_total_limit", 0, "a number from 1 up"),
    ("log.logging_steps", 0, "a number from 1 up"),
    ("lora.r", 0, "a number from 1 up"),
    ("lora.lora_alpha", 16.0, "nothing while lora.r is null; set lora.r"),
    ("model.quantization", "nf4", "null, or lora.r set: 4-bit weights cannot be trained, only adapters over them"),
]


@pytest.mark.parametrize(("key", "value", "expected"), OUT_OF_RANGE)
def test_out_of_range(write, refusal, key, value, expected):
    settings = {"output_dir": "r", "model": {"model_name_or_path": "m"}, "data": {"train": "d"}}
    block, _, name = key.rpartition(".")
    (settings.setdefault(block, {}) if block else settings)[name] = value
    classes = {f.name: f.type for f in fields(config.Config) if is_dataclass(f.type)}
    with pytest.raises(ValueError) as error:
        config.Config(**{name: classes[name](**given) if name in classes else given for name, given in settings.items()})
    assert str(error.value) == f"{key}: got {value!r}, expected {expected}"
    if "inf" in repr(value):  # which only YAML can say
        write(f"{OK}train:\n  {name}: .inf\n")
        assert refusal("--config", "x.yaml") == f"x.yaml:7: {error.value}"
    elif value == value:
        write(OK)
        assert refusal("--config", "x.yaml", f"--{key}={value}") == f"--{error.value}"


REFUSED_BLOCKS = [
    ("grpo", {"train": {"global_batch_size": 20}}, "train.global_batch_size: got 20, expected a multiple of grpo.num_generations, 8"),
    (
        "grpo",
        {"reference": {"sync_ref_model": True}},
        "reference.sync_ref_model: got True, expected nothing, as this grpo has no reference; set grpo.beta",
    ),
    (
        "grpo",
        {"reference": {"model_name_or_path": "m"}},
        "reference.model_name_or_path: got 'm', expected nothing, as this grpo has no reference; set grpo.beta",
    ),
    (
        "grpo",
        {"data": {"eval": "d"}},
        "evaluation.generate: got 0, expected a number of prompts of data.eval to answer; or leave data.eval out",
    ),
    (
        "grpo",
        {"evaluation": {"answer_pattern": "a"}},
        "evaluation.answer_pattern: got 'a', expected nothing, as rewards judge the answers of grpo; leave it out",
    ),
    (
        "sft",
        {"evaluation": {"num_samples": 2, "temperature": 0.5}},
        "evaluation.num_samples: got 2, expected nothing, as sft is evaluated greedily; leave it out",
    ),
    (
        "dpo",
        {"evaluation": {"temperature": 0.5}},
        "evaluation.temperature: got 0.5, expected nothing, as dpo is evaluated greedily; leave it out",
    ),
    (
        "grpo",
        {"evaluation": {"num_samples": 2}},
        "evaluation.num_samples: got 2, expected 1 at evaluation.temperature 0, where all answers are alike",
    ),
    *(
        (name, {"rollout": {"max_num_seqs": 2}}, f"rollout.max_num_seqs: got 2, expected nothing, as {name} samples nothing; leave it out")
        for name in ("sft", "dpo", "simpo", "kto", "orpo")
    ),
    ("grpo", {"rollout": {"reward_seconds": 0.0}}, "rollout.reward_seconds: got 0.0, expected a number above 0"),
    ("grpo", {"rollout": {"max_num_seqs": 0}}, "rollout.max_num_seqs: got 0, expected a number from 1 up"),
    ("grpo", {"grpo": {"num_generations": 1}}, "grpo.num_generations: got 1, expected 2 or more: an advantage is relative to the group"),
]


@pytest.mark.parametrize(("algorithm", "given", "line"), REFUSED_BLOCKS)
def test_settings_that_do_not_fit_the_algorithm(write, refusal, algorithm, given, line):
    settings = {"output_dir": "r", "algorithm": algorithm, "model": {"model_name_or_path": "m"}, "data": {"train": "d"}}
    write(yaml.safe_dump(settings | {name: settings.get(name, {}) | block for name, block in given.items()}, sort_keys=False))
    assert re.fullmatch(rf"x\.yaml(:\d+)?: {re.escape(line)}", refusal("--config", "x.yaml"))


def test_a_reference_of_grpo_with_a_kl_term(write):
    write(OK + "algorithm: grpo\ngrpo: {beta: 0.1}\nreference: {sync_ref_model: true}\n")
    assert config.parse(["--config", "x.yaml"]).reference.sync_ref_model


def test_adapters_where_they_make_no_sense(write, refusal):
    write(OK.replace("builtin:tiny", "x"))
    run = ["--config", "x.yaml", "--lora.r=4"]
    assert config.parse([*run, "--lora.target_modules", "[q_proj]"]).lora.target_modules == ["q_proj"]
    assert config.parse([*run, "--model.quantization=nf4"]).lora.target_modules == "all-linear"
    line = "--lora.r: got 4, expected null for a model of random weights, which are kept nowhere"
    assert refusal(*run, "--model.from_scratch=true") == refusal(*run, "--model.model_name_or_path=builtin:tiny") == line
    assert refusal(*run, "--lora.lora_dropout=1").endswith("expected a number from 0 up to, not including, 1")
    assert refusal(*run, "--algorithm=dpo", "--lora.lora_dropout=0.1").startswith("--lora.lora_dropout: got 0.1, expected 0 for dpo: ")
    synced = ["--algorithm=dpo", "--reference.sync_ref_model=true", "--reference.model_name_or_path=y"]
    assert refusal(*run, *synced).startswith("--reference.sync_ref_model: got True, expected false where lora.r is set and ")


def test_remote_code_needs_a_pinned_commit_or_a_local_folder(write, refusal):
    write(OK)
    run = ["--config", "x.yaml", "--model.trust_remote_code=true"]
    cure = "expected false, or a model.model_revision of 40 hex digits: a branch may hold other code tomorrow"
    line = f"--model.trust_remote_code: got True, {cure}"
    assert refusal(*run) == refusal(*run, "--model.model_revision=main") == refusal(*run, "--model.model_revision", "a" * 39) == line
    assert config.parse([*run, "--model.model_revision", "0a" * 20]).model.trust_remote_code
    Path("local").mkdir()
    assert config.parse([*run, "--model.model_name_or_path=local"]).model.trust_remote_code


def test_blocks_of_other_algorithms():
    keys = ["output_dir", "sft", "sft.loss_type", "dpo", "dpo.beta", "sfty.x"]
    assert config.foreign(keys, "sft", ("sft", "dpo")) == ["dpo", "dpo.beta"]
    assert config.foreign(keys, "dpo", ("sft", "dpo")) == ["sft", "sft.loss_type"]
    assert config.foreign(keys, "sft", ("sft",)) == []


def test_a_block_of_another_algorithm_is_refused(write, refusal, monkeypatch):
    @dataclass(frozen=True)
    class Dpo:
        beta: float = 0.1

    @dataclass(frozen=True)
    class Two(config.Config):
        algorithm: Literal["sft", "dpo"] = "sft"
        dpo: Dpo = field(default_factory=Dpo)

    monkeypatch.setattr(config, "Config", Two)
    write(OK + "dpo:\n  beta: 0.2\n")
    assert config.parse(["--config", "x.yaml", "--algorithm", "dpo"]).dpo.beta == 0.2
    problem = "belongs to another algorithm than sft; remove it or set algorithm to its own"
    assert refusal("--config", "x.yaml") == f"x.yaml:6: dpo: {problem}"
    write(OK + "algorithm: dpo\n")
    assert refusal("--config", "x.yaml", "--algorithm=sft", "--dpo.beta", "1") == f"--dpo.beta: {problem}"
    line = "--sft.loss_type: belongs to another algorithm than dpo; remove it or set algorithm to its own"
    assert refusal("--config", "x.yaml", "--sft.loss_type=dft") == line
    cfg = config.parse(["--config", "x.yaml", "--dpo.beta", "1"])
    assert cfg.dpo.beta == 1.0 and "sft" not in config.as_dict(cfg)
    write(config.to_yaml(cfg))  # else the block that was not used would be refused here
    assert config.parse(["--config", "x.yaml"]) == cfg


def test_every_algorithm_has_a_block():
    known = config.settings(config.Config)
    assert known["algorithm"].type is config.AlgorithmName
    assert all(is_dataclass(known[name].type) for name in get_args(config.AlgorithmName))


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module whose import leaves a file."""
    (tmp_path / "canary.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "imported"


def test_a_class_path_imports_nothing(write, refusal, canary):
    evil = "{class_path: canary.Evil}"
    for text in (
        f"model: {evil}\n",
        "model: canary.Evil\n",
        f"{OK}sft: {evil}\n",
        f"{OK}log: {{report_to: [{evil}]}}\n",
        f"{OK}train: {{max_steps: {evil}}}\n",
        f"{OK}  eval: {evil}\n",
        f"{OK}  columns: {{a: {evil}}}\n",
        f"{evil}\n",
    ):
        write(text)
        refusal("--config", "x.yaml")
    write(OK)
    for option in ("model", "model.class_path", "sft", "sft.class_path", "train.max_steps", "log.report_to"):
        refusal("--config", "x.yaml", f"--{option}={evil}")
        refusal("--config", "x.yaml", f"--{option}=canary.Evil")
    assert config.parse(["--config", "x.yaml", f"--data.columns={evil}"]).data.columns == {"class_path": "canary.Evil"}
    assert config.parse(["--config", "x.yaml", f"--data.eval={evil}"]).data.eval == evil
    assert not canary.exists() and "canary" not in sys.modules


@pytest.mark.parametrize("guarded", [True, False])
def test_no_parser_of_the_process_imports_what_a_file_names(canary, guarded):
    """Without our parser the canary is imported: the test can fail, and the guard is what prevents it."""
    guard = "config.build_parser(config.settings(config.Config));" if guarded else ""
    code = f"""if True:
        import jsonargparse
        from train import config
        {guard}
        parser = jsonargparse.ArgumentParser()
        parser.add_argument("--log", type=config.Log)
        parser.parse_object({{"log": {{"class_path": "canary.Evil"}}}})"""
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": f"{ROOT}:{canary.parent}"}, capture_output=True, text=True)
    assert run.returncode != 0 and ("ImportDenied" in run.stderr) is guarded, run.stderr
    assert canary.exists() is not guarded


def test_python_tags_run_nothing(write, refusal, tmp_path):
    for tag, line in ((f"{OK}seed: ", 6), ("output_dir: ", 1)):
        write(f"{tag}!!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
        tail = "not plain YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.mkdir'"
        assert refusal("--config", "x.yaml") == f"x.yaml:{line}: {tail}"
    write(f"model: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    assert refusal("--config", "x.yaml") == "x.yaml:1: model: got a list, expected lines of `name: value`"
    assert not (tmp_path / "made").exists()


def test_resolved_config_reads_back_equal(write, capsys):
    write(OK)
    options = ["--data.columns", "{prompt: 'null', 'b: c': 'é # 1e5'}", "--model.model_revision", "1e5", "--data.eval", "no"]
    cfg = config.parse(["--config", "x.yaml", *options, "--train.learning_rate=1e-6", "--evaluation.answer_pattern", r"\d+ '\"{}%"])
    write(config.to_yaml(cfg), "resolved.yaml")
    assert config.parse(["--config", "resolved.yaml"]) == cfg
    assert config.as_dict(cfg)["data"]["columns"] == {"prompt": "null", "b: c": "é # 1e5"}
    with pytest.raises(SystemExit) as end:
        config.parse(["--print_config", "--config", "x.yaml", "--seed", "9"])
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    write(out, "printed.yaml")
    assert config.parse(["--config", "printed.yaml"]) == config.parse(["--config", "x.yaml", "--seed", "9"])


def test_dry_run(write, monkeypatch):
    write(OK)
    assert config.parse(["--config", "x.yaml", "--dry_run"]) == config.parse(["--config", "x.yaml"])
    assert config.dry_run(["--config", "x.yaml"]) is None and config.dry_run(["--dry_run"]) == (1, None)
    assert (config.dry_run(["--dry_run=64"]), config.dry_run(["--dry_run=8xcuda"])) == ((64, None), (8, "cuda"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert config.dry_run(["--seed=1", "--dry_run"]) == (4, None)


def test_print_config_refuses_what_a_run_would(write, refusal):
    write(OK)
    assert refusal("--config", "x.yaml", "--print_config", "--seed=x") == "--seed: got 'x', expected a whole number"


def test_one_rank_prints(write, capsys, monkeypatch):
    write(OK)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        config.parse(["--config", "x.yaml", "--print_config"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("algorithm", config.get_args(config.AlgorithmName))
def test_learning_rates_are_trls(write, algorithm):
    more = "grpo: {reward_funcs: [length]}\n" if algorithm == "grpo" else ""
    write(f"{OK}algorithm: {algorithm}\n{more}")
    assert config.parse(["--config", "x.yaml"]).train.learning_rate == (2e-5 if algorithm == "sft" else 1e-6)
    assert config.parse(["--config", "x.yaml", "--train.learning_rate", "3e-4"]).train.learning_rate == 3e-4
    write(f"{OK}algorithm: {algorithm}\n{more}train: {{learning_rate: 5e-4}}\n")
    assert config.parse(["--config", "x.yaml"]).train.learning_rate == 5e-4


def test_help_shows_every_setting(write, capsys):
    with pytest.raises(SystemExit) as end:
        config.parse(["--config", "nope.yaml", "--help"])
    assert end.value.code == 0
    text = re.sub(r"\s", "", capsys.readouterr().out)
    known, texts = config.settings(config.Config), config.docs(config.Config)
    shown = [key for key in known if config.is_setting(key, known)]
    assert [key for key in shown if not texts.get(key)] == [], "a field without a docstring"
    assert [key for key in shown if f"--{key}" not in text or re.sub(r"\s", "", texts[key]) not in text] == []
    assert "--train.weight_decayWEIGHT_DECAYAdamW's,decoupledfromthegradient.(type:float,default:0.0)" in text
    assert "(required)(type:str|list[str])--data.weights" in text and "(type:int|null,default:1024)" in text
    assert "--configFILE" in text and "--print_config" in text


def test_help_of_a_docstring_with_a_percent_sign(monkeypatch, capsys):
    @dataclass(frozen=True)
    class Odd(config.Config):
        share: float = 0.5
        """100% (all) or less."""

    monkeypatch.setattr(config, "Config", Odd)
    with pytest.raises(SystemExit):
        config.parse(["-h"])
    assert "100% (all) or less. (type: float, default: 0.5)" in " ".join(capsys.readouterr().out.split())


def test_nothing_heavy_is_imported():
    code = "import sys, train.config; print(sorted({'transformers', 'datasets', 'peft'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_no_dead_field():
    """A field that nothing reads is a setting that is ignored. Strings and comments that name it do not count."""
    folders = [ROOT / name for name in ("train", "models", "algorithms", "launch")]
    files = [path for folder in folders for path in folder.rglob("*.py") if path != ROOT / "train" / "config.py"]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    read |= set(get_args(config.AlgorithmName))  # the block of the chosen algorithm is read by its name
    assert [key for key in config.settings(config.Config) if key.rpartition(".")[2] not in read] == []


@pytest.mark.parametrize("name", ["runs/hf_smollm2_135m_sft_lora", "data/sk-learn-20newsgroups-clean", "https://example.org/a.jsonl"])
def test_names_that_are_no_keys(name):
    assert not config.SECRET.search(name)
    assert not config.SECRET.search("judge(api_key_env=OPENAI_API_KEY)")
