"""Supervised fine-tuning on CPU: this engine against TRL's SFTTrainer, the same computation on both sides.

    python benchmarks/sft_vs_trl.py --size small --out small

Both sides train the same Llama (weights from one folder) on the same conversations in the same order, with the same masks
(assistant tokens only), batch, length limit, learning rate, AdamW, clipping, dtype (float32) and threads. Sides take turns,
and every run is a process of its own, so that its peak memory is its own. The engine is run as a user runs it
(``python -m engine OVERRIDES``), logging and all; a callback notes the time at which each step ends, as one does for TRL.
Nothing is compared unless both sides train the same number of tokens in every step and their losses agree.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import trl_sides as sides

TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}{%- else -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
STEPS = {"small": 22, "medium": 10}
QUIET = {"logging_steps": 100_000, "disable_tqdm": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_checkpointing": {**QUIET, "gradient_checkpointing": False},
    "accumulate": {**QUIET, "gradient_checkpointing": False, "accumulate": True},
    "padding_free": {**QUIET, "gradient_checkpointing": False, "padding_free": True, "max_length": None},
    "compiled": {**QUIET, "gradient_checkpointing": False, "torch_compile": True},
}
"""SFTConfig fields that differ from TRL's defaults. ``accumulate``: one conversation at a time, accumulated to the batch."""
MEANING = {
    "default": "TRL's defaults (gradient checkpointing on, as SFTConfig sets it)",
    "no_checkpointing": "gradient checkpointing off",
    "accumulate": "gradient checkpointing off, one conversation at a time and gradient accumulation, so nothing is padded",
    "padding_free": "gradient checkpointing off, padding_free=True (documents in one row, SDPA with a block mask)",
    "compiled": "gradient checkpointing off, torch_compile=True",
}


@dataclass(frozen=True, kw_only=True)
class Measured(sides.Measured):
    """What one process did.

    Attributes:
        trained_tokens: Trained tokens of each step.
        note: What the side says about itself.
    """

    trained_tokens: list[int]
    note: str = ""


# The rows


def alpaca_rows(data: str | None, count: int) -> list[dict[str, str]]:
    """Return ``count`` Alpaca rows from a JSON or JSONL file, or generated ones."""
    if data is None:
        return sides.generated_rows(count)
    text = Path(data).read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    if len(rows) < count:
        raise SystemExit(f"--data {data}: {len(rows)} rows, and {count} are needed; lower --steps or --batch.")
    return list(rows[:count])


def prepare(args: argparse.Namespace) -> None:
    """Write the conversations (rows.jsonl) and the model with its tokenizer (model/) into the work folder."""
    folder, needed = Path(args.work), args.steps * args.batch
    alpaca = alpaca_rows(args.data, max(1000, needed) if args.data is None else needed)
    conversations = [_conversation(row) for row in alpaca[:needed]]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))
    texts = [row[key] for row in alpaca for key in ("instruction", "input", "output")]
    tokenizer, parameters = sides.write_model(folder / "model", sides.SIZES[args.size], TEMPLATE, texts)
    lengths = [
        len(tokenizer.apply_chat_template(c, tokenize=True, return_dict=True)["input_ids"]) for c in conversations
    ]
    about = {
        "parameters": parameters,
        "rows": len(lengths),
        "tokenizer": len(tokenizer),
        "median_tokens": median(lengths),
        "longest": max(lengths),
        "cut": sum(n > args.max_length for n in lengths),
    }
    (folder / "about.json").write_text(json.dumps(about))


def _conversation(row: dict[str, str]) -> list[dict[str, str]]:
    question = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


# The two sides


