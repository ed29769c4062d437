"""Shapes of tiles, looked up and never searched for: by kernel, architecture, bytes of an element and size of a head.

Every entry compiles ahead of time for its architecture (``make aot``), within its shared memory and without spills, or is listed
there with the reason.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""That the table has entries for."""
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
"""Bytes that a program may have, which entries make use of."""


class Tile(NamedTuple):
    """The shape of a program's work, and how it is compiled."""

    m: int
    """Rows."""
    n: int
    """Columns."""
    warps: int
    stages: int


class Case(NamedTuple):
    """A kernel as it is compiled ahead of time for an entry of the table."""

    name: str
    """As shown: kernel, dtype, size of a head."""
    kernel: Any
    """A function of ``triton.jit``."""
    signature: dict[str, str]
    """Type of each argument that is not a constant: ``*bf16``, ``i32``, …."""
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    """Arguments known to be divisible by 16."""
    tile: Tile


INTERPRETED = Tile(16, 16, 4, 1)
"""What the interpreter takes, whatever the kernel: it is slow, and small sizes have many tiles then."""

TILES: dict[tuple[str, str, int, int], Tile] = {}
"""(kernel, architecture, bytes of an element, size of a head or 0) → tile."""


def tile(kernel: str, arch: str, itemsize: int, head: int = 0) -> Tile:
    """Return the tile of a kernel.

    Args:
        kernel: Name of the kernel.
        arch: See ``dispatch.architecture``.
        itemsize: Bytes of an element.
        head: Size of a head; 0 for kernels that have none.

    Raises:
        KeyError: If the table has none.
    """
    return INTERPRETED if arch == "interpreter" else TILES[kernel, arch, itemsize, head]
