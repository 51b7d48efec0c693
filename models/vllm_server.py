"""Completions by a vLLM server, for models that outgrow the sampler in this process.

vLLM brings its own torch and transformers, so it runs in an environment and a process of its own and is spoken to over HTTP: token ids go
there, token ids and log-probs come back, and new weights are a safetensors folder that the server reads. All ranks share one server.

- The log-probs are those of the distribution that was sampled: log-softmax(logits / temperature), or log-softmax(logits) where the
  temperature is 0. top_p, top_k and min_p renormalise it over the tokens that they keep, which no option of the server undoes.
- They come from vLLM's kernels in the server's dtype and differ from the policy's own a little: correct for it by importance weights.
- Options and routes are those of vLLM 0.32.
- A key seeds one completion, whatever the number of ranks; but vLLM's arithmetic depends on which requests share a batch, so a rerun
  may part where two tokens are nearly equal.
- vLLM only warns about a weight that it did not find. So a server started here begins with random ones, and after the first update it must
  agree with the policy on a few tokens.
- On a CPU vLLM keeps a copy of the head, which for a tied head no update reaches (0.32). A server started here is told that head and
  embedding are two, and gets both; one given by address, on a CPU, with a tied head, keeps the head that it had.
- `/collective_rpc`, which loads the weights, lets whoever reaches the port call methods of the server. A server started here listens on
  127.0.0.1 alone, where the users of this machine can reach it; who may reach one given by address is its owner's choice.
"""

import atexit
import http.client
import json
import math
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from models import generate, load, logprobs
from models.generate import Completion
from train.config import address_of

LOCAL = "127.0.0.1"
SHARED_MEMORY = Path("/dev/shm")
ATTEMPTS = 3  # per request: a lost connection or an error inside the server is tried again, a refusal or a timeout is not
IN_FLIGHT = 256  # requests of one rank at a time: vLLM's own limit of sequences in one batch
PROBE = 32  # tokens that the server and the policy score after the first update
AGREEMENT = 0.25  # of the spread of these log-probs: far above bfloat16's noise, far below the distance of other weights (0.7 and more)
OF_THE_RANK = {  # set by torchrun, and wrong in a process that is not a rank
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
    "PYTHONPATH",  # leads to packages of this environment
}


