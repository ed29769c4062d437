"""DPO on CPU: this engine against TRL's DPOTrainer, the same computation on both sides.

    python benchmarks/dpo_vs_trl.py --data PAIRS.json --out dpo_vs_trl

Both sides train the same Llama on the same pairs in the same order, with the same masks, β, batch, AdamW, clipping, dtype
(float32) and threads; sides take turns, every run in a process of its own. One epoch: each pair is seen once. Rates are given
without the reference, from the median step after the warm-up, and with it: the engine's pass before training counted in, TRL's
own inside its steps, or before them where it precomputes it. Nothing is compared unless the losses agree.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from sft_vs_trl import LOSS_STEPS, LOSS_TOLERANCE, SIZES, StepClock, _cpu, environment, generated_rows

HERE = Path(__file__).resolve()
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
BETA = 0.1
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no_checkpointing": {"gradient_checkpointing": False},
    "precomputed": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
}
"""DPOConfig fields that differ from TRL's defaults."""
ENGINE: dict[str, list[str]] = {
    "engine": [],
    "engine, padded": ["data.packing.enabled=false", "train.micro_batch_size=BATCH"],
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one process did."""

    step_s: list[float]
    reference_s: float
    losses: list[float]
    before_mb: float
    peak_mb: float

    def rates(self, args: argparse.Namespace) -> tuple[float, float]:
        """Return pairs a second without and with the reference."""
        step = median(self.step_s[args.warmup :])
        steps = len(self.step_s)
        return args.batch / step, args.batch * steps / (self.reference_s + steps * step)


def read_pairs(file: str | None) -> list[dict[str, Any]]:
    """Return pairs as message lists: from ShareGPT's format, or generated."""
    if file is None:
        rows, draw = generated_rows(1200), random.Random(1)
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
    sides = {"chosen": chosen, "rejected": rejected}
    turns = {name: [{"role": "assistant", "content": text}] for name, text in sides.items()}
    return {"prompt": [{"role": role, "content": text} for role, text in prompt], **turns}


def prepare(args: argparse.Namespace) -> None:
    """Write pairs.jsonl and the model with its tokenizer into the work folder."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder, pairs = Path(args.work), read_pairs(args.data)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<|pad|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES[args.size]["vocab_size"],
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([t["content"] for p in pairs for side in p.values() for t in side], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES[args.size],
        max_position_embeddings=2048,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).float()
    model.save_pretrained(folder / "model")

    def length(pair: dict[str, Any], side: str) -> int:
        return len(
            tokenizer(tokenizer.apply_chat_template([*pair["prompt"], *pair[side]], tokenize=False))["input_ids"]
        )

    fitting, lengths = [], []
    for pair in pairs:
        own = [length(pair, side) for side in ("chosen", "rejected")]
        if max(own) <= args.max_length:
            fitting.append(pair)
            lengths += own
    needed = args.steps * args.batch
    if len(fitting) < needed:
        raise SystemExit(f"{len(fitting)} pairs fit {args.max_length} tokens, and {needed} are needed; lower --steps.")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in fitting[:needed]))
    lengths = lengths[: 2 * needed]
    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "median": median(lengths),
        "longest": max(lengths),
    }
    (folder / "about.json").write_text(json.dumps(about))


def train_trl(args: argparse.Namespace) -> None:
    """Train with TRL in this process and write what was measured."""
    import torch

    torch.set_num_threads(args.threads)
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    folder, clock = Path(args.work), StepClock()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    options = VARIANTS[args.worker]
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        beta=BETA,
        max_length=args.max_length,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        **options,
    )
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    trainer = DPOTrainer(
        model=str(folder / "model"), args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()]
    )
    started = time.perf_counter()
    trainer.train()
    clock.finish()
    before = clock.ends[0] - started if options.get("precompute_ref_log_probs") else 0.0
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    Path(args.result).write_text(json.dumps({**clock.figures(), "reference_s": before, "losses": losses}))


def train_engine(args: argparse.Namespace) -> None:
    """Train with the engine in this process, its pass for the reference timed, and write what was measured."""
    import engine
    from engine import reference

    folder, attach, taken = Path(args.work), reference.attach, [0.0]

    def timed(*words: Any) -> None:
        started = time.perf_counter()
        attach(*words)
        taken[0] = time.perf_counter() - started

    reference.attach = timed
    run_dir = Path(args.result).parent / "run"
    words = [
        "algorithm=dpo", f"model.path={folder / 'model'}", "data=binary_preference",
        f"data.train_path={folder / 'pairs.jsonl'}", "data.shuffle=false", f"data.max_length={args.max_length}",
        f"train.global_batch_size={args.batch}", "scheduler=constant", "scheduler.warmup_ratio=0", f"optimizer.lr={args.lr}",
        f"algorithm.max_num_steps={args.steps}", f"algorithm.reference_policy_kl_penalty={BETA}", f"run.dir={run_dir}",
        "run.callbacks=[sft_vs_trl:EngineClock]", *(w.replace("BATCH", str(args.batch)) for w in ENGINE[args.worker]),
    ]  # fmt: skip
    engine.run(words)
    losses = [json.loads(line)["train/loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = json.loads((run_dir / "clock.json").read_text())
    Path(args.result).write_text(json.dumps({**clock, "reference_s": taken[0], "losses": losses}))


def measure(args: argparse.Namespace, side: str, number: int) -> Run:
    """Run one side in a fresh process."""
    folder = Path(args.work) / f"{side.replace(', ', '-')}-{number}"
    folder.mkdir()
    command = [sys.executable, str(HERE), *sys.argv[1:], "--worker", side, "--work", args.work]
    own = {**environment(args), "ANNEAL_CACHE": str(folder / "cache")}  # each run computes the reference
    with (folder / "output.txt").open("w") as output:
        command += ["--result", str(folder / "result.json")]
        code = subprocess.run(
            command, env=own, cwd=HERE.parent, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        raise SystemExit(f"{side} failed ({code}):\n" + (folder / "output.txt").read_text()[-4000:])
    return Run(**json.loads((folder / "result.json").read_text()))


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report(args: argparse.Namespace, runs: dict[str, list[Run]], load: float) -> tuple[str, bool]:
    """Return the figures as Markdown, and whether all sides did the same computation."""
    about = json.loads((Path(args.work) / "about.json").read_text())
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "transformers", "trl", "anneal"))
    source = Path(args.data).name if args.data else "generated pairs"
    lines = [
        f"# DPO against TRL, {args.size} model",
        "",
        f"{date.today().isoformat()} · {_cpu()}, {os.cpu_count()} cores · threads {args.threads} · load before {load:.1f} · Python "
        f"{platform.python_version()}, {versions}",
        "",
        f"Llama of {about['parameters'] / 1e6:.1f}M parameters, float32. {source}: {args.steps * args.batch} pairs, answers with "
        f"their prompt median {about['median']:.0f} tokens, longest {about['longest']}. {args.batch} pairs a step, {args.steps} "
        f"steps, one epoch; {args.rounds} rounds, sides taking turns, a fresh process each. Ratios by round, median (smallest to "
        "largest).",
        "",
        "| engine against TRL | pairs/s, reference counted in | pairs/s of a step | peak memory | memory added by training | "
        f"largest loss gap, {LOSS_STEPS} steps |",
        "|---|---|---|---|---|---|",
    ]
    sound = True
    for side, theirs in runs.items():
        if side == "engine":
            continue
        both = list(zip(runs["engine"], theirs, strict=True))
        speed, whole = ([a.rates(args)[i] / b.rates(args)[i] for a, b in both] for i in (0, 1))
        first = slice(0, LOSS_STEPS)
        gap = max(abs(x - y) / abs(y) for a, b in both for x, y in zip(a.losses[first], b.losses[first], strict=True))
        same = gap < LOSS_TOLERANCE
        sound &= same
        memory = [a.peak_mb / b.peak_mb for a, b in both]
        added = [(a.peak_mb - a.before_mb) / (b.peak_mb - b.before_mb) for a, b in both]
        name = side if side in ENGINE else f"TRL {side}"
        agree = f"{gap:.1e}" + ("" if same else " **not the same computation**")
        lines.append(
            f"| {name} | {_spread(whole)} | {_spread(speed)} | {_spread(memory)} | {_spread(added)} | {agree} |"
        )
    lines += [
        "",
        "| side | step, s | reference, s | pairs/s with it | peak MiB | before training MiB |",
        "|---|---|---|---|---|---|",
    ]
    for side, found in runs.items():
        step = median(median(r.step_s[args.warmup :]) for r in found)
        lines.append(
            f"| {side if side in ENGINE else 'TRL ' + side} | {step:.4f} | {median(r.reference_s for r in found):.2f} | "
            f"{median(r.rates(args)[1] for r in found):.1f} | {median(r.peak_mb for r in found):.0f} | "
            f"{median(r.before_mb for r in found):.0f} |"
        )
    return "\n".join(lines) + "\n", sound


def main() -> int:
    """Run the benchmark, or one worker of it; 1 if a compared side did not do the same computation."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--size", choices=SIZES, default="small")
    add("--data", type=os.path.abspath, help="JSON file of ShareGPT pairs; without it pairs are generated")
    add("--batch", type=int, default=8)
    add("--steps", type=int, default=20)
    add("--warmup", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--lr", type=float, default=1e-4)
    add("--max-length", type=int, default=512)
    add("--out", help="name of the Markdown file in benchmarks/results")
    for name in ("--worker", "--work", "--result"):
        add(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        {"prepare": prepare, **dict.fromkeys(ENGINE, train_engine)}.get(args.worker, train_trl)(args)
        return 0
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="dpo_vs_trl-") as work:
        args.work = work
        command = [sys.executable, str(HERE), *sys.argv[1:], "--worker", "prepare", "--work", work]
        subprocess.run(command, check=True, env=environment(args))
        runs: dict[str, list[Run]] = {side: [] for side in (*ENGINE, *VARIANTS)}
        for number in range(args.rounds):
            for side, found in list(runs.items())[:: -1 if number % 2 else 1]:
                found.append(measure(args, side, number))
                plain, whole = found[-1].rates(args)
                print(f"round {number + 1} {side:18} {plain:8.2f} pairs/s, {whole:8.2f} with the reference", flush=True)
        text, sound = report(args, runs, load)
    print("\n" + text)
    if args.out:
        (HERE.parent / "results" / f"{args.out}.md").write_text(text, encoding="utf-8")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
