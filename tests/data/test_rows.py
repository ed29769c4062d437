"""Bad rows and files with the sentence each ends in, and the cache of tokenised samples: reused, remade, interrupted, shared."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_fixtures import CHATML_GENERATION, byte_plain

from engine import cache as command
from engine import hub
from engine.config import sources
from engine.config.compose import compose
from engine.config.schema import RunConfig
from engine.data import cache
from engine.data.assemble import assemble
from engine.data.samples import Samples
from engine.errors import UserError

ROOT = Path(__file__).parents[2]
GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


TOKENIZER: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def _tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A tokenizer folder whose tokens are bytes and special tokens, with a ChatML template."""
    tokenizer = byte_plain()
    tokenizer.chat_template = CHATML_GENERATION
    TOKENIZER["folder"] = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(TOKENIZER["folder"])


def words_for(file: Path, cache: Path) -> list[str]:
    """Return the overrides of a recipe on a file."""
    words = ["model=tiny", f"model.tokenizer={TOKENIZER['folder']}", "data=messages", "data.max_length=256"]
    return [*words, f"data.train_path={file}", f"data.cache_dir={cache}"]


def config_of(file: Path, cache: Path, *overrides: str) -> RunConfig:
    return compose([*words_for(file, cache), *overrides]).config


def tokenised(config: RunConfig, split: str = "train") -> tuple[Samples, list[str]]:
    """Prepare, and return what was said as well."""
    said: list[str] = []
    return assemble(config, Path(config.data.cache_dir or "") / "scratch", said.append).sources[split], said


def whole_folders(cache: Path) -> list[Path]:
    """Return the folders that look like a finished cache."""
    return sorted(p for p in (cache / "tokenized").glob("*") if p.is_dir() and ".tmp-" not in p.name)


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


