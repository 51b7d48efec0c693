"""Every setting of a run: typed, frozen, read strictly from YAML and the command line.

A key that no field has, a value of the wrong type or a block that belongs to another algorithm is refused in one line with the
file and line (or the option), before a model is loaded. Names are those of Hugging Face and TRL wherever they have one.
"""

import ast
import difflib
import inspect
import itertools
import math
import os
import re
import shlex
import sys
import textwrap
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal, NoReturn, get_args, get_origin
from urllib.parse import urlsplit

import jsonargparse
import yaml

from algorithms.dpo import Config as Dpo
from algorithms.grpo import Config as Grpo
from algorithms.kto import Config as Kto
from algorithms.orpo import Config as Orpo
from algorithms.sft import Config as Sft
from algorithms.simpo import Config as Simpo

AlgorithmName = Literal["sft", "dpo", "simpo", "kto", "orpo", "grpo"]

SECRET = re.compile(  # a URL with a password, keys of the hub, of judges and of trackers, and what is called one
    r"://[^/\s@]+@|\b(hf_|ghp_|gsk_)[A-Za-z0-9]{30,}|\bsk-(?=\S*\d)[A-Za-z0-9_-]{32,}|(api[-_]?key|token|password)\s*=\s*['\"]?\w"
)
RECIPES = Path(__file__).parents[1] / "launch" / "recipes"  # <algorithm>.yaml there is read when no --config is given

FLAGS = {"print_config": "(?!)", "dry_run": r"[1-9]\d*(x(cuda|cpu))?"}  # options that may stand alone: what their values look like

OLD_NAMES = {  # what to do here: the names that TRL, torchtune, axolotl and others have for it; MIGRATION.md has them as tables
    "set algorithm": "rl method stage recipe trainer rl_type trainer_type",
    "set train.global_batch_size and train.micro_batch_tokens": "batch_size train_batch_size micro_batch_size eval_batch_size"
    " per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps auto_find_batch_size",
    "set fsdp.activation_checkpointing (full, selective, offload)": "gradient_checkpointing enable_activation_checkpointing"
    " enable_activation_offloading activation_offloading gradient_checkpointing_kwargs",
    "set train.learning_rate": "lr",
    "set train.num_train_epochs": "epochs num_epochs max_epochs",
    "set train.max_steps": "max_iters max_steps_per_epoch total_steps",
    "set train.warmup_steps (a fraction below 1)": "warmup warmup_ratio num_warmup_steps",
    "set train.lr_scheduler_type": "scheduler lr_scheduler",
    "set train.max_grad_norm": "clip_grad_norm grad_clip gradient_clipping max_norm",
    "set train.adam_beta1 and train.adam_beta2": "betas adam_betas optim_args",
    "set train.adam_epsilon": "eps adam_eps",
    "set model.dtype": "bf16 fp16 precision torch_dtype mixed_precision",
    "set model.compile": "torch_compile compile_model torch_compile_backend",
    "set model.model_name_or_path": "model model_name base_model pretrained_model_name_or_path checkpointer checkpoint_dir"
    " checkpoint_files base_model_config",
    "set model.attn_implementation": "flash_attention flash_attn use_flash_attention sdp_attention xformers_attention eager_attention"
    " attn_impl attention",
    "set model.model_revision": "revision revision_of_model",
    "set data.train": "data dataset datasets dataset_name train_file data_files",
    "set data.eval": "eval_dataset val_set_size test_datasets dataset_val validation_file val_file",
    "set data.train_split": "dataset_train_split",
    "set data.eval_split": "dataset_test_split",
    "set data.config": "dataset_config dataset_config_name subset",
    "set data.columns": "dataset_text_field column_map text_column field_instruction field_messages message_property_mappings",
    "set data.max_length": "max_seq_len max_seq_length seq_len sequence_len cutoff_len max_prompt_length",
    "set data.completion_only_loss": "train_on_inputs train_on_input",
    "set data.assistant_only_loss": "roles_to_train masking_strategy",
    "set model.chat_template_path": "chat_template chat_template_jinja chat_template_file prompt_template template",
    "set data.weights": "interleave_probs mix_strategy dataset_mixer dataset_weights probabilities",
    "set data.max_rows": "max_samples max_train_samples dataset_streaming streaming",
    "the tokenizer's chat template is used, nothing to set": "tokenizer tokenizer_type tokenizer_name_or_path tokenizer_config model_type"
    " special_tokens eot_tokens eos_token pad_token",
    "set evaluation.steps (0: at the end only)": "eval_steps eval_strategy evaluation_strategy evals_per_epoch run_val_every_n_steps",
    "set checkpoint.save_steps (0: at the end only)": "save_strategy save_every saves_per_epoch save_every_n_steps",
    "set checkpoint.save_total_limit": "keep_last_n_checkpoints",
    "set checkpoint.resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "set log.report_to, log.project and log.run_name": "metric_logger wandb use_wandb wandb_project wandb_name wandb_run_name"
    " wandb_entity mlflow_experiment_name mlflow_run_name",
    "set log.logging_steps": "log_every_n_steps logging_strategy log_interval",
    "set train.optim": "optimizer optimizer_type optim_type",
    "set lora.r": "lora_r lora_rank rank use_peft use_lora adapter peft_config",
    "set lora.target_modules": "lora_target_modules lora_target_linear lora_attn_modules apply_lora_to_mlp apply_lora_to_output",
    "set lora.modules_to_save": "lora_modules_to_save",
    "set lora.use_dora": "peft_use_dora",
    "set lora.use_rslora": "peft_use_rslora",
    "set lora.adapter_name_or_path": "lora_model_dir adapter_path",
    "set model.quantization to nf4": "load_in_4bit use_4bit qlora bnb_4bit_quant_type load_in_8bit quantization_config",
    "set dpo.beta": "dpo_beta rl_beta",
    "set dpo.loss_type to [sigmoid, sft], and dpo.loss_weights": "rpo_alpha",
    "the reference's log-probs of fixed data are always computed once, nothing to set": "precompute_ref_log_probs",
    "set reference.model_name_or_path": "ref_model ref_model_path reference_checkpointer",
    "set grpo.num_generations": "grpo_samples group_size",
    "set grpo.max_completion_length": "max_generated_tokens",
    "set grpo.beta": "kl_coeff kl_coef",
    "set grpo.epsilon": "clip_range clip_eps",
    "set grpo.reward_funcs": "reward_model reward_fn reward_functions reward_model_name_or_path",
    "set rollout.engine to vllm_server, and rollout.vllm_address": "use_vllm vllm vllm_mode vllm_server_host vllm_server_port",
    "weights are always sharded over all of torchrun's ranks; set fsdp.replicas for copies of them": "deepspeed fsdp_config fsdp_version"
    " fsdp_sharding_strategy data_parallel_replicate_dim accelerator_config",
    "rows are always packed, nothing to set": "packing packed sample_packing pad_to_sequence_len group_by_length padding_free"
    " eval_packing packing_strategy",
    "rows are tokenised once before the run, nothing to set": "dataset_num_proc dataloader_num_workers dataset_prepared_path"
    " preprocessing_num_workers dataset_processes",
    "there is nothing to set: log-probs never hold tokens x vocabulary": "use_liger_kernel use_liger_loss liger_fused_linear_cross_entropy",
    "upload output_dir/final with `hf upload`; nothing is pushed by a run": "push_to_hub hub_model_id hub_token hub_strategy",
    "settings are names, never classes; MIGRATION.md has this trainer's": "_component_",
    "set algorithm, and loss_type in the block of its name": "loss loss_fn",
    "everything is written under output_dir": "logging_dir output_path overwrite_output_dir log_dir",
    "checkpoints are always safetensors, nothing to set": "save_safetensors save_only_model",
    "rows are shuffled by seed, nothing to set": "shuffle shuffle_dataset data_seed shuffle_merged_datasets",
    "a run uses the GPUs that torchrun gives it, nothing to set": "device device_map use_cpu no_cuda n_gpu local_rank ddp_backend",
    "columns that nothing reads are left out by themselves, and rewards get all": "remove_unused_columns",
    "there is nothing like it here": "neftune_noise_multiplier neftune_noise_alpha plugins profiler optimizer_in_bwd",
}

