"""DPO on CPU: this engine against TRL's DPOTrainer, the same computation on both sides.

    python benchmarks/dpo_vs_trl.py --data PAIRS.json --out dpo_vs_trl

Both sides train the same Llama on the same pairs in the same order, with the same masks, β, batch, AdamW, clipping, dtype
(float32) and threads; sides take turns, every run in a process of its own. One epoch: each pair is seen once. Rates are given
without the reference, from the median step after the warm-up, and with it: the engine's pass before training counted in, TRL's
own inside its steps, or before them where it precomputes it. In the same rounds the engine also runs without some of what makes
it fast, which shows what each brings. Nothing is compared unless the losses agree.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import trl_sides as sides

TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
BETA, STEPS = 0.1, 20
TRL: dict[str, dict[str, Any]] = {
    "default": {},
    "no_checkpointing": {"gradient_checkpointing": False},
    "precomputed": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
}
"""DPOConfig fields that differ from TRL's defaults."""
ENGINE: dict[str, list[str]] = {
    "engine": [],
    "no_shared_prompt": ["data.packing.share_prompts=false"],
    "padded": ["data.packing.enabled=false", "train.micro_batch_size=BATCH"],
}
"""Overrides of the engine and of its variants, each without one thing."""
MEANING = {
    "default": "TRL's defaults (gradient checkpointing on, the reference computed inside each step)",
    "no_checkpointing": "gradient checkpointing off",
    "precomputed": "gradient checkpointing off, precompute_ref_log_probs=True",
    "no_shared_prompt": "chosen and rejected each carry the prompt",
    "padded": "no packing, all pairs of a step padded to the longest answer, each answer with the prompt",
    "reference in each step": "one such pass over its pairs in every step: the engine's own rates with the reference counted in, "
    "to those without; so it is from the second epoch on",
    "output layer on all tokens": "the engine's step made longer by what its output layer and loss take on all tokens of a "
    "step (prompts once) more than on the answers', timed apart, forward and backward",
}


@dataclass(frozen=True, kw_only=True)
class Run(sides.Measured):
    """What one process did.

    Attributes:
        reference_s: Seconds of the reference's pass before training; 0 where it is part of each step.
    """

    reference_s: float

    def step(self, args: argparse.Namespace) -> float:
        """Return the seconds of the median step after the warm-up."""
        return median(self.step_s[args.warmup :])

    def plain(self, args: argparse.Namespace) -> float:
        """Return pairs a second of such a step."""
        return float(args.batch / self.step(args))

    def whole(self, args: argparse.Namespace) -> float:
        """Return pairs a second of an epoch of such steps, the reference counted in."""
        steps = len(self.step_s)
        return float(args.batch * steps / (self.reference_s + steps * self.step(args)))


def shown(side: str) -> str:
    """Return a side's name in the tables."""
    if side in TRL:
        return f"TRL {side}"
    return "engine" if side == "engine" else f"engine, {side.replace('_', ' ')}"


# The pairs


def read_pairs(file: str | None) -> list[dict[str, Any]]:
    """Return pairs as message lists: from ShareGPT's format, or generated."""
    if file is None:
        rows, draw = sides.generated_rows(1200), Random(1)
        answers = [row["output"] for row in rows]
        return [_pair([("user", row["instruction"])], row["output"], draw.choice(answers)) for row in rows]
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [
        _pair(
            [(roles[t["from"]], t["value"]) for t in row["conversations"]],
            row["chosen"]["value"],
            row["rejected"]["value"],
        )
        for row in json.loads(Path(file).read_text(encoding="utf-8"))
    ]


