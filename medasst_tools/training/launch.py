"""How a training is launched on several processes or machines: torchrun's variables, checked, and a common start.

NNODES, NODE_RANK, NPROC_PER_NODE, MASTER_ADDR, MASTER_PORT, and for an elastic launch RDZV_ID, MIN_NNODES, MAX_NNODES,
MAX_RESTARTS, are read by llamafactory-cli, which hands them to torchrun; `make train` passes them on. What is wrong with
them would show after minutes as a hang, so it is named here at once. docs/distributed.md has recipes that were run.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from medasst_tools.errors import UserError
from medasst_tools.machine import hardware

PATIENCE = 600  # seconds that machines wait for each other, torchrun's own default
NUMBERS = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_PORT", "MIN_NNODES", "MAX_NNODES", "MAX_RESTARTS")
MAY_BE_ZERO = ("NODE_RANK", "MAX_RESTARTS")
OLD_NAMES = {"RANK": "NODE_RANK", "WORLD_SIZE": "NNODES", "NODES": "NNODES"}


class Launch(NamedTuple):
    """A checked launch. processes: of all machines together, None where an elastic launch leaves it open."""

    nodes: int = 1
    rank: int = 0
    processes: int | None = 1
    address: tuple[str, int] | None = None
    environment: dict[str, str] = {}  # noqa: RUF012  # never changed
    settings: dict[str, Any] = {}  # noqa: RUF012


def read_launch(variables: Mapping[str, str], config: dict[str, Any]) -> Launch:
    """Return the launch that the environment describes; UserError names what is wrong with it."""
    given = {key: text.strip() for key, text in variables.items() if text.strip()}
    numbers = {key: _number(key, given[key]) for key in NUMBERS if key in given}
    elastic, on_cpu, cards = "RDZV_ID" in given, bool(config.get("use_cpu")), hardware.gpus()
    nodes, rank, per_node = (numbers.get(key, 0) for key in ("NNODES", "NODE_RANK", "NPROC_PER_NODE"))
    most = max(1, nodes, numbers.get("MAX_NNODES", 1))
    check_what_would_hang(given, most, rank)
    if not (most > 1 or per_node > 1 or elastic or config.get("deepspeed")):
        if on_cpu or per_node:  # LLaMA-Factory would start a process for each card that it sees
            return Launch(environment={"CUDA_VISIBLE_DEVICES": "" if on_cpu or not cards else cards[0].visible_as})
        return Launch(processes=max(1, len(cards)))
    if not per_node and (on_cpu or not cards):
        raise UserError("NPROC_PER_NODE isn't set, and without GPUs to count it must say how many processes to start")
    nodes, per_node = nodes or 1, per_node or len(cards)
    environment, settings = {"FORCE_TORCHRUN": "1"}, {}
    if on_cpu:  # else each process takes all cores, and a checkpoint can't be loaded on `cpu:0`
        environment |= {"ACCELERATE_TORCH_DEVICE": "cpu", "OMP_NUM_THREADS": variables.get("OMP_NUM_THREADS", "1")}
    if elastic:  # else the workers of a restart meet the old ones' store, and hang
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        settings = {"ddp_timeout": 90} if on_cpu and "ddp_timeout" not in config else {}
    records = config.get("per_device_train_batch_size", 8) * config.get("gradient_accumulation_steps", 1)
    step = f"a step takes {records * nodes * per_node} records in all"
    print(f"node {rank} of {nodes}, {per_node} process(es) each; {step}")
    address = (given["MASTER_ADDR"], numbers["MASTER_PORT"]) if nodes > 1 and not elastic else None
    processes = None if "MIN_NNODES" in given else nodes * per_node
    return Launch(nodes, rank, processes, address, environment, settings)


def _number(key: str, text: str) -> int:
    least = 0 if key in MAY_BE_ZERO else 1
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{key} is {text!r}, must be a whole number, {least} or more")
    return int(text)


def check_what_would_hang(given: Mapping[str, str], most: int, rank: int) -> None:
    """Raise UserError with what is wrong with the variables of a launch on up to `most` nodes; the rest torchrun names."""
    for old, new in OLD_NAMES.items():
        if old in given and new not in given:
            instead = f"say {new}={given[old]}, or unset {old}"
            raise UserError(f"{old}={given[old]} is an old launcher's name that LLaMA-Factory doesn't read: {instead}")
    if rank >= most:
        raise UserError(f"NODE_RANK is {rank}, but there are {most} nodes: they are numbered from 0 to {most - 1}")
    missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in given]
    if most > 1 and missing:
        where = "the address of node 0 and a free port of it, the same on every node"
        raise UserError(f"{most} nodes need {' and '.join(missing)}: {where}")


def child_environment(variables: Mapping[str, str], launch: Launch) -> dict[str, str]:
    """Return the environment of llamafactory-cli, which reads an empty variable as a wrong number and starts `torchrun` by name."""
    kept = {key: text for key, text in variables.items() if key not in (*NUMBERS, "RDZV_ID") or text.strip()}
    path = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), kept.get("PATH")]))
    return kept | {"PATH": path} | launch.environment


def agree_on_step(launch: Launch, steps_here: Callable[[], list[int]], patience: int = PATIENCE) -> int | None:
    """Return the last step of which every machine has a whole checkpoint, None if none has any.

    Machines that went on from different steps would wait for each other for ever. steps_here is called when node 0 has
    cleared its damaged checkpoints away, so that machines which share a folder look at the same ones. UserError if a
    machine doesn't have what the others have, or doesn't answer.
    """
    if launch.address is None:
        return max(steps_here(), default=None)
    from torch.distributed import DistError, TCPStore

    host, port = launch.address
    first = launch.rank == 0
    try:
        store = TCPStore(host, port, is_master=first, wait_for_workers=False, timeout=timedelta(seconds=patience))
        if not first:
            store.wait(["steps-0"])
        store.set(f"steps-{launch.rank}", json.dumps(steps_here()))
        everyone = [set(json.loads(store.get(f"steps-{rank}"))) for rank in range(launch.nodes)]
        store.set(f"read-{launch.rank}", "yes")
        if first:  # the store ends with this process's copy of it
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
def written(config: dict[str, Any]) -> Iterator[str]:
    """Yield the path of a file with the whole config, without a space: LLaMA-Factory's torchrun command line can't hold one."""
    import yaml

    folder = "/tmp" if " " in tempfile.gettempdir() else None
    with tempfile.NamedTemporaryFile("w", prefix="medasst-", suffix=".yaml", dir=folder, encoding="utf-8") as file:
        yaml.safe_dump(config, file, allow_unicode=True)
        file.flush()
        yield file.name
