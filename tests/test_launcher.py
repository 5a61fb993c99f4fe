"""The environment variables that describe the processes of a run."""

import os

import pytest

from fasttrain.errors import InputError
from fasttrain.launcher import cores_of_process, describe_processes, first_node, tasks_per_node

# What SLURM 22.05 sets for the third of three tasks of a step on two nodes, as far as it matters here.
TASK = {
    "SLURM_JOB_ID": "812",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_TASK_PID": str(os.getpid()),
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
}


def test_a_task_of_slurm_is_described_as_by_torchrun() -> None:
    environ = dict(TASK)
    describe_processes(environ)
    added = {name: value for name, value in environ.items() if name not in TASK}
    port = int(added.pop("MASTER_PORT"))
    assert added.pop("OMP_NUM_THREADS") == str(len(os.sched_getaffinity(0)))
    assert added == {
        "RANK": "2",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "gpu07",
    }
    others = [dict(TASK, SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NODEID="0") for rank in "01"]
    for other in others:
        describe_processes(other)
        assert int(other["MASTER_PORT"]) == port
        assert other["LOCAL_WORLD_SIZE"] == "2"
        # The two tasks on this node share its cores.
        assert other["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))


def test_world_size_from_a_batch_script_is_overridden() -> None:
    environ = {**TASK, "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    describe_processes(environ)
    assert (environ["WORLD_SIZE"], environ["RANK"]) == ("3", "2")
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.7", "29500")


@pytest.mark.parametrize(("typed", "ranks"), [(False, "3"), (True, None)])
def test_a_command_typed_in_a_shell_of_srun_is_a_single_process(
    typed: bool, ranks: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`srun --pty` gives its first task a terminal: this command, or the shell in which it was typed."""
    monkeypatch.setattr(os, "isatty", lambda _: True)
    environ = {**TASK, "SLURM_TASK_PID": str(os.getppid() if typed else os.getpid())}
    describe_processes(environ)
    assert environ.get("WORLD_SIZE") == ranks


@pytest.mark.parametrize(
    "environ",
    [
        {},
        # A batch script of an allocation with three tasks, and a task started alone.
        {name: value for name, value in TASK.items() if "STEP" not in name},
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        # `srun torchrun`
        {**TASK, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    ],
)
def test_other_processes_are_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    describe_processes(environ)
    assert environ == before


def test_incomplete_variables_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"WORLD_SIZE=2 .* set: RANK, LOCAL_RANK, MASTER_ADDR\. .*torchrun --"
    ):
        describe_processes({"WORLD_SIZE": "2", "MASTER_PORT": "29500"})
    complete = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"}
    with pytest.raises(InputError, match="MASTER_PORT=x: expected a number"):
        describe_processes(complete)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu01", "gpu01"),
        ("gpu01,gpu02", "gpu01"),
        ("gpu[01-04,07],cpu3", "gpu01"),
        ("gpu[3,5]", "gpu3"),
        ("rack[2-3]node[08-11]-ib", "rack2node08-ib"),
        ("node-a[1-2]", "node-a1"),
    ],
)
def test_the_first_name_of_a_node_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_the_numbers_of_tasks_per_node() -> None:
    assert tasks_per_node("4") == [4]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_processes_share_the_cores_unless_slurm_binds_them() -> None:
    cores = len(os.sched_getaffinity(0))
    assert cores_of_process({}) == cores
    assert cores_of_process({"LOCAL_WORLD_SIZE": str(cores)}) == 1
    assert cores_of_process({"LOCAL_WORLD_SIZE": str(2 * cores)}) == 1
    assert cores_of_process({"LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_ON_NODE": str(2 * cores)}) == cores
    assert cores_of_process({"LOCAL_WORLD_SIZE": "1", "SLURM_CPUS_ON_NODE": str(cores)}) == cores
    # A node without binding, of which this job has one core.
    assert cores_of_process({"LOCAL_WORLD_SIZE": "1", "SLURM_CPUS_ON_NODE": "1"}) == 1


def test_processes_of_torchrun_share_the_cores_of_its_task() -> None:
    cores = len(os.sched_getaffinity(0))
    environ = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": str(cores), "SLURM_CPUS_ON_NODE": "999"}
    assert cores_of_process(environ) == 1
