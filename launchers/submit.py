"""From a checked recipe to a queued Slurm job: nothing impossible is queued, and what is queued is frozen in the run folder."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine import checkpoint, hub, plan
from engine.config.schema import RunConfig
from engine.errors import EXIT_DONE, RunError, UserError
from engine.run_folder import RunFolder
from launchers import slurm, snapshot
from launchers.job import ARRAY, PREPARE
from launchers.prepare import prepare

Run = tuple[RunConfig, str]
"""A recipe and its re-runnable text."""
PREPARE_CORES = 8
"""Cores of the job that tokenises."""
DECISIVE: Any = {
    **dict.fromkeys(("model", "data", "train", "backend"), True),
    "algorithm": {"name", "reference", "max_num_steps", "max_num_epochs"},
}
"""Keys of a recipe that decide whether it could be trained: runs that are alike in them are looked at once."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What was submitted."""

    job_id: str
    folder: Path
    """The run folder; of an array, that of the sweep."""
    prepared_by: str | None
    """Id of the job that tokenises for it and that it waits for."""
    reference: str | None = None
    """Id of the job that computes the reference for several runs, which wait for it."""
    array: tuple[int, int] | None = None
    """How many runs it is, and how many may run at a time; None: it is one run."""

    @property
    def jobs(self) -> list[str]:
        """Ids of all its jobs, in the order in which they run."""
        return [job for job in (self.prepared_by, self.reference, self.job_id) if job is not None]

    def output(self, job_id: str) -> Path:
        """Return the file that a job's output goes to."""
        return self.folder / "slurm" / f"{job_id}.out"


def run(config: RunConfig, recipe: str) -> int:
    """Submit a run, say how to follow it, and return the exit code: with ``cluster.wait`` that of the job."""
    if is_finished(config, recipe):
        print(f"already finished: weights in {RunFolder(config, recipe, lock=None).final}")
        return EXIT_DONE
    if not config.cluster.wait:
        print(described(submit(config, recipe)), flush=True)
        return EXIT_DONE
    from launchers.follow import View, follow

    view = View(_folder(config))  # begins where the log is now
    submitted = submit(config, recipe)
    print(described(submitted), flush=True)
    return follow(submitted, view)


def submit(config: RunConfig, recipe: str) -> Submission:
    """Check a run, freeze it in its folder and queue it.

    Args:
        config: The recipe, ``cluster.name`` slurm.
        recipe: Its re-runnable text.

    Raises:
        UserError: With a sentence for everything that is wrong; nothing stays submitted then.
        RunError: If Slurm does not answer.
    """
    return _submit([(config, recipe)], _folder(config))


def submit_array(runs: Sequence[Run], max_parallel: int | None = None, *, ahead: Sequence[Run] = ()) -> Submission:
    """Check runs that differ in what they train, freeze each, and queue them as one job array; errors as ``submit``.

    Args:
        runs: Recipes and their texts, the folders of all in one folder: the sweep's.
        max_parallel: How many may run at a time; None: as many as Slurm lets.
        ahead: Runs, an array of their own, that must have succeeded before these start: they compute references.
    """
    clusters = {config.cluster.model_dump_json() for config, _ in runs}
    if len(clusters) > 1:
        raise UserError(
            "-m: the runs of a sweep are one job array on Slurm, of machines that are alike; sweep no key of cluster."
        )
    if runs[0][0].cluster.wait:
        raise UserError(
            "cluster.wait=True: one run is waited for, and not a sweep; set it to false, and look with python -m engine.sweep."
        )
    return _submit(runs, _folder(runs[0][0]).parent, parallel=min(max_parallel or len(runs), len(runs)), ahead=ahead)


def is_finished(config: RunConfig, recipe: str) -> bool:
    """Tell whether a run folder holds this very run, ended."""
    folder = RunFolder(config, recipe, lock=None)
    newest, before = max(checkpoint.all_in(folder.checkpoints), default=None), folder.path / "recipe.yaml"
    if newest is None or not folder.is_finished() or not checkpoint.read_state(newest).finished or not before.is_file():
        return False
    then, now = (yaml.safe_load(text) for text in (before.read_text(), recipe))
    return all(then.get(name) == now[name] for name in now if name not in ("cluster", "logger"))


def described(submitted: Submission) -> str:
    """Return what the user is told: the jobs, their folder, and the commands that go with them."""
    folder, prepared_by = submitted.folder, submitted.prepared_by
    head, task = f"submitted job {submitted.job_id}", submitted.job_id
    where = [f"run folder  {folder}", f"follow      tail -n +1 -F {shlex.quote(str(folder / 'log.txt'))}"]
    if submitted.array is not None:
        runs, parallel = submitted.array
        at_a_time = f", {parallel} at a time" if parallel < runs else ""
        head, task = f"{head} ({runs} run{'s' * (runs > 1)}{at_a_time})", f"{task}_N"
        where = [f"sweep       {folder}", f"table       python -m engine.sweep {shlex.quote(str(folder))}"]
    waits_for = [f"job {prepared_by} to download and tokenise"] if prepared_by else []
    waits_for += [f"job {submitted.reference} to compute the reference"] if submitted.reference else []
    lines = [
        head + (f", which waits for {' and '.join(waits_for)}" if waits_for else ""),
        *where,
        f"watch       squeue --jobs={','.join(submitted.jobs)}",
        f"output      {submitted.output(task)}" + (f" ({prepared_by}.out: preparing)" if prepared_by else ""),
        f"cancel      scancel {' '.join(submitted.jobs)}",
    ]
    return "\n".join(lines)


