"""A look as one HTML page that needs nothing else: no file, no network, no script."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

from engine import html
from engine.config import sources
from engine.data import report
from engine.preview.look import Look, Piece, bad_rows, runs


def page(look: Look) -> str:
    """Return a look as a page."""
    environment = html.environment()
    environment.globals |= {"zip": zip, "report": report, "runs": runs, "apart": _apart, "bad_rows": bad_rows}
    config = look.composed.config
    return environment.get_template("preview.html").render(
        look=look,
        config=config,
        sources=sources.of(config.data, "train"),
        packing=report.packing(look.train),
        names=[part.name for part in look.train.data.parts],
        made=time.strftime("%-d %B %Y"),
    )


def _apart(document: Sequence[Piece]) -> bool:
    """Tell whether no run of one mask begins or ends in the midst of a line, so that each may stand on lines of its own."""
    return all(
        a.special or b.special or a.text.endswith("\n") or b.text.startswith("\n")
        for a, b in pairwise(document)
        if a.weight != b.weight
    )
