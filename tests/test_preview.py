"""The preview: what it marks as trained is what is trained, on a terminal, in a log and on the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import compose
from engine.data import cache
from engine.data.loader import Loader
from engine.preview import look, terminal
from engine.preview.__main__ import main
from engine.types import Sample
from tests.data.chat_fixtures import tokenizer_named

HOSTILE = "</script><b>\"bold\"</b> & 'so' <!-- -->"
UNICODE = "naïve café 日本語 👩🏽‍🚀 नमस्ते e\u0301"


def write(folder: Path, *turns: list[str], name: str = "rows.jsonl") -> Path:
    """Write conversations of user and assistant turns."""
    file = folder / name
    roles = ("user", "assistant")
    rows = [{"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]} for texts in turns]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def marked(out: str) -> list[str]:
    """Return the texts that a log marks as trained."""
    return re.findall("⟦(.*?)⟧", out[out.index("── conversation") :], re.DOTALL)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run the command; returns exit code, output and errors."""
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(w) for w in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def small(base: list[str], tmp_path: Path) -> Callable[..., list[str]]:
    """Return overrides for conversations of a test's own."""

    def overrides(*turns: list[str], batch: int | None = None) -> list[str]:
        words = [w for w in base if not w.startswith(("data.train_path", "train.global_batch_size"))]
        size = batch or len(turns)
        return [*words, f"data.train_path={write(tmp_path, *turns)}", f"train.global_batch_size={size}"]

    return overrides


