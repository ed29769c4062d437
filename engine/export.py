"""``python -m engine.export --checkpoint DIR --out DIR``: a Hugging Face folder from a checkpoint, without a GPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine import checkpoint
from engine.errors import EXIT_DONE, UserError, command


def export(source: Path, out: Path) -> Path:
    """Write a checkpoint's weights as ``AutoModelForCausalLM.from_pretrained`` loads them, in the type they were trained in.

    Args:
        source: A checkpoint, or a run folder for its newest one. Nothing else of the run is needed.
        out: Folder to write, empty or not yet there.

    Returns:
        The checkpoint that was taken.

    Raises:
        UserError: If ``source`` is no checkpoint, or ``out`` holds something or cannot be written.
    """
    found = checkpoint.find(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: not an empty folder; choose another.")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from engine.backends import hf_model, shards

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(found)
    dtype, config.dtype = config.dtype, None
    weights = shards.read(found, "model/")
    model = AutoModelForCausalLM.from_config(config)
    try:
        with checkpoint.written_aside(out) as aside:
            hf_model.write(model, weights, AutoTokenizer.from_pretrained(found), aside, dtype)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror or error}); choose another folder."
        ) from error
    return found


@command
def main(argv: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.export", description=export.__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint folder, or a run folder (its newest)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    options = parser.parse_args(argv)
    found = export(options.checkpoint, options.out)
    print(f"wrote {options.out} from {found}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