BAD: dict[str, tuple[str, bytes, list[str], str]] = {
    # name: (file name, its bytes, overrides, the sentence; … stands for what is left out at its start or end)
    "not json": (
        "rows.jsonl",
        lines(GOOD, GOOD) + b'{"messages": [}\n' + lines(GOOD),
        [],
        "{file} line 3: not JSON (Expecting value: line 1 column 15 (char 14)); each line holds one JSON object.",
    ),
    "not json behind empty lines": (
        "rows.jsonl",
        b"\n\n" + lines(GOOD) + b"\n  \nhello\n",
        [],
        "{file} line 6: not JSON (Expecting value: line 1 column 1 (char 0)); each line holds one JSON object.",
    ),
    "half a line": (
        "rows.jsonl",
        lines(GOOD) + lines(GOOD)[:40],
        [],
        "{file} line 2: not JSON (…",
    ),
    "array not json": (
        "rows.json",
        b'[{"messages": []},\n oops]',
        [],
        "{file} row 2: not JSON (Expecting value: line 2 column 2 (char 20)); the file holds an array of objects, or one object a line.",
    ),
    "array cut short": ("rows.json", b'  [{"messages": []}', [], "{file} row 1: not JSON (…"),
    "row no object": (
        "rows.jsonl",
        lines(GOOD) + b'"hello"\n',
        [],
        '{file} line 2: a row must be a JSON object, got "hello".',
    ),
    "row of array no object": ("rows.json", b"[[1, 2]]", [], "{file} row 1: a row must be a JSON object, got [1, 2]."),
    "only white space": ("rows.jsonl", b" \n\t\n \n", [], "{file}: the file has no rows."),
    "array without rows": ("rows.json", b"[\n]\n", [], "{file}: the array has no rows."),
    "not utf-8": (
        "rows.jsonl",
        b'{"messages": "\xe9"}\n',
        [],
        "…: not UTF-8 text (invalid continuation byte at byte 14); convert it to UTF-8.",
    ),
    "no messages": (
        "rows.jsonl",
        lines(GOOD, {"conversation": [], "id": 1}),
        [],
        "{file} line 2: no list 'messages' (the columns are 'conversation', 'id').",
    ),
    "messages no list": (
        "rows.jsonl",
        lines({"messages": "Hi"}),
        [],
        "{file} line 1: no list 'messages' (the columns are 'messages').",
    ),
    "messages empty": ("rows.jsonl", lines({"messages": []}), [], "{file} line 1: 'messages' is empty."),
    "message no object": (
        "rows.jsonl",
        lines({"messages": ["Hi"]}),
        [],
        "{file} line 1: messages[0] must be an object with 'role' and 'content', got 'Hi'.",
    ),
    "message without role": (
        "rows.jsonl",
        lines({"messages": [{"content": "Hi"}]}),
        [],
        "{file} line 1: messages[0] must be an object with 'role' and 'content', got {'content': 'Hi'}.",
    ),
    "unknown role": (
        "rows.jsonl",
        lines(GOOD, turns(("user", "Hi"), ("gpt", "Hello"))),
        [],
        "{file} line 2: messages[1].role is 'gpt'; known roles are system, developer, user, assistant, tool.",
    ),
    "role no string": (
        "rows.jsonl",
        lines(turns((["user"], "Hi"), ("assistant", "Hello"))),
        [],
        "{file} line 1: messages[0].role is ['user']; known roles are system, developer, user, assistant, tool.",
    ),
    "content none": (
        "rows.jsonl",
        lines(turns(("user", "Hi"), ("assistant", None))),
        [],
        "{file} line 1: messages[1].content must be a string, got None.",
    ),
    "content an image": (
        "rows.jsonl",
        lines(turns(("user", [{"type": "image"}]), ("assistant", "Hello"))),
        [],
        "{file} line 1: messages[0].content[0] must be a part of type 'text' with a string 'text', got {'type': 'image'}.",
    ),
    "no assistant": (
        "rows.jsonl",
        lines(GOOD, turns(("user", "Hi"))),
        [],
        "{file} line 2: no assistant turn, so nothing to train; set data.train_on=all to train on every token.",
    ),
    "only the first token to train": (
        "rows.jsonl",
        lines(turns(("assistant", "a"), ("user", "Hi"))),
        ["model.chat_template=null"],
        "{file} line 1: nothing to train: no token of a trained turn is left after the template.",
    ),
    "alpaca without output": (
        "rows.json",
        json.dumps([{"instruction": "Add", "output": "3"}, {"instruction": "Add", "input": "1 and 2"}]).encode(),
        ["data=alpaca"],
        "{file} row 2: field 'output' must be a string, got None.",
    ),
    "alpaca output no string": (
        "rows.jsonl",
        lines({"instruction": "Add", "output": 3}),
        ["data=alpaca"],
        "{file} line 1: field 'output' must be a string, got 3.",
    ),
    "alpaca input no string": (
        "rows.jsonl",
        lines({"instruction": "Add", "input": ["1", "2"], "output": "3"}),
        ["data=alpaca"],
        "{file} line 1: field 'input' must be a string, got ['1', '2'].",
    ),
    "unknown columns": (
        "rows.jsonl",
        lines({"text": "Hi", "id": 1}),
        ["data.reader=null"],
        "{file}: no known format has these columns ('text', 'id'); a row holds 'messages', 'conversations', 'input_ids', …",
    ),
    "unknown reader": (
        "rows.jsonl",
        lines(GOOD),
        ["data.reader=chat"],
        "data.reader=chat: no such reader; choose messages, response, alpaca, dolly, sharegpt, pretokenized, open_assistant, squad, "
        "preference, binary_preference, helpsteer3 or module:function.",
    ),
    "too long": (
        "rows.jsonl",
        lines(GOOD, conversation("a" * 40, "b" * 30)),
        ["data.overlong=error", "data.max_length=90"],
        "{file} line 2: 91 tokens, more than data.max_length=90; raise it, or set data.overlong=drop.",
    ),
    "all dropped": (
        "rows.jsonl",
        lines(*[conversation("a" * 40, "b" * 30)] * 3),
        ["data.max_length=90"],
        "{file}: no sample is left of 3 rows (3 longer than 90 tokens); raise data.max_length.",
    ),
    "all cut away": (
        "rows.jsonl",
        lines(*[conversation("a" * 40, "b" * 30)] * 3, conversation("a" * 80, "b")),
        ["data.max_length=30", "data.overlong=truncate"],
        "{file}: no sample is left of 4 rows (4 nothing to train after the cut); raise data.max_length.",
    ),
    "template refuses": (
        "rows.jsonl",
        lines(GOOD, turns(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))),
        ["model.chat_template={folder}/refuses.jinja"],
        "{file} line 2: the chat template refuses this conversation (no system turns here).",
    ),
    "template hides": (
        "rows.jsonl",
        lines(GOOD),
        ["model.chat_template={folder}/hides.jinja"],
        "{file} line 1: the chat template does not show messages[1] as it was written (…",
    ),
    "template is no template": (
        "rows.jsonl",
        lines(GOOD),
        ["model.chat_template={folder}/broken.jinja"],
        "model.chat_template…",
    ),
    "gzip cut short": (
        "rows.jsonl.gz",
        gzip.compress(lines(*[GOOD] * 500), mtime=0)[:-30],
        [],
        "{file}: not a whole gzip file (…",
    ),
    "gzip of something else": ("rows.jsonl.gz", lines(GOOD), [], "{file}: not a whole gzip file (…"),
    "gzip damaged": (
        "rows.jsonl.gz",
        gzip.compress(lines(*[GOOD] * 500), mtime=0)[:10] + b"\x07" * 30,  # a kind of block that there is not
        [],
        "{file}: not a whole gzip file (…",
    ),
    "half a character": (
        "rows.jsonl",
        lines(GOOD)
        + b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "Hi"}]}\n',
        [],
        "{file} line 2: …",
    ),
}
JINJA = {
    "refuses": "{%- for m in messages -%}{%- if m.role == 'system' -%}{{ raise_exception('no system turns here') }}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}",
    "rewrites": "{%- for m in messages -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' -}}{%- endfor -%}",
    "hides": "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content | length | string -}}{%- endfor -%}",
    "broken": "{%- for m in messages -%}{{- m.content -}}",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_end_in_a_sentence(name: str, tmp_path: Path, cache_dir: Path) -> None:
    file_name, content, overrides, sentence = BAD[name]
    for stem, text in JINJA.items():
        (tmp_path / f"{stem}.jinja").write_text(text)
    file = tmp_path / file_name
    file.write_bytes(content)
    fill = {"{file}": str(file), "{folder}": str(tmp_path)}
    for sign, value in fill.items():
        sentence = sentence.replace(sign, value)
        overrides = [o.replace(sign, value) for o in overrides]
    with pytest.raises(UserError) as error:
        tokenised(config_of(file, cache_dir, *overrides))
    said = str(error.value)
    if sentence.endswith("…"):
        assert said.startswith(sentence[:-1])
    elif sentence.startswith("…"):
        assert said.startswith(str(file)) and said.endswith(sentence[1:])
    else:
        assert said == sentence
    assert said.endswith(".") and "\n" not in said
    assert whole_folders(cache_dir) == []
    assert not list((cache_dir / "tokenized").glob("*.tmp-*"))


def test_empty_file(tmp_path: Path, cache_dir: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(GOOD))
    config = config_of(file, cache_dir)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"rows\.jsonl: the file is empty\."):
        config_of(file, cache_dir)
    with pytest.raises(UserError, match=r"rows\.jsonl: the file has no rows\."):
        tokenised(config)


