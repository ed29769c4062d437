"""What tokenising leaves on disk and what a run makes of it: documents of a conversation, weights, bad rows, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from engine.config.compose import compose
from engine.data import report
from engine.data.assemble import Data, assemble
from engine.data.loader import Loader, train_loader
from engine.data.samples import trained_positions
from engine.errors import UserError
from tests.conftest import read_metrics

FORGETS = (
    "{%- for m in messages -%}"
    "{%- set content = m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content -%}"
    "{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""A template that leaves out the reasoning of all answers but the last."""


def thinking(i: int, turns: int) -> dict[str, Any]:
    """Return a conversation whose answers begin with reasoning."""
    messages = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"question {i}.{turn}"})
        messages.append({"role": "assistant", "content": f"<think>about {i}.{turn}</think>answer {i}.{turn}"})
    return {"messages": messages}


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def words_of(base: list[str], file: Path, tmp_path: Path, *more: str) -> list[str]:
    kept = [o for o in base if not o.startswith("data.train_path")]
    return [
        *kept,
        f"data.train_path={file}",
        f"run.dir={tmp_path / 'run'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        *more,
    ]


def assembled(words: list[str], tmp_path: Path) -> tuple[Data, list[str]]:
    said: list[str] = []
    return assemble(compose(words).config, tmp_path, said.append), said


def loader_of(words: list[str], data: Data) -> Loader:
    config = compose(words).config
    return train_loader(data.train, config.data, batch_size=config.train.global_batch_size, micro_batch_size=1, seed=0)


@pytest.fixture
def forgets(tmp_path: Path) -> str:
    (tmp_path / "forgets.jinja").write_text(FORGETS)
    return f"model.chat_template={tmp_path / 'forgets.jinja'}"


def test_a_conversation_of_several_documents_counts_once(base: list[str], tmp_path: Path, forgets: str) -> None:
    turns = [1, 3, 2, 1, 1, 2, 1, 4]
    file = write(tmp_path / "rows.jsonl", *(thinking(i, n) for i, n in enumerate(turns)))
    words = words_of(base, file, tmp_path, forgets, "train.global_batch_size=4", "algorithm.max_num_steps=2")
    data, said = assembled(words, tmp_path)
    assert "8 of 8 rows used, 4 made one sample a turn" in said[0]
    assert data.train.sizes == [8] and len(data.train) == sum(turns)
    loader = loader_of(words, data)
    assert loader.plan.steps_per_epoch == 2
    for step in range(2):
        members = loader.plan.members(step)
        batches = loader.step(step)
        documents = sum(len(b.targets.bounds) - 1 for b in batches)
        assert documents == len(loader.documents(step)) == sum(turns[i] for i in members.tolist())
        expected = sum(len(f"<think>about {i}.{t}</think>answer {i}.{t}") + 1 for i in members for t in range(turns[i]))
        assert sum(b.targets.num_tokens for b in batches) == expected  # bytes, and <|im_end|>: each answer once
    assert engine.run(words) == 0
    newest = tmp_path / "run" / "checkpoints" / "step_00000002" / "state.json"
    assert json.loads(newest.read_text())["consumed_samples"] == 8
    assert read_metrics(tmp_path / "run")[0]["train/trained_tokens"] == sum(
        b.targets.num_tokens for b in loader.step(0)
    )


def test_held_out_conversations_keep_their_documents_together(base: list[str], tmp_path: Path, forgets: str) -> None:
    turns = [1 + i % 3 for i in range(60)]
    file = write(tmp_path / "rows.jsonl", *(thinking(i, n) for i, n in enumerate(turns)))
    data, _ = assembled(words_of(base, file, tmp_path, forgets, "data.val_fraction=0.3"), tmp_path)
    sides = []
    for side in (data.train, data.validation[""]):
        (part,) = side.parts
        assert part.kept is not None
        found = side.documents(np.arange(side.sizes[0])).tolist()
        assert len(found) == sum(turns[c] for c in part.kept.tolist())
        sides.append(set(found))
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == sum(turns)


