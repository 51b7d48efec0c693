"""launch/slurm.sbatch, kubernetes.yaml, skypilot.yaml, node.sh, which they share, and the Dockerfile: linted, and run as far as can be."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

import psutil
import pytest
import yaml
from torch.distributed.run import get_args_parser

from tests.conftest import ROOT, read_metrics, write_recipe

SCRIPTS = ["launch/node.sh", "launch/slurm.sbatch"]


def lint(tool, *words):
    """Run a linter of the test extra; on systems for which it is not built, the test is skipped."""
    path = shutil.which(tool, path=sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"])
    if not path:
        pytest.skip(f"{tool} is not installed")
    run = subprocess.run([path, *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def script(folder, name, text):
    """An executable `name` in `folder`."""
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


# ---- one host ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS)
def test_shell(path):
    assert subprocess.run(["bash", "-n", ROOT / path]).returncode == 0
    lint("shellcheck", "--external-sources", path)


ENDS = {  # (state before, state that this run writes, exit code of torchrun, whether it is signalled) -> exit code
    "finished": (None, "finished", 0, False, 0),
    "finished again": ("finished", "finished", 0, False, 0),
    "preempted on this host": (None, "preempted", 1, True, 75),
    "preempted by another host": ("running", "preempted", 0, False, 75),
    "failed": ("running", "failed", 1, False, 1),
    "failed to save when asked to stop": ("running", "failed", 1, True, 1),
    "refused": ("preempted", None, 1, False, 1),
    "refused after it had finished": ("finished", None, 2, False, 2),
    "asked before it began": ("preempted", None, 143, True, 75),
    "killed in a save": (None, "running", 1, True, 75),
    "no status": (None, None, 0, False, 1),
}


@pytest.mark.parametrize("case", ENDS)
def test_exit_codes_of_a_host(case, tmp_path):
    """With another command in torchrun's place, which must get SIGTERM for either signal, once, and not die of SIGUSR1 itself."""
    before, writes, code, asked, expected = ENDS[case]
    status = tmp_path / "run" / "run_status.json"
    status.parent.mkdir()
    if before:
        status.write_text(json.dumps({"state": before, "time": 0}, indent=1))
    later = json.dumps({"state": writes, "time": 1}, indent=1)
    command = f"""trap 'echo asked >> {tmp_path}/signals' TERM
        touch {tmp_path}/ready
        {f"while [ ! -e {tmp_path}/signals ]; do sleep 0.01; done; sleep 0.1" if asked else ""}
        {f"echo '{later}' > {status}" if writes else ""}
        [ "$1 $2" = "--output_dir {status.parent}" ] && exit {code}"""
    run = subprocess.Popen(
        ["bash", ROOT / "launch/node.sh", "bash", "-c", command, "it"], env=os.environ | {"OUTPUT_DIR": str(status.parent)}
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    if asked:
        psutil.Process(run.pid).children()[0].send_signal(signal.SIGUSR1)  # some schedulers signal every process
        run.send_signal(signal.SIGUSR1 if case == "killed in a save" else signal.SIGTERM)
        run.send_signal(signal.SIGTERM)
    assert run.wait(10) == expected
    assert not asked or (tmp_path / "signals").read_text() == "asked\n"


def launched(command, folder, environment):
    """The options that `command` (words) gives to torchrun, as torchrun itself reads them."""
    script(folder, "torchrun", f'#!/bin/sh\nprintf "%s\\n" "$@" > {folder}/words\n')
    env = os.environ | environment | {"PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(command, cwd=ROOT, env=env, capture_output=True)
    return get_args_parser().parse_args((folder / "words").read_text().splitlines())


def check(options, output_dir, nodes, rank, address):
    assert (options.nnodes, int(options.node_rank), options.master_addr, options.rdzv_backend) == (str(nodes), rank, address, "static")
    assert (ROOT / options.training_script).exists() and options.training_script == "launch/train.py"
    words = " ".join(options.training_script_args).replace("--config=", "--config ").split()
    assert words[0] == "--config" and (ROOT / words[1]).exists() and words[2:] == ["--output_dir", output_dir]


# ---- Slurm ---------------------------------------------------------------------------------------------------------------------

SRUN = """
pids=()
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do
    SLURM_NODEID=$i "${@:2}" & # after --kill-on-bad-exit
    pids+=($!)
done
echo "${pids[@]}" > $FAKE/tasks
worst=0
for pid in "${pids[@]}"; do
    wait $pid || { code=$?; [ $code -le $worst ] || worst=$code; }
done
exit $worst
"""
FAKES = {
    "srun": SRUN,
    "scancel": '[ "$*" = "--signal=USR1 $SLURM_JOB_ID" ] && kill -USR1 $(cat $FAKE/tasks)\n',
    "scontrol": '[ "$1" = show ] && printf "127.0.0.1\\nanother\\n" || echo "$*" >> $FAKE/requeued\n',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
}


def test_slurm(model_folder, data_file, tmp_path):
    """The batch script on two hosts of one rank, both this machine: when signalled it saves and is requeued; one host then ends the run."""
    for name, text in FAKES.items():
        script(tmp_path, name, "#!/usr/bin/env bash\n" + text)
    settings = {
        "output_dir": str(tmp_path / "run"),
        "model.model_name_or_path": model_folder("llama"),
        "data.train": data_file("text", 40),
        "train.global_batch_size": 8,
        "train.micro_batch_tokens": 100,
        "train.max_steps": 100000,
        "train.lr_scheduler_type": "constant",
        "checkpoint.save_steps": 0,
        "fsdp.timeout_seconds": 30,
        "log.report_to": [],
    }
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "h[0-1]"}
    env = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path)}
    recipe, output_dir, console = write_recipe(settings), tmp_path / "run", tmp_path / "console"

    def sbatch(*more):
        with open(console, "ab") as log:
            return subprocess.Popen(["bash", "launch/slurm.sbatch", recipe, output_dir, *more], cwd=ROOT, env=env, stdout=log, stderr=log)

    run = sbatch()
    while len(read_metrics(output_dir)) < 2:
        assert run.poll() is None, console.read_text()[-3000:]
        time.sleep(0.05)
    assert not (tmp_path / "requeued").exists()
    run.send_signal(signal.SIGUSR1)  # to the script alone, as --signal=B: does
    assert run.wait(60) == 0, console.read_text()[-3000:]
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    status = json.loads((output_dir / "run_status.json").read_text())
    assert status["state"] == "preempted" and (output_dir / f"checkpoint-{status['step']}").is_dir()
    last = status["step"] + 3
    env["SLURM_JOB_NUM_NODES"] = "1"
    assert sbatch("--train.max_steps", str(last)).wait(60) == 0, console.read_text()[-3000:]
    assert json.loads((output_dir / "run_status.json").read_text())["state"] == "finished"
    assert [row["step"] for row in read_metrics(output_dir)] == [*range(1, last + 1)] and (output_dir / "final").is_dir()
    assert (tmp_path / "requeued").read_text().count("requeue") == 1