OLD_VALUES = {  # what others call a value of ours
    "adamw": "adamw_torch adamw_torch_fused adamw_hf adamw_apex_fused torch.optim.AdamW",
    "adamw_8bit": "adamw_bnb_8bit bitsandbytes.optim.AdamW8bit",
    "bfloat16": "bf16 torch.bfloat16",
    "float32": "fp32 torch.float32",
    "warmup_stable_decay": "wsd",
}


def require(ok, key, got, expected):
    """What a dataclass cannot accept, in the words of the config: `parse` puts the file and line before it."""
    if not ok:
        raise ValueError(f"{key}: got {got!r}, expected {expected}")


def at_least(block, settings, **lows):
    """Lower bounds by field name; null passes, NaN and infinity do not."""
    for name, low in lows.items():
        value = getattr(settings, name)
        require(value is None or low <= value < math.inf, f"{block}.{name}", value, f"a number from {low} up")


def address_of(address):
    """(host, port) of "host:port", or None if it is something else."""
    try:
        parts = urlsplit(f"//{address}")
        good = parts.hostname and parts.port and parts.netloc == address and "@" not in address
    except ValueError:
        return None
    return (parts.hostname, parts.port) if good else None


@dataclass(frozen=True)
class Model:
    model_name_or_path: str
    """Hub name, local folder, or `builtin:tiny` (a small Qwen3-shaped model and its tokenizer, made in place)."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub model."""
    chat_template_path: str | None = None
    """.jinja file of a chat template, kept with the tokenizer in `final/`; null: the tokenizer's own."""
    trust_remote_code: bool = False
    """Run the model's own Python code; needs a pinned 40-hex `model_revision`."""
    from_scratch: bool = False
    """Random weights of the model's shape instead of its trained ones."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What layers compute in; master weights, log-probs and reductions stay float32. auto: bfloat16 on a GPU, float32 on a CPU."""
    attn_implementation: Literal["auto", "sdpa", "varlen", "flex", "flash_attention_2", "flash_attention_3", "flash_attention_4"] = "auto"
    """Attention over packed rows. sdpa: torch's, row by row, anywhere; varlen: torch's for 16-bit GPUs; auto: the fastest that is there."""
    logprobs: Literal["chunked", "eager"] = "chunked"
    """How log-probs leave the head. chunked: never more than a slice of (tokens x vocabulary) in memory; eager: plain autograd."""
    kernels: list[Literal["rms_norm", "swiglu", "rope"]] = field(default_factory=list)
    """Operations of a decoder layer that Liger's kernels take over, on a GPU; what was swapped is printed."""
    compile: bool = False
    """Compile each decoder layer with torch.compile: faster steps after a minute or so of compiling."""
    cuda_graphs: bool = False
    """Record a micro-batch's GPU work once for each shape and replay it; where weights stay whole (fsdp.reshard_after_forward)."""
    float8: Literal["tensorwise", "rowwise"] | None = None
    """8-bit products of decoder layers, by torchao, for 1B weights and more; scales are of what is computed at once. Best compiled."""
    quantization: Literal["nf4"] | None = None
    """nf4 (QLoRA): linear layers are kept in 4 bits with double quantization, by bitsandbytes, and sharded so; needs `lora.r`."""

    def __post_init__(self):
        cure = "nothing with model.compile, which makes kernels of its own for these operations"
        require(not (self.kernels and self.compile), "model.kernels", self.kernels, cure)
        pinned = re.fullmatch("[0-9a-f]{40}", self.model_revision or "") or Path(self.model_name_or_path).is_dir()
        cure = "false, or a model.model_revision of 40 hex digits: a branch may hold other code tomorrow"
        require(pinned or not self.trust_remote_code, "model.trust_remote_code", self.trust_remote_code, cure)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters over a frozen base, by peft, whose names these are."""

    r: int | None = None
    """Rank of the adapters; null: all weights are trained."""
    lora_alpha: float = 8
    """An adapter's output is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training; SFT alone."""
    target_modules: str | list[str] = "all-linear"
    """Names of linear layers, a regular expression of whole names, or all-linear: all but the head."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    use_dora: bool = False
    """Train the length of each row of a weight apart from its direction (DoRA)."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules that are trained whole beside the adapters: lm_head, embed_tokens."""
    adapter_name_or_path: str | None = None
    """Folder of an adapter in peft's format to go on from, instead of a new one; the settings above must be those it was made with."""

    def __post_init__(self):
        at_least("lora", self, r=1)
        require(0 < self.lora_alpha < math.inf, "lora.lora_alpha", self.lora_alpha, "a number above 0")
        require(0 <= self.lora_dropout < 1, "lora.lora_dropout", self.lora_dropout, "a number from 0 up to, not including, 1")
        require(self.target_modules, "lora.target_modules", self.target_modules, "names of linear layers, or all-linear")


