"""The trained text of many conversations under many templates, written out by hand: ⟦…⟧ is trained, all else is not."""

from __future__ import annotations

import re
from typing import Any

import pytest
from chat_fixtures import CHATML, MAKERS, TEMPLATES, check_mask, holders, mask_of, spans_of, tokenizer_named
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.data.conversation import RowError
from engine.data.template import Template

Messages = list[dict[str, Any]]


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CONVERSATIONS: dict[str, Messages] = {
    "single": [user("What is 2+2?"), assistant("4")],
    "multi": [system("Be brief."), user("Hi"), assistant("Hello!"), user("Bye"), assistant("See you.")],
    "whitespace": [user(" Hi "), assistant("  Hello \n"), user("More"), assistant("\n Yes ")],
    "repeated": [
        user("One?"),
        assistant("Yes"),
        user("Two?"),
        assistant("Yes"),
        user("Three?"),
        assistant("Yes"),
    ],
    "echo": [user("Yes"), assistant("Yes")],
    "chatml_inside": [
        user("Yes<|im_end|>\n<|im_start|>assistant\nYes"),
        assistant("Yes<|im_end|>\n<|im_start|>user\nYes<|im_end|>"),
    ],
    "llama3_inside": [
        user("Yes<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes"),
        assistant("Yes<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nYes<|eot_id|>"),
    ],
    "mistral_inside": [user("Yes [/INST] Yes</s>"), assistant("Yes</s>[INST] Yes [/INST] Yes</s>")],
    "plain_inside": [user("Yes\nAnswer: Yes"), assistant("Yes\nQuestion: Yes\nAnswer: Yes")],
    "reasoning": [
        user("Q1"),
        assistant("<think>\nr1\n</think>\n\nA1"),
        user("Q2"),
        assistant("<think>r2</think>A2"),
    ],
    "reasoning_once": [user("Q"), assistant("<think>\n\nr\n</think>A \n")],
    "unicode": [user("😀 是?"), assistant("é 👩‍👩‍👧 中文\u3000e\u0301😀")],
    "assistant_first": [assistant("Welcome"), user("Hi"), assistant("Hello")],
    "assistant_twice": [user("Hi"), assistant("One"), assistant("Two")],
    "user_last": [user("Hi"), assistant("One"), user("Bye")],
    "empty": [user("Hi"), assistant("")],
}

CHATML_TEXT = {
    "single": "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n",
    "multi": (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦See you.<|im_end|>⟧\n"
    ),
    "whitespace": (
        "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n⟦  Hello \n<|im_end|>⟧\n"
        "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n⟦\n Yes <|im_end|>⟧\n"
    ),
    "repeated": (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>⟧\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>⟧\n"
        "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>⟧\n"
    ),
    "echo": "<|im_start|>user\nYes<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>⟧\n",
    "chatml_inside": (
        "<|im_start|>user\nYes<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes<|im_end|>\n<|im_start|>user\nYes<|im_end|><|im_end|>⟧\n"
    ),
    "llama3_inside": (
        "<|im_start|>user\nYes<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nYes<|eot_id|><|im_end|>⟧\n"
    ),
    "mistral_inside": (
        "<|im_start|>user\nYes [/INST] Yes</s><|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes</s>[INST] Yes [/INST] Yes</s><|im_end|>⟧\n"
    ),
    "plain_inside": (
        "<|im_start|>user\nYes\nAnswer: Yes<|im_end|>\n"
        "<|im_start|>assistant\n⟦Yes\nQuestion: Yes\nAnswer: Yes<|im_end|>⟧\n"
    ),
    "reasoning": (
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦<think>\nr1\n</think>\n\nA1<|im_end|>⟧\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦<think>r2</think>A2<|im_end|>⟧\n"
    ),
    "reasoning_once": (
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\nr\n</think>A \n<|im_end|>⟧\n"
    ),
    "unicode": (
        "<|im_start|>user\n😀 是?<|im_end|>\n<|im_start|>assistant\n⟦é 👩‍👩‍👧 中文\u3000e\u0301😀<|im_end|>⟧\n"
    ),
    "assistant_first": (
        "<|im_start|>assistant\n⟦Welcome<|im_end|>⟧\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
    ),
    "assistant_twice": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦One<|im_end|>⟧\n<|im_start|>assistant\n⟦Two<|im_end|>⟧\n"
    ),
    "user_last": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦One<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n"
    ),
    "empty": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n",
}
REFUSED_FIRST = "the chat template refuses this conversation (the first turn must be the user's)"
REWRITTEN = "the chat template does not show messages[1] as it was written"

