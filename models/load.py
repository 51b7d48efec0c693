"""transformers in, transformers out: a model read shard by shard into its sharded self, and written back as a Hugging Face folder.

No rank ever holds a full copy: reading and writing go one tensor or one layer at a time.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig

from models import attention, generate, kernels, logprobs, lora, quantize, replica, sharding

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def fetch(cfg):
    """The local folder of `model.model_name_or_path`, downloaded once per host if it is a hub name."""
    name = cfg.model_name_or_path
    if os.path.isdir(name):
        if Path(name, "adapter_config.json").exists() and not Path(name, "config.json").exists():
            cure = "name its base here and it as lora.adapter_name_or_path, or write both as one model by launch/export.py --merge"
            raise ValueError(f"model.model_name_or_path: {name} is an adapter, not a whole model; {cure}")
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"model.model_name_or_path: there is no folder {name!r} (a hub name looks like `Qwen/Qwen3-0.6B`)")
    folder = None
    for turn in ("first on each host", "then the others"):
        if (turn == "first on each host") == (int(os.environ.get("LOCAL_RANK", 0)) == 0):
            try:
                files = [*FILES, *(["*.py"] if cfg.trust_remote_code else [])]
                folder = snapshot_download(name, revision=cfg.model_revision, allow_patterns=files)
            except Exception as e:
                raise ValueError(
                    f"model.model_name_or_path: {name!r} is not a local folder, and the hub did not give it: {type(e).__name__}: "
                    f"{str(e).splitlines()[0]}"
                ) from e
        dist.barrier()
    return folder


def load_tokenizer(cfg, folder):
    return with_template(AutoTokenizer.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code), cfg.chat_template_path)


def with_template(tokenizer, path):
    """The tokenizer, with the chat template of `path` if one is named. ValueError where it cannot be read."""
    if path is not None:
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ValueError(f"model.chat_template_path: {path!r} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    return tokenizer


def build(cfg, folder, fsdp, device, seed, adapters=None, budget=None):
    """The sharded causal language model that `cfg` (the config's `model` block) describes, ready to score.

    Weights are float32, or under adapters (the config's `lora` block) frozen and in the compute dtype. budget: tokens of a micro-batch,
    for a model to be trained; it gets a replica where `fsdp.reshard_after_forward` wants one.
    """
    dtype = sharding.compute_dtype(cfg.dtype, device)
    adapted = bool(adapters and adapters.r)
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)
    model = outline(cfg, model_config, dtype, adapters, attention.choose(cfg.attn_implementation, device, dtype))
    if Path(folder, "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    kernels.swap(model, cfg.kernels, device)
    generate.add_decoder(model)
    twin = None
    if budget and replica.wanted(cfg, fsdp, model, dtype, device.type, sharding.card(device)):
        twin = outline(cfg, model_config, dtype, adapters, model.config._attn_implementation)
        kernels.swap(twin, cfg.kernels, device)
    for part in filter(None, (model, twin)) if cfg.float8 else ():
        kernels.to_float8(part, cfg.float8, device)
    sharding.wrap_layers(twin or model, fsdp.activation_checkpointing, cfg.compile)
    if twin:
        sharding.wrap_layers(model, "none", cfg.compile)  # it scores what is a reference
    sharding.shard(
        model, sharding.make_mesh(device, fsdp.replicas), dtype, fsdp, reshards=bool(twin) or fsdp.reshard_after_forward is not False
    )
    with lora.unwrapped(model):
        if cfg.from_scratch or cfg.model_name_or_path.startswith("builtin:"):
            initialise(model, seed, device)
        else:
            read_weights(model, folder, device)
    if adapted:
        lora.initialise(model, seed, device)
        if adapters.adapter_name_or_path:
            lora.read_adapter(model, adapters.adapter_name_or_path)
    assert sharding.is_tied(model) == model.config.get_text_config().tie_word_embeddings, "tied embeddings came apart"
    model.replica = replica.Replica(model, twin, dtype, fsdp, budget if cfg.cuda_graphs else None) if twin else None
    return model.train()


def outline(cfg, model_config, dtype, adapters, attn_implementation):
    """The whole model on the meta device, able to score, with its adapters, before it is sharded. ValueError: what cannot be trained."""
    declared, adapted = model_config.dtype, adapters and adapters.r  # from_config overwrites the dtype
    if getattr(model_config, "quantization_config", None):
        raise ValueError(f"model.model_name_or_path: {cfg.model_name_or_path} is quantised already; name the model that it was made from")
    make_packable(model_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            model_config,
            dtype=dtype if adapted or cfg.quantization else torch.float32,
            attn_implementation=attn_implementation,
            trust_remote_code=cfg.trust_remote_code,
        )
    if not model._supports_attention_backend:
        raise ValueError(
            f"model.model_name_or_path: {type(model).__name__} does not take attention by name, which packed rows need; Llama, Qwen, "
            "Mistral, Gemma 3, Phi-3, OLMo, SmolLM3, Granite and their like do"
        )
    model.config.dtype = declared
    model.tie_weights()  # before sharding, or the pair is seen as two parameters
    logprobs.add_seam(model, cfg.logprobs)
    if cfg.quantization:
        quantize.swap(model)
    if adapted:
        lora.inject(model, adapters, cfg.model_name_or_path, cfg.model_revision)
    return model


def make_packable(config):
    """Refuse layers that look across the rows of a pack, and set dropout to 0: its draws would depend on how rows are packed.

    TRL switches dropout off for preferences; here it is off for every algorithm, so the reference and the policy are one function.
    """
    config = config.get_text_config()
    strange = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if strange:
        raise ValueError(f"model.model_name_or_path: {config.model_type} has {min(strange)} layers, which would mix the rows of a pack")
    for name, value in list(vars(config).items()):
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float) and value:
            setattr(config, name, 0.0)
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(f"{name} of the model is {value}; set to 0", flush=True)


def size(model):
    """(weights, trained weights, bytes that this rank holds of them all), without gradients and optimizer state."""
    quantised = [m for m in model.modules() if isinstance(m, quantize.NF4Linear)]
    weights = sum(p.numel() for p in model.parameters()) + sum(3 * m.packed.numel() for m in quantised)  # four an element
    held = sum(sharding.local(p).nbytes for p in model.parameters()) + sum(m.scales_bytes() for m in quantised)
    return weights, sum(p.numel() for p in model.parameters() if p.requires_grad), held


def check_vocabulary(model, largest_id):
    rows = model.get_input_embeddings().weight.shape[0]
    if largest_id >= rows:
        raise ValueError(
            f"data.train has token {largest_id}, but the model's embedding has {rows} rows: is its folder's tokenizer another model's?"
        )


def weight_files(folder):
    """The safetensors files of a Hugging Face folder, by its index where it has one."""
    index = Path(folder, "model.safetensors.index.json")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    missing = [n for n in names if not Path(folder, n).exists()]
    if missing:
        raise ValueError(
            f"model.model_name_or_path: {folder} lacks {missing[0]}; weights must be safetensors (a folder of .bin or .pt files is "
            "converted by loading it with transformers and calling save_pretrained)"
        )
    return [str(Path(folder, n)) for n in names]


def read_weights(model, folder, device):
    """Fill a sharded meta model from safetensors through transformers' loader, which reads only this rank's slices of each tensor.

    Layers to be quantised are read before, one whole tensor at a time, and are out of the model's tree while the loader looks at it.
    """
    dtype = model.get_input_embeddings().weight.dtype
    files = [safe_open(path, framework="pt") for path in weight_files(folder)]
    tensors = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118  not a dict
    with quantize.taken_out(model) as quantised:
        for name, layer in quantised.items():
            if f"{name}.weight" not in tensors:
                raise ValueError(
                    f"model.quantization: {folder} has no {name}.weight; nf4 reads only files that name layers as the model does"
                )
            bias = tensors.pop(f"{name}.bias")[:] if layer.bias is not None else None
            layer.fill(tensors.pop(f"{name}.weight")[:], bias, device)
        config = LoadStateDictConfig(
            pretrained_model_name_or_path=str(folder),
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=get_model_conversion_mapping(model, None, None),
            device_map={"": device},
        )
        report, _ = model._load_pretrained_model(model, tensors, None, config)
        report = model._finalize_model_loading(model, config, report)  # ties again, makes the buffers that no file holds
    wrong = {k: sorted(map(str, getattr(report, k))) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        what = "; ".join(f"{len(v)} {k.replace('_', ' ')}, the first {v[0]}" for k, v in wrong.items() if v)
        raise ValueError(f"model.model_name_or_path: the weights of {folder} do not fit its config.json: {what}")


@torch.no_grad()
def initialise(model, seed, device):
    """Random weights by the model's own scheme, the same for every number of ranks.

    Each module's tensors are drawn whole on the CPU from a stream keyed by (seed, module name), and each rank keeps its slice.
    """
    for name, module in model.named_modules():
        parameters = {k: p for k, p in module._parameters.items() if p is not None}
        buffers = {k: b for k, b in module._buffers.items() if b is not None}
        if not parameters and not buffers:
            continue
        for key, p in parameters.items():
            module._parameters[key] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
        for key, b in buffers.items():
            module._buffers[key] = torch.empty(b.shape, dtype=b.dtype)
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big"))
        model._init_weights(module)
        for key, p in parameters.items():
            drawn, module._parameters[key] = module._parameters[key].data, p
            sharding.place(module, key, drawn, device)
        for key in buffers:
            module._buffers[key] = module._buffers[key].to(device)
    model.tie_weights()


def save_pretrained(model, tokenizer, folder, dtype=None, max_shard_bytes=5 * 2**30):
    """Write a Hugging Face folder that plain `from_pretrained` loads, adapters merged; every rank calls it, rank 0 writes.

    Tensors are gathered one decoder layer at a time, already in `dtype` (default: the dtype that the model's config declares), so rank 0
    holds one file's worth. The folder appears whole, by one rename.
    """
    folder, dtype = Path(folder), dtype or model.config.dtype or torch.float32
    temporary = folder.with_name(f".tmp-{folder.name}")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    files, pending, size, total = {}, {}, 0, 0
    for unit in (*units(model), None):
        tensors = gather(unit, dtype) if unit else {}
        if dist.get_rank() != 0:
            continue
        tensors = revert_weight_conversion(model, tensors) if tensors else {}  # e.g. fused experts back to one key each
        grown = sum(t.nbytes for t in tensors.values())
        if pending and (unit is None or size + grown > max_shard_bytes):
            name = f"part-{len(set(files.values())):05d}.safetensors"
            save_file(pending, temporary / name, metadata={"format": "pt"})
            files |= dict.fromkeys(pending, name)
            pending, size = {}, 0
        pending |= tensors
        size, total = size + grown, total + grown
    if dist.get_rank() == 0:
        name_shards(temporary, files, total)
        config = type(model.config).from_dict(model.config.to_dict())
        config.dtype, config.architectures = dtype, [type(model).__name__.removeprefix("FSDP")]
        if lora.unties(lora.wrappers(model)):
            config.tie_word_embeddings = False
        config.save_pretrained(temporary)
        (model.generation_config or GenerationConfig.from_model_config(model.config)).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        publish(temporary, folder)
    dist.barrier()


def units(model):
    """The state dict cut into {name: tensor}s of one decoder layer, or of one tensor outside the layers; a tied head is left out.

    Of what has an adapter or is quantised stands a function in the tensor's place, which gives the weight that it acts with.
    """
    groups = {}
    with lora.unwrapped(model) as adapted:
        acting = quantize.reading(model) | lora.merging(adapted)
        tied = () if lora.unties(adapted) else model.all_tied_weights_keys
        for name, tensor in model.state_dict().items():
            if name not in tied:
                layer = re.match(r".*?\.\d+\.", name)
                name = re.sub(r"\.packed$", ".weight", name)
                groups.setdefault(layer.group() if layer else name, {})[name] = acting.get(name, tensor)
    return list(groups.values())


def gather(unit, dtype):
    """Whole tensors on the CPU; floating-point ones are cast before they travel."""
    out = {}
    for name, tensor in unit.items():
        tensor = tensor if isinstance(tensor, torch.Tensor) else tensor()
        tensor = sharding.whole(tensor.to(dtype) if tensor.is_floating_point() else tensor)
        if dist.get_rank() == 0:
            out[name] = tensor.cpu().contiguous()
    return out


def name_shards(folder, files, total):
    """Give the written parts the names that transformers looks for, and an index where there are several."""
    parts = sorted(set(files.values()))
    final = {p: f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i, p in enumerate(parts)}
    if len(parts) == 1:
        final = {parts[0]: "model.safetensors"}
    else:
        index = {"metadata": {"total_size": total}, "weight_map": {k: final[p] for k, p in sorted(files.items())}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for old, new in final.items():
        os.rename(folder / old, folder / new)


def publish(temporary, folder):
    """Put a finished folder in its place; one that stands there already is removed only then."""
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)  # a killed run may have left one
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