def _check(runs: Sequence[Run], found: Sequence[slurm.Nodes]) -> None:
    """Refuse runs that Slurm could never start or that could not be trained there; say where a card may be too small.

    Raises:
        UserError: With a sentence for each reason.
    """
    problems, doubts = slurm.check(runs[0][0].cluster, found), []
    unlike = {config.model_dump_json(include=DECISIVE): config for config, _ in runs}
    for config in unlike.values():
        problems += hub.refusals(config)
        try:
            doubts.append(plan.plan(config).problem)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    for doubt in dict.fromkeys(filter(None, doubts)):
        print(f"{doubt} Cards of {plan.CARD_GB:g} GB are assumed; python -m engine.plan --card GB tells of others.")


def _submit(runs: Sequence[Run], folder: Path, *, parallel: int | None = None, ahead: Sequence[Run] = ()) -> Submission:
    """Submit one run, or an array of those that may run so many at a time, with all that it waits for."""
    config, cluster, found = runs[0][0], runs[0][0].cluster, slurm.nodes()
    _check(runs, found)
    given = slurm.options(cluster, config.run.name, slurm.cores_per_node(cluster, found))
    words = [] if parallel is None else [ARRAY]
    with ExitStack() as held, Queue(folder, cluster.setup) as queue:
        for each in [*ahead, *runs]:
            held.enter_context(_held(*each))
        if cluster.prepare == "here":
            for own, _ in runs:
                prepare(own)
        for own, recipe in [*ahead, *runs]:
            snapshot.freeze(_folder(own), own, recipe)
        prepared_by = reference = None
        if cluster.prepare == "job":
            alone = slurm.prepare_options(cluster, config.run.name, PREPARE_CORES)
            prepared_by = queue.add([PREPARE], runs, alone, None)
        if ahead:
            reference = queue.add([ARRAY], ahead, given, parallel)
        job_id = queue.add(words, runs, given, parallel)
        for job, own_runs in ((reference, ahead), (job_id, runs)):
            for number, (own, _) in enumerate(own_runs):
                task = job if parallel is None else f"{job}_{number}"
                snapshot.note(_folder(own), job_id=task, prepared_by=prepared_by)
    return Submission(
        job_id=job_id,
        folder=folder,
        prepared_by=prepared_by,
        reference=reference,
        array=None if parallel is None else (len(runs), parallel),
    )


@dataclass
class Queue:
    """Jobs of which each waits for those before it; a context at whose end all of them are queued, or none."""

    folder: Path
    """Where their scripts and output go: below this one."""
    setup: Sequence[str]
    """Lines of bash that they begin with."""
    jobs: list[str] = field(default_factory=list)

    def __enter__(self) -> Queue:
        return self

    def add(self, words: Sequence[str], runs: Sequence[Run], options: Mapping[str, Any], parallel: int | None) -> str:
        """Queue a job and return its id.

        Args:
            words: What ``launchers.job`` is to do with the folders of the runs.
            runs: The runs.
            options: Parameters of sbatch.
            parallel: How many tasks of an array may run at a time; None: it is no array.
        """
        given: dict[str, Any] = {**options, "comment": str(self.folder)}
        if parallel is not None:
            given["array"] = f"0-{len(runs) - 1}%{parallel}"
        if self.jobs:
            given.update(dependency=f"afterok:{':'.join(self.jobs)}", kill_on_invalid_dep="yes")
        folders = [str(_folder(config)) for config, _ in runs]
        command = [sys.executable, "-u", "-m", "launchers.job", *words, *folders]
        self.jobs.append(slurm.submit(self.folder / "slurm", command, given, self.setup))
        return self.jobs[-1]

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not self.jobs:
            return
        try:
            slurm.cancel(*self.jobs)
        except RunError as failure:
            left = " ".join(self.jobs)
            raise RunError(
                f"{error}\njobs {left} are queued all the same; end them with scancel {left}. {failure}"
            ) from error


@contextmanager
def _held(config: RunConfig, recipe: str) -> Iterator[None]:
    """Keep a run folder from other submissions, seen to be free and to hold no other recipe's run.

    The run's own lock is let go of at once: the job may start before this has ended.
    """
    RunFolder(config, recipe).release()
    folder = RunFolder(config, recipe, lock=".lock.submit")
    try:
        job_id = snapshot.read_note(folder.path).get("job_id")
        state = slurm.live(job_id) if job_id is not None else None
        if state is not None:
            raise UserError(
                f"run.dir={folder.path}: job {job_id} is {state.lower()} and has it; wait for it, cancel it (scancel {job_id}), or "
                "choose another folder."
            )
        yield
    finally:
        folder.release()


def _folder(config: RunConfig) -> Path:
    return Path(os.path.abspath(os.path.expanduser(config.run.dir)))
