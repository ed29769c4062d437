"""What Slurm is asked and told: partitions, jobs, sbatch's options."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.schema import ClusterSection
from engine.errors import RunError, UserError

SAVE_S = 180
"""Seconds before the time limit at which a job is told to save; a third of a limit shorter than nine minutes."""
ANSWER_S = 60.0
"""Longest that a command of Slurm's may take, in seconds."""
OWN = {
    "account": "cluster.account",
    "comment": None,
    "constraint": "cluster.constraint",
    "array": "cluster.max_parallel",
    "dependency": None,
    "error": None,
    "exclusive": "cluster.exclusive",
    "export": None,
    "kill_on_invalid_dep": None,
    "nodes": "cluster.num_nodes",
    "ntasks": None,
    "ntasks_per_node": None,
    "open_mode": None,
    "output": None,
    "parsable": None,
    "partition": "cluster.partition",
    "qos": "cluster.qos",
    "requeue": None,
    "no_requeue": None,
    "test_only": None,
    "time": "cluster.time_min",
    "wait": "cluster.wait",
    "wrap": None,
}
"""sbatch's parameters that are not for ``cluster.sbatch``, each with the key that sets it; None: ours alone."""
OF_GPU_JOBS = ("cpu", "gpu", "gres", "mem", "sockets", "switches", "tres", "hint", "signal", "nodelist", "nodefile")
"""Beginnings of parameters that are for the machines of the run, not for the one that prepares it."""
FALLBACKS = {
    "account": "ACCOUNT",
    "partition": "PARTITION",
    "qos": "QOS",
    "constraint": "CONSTRAINT",
    "time": "TIMELIMIT",
}
"""sbatch's variables, SBATCH_…, that fill in what the recipe leaves out."""
KEPT = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
"""Variables of Slurm's that say where it is, not what job this is."""


class Nodes(NamedTuple):
    """Machines of a partition that are alike."""

    partition: str
    default: bool
    """Whether jobs go to this partition where none is named."""
    gpus: int
    """Of a machine."""
    cores: int
    """Of a machine, as Slurm counts them."""
    machines: int
    limit_min: float
    """Longest job in minutes."""


def ask(*words: str) -> str:
    """Return what a command of Slurm's prints.

    Raises:
        UserError: If there is no such command here.
        RunError: If Slurm does not answer.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=ANSWER_S)
    except FileNotFoundError as error:
        raise UserError(_absent(words[0])) from error
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{words[0]}: no answer from Slurm within {ANSWER_S:.0f} s; try again when it is up.") from error
    if done.returncode:
        raise RunError(f"{words[0]}: Slurm does not answer ({_last_line(done.stderr)}); try again when it is up.")
    return done.stdout


def check(cluster: ClusterSection, workers_per_node: int, found: Sequence[Nodes]) -> list[str]:
    """Return a sentence for every reason why Slurm could never start such a job.

    Args:
        cluster: The recipe's.
        workers_per_node: Ranks of a machine.
        found: The machines that there are.
    """
    named = [p for p in (cluster.partition, cluster.prepare_partition) if p]
    known = sorted({n.partition for n in found})
    problems = [
        f"cluster.partition={name}: Slurm has no such partition; {_near(name, known)}."
        for name in dict.fromkeys(",".join(named).split(","))
        if name and name not in known
    ]
    return (problems or _check_shape(cluster, suited(found, cluster), workers_per_node)) + _check_sbatch(cluster)


def nodes() -> list[Nodes]:
    """Return the machines of every partition, by kind.

    Raises:
        UserError: If this machine has no Slurm.
        RunError: If Slurm does not answer.
    """
    for name in ("sbatch", "squeue", "srun"):
        if shutil.which(name) is None:
            raise UserError(_absent(name))
    found = []
    for line in ask("sinfo", "--noheader", "--exact", "--format=%P|%G|%c|%D|%l").splitlines():
        name, gres, cores, count, limit = line.strip().split("|")
        kind = (gpus(gres), _number(cores), _number(count), minutes(limit))
        found.append(Nodes(name.rstrip("*"), name.endswith("*"), *kind))
    return found


def gpus(gres: str) -> int:
    """Return the GPUs in Slurm's list of a machine's resources: gpu:8, gpu:h100:4(S:0-1),gpu:a100:4, (null)."""
    listed = re.sub(r"\([^)]*\)", "", gres).split(",")
    return sum(int(item.rsplit(":", 1)[1]) for item in listed if re.fullmatch(r"gpu(:[^:]+)?:\d+", item))


def minutes(limit: str) -> float:
    """Return a time limit of Slurm's, [days-]hours:minutes:seconds, in minutes."""
    if not re.fullmatch(r"(\d+-)?[\d:]+", limit):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, mins, seconds = [0] * (3 - len(parts)) + parts
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def suited(found: Iterable[Nodes], cluster: ClusterSection) -> list[Nodes]:
    """Return the machines of the partitions that a recipe names, or of the default one."""
    names = (cluster.partition or os.environ.get("SBATCH_PARTITION", "")).split(",")
    return [n for n in found if (n.partition in names if names[0] else n.default)]