@dataclass(frozen=True)
class Data:
    train: str | list[str]
    """Local .jsonl, .json or .parquet file, hub dataset, or `builtin:letters`; or a list of them, which are mixed."""
    weights: list[float] | None = None
    """Share of each source in an epoch's examples; these are the fewest that leave no row out, so rows repeat. null: each row once."""
    max_rows: int | None = None
    """Rows to take of each source of `train`, its first; the rest of a hub dataset, .jsonl or .parquet is not read. null: all."""
    format: Literal["sharegpt", "alpaca"] | list[Literal["sharegpt", "alpaca"] | None] | None = None
    """Whose columns rows have; null: TRL's. A list: one for each source of `train`, and `eval` is read as the first."""
    eval: str | None = None
    """Held-out data, the same forms as `train`."""
    train_split: str | list[str] = "train"
    """Split of a hub dataset to train on; or a list, as of `format`."""
    eval_split: str = "test"
    """Split of a hub dataset to evaluate on."""
    config: str | list[str | None] | None = None
    """Configuration (subset) of a hub dataset; or a list, as of `format`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames, TRL's (or `format`'s) name to the file's: {prompt: question, completion: answer}; in a mix, where they are."""
    chat: bool = False
    """Make a plain prompt and its completions the user's and the assistant's turn of the chat template."""
    system_prompt: str | None = None
    """A system message to put before every conversation."""
    max_length: int | None = 1024
    """Tokens; longer rows are cut at the end and counted, longer prompts of grpo left out and counted. null: no limit."""
    completion_only_loss: bool | None = None
    """Train on the completion alone; null: yes where rows have a prompt and a completion."""
    assistant_only_loss: bool = False
    """Train on assistant turns alone, end-of-turn token included."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row does: stop the run before it starts, or be left out and counted by reason."""

    def __post_init__(self):
        require(all(isinstance(name, str) for name in self.columns), "data.columns", self.columns, "names of columns; quote them")
        at_least("data", self, max_length=2, max_rows=1)
        several = len(self.train) if isinstance(self.train, list) else 0
        expected = f"{several} of them, one a source of data.train" if several else "no list for one source"
        for name in ("weights", "format", "train_split", "config"):
            value = getattr(self, name)
            require(not isinstance(value, list) or len(value) == several > 0, f"data.{name}", value, expected)
        require(all(0 < w < math.inf for w in self.weights or ()), "data.weights", self.weights, "numbers above 0")