def test_a_file_that_is_not_utf8_far_in_is_named_with_the_place(tmp_path: Path, cache_dir: Path) -> None:
    file = tmp_path / "rows.jsonl"
    head = lines(*[GOOD] * 400)
    file.write_bytes(head + b'{"messages": "\xe9"}\n')
    with pytest.raises(UserError) as error:
        tokenised(config_of(file, cache_dir))
    assert "not UTF-8" in str(error.value)
    assert "line 401" in str(error.value) or f"byte {len(head) + 14}" in str(error.value)


def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path: Path, cache_dir: Path) -> None:
    for name, content in [("rows.jsonl", lines(GOOD)), ("rows.json", json.dumps([GOOD]).encode())]:
        file = tmp_path / name
        file.write_bytes(b"\xef\xbb\xbf" + content)
        assert len(tokenised(config_of(file, cache_dir))[0]) == 1


def test_a_cache_folder_that_is_a_file(tmp_path: Path) -> None:
    file, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    file.write_bytes(lines(GOOD))
    cache.write_text("not a folder")
    with pytest.raises(UserError, match="data.cache_dir="):
        tokenised(config_of(file, cache))


def test_a_cache_folder_where_none_can_be(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(GOOD))
    config = config_of(file, Path("/proc/none"))
    scratch = tmp_path / "scratch"
    with pytest.raises(UserError, match=r"data\.cache_dir=/proc/none: /proc/none is no folder that can be written to"):
        assemble(config, scratch, print)


def test_bad_row_found_by_a_worker_process(tmp_path: Path, cache_dir: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*[GOOD] * 1300, turns(("user", "Hi")), *[GOOD] * 700))
    with pytest.raises(UserError, match=r"rows\.jsonl line 1301: no assistant turn"):
        tokenised(config_of(file, cache_dir, "data.num_workers=2"))


# --- what becomes of rows --------------------------------------------------------------------------------------------

# "<|im_start|>user\n…<|im_end|>\n<|im_start|>assistant\n…<|im_end|>\n" is 21 tokens around the two contents; the answer
# starts 19 tokens after the question's length and its end-of-turn token is trained with it.
MIXED = [
    conversation("a" * 3, "b" * 10),  # 34 tokens
    conversation("a" * 10, "b" * 60),  # 91 tokens, cut inside the answer
    conversation("a" * 60, "b" * 5),  # 86 tokens, cut before the answer
    conversation("a" * 33, "b" * 10),  # 64 tokens
]


