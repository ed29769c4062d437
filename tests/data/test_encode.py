"""From conversations and tokens to samples: weights, documents, cuts, and the sentence of every refusal."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import pytest
from chat_fixtures import (
    CHATML,
    LLAMA3,
    MAKERS,
    MISTRAL,
    PLAIN,
    QWEN3,
    QWEN_TOOLS,
    TEMPLATES,
    byte_plain,
    check_mask,
    tokenizer_named,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.config.compose import compose
from engine.config.schema import RunConfig
from engine.data.batch import collate_packed, collate_padded
from engine.data.conversation import Conversation, Dropped, RowError, Tokens, normal
from engine.data.encode import Encoded, Encoder, TokenMask
from engine.data.samples import trained_positions, trained_weights
from engine.data.template import Span
from engine.errors import UserError
from engine.types import Sample


@cache
def recipe() -> RunConfig:
    return compose(["model=tiny", "data=dummy"]).config


def encoder(template: str | None = CHATML, tokenizer: Any = "byte_plain", **data: Any) -> Encoder:
    """Make an encoder of a recipe with some keys of its data and ``template_args`` set."""
    config = recipe()
    args = data.pop("template_args", {})
    defaults = {"max_length": 4096, "overlong": "drop", "train_on": "all_assistant", "add_bos": False, "add_eos": False}
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={**defaults, **data}),
            "model": config.model.model_copy(update={"template_args": args}),
        }
    )
    return Encoder(tokenizer_named(tokenizer) if isinstance(tokenizer, str) else tokenizer, template, config)


def talk(*contents: Any) -> Conversation:
    """Make a conversation of user, assistant, user …; a content may be a pair with keys of the message."""
    turns = [c if isinstance(c, tuple) else (c, {}) for c in contents]
    return normal([{"role": ("user", "assistant")[i % 2], "content": c, **more} for i, (c, more) in enumerate(turns)])


def spelled(sample: Sample, tokenizer: Any = "byte_plain") -> list[tuple[str, float]]:
    """Return the text of each range of trained tokens with its weight."""
    made = tokenizer_named(tokenizer) if isinstance(tokenizer, str) else tokenizer
    weights = [1.0] * len(sample.trained) if sample.weights is None else sample.weights.tolist()
    texts = [made.decode(sample.input_ids[a:b].tolist()) for a, b in sample.trained.tolist()]
    return list(zip(texts, weights, strict=True))


def text_of(sample: Sample, tokenizer: Any = "byte_plain") -> str:
    made = tokenizer_named(tokenizer) if isinstance(tokenizer, str) else tokenizer
    text: str = made.decode(sample.input_ids.tolist())
    return text


# --- samples ---------------------------------------------------------------------------------------------------------


def test_a_conversation_is_a_sample() -> None:
    made = encoder()(talk("Hi", "Hello", "More", "Yes"))
    assert made == Encoded(made.samples)
    (sample,) = made.samples
    assert (sample.input_ids.dtype, sample.trained.dtype, sample.weights) == (np.int32, np.int32, None)
    assert sample.trained.shape == (2, 2)
    assert spelled(sample) == [("Hello<|im_end|>", 1.0), ("Yes<|im_end|>", 1.0)]


def test_weights_of_messages() -> None:
    (sample,) = encoder()(talk("Hi", ("A", {"weight": 0.5}), "More", ("B", {"train": False}), "x", "C")).samples
    assert spelled(sample) == [("A<|im_end|>", 0.5), ("C<|im_end|>", 1.0)]
    assert sample.weights is not None and sample.weights.dtype == np.float32
    (sample,) = encoder()(talk("Hi", ("A", {"weight": 1.0}), "More", ("B", {"weight": 1}))).samples
    assert sample.weights is None


def test_ranges_of_different_weight_that_touch() -> None:
    two = normal([{"role": "assistant", "content": c, "weight": w} for c, w in (("ab", 2.0), ("cd", 0.5), ("ef", 0.5))])
    (sample,) = encoder(None)(two).samples
    assert sample.trained.tolist() == [[0, 2], [2, 6]]
    assert sample.weights is not None and sample.weights.tolist() == [2.0, 0.5]


def test_a_token_of_two_spans_takes_the_larger_weight() -> None:
    mask = TokenMask(tokenizer_named("wordpiece"))
    for spans in ([(0, 2, 0.5), (2, 4, 2.0), (4, 6, 1.0)], [(0, 2, 2.0), (3, 6, 0.5)], [(5, 6, 2.0)]):
        tokens = mask.encode("answer the", [Span(*span) for span in spans])
        assert tokens.weights.tolist() == [2.0, 0.0]


def test_train_on_all() -> None:
    (sample,) = encoder(train_on="all")(talk("Hi", "Yes")).samples
    assert sample.trained.tolist() == [[0, len(sample.input_ids)]]
    no_assistant = normal([{"role": "user", "content": "Hi"}])
    assert spelled(encoder(train_on="all")(no_assistant).samples[0]) == [("<|im_start|>user\nHi<|im_end|>\n", 1.0)]
    (sample,) = encoder(train_on="all")(
        normal([{"role": "user", "content": "Hi", "train": False}, {"role": "assistant", "content": "Yes"}])
    ).samples
    assert [text for text, _ in spelled(sample)] == [
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n",
    ]


def test_a_conversation_that_is_rewritten_is_a_sample_a_turn() -> None:
    conversation = talk("Q", ("<think>a</think>A", {"weight": 0.5}), "R", "<think>b</think>B", "S", "C")
    made = encoder(QWEN3)(conversation)
    assert (len(made.samples), made.cut, made.split, made.dropped) == (3, False, True, ())
    assert [spelled(sample) for sample in made.samples] == [
        [("<think>\na\n</think>\n\nA<|im_end|>", 0.5)],
        [("<think>\nb\n</think>\n\nB<|im_end|>", 1.0)],
        [("C<|im_end|>", 1.0)],
    ]


def test_documents_that_are_too_long_are_dropped_or_cut_by_themselves() -> None:
    conversation = talk("Q", "<think>a</think>A", "R" * 100, "<think>b</think>B", "S", "C")
    made = encoder(QWEN3, max_length=80)(conversation)
    assert ([spelled(s) for s in made.samples], made.split, made.dropped) == (
        [[("<think>\na\n</think>\n\nA<|im_end|>", 1.0)]],
        True,
        ("longer than 80 tokens", "longer than 80 tokens"),
    )
    made = encoder(QWEN3, max_length=80, overlong="truncate")(conversation)
    assert (len(made.samples), made.cut, made.dropped) == (1, False, ("nothing to train after the cut",) * 2)
    with pytest.raises(Dropped, match="^longer than 20 tokens$"):
        encoder(QWEN3, max_length=20)(conversation)
    with pytest.raises(RowError, match=r"tokens, more than data\.max_length=80; raise it, or set data\.overlong=drop$"):
        encoder(QWEN3, max_length=80, overlong="error")(conversation)


def test_a_document_with_nothing_to_train_is_counted_where_others_are_fine() -> None:
    """Nothing predicts the first token, so a turn that is no more than that, in a rendering of its own, trains nothing."""
    last = "{%- for m in messages -%}{{- m.content if loop.last or m.role == 'user' else '#' -}}{%- endfor -%}"
    conversation = normal(
        [{"role": r, "content": c} for r, c in (("assistant", "a"), ("user", "Q"), ("assistant", "b"))]
    )
    made = encoder(last)(conversation)
    assert ([spelled(sample) for sample in made.samples], made.split, made.dropped) == (
        [[("b", 1.0)]],
        True,
        ("nothing to train",),
    )
    short = encoder(last, max_length=2)
    with pytest.raises(Dropped, match="^longer than 2 tokens$"):
        short(conversation)


def test_a_tokenizer_with_a_template_for_tools() -> None:
    tokenizer = byte_plain()
    tokenizer.chat_template = {"default": "#" + CHATML, "tool_use": QWEN_TOOLS}
    made = encoder("default", tokenizer)
    plain = talk("Hi", "Yes")
    assert text_of(made(plain).samples[0]).startswith("#<|im_start|>user")
    with_tools = Conversation(plain.messages, normal(plain.messages, [{"name": "add"}]).tools)
    assert "# Tools" in text_of(made(with_tools).samples[0])
    tokenizer.chat_template = CHATML
    with pytest.raises(RowError, match="does not show the tool add"):
        encoder("default", tokenizer)(with_tools)


def test_template_args() -> None:
    conversation = talk("Hi", "Yes")
    (sample,) = encoder(QWEN_TOOLS, template_args={"enable_thinking": False})(conversation).samples
    assert spelled(sample) == [("Yes<|im_end|>", 1.0)]
    assert text_of(encoder("{{ name }}" + CHATML, template_args={"name": "N"})(conversation).samples[0])[0] == "N"


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_tokens_that_begin_and_end_a_sample(add_bos: bool, add_eos: bool) -> None:
    made = encoder(None, add_bos=add_bos, add_eos=add_eos)
    first, last = "<|begin_of_text|>" * add_bos, "<|im_end|>" * add_eos
    (sample,) = made(talk("Hi", "Yes")).samples
    assert (text_of(sample), spelled(sample)) == (f"{first}HiYes{last}", [(f"Yes{last}", 1.0)])
    (sample,) = made(talk("Hi", ("Yes", {"weight": 0.5}))).samples
    assert spelled(sample) == [(f"Yes{last}", 0.5)]
    (sample,) = made(talk("Hi", "Yes", "Bye")).samples
    assert (text_of(sample), spelled(sample)) == (f"{first}HiYesBye{last}", [("Yes", 1.0)])
    (sample,) = made(talk("Hi", "A", "Bye", ("B", {"train": False}))).samples
    assert spelled(sample) == [("A", 1.0)]
    ids = byte_plain()("<|begin_of_text|>Hi<|im_end|>", add_special_tokens=False)["input_ids"]
    (sample,) = made(Tokens(ids, [True] * len(ids))).samples
    assert text_of(sample) == "<|begin_of_text|>Hi<|im_end|>"


# --- samples that come tokenised -------------------------------------------------------------------------------------


def test_tokens() -> None:
    made = encoder(add_bos=True, add_eos=True, max_length=6)
    (sample,) = made(Tokens([1, 2, 3], [False, True, True])).samples
    bos, eos = tokenizer_named("byte_plain").bos_token_id, tokenizer_named("byte_plain").eos_token_id
    assert (sample.input_ids.tolist(), sample.trained.tolist(), sample.weights) == ([bos, 1, 2, 3, eos], [[2, 5]], None)
    (sample,) = made(Tokens([1, 2, 3], [True, True, False])).samples
    assert sample.trained.tolist() == [[1, 3]]
    with pytest.raises(Dropped, match="^longer than 6 tokens$"):
        made(Tokens([1] * 5, [True] * 5))
    cut = encoder(add_bos=True, add_eos=True, max_length=6, overlong="truncate")(Tokens([1] * 9, [True] * 9))
    assert (cut.samples[0].input_ids.tolist(), cut.cut) == ([bos, 1, 1, 1, 1, 1], True)


TOKENS_REFUSED: dict[str, tuple[Tokens, type[Exception], str]] = {
    "an id that is too large": (
        Tokens([1, 264, 9999], [True] * 3),
        RowError,
        "token 1 is 264, and the tokenizer has the ids 0 to 263; tokenise with the model's own, or set model.tokenizer to the one "
        "that was used",
    ),
    "an id below 0": (
        Tokens([1, -100], [True] * 2),
        RowError,
        "token 1 is -100, and the tokenizer has the ids 0 to 263; tokenise with the model's own, or set model.tokenizer to the one "
        "that was used",
    ),
    "a mask that is too short": (
        Tokens([1, 2], [True]),
        RowError,
        "2 tokens and a mask of 1; both must have the same length",
    ),
    "no trained token": (Tokens([1, 2], [False, False]), Dropped, "nothing to train"),
    "a trained token that nothing predicts": (Tokens([1, 2], [True, False]), Dropped, "nothing to train"),
    "nothing": (Tokens([], []), Dropped, "nothing to train"),
}


@pytest.mark.parametrize("name", TOKENS_REFUSED)
def test_tokens_refused(name: str) -> None:
    tokens, kind, sentence = TOKENS_REFUSED[name]
    with pytest.raises(kind) as caught:
        encoder()(tokens)
    assert str(caught.value) == sentence


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], Conversation, type[Exception], str]] = {
    "no assistant": (
        {},
        normal([{"role": "user", "content": "Hi"}]),
        RowError,
        "no assistant turn, so nothing to train; set data.train_on=all to train on every token",
    ),
    "no turn is to be trained": ({}, talk("Hi", ("A", {"weight": 0})), Dropped, "no turn to train"),
    "an empty answer": (
        {"template": PLAIN},
        talk("Hi", ""),
        Dropped,
        "empty answer",
    ),
    "only the first token": (
        {"template": None},
        normal([{"role": "assistant", "content": "a"}, {"role": "user", "content": "Hi"}]),
        RowError,
        "nothing to train: no token of a trained turn is left after the template",
    ),
    "too long": (
        {"max_length": 20, "overlong": "error"},
        talk("Hi", "A" * 20),
        RowError,
        "43 tokens, more than data.max_length=20; raise it, or set data.overlong=drop",
    ),
    "too long and dropped": ({"max_length": 20}, talk("Hi", "A" * 20), Dropped, "longer than 20 tokens"),
    "cut to nothing": (
        {"max_length": 10, "overlong": "truncate"},
        talk("Hi", "A"),
        Dropped,
        "nothing to train after the cut",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    keys, conversation, kind, sentence = REFUSED[name]
    with pytest.raises(kind) as caught:
        encoder(**keys)(conversation)
    assert str(caught.value) == sentence


def test_a_tokenizer_that_cannot_be_trusted() -> None:
    tokenizer = tokenizer_named("byte_plain")
    mask = TokenMask(tokenizer)
    mask._tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError) as caught:
        mask.encode("ABC", [])
    assert str(caught.value) == (
        f"{tokenizer.name_or_path}: masks cannot be exact with this tokenizer (its tokenizer.json gives other tokens than itself); "
        "set model.tokenizer to another."
    )
    with pytest.raises(UserError, match="not a fast tokenizer; exact masks need one with a tokenizer.json"):
        TokenMask(object_with_a_name())


def object_with_a_name() -> Any:
    class Slow:
        name_or_path = "slow"

    return Slow()


def test_add_bos_without_such_a_token() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_plain().backend_tokenizer)
    with pytest.raises(UserError, match=r"^data\.add_eos=true: the tokenizer in .* has no such token\.$"):
        encoder(tokenizer=tokenizer, add_eos=True)


# --- unknown characters as bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unigram", "sentencepiece", "byte_plain", "byte_bpe"])
def test_bytes_of_unknown_characters_in_a_row_belong_to_their_own(name: str) -> None:
    """The tokenizers library gives all of Unigram's byte tokens in a row the place of the whole row."""
    (sample,) = encoder(None, name)(talk("x日本", "中é😀", "語")).samples
    assert [text for text, _ in spelled(sample, name)] == ["中é😀"]