@dataclass(frozen=True)
class Train:
    global_batch_size: int = 64
    """Examples (rows, pairs, prompts x generations) per optimizer step, whatever the number of GPUs."""
    micro_batch_tokens: int = 8192
    """Most tokens that one rank computes at once; changes memory and speed, never the maths."""
    max_steps: int | None = None
    """Optimizer steps; null: as `num_train_epochs` says."""
    num_train_epochs: float = 1.0
    """Passes over the data when `max_steps` is null."""
    learning_rate: float = 2e-5
    """AdamW's step size at the top of the schedule; left out, TRL's: 2e-5 for sft, 1e-6 for the others."""
    lr_scheduler_type: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "linear"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: float = 0.0
    """Steps of linear warm-up; below 1, a fraction of all steps."""
    decay_steps: float = 0.1
    """Steps of the decay of warmup_stable_decay; below 1, a fraction of all steps."""
    weight_decay: float = 0.0
    """AdamW's, decoupled from the gradient."""
    adam_beta1: float = 0.9
    """Decay of the mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """Added to the root of the mean of squared gradients."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """adamw: torch's, fused; 8bit: bitsandbytes' with its state in 8 bits; paged: state that moves to the host where the GPU is full."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""

    def __post_init__(self):
        at_least("train", self, global_batch_size=1, micro_batch_tokens=2, max_steps=1, learning_rate=0, warmup_steps=0)
        at_least("train", self, decay_steps=0, weight_decay=0, max_grad_norm=0)
        for name in ("num_train_epochs", "adam_epsilon"):
            require(0 < getattr(self, name) < math.inf, f"train.{name}", getattr(self, name), "a number above 0")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "a number from 0 up to, not including, 1")
        for name in ("warmup_steps", "decay_steps"):
            steps = getattr(self, name)
            require(steps < 1 or steps == int(steps), f"train.{name}", steps, "whole steps, or a fraction of all steps below 1")


@dataclass(frozen=True)
class Evaluation:
    steps: int = 0
    """Evaluate every this many optimizer steps, and at the end; 0: at the end only."""
    generate: int = 0
    """This many held-out prompts are answered, and compared with the reference or, for grpo, rewarded; 0: none."""
    max_new_tokens: int = 256
    """Longest generated answer, tokens."""
    num_samples: int = 1
    """Answers to each prompt, for grpo: the k of pass@k."""
    temperature: float = 0.0
    """Of sampling answers, for grpo; 0: the likeliest token each time."""
    answer_pattern: str | None = None
    """Regular expression; its last match (group 1 if it has one), without commas, is compared instead of the whole answer."""

    def __post_init__(self):
        at_least("evaluation", self, steps=0, generate=0, max_new_tokens=1, num_samples=1, temperature=0)
        many = self.num_samples > 1 and self.temperature == 0
        require(not many, "evaluation.num_samples", self.num_samples, "1 at evaluation.temperature 0, where all answers are alike")
        try:
            re.compile(self.answer_pattern or "")
        except re.error as error:
            require(False, "evaluation.answer_pattern", self.answer_pattern, f"a regular expression ({error})")


@dataclass(frozen=True)
class Rollout:
    """How GRPO's completions are sampled and judged; what is sampled is in `grpo`."""

    engine: Literal["in_process", "vllm_server"] = "in_process"
    """in_process: the trainer's own weights, in its own process; vllm_server: a vLLM server, for models that outgrow that."""
    max_num_seqs: int = 256
    """Completions that one rank of in_process decodes at once, and keeps caches for."""
    reward_seconds: float = 60.0
    """A reward function that takes longer over a rollout is stopped, and what it made slow gets no reward."""
    reward_workers: int = 1
    """Processes per rank that run reward functions."""
    vllm_address: str | None = None
    """host:port of a running server, started with VLLM_SERVER_DEV_MODE=1 and --logprobs-mode processed_logprobs; null: start one."""
    vllm_command: str = "python"
    """Starts the Python of the environment that has vLLM."""
    vllm_devices: str | None = None
    """CUDA_VISIBLE_DEVICES of the started server; null: as the run's own, whose GPUs it then shares."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of the memory of each of its GPUs that the started server takes."""
    vllm_timeout_seconds: float = 600
    """The longest that one request (a completion, a change of weights) may take."""
    vllm_start_timeout_seconds: float = 600
    """The longest that the server may take until it is ready."""
    vllm_weights_dir: str | None = None
    """Where new weights are handed over, a folder that the server can read; null: /dev/shm if there is room, else `output_dir`."""
    vllm_extra_args: list[str] = field(default_factory=list)
    """More arguments of the started server, e.g. [--tensor-parallel-size, "2"]."""

    def __post_init__(self):
        at_least("rollout", self, max_num_seqs=1, reward_workers=1)
        for f in fields(self):
            unset = f.default if f.default is not MISSING else f.default_factory()
            alone = not f.name.startswith("vllm_") or self.engine == "vllm_server" or getattr(self, f.name) == unset
            require(alone, f"rollout.{f.name}", getattr(self, f.name), "nothing, unless rollout.engine is vllm_server")
        address = self.vllm_address
        require(address is None or address_of(address), "rollout.vllm_address", address, "host:port, e.g. 127.0.0.1:8000")
        require(shlex.split(self.vllm_command), "rollout.vllm_command", self.vllm_command, "a Python, e.g. /opt/vllm/bin/python")
        share = self.vllm_gpu_memory_utilization
        require(0 < share <= 1, "rollout.vllm_gpu_memory_utilization", share, "a number above 0 and up to 1")
        at_least("rollout", self, vllm_timeout_seconds=1, vllm_start_timeout_seconds=1)
        for name in ("vllm_command", "vllm_devices", "vllm_gpu_memory_utilization", "vllm_extra_args"):
            value, unset = getattr(self, name), type(self).__dataclass_fields__[name]
            unset = unset.default_factory() if name == "vllm_extra_args" else unset.default
            require(address is None or value == unset, f"rollout.{name}", value, "nothing, as the server at vllm_address already runs")
        require(0 < self.reward_seconds < math.inf, "rollout.reward_seconds", self.reward_seconds, "a number above 0")


