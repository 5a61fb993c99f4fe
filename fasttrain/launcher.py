"""How the processes of a run find each other: the environment variables of torchrun or of SLURM's srun.

torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each process.
`srun` sets variables of its own, from which these follow. Without either, a run has a single process.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from fasttrain.errors import InputError

REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def describe_processes(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables if `srun` started this process as one of several.

    Raises:
        InputError: Only some of the variables are set, or one that must be a number is not.
    """
    # Only `srun` sets the variables of a step. A command that a batch script or a shell of salloc starts
    # without `srun` is therefore a single process, whatever the size of the allocation. Batch scripts often
    # export WORLD_SIZE but cannot export RANK, which differs between the tasks, so RANK decides.
    if (
        "RANK" not in environ
        and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        and not _is_typed_in_a_task(environ)
    ):
        _describe_task(environ)
    if environ.get("WORLD_SIZE", "1") == "1":
        return
    if missing := [name for name in REQUIRED if name not in environ]:
        raise InputError(
            f"WORLD_SIZE={environ['WORLD_SIZE']} announces several processes, but these are not set: "
            f"{', '.join(missing)}. Start them with torchrun --nproc-per-node=N -m fasttrain ..., "
            f"or unset WORLD_SIZE"
        )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not environ[name].isdecimal():
            raise InputError(f"{name}={environ[name]}: expected a number, as torchrun sets it")


def _is_typed_in_a_task(environ: MutableMapping[str, str]) -> bool:
    """Return whether this command was typed in a shell that `srun --pty bash` opened.

    The shell is one of the tasks, but the commands typed in it are not: no other task runs them.
    """
    return os.isatty(0) and environ.get("SLURM_TASK_PID") != str(os.getpid())


def _describe_task(environ: MutableMapping[str, str]) -> None:
    """Derive torchrun's variables from those of a task of a SLURM step."""
    nodes = environ["SLURM_STEP_NODELIST"]
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
    tasks = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    environ["LOCAL_WORLD_SIZE"] = str(tasks[int(environ["SLURM_NODEID"])])
    environ.setdefault("MASTER_ADDR", first_node(nodes))
    # All tasks derive the same port. Steps of one job and jobs on one node rarely get the same one.
    environ.setdefault("MASTER_PORT", str(20000 + (31 * job + step) % 10000))
    # As torchrun does. If SLURM does not bind the tasks of a node to cores of their own, each would otherwise
    # start a thread per core, and the threads would wait for each other.
    environ.setdefault("OMP_NUM_THREADS", str(cores_of_process(environ)))


def first_node(nodes: str) -> str:
    """Return the first name in a SLURM node list, such as `gpu01` in `gpu[01-04,07],cpu3`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # the pattern also matches the empty string
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def tasks_per_node(counts: str) -> list[int]:
    """Expand a SLURM list of counts, such as `2(x3),1`, which means [2, 2, 2, 1]."""
    expanded = []
    for count in counts.split(","):
        number, _, repeat = count.partition("(x")
        expanded += [int(number)] * int(repeat.rstrip(")") or 1)
    return expanded


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    # macOS cannot bind a process to cores.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_process(environ: MutableMapping[str, str] = os.environ) -> int:
    """Return the number of CPU cores for this process, which may share its cores with others."""
    cores = available_cores()
    allocated = int(environ.get("SLURM_CPUS_ON_NODE", cores))
    # `srun` usually binds each task to cores of its own. The processes of torchrun share those of its task.
    if cores < allocated and "TORCHELASTIC_RUN_ID" not in environ:
        return cores
    # Some clusters do not confine a job to the cores that it was allocated.
    return max(1, min(cores, allocated) // int(environ.get("LOCAL_WORLD_SIZE", 1)))
