"""From a checked recipe to a queued Slurm job: nothing impossible is queued, and what is queued is frozen in the run folder."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from engine import checkpoint, hub
from engine.config import layout, megatron, sources
from engine.config.schema import ClusterSection, RunConfig
from engine.errors import EXIT_DONE, UserError
from engine.run_folder import RunFolder
from launchers import slurm, snapshot
from launchers.job import ARRAY, PREPARE

Run = tuple[RunConfig, str]
"""A recipe and its re-runnable text."""
PREPARE_CORES = 8
"""Cores of the job that tokenises."""


@dataclass(frozen=True)
class Submission:
    """What was submitted."""

    job_id: str
    folder: Path
    """The run folder; of an array, that of the sweep."""
    prepared_by: str | None = None
    """Id of the job that prepares it and that it waits for."""
    output: str = ""
    """File that the job's output goes to, Slurm's patterns filled in."""


def run(config: RunConfig, recipe: str) -> int:
    """Submit a run, say how to follow it, and return the exit code: with ``cluster.wait`` that of the job."""
    if is_finished(config, recipe):
        print(f"already finished: weights in {RunFolder(config, recipe, lock=None).final}")
        return EXIT_DONE
    if config.cluster.wait:
        from launchers.follow import View, follow

        view = View(_folder(config))  # begins where the log is now
        submitted = submit(config, recipe)
        print(described(submitted), flush=True)
        return follow(submitted, view)
    print(described(submit(config, recipe)), flush=True)
    return EXIT_DONE


def submit(config: RunConfig, recipe: str, *, after: str | None = None) -> Submission:
    """Check a run, freeze it in its folder and queue it.

    Args:
        config: The recipe, ``cluster.name`` slurm.
        recipe: Its re-runnable text.
        after: Id of a job that must have succeeded before this one starts.

    Raises:
        UserError: With a sentence for everything that is wrong; nothing is submitted then.
        RunError: If Slurm does not answer.
    """
    return _submit([(config, recipe)], _folder(config), after=after)


def submit_array(runs: Sequence[Run], max_parallel: int | None = None, *, after: str | None = None) -> Submission:
    """Check runs that differ in what they train, freeze each, and queue them as one job array; arguments and errors as ``submit``.

    Args:
        runs: Recipes and their texts, the folders of all in one folder: the sweep's.
        max_parallel: How many may run at a time; None: as many as Slurm lets.
        after: Id of a job that must have succeeded before they start.
    """
    clusters = {config.cluster.model_dump_json() for config, _ in runs}
    if len(clusters) > 1:
        raise UserError(
            "-m: the runs of a sweep are one job array on Slurm, of machines that are alike; sweep no key of cluster."
        )
    return _submit(runs, _folder(runs[0][0]).parent, after=after, parallel=max_parallel or len(runs))


def is_finished(config: RunConfig, recipe: str) -> bool:
    """Tell whether a run folder holds this very run, ended."""
    folder = RunFolder(config, recipe, lock=None)
    newest, before = max(checkpoint.all_in(folder.checkpoints), default=None), folder.path / "recipe.yaml"
    if newest is None or not folder.is_finished() or not checkpoint.read_state(newest).finished or not before.is_file():
        return False
    then, now = (yaml.safe_load(text) for text in (before.read_text(), recipe))
    return all(then.get(name) == now[name] for name in now if name not in ("cluster", "logger"))


def described(submitted: Submission) -> str:
    """Return what the user is told: the job, its folder, and the commands that go with it."""
    ids, log = submitted.job_id, submitted.folder / "log.txt"
    jobs = ids if submitted.prepared_by is None else f"{submitted.prepared_by},{ids}"
    lines = [f"submitted job {ids}"]
    if submitted.prepared_by is not None:
        lines[0] += f", which waits for job {submitted.prepared_by} to download and tokenise"
    lines += [
        f"run folder  {submitted.folder}",
        f"follow      tail -n +1 -F {shlex.quote(str(log))}",
        f"watch       squeue --jobs={jobs}",
        f"output      {submitted.output}"
        + (f" ({submitted.prepared_by}.out: preparing)" if submitted.prepared_by else ""),
        f"cancel      scancel {jobs.replace(',', ' ')}",
    ]
    if not submitted.output.endswith(f"/{ids}.out"):
        del lines[2]  # each run of an array has a log of its own
    return "\n".join(lines)


def check_plan(config: RunConfig) -> list[str]:
    """Return a sentence for every reason known on this machine why the run could not be trained there."""
    ranks, cluster = layout.named_ranks(config.cluster), config.cluster
    assert ranks is not None  # the schema's checks ask for one
    fields, per_node = hub.known_fields(config.model), layout.named_ranks_per_node(cluster)
    found = layout.problems(config.backend, fields, config.train, config.data, ranks, per_node)
    if config.backend.name == "megatron" and fields is not None:
        found += megatron.check_fields(config.model.path, fields)
    return found + [
        p for path, revision, kind in _hub_ids(config) if (p := hub.refused(path, revision, kind)) is not None
    ]


def _hub_ids(config: RunConfig) -> Iterator[tuple[str, str | None, str]]:
    """Return path, revision and kind of what the run may take from the hub."""
    model, reference = config.model, config.algorithm.reference
    yield model.path, model.revision, "model"
    if model.tokenizer is not None:
        yield model.tokenizer, None, "model"
    if reference not in (None, "initial", "none"):
        yield reference, None, "model"
    for split in sources.LISTS:
        for source in sources.of(config.data, split):
            yield source.path, source.revision, "dataset"


def _submit(runs: Sequence[Run], folder: Path, *, after: str | None, parallel: int | None = None) -> Submission:
    """Submit one run, or an array of those that may run so many at a time."""
    cluster = runs[0][0].cluster
    per_node = layout.named_ranks_per_node(cluster)
    assert per_node is not None
    found = slurm.nodes()
    problems = slurm.check(cluster, per_node, found) + [p for config, _ in runs for p in check_plan(config)]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    with ExitStack() as held:
        for config, recipe in runs:
            held.enter_context(_held(config, recipe))
        if cluster.prepare == "here":
            _prepare_here(runs)
        folders = [_folder(config) for config, _ in runs]
        for path, (config, recipe) in zip(folders, runs, strict=True):
            snapshot.freeze(path, config, recipe)
        name = runs[0][0].run.name
        prepared_by = _prepare_job(cluster, name, folder, folders) if cluster.prepare == "job" else None
        try:
            cores = slurm.cores_per_node(cluster, per_node, found)
            job_id = _queue(cluster, name, folder, folders, cores, [i for i in (prepared_by, after) if i], parallel)
        except BaseException:
            if prepared_by is not None:
                slurm.cancel(prepared_by)
            raise
        for number, path in enumerate(folders):
            own = job_id if parallel is None else f"{job_id}_{number}"
            snapshot.note(path, job_id=own, prepared_by=prepared_by)
    output = folder / "slurm" / (f"{job_id}.out" if parallel is None else f"{job_id}_N.out")
    return Submission(job_id, folder, prepared_by, str(output))


def _queue(
    cluster: ClusterSection,
    name: str,
    folder: Path,
    folders: Sequence[Path],
    cores: int,
    waits_for: Sequence[str],
    parallel: int | None,
) -> str:
    """Queue the job of a run, or the array of several, and return its id."""
    given = slurm.options(cluster, name, cores)
    given["comment"] = str(folder)
    if waits_for:
        given.update(dependency=f"afterok:{':'.join(waits_for)}", kill_on_invalid_dep="yes")
    array = None if parallel is None else (len(folders), parallel)
    words = [] if array is None else [ARRAY]
    return slurm.submit(folder / "slurm", _command(words, folders), given, cluster.setup, array=array)


def _prepare_job(cluster: ClusterSection, name: str, folder: Path, folders: Sequence[Path]) -> str:
    """Queue the job that prepares runs, and return its id."""
    given = slurm.prepare_options(cluster, name, PREPARE_CORES)
    return slurm.submit(
        folder / "slurm", _command([PREPARE], folders), {**given, "comment": str(folder)}, cluster.setup
    )


def _command(words: Sequence[str], folders: Sequence[Path]) -> list[str]:
    return [sys.executable, "-u", "-m", "launchers.job", *words, *map(str, folders)]


def _prepare_here(runs: Sequence[Run]) -> None:
    from launchers.prepare import prepare

    for config, _ in runs:
        prepare(config)


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