def _pair(prompt: list[tuple[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    answers = {"chosen": chosen, "rejected": rejected}
    turns = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {"prompt": [{"role": role, "content": text} for role, text in prompt], **turns}


def prepare(args: argparse.Namespace) -> None:
    """Write pairs.jsonl and the model with its tokenizer into the work folder."""
    folder, pairs, needed = Path(args.work), read_pairs(args.data), args.steps * args.batch
    texts = [turn["content"] for pair in pairs for side in pair.values() for turn in side]
    tokenizer, parameters = sides.write_model(folder / "model", sides.SIZES[args.size], TEMPLATE, texts)

    def length(turns: list[dict[str, str]], **options: Any) -> int:
        return len(tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, **options))["input_ids"])

    found = []
    for pair in pairs:
        prompt = length(pair["prompt"], add_generation_prompt=True)
        whole = [length([*pair["prompt"], *pair[side]]) for side in ("chosen", "rejected")]
        if max(whole) <= args.max_length:
            found.append((pair, prompt, whole))
    if len(found) < needed:
        raise SystemExit(f"{len(found)} pairs fit {args.max_length} tokens, and {needed} are needed; lower --steps.")
    found = found[:needed]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair, _, _ in found))
    lengths = [n for _, _, whole in found for n in whole]
    prompts = sum(prompt for _, prompt, _ in found)
    about = {
        "parameters": parameters,
        "median": median(lengths),
        "longest": max(lengths),
        "prompt_tokens": round(prompts / args.steps),
        "answer_tokens": round((sum(lengths) - 2 * prompts) / args.steps),
    }
    (folder / "about.json").write_text(json.dumps(about))


# The sides


def train_trl(args: argparse.Namespace) -> None:
    """Train with TRL in this process and write what was measured."""
    import torch

    torch.set_num_threads(args.threads)
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    folder, clock, taken = Path(args.work), sides.StepClock(), [0.0]

    class Timed(DPOTrainer):  # type: ignore[misc]
        def _precompute_ref_logps(self, *words: Any) -> Any:
            started = time.perf_counter()
            dataset = super()._precompute_ref_logps(*words)
            taken[0] = time.perf_counter() - started
            return dataset

    config = DPOConfig(
        **sides.trl_options(args),
        per_device_train_batch_size=args.batch,
        beta=BETA,
        max_length=args.max_length,
        disable_tqdm=True,
        logging_steps=1,
        **TRL[args.worker],
    )
    trainer = Timed(
        model=str(folder / "model"),
        args=config,
        train_dataset=Dataset.from_list(sides.read_rows(folder / "pairs.jsonl")),
        callbacks=[sides.trl_clock(clock)],
    )
    trainer.train()
    clock.finish()
    if config.precompute_ref_log_probs and not taken[0]:
        raise SystemExit("this version of TRL computes the reference elsewhere; its time is not known.")
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    Path(args.result).write_text(json.dumps({**clock.figures(), "reference_s": taken[0], "losses": losses}))


def train_engine(args: argparse.Namespace) -> None:
    """Train with the engine in this process, and write what was measured."""
    import engine

    run_dir = Path(args.result).parent / "run"
    words = ["algorithm=dpo", "data=binary_preference", f"algorithm.reference_policy_kl_penalty={BETA}"]
    own = [word.replace("BATCH", str(args.batch)) for word in ENGINE[args.worker]]
    if engine.run([*words, *sides.engine_words(args, "pairs.jsonl", run_dir), *own]):
        raise SystemExit(f"{args.worker}: the run was stopped.")
    clock, lines = sides.read_run(run_dir)
    before, losses = lines[0].get("timing/reference_s", 0.0), [line["train/loss"] for line in lines]
    Path(args.result).write_text(json.dumps({**clock, "reference_s": before, "losses": losses}))