def test_overlong_drop(tmp_path: Path, cache_dir: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*MIXED))
    samples, said = tokenised(config_of(file, cache_dir, "data.max_length=64", "data.overlong=drop"))
    assert samples.lengths.tolist() == [34, 64]
    assert samples.summary.trained_tokens == 22
    assert [samples[i].trained.tolist() for i in range(2)] == [[[22, 33]], [[52, 63]]]
    assert said == [
        "data: 2 of 4 rows used, 2 dropped (longer than 64 tokens); 98 tokens, 22.4% trained, longest 64 (format messages)"
    ]


def test_overlong_truncate(tmp_path: Path, cache_dir: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*MIXED))
    samples, said = tokenised(config_of(file, cache_dir, "data.max_length=64", "data.overlong=truncate"))
    assert samples.lengths.tolist() == [34, 64, 64]
    assert samples.summary.trained_tokens == 57
    assert [samples[i].trained.tolist() for i in range(3)] == [[[22, 33]], [[29, 64]], [[52, 63]]]
    summary = samples.summary
    assert (summary.read, summary.used, summary.cut) == (4, 3, 1)
    assert summary.dropped == {"nothing to train after the cut": 1}
    assert said == [
        "data: 3 of 4 rows used, 1 dropped (nothing to train after the cut), 1 cut; 162 tokens, 35.2% trained, longest 64 "
        "(format messages)"
    ]


def test_overlong_error_names_the_first(tmp_path: Path, cache_dir: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*MIXED))
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: 91 tokens, more than data\.max_length=64"):
        tokenised(config_of(file, cache_dir, "data.max_length=64", "data.overlong=error"))


def test_a_batch_of_which_every_row_is_dropped(tmp_path: Path, cache_dir: Path) -> None:
    file = tmp_path / "rows.jsonl"
    long = [conversation("a" * 60, "b" * 60)]
    rows = (
        long * 1100 + [conversation("a", "b" * i) for i in range(1, 11)] + long * 1100 + [conversation("a", "b" * 11)]
    )
    file.write_bytes(lines(*rows))
    samples, _ = tokenised(config_of(file, cache_dir, "data.max_length=64"))
    assert samples.lengths.tolist() == [22 + i for i in range(1, 12)]
    assert [len(samples[i].input_ids) for i in range(11)] == [22 + i for i in range(1, 12)]
    assert samples.summary.dropped == {"longer than 64 tokens": 2200}


