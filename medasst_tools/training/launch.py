"""How a training is launched on several processes or machines: LLaMA-Factory's variables, checked, and a common start.

NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR, MASTER_PORT, and for an elastic launch RDZV_ID, MIN_NNODES, MAX_NNODES,
MAX_RESTARTS, are read by llamafactory-cli, which hands them to torchrun; `make train` passes them on. docs/distributed.md
has recipes that were run. What is wrong with them would show after minutes as a hang, so it is named here at once.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from medasst_tools.errors import UserError

PATIENCE = 600  # seconds that machines wait for each other, torchrun's own default
NUMBERS = {
    "NNODES": 1,
    "NODE_RANK": 0,
    "NPROC_PER_NODE": 1,
    "MASTER_PORT": 1,
    "MIN_NNODES": 1,
    "MAX_NNODES": 1,
    "MAX_RESTARTS": 0,
}  # each with its least value


class Launch(NamedTuple):
    """A checked launch. processes: of all machines together, None where it isn't known beforehand."""

    nodes: int = 1
    rank: int = 0
    processes: int | None = 1
    elastic: bool = False
    address: tuple[str, int] | None = None
    environment: dict[str, str] = {}  # noqa: RUF012  # never changed
    overrides: tuple[str, ...] = ()


def read_launch(variables: Mapping[str, str], config: dict[str, Any]) -> Launch:
    """Return the launch that the environment describes; UserError names what is wrong with it."""
    given = {
        key: variables[key].strip() for key in (*NUMBERS, "MASTER_ADDR", "RDZV_ID") if variables.get(key, "").strip()
    }
    numbers = {key: _number(key, given[key], least) for key, least in NUMBERS.items() if key in given}
    nodes, rank = numbers.get("NNODES", 1), numbers.get("NODE_RANK", 0)
    _refuse_old_style(variables, given)
    elastic = "RDZV_ID" in given
    most = max(nodes, numbers.get("MAX_NNODES", nodes))
    _check_nodes(given, numbers, nodes, rank, elastic)
    gpus, on_cpu = count_gpus(variables), bool(config.get("use_cpu"))
    torchrun = most > 1 or elastic or numbers.get("NPROC_PER_NODE", 1) > 1 or bool(config.get("deepspeed"))
    torchrun = torchrun or ("NPROC_PER_NODE" in given and gpus > 1)
    if not torchrun:
        if gpus > 1 and not on_cpu:
            print(
                f"{gpus} GPUs: LLaMA-Factory uses them all, {gpus} times the records a step; NPROC_PER_NODE=1 uses one"
            )
        return Launch(processes=gpus if gpus > 1 and not on_cpu else 1)
    if "NPROC_PER_NODE" not in given and (on_cpu or gpus == 0):
        raise UserError("NPROC_PER_NODE isn't set, and without GPUs to count it must say how many processes to start")
    per_node = numbers.get("NPROC_PER_NODE", gpus)
    environment = {"FORCE_TORCHRUN": "1"}
    if on_cpu:  # else each process takes all cores, and a checkpoint can't be loaded on `cpu:0`
        environment |= {"ACCELERATE_TORCH_DEVICE": "cpu", "OMP_NUM_THREADS": variables.get("OMP_NUM_THREADS", "1")}
    overrides: tuple[str, ...] = ()
    if elastic:  # else the workers of a restart meet the old ones' store, and hang
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        if on_cpu and "ddp_timeout" not in config:
            overrides = ("ddp_timeout=90",)
    processes = None if elastic and "MIN_NNODES" in given else nodes * per_node
    address = (given.get("MASTER_ADDR", "127.0.0.1"), numbers["MASTER_PORT"]) if nodes > 1 and not elastic else None
    records = config.get("per_device_train_batch_size", 8) * config.get("gradient_accumulation_steps", 1)
    print(
        f"node {rank} of {nodes}, {per_node} process(es) each; a step takes {records} records a process, "
        f"{records * nodes * per_node} in all{', elastic' if elastic else ''}"
    )
    return Launch(nodes, rank, processes, elastic, address, environment, overrides)


def child_environment(variables: Mapping[str, str], launch: Launch) -> dict[str, str]:
    """Return the environment of llamafactory-cli, which reads an empty variable as a wrong number."""
    kept = {key: value for key, value in variables.items() if key not in (*NUMBERS, "RDZV_ID") or value.strip()}
    return kept | launch.environment


