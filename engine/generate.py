"""``python -m engine.generate --model DIR [--prompt TEXT]``: talk to a model; without a prompt, line by line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from engine.config.checks import looks_local
from engine.config.model_folder import not_a_model
from engine.errors import EXIT_DONE, UserError, command


def load(path: str) -> tuple[Any, Any]:
    """Return the model and tokenizer of a folder or hub id; of LoRA's adapters, their base with them.

    Raises:
        UserError: If it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(path)
    if (folder / "config.json").is_file():
        other = not_a_model(folder)
        if other is not None:
            raise UserError(f"--model {path}: {other}.")
    elif not (folder / "adapter_config.json").is_file() and looks_local(path):
        beside = (folder / "hf", folder / "adapter", folder.parent / "adapter")
        hint = next((f"; {f} does" for f in beside if f.is_dir()), "")
        raise UserError(f"--model {path}: holds no config.json{hint}.")
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype="auto"), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: cannot be loaded ({' '.join(str(error).split())[:200]}).") from error


@command
def main(argv: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.generate", description=__doc__)
    parser.add_argument("--model", required=True, help="a folder such as RUN_DIR/hf, or a hub id")
    parser.add_argument("--prompt", help="one question; without it, questions are read line by line")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens")
    options = parser.parse_args(argv)
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: give 1 or more.")
    lm, tokenizer = load(options.model)

    from engine.backends.hf_model import answer

    def ask(prompt: str) -> str:
        return answer(lm, tokenizer, [[{"role": "user", "content": prompt}]], max_new_tokens=options.max_new_tokens)[0]

    if options.prompt is not None:
        print(ask(options.prompt))
        return EXIT_DONE
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            return EXIT_DONE
        if prompt.strip():
            print(ask(prompt))


if __name__ == "__main__":
    sys.exit(main())