def test_begin_and_end_tokens(tmp_path: Path, cache_dir: Path) -> None:
    """<|begin_of_text|> (256) is not trained; <|im_end|> (258) closes the answer and is trained."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(conversation("ab", "cd")))
    words = ["model.chat_template=null", "data.add_bos=true", "data.add_eos=true"]
    sample = tokenised(config_of(file, cache_dir, *words))[0][0]
    assert sample.input_ids[[0, -1]].tolist() == [256, 258]
    assert len(sample.input_ids) == 6 and sample.trained.tolist() == [[3, 6]]


def test_formats_are_the_same_rows(tmp_path: Path, cache_dir: Path) -> None:
    """JSON lines, an array, gzip of either, Alpaca columns, a format found by its columns: the same tokens."""
    conversations = [conversation(f"Question {i} é😀", f"Answer {i}\u2028中") for i in range(5)]
    alpaca = [{"instruction": f"Question {i}", "input": "é😀", "output": f"Answer {i}\u2028中"} for i in range(5)]
    as_one = [
        conversation(f"Question {i}\né😀", f"Answer {i}\u2028中") for i in range(5)
    ]  # what the reader makes of the Alpaca rows
    files = {
        "a.jsonl": (lines(*conversations), "data=messages"),
        "b.json": (json.dumps(conversations, indent=1).encode(), "data=messages"),
        "c.jsonl.gz": (gzip.compress(lines(*conversations)), "data.reader=null"),
        "d.json": (json.dumps(alpaca).encode(), "data=alpaca"),
        "e.jsonl": (lines(*alpaca), "data.reader=null"),
        "f.json": (b"\n \n" + json.dumps(as_one, ensure_ascii=False).encode(), "data=messages"),
    }
    got = {}
    for name, (content, choice) in files.items():
        (tmp_path / name).write_bytes(content)
        got[name] = contents(tokenised(config_of(tmp_path / name, cache_dir, choice))[0])
    assert got["a.jsonl"] == got["b.json"] == got["c.jsonl.gz"]
    assert got["d.json"] == got["e.jsonl"] == got["f.json"]
    assert got["a.jsonl"] != got["d.json"]


def contents(samples: Samples) -> list[tuple[list[int], list[list[int]]]]:
    return [(samples[i].input_ids.tolist(), samples[i].trained.tolist()) for i in range(len(samples))]


# --- the cache -------------------------------------------------------------------------------------------------------


def made_at(cache: Path) -> dict[str, int]:
    """Return what tells one making of each cached file from another."""
    return {p.parent.name: p.stat().st_ino ^ p.stat().st_mtime_ns for p in cache.rglob("samples.arrow")}


def test_the_cache_is_used_again(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*MIXED))
    config = config_of(file, cache_dir)
    first, said = tokenised(config)
    before = made_at(cache_dir)

    def refuse(*_: Any) -> None:
        raise AssertionError("rows are tokenised again")

    monkeypatch.setattr("engine.data.cache.Encoder.__call__", refuse)
    second, said_again = tokenised(config)
    assert contents(first) == contents(second) and said == said_again
    assert made_at(cache_dir) == before and len(before) == 1
    with pytest.raises(AssertionError, match="tokenised again"):
        tokenised(config_of(file, cache_dir, "data.cache=rebuild"))


def test_cache_rebuild_makes_the_same_anew(tmp_path: Path, cache_dir: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*MIXED))
    first, _ = tokenised(config_of(file, cache_dir))
    before = made_at(cache_dir)
    second, _ = tokenised(config_of(file, cache_dir, "data.cache=rebuild"))
    after = made_at(cache_dir)
    assert before.keys() == after.keys() and before != after
    assert contents(first) == contents(second)


def test_cache_rebuild_mends_a_damaged_one(tmp_path: Path, cache_dir: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*MIXED))
    first = contents(tokenised(config_of(file, cache_dir))[0])
    (arrow,) = cache_dir.rglob("samples.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(UserError, match="not a whole cache of tokenised data .*; set data.cache=rebuild"):
        tokenised(config_of(file, cache_dir))
    assert contents(tokenised(config_of(file, cache_dir, "data.cache=rebuild"))[0]) == first


def test_cache_off_leaves_the_cache_alone(tmp_path: Path, cache_dir: Path) -> None:
    file, scratch = tmp_path / "rows.jsonl", tmp_path / "scratch"
    file.write_bytes(lines(*MIXED))
    config = config_of(file, cache_dir, "data.cache=off")
    first = assemble(config, scratch, lambda _: None).sources["train"]
    before = made_at(scratch)
    assert not cache_dir.exists() and len(before) == 1 and len(first) == 4
    second = assemble(config, scratch, lambda _: None).sources["train"]
    assert made_at(scratch) != before
    assert contents(first) == contents(second)


def test_the_same_rows_to_train_and_to_validate_on_are_made_once(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, build = [], cache.build

    def counted(target: Path, *rest: Any) -> None:
        made.append(target)
        build(target, *rest)

    monkeypatch.setattr("engine.data.cache.build", counted)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*MIXED))
    for mode, times in (("rebuild", 1), ("rebuild", 2), ("off", 3), ("use", 3)):
        words = [f"data.cache={mode}", f"data.val_path={file}", "data.val_split=validation"]
        data = assemble(config_of(file, cache_dir, *words), tmp_path / "scratch", lambda _: None)
        assert len(made) == times
        assert contents(data.sources["train"]) == contents(data.sources["validation"])


class Ended(BaseException):
    """What stands for a SIGKILL: it comes at a moment that is known."""


def halfway(folder: Path, *_: Any, **__: Any) -> None:
    """Remove a file of a folder, and end."""
    with contextlib.suppress(FileNotFoundError):
        next(Path(folder).iterdir()).unlink()
        raise Ended


def test_ended_while_an_entry_is_removed(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*MIXED))
    first = contents(tokenised(config_of(file, cache_dir))[0])
    with monkeypatch.context() as patched:
        patched.setattr("engine.data.cache.shutil.rmtree", halfway)
        with pytest.raises(Ended):
            tokenised(config_of(file, cache_dir, "data.cache=rebuild"))
    assert len(list(cache_dir.glob("tokenized/*.tmp-*"))) == 1
    assert contents(tokenised(config_of(file, cache_dir))[0]) == first
    with monkeypatch.context() as patched:
        patched.setattr("engine.data.cache.shutil.rmtree", halfway)
        with pytest.raises(Ended):
            cache.remove(next(entry for entry in cache.entries(cache_dir) if entry.whole))
    assert whole_folders(cache_dir) == []
    assert contents(tokenised(config_of(file, cache_dir))[0]) == first
    assert not list(cache_dir.glob("tokenized/*.tmp-*"))


def test_no_lock_is_taken_to_read(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*MIXED))
    tokenised(config_of(file, cache_dir))
    (lock,) = cache_dir.glob("tokenized/*.lock")
    assert lock.stat().st_mode & 0o777 == 0o666

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("engine.data.cache.fcntl.lockf", refuse)
    assert len(tokenised(config_of(file, cache_dir))[0]) == 4
    with pytest.raises(
        UserError, match=r"data\.cache_dir=.*/cache: its file system has no locks \(No locks available\); "
    ):
        tokenised(config_of(file, cache_dir, "data.cache=rebuild"))


def test_bad_rows_that_were_skipped_are_named_to_a_run_that_refuses_them(tmp_path: Path, cache_dir: Path) -> None:
    """And where there are none, both take the same entry."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(GOOD, turns(("user", "Hi")), GOOD))
    skip = config_of(file, cache_dir, "data.bad_rows=skip")
    assert len(tokenised(skip)[0]) == 2
    before = made_at(cache_dir)
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: no assistant turn"):
        tokenised(config_of(file, cache_dir))
    assert len(tokenised(skip)[0]) == 2 and made_at(cache_dir) == before
    file.write_bytes(lines(GOOD, GOOD))
    tokenised(config_of(file, cache_dir))
    before = made_at(cache_dir)
    tokenised(skip)
    assert made_at(cache_dir) == before and len(before) == 2


