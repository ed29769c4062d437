"""What a run needs and no GPU: files of the hub and tokenised data."""

from __future__ import annotations

import tempfile
from pathlib import Path

from engine import hub
from engine.config.schema import RunConfig


def prepare(config: RunConfig) -> None:
    """Download models and tokenise data, as far as they are not there.

    Raises:
        UserError: For what is missing, and for rows that cannot be used.
    """
    from engine.data.assemble import assemble

    model, reference = config.model, config.algorithm.reference
    hub.folder(model.path, model.revision, weights=model.init == "pretrained")
    hub.tokenizer_folder(model)
    if reference not in (None, "initial", "none"):
        hub.folder(reference, None, weights=True)
    if config.data.cache == "off":  # what is made here would be made again
        return
    with tempfile.TemporaryDirectory(prefix="anneal-") as scratch:
        assemble(config, Path(scratch))