def cores_per_node(cluster: ClusterSection, workers_per_node: int, found: Sequence[Nodes]) -> int:
    """Return the cores that a job takes of each machine: those of its share of the GPUs, or one a rank on CPUs."""
    if cluster.gpus_per_node is None:
        return workers_per_node
    share = [
        n.cores * cluster.gpus_per_node // n.gpus for n in suited(found, cluster) if n.gpus >= cluster.gpus_per_node
    ]
    return max(1, min(share, default=1))


def live(job_id: str) -> str | None:
    """Return the state of a job that is queued or runs, as Slurm says it; None: it has ended, or is not known any more."""
    words = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=ANSWER_S)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def ended(job_id: str) -> int | None:
    """Return the exit code of a job that has ended, as far as Slurm still knows it; None: it has not, or is forgotten."""
    words = ["scontrol", "--oneliner", "show", "job", job_id]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=ANSWER_S)
    state, code = re.search(r" JobState=(\w+)", done.stdout), re.search(r" ExitCode=(\d+):(\d+)", done.stdout)
    if (
        state is None
        or code is None
        or state[1] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED")
    ):
        return None
    return int(code[1]) or (0 if state[1] == "COMPLETED" else 1)


def options(cluster: ClusterSection, name: str, cores: int) -> dict[str, Any]:
    """Return sbatch's parameters for a run; None and False: left out.

    Args:
        cluster: The recipe's.
        name: Of the run.
        cores: Of each machine that the job takes.
    """
    extra = {key.replace("-", "_"): value for key, value in cluster.sbatch.items()}
    own_gpus = any(key.startswith(("gpu", "gres")) for key in extra)
    notice_s = min(SAVE_S, (cluster.time_min or SAVE_S) * 20)
    return {
        "job_name": name,
        "nodes": cluster.num_nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cores,
        "gres": f"gpu:{cluster.gpus_per_node}" if cluster.gpus_per_node and not own_gpus else None,
        "exclusive": cluster.exclusive,
        "mem": 0 if cluster.exclusive else None,
        "requeue": True,
        "signal": f"B:USR2@{notice_s}",
        **_common(cluster),
        **extra,
    }


def prepare_options(cluster: ClusterSection, name: str, cores: int) -> dict[str, Any]:
    """Return the same for the job without GPUs that prepares runs."""
    extra = {key.replace("-", "_"): value for key, value in cluster.sbatch.items()}
    common = _common(cluster)
    if cluster.prepare_partition is not None:
        common.update(partition=cluster.prepare_partition, constraint=None)
    return {
        "job_name": f"{name}-prepare",
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": cores,
        "requeue": True,
        **common,
        **{key: value for key, value in extra.items() if not key.startswith(OF_GPU_JOBS)},
    }


def _common(cluster: ClusterSection) -> dict[str, Any]:
    return {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "time": cluster.time_min,
    }