# Template, conversation: the rendering with its trained text marked; or the reason of a refusal; or both, where only the
# earlier turn cannot be masked: the reason for all_assistant, the rendering for last_assistant.
EXPECTED: dict[str, dict[str, str | tuple[str, str]]] = {
    "chatml": {**CHATML_TEXT},
    "chatml_generation": {**CHATML_TEXT},
    "llama3": {
        "single": (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦4<|eot_id|>⟧"
        ),
        "multi": (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello!<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦See you.<|eot_id|>⟧"
        ),
        "whitespace": (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes<|eot_id|>⟧"
        ),
        "repeated": (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nThree?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes<|eot_id|>⟧"
        ),
        "echo": (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nYes<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes<|eot_id|>⟧"
        ),
        "llama3_inside": (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
            "Yes<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
            "⟦Yes<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nYes<|eot_id|><|eot_id|>⟧"
        ),
        "reasoning": (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦<think>\nr1\n</think>\n\nA1<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦<think>r2</think>A2<|eot_id|>⟧"
        ),
        "unicode": (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n😀 是?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦é 👩‍👩‍👧 中文\u3000e\u0301😀<|eot_id|>⟧"
        ),
        "assistant_first": (
            "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Welcome<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧"
        ),
        "assistant_twice": (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦One<|eot_id|>⟧"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Two<|eot_id|>⟧"
        ),
        "user_last": (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦One<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        ),
        "empty": (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦<|eot_id|>⟧"
        ),
    },
    "mistral": {
        "single": "<s>[INST] What is 2+2? [/INST] ⟦4</s>⟧",
        "multi": "<s>[INST] Be brief.\n\nHi [/INST] ⟦Hello!</s>⟧[INST] Bye [/INST] ⟦See you.</s>⟧",
        "whitespace": "<s>[INST]  Hi  [/INST] ⟦  Hello \n</s>⟧[INST] More [/INST] ⟦\n Yes </s>⟧",
        "repeated": "<s>[INST] One? [/INST] ⟦Yes</s>⟧[INST] Two? [/INST] ⟦Yes</s>⟧[INST] Three? [/INST] ⟦Yes</s>⟧",
        "echo": "<s>[INST] Yes [/INST] ⟦Yes</s>⟧",
        "mistral_inside": "<s>[INST] Yes [/INST] Yes</s> [/INST] ⟦Yes</s>[INST] Yes [/INST] Yes</s></s>⟧",
        "reasoning": (
            "<s>[INST] Q1 [/INST] ⟦<think>\nr1\n</think>\n\nA1</s>⟧[INST] Q2 [/INST] ⟦<think>r2</think>A2</s>⟧"
        ),
        "unicode": "<s>[INST] 😀 是? [/INST] ⟦é 👩‍👩‍👧 中文\u3000e\u0301😀</s>⟧",
        "assistant_first": REFUSED_FIRST,
        "assistant_twice": "<s>[INST] Hi [/INST] ⟦One</s>⟧ ⟦Two</s>⟧",
        "user_last": "<s>[INST] Hi [/INST] ⟦One</s>⟧[INST] Bye [/INST]",
        "empty": "<s>[INST] Hi [/INST] ⟦</s>⟧",
    },
    "strips_reasoning": {
        **CHATML_TEXT,
        "reasoning": (
            REWRITTEN,
            "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n\n\nA1<|im_end|>\n"
            "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦<think>r2</think>A2<|im_end|>⟧\n",
        ),
    },
    "qwen3": {
        **CHATML_TEXT,
        "reasoning": (
            REWRITTEN,
            "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
            "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦<think>\nr2\n</think>\n\nA2<|im_end|>⟧\n",
        ),
        "reasoning_once": (
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦<think>\nr\n</think>\n\nA \n<|im_end|>⟧\n"
        ),
    },
    "plain": {
        "single": "Question: What is 2+2?\nAnswer: ⟦4⟧\n",
        "multi": "Context: Be brief.\nQuestion: Hi\nAnswer: ⟦Hello!⟧\nQuestion: Bye\nAnswer: ⟦See you.⟧\n",
        "whitespace": "Question: Hi\nAnswer: ⟦Hello⟧\nQuestion: More\nAnswer: ⟦Yes⟧\n",
        "repeated": "Question: One?\nAnswer: ⟦Yes⟧\nQuestion: Two?\nAnswer: ⟦Yes⟧\nQuestion: Three?\nAnswer: ⟦Yes⟧\n",
        "echo": "Question: Yes\nAnswer: ⟦Yes⟧\n",
        "plain_inside": "Question: Yes\nAnswer: Yes\nAnswer: ⟦Yes\nQuestion: Yes\nAnswer: Yes⟧\n",
        "reasoning": (
            "Question: Q1\nAnswer: ⟦<think>\nr1\n</think>\n\nA1⟧\nQuestion: Q2\nAnswer: ⟦<think>r2</think>A2⟧\n"
        ),
        "unicode": "Question: 😀 是?\nAnswer: ⟦é 👩‍👩‍👧 中文\u3000e\u0301😀⟧\n",
        "assistant_first": "Answer: ⟦Welcome⟧\nQuestion: Hi\nAnswer: ⟦Hello⟧\n",
        "assistant_twice": "Question: Hi\nAnswer: ⟦One⟧\nAnswer: ⟦Two⟧\n",
        "user_last": "Question: Hi\nAnswer: ⟦One⟧\nQuestion: Bye\n",
        "empty": "Question: Hi\nAnswer: ⟦⟧\n",
    },
}
CASES = [(template, name) for template, rows in EXPECTED.items() for name in rows]