# --- cuts ------------------------------------------------------------------------------------------------------------


def spelled_markers() -> PreTrainedTokenizerFast:
    """Make a byte tokenizer that knows no special token but </s>: ChatML's markers are spelled in pieces."""
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = byte_plain().backend_tokenizer.decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_cut_is_never_inside_a_marker() -> None:
    tokenizer = spelled_markers()
    conversation = talk("Hi", "A<B|im_end", "More", "C")
    text = text_of(encoder(tokenizer=tokenizer)(conversation).samples[0], tokenizer)
    markers = [m.span() for m in re.finditer(r"<\|im_end\|>|<\|im_start\|>(user|assistant)", text)]
    for limit in range(text.index("A<B") + 1, len(text)):
        made = encoder(tokenizer=tokenizer, max_length=limit, overlong="truncate")
        (sample,) = made(conversation).samples
        kept = text_of(sample, tokenizer)
        inside = [a for a, b in markers if a < limit < b]
        assert kept == text[: inside[0] if inside else limit]


def test_a_cut_between_markers_keeps_the_end_of_a_turn() -> None:
    made = encoder(MISTRAL)(talk("Hi", "A", "More", "B")).samples[0]
    text = text_of(made)
    assert text == "<s>[INST] Hi [/INST] A</s>[INST] More [/INST] B</s>"
    ids = made.input_ids.tolist()
    end = ids.index(tokenizer_named("byte_plain").convert_tokens_to_ids("</s>")) + 1
    for limit in range(end, end + 6):  # inside [INST]
        cut = encoder(MISTRAL, max_length=limit, overlong="truncate")(talk("Hi", "A", "More", "B"))
        assert text_of(cut.samples[0]) == "<s>[INST] Hi [/INST] A</s>"
        assert spelled(cut.samples[0]) == [("A</s>", 1.0)]


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(
    answer=st.text(st.sampled_from("aé中😀\u0301<|>\n "), min_size=12, max_size=30),
    limit=st.integers(30, 70),
    name=st.sampled_from(["byte_plain", "byte_bpe", "unigram", "sentencepiece"]),
    template=st.sampled_from([CHATML, LLAMA3]),
    add_bos=st.booleans(),
)
def test_a_cut_is_never_inside_a_character(answer: str, limit: int, name: str, template: str, add_bos: bool) -> None:
    keys = {"add_bos": add_bos, "template": template, "tokenizer": name}
    whole = encoder(**keys)(talk("Hi", answer)).samples[0]
    try:
        made = encoder(**keys, max_length=limit, overlong="truncate")(talk("Hi", answer))
    except Dropped:
        return
    (sample,) = made.samples
    assert made.cut == (len(whole.input_ids) > limit)
    assert limit - 12 <= len(sample.input_ids) <= limit or not made.cut
    assert sample.input_ids.tolist() == whole.input_ids[: len(sample.input_ids)].tolist()
    assert sample.trained[-1, 1] <= len(sample.input_ids)
    if name.startswith("byte"):
        assert "\ufffd" not in text_of(sample, name)


