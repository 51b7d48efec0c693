"""Every setting of a run: typed, frozen, read strictly from YAML and the command line.

A key that no field has, a value of the wrong type or a block that belongs to another algorithm is refused in one line with the
file and line (or the option), before a model is loaded. Names are those of Hugging Face and TRL wherever they have one.
"""

from dataclasses import dataclass, field
from typing import Literal

from algorithms.sft import Config as Sft

AlgorithmName = Literal["sft"]


@dataclass(frozen=True)
class Model:
    model_name_or_path: str
    """Hub name, local folder, or `builtin:tiny` (a small Qwen3-shaped model and its tokenizer, made in place)."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run the model's own Python code; needs a pinned 40-hex `model_revision`."""
    from_scratch: bool = False
    """Random weights of the model's shape instead of its trained ones."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What layers compute in; master weights, log-probs and reductions stay float32. auto: bfloat16 on a GPU, float32 on a CPU."""
    attn_implementation: Literal["auto", "sdpa", "varlen"] = "auto"
    """Attention over packed rows. sdpa: torch's, row by row, anywhere; varlen: torch's kernel for 16-bit GPUs; auto: the fastest here."""
    logprobs: Literal["chunked", "eager"] = "chunked"
    """How log-probs leave the head. chunked: never more than a slice of (tokens x vocabulary) in memory; eager: plain autograd."""


@dataclass(frozen=True)
class Data:
    train: str
    """Local .jsonl, .json or .parquet file, hub dataset, or `builtin:letters`."""
    eval: str | None = None
    """Held-out data, the same forms as `train`."""
    train_split: str = "train"
    """Split of a hub dataset to train on."""
    eval_split: str = "test"
    """Split of a hub dataset to evaluate on."""
    config: str | None = None
    """Configuration (subset) of a hub dataset."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames, TRL's name to the file's: {prompt: question, completion: answer}."""
    max_length: int | None = 1024
    """Tokens; longer rows are cut at the end and counted. null: never cut."""
    completion_only_loss: bool | None = None
    """Train on the completion alone; null: yes where rows have a prompt and a completion."""
    assistant_only_loss: bool = False
    """Train on assistant turns alone, end-of-turn token included."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a malformed row does: stop the run before it starts, or be left out and counted by reason."""


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
    lr_scheduler_type: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "linear"
    warmup_steps: float = 0.0
    """Steps of linear warm-up; below 1, a fraction of all steps."""
    decay_steps: float = 0.1
    """Steps of the decay of warmup_stable_decay; below 1, a fraction of all steps."""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""


@dataclass(frozen=True)
class Evaluation:
    steps: int = 0
    """Evaluate every this many optimizer steps, and at the end; 0: at the end only."""
    generate: int = 0
    """This many held-out prompts are answered greedily and compared with the reference; 0: none."""
    max_new_tokens: int = 256
    """Longest generated answer, tokens."""
    answer_pattern: str | None = None
    """Regular expression; its last match (group 1 if it has one) is compared instead of the whole answer."""


@dataclass(frozen=True)
class Fsdp:
    replicas: int = 1
    """Groups of ranks that each hold a whole sharded model (HSDP when above 1)."""
    reshard_after_forward: bool = True
    """Free gathered weights between forward and backward; false: faster, more memory."""
    timeout_seconds: int = 600
    """A collective that takes longer ends the job."""


@dataclass(frozen=True)
class Checkpoint:
    save_steps: int = 0
    """Save every this many optimizer steps, and at the end; 0: at the end only."""
    save_total_limit: int | None = 2
    """Newest checkpoints kept; null: all."""
    resume: str = "auto"
    """auto: the newest whole checkpoint of `output_dir`, if any; never: refuse a used `output_dir`; or a checkpoint folder."""


@dataclass(frozen=True)
class Log:
    report_to: list[Literal["tensorboard"]] = field(default_factory=lambda: ["tensorboard"])
    """Besides metrics.jsonl, which is always written."""
    logging_steps: int = 1
    """Show a line on the console every this many steps; metrics.jsonl has every step."""


@dataclass(frozen=True)
class Config:
    output_dir: str
    """Everything that the run writes goes here."""
    model: Model
    data: Data
    algorithm: AlgorithmName = "sft"
    seed: int = 42
    train: Train = field(default_factory=Train)
    evaluation: Evaluation = field(default_factory=Evaluation)
    fsdp: Fsdp = field(default_factory=Fsdp)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    sft: Sft = field(default_factory=Sft)