@dataclass(frozen=True)
class Fsdp:
    replicas: int = 1
    """Groups of ranks that each hold a whole sharded model (HSDP when above 1)."""
    reshard_after_forward: bool | Literal["auto"] = "auto"
    """Gather weights anew for each pass; false: once a step, and keep them and gradients whole. auto: false on GPUs where they fit."""
    prefetch: int = 0
    """Layers whose weights are asked for ahead of the one that computes; 0: torch's own order, one ahead in the backward pass."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """What gradients travel and are summed over ranks in; they are kept in float32."""
    activation_checkpointing: Literal["none", "selective", "full", "offload", "auto"] = "none"
    """What layers keep to go backward. selective: products; full: their input; offload: that, on the host; auto: the first that fits."""
    timeout_seconds: int = 600
    """A collective that takes longer ends the job."""

    def __post_init__(self):
        at_least("fsdp", self, replicas=1, prefetch=0, timeout_seconds=1)


@dataclass(frozen=True)
class Checkpoint:
    save_steps: int = 0
    """Save every this many optimizer steps, and at the end; 0: at the end only."""
    save_total_limit: int | None = 2
    """Newest checkpoints kept; null: all."""
    async_save: bool = False
    """Training goes on while a checkpoint, copied to the host's memory, is written; a next one waits for it."""
    on_save_error: Literal["stop", "warn"] = "stop"
    """What a checkpoint that cannot be written (a full disk) does; in the background it is seen at the next one. warn: say it, go on."""
    resume: str = "auto"
    """auto: the newest whole checkpoint of `output_dir`, if any; never: refuse a used `output_dir`; or a checkpoint folder."""

    def __post_init__(self):
        at_least("checkpoint", self, save_steps=0, save_total_limit=1)


@dataclass(frozen=True)
class Log:
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    """Besides metrics.jsonl, which is always written; by their own libraries: pip install -e '.[trackers]'."""
    project: str = "baretune"
    """What the trackers file the run under: W&B's and trackio's project, MLflow's experiment."""
    run_name: str | None = None
    """The run's name there; null: the last part of output_dir."""
    logging_steps: int = 1
    """Show a line on the console every this many steps; metrics.jsonl has every step."""

    def __post_init__(self):
        at_least("log", self, logging_steps=1)


@dataclass(frozen=True)
class Reference:
    """What DPO and KTO, and GRPO with a KL term, compare the policy with."""

    model_name_or_path: str | None = None
    """Hub name or local folder; null: the policy as it is before its first update."""
    sync_ref_model: bool = False
    """Let the reference follow the policy (TR-DPO)."""
    ref_model_sync_steps: int = 512
    """Optimizer steps between two updates of a synced reference."""
    ref_model_mixup_alpha: float = 0.6
    """Share of the policy in such an update."""

    def __post_init__(self):
        at_least("reference", self, ref_model_sync_steps=1)
        alpha = self.ref_model_mixup_alpha
        require(0 < alpha <= 1, "reference.ref_model_mixup_alpha", alpha, "a number above 0 and up to 1")


