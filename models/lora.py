"""LoRA and DoRA by peft: adapters in float32 over a frozen base in the compute dtype, in the base's own FSDP groups.

peft's layers are put into the model while it is on the meta device and before it is sharded: after that their gradients would never be
synchronised. The FSDP root stays the causal language model. `unwrapped` shows the base model's own tree, in which weights have the names of
its files, so reading and writing need to know nothing of adapters.
"""

import math
import os
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from models import sharding
from models.dropout import KeyedDropout
from models.logprobs import ScoringHead
from models.quantize import NF4Linear

NAME = "default"  # peft's name for a model's only adapter


def inject(model, settings, base, revision=None):
    """Put the adapters of the config's `lora` block into a model on the meta device; all else is frozen.

    base: what adapter_config.json names as the model that they belong to.
    """
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        modules_to_save=settings.modules_to_save or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=os.path.abspath(base) if os.path.isdir(base) else base,
        revision=revision,
    )
    refuse(model, config)
    inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=True)
    if config.target_parameters:  # which peft adds by itself
        found = ", ".join(sorted({name.rpartition(".")[2] for name, layer in wrappers(model).items() if type(layer) is Linear}))
        raise ValueError(f"lora.target_modules: adapters on the experts of {type(model).__name__} are not supported; name others: {found}")
    for name, layer in wrappers(model).items():
        if settings.lora_dropout and isinstance(layer, LoraLayer):
            model.dropouts[name] = layer.lora_dropout[NAME] = KeyedDropout(settings.lora_dropout, name)
    if isinstance(model.lm_head, Linear):
        model.lm_head.__class__ = AdaptedHead
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def refuse(model, config):
    """What peft would fail at without naming the setting, or do in a way that is not meant."""
    modules, names = dict(model.named_modules()), config.target_modules
    for name in config.modules_to_save or ():
        if not any(key == name or key.endswith(f".{name}") for key in modules):
            raise ValueError(f"lora.modules_to_save: no module of {type(model).__name__} is named {name}; {near(modules)}")
        saved = [module for key, module in modules.items() if key == name or key.endswith(f".{name}")]
        if any(isinstance(part, NF4Linear) for module in saved for part in module.modules()):
            raise ValueError(f"lora.modules_to_save: {name} has 4-bit weights, which cannot be trained whole; leave it out")
    if names == "all-linear":
        return
    found = [key for key in modules if key and check_target_module_exists(config, key)]
    if not found:
        raise ValueError(f"lora.target_modules: no module of {type(model).__name__} matches {sorted_names(names)!r}; {near(modules)}")
    for name in [] if isinstance(names, str) else sorted_names(names):
        if not any(key == name or key.endswith(f".{name}") for key in found):
            raise ValueError(f"lora.target_modules: no module of {type(model).__name__} matches {name!r}; {near(modules)}")
    for key in found:
        if not isinstance(modules[key], nn.Linear):
            kind = type(modules[key]).__name__
            raise ValueError(
                f"lora.target_modules: {key} is no linear layer but {kind}; train it whole by lora.modules_to_save, or leave it out"
            )
    if modules["lm_head"] in [modules[key] for key in found]:
        tied = modules["lm_head"].weight is model.get_input_embeddings().weight
        if tied or config.use_dora:
            why = "shares its weight with the embedding, which merging would change too" if tied else "cannot have DoRA here"
            raise ValueError(f"lora.target_modules: lm_head {why}; leave it out, or train it whole by lora.modules_to_save")


def near(modules):
    names = sorted({key.rpartition(".")[2] for key, module in modules.items() if isinstance(module, nn.Linear)})
    return f"its linear layers are {', '.join(names)}"


class AdaptedHead(Linear):
    """A head with an adapter: hidden (M, H) and the adapter's inner values (M, r) meet its weight and B side by side, (V, H + r)."""

    def forward(self, hidden, labels=None, byproducts=(), temperature=1.0):
        if labels is None:
            return super().forward(hidden)
        return self.base_layer.score(*self.side_by_side(hidden), labels, byproducts, temperature)

    def logits(self, hidden):
        return self.base_layer.logits(*self.side_by_side(hidden))

    def side_by_side(self, hidden):
        if self.disable_adapters:
            return hidden, self.base_layer.weight
        inner = self.lora_A[NAME](self.lora_dropout[NAME](hidden)) * self.scaling[NAME]  # (M, r)
        return torch.cat([hidden, inner], dim=1), torch.cat([self.base_layer.weight, self.lora_B[NAME].weight], dim=1)