def read_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a text without its ⟦ ⟧, and where they were."""
    text, spans = "", []
    for piece in re.split("(⟦[^⟧]*⟧)", marked):
        if piece.startswith("⟦"):
            spans.append((len(text), len(text) + len(piece) - 2))
        text += piece.strip("⟦⟧")
    return text, spans


def test_reading_of_marks() -> None:
    assert read_marks("ab⟦cd⟧e⟦⟧⟦f⟧") == ("abcdef", [(2, 4), (5, 5), (5, 6)])


def expectation(template: str, name: str, train_on: str) -> tuple[str, list[tuple[int, int]]] | str:
    """Return the rendering and its trained spans, or the reason of the refusal."""
    entry = EXPECTED[template][name]
    reason, marked = entry if isinstance(entry, tuple) else (None, entry)
    if marked == REFUSED_FIRST:
        return marked
    if reason is not None and train_on == "all_assistant":
        return reason
    text, spans = read_marks(marked)
    return text, {"all_assistant": spans, "last_assistant": spans[-1:], "all": [(0, len(text))]}[train_on]


@pytest.mark.parametrize("train_on", ["all_assistant", "last_assistant", "all"])
@pytest.mark.parametrize(("template", "name"), CASES)
def test_trained_text(template: str, name: str, train_on: str) -> None:
    expected = expectation(template, name, train_on)
    made = Template(tokenizer_named("byte_plain"), TEMPLATES[template])
    if isinstance(expected, str):
        with pytest.raises(RowError, match=re.escape(expected)):
            spans_of(made, CONVERSATIONS[name], train_on)
        return
    text, spans = spans_of(made, CONVERSATIONS[name], train_on)
    assert text == expected[0]
    assert spans == expected[1]


@pytest.mark.parametrize("train_on", ["all_assistant", "last_assistant", "all"])
@pytest.mark.parametrize(("template", "name"), CASES)
def test_trained_tokens_spell_the_trained_text(template: str, name: str, train_on: str) -> None:
    """With a token a byte, the trained tokens' bytes are the marked text's bytes, and the others the rest."""
    expected = expectation(template, name, train_on)
    if isinstance(expected, str):
        pytest.skip("refused: see test_trained_text")
    text, spans = expected
    tokenizer = tokenizer_named("byte_plain")
    ids, mask = mask_of(tokenizer, text, spans)
    decode = lambda chosen: tokenizer.decode(chosen.tolist(), skip_special_tokens=False)  # noqa: E731
    assert decode(ids[mask]) == "".join(text[a:b] for a, b in spans)
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    assert decode(ids[~mask]) == "".join(text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("train_on", ["all_assistant", "last_assistant"])
@pytest.mark.parametrize("tokenizer", MAKERS)
@pytest.mark.parametrize(("template", "name"), CASES)
def test_trained_tokens_hold_the_trained_text(template: str, name: str, tokenizer: str, train_on: str) -> None:
    expected = expectation(template, name, train_on)
    if isinstance(expected, str):
        pytest.skip("refused: see test_trained_text")
    text, spans = expected
    check_mask(tokenizer, text, spans, *mask_of(tokenizer_named(tokenizer), text, spans))


def test_the_oracle_tells_wrong_masks() -> None:
    """The check used above must fail on a mask that is off by a token on either side."""
    text, spans = "<|im_start|>assistant\nYes, the answer.<|im_end|>\n", [(22, 48)]
    for name in MAKERS:
        ids, mask = mask_of(tokenizer_named(name), text, spans)
        first, last = mask.nonzero()[0][[0, -1]]
        assert len(holders(name, text)) == len(ids)
        for i in (first - 1, first, last, last + 1):
            if i < len(mask):
                wrong = mask.copy()
                wrong[i] = not wrong[i]
                with pytest.raises(AssertionError, match="trained, but"):
                    check_mask(name, text, spans, ids, wrong)


# --- tokens over an edge ---------------------------------------------------------------------------------------------


def tiny_bpe() -> PreTrainedTokenizerFast:
    """Make a tokenizer that reads "xabcde" as x, abc, de."""
    pieces = ["a", "b", "c", "d", "e", "x", "ab", "abc", "de"]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [("a", "b"), ("ab", "c"), ("d", "e")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("spans", "trained"),
    [
        ([(1, 4)], ["abc"]),
        ([(3, 6)], ["abc", "de"]),
        ([(0, 2)], ["x", "abc"]),
        ([(2, 3)], ["abc"]),
        ([(0, 1), (5, 6)], ["x", "de"]),
        ([(4, 4)], []),
        ([(2, 2)], []),
        ([], []),
    ],
)
def test_a_token_over_an_edge_is_trained_if_it_holds_a_trained_character(
    spans: list[tuple[int, int]], trained: list[str]
) -> None:
    tokenizer = tiny_bpe()
    ids, mask = mask_of(tokenizer, "xabcde", spans)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["x", "abc", "de"]
    assert tokenizer.convert_ids_to_tokens(ids[mask].tolist()) == trained


def test_concatenated_contents_share_a_token() -> None:
    """Without a template, user "xab" and assistant "cde" meet inside the token abc, which is trained."""
    tokenizer = tiny_bpe()
    text, spans = spans_of(Template(tokenizer, None), [user("xab"), assistant("cde")], "all_assistant")
    assert (text, spans) == ("xabcde", [(3, 6)])
    ids, mask = mask_of(tokenizer, text, spans)
    assert mask.tolist() == [False, True, True]


def test_every_byte_of_a_character_is_trained_with_it() -> None:
    tokenizer = tokenizer_named("byte_plain")
    _, mask = mask_of(tokenizer, "é😀中", [(1, 2)])
    assert mask.tolist() == [False] * 2 + [True] * 4 + [False] * 3


def test_white_space_tokens_count_as_written() -> None:
    """Llama-3's offsets leave out spaces; the space in front of a span's first word is inside or outside as written."""
    tokenizer = tokenizer_named("byte_bpe")
    text = "user  the answer  <|im_end|>"
    shown = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert shown == ["user", "Ġ", "Ġthe", "Ġanswer", "ĠĠ", "<|im_end|>"]
    for spans, trained in [
        ([(4, 18)], [0, 1, 1, 1, 1, 0]),
        ([(5, 16)], [0, 0, 1, 1, 0, 0]),
        ([(6, 28)], [0, 0, 1, 1, 1, 1]),
        ([(16, 17)], [0, 0, 0, 0, 1, 0]),
        ([(4, 5)], [0, 1, 0, 0, 0, 0]),
    ]:
        assert mask_of(tokenizer, text, spans)[1].tolist() == [bool(t) for t in trained], spans


@pytest.mark.parametrize(
    "outside",
    [
        "e\u0301e\u0301 {}\u0344",  # two bytes fewer before, two more behind: the sum says nothing has changed
        "\u0344 {} e\u0301e\u0301",
        "e\u0301 {}",
        "{} e\u0301\u0323",
        "\u0958 {}",
    ],
)
def test_a_tokenizer_that_composes_its_text(outside: str) -> None:
    text = outside.format("<|im_start|>abc def<|im_end|>")
    a = text.index("abc")
    spans = [(a, a + len("abc def<|im_end|>"))]
    tokenizer = tokenizer_named("byte_bpe_nfc")
    ids, mask = mask_of(tokenizer, text, spans)
    assert tokenizer.decode(ids[mask].tolist()) == "abc def<|im_end|>"
    check_mask("byte_bpe_nfc", text, spans, ids, mask)


def test_dropped_white_space_belongs_to_no_token() -> None:
    """WordPiece drops the space that ends the first turn; the user's next word does not hold it."""
    tokenizer = tokenizer_named("wordpiece")
    text, spans = spans_of(Template(tokenizer, None), [assistant("the answer "), user("the user")], "all_assistant")
    ids, mask = mask_of(tokenizer, text, spans)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["the", "answer", "the", "user"]
    assert mask.tolist() == [True, True, False, False]


