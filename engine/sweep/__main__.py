"""``python -m engine.sweep DIR``: the table of a sweep's folder, at any time."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.errors import EXIT_DONE, command
from engine.run_folder import is_live
from engine.sweep import status
from engine.sweep.points import Record


@command
def main(argv: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.sweep", description=__doc__)
    parser.add_argument("dir", type=Path, metavar="DIR", help="the sweep's folder: run.dir of python -m engine -m …")
    folder = parser.parse_args(argv).dir.absolute()
    record = Record.of(folder)
    submitted = status.ask_slurm(record)
    print(status.table(folder, record, submitted))
    settled = all(is_live(folder / name) or status.is_done(folder / name) for name in record.points)
    if not settled and not submitted:  # until that has ended, the command would be refused
        print(f"{record.command} goes on with what is missing")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