def test_files_of_the_tokenizer_in_the_key(tmp_path: Path, cache_dir: Path) -> None:
    file, tokenizer = tmp_path / "rows.jsonl", tmp_path / "tokenizer"
    file.write_bytes(lines(GOOD))
    shutil.copytree(TOKENIZER["folder"], tokenizer)
    (tokenizer / "additional_chat_templates").mkdir()

    def key(*words: str) -> str:
        config = config_of(file, cache_dir, f"model.tokenizer={tokenizer}", *words)
        return cache._key(config, sources.of(config.data, "train")[0], None, hub.tokenizer_folder(config.model))

    keys = [key()]
    for name, text in (
        ("added_tokens.json", "{}"),
        ("vocab.json", "{}"),
        ("merges.txt", ""),
        ("additional_chat_templates/tool_use.jinja", ""),
        ("config.json", '{"model_type": "llama"}'),
        ("config.json", '{"model_type": "qwen3"}'),
        ("config.json", '{"model_type": "qwen3", "tokenizer_class": "A"}'),
        (
            "config.json",
            '{"model_type": "qwen3", "tokenizer_class": "A", "auto_map": {"AutoTokenizer": ["a.A", null]}}',
        ),
    ):
        (tokenizer / name).write_text(text)
        keys.append(key())
    assert len(set(keys)) == len(keys)
    (tokenizer / "config.json").write_text((tokenizer / "config.json").read_text()[:-1] + ', "num_hidden_layers": 2}')
    (tokenizer / "a.py").write_text("class A: ...")
    (tokenizer / "model.safetensors").write_bytes(b"weights")
    assert key() == keys[-1]
    trusted = key("model.trust_remote_code=true")
    (tokenizer / "a.py").write_text("class A: pass")
    assert key() == keys[-1] and len({keys[-1], trusted, key("model.trust_remote_code=true")}) == 3
    assert key("data.bad_rows=skip", "data.num_workers=3", "data.train_split=all") == keys[-1] != key("data.limit=1")


def test_the_code_of_a_reader_in_the_key(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is defined, not only where it is named."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(GOOD))
    (tmp_path / "reader_defined.py").write_text("def read(row):\n    return row\n")
    (tmp_path / "reader_named.py").write_text(
        "from functools import partial\nfrom reader_defined import read\nother = partial(read)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def key(name: str) -> str:
        config = config_of(file, cache_dir, f"data.reader=reader_named:{name}")
        return cache._key(config, sources.of(config.data, "train")[0], None, hub.tokenizer_folder(config.model))

    before, other = key("read"), key("other")
    with (tmp_path / "reader_defined.py").open("a") as stream:
        stream.write("# changed\n")
    assert key("read") != before and key("other") == other  # a partial: its module alone
    with (tmp_path / "reader_named.py").open("a") as stream:
        stream.write("# changed\n")
    assert key("other") != other


@pytest.mark.parametrize(
    "change",
    [
        "data.max_length=100",
        "data.overlong=truncate",
        "data.train_on=last_assistant",
        "data.add_bos=true",
        "data.add_eos=true",
        "data.reader=null",
        "model.chat_template=null",
        "model.template_args={date: today}",
        "model.chat_template='{{ messages[0].content }}{{ messages[1].content }}'",
    ],
)
def test_what_can_change_a_token_changes_the_key(change: str, tmp_path: Path, cache_dir: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*MIXED))
    tokenised(config_of(file, cache_dir))
    tokenised(config_of(file, cache_dir, change))
    assert len(whole_folders(cache_dir)) == 2


def test_the_rows_the_template_and_the_tokenizer_change_the_key(tmp_path: Path, cache_dir: Path) -> None:
    file, template = tmp_path / "rows.jsonl", tmp_path / "t.jinja"
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for source in TOKENIZER["folder"].iterdir():
        (tokenizer / source.name).write_bytes(source.read_bytes())
    template.write_text("{{ messages[0].content }} {{ messages[1].content }}")
    words = [f"model.chat_template={template}", f"model.tokenizer={tokenizer}"]
    file.write_bytes(lines(*MIXED))

    def folders_after() -> int:
        tokenised(config_of(file, cache_dir, *words))
        return len(whole_folders(cache_dir))

    assert folders_after() == 1
    file.write_bytes(lines(*MIXED, GOOD))
    assert folders_after() == 2
    template.write_text("{{ messages[0].content }}{{ messages[1].content }}")
    assert folders_after() == 3
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|eot_id|>"}))
    assert folders_after() == 4
    file.write_bytes(lines(*MIXED))
    assert folders_after() == 5
    assert folders_after() == 5


@pytest.mark.parametrize(
    "change", ["data.num_workers=1", "run.seed=5", "data.shuffle=false", "train.global_batch_size=4"]
)
def test_what_changes_no_token_keeps_the_key(change: str, tmp_path: Path, cache_dir: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*MIXED))
    tokenised(config_of(file, cache_dir))
    before = made_at(cache_dir)
    tokenised(config_of(file, cache_dir, change))
    assert made_at(cache_dir) == before


