"""Opening a file runs nothing: what may run code stands in a list with its reason, and malicious files leave a canary untouched."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from models import load, lora
from tests.conftest import ROOT
from train import checkpoint, config, toy

RUNS_CODE = {"eval", "exec", "compile", "__import__", "execfile"}
DANGEROUS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "importlib", "imp", "runpy", "code"}
METHODS = {("torch", "load"), ("numpy", "load"), ("np", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load")}
METHODS |= {("yaml", "load_all"), ("yaml", "unsafe_load_all"), ("jit", "load"), ("hub", "load"), ("subprocess", "check_output")}
METHODS |= {("subprocess", "check_call"), ("os", "execv"), ("os", "execvp"), ("dist", "broadcast_object_list")}
METHODS |= {("dist", "all_gather_object"), ("dist", "gather_object"), ("dist", "scatter_object_list")}  # they pickle
METHODS |= {("os", "system"), ("os", "popen"), ("subprocess", "call"), ("subprocess", "run"), ("subprocess", "Popen")}
ALLOWED = {  # file: what of it -> why
    "launch/get_smollm2.py": {"subprocess.run": "a package manager, to fetch the model that the script is named for"},
    "launch/doctor.py": {
        "importlib": "whether packages of a list in the file are installed",
        "dist.all_gather_object": "what the ranks of one job found, told to each other",
    },
    "models/attention.py": {"importlib": "attention packages of a table in the file"},
    "train/rewards.py": {
        "exec": "a reward file that the user names, in a process of its own",
        "compile": "the same file, so that tracebacks show its lines",
        "Connection": "requests to reward workers are pickled, replies are JSON: a worker cannot run code here",
        "subprocess.Popen": "the reward workers",
    },
    "train/trackers.py": {"importlib": "trackers of a table in the file"},
    "models/vllm_server.py": {"subprocess.Popen": "vLLM, by rollout.vllm_command"},
    "models/vllm_watch.py": {"subprocess.Popen": "vLLM, by rollout.vllm_command"},
}


def uses(tree):
    """Names in a file that can run code, or read what can."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name == "multiprocessing.connection")
            yield from (a.name.split(".")[0] for a in node.names if a.name.split(".")[0] in DANGEROUS)
        elif isinstance(node, ast.ImportFrom) and node.module:
            root = node.module.split(".")[0]
            yield from (a.name for a in node.names if root in DANGEROUS or node.module == "multiprocessing.connection")
            yield from (f"{root}.{a.name}" for a in node.names if (root, a.name) in METHODS)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RUNS_CODE:
            yield node.func.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in METHODS:
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in ("weights_only", "shell") and getattr(node.value, "value", 0) is not None:
            yield f"{node.arg}="


def found_in(folders):
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if names := set(uses(ast.parse(path.read_text()))):
                found[str(path.relative_to(ROOT))] = names
    return found


def test_what_runs_code_is_listed():
    assert found_in(["launch", "train", "models", "algorithms"]) == {file: set(names) for file, names in ALLOWED.items()}


@pytest.mark.parametrize(
    "line", ["torch.load('x')", "import pickle", "from pickle import loads", "yaml.load(x)", "eval(x)", "exec(x)", "import importlib.util"]
)
def test_the_list_would_notice(line):
    assert set(uses(ast.parse(line)))


# ---- malicious files -----------------------------------------------------------------------------------------------------------


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path):
    """The path that nothing may make."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code of a file has run"


@pytest.fixture
def saved(train_here, model_folder, data_file, tmp_path):
    """Settings of a run that has a checkpoint of step 1."""
    given = {
        "output_dir": str(tmp_path / "run"),
        "model.model_name_or_path": model_folder("llama"),
        "data.train": data_file("text", 10),
        "train.global_batch_size": 4,
        "train.max_steps": 1,
        "log.report_to": [],
    }
    train_here(given)
    return given


def test_pickles_in_a_checkpoint_are_not_opened(saved, canary, train_here):
    """In the place of each of its files, and beside them."""
    folder = Path(saved["output_dir"], "checkpoint-1")
    bomb = pickle.dumps(Touch(canary))
    for name in [*sorted(os.listdir(folder)), ".metadata", "optimizer.pt", "pytorch_model.bin", "rng_state.pth"]:
        path = folder / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(bomb)
        with pytest.raises(ValueError, match="none of the 1 checkpoints"):
            train_here(saved)
        path.unlink() if before is None else path.write_bytes(before)
    magic = [
        path for path in Path(saved["output_dir"]).rglob("*") if path.is_file() and path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04")
    ]
    assert not magic, "a run writes pickles"


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "link.json", "sub/../../outside.json"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(name, saved, one_rank):
    folder = Path(saved["output_dir"], "checkpoint-1")
    outside = folder.parent / "outside.json"
    outside.write_text("{}")
    if name == "link.json":
        os.symlink(outside, folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 2, "sha256": checkpoint.digest(outside).hex()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.verify(folder).endswith("leads out of the checkpoint")


def test_a_checkpoint_that_is_a_link_of_files(saved, one_rank):
    """A rank's file that is a link to the same bytes elsewhere."""
    folder = Path(saved["output_dir"], "checkpoint-1")
    (path,) = folder.glob("rank-*")
    shutil.move(path, folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")
    assert checkpoint.verify(folder) == f"{path.name}: leads out of the checkpoint"


def test_a_model_of_pickles_is_refused(model_folder, canary, tmp_path, one_rank):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        (folder / name).write_bytes(pickle.dumps(Touch(canary)))
    with pytest.raises(ValueError, match="weights must be safetensors"):
        load.weight_files(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Touch(canary)))
    with pytest.raises((ValueError, SafetensorError)):
        build(folder, one_rank)


def build(folder, device, adapters=None):
    cfg = config.Model(str(folder))
    return load.build(cfg, folder, config.Fsdp(), device, 0, adapters)


def test_code_beside_a_model_is_not_run(model_folder, canary, tmp_path, one_rank):
    """auto_map names classes in a Python file of the folder; without trust_remote_code they are not imported."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    for name, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        known = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        known["auto_map"] = {key: "own.Own", "AutoConfig": "own.Own"}
        (folder / name).write_text(json.dumps(known))
    build(folder, one_rank)
    load.load_tokenizer(config.Model(str(folder)), folder)


def test_an_adapter_of_pickles_is_refused(model_folder, canary, tmp_path, one_rank):
    adapters = config.Lora(r=4)
    model = build(model_folder("llama"), one_rank, adapters)
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": model_folder("llama")}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        (folder / name).write_bytes(pickle.dumps(Touch(canary)))
        with pytest.raises((ValueError, SafetensorError)):
            lora.read_adapter(model, folder)


def test_a_template_of_a_tokenizer_reaches_nothing(canary, tmp_path):
    """Chat templates are programs: transformers runs them in a sandbox."""
    toy.write_model("tiny", tmp_path / "model")
    tokenizer = load.load_tokenizer(config.Model(str(tmp_path / "model")), tmp_path / "model")
    tokenizer.chat_template = f"{{{{ cycler.__init__.__globals__.os.mkdir({str(canary)!r}) }}}}"
    with pytest.raises(Exception, match=r"(?i)unsafe|undefined|not safe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