# ---- Kubernetes, SkyPilot, Docker ----------------------------------------------------------------------------------------------


def unknown(value, kind, models, where=""):
    """Yields what of a manifest is not as the classes of its API say: a field unknown, of another type, or missing."""
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        for i, item in enumerate(value):
            yield from unknown(item, inner[1], models, f"{where}[{i}]")
    elif inner := re.fullmatch(r"dict\(str, (.*)\)", kind):
        for key, item in value.items():
            yield from unknown(item, inner[1], models, f"{where}.{key}")
    elif kind in models:
        names = {json_name: name for name, json_name in models[kind].attribute_map.items()}
        for key, item in value.items():
            if key in names:
                yield from unknown(item, models[kind].openapi_types[names[key]], models, f"{where}.{key}")
            else:
                yield f"{where}.{key}: {kind} has no such field"
        try:
            models[kind](**{names[key]: item for key, item in value.items() if key in names})
        except ValueError as e:
            yield f"{where}: {e}"
    elif not isinstance(value, {"str": str, "int": int, "bool": bool}.get(kind, object)):
        yield f"{where}: expected {kind}, got {value!r}"


def test_kubernetes(tmp_path):
    pytest.importorskip("kubeflow.training")
    import kubernetes.client.models
    from kubeflow.training import models

    models = vars(kubernetes.client.models) | vars(models)
    settings, job = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    assert [*unknown(settings, "V1ConfigMap", models)] == [*unknown(job, "KubeflowOrgV1PyTorchJob", models)] == []
    replicas = job["spec"]["pytorchReplicaSpecs"]
    replicas["Worker"]["template"]["spec"]["containers"][0]["comand"] = []
    (problem, _) = unknown(job, "KubeflowOrgV1PyTorchJob", models)  # Master and Worker share the template
    assert problem.endswith("containers[0].comand: V1Container has no such field")
    assert replicas.keys() == {"Master", "Worker"}, "the operator knows no others"
    assert int(settings["data"]["HOSTS"]) == sum(replica["replicas"] for replica in replicas.values())
    for rank, replica in enumerate(replicas.values()):
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch" and {"configMapRef": {"name": settings["metadata"]["name"]}} in container["envFrom"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        env = settings["data"] | {"MASTER_ADDR": "baretune-master-0", "MASTER_PORT": "23456", "RANK": str(rank)}  # as the operator sets
        words = [re.sub(r"\$\((\w+)\)", lambda m, env=env: env[m[1]], word) for word in container["command"] + container["args"]]
        check(launched(words, tmp_path, env), settings["data"]["OUTPUT_DIR"], 2, rank, "baretune-master-0")
        grace = re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", (ROOT / "launch/node.sh").read_text())[1]
        assert pod["terminationGracePeriodSeconds"] > int(grace)


def test_skypilot(tmp_path):
    """Its schema is in a package of 50 requirements, so what is used of it is written down here."""
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    kinds = {"name": str, "workdir": str, "num_nodes": int, "envs": dict, "resources": dict, "volumes": dict, "setup": str, "run": str}
    assert {key: type(value) for key, value in task.items()} == kinds
    resources = {"infra": str, "accelerators": str, "use_spot": bool, "job_recovery": dict}
    assert {key: type(value) for key, value in task["resources"].items()} == resources
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 3, "recover_on_exit_codes": [75]}
    assert all(isinstance(value, str) for value in task["envs"].values())
    script(tmp_path, "run.sh", task["run"].replace(". .venv/bin/activate", ""))
    script(tmp_path, "setup.sh", task["setup"])
    lint("shellcheck", "--shell=bash", tmp_path / "run.sh", tmp_path / "setup.sh")
    sky = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    options = launched(["bash", tmp_path / "run.sh"], tmp_path, task["envs"] | sky)
    check(options, task["envs"]["OUTPUT_DIR"], 2, 1, "10.0.0.1")
    assert options.nproc_per_node == "8" and task["envs"]["OUTPUT_DIR"].startswith(next(iter(task["volumes"])))


def test_dockerfile():
    lint("hadolint", "Dockerfile")
    text = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    let_in = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert sorted(copied) == sorted(let_in) and all((ROOT / path).exists() for path in copied)
    assert {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"} <= {*copied}, "a folder of the product is not copied"
    known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1], re.M)
    assert {*re.findall(r"--extra (\w+)", text)} <= {*known}
