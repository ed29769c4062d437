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
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from engine.types import Callback, Control

HERE = Path(__file__).resolve()
LOSS_STEPS = 10
"""Steps whose losses must agree."""
LOSS_TOLERANCE = 1e-4
"""Largest relative gap between the losses of a step."""

TEMPLATE = (
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{{- '\\n' -}}{%- else -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
SIZES: dict[str, dict[str, int]] = {
    "small": {
        "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    },
    "medium": {
        "vocab_size": 32_768, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
}  # fmt: skip
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
class Measured:
    """What one process did.

    Attributes:
        step_s: Seconds of each step, from the end of the step before to its own end.
        losses: Loss of each step.
        trained_tokens: Trained tokens of each step.
        before_mb: Resident memory just before the first step, MiB.
        peak_mb: Largest resident memory of the process up to the end of the last step, MiB.
        lifetime_peak_mb: The same up to the process's end; the engine writes its checkpoint and weights after the last step.
        load: Load average of the machine when the process began.
        note: What the side says about itself.
    """

    step_s: list[float]
    losses: list[float]
    trained_tokens: list[int]
    before_mb: float
    peak_mb: float
    lifetime_peak_mb: float = 0.0
    load: float = 0.0
    note: str = ""


class StepClock:
    """Notes when steps end, and memory before the first and after the last."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.before_mb = self.peak_mb = 0.0

    def begin(self) -> None:
        """Call just before the first step."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.before_mb = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        self.ends.append(time.perf_counter())

    def step(self) -> None:
        """Call at the end of each step."""
        self.ends.append(time.perf_counter())

    def finish(self) -> None:
        """Call after the last step."""
        self.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def figures(self) -> dict[str, Any]:
        """Return the fields of Measured that a clock knows."""
        step_s = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return {"step_s": step_s, "before_mb": self.before_mb, "peak_mb": self.peak_mb}


class EngineClock(Callback):
    """The clock as a callback of the engine: ``run.callbacks=[sft_vs_trl:EngineClock]``."""

    def __init__(self) -> None:
        self.clock = StepClock()

    def on_train_begin(self, control: Control) -> None:
        """Start the clock."""
        self.clock.begin()

    def on_step_end(self, control: Control) -> None:
        """Note the step's end; after the last, write what was measured."""
        self.clock.step()
        if control.step == control.total_steps:
            self.clock.finish()
            (control.run_dir / "clock.json").write_text(json.dumps(self.clock.figures()))


# The model and the rows


def generated_rows(count: int) -> list[dict[str, str]]:
    """Return Alpaca-like rows, always the same: prompts of 8 to 30 words, log-normal answers with a median near 45 words."""
    draw = random.Random(0)
    onsets, vowels, codas = "b c d f g h j k l m n p r s t v w z st tr ch sh".split(), "aeiou", ["", "n", "r", "s", "t"]
    words = list(
        dict.fromkeys(
            "".join(
                draw.choice(onsets) + draw.choice(vowels) + draw.choice(codas) for _ in range(draw.choice((1, 2, 2, 3)))
            )
            for _ in range(6000)
        )
    )
    weights = [1 / (rank + 3) for rank in range(len(words))]

    def text(length: int) -> str:
        return " ".join(draw.choices(words, weights, k=length)).capitalize() + "."

    return [
        {
            "instruction": text(draw.randint(8, 30)),
            "input": "",
            "output": text(max(3, min(300, round(draw.lognormvariate(3.8, 0.8))))),
        }
        for _ in range(count)
    ]


def read_rows(data: str | None, count: int) -> list[dict[str, str]]:
    """Return ``count`` Alpaca rows from a JSON or JSONL file, or generated ones."""
    if data is None:
        return generated_rows(count)
    text = Path(data).read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    if len(rows) < count:
        raise SystemExit(f"--data {data}: {len(rows)} rows, and {count} are needed; lower --steps or --batch.")
    return list(rows[:count])


def prepare(args: argparse.Namespace) -> None:
    """Write the conversations (rows.jsonl) and the model with its tokenizer (model/) into the work folder."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(args.work)
    alpaca = read_rows(args.data, max(1000, args.steps * args.batch) if args.data is None else args.steps * args.batch)
    texts = [r[k] for r in alpaca for k in ("instruction", "input", "output")]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in alpaca[: args.steps * args.batch]:
            question = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    size = SIZES[args.size]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t in ("<|pad|>", "<|im_start|>", "<|im_end|>")]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size["vocab_size"],
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        **size,
        max_position_embeddings=2048,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).float()
    model.save_pretrained(folder / "model")
    lengths = [
        len(tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=True, return_dict=True)["input_ids"])
        for line in (folder / "rows.jsonl").read_text().splitlines()
    ]
    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": len(lengths),
        "tokenizer": len(tokenizer),
        "median_tokens": median(lengths),
        "longest": max(lengths),
        "cut": sum(n > args.max_length for n in lengths),
    }
    (folder / "about.json").write_text(json.dumps(about))


# The two sides


def train_trl(args: argparse.Namespace) -> None:
    """Train with TRL in this process and write the measurement."""
    import torch

    torch.set_num_threads(args.threads)
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    folder, options = Path(args.work), dict(VARIANTS[args.worker])
    clock, losses, trained = StepClock(), [0.0] * args.steps, [0] * args.steps

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    class Noting(SFTTrainer):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            losses[self.state.global_step] += float(loss.detach())
            trained[self.state.global_step] = int(num_items_in_batch)
            return loss

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    if options.get("padding_free"):  # TRL wants these rows cut beforehand
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        rows = [_tokenized(tokenizer, row["messages"], args.max_length) for row in rows]
    accumulate = options.pop("accumulate", False)
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=args.steps,
        per_device_train_batch_size=1 if accumulate else args.batch,
        gradient_accumulation_steps=args.batch if accumulate else 1,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        assistant_only_loss=not options.get("padding_free"),
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        **{"max_length": args.max_length, **options},
    )
    trainer = Noting(
        model=str(folder / "model"), args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()]
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


def engine_command(args: argparse.Namespace, run_dir: Path) -> list[str]:
    """Return the command that trains the same with this engine."""
    folder = Path(args.work)
    return [
        sys.executable, "-m", "engine", f"model.path={folder / 'model'}", "data=messages",
        f"data.train_path={folder / 'rows.jsonl'}", "data.shuffle=false", "data.overlong=truncate",
        f"data.max_length={args.max_length}", f"train.global_batch_size={args.batch}", "scheduler=constant",
        "scheduler.warmup_ratio=0", f"optimizer.lr={args.lr}", f"algorithm.max_num_steps={args.steps}",
        "algorithm.val_at_end=false", f"run.dir={run_dir}", "run.callbacks=[sft_vs_trl:EngineClock]", *args.engine_override,
    ]  # fmt: skip


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
        command = engine_command(args, folder)
    else:
        command = [sys.executable, str(HERE), "--worker", side, "--result", str(folder / "result.json")]
        for name in ("work", "size", "batch", "steps", "threads", "lr", "max_length"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    load = os.getloadavg()[0]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, env=environment(args), cwd=HERE.parent, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{side} failed ({process.returncode}):\n" + (folder / "output.txt").read_text()[-4000:])
    if side == "engine":
        found = json.loads((folder / "clock.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found["losses"] = [line["train/loss"] for line in lines]
        found["trained_tokens"] = [line["train/trained_tokens"] for line in lines]
    else:
        found = json.loads((folder / "result.json").read_text())
    return Measured(**found, lifetime_peak_mb=usage.ru_maxrss / 1024, load=load)


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Return the environment of both sides: the same threads, no network, a cache of its own."""
    threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    own = {"ANNEAL_CACHE": str(Path(args.work) / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **threads, **quiet, **own}


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
        return self.same_tokens and self.loss_gap < LOSS_TOLERANCE


def rate(run: Measured, args: argparse.Namespace) -> float:
    """Return conversations a second, from the median step after the warm-up."""
    return float(args.batch / median(run.step_s[args.warmup :]))


def compare(ours: Sequence[Measured], theirs: Sequence[Measured], variant: str, args: argparse.Namespace) -> Comparison:
    """Hold the runs of each round against one another."""
    pairs = list(zip(ours, theirs, strict=True))
    first = slice(0, LOSS_STEPS)
    gaps = [abs(x - y) / abs(y) for a, b in pairs for x, y in zip(a.losses[first], b.losses[first], strict=True)]
    return Comparison(
        variant=variant,
        speed=[rate(a, args) / rate(b, args) for a, b in pairs],
        memory=[a.peak_mb / b.peak_mb for a, b in pairs],
        added=[(a.peak_mb - a.before_mb) / (b.peak_mb - b.before_mb) for a, b in pairs],
        loss_gap=max(gaps),
        same_tokens=all(a.trained_tokens[first] == b.trained_tokens[first] for a, b in pairs),
    )


def report(args: argparse.Namespace, runs: dict[str, list[Measured]], compared: Sequence[Comparison]) -> str:
    """Return the figures as Markdown."""
    about = json.loads((Path(args.work) / "about.json").read_text())
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    names = ("torch", "transformers", "trl", "accelerate", "tokenizers", "anneal")
    loads = [r.load for side in runs.values() for r in side]
    source = Path(args.data).name if args.data else "generated rows"
    lines = [
        f"# SFT against TRL, {args.size} model",
        "",
        f"{date.today().isoformat()} · {_cpu()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB · threads {args.threads} · "
        f"load before each run {min(loads):.1f} to {max(loads):.1f} · Python {platform.python_version()}, "
        + ", ".join(f"{n} {metadata.version(n)}" for n in names),
        "",
        f"Llama of {about['parameters'] / 1e6:.1f}M parameters, vocabulary {SIZES[args.size]['vocab_size']:,} (tokenizer "
        f"{about['tokenizer']:,}), float32. {source}: {about['rows']} conversations, median {about['median_tokens']:.0f} tokens, "
        f"longest {about['longest']}, {about['cut']} cut at {args.max_length}. {args.batch} conversations a step, "
        f"{args.steps} steps, the first {args.warmup} not timed; {args.rounds} rounds, sides taking turns, a fresh process each.",
        "",
        "| engine against TRL | conversations/s, ratio (min to max) | peak memory, ratio | memory added by training, ratio | "
        f"largest loss gap, {LOSS_STEPS} steps |",
        "|---|---|---|---|---|",
    ]
    for c in compared:
        gap = f"{c.loss_gap:.1e}" + ("" if c.sound else " **not the same computation**")
        lines.append(
            f"| {c.variant} | **{median(c.speed):.2f}×** ({min(c.speed):.2f} to {max(c.speed):.2f}) | {_ratio(c.memory)} | "
            f"{_ratio(c.added)} | {gap} |"
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


def _ratio(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), platform.machine())


def main() -> int:
    """Run the benchmark, or one worker of it; 1 if a compared side did not do the same computation."""
    args = arguments()
    if args.worker:
        prepare(args) if args.worker == "prepare" else train_trl(args)
        return 0
    with tempfile.TemporaryDirectory(prefix="sft_vs_trl-") as work:
        args.work = work
        command = [sys.executable, str(HERE), *sys.argv[1:], "--worker", "prepare", "--work", work]
        subprocess.run(command, check=True, env=environment(args))
        runs: dict[str, list[Measured]] = {side: [] for side in ("engine", *args.variants)}
        for number in range(args.rounds):
            for side, found in runs.items():
                found.append(measure(args, side, number))
                shown = f"{rate(found[-1], args):8.2f} conversations/s, peak {found[-1].peak_mb:6.0f} MiB"
                print(f"round {number + 1} {side:17} {shown}, load before {found[-1].load:.1f}", flush=True)
        compared = [compare(runs["engine"], runs[v], v, args) for v in args.variants]
        text = report(args, runs, compared)
    print("\n" + text)
    if args.out:
        file = HERE.parent / "results" / f"{args.out}.md"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return 0 if all(c.sound for c in compared) else 1


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--size", choices=SIZES, default="small")
    add("--data", type=os.path.abspath, help="JSON or JSONL file in Alpaca format; without it rows are generated")
    add("--batch", type=int, default=8, help="conversations a step")
    add("--steps", type=int, help=f"steps a run, warm-up included (default {STEPS})")
    add("--warmup", type=int, default=2, help="steps that are not timed")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--lr", type=float, default=1e-3)
    add("--max-length", type=int, default=512)
    add("--variants", type=lambda s: s.split(","), default=[v for v in VARIANTS if v != "compiled"])
    add("--engine-override", action="append", default=[], help="one more override of the engine; may be repeated")
    add("--out", help="name of the Markdown file in benchmarks/results")
    for name in ("--worker", "--work", "--result"):
        add(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.steps = args.steps or STEPS[args.size]
    if args.steps < LOSS_STEPS:
        parser.error(f"--steps must be at least {LOSS_STEPS}: the losses of so many are compared")
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"--variants: {', '.join(sorted(unknown))} unknown; there are {', '.join(VARIANTS)}")
    return args


if __name__ == "__main__":
    sys.exit(main())