# --- exact in every script -------------------------------------------------------------------------------------------

SCRIPTS = {
    "chinese": ("请用一句话介绍北京。", "北京是中华人民共和国的首都，有三千多年的历史。\u3000“故宫”在这里。"),
    "arabic": ("ما عاصمة مصر؟", "عاصِمةُ مِصر هي القاهرة\u200f (Cairo)، ١٢٣\u0640\u0640!"),
    "emoji": ("👩‍👩‍👧‍👦 🇫🇷🇩🇪?", "🏳️‍🌈👨🏽‍🚀❤️\u200d🔥 1️⃣🇯🇵🇺🇸 e\u0301\u0323"),
    "code": (
        "Fix\tit:\r\n```py\r\ndef f( ):\t\r\n```",
        "```py  \r\ndef f():\r\n\treturn 1\t \r\n\n\n    # x  \r\n```  ",
    ),
}


@pytest.mark.parametrize("name", ["byte_bpe", "unigram", "wordpiece"])
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("template", ["chatml", "chatml_generation", "llama3", "mistral", "qwen3"])
def test_scripts(script: str, template: str, name: str) -> None:
    """Exactly the tokens that hold a character of an answer, or of the token that closes it, are trained."""
    question, answer = SCRIPTS[script]
    conversation = talk(question, answer, answer, question)
    made = encoder(TEMPLATES[template], name)
    (sample,) = made(conversation).samples
    text = made.template.render(conversation.messages)
    header = {"mistral": " [/INST] ", "llama3": "assistant<|end_header_id|>\n\n"}.get(template, "assistant\n")
    end = {"mistral": "</s>", "llama3": "<|eot_id|>"}.get(template, "<|im_end|>")
    spans, at = [], 0
    for own in (answer, question):
        written = (own.strip() if template == "llama3" else own) + end
        start = text.index(header + written, at) + len(header)
        at = start + len(written)
        spans.append((start, at))
    assert text.count(header) == 2
    mask = np.zeros(len(sample.input_ids), bool)
    for start, stop in sample.trained.tolist():
        mask[start:stop] = True
        assert tokenizer_named(name).convert_ids_to_tokens(int(sample.input_ids[stop - 1])) == end
    check_mask(name, text, spans, sample.input_ids, mask)