class Page(HTMLParser):
    """Reads a page: balanced tags, attributes, and the text of what it marks as trained."""

    VOID = {"meta", "link", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.trained: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag in self.VOID:
            return
        self.open.append((tag, dict(attrs)))
        if self._is_trained(tag, dict(attrs)):
            self.trained.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        classes = {str(attrs.get("class")) for _, attrs in self.open}
        tags = {tag for tag, _ in self.open}
        if "style" in tags:
            return
        self.text += data
        if any(self._is_trained(tag, attrs) for tag, attrs in self.open) and "label" not in classes and "u" not in tags:
            self.trained[-1] += data

    @staticmethod
    def _is_trained(tag: str, attrs: dict[str, str | None]) -> bool:
        return tag == "mark" or attrs.get("class") == "tokens block yes"


def test_a_log_shows_exactly_what_is_trained(
    run: Callable[..., tuple[int, str, str]], small: Callable[..., list[str]]
) -> None:
    overrides = small(["One?", "First answer.", "Two? \nThree?", f"Second\n\nanswer, {UNICODE}"])
    code, out, _ = run(*overrides, "data.train_on=all_assistant")
    assert code == 0 and "\x1b" not in out
    assert marked(out) == [
        "First answer.<|im_end|>",
        f"Second↵\n↵\nanswer, {UNICODE}<|im_end|>",
    ]
    assert "Two?·↵\nThree?" in out
    assert "first 1,000 rows" in out and "train: 1 of 1 rows used" in out
    _, out, _ = run(*overrides, "data.train_on=last_assistant")
    assert len(marked(out)) == 1 and "⟦Second" in out


def test_a_terminal_has_colours_and_no_brackets(
    run: Callable[..., tuple[int, str, str]], small: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = small(["One?", "an\x1b[31m answer"])
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = run(*overrides)
    assert "\x1b[1;32man" in out and "⟦an" not in out and "⟦" not in out.split("──")[1]
    assert "␛[31m" in out.replace("\x1b[32m", "").replace("\x1b[1;32m", "").replace("\x1b[0m", "")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in (plain := run(*overrides)[1]) and "⟦an␛[31m answer<|im_end|>⟧" in plain


def test_num_shows_as_many_conversations_beyond_the_first_step(
    run: Callable[..., tuple[int, str, str]], base: list[str]
) -> None:
    def shown(*words: object) -> int:
        return len(re.findall(r"^── conversation", run(*base, *words)[1], re.MULTILINE))

    assert [shown("--num", 1), shown(), shown("--num", 11), shown("--num", 100)] == [1, 3, 11, 40]
    code, _, err = run(*base, "--num", 0)
    assert code == 2 and err == "error: --num 0: give 1 or more.\n"


def test_examples_are_those_of_the_first_step_and_packing_is_the_loaders(base: list[str], tmp_path: Path) -> None:
    composed = compose.compose(base)
    found = look.look(composed, tmp_path, num=8, say=lambda text: None)
    train: Loader = found.train
    shown = [sum((list(p.ids) for p in document.pieces), []) for document in found.documents]
    assert shown == [train.data[i].input_ids.tolist() for i in train.documents(0).tolist()]
    assert len(found.steps) == 2
    for step, (count, bins) in enumerate(found.steps):
        batches = train.step(step)
        assert count == len(batches) and [b.lengths for b in bins] == [
            np.diff(batch.cu_seqlens).tolist() for batch in batches
        ]
        assert [sum(b.lengths) for b in bins] == [batch.num_tokens for batch in batches]
        assert all(b.capacity == train.capacity >= sum(b.lengths) for b in bins)
    trained = sum(batch.targets.num_tokens for batch in train.step(0))
    assert sum(document.num_trained for document in found.documents) == trained
    assert sum(len(p.ids) for d in found.documents for p in d.pieces if p.weight is not None) == trained


def test_pairs_stay_together_behind_one_prompt(base: list[str], tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"why {i}?", "chosen": "yes " * (i % 5 + 1), "rejected": "no " * (i % 3 + 1)} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [w for w in base if not w.startswith("data")]
    words = [*own, "algorithm=dpo", "data=binary_preference", f"data.train_path={file}", "data.max_length=64"]
    found = look.look(compose.compose([*words, "data.packing.max_tokens=128"]), tmp_path, say=lambda text: None)
    batches = found.train.step(0)
    assert len(batches) > 1 and all(batch.shared for batch in batches)
    assert [b.lengths for b in found.steps[0][1]] == [np.diff(batch.cu_seqlens).tolist() for batch in batches]


def test_padding_and_ranks_are_shown_as_they_will_be(run: Callable[..., tuple[int, str, str]], base: list[str]) -> None:
    _, out, _ = run(*base, "data.packing.enabled=false", "train.micro_batch_size=4")
    assert "4 documents" in out and "places" in out
    _, out, _ = run(*base, "cluster=ray_local", "cluster.num_workers=2")
    assert "rank 0, micro-batch 1" in out and "rank 1, micro-batch 1" in out


def test_only_the_first_rows_are_read_unless_all_are_asked_for(
    run: Callable[..., tuple[int, str, str]], base: list[str], tmp_path: Path
) -> None:
    turns = [[f"question {i}", f"answer {i}"] for i in range(1_200)]
    file = write(tmp_path, *turns)
    file.write_text(file.read_text() + "no JSON\n")  # beyond what is looked at
    overrides = [*base, f"data.train_path={file}", f"data.cache_dir={tmp_path / 'cache'}", "data.val_fraction=0.0001"]
    code, out, _ = run(*overrides, "train.global_batch_size=1100")
    assert code == 0 and "train: 1,000 of 1,000 rows used" in out and not (tmp_path / "cache").exists()
    code, _, err = run(*overrides, "--all")
    assert code == 2 and f"{file.name}" in err and "1201" in err
    code, out, _ = run(*overrides, "data.val_fraction=0.1", "data.bad_rows=skip", "--all")
    assert code == 0 and "1 bad ones skipped" in out and "all rows of each source" in out
    assert "the first of the 1 rows skipped" in out and "held out: " in out
    assert [entry.whole for entry in cache.entries(tmp_path / "cache")] == [True]


def test_too_few_rows_for_a_batch_are_an_error_as_in_training(
    run: Callable[..., tuple[int, str, str]], base: list[str]
) -> None:
    code, _, err = run(*base, "train.global_batch_size=64")
    assert code == 2 and "train.global_batch_size=64 is more than the 40 conversations" in err and "--all" not in err


def test_a_row_that_cannot_be_used_ends_with_its_sentence(
    run: Callable[..., tuple[int, str, str]], base: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "wizard", "content": "b"}]}\n')
    code, out, err = run(*base, f"data.train_path={file}", "--out", tmp_path / "page.html")
    assert code == 2 and err.startswith("error: ") and "wizard" in err and not (tmp_path / "page.html").exists()
    assert run(*base, "data.nonsense=1")[0] == 2
    code, _, err = run(*base, "--out", tmp_path / "nowhere" / "page.html")
    assert code == 2 and err.startswith("error: --out")


