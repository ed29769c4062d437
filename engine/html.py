"""Pages that need nothing else: one HTML file each, no network."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from engine.errors import UserError

ASSETS = Path(__file__).parent / "assets"


def environment() -> Environment:
    """Return what renders the templates of ``engine/assets``: all text escaped, a name that is not there an error."""
    found = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    found.filters["n"] = lambda number: f"{number:,}"
    found.filters["percent"] = lambda share: f"{share:.1%}"
    return found


def write(out: Path, page: str) -> None:
    """Write a page.

    Raises:
        UserError: If the file cannot be written.
    """
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another file.") from error
