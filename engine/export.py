"""``python -m engine.export --checkpoint DIR --out DIR``: a Hugging Face folder from a checkpoint, without a GPU."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine import checkpoint
from engine.errors import EXIT_DONE, RunError, UserError


def export(source: Path, out: Path) -> Path:
    """Write a checkpoint's weights as ``AutoModelForCausalLM.from_pretrained`` loads them.

    Args:
        source: A checkpoint, or a run folder for its newest one; the run's recipe.yaml says which model it is.
        out: Folder to write, empty or not yet there.

    Returns:
        The checkpoint that was taken.

    Raises:
        UserError: If ``source`` is no checkpoint of a run, or ``out`` holds something.
    """
    from engine.config.schema import RunConfig

    found = checkpoint.find(source)
    recipe = found.parent.parent / "recipe.yaml"
    if not recipe.is_file():
        raise UserError(f"{found}: no recipe.yaml two folders up; a checkpoint is exported from inside its run folder.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: the folder is not empty; choose another.")
    import torch
    import yaml

    from engine.backends.torch_backend import TorchBackend

    fields = yaml.safe_load(recipe.read_text())
    fields["run"].update(dir=str(out), resume="never")
    fields["model"].update(init="random")
    backend = TorchBackend(RunConfig.model_validate(fields), torch.device("cpu"))
    backend.load(found)
    with checkpoint.written_aside(out) as aside:
        backend.export(aside)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.export", description=export.__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint folder, or a run folder (its newest)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    options = parser.parse_args(argv)
    try:
        found = export(options.checkpoint, options.out)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {options.out} from {found}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