def test_weights_of_turns_reach_the_micro_batch(base: list[str], tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bcd", "weight": 0.25},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "fg", "train": False},
        {"role": "user", "content": "h"},
        {"role": "assistant", "content": "ij"},
    ]
    plain = [{k: m[k] for k in ("role", "content")} for m in messages]
    file = write(tmp_path / "rows.jsonl", {"messages": messages}, {"messages": plain})
    words = words_of(base, file, tmp_path, "train.global_batch_size=2")
    data, _ = assembled(words, tmp_path)
    weighted, all_one = data.train[0], data.train[1]
    assert weighted.weights is not None and weighted.weights.tolist() == [0.25, 1.0]
    assert all_one.weights is None and len(all_one.trained) == 3
    assert len(trained_positions(weighted)) == 4 + 3
    (batch,) = loader_of(words, data).step(0)
    assert batch.targets.weights_N is not None
    assert sorted(batch.targets.weights_N.tolist()) == [0.25] * 4 + [1.0] * (3 + 4 + 3 + 3)


# Bad rows


def bad_file(tmp_path: Path, bad: int, good: int) -> Path:
    rows: list[Any] = [thinking(i, 1) for i in range(good)]
    for i in range(bad):
        rows.insert(3 * i + 1, "{not JSON" if i % 2 else {"messages": [{"role": "user", "content": i}]})
    return write(tmp_path / "rows.jsonl", *rows)


def test_the_first_ten_bad_rows_are_named_at_once(base: list[str], tmp_path: Path) -> None:
    file = bad_file(tmp_path, 12, 60)
    with pytest.raises(UserError) as caught:
        engine.run(words_of(base, file, tmp_path))
    assert len(caught.value.problems) == 10
    for i, problem in enumerate(caught.value.problems):
        assert problem.startswith(f"{file} line {3 * i + 2}: ") and problem.endswith(".")
    assert "messages[0].content must be a string, got 0" in caught.value.problems[0]
    assert "not JSON" in caught.value.problems[1]
    assert not list((tmp_path / "cache" / "tokenized").glob("*/"))