class VllmServer:
    """A server, started or given by address, that all ranks share: every rank makes one, calls `update`, then `sample`, and so on."""

    def __init__(self, settings, model_folder, output_dir, max_model_len, dtype):
        """settings: the config's `rollout` block. dtype: in which the server computes and weights travel. max_model_len: tokens of a prompt
        and its completion.

        ValueError where the settings cannot work, RuntimeError where the server does not get ready, with the end of its log.
        """
        self.settings, self.output_dir, self.dtype = settings, Path(output_dir).resolve(), dtype
        self.log = self.output_dir / "vllm_server.log"
        self.scratch = SHARED_MEMORY / f"baretune-vllm-{secrets.token_hex(8)}"
        self.max_model_len = max_model_len
        self.process = self.stop_ids = None
        self.own = settings.vllm_address is None
        if self.own:
            self.address = LOCAL, self.start(model_folder)
        else:
            self.address = address_of(settings.vllm_address)
        try:
            self.wait_until_ready()
            if not self.own and dist.get_rank() == 0:
                self.check_given()
        except BaseException:
            self.close()
            raise

    def update(self, model, tokenizer):
        """Hand the policy's current weights to the server; every rank calls it, and none may be sampling."""
        folder = self.weights_folder(model)
        load.save_pretrained(model, tokenizer, folder, self.dtype)
        if dist.get_rank() == 0:
            try:
                if self.own and on_cpu():
                    write_tied(model, folder)
                self.reload(folder)
            finally:
                shutil.rmtree(folder.parent)
        if self.stop_ids is None:
            self.compare(model, len(tokenizer))
        self.stop_ids = generate.stop_ids(model, tokenizer)
        dist.barrier()  # nobody samples before the new weights are there

    def sample(self, prompts, keys, sampling, stopping=lambda: False):
        """len(keys[i]) completions of each prompt i (token ids), in the keys' order: list[list[Completion]]; none once `stopping()`.

        A key, a whole number, seeds one completion. sampling: a models.generate.Sampling. Ranks
        may call it with different prompts. RuntimeError for a server that is dead, slow or answers wrongly.
        """
        assert self.stop_ids is not None, "update comes first: the server does not have the policy's weights"
        longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
        if longest > self.max_model_len:  # vLLM would cut completions short without a word
            what = f"a prompt and its completion may have {longest} tokens, the vLLM server takes {self.max_model_len}"
            raise ValueError(f"grpo.max_completion_length: {what}")
        jobs = [self.request_body(prompt, key, sampling) for prompt, own in zip(prompts, keys, strict=True) for key in own]
        pool = ThreadPoolExecutor(max_workers=min(max(len(jobs), 1), IN_FLIGHT))
        try:
            futures = [pool.submit(self.complete, job) for job in jobs]
            left = futures
            while left:
                if stopping():
                    return []
                done, left = wait(futures, timeout=1, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises what went wrong
            answers = iter([future.result() for future in futures])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [[next(answers) for _ in own] for own in keys]

    def close(self):
        """End the server that this rank started, with all its processes."""
        process, self.process = self.process, None
        if process:
            process.terminate()  # vllm_watch.py ends the server, by force if need be
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:  # a process that not even SIGKILL ends, e.g. inside a driver
                process.kill()
            shutil.rmtree(self.scratch, ignore_errors=True)
            atexit.unregister(self.close)

    def start(self, model_folder):
        """Start a server from rank 0, under vllm_watch.py; returns its port, on every rank."""
        if int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())) != dist.get_world_size():
            raise ValueError(
                "rollout.vllm_address: null, but other hosts could not reach a server started here; start one, give its address"
            )
        port = torch.zeros(1, dtype=torch.int64)
        if dist.get_rank() == 0:
            with socket.socket() as probe:
                probe.bind((LOCAL, 0))
                port[0] = probe.getsockname()[1]
            self.output_dir.mkdir(parents=True, exist_ok=True)
            watch = [sys.executable, "-I", "-S", Path(__file__).with_name("vllm_watch.py"), str(os.getpid()), self.scratch]
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    [*watch, *self.command(model_folder, port.item())],
                    env=self.environment(),
                    cwd=self.output_dir,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the rank, which may still sample and save
                )
            atexit.register(self.close)
        dist.broadcast(port, 0)
        return port.item()

    def command(self, model_folder, port):
        settings = self.settings
        name, *arguments = shlex.split(settings.vllm_command)
        program = shutil.which(name)
        if not program:
            raise ValueError(f"rollout.vllm_command: there is no program {name!r}; name the Python of an environment that has vLLM")
        return [
            *(
                os.path.abspath(program),
                *arguments,
                "-m",
                "vllm.entrypoints.openai.api_server",
                "--model",
                str(Path(model_folder).resolve()),
            ),
            *("--host", LOCAL, "--port", str(port), "--max-model-len", str(self.max_model_len)),
            *("--dtype", str(self.dtype).removeprefix("torch."), "--logprobs-mode", "processed_logprobs"),
            *("--gpu-memory-utilization", str(settings.vllm_gpu_memory_utilization)),
            *("--generation-config", "vllm"),  # not the model's own temperature, top_p and penalties
            *("--runner", "generate", "--load-format", "dummy"),  # the weights come by update
            *(("--hf-overrides", '{"tie_word_embeddings": false}') if on_cpu() else ()),
            *("--disable-uvicorn-access-log", *settings.vllm_extra_args),
        ]

    def environment(self):
        own = {k: v for k, v in os.environ.items() if k not in OF_THE_RANK and not k.startswith("TORCHELASTIC_")}
        own |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}  # routes for new weights; no reports to vLLM's makers
        devices = self.settings.vllm_devices
        return own if devices is None else own | {"CUDA_VISIBLE_DEVICES": devices}

    def request_body(self, prompt, key, sampling):
        return {
            "prompt": prompt,
            "seed": key % 2**63,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p or 0.0,
            "repetition_penalty": 1.0,  # said, or a given server may take it from the model's generation_config.json
            "stop_token_ids": self.stop_ids,
            "ignore_eos": True,  # an end token that is no stop token here would be cut off there
            "logprobs": 0,  # those of the sampled tokens, no others
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # else each token is decoded to text, for nothing
        }

    def complete(self, body):
        """The Completion that the server gives; RuntimeError where its answer is not one."""
        answer = self.call("POST", "/v1/completions", body)
        try:
            (choice,) = answer["choices"]
            found = Completion(choice["token_ids"], choice["logprobs"]["token_logprobs"])
            whole = choice["finish_reason"] in ("stop", "length") and 0 < len(found.ids) == len(found.logps)
            whole = whole and all(type(i) is int for i in found.ids) and all(math.isfinite(x) for x in found.logps)
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise RuntimeError(self.trouble(f"gave no whole completion with token ids and log-probs: {json.dumps(answer)[:300]}"))
        return found

    def weights_folder(self, model):
        """A folder for the policy's weights, in shared memory where the server is this machine's and there is room."""
        size = load.size(model)[0] * self.dtype.itemsize
        if self.settings.vllm_weights_dir:
            parent = Path(self.settings.vllm_weights_dir).resolve() / self.scratch.name
        elif self.own and SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 1.1 * size:
            parent = self.scratch
        else:
            parent = self.output_dir / "vllm_weights"
        if dist.get_rank() == 0:
            parent.mkdir(mode=0o700 if self.own else 0o755, parents=True, exist_ok=True)
        return parent / "weights"

    def reload(self, folder):
        if self.own:  # it started without weights, and reads them by this setting from now on
            self.rpc("update_config", overrides={"load_config": {"load_format": "safetensors"}})
        self.rpc("reload_weights", weights_path=str(folder))
        if self.call("POST", "/reset_prefix_cache", {}) != {"success": True}:  # keys and values of the old weights
            raise RuntimeError(self.trouble("did not drop its prefix cache; are others using it?"))

    def rpc(self, method, **kwargs):
        answer = self.call("POST", "/collective_rpc", {"method": method, "kwargs": kwargs})
        if not isinstance(answer, dict) or not answer.get("results") or any(answer["results"]):
            raise RuntimeError(self.trouble(f"answered {method} with {json.dumps(answer)[:300]}"))

    def compare(self, model, vocabulary):
        """RuntimeError unless the server's log-probs of arbitrary tokens are about the policy's; a collective, as it runs the model."""
        ids = [7919 * i % vocabulary for i in range(1, min(PROBE, self.max_model_len - 1) + 1)]
        mask = torch.ones(1, len(ids), dtype=torch.bool)  # (1, T)
        targets = mask.clone()
        targets[:, 0] = False
        with torch.no_grad():
            own = logprobs.token_logps(model, {"input_ids": torch.tensor([ids]), "attention_mask": mask, "loss_mask": targets})
        if dist.get_rank() == 0:
            answer = self.call("POST", "/v1/completions", {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0})
            try:
                scores = answer["choices"][0]["prompt_logprobs"]
                theirs = [score[str(i)]["logprob"] for score, i in zip(scores[1:], ids[1:], strict=True)]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise RuntimeError(self.trouble(f"gave no log-probs of a prompt: {json.dumps(answer)[:300]}")) from error
            own = own["logps"][0, 1:].cpu()
            distance, spread = (own - torch.tensor(theirs)).abs().mean().item(), own.std().item()
            if not distance < AGREEMENT * spread + 1e-3:
                what = f"does not have the policy's weights: log-probs of {len(ids)} tokens differ by {distance:.3g} nats on average"
                raise RuntimeError(self.trouble(f"{what}, after it was given them"))

    def check_given(self):
        """ValueError unless the server at rollout.vllm_address was started as this run needs it."""
        cure = f"start it with VLLM_SERVER_DEV_MODE=1, --logprobs-mode processed_logprobs and --max-model-len {self.max_model_len} or more"
        try:
            config = self.call("GET", "/server_info?config_format=json")["vllm_config"]["model_config"]
            mode, length = config["logprobs_mode"], config["max_model_len"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"rollout.vllm_address: {self.settings.vllm_address} does not tell its settings ({error}); {cure}") from error
        if mode != "processed_logprobs" or length < self.max_model_len:
            got = f"logprobs mode {mode} and max model length {length}"
            raise ValueError(f"rollout.vllm_address: {self.settings.vllm_address} has {got}; {cure}")

    def wait_until_ready(self):
        """Until /health answers; RuntimeError after rollout.vllm_start_timeout_seconds, or at once if the started server has ended."""
        if dist.get_rank() == 0:
            print(f"waiting for vLLM at {self.name()}" + (f"; its log is {self.log}" if self.own else ""), flush=True)
        seconds = self.settings.vllm_start_timeout_seconds
        deadline = time.monotonic() + seconds
        problem = ""
        while (left := deadline - time.monotonic()) > 0:
            if self.dead():
                raise RuntimeError(self.trouble("ended before it was ready"))
            try:
                status, _ = exchange(self.address, "GET", "/health", None, min(left, 10))
                if status == 200:
                    return
                problem = f"HTTP {status}"
                if status < 500:
                    raise ValueError(f"rollout.vllm_address: what answers at {self.name()} is no vLLM server: /health gives HTTP {status}")
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
            time.sleep(min(0.5, left))
        raise RuntimeError(self.trouble(f"was not ready after {seconds:g} s (rollout.vllm_start_timeout_seconds): {problem}"))

    def call(self, method, path, body=None):
        """The JSON that the server answers with; RuntimeError where it does not, in time."""
        seconds = self.settings.vllm_timeout_seconds
        for attempt in range(ATTEMPTS):
            time.sleep(attempt and 0.25 * 2**attempt)
            try:
                status, text = exchange(self.address, method, path, body, seconds)
            except TimeoutError as error:
                raise RuntimeError(self.trouble(f"did not answer {path} within {seconds:g} s (rollout.vllm_timeout_seconds)")) from error
            except (OSError, http.client.HTTPException) as error:
                status, problem = None, f"lost the connection at {path} ({type(error).__name__}: {error})"
            else:
                problem = f"answered {path} with HTTP {status}: {text[:500].decode(errors='replace')}"
            if self.dead():
                break
            if status == 200:
                try:
                    return json.loads(text)
                except ValueError as error:
                    raise RuntimeError(self.trouble(f"{problem}, which is not JSON")) from error
            if status is not None and status < 500:
                break
        raise RuntimeError(self.trouble("is dead" if self.dead() else problem))

    def dead(self):
        """Whether the server that this rank started has ended; other ranks notice by lost connections."""
        return self.process is not None and self.process.poll() is not None

    def name(self):
        return f"{self.address[0]}:{self.address[1]}"

    def trouble(self, what):
        """The message of an error: which server, what, and the end of its log where that is here."""
        if not self.own:
            return f"rollout.vllm_address: the vLLM server at {self.name()} {what}"
        tail = ""
        with suppress(OSError), open(self.log, "rb") as log:
            log.seek(max(0, self.log.stat().st_size - 8000))
            tail = "\n".join(log.read().decode(errors="replace").splitlines()[-25:])
        return f"rollout.engine: the vLLM server of this run, at {self.name()}, {what}; the end of {self.log}:\n{tail}"


