"""``python -m engine.preview OVERRIDES [--out FILE.html]``: what a recipe would train on, token by token, before it trains."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from engine.config import compose
from engine.errors import EXIT_DONE, UserError, command


def preview(overrides: list[str], out: Path | None, *, num: int, all_rows: bool) -> None:
    """Print a look at a recipe's data, and write it as a page."""
    composed = compose.compose(compose.with_quickstart(overrides))
    from rich.console import Console

    from engine import html
    from engine.preview import look, page, terminal

    console = Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")
    with tempfile.TemporaryDirectory(prefix="anneal-preview-") as scratch:
        found = look.look(composed, Path(scratch), num=num, all_rows=all_rows)
        terminal.show(found, console)
        if out is not None:
            html.write(out, page.page(found))
            print(f"\nwrote {out}")


@command
def main(argv: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.preview", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for python -m engine")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="write one page to look at and to pass on")
    parser.add_argument("--num", type=int, default=3, metavar="N", help="conversations to show (3)")
    parser.add_argument("--all", action="store_true", help="read every row, not only the first 1,000 of each source")
    options = parser.parse_intermixed_args(argv)
    if options.num < 1:
        raise UserError(f"--num {options.num}: give 1 or more.")
    preview(options.overrides, options.out, num=options.num, all_rows=options.all)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