# --- templates that set traps ----------------------------------------------------------------------------------------


def marked_or_refused(template: str, messages: Messages, train_on: str = "all_assistant") -> str:
    """Return the rendering with its trained text marked, or "refused"."""
    try:
        text, spans = spans_of(Template(tokenizer_named("byte_plain"), template), messages, train_on)
    except RowError:
        return "refused"
    for a, b in reversed(spans):
        text = f"{text[:a]}⟦{text[a:b]}⟧{text[b:]}"
    return text


GENERATION_TURN = "<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
OTHER_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"


@pytest.mark.parametrize(
    "template",
    [
        (
            "{%- macro turn(m) -%}" + GENERATION_TURN + "{%- endmacro -%}{%- for m in messages -%}"
            "{%- if m.role == 'assistant' -%}{{ turn(m) }}{%- else -%}" + OTHER_TURN + "{%- endif -%}{%- endfor -%}"
        ),
        (
            "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- set turn -%}"
            + GENERATION_TURN
            + "{%- endset -%}"
            "{{ turn }}{%- else -%}" + OTHER_TURN + "{%- endif -%}{%- endfor -%}"
        ),
        (
            "{%- filter trim -%}{%- for m in messages -%}{%- if m.role == 'assistant' -%}" + GENERATION_TURN + ""
            "{%- else -%}" + OTHER_TURN + "{%- endif -%}{%- endfor -%}{%- endfilter -%}"
        ),
    ],
    ids=["macro", "set", "filter"],
)
@pytest.mark.parametrize("train_on", ["all_assistant", "last_assistant"])
def test_generation_blocks_that_jinja_buffers(template: str, train_on: str) -> None:
    """Inside a macro, a set block or a filter, transformers reports positions that are not those of the rendering."""
    for messages, marked in [
        (
            [user("Yes"), assistant("Yes")],
            "<|im_start|>user\nYes<|im_end|><|im_start|>assistant\n⟦Yes<|im_end|>⟧",
        ),
        (
            [user("a long question"), assistant("A")],
            "<|im_start|>user\na long question<|im_end|><|im_start|>assistant\n⟦A<|im_end|>⟧",
        ),
    ]:
        assert marked_or_refused(template, messages, train_on) in (marked, "refused")


