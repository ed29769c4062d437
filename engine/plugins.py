"""Code of the user's own, named in a recipe as ``module:name``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from engine.errors import UserError


def load(spec: str, key: str) -> Any:
    """Import ``module:name`` from the working folder or the Python path.

    Args:
        spec: What the recipe says.
        key: The key that says it.

    Raises:
        UserError: If it cannot be imported.
    """
    module, _, name = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module may raise anything; each is the end of the run
        raise UserError(f"{key}: {spec} cannot be imported ({error!r}); is its folder on PYTHONPATH?") from error
    finally:
        sys.path.pop(0)