def _number(key: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{key} is {text!r}, must be a whole number, {least} or more")
    return int(text)


def _refuse_old_style(variables: Mapping[str, str], given: dict[str, str]) -> None:
    for old, new in (("RANK", "NODE_RANK"), ("WORLD_SIZE", "NNODES"), ("NODES", "NNODES")):
        if variables.get(old) and new not in given:
            raise UserError(
                f"{old}={variables[old]} is an old launcher's name that LLaMA-Factory doesn't read: "
                f"say {new}={variables[old]}, or unset {old}"
            )


def _check_nodes(given: dict[str, str], numbers: dict[str, int], nodes: int, rank: int, elastic: bool) -> None:
    if not elastic and (lost := [key for key in ("MIN_NNODES", "MAX_NNODES", "MAX_RESTARTS") if key in given]):
        raise UserError(
            f"{lost[0]}={given[lost[0]]} without RDZV_ID has no effect; set RDZV_ID to the same word everywhere"
        )
    if ("MIN_NNODES" in given) != ("MAX_NNODES" in given) or numbers.get("MIN_NNODES", 1) > numbers.get(
        "MAX_NNODES", nodes
    ):
        raise UserError(
            f"MIN_NNODES={given.get('MIN_NNODES')} and MAX_NNODES={given.get('MAX_NNODES')} must be given together, "
            "the first not above the second"
        )
    if elastic and len(given["RDZV_ID"].split()) > 1:
        raise UserError(f"RDZV_ID is {given['RDZV_ID']!r}, must be one word")
    most = max(nodes, numbers.get("MAX_NNODES", nodes))
    if rank >= most:
        raise UserError(f"NODE_RANK is {rank}, but there are {most} nodes: they are numbered from 0 to {most - 1}")
    if most > 1 and (lost := [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in given]):
        raise UserError(
            f"{most} nodes need {' and '.join(lost)}: the address of node 0 and a free port of it, the same on every node"
        )


def count_gpus(variables: Mapping[str, str]) -> int:
    """Return how many NVIDIA GPUs a run would see, without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in variables:
        return len([name for name in variables["CUDA_VISIBLE_DEVICES"].split(",") if name.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def agree_on_step(launch: Launch, steps_here: Callable[[], list[int]], patience: int = PATIENCE) -> int | None:
    """Return the last step of which every machine has a whole checkpoint, None if none has any.

    Machines that went on from different steps would wait for each other for ever. steps_here is called when node 0 has
    removed its damaged checkpoints, so that machines which share a folder look at the same ones. UserError if a machine
    doesn't have what the others have, or doesn't answer.
    """
    if launch.address is None:
        return max(steps_here(), default=None)
    from torch.distributed import DistError, TCPStore

    host, port = launch.address
    try:
        store = TCPStore(
            host, port, is_master=launch.rank == 0, wait_for_workers=False, timeout=timedelta(seconds=patience)
        )
        if launch.rank:
            store.wait(["steps-0"])
        store.set(f"steps-{launch.rank}", json.dumps(steps_here()))
        everyone = [set(json.loads(store.get(f"steps-{rank}"))) for rank in range(launch.nodes)]
        store.set(f"read-{launch.rank}", "yes")
        if launch.rank == 0:  # the store ends with this process's copy of it
            store.wait([f"read-{rank}" for rank in range(launch.nodes)])
    except DistError as error:
        raise UserError(
            f"no common start at {host}:{port} ({str(error).splitlines()[0][:120]}); start the same command on all "
            f"{launch.nodes} nodes, and see that MASTER_ADDR and MASTER_PORT are node 0's and free"
        ) from None
    common = set.intersection(*everyone)
    if any(everyone) and not common:
        have = "; ".join(f"node {rank}: {sorted(steps) or 'none'}" for rank, steps in enumerate(everyone))
        raise UserError(
            f"no checkpoint is on every node ({have}); share the output folder between the nodes, or train with "
            "save_on_each_node=true and copy the checkpoint to where it is missing"
        )
    return max(common, default=None)


@contextmanager
def launchable(config_path: Path, overrides: list[str], config: dict[str, Any], torchrun: bool) -> Iterator[list[str]]:
    """Yield the arguments of `llamafactory-cli train`; LLaMA-Factory's torchrun command line can't hold a space, so then
    the whole config is written to a file whose name has none."""
    words = [str(config_path), *overrides]
    if not torchrun or not any(word.split() != [word] for word in words):
        yield words
        return
    if " " in sys.prefix:
        raise UserError(f"torchrun can't start from {sys.prefix}, whose name has a space; move the project")
    folder = "/tmp" if " " in tempfile.gettempdir() else None
    with tempfile.NamedTemporaryFile("w", prefix="medasst-", suffix=".yaml", dir=folder, encoding="utf-8") as file:
        yaml.safe_dump(config, file, allow_unicode=True)
        file.flush()
        yield [file.name]