def test_generation_block_on_lines_of_its_own() -> None:
    template = (
        "{% for m in messages %}\n{% if m.role == 'assistant' %}\n<|im_start|>assistant\n"
        "{% generation %}\n{{ m.content }}<|im_end|>\n{% endgeneration %}\n"
        "{% else %}\n<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}\n{% endfor %}\n"
    )
    assert marked_or_refused(template, CONVERSATIONS["repeated"]) == (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>\n⟧"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>\n⟧"
        "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>\n⟧"
    )


def test_generation_block_without_the_end_of_turn() -> None:
    template = CHATML.replace(
        "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}",
        "{{- '<|im_start|>' + m.role + '\n' -}}"
        "{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content -}}{%- endgeneration -%}"
        "{%- else -%}{{- m.content -}}{%- endif -%}{{- '<|im_end|>\n' -}}",
    )
    assert template != CHATML
    for name in ("multi", "whitespace", "repeated", "empty", "chatml_inside"):
        assert marked_or_refused(template, CONVERSATIONS[name]) == CHATML_TEXT[name]


def test_generation_blocks_that_do_not_match_the_turns() -> None:
    template = "{%- for m in messages -%}{%- generation -%}{{ m.content }}{%- endgeneration -%}{%- endfor -%}"
    made = Template(tokenizer_named("byte_plain"), template)
    with pytest.raises(RowError, match="marks 2 generation blocks for 1 assistant turns"):
        spans_of(made, [user("Hi"), assistant("Yes")], "all_assistant")