def wrappers(model):
    """{name: peft's layer that stands in a module's place}."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LoraLayer, ModulesToSaveWrapper))}


def base_of(wrapper):
    return wrapper.original_module if isinstance(wrapper, ModulesToSaveWrapper) else wrapper.base_layer


@contextmanager
def unwrapped(model):
    """Inside, the model's tree is that of the base alone; gives {name: peft's layer}, which are put back after."""
    found = wrappers(model)
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], w) for name, w in found.items()]
    for parent, name, wrapper in places:
        parent._modules[name] = base_of(wrapper)
    try:
        yield found
    finally:
        for parent, name, wrapper in places:
            parent._modules[name] = wrapper


@contextmanager
def adapters_off(model):
    """Inside, the model is its base. peft's own switch would also toggle requires_grad, at which FSDP's next backward pass fails."""
    layers = wrappers(model).values()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def initialise(model, seed, device):
    """The adapters' first weights, with which the model is its base: what peft draws for this seed, for every number of ranks."""
    torch.manual_seed(seed)
    for layer in wrappers(model).values():
        if isinstance(layer, ModulesToSaveWrapper):
            original = dict(layer.original_module.named_parameters())
            for name, p in layer.modules_to_save[NAME].named_parameters():
                module = layer.modules_to_save[NAME].get_submodule(name.rpartition(".")[0])
                sharding.place(module, name.rpartition(".")[2], sharding.whole(original[name]).to(p.dtype), device)
            for name, buffer in layer.original_module.named_buffers():  # Gemma's embedding has one, in no file
                layer.modules_to_save[NAME].get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer.clone()
            continue
        a = nn.Linear(layer.in_features, layer.r[NAME], bias=False)
        b = nn.Linear(layer.r[NAME], layer.out_features, bias=False)  # peft draws it too before it is set to 0
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        sharding.place(layer.lora_A[NAME], "weight", a.weight.data, device)
        sharding.place(layer.lora_B[NAME], "weight", b.weight.data.zero_(), device)
        if layer.use_dora[NAME]:
            length = torch.linalg.norm(sharding.whole(layer.base_layer.weight), dim=1)  # (out,)
            sharding.place(layer.lora_magnitude_vector[NAME], "weight", length.float(), device)


@torch.no_grad()
def read_adapter(model, folder):
    """Fill the adapters from a folder in peft's format. ValueError where it was made with other settings or for another base."""
    where = f"lora.adapter_name_or_path: {folder}"
    if not Path(folder, "adapter_model.safetensors").exists():
        raise ValueError(f"{where} is no adapter: it has no adapter_model.safetensors")
    ours, theirs = model.peft_config[NAME], LoraConfig.from_pretrained(folder)
    for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(f"lora.{name}: got {getattr(ours, name)}, expected {getattr(theirs, name)}, with which {folder} was made")
    for name in ("alpha_pattern", "rank_pattern", "layer_replication"):
        if getattr(theirs, name):
            raise ValueError(f"{where} was made with {name} {getattr(theirs, name)}, which is not supported; merge it into its base first")
    if theirs.init_lora_weights not in (True, False, "gaussian"):
        how = theirs.init_lora_weights
        raise ValueError(f"{where} begins from changed base weights (init_lora_weights {how!r}); merge it into its base first")
    bases = [os.path.basename(os.path.normpath(config.base_model_name_or_path or "")) for config in (theirs, ours)]
    if bases[0] != bases[1]:
        cure = "if they are one model, say so in its adapter_config.json"
        raise ValueError(f"{where} was made for {theirs.base_model_name_or_path}, not for {ours.base_model_name_or_path}; {cure}")
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    parameters = get_peft_model_state_dict(model, trained(model), NAME, save_embedding_layers=False)
    parameters = {f"base_model.model.{name}": p for name, p in parameters.items()}
    shapes, wanted = ({name: tuple(t.shape) for name, t in group.items()} for group in (tensors, parameters))
    if shapes != wanted:
        name = min(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
        raise ValueError(
            f"{where} was made for other modules or a base of another shape: {name} has shape {shapes.get(name)} "
            f"there, {wanted.get(name)} here"
        )
    for name, p in parameters.items():
        tensor = tensors[name].to(p.device, p.dtype)
        p.to_local().copy_(sharding.slice_of(tensor, p).to_local())


def trained(model):
    """{name: parameter} of the adapters."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def merged(layer):
    """The whole weight that an adapted linear layer acts with, float32."""
    a, b = (sharding.whole(part[NAME].weight).float() for part in (layer.lora_A, layer.lora_B))
    weight = sharding.whole(layer.base_layer.weight).float() + layer.scaling[NAME] * (b @ a)  # (out, in)
    if layer.use_dora[NAME]:
        length = sharding.whole(layer.lora_magnitude_vector[NAME].weight).float()  # (out,)
        weight *= (length / torch.linalg.norm(weight, dim=1))[:, None]
    return weight


def merging(found):
    """{name of a weight of the base: what takes its place when adapters are merged}, of what `unwrapped` gave."""
    out = {}
    for name, layer in found.items():
        if isinstance(layer, ModulesToSaveWrapper):
            out |= {f"{name}.{key}": p.detach() for key, p in layer.modules_to_save[NAME].named_parameters()}
        else:
            out[f"{name}.weight"] = partial(merged, layer)
    return out


def unties(found):
    """Whether a whole copy of head or embedding is trained, which then is no longer the other's."""
    return any(isinstance(w, ModulesToSaveWrapper) and isinstance(base_of(w), (nn.Embedding, ScoringHead)) for w in found.values())


def save_adapter(model, tokenizer, folder):
    """Write a folder that `PeftModel.from_pretrained` loads; every rank calls it, rank 0 writes."""
    from models.load import publish

    folder = Path(folder)
    temporary = folder.with_name(f".tmp-{folder.name}")
    tensors = {}
    for name, p in trained(model).items():
        tensor = sharding.whole(p.detach()).cpu()
        if dist.get_rank() == 0:
            tensors[name] = tensor
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        state = get_peft_model_state_dict(model, tensors, NAME, save_embedding_layers=False)
        tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        config = model.peft_config[NAME]
        config.inference_mode, config.target_modules = True, sorted_names(config.target_modules)
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        publish(temporary, folder)
    dist.barrier()


def sorted_names(names):
    """peft keeps a set, whose order changes from process to process."""
    return names if isinstance(names, str) else sorted(names)