def test_one_and_two_workers_give_identical_samples(tmp_path: Path, cache_dir: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines(*(conversation(f"Question {i}", f"Answer {i} " * (1 + i % 9)) for i in range(2600))))
    one, said_one = tokenised(config_of(file, cache_dir, "data.num_workers=1"))
    two, said_two = tokenised(config_of(file, cache_dir, "data.num_workers=2", "data.cache=rebuild"))
    assert len(one) == 2600 and said_one == said_two
    assert contents(one) == contents(two)


# --- processes -------------------------------------------------------------------------------------------------------

NURSERY = """
import hashlib, json, os, signal, sys, traceback
from pathlib import Path
from engine import cache
from engine.config.compose import compose
from engine.data.assemble import assemble
from engine.data.samples import Samples
from transformers import AutoTokenizer

def digest(samples):
    found = hashlib.sha256()
    for i in range(len(samples)):
        found.update(samples[i].input_ids.tobytes() + samples[i].trained.tobytes())
    return f"{len(samples)} {found.hexdigest()}"

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    words, scratch, answer, uid = json.loads(line)
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        sys.stdout = sys.stderr  # stdout is for the numbers of processes
        if words[0] == "prune":
            cache.main(words)
            os._exit(0)
        config = compose(words).config
        if uid:
            assemble(config, Path(scratch), lambda _: None)  # imports what that user may not
            os.setuid(uid)
        text = digest(assemble(config, Path(scratch), lambda _: None).sources["train"])
        Path(answer + ".part").write_text(text)
        os.rename(answer + ".part", answer)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
"""
NUM_ROWS = 1600


class Nursery:
    """A process that has imported everything and forks one that tokenises on demand: a start in milliseconds."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self.started: list[int] = []

    def start(self, words: list[str], answer: Path, uid: int = 0) -> int:
        """Start a process that prunes, or tokenises as some user: its samples' number and hash end up in the file ``answer``."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([words, str(answer) + "-scratch", str(answer), uid]) + "\n")
        self.process.stdin.flush()
        self.started.append(int(self.process.stdout.readline()))
        return self.started[-1]

    def end(self) -> None:
        """End it, the processes it started and those that they started, which share their process group."""
        for pid in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


def alive(pid: int) -> bool:
    """Tell whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.002)
    return value


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.end()


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("many") / "rows.jsonl"
    file.write_bytes(lines(*(conversation(f"Question {i}", f"Answer {i} " * (1 + i % 9)) for i in range(NUM_ROWS))))
    return file


def answer_of(pid: int, answer: Path, timeout_s: float = 60) -> str:
    """Return what a process that ends by itself answered."""
    wait_for(lambda: not alive(pid), "the end of a process that tokenises", timeout_s)
    return answer.read_text()


@pytest.fixture(scope="module")
def truth(nursery: Nursery, many_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What an undisturbed run answers."""
    folder = tmp_path_factory.mktemp("truth")
    text = answer_of(
        nursery.start([*words_for(many_rows, folder / "cache"), "data.num_workers=1"], folder / "answer"),
        folder / "answer",
    )
    assert text.split()[0] == str(NUM_ROWS)
    return text


@pytest.mark.parametrize("num_workers", [1, 2])
def test_two_processes_at_once_end_with_the_same_samples(
    num_workers: int, nursery: Nursery, many_rows: Path, tmp_path: Path, cache_dir: Path, truth: str
) -> None:
    answers = [tmp_path / "first", tmp_path / "second"]
    pids = [
        nursery.start([*words_for(many_rows, cache_dir), f"data.num_workers={num_workers}"], answer)
        for answer in answers
    ]
    assert [answer_of(pid, answer) for pid, answer in zip(pids, answers, strict=True)] == [truth, truth]
    assert len(whole_folders(cache_dir)) == 1
    assert not list(cache_dir.rglob("*.tmp-*"))