def test_generation_blocks_around_rewritten_turns() -> None:
    template = TEMPLATES["chatml_generation"].replace(
        "{{- m.content + '<|im_end|>' -}}{%- endgeneration",
        "{{- m.content.split('</think>')[-1] + '<|im_end|>' -}}{%- endgeneration",
    )
    assert template != TEMPLATES["chatml_generation"]
    made = Template(tokenizer_named("byte_plain"), template)
    with pytest.raises(RowError, match=re.escape(REWRITTEN)):
        spans_of(made, CONVERSATIONS["reasoning"], "all_assistant")


def test_end_of_turn_of_a_template_that_asks_for_a_system_turn() -> None:
    template = (
        "{%- if messages[0].role != 'system' -%}{{ raise_exception('a system turn comes first') }}{%- endif -%}"
        + CHATML
    )
    assert marked_or_refused(template, CONVERSATIONS["multi"]) == CHATML_TEXT["multi"]
    assert marked_or_refused(template, CONVERSATIONS["single"]) == "refused"


def test_end_of_turn_behind_a_line_break() -> None:
    template = CHATML.replace("m.content + '<|im_end|>", "m.content + '\n<|im_end|>")
    assert marked_or_refused(template, CONVERSATIONS["repeated"][:4]) == (
        "<|im_start|>user\nOne?\n<|im_end|>\n<|im_start|>assistant\n⟦Yes\n<|im_end|>⟧\n"
        "<|im_start|>user\nTwo?\n<|im_end|>\n<|im_start|>assistant\n⟦Yes\n<|im_end|>⟧\n"
    )


def test_the_next_header_is_no_end_of_turn() -> None:
    """Nothing closes a turn here; the special token that follows opens the user's."""
    template = "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content -}}{%- endfor -%}"
    assert marked_or_refused(template, CONVERSATIONS["repeated"][:4]) == (
        "<|im_start|>user\nOne?<|im_start|>assistant\n⟦Yes⟧<|im_start|>user\nTwo?<|im_start|>assistant\n⟦Yes⟧"
    )


def test_earlier_turns_closed_by_another_token() -> None:
    """As gpt-oss's: each turn's own closing token is trained, or the conversation is refused."""
    template = (
        "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content -}}"
        "{{- '<|im_end|>' if loop.last else '<|eot_id|>' -}}{%- endfor -%}"
    )
    last = (
        "<|im_start|>user\nOne?<|eot_id|><|im_start|>assistant\n{}<|im_start|>user\nTwo?<|eot_id|>"
        "<|im_start|>assistant\n⟦Yes<|im_end|>⟧"
    )
    messages = CONVERSATIONS["repeated"][:4]
    assert marked_or_refused(template, messages) in (last.format("⟦Yes<|eot_id|>⟧"), "refused")
    assert marked_or_refused(template, messages, "last_assistant") == last.format("Yes<|eot_id|>")


def test_reshaped_answer_without_end_of_turn_keeps_to_the_content() -> None:
    """The template's own line break after an answer is not trained, wherever the answer itself ends."""
    template = (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        "{{- 'Answer: ' + m.content.replace('B', 'b') + '\n' -}}{%- else -%}{{- 'Question: ' + m.content + '\n' -}}"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'Answer: ' -}}{%- endif -%}"
    )
    assert marked_or_refused(template, [user("Q"), assistant("B")]) == "Question: Q\nAnswer: ⟦b⟧\n"
    assert marked_or_refused(template, [user("Q"), assistant("B \n")]) in (
        "Question: Q\nAnswer: ⟦b \n⟧\n",
        "refused",
    )


def test_an_empty_reasoning_block_is_treated_alike() -> None:
    """Qwen3 puts an empty block before a last answer without reasoning: trained or not, but not one way and the other."""
    template = TEMPLATES["qwen3"].replace(" and loop.last and ns.reasoning -%}", " and loop.last -%}")
    assert template != TEMPLATES["qwen3"]
    plain = marked_or_refused(template, [user("Q"), assistant("Yes")])
    assert "<think>\n\n</think>\n\n" in plain
    assert marked_or_refused(template, [user("Q"), assistant("\nYes")]) == plain
    assert marked_or_refused(template, [user("Q"), assistant("\n Yes ")]) in (plain.replace("Yes", " Yes "), "refused")