def on_cpu():
    return not torch.cuda.is_available()


def write_tied(model, folder):
    """Add a tied head to the weights in `folder`, under its own name."""
    index = folder / "model.safetensors.index.json"
    for head, embedding in model.all_tied_weights_keys.items():
        for file in load.weight_files(folder):
            with safe_open(file, "pt") as weights:
                if embedding in weights.keys():  # noqa: SIM118 (the file is no dict)
                    save_file({head: weights.get_tensor(embedding)}, folder / "tied.safetensors", metadata={"format": "pt"})
        if index.exists():
            table = json.loads(index.read_text())
            table["weight_map"][head] = "tied.safetensors"
            index.write_text(json.dumps(table))


def exchange(address, method, path, body, timeout):
    """(status, body) of one HTTP request; TimeoutError when it is not whole after `timeout` seconds, other OSErrors as they come."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):  # vLLM's own name for it; a server started here reads it too
        headers["Authorization"] = f"Bearer {key}"
    deadline = time.monotonic() + timeout
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    timer = None
    try:
        connection.connect()
        # A socket's own timeout begins anew with each byte that comes, so a slow trickle would outlast it.
        timer = threading.Timer(deadline - time.monotonic(), shut, [connection.sock])
        timer.daemon = True
        timer.start()
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        if time.monotonic() >= deadline:
            raise TimeoutError(f"no whole answer after {timeout:g} s") from error
        raise
    finally:
        if timer:
            timer.cancel()
        connection.close()


def shut(sock):
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
