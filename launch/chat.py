"""Talk to a trained model: `python launch/chat.py runs/sft/final`, or one answer: `... --prompt "Sort: dcba"`.

Reads Hugging Face folders and hub names; a checkpoint is exported first (launch/export.py).
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder or hub name")
    parser.add_argument("--prompt", help="answer this and end")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    args = parser.parse_args()
    if Path(args.model, "manifest.json").exists():
        sys.exit(f"chat.py: {args.model} is a checkpoint; first: python launch/export.py {args.model} FOLDER")
    if Path(args.model, "final").is_dir() and not Path(args.model, "config.json").exists():
        sys.exit(f"chat.py: {args.model} is a run's output_dir; its model is {args.model.rstrip('/')}/final")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, device_map="cuda" if torch.cuda.is_available() else "cpu").eval()
    except (OSError, ValueError) as e:
        sys.exit(f"chat.py: {args.model}: neither a Hugging Face folder nor a hub name that can be read: {str(e).splitlines()[0]}")
    history = [{"role": "system", "content": args.system}] if args.system else []
    for line in [args.prompt] if args.prompt else lines():
        history.append({"role": "user", "content": line})
        history.append({"role": "assistant", "content": answer(model, tokenizer, history, args.temperature, args.max_new_tokens)})


def lines():
    """What the person types, until an empty line or the end of input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line:
            return
        yield line


def answer(model, tokenizer, history, temperature, max_new_tokens):
    """Print the model's answer as it comes, and return it. A model without a chat template continues the bare text."""
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(history[-1]["content"], return_tensors="pt")
    inputs = inputs.to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode():
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