def train_trl(args: argparse.Namespace) -> None:
    """Train with TRL in this process and write the measurement."""
    import torch

    torch.set_num_threads(args.threads)
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder, options = Path(args.work), dict(VARIANTS[args.worker])
    clock, losses, trained = sides.StepClock(), [0.0] * args.steps, [0] * args.steps

    class Noting(SFTTrainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            losses[self.state.global_step] += float(loss.detach())
            trained[self.state.global_step] = int(num_items_in_batch)
            return loss

    rows = sides.read_rows(folder / "rows.jsonl")
    if options.get("padding_free"):  # TRL wants these rows cut beforehand
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        rows = [_tokenized(tokenizer, row["messages"], args.max_length) for row in rows]
    accumulate = options.pop("accumulate", False)
    config = SFTConfig(
        **sides.trl_options(args),
        per_device_train_batch_size=1 if accumulate else args.batch,
        gradient_accumulation_steps=args.batch if accumulate else 1,
        assistant_only_loss=not options.get("padding_free"),
        **{"max_length": args.max_length, **options},
    )
    trainer = Noting(
        model=str(folder / "model"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        callbacks=[sides.trl_clock(clock)],
    )
    trainer.train()
    clock.finish()
    note = f"optim {config.optim.value}, gradient_checkpointing={config.gradient_checkpointing}"
    Path(args.result).write_text(
        json.dumps({**clock.figures(), "losses": losses, "trained_tokens": trained, "note": note})
    )


def _tokenized(tokenizer: Any, messages: list[dict[str, str]], max_length: int) -> dict[str, list[int]]:
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = found["input_ids"][:max_length], found["assistant_masks"][:max_length]
    return {"input_ids": ids, "labels": [t if m else -100 for t, m in zip(ids, mask, strict=True)]}


def measure(args: argparse.Namespace, side: str, number: int) -> Measured:
    """Run one side in a fresh process.

    Args:
        args: The command line.
        side: "engine" or a variant of TRL.
        number: Of the round, for its folder.
    """
    folder = Path(args.work) / f"{side}-{number}"
    folder.mkdir()
    if side == "engine":
        command = [sys.executable, "-m", "engine", *sides.engine_words(args, "rows.jsonl", folder), "data=messages"]
        command += ["data.overlong=truncate", "algorithm.val_at_end=false", *args.engine_override]
    else:
        command = [*sides.worker(__file__, side, args.work), "--result", str(folder / "result.json")]
    about = sides.run_side(side, command, folder, sides.environment(args))
    if side == "engine":
        found, lines = sides.read_run(folder)
        found["losses"] = [line["train/loss"] for line in lines]
        found["trained_tokens"] = [line["train/trained_tokens"] for line in lines]
    else:
        found = json.loads((folder / "result.json").read_text())
    return Measured(**found, **about)


# The comparison


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The engine against one variant of TRL; ratios are one a round."""

    variant: str
    speed: list[float]
    """The engine's trained conversations a second over TRL's."""
    memory: list[float]
    """The engine's peak memory over TRL's."""
    added: list[float]
    """The same of the peaks above the memory held before the first step."""
    loss_gap: float
    """Largest relative gap between losses over the first steps."""
    same_tokens: bool
    """Whether both trained the same number of tokens in each of those steps."""

    @property
    def sound(self) -> bool:
        """Whether both sides did the same computation."""
        return self.same_tokens and self.loss_gap < sides.LOSS_TOLERANCE


def rate(run: Measured, args: argparse.Namespace) -> float:
    """Return conversations a second, from the median step after the warm-up."""
    return float(args.batch / median(run.step_s[args.warmup :]))


def compare(ours: Sequence[Measured], theirs: Sequence[Measured], variant: str, args: argparse.Namespace) -> Comparison:
    """Hold the runs of each round against one another."""
    first = slice(0, sides.LOSS_STEPS)
    return Comparison(
        variant=variant,
        speed=sides.ratios(ours, theirs, lambda run: rate(run, args)),
        memory=sides.ratios(ours, theirs, sides.peak_mb),
        added=sides.ratios(ours, theirs, sides.added_mb),
        loss_gap=sides.loss_gap(ours, theirs),
        same_tokens=all(a.trained_tokens[first] == b.trained_tokens[first] for a, b in zip(ours, theirs, strict=True)),
    )


def report(args: argparse.Namespace, runs: dict[str, list[Measured]], compared: Sequence[Comparison]) -> str:
    """Return the figures as Markdown."""
    about = json.loads((Path(args.work) / "about.json").read_text())
    packages = ("torch", "transformers", "trl", "accelerate", "tokenizers", "anneal")
    source = Path(args.data).name if args.data else "generated rows"
    lines = [
        f"# SFT against TRL, {args.size} model",
        "",
        sides.about_machine(args, runs.values(), packages),
        "",
        f"Llama of {about['parameters'] / 1e6:.1f}M parameters, vocabulary {sides.SIZES[args.size]['vocab_size']:,} (tokenizer "
        f"{about['tokenizer']:,}), float32. {source}: {about['rows']} conversations, median {about['median_tokens']:.0f} tokens, "
        f"longest {about['longest']}, {about['cut']} cut at {args.max_length}. {args.batch} conversations a step, "
        f"{args.steps} steps, the first {args.warmup} not timed; {args.rounds} rounds, sides taking turns, a fresh process each.",
        "",
        "| engine against TRL | conversations/s, ratio (min to max) | peak memory, ratio | memory added by training, ratio | "
        f"largest loss gap, {sides.LOSS_STEPS} steps |",
        "|---|---|---|---|---|",
    ]
    for c in compared:
        lines.append(
            f"| {c.variant} | **{median(c.speed):.2f}×** ({min(c.speed):.2f} to {max(c.speed):.2f}) | {sides.spread(c.memory)} | "
            f"{sides.spread(c.added)} | {sides.gap_text(c.loss_gap, c.sound)} |"
        )
    lines += [
        "",
        "| side | step, s | conversations/s | trained tokens/s | peak MiB | before training MiB | peak of the whole process MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, found in runs.items():
        step = median(median(r.step_s[args.warmup :]) for r in found)
        tokens = median(sum(r.trained_tokens[args.warmup :]) / sum(r.step_s[args.warmup :]) for r in found)
        lines.append(
            f"| {side if side == 'engine' else 'TRL ' + side} | {step:.4f} | {args.batch / step:.1f} | {tokens:,.0f} | "
            f"{median(r.peak_mb for r in found):.0f} | {median(r.before_mb for r in found):.0f} | "
            f"{median(r.lifetime_peak_mb for r in found):.0f} |"
        )
    lines += ["", *(f"- {c.variant}: {MEANING[c.variant]}; {runs[c.variant][0].note}." for c in compared)]
    fastest = min(compared, key=lambda c: median(c.speed)).variant
    lines += [
        "",
        f"TRL's fastest here: {fastest}. On every TRL side bf16=False (its default is True), for float32 on both.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the benchmark, or one worker of it; 1 if a compared side did not do the same computation."""
    args = arguments()
    if args.worker:
        prepare(args) if args.worker == "prepare" else train_trl(args)
        return 0
    with tempfile.TemporaryDirectory(prefix="sft_vs_trl-") as work:
        args.work = work
        subprocess.run(sides.worker(__file__, "prepare", work), check=True, env=sides.environment(args))
        runs: dict[str, list[Measured]] = {side: [] for side in ("engine", *args.variants)}
        for number in range(args.rounds):
            for side, found in runs.items():
                found.append(measure(args, side, number))
                shown = f"{rate(found[-1], args):8.2f} conversations/s, peak {found[-1].peak_mb:6.0f} MiB"
                print(f"round {number + 1} {side:17} {shown}, load before {found[-1].load:.1f}", flush=True)
        compared = [compare(runs["engine"], runs[v], v, args) for v in args.variants]
        text = report(args, runs, compared)
    sides.publish(text, args.out)
    return 0 if all(c.sound for c in compared) else 1


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = sides.arguments(
        __doc__,
        data="JSON or JSONL file in Alpaca format; without it rows are generated",
        examples="conversations",
        steps=STEPS,
        rounds=5,
        lr=1e-3,
    )
    add = parser.add_argument
    usual = [v for v in VARIANTS if v != "compiled"]
    add(
        "--variants",
        type=sides.some(VARIANTS),
        default=usual,
        help=f"of {', '.join(VARIANTS)} (default: all but compiled)",
    )
    add("--engine-override", action="append", default=[], help="one more override of the engine; may be repeated")
    args = parser.parse_args()
    args.steps = args.steps or STEPS[args.size]
    if args.steps < sides.LOSS_STEPS:
        parser.error(f"--steps must be at least {sides.LOSS_STEPS}: the losses of so many are compared")
    return args


if __name__ == "__main__":
    sys.exit(main())