def test_a_conversation_that_holds_the_placeholder() -> None:
    messages = [user("\ue0a0turn1\ue0a1"), assistant("\ue0a0turn1\ue0a1"), user("Hi"), assistant("\ue0a0turn3\ue0a1")]
    expected = (
        "<|im_start|>user\n\ue0a0turn1\ue0a1<|im_end|>\n<|im_start|>assistant\n⟦\ue0a0turn1\ue0a1<|im_end|>⟧\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦\ue0a0turn3\ue0a1<|im_end|>⟧\n"
    )
    assert marked_or_refused(CHATML, messages) in (expected, "refused")


def without_chatml() -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows </s> but not <|im_end|>, which it spells in pieces."""
    tokenizer = Tokenizer(
        models.BPE(vocab={s: i for i, s in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


FOUR = [user("Hi"), assistant("Yes"), user("More"), assistant("No")]
SPELLED: dict[str, tuple[str, list[str]]] = {
    "ChatML": (CHATML, ["Yes<|im_end|>", "No<|im_end|>"]),
    "marked": (TEMPLATES["chatml_generation"], ["Yes<|im_end|>", "No<|im_end|>"]),
    "behind a line break": (CHATML.replace("m.content + '<", "m.content + '\n<"), ["Yes\n<|im_end|>", "No\n<|im_end|>"]),
    "with a token": (CHATML.replace("<|im_end|>", "<|im_end|></s>"), ["Yes<|im_end|></s>", "No<|im_end|></s>"]),
    "and a token at the end": (CHATML + "{{- '</s>' -}}", ["Yes<|im_end|>", "No<|im_end|>"]),
    "text at the end": (CHATML.replace("<|im_end|>", "") + "{{- 'End.' -}}", ["Yes", "No"]),
    "nothing": (CHATML.replace("<|im_end|>", ""), ["Yes", "No"]),
    "a token": (CHATML.replace("<|im_end|>", "</s>"), ["Yes</s>", "No</s>"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLED)
def test_an_end_of_turn_that_is_no_special_token(name: str) -> None:
    """It is trained where it closes every turn; what stands once behind the last, or is white space, closes none."""
    template, trained = SPELLED[name]
    text, spans = spans_of(Template(without_chatml(), template), FOUR, "all_assistant")
    assert [text[a:b] for a, b in spans] == trained
    assert [text.index(t, text.index("assistant\n", b - 40)) for t, (_, b) in zip(trained, spans, strict=True)] == [
        a for a, _ in spans
    ]


def test_a_spelled_end_of_turn_of_a_template_for_one_answer() -> None:
    once = "{%- if messages | length > 2 -%}{{ raise_exception('one answer') }}{%- endif -%}" + CHATML
    text, spans = spans_of(Template(without_chatml(), once), FOUR[:2], "all_assistant")
    assert [text[a:b] for a, b in spans] == ["Yes<|im_end|>"]


def test_a_spelled_end_of_turn_that_earlier_turns_lack() -> None:
    template = CHATML.replace(
        "'<|im_end|>\n'", "('<|im_end|>\n' if m.role == 'user' or m.content != 'Yes' else '<end>\n')"
    )
    made = Template(without_chatml(), template)
    with pytest.raises(RowError, match="does not show where messages.1. ends"):
        spans_of(made, FOUR, "all_assistant")
    text, spans = spans_of(made, FOUR, "last_assistant")
    assert [text[a:b] for a, b in spans] == ["No<|im_end|>"]


def test_no_template_concatenates() -> None:
    messages = [system(" Be brief."), user("Hi "), assistant("Hello\n"), user("Bye"), assistant("")]
    made = Template(tokenizer_named("byte_plain"), None)
    assert spans_of(made, messages, "all_assistant") == (" Be brief.Hi Hello\nBye", [(13, 19), (22, 22)])
    assert spans_of(made, messages, "last_assistant")[1] == [(22, 22)]
    assert spans_of(made, messages, "all")[1] == [(0, 22)]