def test_scripts_byte_for_byte() -> None:
    for question, answer in SCRIPTS.values():
        (sample,) = encoder()(talk(question, answer, answer, question)).samples
        assert spelled(sample) == [(f"{answer}<|im_end|>", 1.0), (f"{question}<|im_end|>", 1.0)]


# --- batches ---------------------------------------------------------------------------------------------------------


def test_weights_in_a_batch() -> None:
    plain = Sample(np.arange(4, dtype=np.int32), np.array([[0, 2], [3, 4]], np.int32))
    weighted = Sample(np.arange(5, dtype=np.int32), np.array([[0, 1], [1, 3], [4, 5]], np.int32), np.array([3, 0.5, 2], np.float32))  # fmt: skip
    assert trained_positions(weighted).tolist() == [1, 2, 4]
    assert trained_weights(weighted).tolist() == [0.5, 0.5, 2.0]
    assert trained_weights(plain).tolist() == [1.0, 1.0]
    for collate in (collate_packed, collate_padded):
        assert collate([plain, plain]).targets.weights_N is None
        targets = collate([plain, weighted]).targets
        assert targets.weights_N is not None
        assert targets.weights_N.tolist() == [1.0, 1.0, 0.5, 0.5, 2.0]
        assert targets.sequences(1, 2).weights_N.tolist() == [0.5, 0.5, 2.0]  # type: ignore[union-attr]


def test_every_tokenizer_is_trusted() -> None:
    for name in MAKERS:
        assert encoder(tokenizer=name)(talk("Hi", "Yes")).samples
