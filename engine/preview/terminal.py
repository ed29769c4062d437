"""A look on a terminal, in colours where it has them, else with trained text between ⟦ and ⟧."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter

from rich.console import Console
from rich.text import Text

from engine.data import report
from engine.preview.look import LINE_END, Look, Piece, bad_rows, runs

STYLES = {True: ("bold green", "green", "bold cyan"), False: ("dim", "dim blue", "cyan")}
"""Of trained text and of the rest: text, signs, special tokens."""
BAR_CELLS = 40
MOST_LENGTHS = 6


def show(look: Look, console: Console) -> None:
    """Print a look."""
    colours = console.color_system is not None
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(f"preview of {look.origin}\n")
    say(report.text(look.data, look.train))
    for name, samples in look.data.sources.items():
        if bad := bad_rows(samples):
            say(f"{name}: the first of the {samples.summary.bad:,} rows skipped")
            say("\n".join(f"  {row['row']}: {row['reason']}" for row in bad) + "\n")
    trained = "bold green" if colours else "between ⟦ and ⟧"
    say(f"trained text is {trained}, {LINE_END} ends a line, · is a blank that would not be seen\n")
    for document in look.documents:
        say(f"── {document.title}: {document.counts} ──", style="bold")
        shown = text(document.pieces, colours)
        say(shown, end="\n" if shown.plain.endswith("\n") else "\n\n")
    for step, (count, bins) in enumerate(look.steps):
        say(f"step {step + 1}: {len(bins)} of {count:,} micro-batches", style="bold")
        for b in bins:
            bar = "█" * round(BAR_CELLS * sum(b.lengths) / max(1, b.capacity))
            lengths = " + ".join(f"{n:,}" for n in b.lengths[:MOST_LENGTHS]) + " + …" * (len(b.lengths) > MOST_LENGTHS)
            say(f"  {b.title:<16}  {bar:·<{BAR_CELLS}}  {b.figures}: {lengths}")


def text(document: Sequence[Piece], colours: bool) -> Text:
    """Return a document for a terminal."""
    out: list[tuple[str, str]] = []
    for weight, run in runs(document):
        factor = f"×{weight:g} " if weight is not None and weight != 1 else ""
        bracketed = weight is not None and not colours
        out.append(("⟦" * bracketed + factor, "magenta"))
        for piece, parts in run:
            plain, sign, special = STYLES[weight is not None]
            out += [(part, special if piece.special else sign if is_sign else plain) for part, is_sign in parts]
        out.append(("⟧" * bracketed, ""))
    same = groupby(out, key=itemgetter(1))
    return Text.assemble(*(("".join(part for part, _ in stretch), style) for style, stretch in same))