def test_the_page_is_whole_escaped_and_alone(
    run: Callable[..., tuple[int, str, str]], small: Callable[..., list[str]], tmp_path: Path
) -> None:
    answers = [f"{HOSTILE} {i}\n{UNICODE}" for i in range(3)]
    overrides = small(*([f"{HOSTILE}?", answer, "More?", "No."] for answer in answers))
    file = tmp_path / "page.html"
    code, out, _ = run(*overrides, "--out", file)
    assert code == 0 and f"wrote {file}" in out
    text = file.read_text()
    page = Page(text)
    assert not re.search(r"https?://|@import|url\(", text) and "script" not in page.tags and "b" in page.tags
    loads = {(name, value) for name, value in page.attributes if name in ("src", "href", "onclick", "onload")}
    assert loads == {("href", "data:,")}  # the icon, so that none is asked for
    assert text.startswith("<!DOCTYPE html>") and ("lang", "en") in page.attributes and "<title>" in text
    assert sorted(page.trained) == sorted([f"{answer}<|im_end|>" for answer in answers] + ["No.<|im_end|>"] * 3)
    assert HOSTILE not in text and HOSTILE in page.text
    assert any(name == "title" and value.startswith("token ") for name, value in page.attributes)
    assert len(text) < 300_000


def test_the_page_shows_long_documents_whole(
    run: Callable[..., tuple[int, str, str]], small: Callable[..., list[str]], tmp_path: Path
) -> None:
    overrides = small(*(["x" * 100, "a sentence " * 380] for _ in range(64)))
    words = ["data.max_length=4400", "+model.config_overrides.max_position_embeddings=8192", "model.init=random"]
    file = tmp_path / "page.html"
    code, out, err = run(*overrides, *words, "--out", file)
    assert code == 0, err
    assert "step 1: 16 of 64 micro-batches" in out
    assert [t.count("a sentence") for t in Page(file.read_text()).trained] == [380] * 3


def test_sources_take_turns_and_are_named(
    run: Callable[..., tuple[int, str, str]], base: list[str], tmp_path: Path
) -> None:
    one = write(tmp_path, *([f"q {i}", "from one"] for i in range(20)), name="one.jsonl")
    two = write(tmp_path, *([f"q {i}", "from two"] for i in range(10)), name="two.jsonl")
    words = [w for w in base if not w.startswith("data.train_path")]
    file = tmp_path / "page.html"
    code, out, err = run(*words, f"data.train=[{{path: {one}}},{{path: {two}}}]", "--num", 4, "--out", file)
    assert code == 0, err
    assert re.findall("conversation [0-9] from (one|two)", out) == ["one", "two", "one", "two"]
    assert re.findall("⟦from (one|two)", out) == ["one", "two", "one", "two"]
    assert "train/one: 20 of 20 rows used" in out and "train/two: 10 of 10" in out
    page = Page(file.read_text())
    assert any(value.endswith("tokens, two") for name, value in page.attributes if name == "title")


def test_a_conversation_in_several_documents_shows_each(
    run: Callable[..., tuple[int, str, str]], small: Callable[..., list[str]], tmp_path: Path
) -> None:
    template = tmp_path / "forgets.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: "
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    overrides = small(["q1", "<think>hm</think>a1", "q2", "<think>so</think>a2"])
    code, out, err = run(*overrides, f"model.chat_template={template}")
    assert code == 0, err
    assert "conversation 1, turn 1 of 2" in out and "conversation 1, turn 2 of 2" in out
    assert marked(out) == ["<think>hm</think>a1<|im_end|>", "<think>so</think>a2<|im_end|>"]


