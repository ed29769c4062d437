"""What Slurm is asked and told: partitions, jobs, sbatch's options."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.config import layout
from engine.config.schema import ClusterSection
from engine.errors import RunError, UserError

SAVE_S = 180
"""Seconds before the time limit at which a job is told to save; a third of a limit shorter than nine minutes."""
ANSWER_S = 60.0
"""Longest that a command of Slurm's may take, in seconds."""
OWN = {
    "account": "account",
    "array": "max_parallel",
    "constraint": "constraint",
    "exclusive": "exclusive",
    "nodes": "num_nodes",
    "partition": "partition",
    "qos": "qos",
    "time": "time_min",
    "wait": "wait",
}
"""sbatch's parameters that are not for ``cluster.sbatch``, each with the key of cluster that sets it."""
OURS = re.compile(
    "comment|dependency|error|export|kill_on_invalid_dep|ntasks(_per_node)?|open_mode|output|parsable|(no_)?requeue|test_only|wrap"
)
"""Those that every job has as it must."""
OF_RUNS = re.compile("cpu|gpu|gres|mem|exclusive|sockets|switches|tres|hint|signal|nodelist|nodefile")
"""Beginnings of parameters that are for the machines of the run, not for the one that prepares it."""
FALLBACKS = {
    "account": "ACCOUNT",
    "partition": "PARTITION",
    "qos": "QOS",
    "constraint": "CONSTRAINT",
    "time": "TIMELIMIT",
}
"""sbatch's variables, SBATCH_…, that fill in what the recipe leaves out."""
UNENDED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED")
"""States of a job that is not over."""
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
        raise UserError(
            f"cluster=slurm: there is no {words[0]} on PATH; submit from a machine of the cluster, or choose cluster=local or "
            "cluster=ray_local to run here."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{words[0]}: no answer from Slurm within {ANSWER_S:.0f} s; try again when it is up.") from error
    if done.returncode:
        raise RunError(f"{words[0]}: Slurm does not answer ({_last_line(done.stderr)}); try again when it is up.")
    return done.stdout


def check(cluster: ClusterSection, found: Sequence[Nodes]) -> list[str]:
    """Return a sentence for every reason why Slurm could never start such a job on the machines that there are."""
    known = sorted({n.partition for n in found})
    problems = [
        f"cluster.{key}={name}: Slurm has no such partition; {_near(name, known)}."
        for key in ("partition", "prepare_partition")
        for name in (getattr(cluster, key) or "").split(",")
        if name and name not in known
    ]
    return (problems or _check_shape(cluster, _suited(found, cluster))) + _check_sbatch(cluster)


def nodes() -> list[Nodes]:
    """Return the machines of every partition, by kind.

    Raises:
        UserError: If this machine has no Slurm.
        RunError: If Slurm does not answer.
    """
    found = []
    for line in ask("sinfo", "--noheader", "--exact", "--format=%P|%G|%c|%D|%l").splitlines():
        name, gres, cores, count, limit = line.strip().split("|")
        found.append(Nodes(name.rstrip("*"), name.endswith("*"), gpus(gres), int(cores), int(count), minutes(limit)))
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


def _suited(found: Iterable[Nodes], cluster: ClusterSection) -> list[Nodes]:
    """Return the machines of the partitions that a recipe names, or of the default one."""
    names = (cluster.partition or os.environ.get("SBATCH_PARTITION", "")).split(",")
    return [n for n in found if (n.partition in names if names[0] else n.default)]


def cores_per_node(cluster: ClusterSection, found: Sequence[Nodes]) -> int:
    """Return the cores that a job takes of each machine: those of its share of the GPUs, or one a rank on CPUs."""
    wanted = cluster.gpus_per_node
    if wanted is None:
        return layout.named_ranks_per_node(cluster) or 1
    return max(1, min((n.cores * wanted // n.gpus for n in _suited(found, cluster) if n.gpus >= wanted), default=1))


def states(job_id: str) -> dict[str, str]:
    """Return the state of a job that is queued or runs, as Slurm says it, by its id; of an array, that of each task.

    Empty: it has ended, or is not known any more, or there is no Slurm here.
    """
    words = ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={job_id}"]
    try:
        return dict(line.split() for line in ask(*words).splitlines())
    except RunError:  # so it is answered too where a job has ended some time ago
        return {}


def live(job_id: str) -> str | None:
    """Return the state of a job, or one of its tasks, that is queued or runs; None: it does neither, as ``states`` tells."""
    return next(iter(states(job_id).values()), None)


def ended(job_id: str) -> int | None:
    """Return the exit code of a job that has ended, as far as Slurm still knows it; None: it has not, or is forgotten."""
    try:
        told = ask("scontrol", "--oneliner", "show", "job", job_id)
    except RunError:
        return None
    state, code = re.search(r" JobState=(\w+)", told), re.search(r" ExitCode=(\d+):", told)
    if state is None or code is None or state[1] in UNENDED:
        return None
    return int(code[1]) or int(state[1] != "COMPLETED")


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
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "time": cluster.time_min,
        **extra,
    }


def prepare_options(cluster: ClusterSection, name: str, cores: int) -> dict[str, Any]:
    """Return the same for the job without GPUs that prepares runs."""
    whole = options(cluster, f"{name}-prepare", cores)
    given = {key: value for key, value in whole.items() if not OF_RUNS.match(key)}
    given.update(nodes=1, cpus_per_task=cores)
    if cluster.prepare_partition is not None:
        given.update(partition=cluster.prepare_partition, constraint=None)
    return given


def submit(folder: Path, command: Sequence[str], parameters: Mapping[str, Any], setup: Sequence[str]) -> str:
    """Submit a job and return its id.

    Args:
        folder: Where its script and its output go.
        command: What it does, on its first machine, as the one process of the script.
        parameters: sbatch's; None and False: left out.
        setup: Lines of bash before the command.

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
    given["output"] = str(folder / ("%A_%a.out" if "array" in given else "%j.out"))
    executor = Executor(folder)
    quiet = {"time": None, "wckey": None, "stderr_to_stdout": True, "use_srun": False}
    # Until it is ready to answer it, the job ignores the warning, which would kill it.
    lines = [*setup, "trap '' USR2"]
    executor.update_parameters(setup=lines, additional_parameters=given, **quiet)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what sbatch says is in the error
            job_id = str(executor._submit_command(f"exec {shlex.join(command)}").job_id)
    except FailedJobError as error:
        raise UserError(f"sbatch refuses the job ({_last_line(str(error))}); nothing was submitted.") from error
    for link in folder.glob(".submission_file_*"):
        link.unlink()
    return job_id


def cancel(*job_ids: str) -> None:
    """Cancel jobs; those that have ended are let be.

    Raises:
        RunError: If Slurm does not answer.
    """
    ask("scancel", *job_ids)


def _dropped(given: dict[str, Any]) -> list[str]:
    """Return the variables that would change what is submitted: sbatch takes them before the script, and jobs inherit them."""
    filled = {f"SBATCH_{name}" for key, name in FALLBACKS.items() if key not in given}
    ours = (name for name in os.environ if name.startswith(("SBATCH_", "SLURM_")))
    return sorted(name for name in ours if name not in filled | KEPT)


def _check_shape(cluster: ClusterSection, found: list[Nodes]) -> list[str]:
    """Look at what a job asks of its partition; nothing where no partition is named and none is the default."""
    if not found:
        return []
    where = f"partition {cluster.partition or found[0].partition}"
    problems, limit = [], max(n.limit_min for n in found)
    if cluster.time_min is not None and cluster.time_min > limit:
        problems.append(
            f"cluster.time_min={cluster.time_min}: {where} lets jobs run for {limit:.0f} minutes; set it to {limit:.0f} or less."
        )
    on_gpus = cluster.gpus_per_node is not None
    key, what = ("cluster.gpus_per_node", "GPUs") if on_gpus else ("cluster.num_workers", "cores")
    need, sizes = layout.named_ranks_per_node(cluster) or 1, [n.gpus if on_gpus else n.cores for n in found]
    able = sum(n.machines for n, size in zip(found, sizes, strict=True) if size >= need)
    if not able:
        most, instead = max(sizes), "choose another partition, or cluster.num_workers to train on CPUs"
        remedy = f"set it to {most} or less" if most else instead
        problems.append(f"{key}: {need} {what} of a machine, and {where} has none with more than {most}; {remedy}.")
    elif cluster.num_nodes > able:
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
            problems.append(f"cluster.sbatch.{given}: set cluster.{OWN[name]} instead.")
        elif OURS.fullmatch(name):
            problems.append(f"cluster.sbatch.{given}: every job has its own; take it out.")
        elif name not in known:
            problems.append(f"cluster.sbatch.{given}: sbatch has no such parameter; {_near(name, sorted(known))}.")
    return problems


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    if near:
        return f"did you mean {near[0]}"
    return f"there is {', '.join(known)}" if len(known) < 20 else "see `sbatch --help`"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines()] or ["no reason given"]
    return lines[-1].removeprefix("sbatch: error: ").rstrip(".")[:200]