def submit(
    folder: Path,
    command: Sequence[str],
    parameters: dict[str, Any],
    setup: Sequence[str],
    *,
    array: tuple[int, int] | None = None,
) -> str:
    """Submit a job and return its id.

    Args:
        folder: Where its script and its output go.
        command: What it does, on its first machine, as the one process of the script.
        parameters: sbatch's; None and False: left out.
        setup: Lines of bash before the command.
        array: Number of tasks, and how many may run at a time; None: no array.

    Raises:
        UserError: If sbatch refuses.
    """
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    given = {key: value for key, value in parameters.items() if value is not None and value is not False}
    dropped = _dropped(given)

    class Executor(SlurmExecutor):
        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            unset = [word for name in dropped for word in ("-u", name)]
            return ["env", *unset, "sbatch", "--export=ALL", str(submission_file_path)]

    folder.mkdir(parents=True, exist_ok=True)
    given["output"] = str(folder / ("%A_%a.out" if array else "%j.out"))
    executor = Executor(folder)
    quiet = {"time": None, "wckey": None, "stderr_to_stdout": True, "use_srun": False}
    # Until it is ready to answer it, the job ignores the warning, which would kill it.
    lines = [*setup, "trap '' USR2"]
    executor.update_parameters(setup=lines, additional_parameters=given, **quiet)
    if array is not None:
        executor.parameters.update(map_count=array[0], array_parallelism=array[1])
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what sbatch says is in the error
            job_id = str(executor._submit_command(f"exec {shlex.join(command)}").job_id)
    except FailedJobError as error:
        raise UserError(f"sbatch refuses the job ({_last_line(str(error))}); nothing was submitted.") from error
    for link in folder.glob(".submission_file_*"):
        link.unlink()
    return job_id


def cancel(job_id: str) -> None:
    """Cancel a job."""
    ask("scancel", job_id)


def _dropped(given: dict[str, Any]) -> list[str]:
    """Return the variables that would change what is submitted: sbatch takes them before the script, and jobs inherit them."""
    filled = {f"SBATCH_{name}" for key, name in FALLBACKS.items() if key not in given}
    ours = (name for name in os.environ if name.startswith(("SBATCH_", "SLURM_")))
    return sorted(name for name in ours if name not in filled | KEPT)


def _check_shape(cluster: ClusterSection, found: list[Nodes], workers_per_node: int) -> list[str]:
    """Look at what a job asks of its partition; nothing where no partition is named and none is the default."""
    if not found:
        return []
    where = f"partition {cluster.partition or found[0].partition}"
    limit = max(n.limit_min for n in found)
    problems = []
    if cluster.time_min is not None and cluster.time_min > limit:
        problems.append(
            f"cluster.time_min={cluster.time_min}: {where} lets jobs run for {limit:.0f} minutes; set it to {limit:.0f} or less."
        )
    if cluster.gpus_per_node is not None:
        key, need, what = "cluster.gpus_per_node", cluster.gpus_per_node, "GPUs"
        sizes = [(n.gpus, n.machines) for n in found]
    else:
        key, need, what = "cluster.num_workers", workers_per_node, "cores"
        sizes = [(n.cores, n.machines) for n in found]
    most = max(size for size, _ in sizes)
    if need > most:
        remedy = (
            f"set it to {most} or less" if most else "choose another partition, or cluster.num_workers to train on CPUs"
        )
        return [*problems, f"{key}: {need} {what} of a machine, and {where} has none with more than {most}; {remedy}."]
    able = sum(machines for size, machines in sizes if size >= need)
    if cluster.num_nodes > able:
        problems.append(
            f"cluster.num_nodes={cluster.num_nodes}: {where} has {able} machines with {need} {what} or more; set it to {able} or "
            "less."
        )
    return problems


def _check_sbatch(cluster: ClusterSection) -> list[str]:
    """Hold ``cluster.sbatch`` against the parameters that this Slurm has, its plugins' among them."""
    if not cluster.sbatch:
        return []
    known = {word.replace("-", "_") for word in re.findall(r"--([a-z][a-z0-9-]+)", ask("sbatch", "--help"))}
    problems = []
    for given in cluster.sbatch:
        name = given.replace("-", "_")
        if name in OWN:
            remedy = f"set {OWN[name]} instead" if OWN[name] else "every job has its own; take it out"
            problems.append(f"cluster.sbatch.{given}: {remedy}.")
        elif name not in known:
            problems.append(f"cluster.sbatch.{given}: sbatch has no such parameter; {_near(name, sorted(known))}.")
    return problems


def _absent(name: str) -> str:
    return (
        f"cluster=slurm: there is no {name} on PATH; submit from a machine of the cluster, or choose cluster=local or "
        "cluster=ray_local to run here."
    )


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    if near:
        return f"did you mean {near[0]}"
    return f"there is {', '.join(known)}" if len(known) < 20 else "see `sbatch --help`"


def _number(text: str) -> int:
    return int(text.rstrip("+") or 0)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines()] or ["no reason given"]
    return lines[-1].removeprefix("sbatch: error: ").rstrip(".")[:200]