def test_tokens_without_a_text_are_decoded(
    run: Callable[..., tuple[int, str, str]], base: list[str], tmp_path: Path
) -> None:
    ids = [*"Ångström 🙂".encode()]
    labels = [-100] * 5 + ids[5:]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    words = [w for w in base if not w.startswith(("data=", "data.train_path", "train.global_batch_size"))]
    page = tmp_path / "page.html"
    words += ["data=pretokenized", f"data.train_path={file}", "train.global_batch_size=1", "--out", str(page)]
    code, out, err = run(*words)
    assert code == 0, err
    assert f"{len(ids)} tokens, {len(ids) - 5} trained" in out
    assert marked(out) == ["tröm 🙂"]
    assert Page(page.read_text()).trained == ["tröm 🙂"]


def test_weights_are_shown() -> None:
    tokenizer: Any = tokenizer_named("byte_plain")
    ids = np.array(tokenizer("ask: one two")["input_ids"], np.int32)
    ranges, weights = np.array([[5, 8], [8, 12]], np.int32), np.array([0.5, 2.0], np.float32)
    found = look.pieces(tokenizer, Sample(ids, ranges, weights))
    assert [piece.weight for piece in found] == [None] * 5 + [0.5] * 3 + [2.0] * 4
    assert terminal.text(found, colours=False).plain == "ask:·⟦×0.5 one⟧⟦×2 ·two⟧"


@pytest.mark.parametrize("name", ["byte_plain", "byte_bpe", "byte_bpe_nfc", "sentencepiece", "unigram", "metaspace"])
def test_pieces_put_together_are_what_the_tokenizer_decodes(name: str) -> None:
    tokenizer: Any = tokenizer_named(name)
    for text in (
        f"Hello  world, {UNICODE} 🏴‍☠️ \ufffd ok\n\n x",
        f"<|im_start|>user\n hi {UNICODE}<|im_end|>\n<|im_start|>assistant\n Paris is <|im_end|>",
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = look.pieces(tokenizer, Sample(np.array(ids, np.int32), np.array([[1, 3]], np.int32)))
        assert [i for piece in found for i in piece.ids] == ids
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert "".join(piece.text for piece in found) == decoded
        assert sum(len(p.ids) for p in found if p.weight is not None) == 2
        specials = [p.text for p in found if p.special and p.text.startswith("<|")]
        assert specials == re.findall(r"<\|\w+\|>", text)
        if "<unk>" not in decoded:
            assert any(piece.text == "👩🏽‍🚀" for piece in found)


def test_half_characters_and_unknown_ids_are_shown_too() -> None:
    tokenizer: Any = tokenizer_named("byte_plain")
    emoji, letter = tokenizer("🙂")["input_ids"], tokenizer("A")["input_ids"]
    ids = [*emoji[:2], 99_999, *letter]
    found = look.pieces(tokenizer, Sample(np.array(ids, np.int32), np.array([[1, 4]], np.int32)))
    assert [piece.ids for piece in found] == [(ids[0],), (ids[1],), (99_999,), (ids[3],)]
    assert found[2].text == "⟨99999⟩" and found[2].special and found[3].text == "A"
    assert "\ufffd" in found[0].text and all(piece.text for piece in found)


def test_what_cannot_be_seen_is_shown() -> None:
    texts = ["  a b", " \n", "c\t", "\r\n", "\u200b\u202e\u2028", "d\x00\x9b "]
    found = look.signed([look.Piece(ids=(0,), text=text, weight=None) for text in texts])
    shown = "".join(part for text in found for part, _ in text)
    assert shown == "··a b·↵\nc⇥␍↵\n⟨U+200B⟩⟨U+202E⟩⟨U+2028⟩d␀⟨U+009B⟩·"