def test_killed_at_any_moment_leaves_nothing_that_looks_whole(
    nursery: Nursery, many_rows: Path, tmp_path: Path, cache_dir: Path, truth: str
) -> None:
    """SIGKILL at 20 moments of tokenising, one after another on the same folder, and at 10 of removing."""
    words = [*words_for(many_rows, cache_dir), "data.num_workers=1"]
    prune = ["prune", f"--cache-dir={cache_dir}", "--older-than=0"]
    answer, moments, killed_inside = tmp_path / "answer", random.Random(0), 0

    def kill(words: list[str], after_s: float) -> bool:
        """Start a process and kill it; returns whether that came before its end."""
        pid = nursery.start(words, tmp_path / "killed")
        time.sleep(after_s)
        inside = alive(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid), "the end of a killed process")
        for folder in whole_folders(cache_dir):
            assert len(Samples(folder)) == NUM_ROWS
        return inside

    started = time.monotonic()
    assert answer_of(nursery.start(words, answer), answer) == truth
    duration_s = time.monotonic() - started
    for i in range(20):
        rebuild = i % 2 == 1
        if not rebuild:  # what there is has to go before it can be made
            kill(prune, moments.uniform(0, 0.02))
            assert command.main(prune) == 0 and not whole_folders(cache_dir)
        mode = ["data.cache=rebuild" if rebuild else "data.cache=use", f"data.num_workers={1 + i // 2 % 2}"]
        killed_inside += kill([*words[:-1], *mode], moments.uniform(0, duration_s))
        answer.unlink()
        assert answer_of(nursery.start(words, answer), answer) == truth, i
        assert len(whole_folders(cache_dir)) == 1
    assert killed_inside >= 10
    assert command.main(["prune", f"--cache-dir={cache_dir}"]) == 0
    assert len(whole_folders(cache_dir)) == 1 and not list(cache_dir.rglob("*.tmp-*"))
    answer.unlink()
    assert answer_of(nursery.start(words, answer), answer) == truth


def open_to_others(path: Path) -> bool:
    """Tell whether another user may read what lies below a folder."""
    return all(folder.stat().st_mode & 0o001 for folder in (path.resolve(), *path.resolve().parents))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.skipif(not all(map(open_to_others, (Path(sys.prefix), ROOT))), reason="others may not read the packages")
def test_another_user_reads_a_cache_that_only_its_owner_may_write(
    nursery: Nursery, many_rows: Path, truth: str
) -> None:
    nobody = 65534
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        root = Path(folder)
        root.chmod(0o755)
        rows, answers = root / "rows.jsonl", root / "answers"
        shutil.copy(many_rows, rows)
        shutil.copytree(TOKENIZER["folder"], root / "tokenizer").chmod(0o755)
        answers.mkdir()
        answers.chmod(0o777)
        words = [*words_for(rows, root / "cache"), f"model.tokenizer={root / 'tokenizer'}"]
        assert answer_of(nursery.start(words, answers / "owner"), answers / "owner") == truth
        assert answer_of(nursery.start(words, answers / "other", nobody), answers / "other") == truth
        (lock,) = (root / "cache").glob("tokenized/*.lock")
        lock.chmod(0o600)
        assert answer_of(nursery.start(words, answers / "third", nobody), answers / "third") == truth
        lock.chmod(0o666)
        lock.parent.chmod(0o777)  # a cache that all may write: what is one user's, another one may make anew
        anew = [*words, "data.cache=rebuild"]
        assert answer_of(nursery.start(anew, answers / "anew", nobody), answers / "anew") == truth
        assert whole_folders(root / "cache")[0].stat().st_uid == nobody


def test_killed_with_worker_processes_does_not_lock_out_the_next(
    nursery: Nursery, many_rows: Path, tmp_path: Path, cache_dir: Path, truth: str
) -> None:
    """The processes that tokenise for a killed one end with it, and the lock is free."""
    killed = nursery.start([*words_for(many_rows, cache_dir), "data.num_workers=2"], tmp_path / "killed")
    children = Path(f"/proc/{killed}/task/{killed}/children")
    helpers = wait_for(lambda: [int(pid) for pid in children.read_text().split()], "worker processes")
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: not alive(killed), "the end of a killed process")
    assert whole_folders(cache_dir) == []
    following = nursery.start([*words_for(many_rows, cache_dir), "data.num_workers=1"], tmp_path / "answer")
    assert answer_of(following, tmp_path / "answer", timeout_s=20) == truth
    wait_for(lambda: not any(map(alive, helpers)), "the end of the worker processes of a killed one", timeout_s=5)