def test_bad_rows_are_skipped_counted_and_listed(base: list[str], tmp_path: Path) -> None:
    file = bad_file(tmp_path, 5, 30)
    words = words_of(base, file, tmp_path, "data.bad_rows=skip", "algorithm.max_num_steps=1")
    assert engine.run(words) == 0
    run_dir = tmp_path / "run"
    assert "30 of 35 rows used, 5 bad ones skipped" in (run_dir / "log.txt").read_text()
    listed = [json.loads(line) for line in (run_dir / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in listed] == [f"{file} line {3 * i + 2}" for i in range(5)]
    assert listed[0]["reason"] == "messages[0].content must be a string, got 0"
    assert json.loads((run_dir / "lock.json").read_text())["samples"]["train"]["bad"] == 5


def test_a_file_of_bad_rows_alone_is_refused_in_either_case(base: list[str], tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", *["nothing"] * 20)
    for more in ("data.bad_rows=skip", "data.bad_rows=error"):
        with pytest.raises(UserError) as caught:
            engine.run(words_of(base, file, tmp_path, more))
        assert len(caught.value.problems) == 10 and "line 10: not JSON" in str(caught.value)


# The report


def test_the_report_counts_what_there_is(base: list[str], tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y"}]}
        for n in range(1, 101)
    ]
    words = words_of(base, write(tmp_path / "rows.jsonl", *rows), tmp_path, "train.global_batch_size=20")
    data, _ = assembled(words, tmp_path)
    lengths = data.train.lengths
    bars = report.histogram(lengths)
    assert sum(n for _, _, n in bars) == 100
    for first, last, n in bars:
        assert n == int(((lengths >= first) & (lengths <= last)).sum())
    assert report.quantiles(lengths) == [int(np.sort(lengths)[i]) for i in (4, 49, 94, 98)]
    loader = loader_of(words, data)
    packing = report.packing(loader)
    assert packing.steps == 5
    assert packing.micro_batches == sum(len(loader.step(s)) for s in range(5))
    assert packing.filled == pytest.approx(lengths.sum() / packing.micro_batches / 4096)
    assert packing.padding == 0
    places = 0
    for step in range(5):
        own = lengths[loader.documents(step)]
        places += sum(len(own[a : a + 8]) * int(own[a : a + 8].max()) for a in range(0, 20, 8))
    assert packing.padded == pytest.approx(1 - lengths.sum() / places)
    assert engine.run([*words, "algorithm.max_num_steps=1"]) == 0
    text = (tmp_path / "run" / "data.txt").read_text()
    assert "train: 100 of 100 rows used" in text and f"all up to {lengths.max()}" in text


def test_padded_batches_are_measured_as_they_are_made(base: list[str], tmp_path: Path, rows_file: Path) -> None:
    padded = ["data.packing.enabled=false", "train.micro_batch_size=4"]
    words = words_of(base, rows_file, tmp_path, *padded)
    data, _ = assembled(words, tmp_path)
    config = compose(words).config
    loader = train_loader(data.train, config.data, batch_size=8, micro_batch_size=4, seed=0)
    batches = [b for s in range(loader.plan.steps_per_epoch) for b in loader.step(s)]
    expected = 1 - sum(b.num_tokens for b in batches) / sum(b.input_ids.numel() for b in batches)
    assert report.packing(loader).padding == pytest.approx(expected)
    assert f"{expected:.1%} padding" in report.text(data, loader)


# Held out, and several ranks


def test_paths_of_one_tree_are_on_the_same_side(base: list[str], tmp_path: Path) -> None:
    rows = []
    for tree in range(40):
        root = {"message_id": f"{tree}", "parent_id": None, "role": "prompter", "text": f"question {tree}"}
        rows += [root, {"message_id": f"{tree}a", "parent_id": f"{tree}", "role": "assistant", "text": "first"}]
        rows += [{"message_id": f"{tree}b", "parent_id": f"{tree}", "role": "assistant", "text": "second"}]
    file = write(tmp_path / "tree.jsonl", *rows)
    words = words_of(base, file, tmp_path, "data=open_assistant", "data.val_path=null", "data.val_fraction=0.4")
    data, _ = assembled(words, tmp_path)
    ((kept,), (out,)) = data.train.parts, data.validation[""].parts
    assert kept.kept is not None and out.kept is not None
    trees = [
        {int(c) // 2 for c in part.kept} for part in (kept, out) if part.kept is not None
    ]  # two paths a tree, in order
    assert not trees[0] & trees[1] and len(trees[0]) + len(trees[1]) == 40


def test_the_same_conversation_is_on_the_same_side_whatever_else_its_row_says(base: list[str], tmp_path: Path) -> None:
    rows = [{**thinking(i, 1), "id": n} for n in range(2) for i in range(50)]
    data, _ = assembled(words_of(base, write(tmp_path / "r.jsonl", *rows), tmp_path, "data.val_fraction=0.3"), tmp_path)
    (out,) = data.validation[""].parts
    assert out.kept is not None
    held = set(out.kept.tolist())
    assert held and all((i in held) == (i + 50 in held) for i in range(50))


def test_validation_rows_that_are_trained_on_too_are_told(base: list[str], tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", *(thinking(i, 1) for i in range(20)))
    val = write(tmp_path / "val.jsonl", *(thinking(i, 1) for i in range(15, 30)))
    _, said = assembled(words_of(base, train, tmp_path, f"data.val_path={val}"), tmp_path)
    assert said[-1] == "5 of 15 validation conversations are trained on too"


def test_the_fingerprint_tells_which_document_has_a_weight(base: list[str], tmp_path: Path) -> None:
    plain, weighted = ({"messages": thinking(1, 1)["messages"]} for _ in range(2))
    weighted = {"messages": [weighted["messages"][0], {**weighted["messages"][1], "weight": 0.5}]}
    prints = set()
    for name, rows in (("a", (plain, weighted)), ("b", (weighted, plain)), ("c", (plain, plain))):
        data, _ = assembled(words_of(base, write(tmp_path / f"{name}.jsonl", *rows), tmp_path), tmp_path)
        prints.add(data.train.fingerprint)
    assert len(prints) == 3


def test_other_ranks_take_what_the_first_has_made(base: list[str], tmp_path: Path, rows_file: Path) -> None:
    words = words_of(base, rows_file, tmp_path, "data.cache=rebuild")
    first, _ = assembled(words, tmp_path)
    folder = first.sources["train"].folder
    assert folder is not None
    before = (folder / "meta.json").read_text()
    other = assemble(compose(words).config, tmp_path, lambda _: None, made=first.made)
    assert other.fingerprints == first.fingerprints and (folder / "meta.json").read_text() == before
    elsewhere = compose([*words, f"data.cache_dir={tmp_path / 'elsewhere'}"]).config
    lost = {name: made._replace(folder="/nowhere") for name, made in first.made.items()}
    assert assemble(elsewhere, tmp_path, lambda _: None, made=lost).fingerprints == first.fingerprints


def test_made_up_samples_can_be_held_out_and_limited(base: list[str], tmp_path: Path) -> None:
    words = words_of(base, Path("builtin:dummy"), tmp_path, "data=dummy", "data.limit=500", "data.val_fraction=0.2")
    data, _ = assembled([w for w in words if not w.startswith("data=messages")], tmp_path)
    assert data.train.sizes[0] + data.validation[""].sizes[0] == 500 and data.validation[""].sizes[0] > 50
