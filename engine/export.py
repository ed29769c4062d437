"""``python -m engine.export --checkpoint DIR --out DIR``: a Hugging Face folder from a checkpoint, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import checkpoint, fingerprint
from engine.config.checks import local_model_folder
from engine.config.schema import ModelSection
from engine.errors import EXIT_DONE, UserError, command


def export(source: Path, out: Path, *, base: str | None = None, adapter: bool = False) -> Path:
    """Write a checkpoint's weights as ``AutoModelForCausalLM.from_pretrained`` loads them, in the type they were trained in.

    Args:
        source: A checkpoint, or a run folder for its newest one. Of the run, nothing else is needed. LoRA's adapters are merged
            into their base.
        out: Folder to write, empty or not yet there.
        base: Where the base of adapters is now; None: at the run's ``model.path``.
        adapter: Write LoRA's adapters alone, as peft loads them.

    Returns:
        The checkpoint that was taken.

    Raises:
        UserError: If ``source`` is no checkpoint, its base is not found, or ``out`` holds something or cannot be written.
    """
    found = checkpoint.find(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: not an empty folder; choose another.")
    from transformers.utils import logging

    from engine.backends import lora

    logging.disable_progress_bar()

    if (found / lora.DESCRIPTION).is_file():
        write = _adapter(found) if adapter else _merged(found, base)
    elif adapter or base:
        option = "--adapter" if adapter else "--base"
        raise UserError(f"{option}: {found} holds no LoRA adapters but a whole model; leave it out.")
    else:
        write = _whole(found)
    try:
        with checkpoint.written_aside(out) as aside:
            write(aside)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror or error}); choose another folder."
        ) from error
    return found


def _whole(found: Path) -> Callable[[Path], None]:
    """Return what writes the weights of a checkpoint that holds all of them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from engine.backends import hf_model, shards

    config = AutoConfig.from_pretrained(found)
    dtype, config.dtype = config.dtype, None
    weights, tokenizer = shards.read(found, "model/"), _tokenizer(found)
    model = AutoModelForCausalLM.from_config(config)
    return lambda folder: hf_model.write(model, weights, tokenizer, folder, dtype)


def _adapter(found: Path) -> Callable[[Path], None]:
    """Return what writes adapters alone; of their base, only its configuration is needed."""
    import torch

    from engine.backends import lora, shards

    section, _ = lora.described(found)
    lm = _skeleton(found, section)
    lora.inject(section, lm, torch.float32)
    weights, tokenizer = shards.read(found, "model/"), _tokenizer(found)
    return lambda folder: lora.write(lm, weights, tokenizer, folder)


def _merged(found: Path, base: str | None) -> Callable[[Path], None]:
    """Return what writes the base with adapters merged, bit for bit as the run itself does."""
    from transformers import AutoConfig

    from engine.backends import hf_model, lora, shards

    section, seed = lora.described(found)
    dtype = AutoConfig.from_pretrained(found).dtype
    moved = section if base is None else section.model_copy(update={"path": base, "revision": None})
    _check_base(found, moved, seed)
    lm = _skeleton(found, section)
    if section.init == "random":
        hf_model.initialise(lm, seed, hf_model.into_module)
        lm.tie_weights()
    else:
        lm = hf_model.load(moved, lm)
    lora.inject(section, lm, dtype)
    weights = {lora.plain(name): p.detach() for name, p in lm.named_parameters()} | shards.read(found, "model/")
    tokenizer = _tokenizer(found)
    return lambda folder: hf_model.write(lm, lora.merged(lm, weights), tokenizer, folder, dtype)


def _check_base(found: Path, section: ModelSection, seed: int) -> None:
    """Refuse a base that is not there, or that the run's lock.json, where there is one, knows to be another."""
    local = local_model_folder(section.path)
    if local is not None and not (local / "config.json").is_file():
        raise UserError(
            f"{found}: its adapters belong to {section.path}, where there is no model; say where it is with --base DIR, or write "
            "the adapters alone with --adapter."
        )
    lock = found.parent.parent / "lock.json"
    if lock.is_file() and json.loads(lock.read_text())["weights"] != fingerprint.weights(section, seed):
        raise UserError(
            f"{found}: the weights in {section.path} are not those that its adapters were trained on; name these with --base DIR."
        )


def _skeleton(found: Path, section: ModelSection) -> Any:
    """Return the base without weights, by the configuration that the checkpoint holds."""
    from engine.backends import hf_model

    own = section.model_copy(update={"path": str(found), "revision": None, "init": "random"})
    return hf_model.skeleton(own, attention="eager")


def _tokenizer(found: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(found)


@command
def main(argv: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.export", description=export.__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint folder, or a run folder (its newest)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--base", help="where the model is that LoRA's adapters belong to, if it has moved")
    parser.add_argument("--adapter", action="store_true", help="write LoRA's adapters alone, as peft loads them")
    options = parser.parse_args(argv)
    found = export(options.checkpoint, options.out, base=options.base, adapter=options.adapter)
    print(f"wrote {options.out} from {found}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