def time_output_layer(args: argparse.Namespace) -> None:
    """Write the seconds that output layer and loss take, forward and backward, on a step's answers and on all its tokens."""
    import torch

    from engine.backends.common import WORKSPACE_MB
    from kernels.linear_objective import linear_objective

    torch.set_num_threads(args.threads)
    about, size = json.loads((Path(args.work) / "about.json").read_text()), sides.SIZES[args.size]
    weight_VH = torch.randn(size["vocab_size"], size["hidden_size"], requires_grad=True)

    def seconds(tokens: int) -> float:
        hidden_NH = torch.randn(tokens, size["hidden_size"], requires_grad=True)
        labels_N = torch.randint(size["vocab_size"], (tokens,))
        started = time.perf_counter()
        loss, _ = linear_objective(
            hidden_NH,
            weight_VH,
            labels_N,
            lambda logprobs_C, *_: (-logprobs_C.sum(), {}),
            workspace_mb=WORKSPACE_MB["cpu"],
        )
        loss.backward()
        return time.perf_counter() - started

    answers, everything = about["answer_tokens"], about["answer_tokens"] + about["prompt_tokens"]
    found = [(seconds(answers), seconds(everything)) for _ in range(args.steps)][args.warmup :]
    Path(args.result).write_text(json.dumps({"more_s": median(b - a for a, b in found)}))


def measure(args: argparse.Namespace, side: str, number: int) -> Run:
    """Run one side in a fresh process."""
    found, about = _in_process(args, side, number)
    return Run(**found, **about)