@dataclass(frozen=True)
class Config:
    output_dir: str
    """Everything that the run writes goes here."""
    model: Model
    data: Data
    algorithm: AlgorithmName = "sft"
    """What is trained for; the block of this name holds its settings, and no other algorithm's block may be set."""
    seed: int = 42
    """Of everything that is drawn at random."""
    lora: Lora = field(default_factory=Lora)
    train: Train = field(default_factory=Train)
    evaluation: Evaluation = field(default_factory=Evaluation)
    rollout: Rollout = field(default_factory=Rollout)
    fsdp: Fsdp = field(default_factory=Fsdp)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    reference: Reference = field(default_factory=Reference)
    sft: Sft = field(default_factory=Sft)
    dpo: Dpo = field(default_factory=Dpo)
    simpo: Simpo = field(default_factory=Simpo)
    kto: Kto = field(default_factory=Kto)
    orpo: Orpo = field(default_factory=Orpo)
    grpo: Grpo = field(default_factory=Grpo)

    def __post_init__(self):
        require(self.output_dir, "output_dir", "", "a folder")
        require(self.model.model_name_or_path, "model.model_name_or_path", "", "a hub name, a local folder or builtin:tiny")
        named = self.data.train and all(self.data.train)
        require(named, "data.train", self.data.train, "a file, a hub dataset or builtin:letters")
        has_reference = self.algorithm in ("dpo", "kto") or (self.algorithm == "grpo" and self.grpo.beta > 0)
        for name, value in asdict(self.reference).items():
            used = has_reference or value == getattr(Reference(), name)
            cure = "set grpo.beta" if self.algorithm == "grpo" else "leave it out"
            require(used, f"reference.{name}", value, f"nothing, as this {self.algorithm} has no reference; {cure}")
        for name, value in asdict(self.rollout).items():
            used = self.algorithm == "grpo" or value == getattr(Rollout(), name)
            require(used, f"rollout.{name}", value, f"nothing, as {self.algorithm} samples nothing; leave it out")
        unread = ("answer_pattern",) if self.algorithm == "grpo" else ("num_samples", "temperature")
        for name in unread:
            value = getattr(self.evaluation, name)
            cause = "rewards judge the answers of grpo" if self.algorithm == "grpo" else f"{self.algorithm} is evaluated greedily"
            require(value == getattr(Evaluation(), name), f"evaluation.{name}", value, f"nothing, as {cause}; leave it out")
        if self.algorithm == "grpo":
            answers = self.evaluation.generate or not self.data.eval
            require(answers, "evaluation.generate", 0, "a number of prompts of data.eval to answer; or leave data.eval out")
            whole, size = self.train.global_batch_size % self.grpo.num_generations == 0, self.train.global_batch_size
            require(whole, "train.global_batch_size", size, f"a multiple of grpo.num_generations, {self.grpo.num_generations}")
        if self.rollout.engine == "vllm_server" and self.grpo.vllm_importance_sampling_correction:
            mode, off = self.grpo.vllm_importance_sampling_mode, "or vllm_importance_sampling_correction: false"
            by_token = self.grpo.loss_type != "vespo" or mode.startswith("token")
            require(by_token, "grpo.vllm_importance_sampling_mode", mode, f"token_mask or token_truncate for vespo, {off}")
            for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):  # vLLM's log-probs are then of what is left
                value = getattr(self.grpo, name)
                require(value == neutral, f"grpo.{name}", value, f"{neutral}, as it would bias the importance ratio to vLLM, {off}")
        self.check_lora()
        own = self.model.compile and self.fsdp.activation_checkpointing == "selective"
        cure = "none, full or offload where model.compile is on, which chooses by itself what a layer keeps"
        require(not own, "fsdp.activation_checkpointing", "selective", cure)
        if self.model.cuda_graphs:
            cure = "false or auto with model.cuda_graphs, which replays what lies at the same addresses"
            require(self.fsdp.reshard_after_forward is not True, "fsdp.reshard_after_forward", True, cure)
            kept = self.fsdp.activation_checkpointing
            require(kept != "offload", "fsdp.activation_checkpointing", kept, "none, selective or full with model.cuda_graphs")
            name = self.model.attn_implementation
            cure = "auto, varlen or flash_attention_2 to 4 with model.cuda_graphs: the others are made anew for each micro-batch"
            require(name not in ("sdpa", "flex"), "model.attn_implementation", name, cure)
            require(self.model.quantization is None, "model.quantization", self.model.quantization, "null with model.cuda_graphs")
            cure = "null with model.cuda_graphs, which fills micro-batches up: the 8-bit scales would be of the filling too"
            require(self.model.float8 is None, "model.float8", self.model.float8, cure)
        for name in ("steps", "generate"):
            value = getattr(self.evaluation, name)
            require(not value or self.data.eval, f"evaluation.{name}", value, "0 while data.eval is null; set data.eval")

    def check_lora(self):
        require(not (self.lora.r and self.model.float8), "model.float8", self.model.float8, "null where lora.r is set")
        for name, value in asdict(self.lora).items():
            used = self.lora.r or value == getattr(Lora(), name)
            require(used, f"lora.{name}", value, "nothing while lora.r is null; set lora.r")
        if self.lora.r is None:
            cure = "null, or lora.r set: 4-bit weights cannot be trained, only adapters over them"
            require(self.model.quantization is None, "model.quantization", self.model.quantization, cure)
            return
        name = self.model.model_name_or_path
        drawn = self.model.from_scratch or (name.startswith("builtin:") and not name.endswith("sft"))
        require(not drawn, "lora.r", self.lora.r, "null for a model of random weights, which are kept nowhere")
        cure = "false where lora.r is set and the reference is a model of its own: only a copy of the adapters can follow adapters"
        following = self.reference.sync_ref_model and self.reference.model_name_or_path
        require(not following, "reference.sync_ref_model", self.reference.sync_ref_model, cure)
        cure = f"0 for {self.algorithm}: its losses compare log-probs, which dropout would blur (TRL sets it to 0 there in silence)"
        require(self.algorithm == "sft" or not self.lora.lora_dropout, "lora.lora_dropout", self.lora.lora_dropout, cure)


class Refused(Exception):
    """A setting that cannot be used; the message is the line that the user sees."""


class Parser(jsonargparse.ArgumentParser):
    def error(self, message, ex=None) -> NoReturn:
        raise Refused(message)  # argparse would print 60 lines of usage first


