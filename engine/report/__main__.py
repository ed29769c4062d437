"""``python -m engine.report DIR… [--out FILE.html]``: runs beside each other, and what a sweep has found, as one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine import html
from engine.errors import EXIT_DONE, UserError, command
from engine.report import page, runs


@command
def main(argv: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.report", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="a run folder, or a folder of run folders")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE.html", help="page to write (%(default)s)"
    )
    options = parser.parse_intermixed_args(argv)
    if not options.folders:
        raise UserError("no folder named; python -m engine.report RUN… takes run folders, and folders of them.")
    groups = runs.gather(options.folders)
    html.write(options.out, page.page(groups))
    found = [run for group in groups for run in group.runs]
    for run in found:
        for text in (
            [f"{run.state}: {run.reason}" if run.reason else run.state] if run.state != runs.FINISHED else []
        ) + run.notes:
            print(f"{run.name}: {text}")
    print(f"wrote {options.out}: {len(found)} run{'s' * (len(found) > 1)}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