def _in_process(args: argparse.Namespace, side: str, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = Path(args.work) / f"{side}-{number}"
    folder.mkdir()
    own = {**sides.environment(args), "ANNEAL_CACHE": str(folder / "cache")}  # each run computes the reference
    command = [*sides.worker(__file__, side, args.work), "--result", str(folder / "result.json")]
    about = sides.run_side(side, command, folder, own)
    return json.loads((folder / "result.json").read_text()), about


# The result


def against_trl(args: argparse.Namespace, runs: dict[str, list[Run]]) -> tuple[list[str], bool]:
    """Return the table of the engine against TRL, and whether all sides did the same computation."""
    lines = [
        "| engine against TRL | pairs/s, reference counted in | pairs/s of a step | peak memory | memory added by training | "
        f"largest loss gap, {sides.LOSS_STEPS} steps |",
        "|---|---|---|---|---|---|",
    ]
    ours, sound = runs["engine"], True
    for side in (s for s in runs if s in TRL):
        text, same = _compared(args, ours, runs[side])
        lines.append(f"| {side} {text}")
        sound &= same
    return lines, sound


def what_each_brings(
    args: argparse.Namespace, runs: dict[str, list[Run]], more_s: list[float]
) -> tuple[list[str], bool]:
    """Return the table of the engine without one thing, to the engine, and whether all did the same computation."""
    lines = [
        "| engine without one thing, to the engine | pairs/s, reference counted in | pairs/s of a step | peak memory | memory "
        f"added by training | largest loss gap, {sides.LOSS_STEPS} steps |",
        "|---|---|---|---|---|---|",
    ]
    ours, sound = runs["engine"], True
    for side in (s for s in runs if s in ENGINE and s != "engine"):
        text, same = _compared(args, runs[side], ours)
        lines.append(f"| {side.replace('_', ' ')} {text}")
        sound &= same
    inside = [run.whole(args) / run.plain(args) for run in ours]
    lines.append(f"| reference in each step | | {sides.spread(inside)} | | | |")
    everywhere = [run.step(args) / (run.step(args) + more) for run, more in zip(ours, more_s, strict=True)]
    lines.append(f"| output layer on all tokens | | {sides.spread(everywhere)} | | | |")
    return lines, sound


def _compared(args: argparse.Namespace, ours: list[Run], theirs: list[Run]) -> tuple[str, bool]:
    """Return a row's cells but the first, and whether both did the same computation."""
    gap = sides.loss_gap(ours, theirs)
    same = gap < sides.LOSS_TOLERANCE
    figures = (lambda run: run.whole(args), lambda run: run.plain(args), sides.peak_mb, sides.added_mb)
    cells = [sides.spread(sides.ratios(ours, theirs, figure)) for figure in figures]
    return f"| {' | '.join(cells)} | {sides.gap_text(gap, same)} |", same


def report(args: argparse.Namespace, runs: dict[str, list[Run]], more_s: list[float]) -> tuple[str, bool]:
    """Return the figures as Markdown, and whether all sides did the same computation."""
    about = json.loads((Path(args.work) / "about.json").read_text())
    source = Path(args.data).name if args.data else "generated pairs"
    against, sound = against_trl(args, runs)
    brings, same = what_each_brings(args, runs, more_s)
    lines = [
        f"# DPO against TRL, {args.size} model",
        "",
        sides.about_machine(args, runs.values(), ("torch", "transformers", "trl", "anneal")),
        "",
        f"Llama of {about['parameters'] / 1e6:.1f}M parameters, vocabulary {sides.SIZES[args.size]['vocab_size']:,}, float32. "
        f"{source}: {args.steps * args.batch} pairs, answers with their prompt median {about['median']:.0f} tokens, longest "
        f"{about['longest']}; a step's answers have {about['answer_tokens']:,} tokens, its prompts {about['prompt_tokens']:,}. "
        f"{args.batch} pairs a step, {args.steps} steps, the first {args.warmup} not timed, one epoch; {args.rounds} rounds, "
        "sides taking turns, a fresh process each. Ratios are taken round by round: median (smallest to largest).",
        "",
        *against,
        "",
        *brings,
        "",
        "| side | step, s | reference, s | pairs/s with it | peak MiB | before training MiB |",
        "|---|---|---|---|---|---|",
    ]
    for side, found in runs.items():
        lines.append(
            f"| {shown(side)} | {median(r.step(args) for r in found):.4f} | {median(r.reference_s for r in found):.2f} | "
            f"{median(r.whole(args) for r in found):.1f} | {median(sides.peak_mb(r) for r in found):.0f} | "
            f"{median(r.before_mb for r in found):.0f} |"
        )
    explained = [name for name in MEANING if name in runs or name not in (*ENGINE, *TRL)]
    lines += ["", *(f"- {name.replace('_', ' ') if name in ENGINE else name}: {MEANING[name]}." for name in explained)]
    return "\n".join(lines) + "\n", sound and same


def main() -> int:
    """Run the benchmark, or one worker of it; 1 if a compared side did not do the same computation."""
    args = arguments()
    if args.worker:
        workers = {"prepare": prepare, "output_layer": time_output_layer, **dict.fromkeys(ENGINE, train_engine)}
        workers.get(args.worker, train_trl)(args)
        return 0
    with tempfile.TemporaryDirectory(prefix="dpo_vs_trl-") as work:
        args.work = work
        subprocess.run(sides.worker(__file__, "prepare", work), check=True, env=sides.environment(args))
        runs: dict[str, list[Run]] = {side: [] for side in ("engine", *args.variants)}
        more_s: list[float] = []
        for number in range(args.rounds):
            for side, found in list(runs.items())[:: -1 if number % 2 else 1]:
                found.append(measure(args, side, number))
                plain, whole = found[-1].plain(args), found[-1].whole(args)
                print(
                    f"round {number + 1} {shown(side):24} {plain:8.2f} pairs/s, {whole:8.2f} with the reference",
                    flush=True,
                )
            more_s.append(_in_process(args, "output_layer", number)[0]["more_s"])
        text, sound = report(args, runs, more_s)
    sides.publish(text, args.out)
    return 0 if sound else 1


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = sides.arguments(
        __doc__,
        data="JSON file of ShareGPT pairs; without it pairs are generated",
        examples="pairs",
        steps=STEPS,
        rounds=3,
        lr=1e-4,
    )
    others = [side for side in (*ENGINE, *TRL) if side != "engine"]
    parser.add_argument(
        "--variants", type=sides.some(others), default=others, help=f"of {', '.join(others)}; default: all"
    )
    args = parser.parse_args()
    args.steps = args.steps or STEPS
    return args


if __name__ == "__main__":
    sys.exit(main())