def parse(argv: list[str] | None = None) -> Config:
    """The settings of a run: the YAML file of --config, and over it the other options in `argv` (default: the command line's).

    What cannot be used ends the process with code 2 and one line on stderr: file:line or option, what was got, what was expected.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        known = settings(Config)
        if {"-h", "--help"} & set(argv):
            finish(build_parser(known, docs(Config)).format_help())
        options = read_options(argv, known)
        cfg = load(options, known)
    except Refused as error:
        print(" ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    if "print_config" in dict(options):
        finish(to_yaml(cfg))
    return cfg


def dry_run(argv: list[str] | None = None) -> tuple[int, str | None] | None:
    """What `--dry_run`, `--dry_run=64` or `--dry_run=64xcuda` asks for: (ranks, device type or None for this machine's); or None."""
    asked = dict(read_options(sys.argv[1:] if argv is None else argv, settings(Config))).get("dry_run", "")
    if asked == "":
        return None
    ranks, _, device = (asked or os.environ.get("WORLD_SIZE", "1")).partition("x")
    return int(ranks), device or None


def as_dict(cfg: Config) -> dict:
    """Plain dicts and lists, without the blocks of algorithms that the run does not use."""
    values = asdict(cfg)
    unused = foreign(values, cfg.algorithm, get_args(settings(type(cfg))["algorithm"].type))
    return {key: value for key, value in values.items() if key not in unused}


def flat(values, prefix=""):
    """Nested settings as {dotted key: value}."""
    out = {}
    for name, value in values.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def to_yaml(cfg: Config) -> str:
    """What `parse` reads back as an equal Config."""
    return yaml.safe_dump(as_dict(cfg), sort_keys=False, allow_unicode=True)


def finish(text) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this once per GPU
        print(text, end="")
    sys.exit(0)


def settings(block, prefix="") -> dict[str, Field]:
    """Dotted key to dataclass field, of settings and of the blocks that hold them."""
    found = {}
    for f in fields(block):
        found |= {prefix + f.name: f} | (settings(f.type, f"{prefix}{f.name}.") if is_dataclass(f.type) else {})
    return found


def is_setting(key, known):
    return key in known and not is_dataclass(known[key].type)


def is_required(f):
    return not is_dataclass(f.type) and f.default is MISSING and f.default_factory is MISSING


def setting_of(name, known):
    """What an option sets: train.max_steps, log.report_to+ (appends to it), data.columns.prompt (one entry of it); or None."""
    for key, kind in ((name, None), (name.removesuffix("+"), list), (name.rpartition(".")[0], dict)):
        if is_setting(key, known) and kind in (None, get_origin(known[key].type)):
            return key


def foreign(keys, chosen, names):
    """The keys that are, or lie in, the block of an algorithm in `names` other than the chosen one."""
    return [key for key in keys if key.split(".")[0] in set(names) - {chosen}]


def read_options(argv, known) -> list[tuple[str, str]]:
    """(name, value) in the order given; `--name=value` and `--name value` alike."""
    options, tokens = [], iter(argv)
    for token in tokens:
        match = re.fullmatch(r"--([^=\s]+)(?:=(.*))?", token, re.DOTALL)
        if not match:
            raise Refused(f"{token!r} is not an option, expected --train.max_steps 5 or --train.max_steps=5")
        name, value = match.groups()
        key = setting_of(name, known)
        if key is None and name not in ("config", *FLAGS):
            names = [*(key for key in known if is_setting(key, known)), "config", *FLAGS]
            raise Refused(f"unknown option --{name}; {nearest(name, names, '--')}")
        if name in FLAGS and value is not None and not re.fullmatch(FLAGS[name], value):
            more = ", or ranks, as in --dry_run=64 or --dry_run=64xcuda" if name == "dry_run" else ""
            raise Refused(f"--{name}: got {value!r}, expected nothing{more}")
        if name not in FLAGS and value is None:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise Refused(f"--{name}: got nothing, expected {describe(known[key].type) if key else 'a YAML file'}")
        if name == "config" and (not value or name in dict(options)):
            raise Refused(f"--config: {'given twice' if value else 'got nothing'}, expected one YAML file")
        options.append((name, value))
    return options


def read_yaml(path, known) -> tuple[dict, dict]:
    """(values of settings, line numbers of settings and blocks), by dotted key."""
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            raise Refused(f"{path}:1: empty, expected settings such as `output_dir: runs/first`")
        found, values = read_block(root, "", path, known), {}
        for key, (_, node) in found.items():
            if is_setting(key, known):
                values[key] = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise Refused(f"{path}:{error.problem_mark.line + 1}: not plain YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refused(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except ValueError as error:  # a date of month 13
        raise Refused(f"{path}:{node.start_mark.line + 1}: {key}: got {node.value!r}, which is no value of YAML: {error}") from error
    return values, {key: line for key, (line, _) in found.items()}


def read_block(node, prefix, path, known) -> dict:
    """Dotted key to (line, YAML node) of all that is in a block, or in a mapping such as data.columns."""
    if not isinstance(node, yaml.MappingNode):
        got = "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value) if node.value else "nothing"
        raise Refused(f"{path}:{node.start_mark.line + 1}: {prefix[:-1] or 'settings'}: got {got}, expected lines of `name: value`")
    found = {}
    for name, value in node.value:
        key, line = f"{prefix}{name.value}", name.start_mark.line + 1
        if key in found:
            raise Refused(f"{path}:{line}: {key} is set twice, first on line {found[key][0]}; keep one")
        if key not in known and not is_setting(prefix[:-1], known):
            raise Refused(f"{path}:{line}: unknown key {key!r}; {nearest(key, known)}")
        found[key] = line, value
        if key in known and (not is_setting(key, known) or isinstance(value, yaml.MappingNode)):
            found |= read_block(value, f"{key}.", path, known)
    return found


def build_parser(known, texts=None) -> Parser:
    """One typed option per setting; `texts` describe them."""
    jsonargparse.set_parsing_settings(import_path_denylist=["*"])  # else a class_path in YAML could import any module
    parser = Parser(prog="launch/train.py", usage="%(prog)s [--config FILE] [--SETTING VALUE ...]", allow_abbrev=False)
    group = parser.add_argument_group("run")
    hidden = {"default": jsonargparse.SUPPRESS}
    group.add_argument("--config", metavar="FILE", help="YAML file of settings; default: launch/recipes/<algorithm>.yaml", **hidden)
    group.add_argument("--print_config", action="store_true", help="Print all settings as YAML, and exit.", **hidden)
    text = "Show an example, the memory and the length of the run, and exit; of so many ranks, here or on GPUs: --dry_run=64xcuda."
    group.add_argument("--dry_run", metavar="RANKS", help=text, **hidden)
    groups = {key: parser.add_argument_group(key) for key in known if not is_setting(key, known)}
    for key, f in known.items():
        if is_setting(key, known):
            text = (texts or {}).get(key, "") + " (required)" * is_required(f)
            default = jsonargparse.SUPPRESS if is_required(f) else f.default if f.default is not MISSING else f.default_factory()
            groups.get(key.rpartition(".")[0], group).add_argument(f"--{key}", type=f.type, default=default, help=text)
    return parser


def docs(block, prefix="") -> dict[str, str]:
    """Dotted key to the string that stands below the field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(block))).body[0].body
    pairs = [(a, b) for a, b in itertools.pairwise(body) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)]
    found = {prefix + a.target.id: b.value.value for a, b in pairs}
    for f in fields(block):
        found |= docs(f.type, f"{prefix}{f.name}.") if is_dataclass(f.type) else {}
    return found


def describe(kind):
    """A type in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    words = [describe(arg) for arg in get_args(kind)]
    forms = {list: "a list, each item {}", dict: "a mapping of {} to {}"}
    return names.get(kind) or forms.get(get_origin(kind), " or ".join(words)).format(*words)


def mismatch(got, kind):
    choices = re.findall(r"\w+", describe(kind).partition("one of ")[2])
    close = [name for name, others in OLD_VALUES.items() if name in choices and str(got) in others.split()]
    close = close or difflib.get_close_matches(str(got), choices, 1)
    cure = ""
    if close and close[0] != got:
        cure = f"; did you mean {close[0]}?"
    elif isinstance(got, list) and any(isinstance(item, dict) for item in got):
        cure = (
            "; what belongs to an item is a setting beside it: of data.train, data.format, data.weights, data.train_split and data.config"
        )
    elif "text" in describe(kind) and not isinstance(got, str | list | None):
        cure = "; quote it"
    return f"got {'null' if got is None else repr(got)}, expected {describe(kind)}{cure}"


def nearest(name, known, dashes=""):
    """What an unknown name was meant to be: a setting of another block, another trainer's name for one, or a misspelt one."""
    leaf = name.rpartition(".")[2]

    def alike(key):
        leaves, whole = (difflib.SequenceMatcher(None, *pair).ratio() for pair in ((leaf, key.rpartition(".")[2]), (name, key)))
        return leaves + whole / 10, key  # the block decides between equal leaves

    score, best = max(map(alike, known))
    cure = next((cure for cure, names in OLD_NAMES.items() if leaf in names.split()), None)
    if cure and best.rpartition(".")[2] != leaf:
        return cure
    block, _, last = best.rpartition(".")
    meant = [best]
    if block in get_args(AlgorithmName) and not name.startswith(f"{block}."):  # which algorithm is trained is not known here
        meant = [key for key in known if key.rpartition(".")[2] == last]
    return f"did you mean {' or '.join(dashes + key for key in meant)}?" if score > 0.7 else "--help lists them all"


def convert(read, known, place):
    """What `read()` returns: values of their settings' types; `place(key)` says where one was set and what was written."""
    try:
        return read()
    except Refused as error:
        key = next(iter(re.findall(r'key "([\w.]+)"', str(error))), None)
        if not is_setting(key, known):
            raise
        where, got = place(key)
        raise Refused(f"{where}: {mismatch(got, known[key].type)}") from error


def load(options, known) -> Config:
    """The Config of a command line that `read_options` took apart."""
    given = {setting_of(name, known) or name: value for name, value in options}
    algorithm, names = given.get("algorithm", known["algorithm"].default), get_args(known["algorithm"].type)
    if algorithm not in names:  # before its recipe is looked for
        raise Refused(f"--algorithm: {mismatch(algorithm, known['algorithm'].type)}")
    path = given.get("config", RECIPES / f"{algorithm}.yaml")
    values, lines = read_yaml(path, known)

    def where(key):
        return f"--{key}" if key in given else f"{path}:{lines[key]}: {key}" if key in lines else f"{path}: {key}"

    parser = build_parser(known)
    overrides = [f"--{name}={value}" for name, value in options if name not in ("config", *FLAGS)]
    in_file = convert(lambda: parser.parse_object(values, defaults=False), known, lambda key: (f"{path}:{lines[key]}: {key}", values[key]))
    merged = convert(lambda: parser.parse_args(overrides, in_file), known, lambda key: (f"--{key}", given[key]))
    if merged.algorithm != "sft" and "train.learning_rate" not in {*given, *lines}:
        merged["train.learning_rate"] = 1e-6
    for key, f in known.items():
        if is_required(f) and key not in merged:
            raise Refused(f"{path}: {key} is missing, expected {describe(f.type)}; set it there or as --{key}")
        if merged.get(key, "") is None and type(None) not in get_args(f.type):  # jsonargparse lets null through
            raise Refused(f"{where(key)}: {mismatch(None, f.type)}")
    for key in known:
        if isinstance(merged.get(key), (str, list, dict)) and SECRET.search(str(merged[key])):
            raise Refused(f"{where(key)}: holds a password or a key, which config.yaml, checkpoints and trackers would show; remove it")
    for key in foreign([*given, *lines], merged.algorithm, names):
        raise Refused(f"{where(key)}: belongs to another algorithm than {merged.algorithm}; remove it or set algorithm to its own")
    try:
        return build(Config, merged.as_dict())
    except ValueError as error:
        key, _, problem = str(error).partition(": ")
        raise Refused(f"{where(key)}: {problem}") from error


def build(block, values):
    """The dataclass of nested dicts."""
    return block(**{f.name: build(f.type, values[f.name]) if is_dataclass(f.type) else values[f.name] for f in fields(block)})
