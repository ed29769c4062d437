"""What a Slurm job runs on its first machine: ``python -m launchers.job RUN_DIR``.

``--array RUN_DIR…`` runs the one of the array's task; ``--prepare RUN_DIR…`` tokenises and downloads for all of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from engine.errors import EXIT_DONE, RunError, UserError, command
from launchers import snapshot

ARRAY, PREPARE = "--array", "--prepare"


@command
def main(words: list[str]) -> int:
    """Run the job and return its exit code."""
    folders = [Path(word) for word in words if word not in (ARRAY, PREPARE)]
    if not folders:
        raise UserError("python -m launchers.job: give the run folder that a submission has made.")
    if PREPARE in words:
        return _prepare(folders)
    folder = folders[int(os.environ["SLURM_ARRAY_TASK_ID"])] if ARRAY in words else folders[0]
    notice = snapshot.changed(folder)
    if notice is not None:
        print(notice, flush=True)
    from launchers.allocation import run_in_allocation

    return run_in_allocation(folder)


def _prepare(folders: list[Path]) -> int:
    """Prepare runs; the ones of a sweep that cannot be, which will say so themselves, do not hold up the others."""
    from launchers.prepare import prepare

    errors = []
    for folder in folders:
        try:
            prepare(snapshot.read(folder)[0])
        except RunError as error:
            errors.append(error)
            print(f"error: {error}", file=sys.stderr)
            with (folder / "log.txt").open("a") as log:
                log.write(f"error: {error}\n")
    return errors[0].exit_code if len(errors) == len(folders) else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
