"""Tool calls, reasoning, per-message weights and one sample a turn: ⟦…⟧ is trained, all else is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_fixtures import (
    CHATML,
    LLAMA_TOOLS,
    MISTRAL,
    QWEN3,
    QWEN_TOOLS,
    QWEN_TOOLS_GENERATION,
    STRIPS_REASONING,
    byte_plain,
    check_mask,
    mask_of,
    tokenizer_named,
)

from engine.data.conversation import Conversation, Dropped, RawJson, RowError, normal
from engine.data.template import Template
from engine.errors import UserError

ODD = '{"a":1,  "b" : 1e3, "c":"\\u00e9"}'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
TOOL_TEXT = '# Tools\n{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}<|im_end|>\n'


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def calls(*arguments: Any, content: str = "", name: str = "add", **more: Any) -> dict[str, Any]:
    return turn("assistant", content, tool_calls=[{"name": name, "arguments": a} for a in arguments], **more)


def marked(
    template: str | None, messages: Any, train_on: str = "all_assistant", tools: Any = None, **variables: Any
) -> list[str]:
    """Return the renderings of a conversation with their trained text marked, and its weight where it is not one."""
    out = []
    made = Template(tokenizer_named("byte_plain"), template, variables)
    for text, spans, _ in made.documents(normal(messages, tools), train_on):
        for a, b, weight in reversed(spans):
            text = f"{text[:a]}⟦{text[a:b]}⟧{'' if weight == 1 else weight}{text[b:]}"
        out.append(text)
    return out


def refusal(template: str | None, messages: Any, train_on: str = "all_assistant", **variables: Any) -> str:
    with pytest.raises(RowError) as caught:
        marked(template, messages, train_on, **variables)
    return str(caught.value)


# --- arguments as they were written ----------------------------------------------------------------------------------

PRINTS = {
    "tojson": "{{ messages[0].tool_calls[0].function.arguments | tojson }}",
    "string": "{{ messages[0].tool_calls[0].function.arguments }}",
    "joined": "{{ 'x' ~ messages[0].tool_calls[0].function.arguments }}",
    "either": "{%- set a = messages[0].tool_calls[0].function.arguments -%}{{ a if a is string else a | tojson }}",
    "function": "{{ messages[0].tool_calls[0].function | tojson }}",
    "calls": "{{ messages[0].tool_calls | tojson(indent=2) }}",
    "ascii": "{{ messages[0] | tojson(ensure_ascii=true, sort_keys=true) }}",
    "compact": "{{ {'x': [messages[0].tool_calls[0].function.arguments]} | tojson(separators=(',', ':')) }}",
}


@pytest.mark.parametrize("arguments", [ODD, "{}", ' {"a" : {"b":[1,2 ,3]}}\n', '{"é": "\\"|raw-0|\\"", "😀":1.50}'])
@pytest.mark.parametrize("name", PRINTS)
def test_arguments_are_printed_as_they_were_written(name: str, arguments: str) -> None:
    conversation = normal([calls(arguments)])
    assert arguments in Template(tokenizer_named("byte_plain"), PRINTS[name]).render(conversation.messages)


def test_two_arguments_in_one_value() -> None:
    conversation = normal([calls(ODD, '{"a":  2}', '{"x":"raw-1"}')])
    shown = Template(tokenizer_named("byte_plain"), "{{ messages[0].tool_calls | tojson }}").render(
        conversation.messages
    )
    function = '{{"type": "function", "function": {{"name": "add", "arguments": {}}}}}'
    parts = [function.format(a) for a in (ODD, '{"a":  2}', '{"x":"raw-1"}')]
    assert shown == f"[{', '.join(parts)}]"


def test_arguments_are_still_an_object() -> None:
    template = (
        "{%- set a = messages[0].tool_calls[0].function.arguments -%}"
        "{{ a is mapping }} {{ a is string }} {{ a.b }} {{ a['a'] }} {{ 'a' in a }} {{ a | length }}"
        "{% for k, v in a.items() %} {{ k }}={{ v | tojson }}{% endfor %}"
        "{% for k, v in a | items %} {{ k }}={{ v | tojson }}{% endfor %}"
    )
    shown = Template(tokenizer_named("byte_plain"), template).render(normal([calls('{"a":1,  "b" : "x"}')]).messages)
    assert shown == 'True False x 1 True 2 a=1 b="x" a=1 b="x"'


VALUES = [True, 1, 1.5, "<é'\">&", [1, {"b": 2, "a": [None]}], {"z": {}, "a": "😀"}, {}, []]
FILTERS = (
    "tojson",
    "tojson(indent=2)",
    "tojson(ensure_ascii=true)",
    "tojson(true, 4)",
    "tojson(sort_keys=true)",
    "tojson(separators=(',', ':'))",
)


@pytest.mark.parametrize("filter_", FILTERS)
def test_other_values_are_printed_as_transformers_prints_them(filter_: str) -> None:
    template = "{{ messages[0].value | " + filter_ + " }}"
    for value in VALUES:
        messages = [turn("user", "", value=value)]
        theirs = tokenizer_named("byte_plain").apply_chat_template(messages, chat_template=template, tokenize=False)
        assert Template(tokenizer_named("byte_plain"), template).render(messages) == theirs


@pytest.mark.parametrize("template", [QWEN_TOOLS, LLAMA_TOOLS, QWEN_TOOLS_GENERATION, CHATML])
def test_renderings_are_those_of_transformers(template: str) -> None:
    messages = [turn("system", "S"), turn("user", "é<&>"), turn("assistant", "A", reasoning="r")]
    if template != CHATML:
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": [1, 2.5, "x"]}}}
        messages[2:2] = [turn("assistant", "", tool_calls=[call]), turn("tool", "3")]
    tokenizer = tokenizer_named("byte_plain")
    made = Template(tokenizer, template, {"enable_thinking": False})
    for prompt in (False, True):
        theirs = tokenizer.apply_chat_template(
            messages,
            tools=TOOLS,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=prompt,
            enable_thinking=False,
        )
        assert made.render(messages, TOOLS, generation_prompt=prompt) == theirs


def test_transformers_own_filter_is_left_as_it_was() -> None:
    Template(tokenizer_named("byte_plain"), PRINTS["tojson"])
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template("").environment
    assert environment.filters["tojson"](RawJson({"a": 1}, '{"a":1}')) == '{"a": 1}'


def test_templates_run_in_a_sandbox() -> None:
    attack = "{{ messages[0].content.__class__.__mro__ }}"
    assert refusal(attack, [turn("user", "x"), turn("assistant", "y")]).startswith(
        "the chat template refuses this conversation (access to attribute '__class__' of 'str' object is unsafe"
    )
    attack = "{{ messages[0].tool_calls[0].function.arguments.update({'a': 2}) }}"
    assert "refuses this conversation" in refusal(attack, [calls(ODD)])


# --- masks of tool conversations -------------------------------------------------------------------------------------

CONVERSATION = [
    turn("user", "1+1?"),
    calls(ODD),
    turn("tool", "2"),
    turn("assistant", "It is 2."),
]


def test_calls_and_their_closing_token_are_trained_and_answers_of_tools_are_not() -> None:
    assert marked(QWEN_TOOLS, CONVERSATION, tools=TOOLS) == [
        f"<|im_start|>system\n{TOOL_TEXT}"
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
        f'⟦<tool_call>\n{{"name": "add", "arguments": {ODD}}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦It is 2.<|im_end|>⟧\n"
    ]
    start = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert marked(LLAMA_TOOLS, CONVERSATION) == [
        f"<|begin_of_text|>{start.format('user')}1+1?<|eot_id|>{start.format('assistant')}"
        f'⟦{{"name": "add", "parameters": {ODD}}}</s>⟧{start.format("ipython")}"2"<|eot_id|>'
        f"{start.format('assistant')}⟦It is 2.<|eot_id|>⟧"
    ]


def test_reasoning_and_parallel_calls() -> None:
    messages = [
        turn("user", "Q"),
        calls("{}", '{"x": 1}', content="Two at once.", reasoning_content="hm"),
        turn("tool", "a"),
        turn("tool", "b"),
        calls("{}"),
        turn("tool", "c"),
    ]
    call = '<tool_call>\n{{"name": "add", "arguments": {}}}\n</tool_call>'
    empty, full = call.format("{}"), call.format('{"x": 1}')
    assert marked(QWEN_TOOLS, messages) == [
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nTwo at once.\n"
        f"{empty}\n{full}<|im_end|>⟧\n"
        "<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n⟦{empty}<|im_end|>⟧\n"
        "<|im_start|>user\n<tool_response>\nc\n</tool_response><|im_end|>\n"
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning", "id", "name", "timestamp"])
@pytest.mark.parametrize("template", [CHATML, MISTRAL, LLAMA_TOOLS])
def test_what_a_template_never_shows_changes_no_mask(template: str, key: str) -> None:
    messages = [turn("user", "Q"), turn("assistant", "A"), turn("user", "R"), turn("assistant", "B")]
    with_more = [m | ({key: "answer"} if m["role"] == "assistant" else {}) for m in messages]
    assert marked(template, with_more) == marked(template, messages)


def test_consecutive_assistant_turns() -> None:
    assert marked(QWEN_TOOLS, [turn("user", "Q"), calls("{}"), calls("{}", content="A"), turn("assistant", "B")]) == [
        "<|im_start|>user\nQ<|im_end|>\n"
        '<|im_start|>assistant\n⟦<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>⟧\n'
        '<|im_start|>assistant\n⟦A\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦B<|im_end|>⟧\n"
    ]


def test_a_call_behind_a_question_without_a_generation_prompt() -> None:
    """As Mistral's: no header, so a call is all that follows the question; a plain answer's space is not trained."""
    template = MISTRAL.replace(
        "{%- else -%}{{- ' ' +",
        "{%- elif m.tool_calls -%}{{- '[CALLS]' + m.tool_calls[0].function | tojson + '</s>' -}}"
        "{%- elif m.role == 'tool' -%}{{- '[RESULT]' + m.content + '[/RESULT]' -}}"
        "{%- else -%}{{- ' ' +",
    )
    assert marked(template, CONVERSATION) == [
        f'<s>[INST] 1+1? [/INST]⟦[CALLS]{{"name": "add", "arguments": {ODD}}}</s>⟧[RESULT]2[/RESULT] ⟦It is 2.</s>⟧'
    ]


def test_calls_in_a_channel_of_their_own() -> None:
    """As gpt-oss's: the header of an answer is longer than the generation prompt, and a call has another one."""
    template = (
        "{%- for m in messages -%}{{- '<|im_start|>' + m.role -}}"
        "{%- if m.tool_calls -%}{{- ' to=' + m.tool_calls[0].function.name + '<s>' -}}"
        "{{- m.tool_calls[0].function.arguments -}}{{- '<|eot_id|>' -}}"
        "{%- elif m.role == 'assistant' -%}"
        "{{- ' final<s>' + m.content + ('<|im_end|>' if loop.last else '</s>') -}}"
        "{%- else -%}{{- '<s>' + m.content + '</s>' -}}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' -}}{%- endif -%}"
    )
    opened = f"<|im_start|>user<s>1+1?</s><|im_start|>assistant⟦ to=add<s>{ODD}<|eot_id|>⟧<|im_start|>tool<s>2</s>"
    bare = opened.replace("⟦", "").replace("⟧", "")
    assert marked(template, CONVERSATION) == [f"{opened}<|im_start|>assistant final<s>⟦It is 2.<|im_end|>⟧"]
    # An answer that is followed by more is closed otherwise: it is trained where it is the last.
    assert marked(template, [*CONVERSATION, turn("user", "R"), turn("assistant", "B")]) == [
        f"{bare}<|im_start|>assistant final<s>⟦It is 2.<|im_end|>⟧",
        f"{opened}<|im_start|>assistant final<s>It is 2.</s><|im_start|>user<s>R</s>"
        "<|im_start|>assistant final<s>⟦B<|im_end|>⟧",
    ]


@pytest.mark.parametrize("name", ["byte_bpe", "unigram", "wordpiece"])
@pytest.mark.parametrize("template", [QWEN_TOOLS, LLAMA_TOOLS, QWEN_TOOLS_GENERATION])
def test_tokens_of_calls(template: str, name: str) -> None:
    for document in Template(tokenizer_named(name), template).documents(normal(CONVERSATION, TOOLS), "all_assistant"):
        spans = [(a, b) for a, b, _ in document.spans]
        check_mask(name, document.text, spans, *mask_of(tokenizer_named(name), document.text, spans))


# --- template variables ----------------------------------------------------------------------------------------------


def test_a_template_variable_changes_the_prompt() -> None:
    """Without thinking, the empty block is part of the generation prompt: trained by no method."""
    expected = (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        f'⟦<tool_call>\n{{"name": "add", "arguments": {ODD}}}\n</tool_call><|im_end|>⟧\n'
    )
    assert marked(QWEN_TOOLS, CONVERSATION[:2], enable_thinking=False) == [expected]
    assert marked(QWEN_TOOLS, CONVERSATION[:2]) == [expected]
    template = "{{ greeting }}" + CHATML
    assert marked(template, [turn("user", "Q"), turn("assistant", "A")], greeting="Hi\n") == [
        "Hi\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n"
    ]


def test_a_template_variable_that_the_data_fills() -> None:
    with pytest.raises(UserError) as caught:
        Template(tokenizer_named("byte_plain"), CHATML, {"tools": []})
    assert str(caught.value) == (
        "model.template_args.tools: is filled from the data; leave it out, or give it another name."
    )


# --- which turns -----------------------------------------------------------------------------------------------------


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}\n" for role, text in turns)


def asked(*more: dict[str, Any]) -> list[dict[str, Any]]:
    """Return Q, A, R, B, S, C with keys for the answers."""
    out = []
    for question, answer, keys in zip("QRS", "ABC", more, strict=True):
        out += [turn("user", question), turn("assistant", answer, **keys)]
    return out


@pytest.mark.parametrize(
    ("train_on", "keys", "answers"),
    [
        ("all_assistant", [{}, {"train": False}, {}], ["⟦A<|im_end|>⟧", "B<|im_end|>", "⟦C<|im_end|>⟧"]),
        ("all_assistant", [{"weight": 0}, {"weight": 1}, {"weight": 1.0}], ["A<|im_end|>", "⟦B<|im_end|>⟧", "⟦C<|im_end|>⟧"]),
        ("all_assistant", [{"weight": 0.5}, {}, {"weight": 2}], ["⟦A<|im_end|>⟧0.5", "⟦B<|im_end|>⟧", "⟦C<|im_end|>⟧2.0"]),
        ("last_assistant", [{}, {"train": True}, {}], ["A<|im_end|>", "⟦B<|im_end|>⟧", "⟦C<|im_end|>⟧"]),
        ("last_assistant", [{"weight": 3}, {"train": True, "weight": 3}, {"train": False}], ["A<|im_end|>", "⟦B<|im_end|>⟧3.0", "C<|im_end|>"]),
        ("all_assistant", [{"train": True, "weight": 0}, {}, {"train": None}], ["A<|im_end|>", "⟦B<|im_end|>⟧", "⟦C<|im_end|>⟧"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("template", [CHATML, QWEN_TOOLS_GENERATION.replace("(loop.last or reasoning)", "reasoning")])
def test_messages_say_themselves_whether_they_are_trained(
    template: str, train_on: str, keys: list[dict[str, Any]], answers: list[str]
) -> None:
    pairs = [(f"{q}<|im_end|>", a) for q, a in zip("QRS", answers, strict=True)]
    turns = [t for q, a in pairs for t in (("user", q), ("assistant", a))]
    assert marked(template, asked(*keys), train_on) == [chatml(*turns)]


def test_a_template_never_sees_train_and_weight() -> None:
    template = "{{ messages[1].train is defined }} {{ messages[1].weight is defined }} {{ messages[1].content }}"
    assert marked(template, [turn("user", ""), turn("assistant", "A", train=True, weight=0.5)]) == [
        "False False ⟦A⟧0.5"
    ]


def test_train_on_all_leaves_out_what_says_so() -> None:
    messages = [turn("system", "S", train=False), turn("user", "Q"), turn("assistant", "A", train=False)]
    messages += [turn("user", "R", train=False), turn("assistant", "B", weight=0.5), turn("user", "T")]
    expected = (
        "⟦<|im_start|>system\n⟧S⟦<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟧A<|im_end|>"
        "⟦\n<|im_start|>user\n⟧R⟦<|im_end|>\n<|im_start|>assistant\n⟧⟦B<|im_end|>⟧0.5"
        "⟦\n<|im_start|>user\nT<|im_end|>\n⟧"
    )
    assert marked(CHATML, messages, "all") == [expected]
    no_think = QWEN_TOOLS_GENERATION.replace("(loop.last or reasoning)", "reasoning")
    assert marked(no_think, messages, "all") == [expected]
    assert marked(None, messages, "all") == ["SQ".replace("S", "S⟦").replace("Q", "Q⟧") + "AR⟦B⟧0.5⟦T⟧"]
    with pytest.raises(Dropped, match="^no turn to train$"):
        marked(CHATML, [turn("user", "Q", train=False), turn("assistant", "A", weight=0)], "all")


def test_train_on_all_leaves_out_a_call() -> None:
    messages = [CONVERSATION[0], calls(ODD, train=False), *CONVERSATION[2:]]
    assert marked(LLAMA_TOOLS, messages, "all")[0].split("⟧")[1].startswith('{"name": "add"')
    assert marked(LLAMA_TOOLS, messages, "all")[0].split("⟦")[1].endswith("assistant<|end_header_id|>\n\n⟧" + f'{{"name": "add", "parameters": {ODD}}}</s>')  # fmt: skip


# --- one sample a turn -----------------------------------------------------------------------------------------------

THINKING = [
    turn("user", "Q1"),
    turn("assistant", "<think>\nr1\n</think>\n\nA1"),
    turn("user", "Q2"),
    turn("assistant", "<think>\nr2\n</think>\n\nA2"),
    turn("user", "Q3"),
    turn("assistant", "A3"),
]


def test_a_rewritten_turn_is_trained_where_it_is_the_last() -> None:
    before = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    second = "<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    third = "<|im_end|>\n<|im_start|>user\nQ3<|im_end|>\n<|im_start|>assistant\n"
    assert marked(QWEN3, THINKING) == [
        f"{before}⟦<think>\nr1\n</think>\n\nA1<|im_end|>⟧\n",
        f"{before}A1{second}⟦<think>\nr2\n</think>\n\nA2<|im_end|>⟧\n",
        f"{before}A1{second}A2{third}⟦A3<|im_end|>⟧\n",
    ]
    assert marked(STRIPS_REASONING, THINKING[:2]) == [f"{before}⟦<think>\nr1\n</think>\n\nA1<|im_end|>⟧\n"]
    # A conversation that the user ends has no rendering of its own where no answer is shown in it as it was written.
    assert marked(QWEN3, THINKING[:3]) == marked(QWEN3, THINKING[:2])
    assert marked(QWEN3, THINKING, "last_assistant") == marked(QWEN3, THINKING)[-1:]


@pytest.mark.parametrize("template", [QWEN_TOOLS, QWEN_TOOLS_GENERATION])
def test_the_last_answer_of_a_conversation_that_the_user_ends(template: str) -> None:
    """Its reasoning is gone from the whole conversation, so that it is trained where nothing follows it."""
    messages = [turn("user", "Q"), turn("assistant", "A", reasoning_content="r"), turn("user", "R")]
    expected = ["<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦<think>\nr\n</think>\n\nA<|im_end|>⟧\n"]
    for train_on in ("all_assistant", "last_assistant"):
        assert marked(template, messages, train_on) == expected


def test_turns_that_are_shown_as_written_share_a_rendering() -> None:
    messages = [
        *(turn("user", "Q1"), calls("{}", reasoning_content="r1"), turn("tool", "t"), turn("assistant", "A1")),
        *(turn("user", "Q2"), turn("assistant", "A2", reasoning_content="r2")),
        *(turn("user", "Q3"), turn("assistant", "A3")),
    ]
    shown = [text.count("⟦") for text in marked(QWEN_TOOLS, messages)]
    assert shown == [1, 1, 2]
    assert ["r1" in text for text in marked(QWEN_TOOLS, messages)] == [True, False, False]
    messages[3]["reasoning_content"] = "r"
    assert [text.count("⟦") for text in marked(QWEN_TOOLS, messages)] == [2, 1, 1]


def test_weights_go_with_the_turns() -> None:
    messages = [dict(m) for m in THINKING]
    messages[1]["weight"] = 0.5
    messages[3]["train"] = False
    assert [text.partition("⟧")[2] for text in marked(QWEN3, messages)] == ["0.5\n", "\n"]
    messages[5]["train"] = False
    assert len(marked(QWEN3, messages)) == 1


def test_earlier_turns_closed_by_another_token() -> None:
    template = (
        "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content -}}"
        "{{- '<|im_end|>' if loop.last else '<|eot_id|>' -}}{%- endfor -%}"
    )
    first = "<|im_start|>user\nQ<|eot_id|><|im_start|>assistant\n"
    assert marked(template, [turn("user", "Q"), turn("assistant", "A"), turn("user", "R"), turn("assistant", "B")]) == [
        f"{first}⟦A<|im_end|>⟧",
        f"{first}A<|eot_id|><|im_start|>user\nR<|eot_id|><|im_start|>assistant\n⟦B<|im_end|>⟧",
    ]


@pytest.mark.parametrize("template", [QWEN3, STRIPS_REASONING, QWEN_TOOLS_GENERATION, CHATML])
def test_each_answer_is_trained_exactly_once(template: str) -> None:
    answers = [f"<think>reason {i}</think>answer {i}" if i % 3 else f"answer {i}" for i in range(8)]
    messages = [m for i, a in enumerate(answers) for m in (turn("user", f"question {i}"), turn("assistant", a))]
    if template == QWEN_TOOLS_GENERATION:
        for m in messages[1::2]:
            reason, _, answer = m["content"].rpartition("</think>")
            m |= {"content": answer, "reasoning_content": reason.removeprefix("<think>")}
    shown = marked(template, messages)
    trained = [piece.partition("⟧")[0] for text in shown for piece in text.split("⟦")[1:]]
    assert len(trained) == 8
    for i, answer in enumerate(answers):
        own = [t for t in trained if f"answer {i}" in t]
        assert len(own) == 1
        assert ("reason" in own[0]) == ("reason" in answer)
    assert len(shown) == (1 if template == CHATML else len(shown)) and len(shown) > (template != CHATML)


# --- refusals --------------------------------------------------------------------------------------------------------

ASK = [turn("user", "Q")]
ANSWERS = [*ASK, turn("assistant", "A"), turn("user", "R"), turn("assistant", "B")]
NO_PROMPT = QWEN_TOOLS.partition("{%- if add_generation_prompt")[0]
HIDES = "{%- for m in messages -%}{{- '<|im_start|>' + (m.content if m.role == 'user' else '') + '<|im_end|>' -}}{%- endfor -%}"
CHANGES_TWICE = CHATML.replace("m.content +", "(m.content + m.content if m.role == 'assistant' else m.content) +")
REFUSALS: dict[str, tuple[str | None, list[dict[str, Any]], str, str]] = {
    "calls that the template does not know": (
        CHATML,
        CONVERSATION,
        "all_assistant",
        "the chat template does not show that messages[1] calls add, so it would be trained on something else; give another by "
        "model.chat_template, or set train: false on that message",
    ),
    "calls without a template": (
        None,
        CONVERSATION,
        "all_assistant",
        "the chat template does not show that messages[1] calls add, so it would be trained on something else; give another by "
        "model.chat_template, or set train: false on that message",
    ),
    "the second of two calls": (
        QWEN_TOOLS.replace("for call in m.tool_calls", "for call in m.tool_calls[:1]"),
        [*ASK, calls("{}", "{}")],
        "all_assistant",
        "the chat template does not show that messages[1] calls add, so it would be trained on something else; give another by "
        "model.chat_template, or set train: false on that message",
    ),
    "two calls where one is allowed": (
        LLAMA_TOOLS,
        [*ASK, calls("{}", "{}")],
        "all_assistant",
        "the chat template refuses this conversation (one call at a time)",
    ),
    "no generation prompt and a header of its own": (
        NO_PROMPT.replace("'<|im_start|>assistant\n' -}}", "('<|im_start|>call\n' if m.tool_calls else '<|im_start|>assistant\n') -}}"),
        CONVERSATION,
        "all_assistant",
        "the chat template does not show where messages[1] begins (it does not begin with the generation prompt), so it cannot be "
        "masked exactly; give another by model.chat_template, or set train: false on that message",
    ),
    "no end": (
        LLAMA_TOOLS.replace("'}</s>'", "'}'"),
        CONVERSATION,
        "all_assistant",
        "the chat template does not show where messages[1] ends (no special token of the tokenizer closes it), so it cannot be "
        "masked exactly; give another by model.chat_template, or set train: false on that message",
    ),
    "hidden": (
        HIDES,
        ANSWERS,
        "last_assistant",
        "the chat template does not show messages[3] as it was written (it leaves it out, or changes it), so it cannot be masked "
        "exactly; give another by model.chat_template",
    ),
    "a question that is hidden": (
        CHATML.replace("in messages", "in messages if m.role != 'user'"),
        ANSWERS,
        "all_assistant",
        "the chat template leaves out messages[0], whose role is 'user'; take it out of the row, or give another template by "
        "model.chat_template",
    ),
    "a system turn that no question follows": (
        MISTRAL,
        [*ANSWERS, turn("system", "Be brief.")],
        "all",
        "the chat template leaves out messages[4], whose role is 'system'; take it out of the row, or give another template by "
        "model.chat_template",
    ),
    "today's date": (
        "{{ strftime_now('%d %b %Y') }}" + CHATML,
        ANSWERS,
        "all_assistant",
        "the chat template prints today's date (strftime_now), which would make the data another every day; set the date by "
        "model.template_args={date_string: 26 Jul 2024} if the template reads it there, or give another by model.chat_template",
    ),
    "the name in the header": (
        CHATML.replace("m.role +", "m.role + (' ' + m.name if m.name else '') +"),
        [*ASK, turn("assistant", "A", name="Ann")],
        "all_assistant",
        "the chat template does not show where messages[1] begins (it does not begin with the generation prompt), so it cannot be "
        "masked exactly; give another by model.chat_template, or set train: false on that message",
    ),
    "left out of all": (
        CHANGES_TWICE.replace("m.role == 'assistant'", "m.role == 'user'"),
        [turn("user", "Q", train=False), turn("assistant", "A")],
        "all",
        "the chat template does not show messages[0] as it was written, so it cannot be left out of the loss exactly; take 'train' "
        "off that message, or give another template by model.chat_template",
    ),
    "rewritten and left out of all": (
        STRIPS_REASONING,
        [*ASK, turn("assistant", "<think>x</think>A", train=False), *ANSWERS[2:]],
        "all",
        "the chat template does not show messages[1] as it was written (it rewrites earlier turns, say), so it cannot be masked "
        "exactly; set data.train_on=last_assistant, or give another template by model.chat_template",
    ),
    "blocks for other turns": (
        "{%- for m in messages -%}{%- generation -%}{{ m.content }}{%- endgeneration -%}{%- endfor -%}",
        ANSWERS,
        "all_assistant",
        "the template marks 4 generation blocks for 2 assistant turns, so they cannot be masked exactly; mend the template's "
        "{% generation %} or give another by model.chat_template",
    ),
    "nested blocks": (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- generation -%}{%- generation -%}{{ m.content }}"
        "{%- endgeneration -%}{%- endgeneration -%}{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}",
        ANSWERS,
        "all_assistant",
        "the template's {% generation %} blocks cannot be located exactly (they are nested or inside a filter, say); mend the "
        "template or give another by model.chat_template",
    ),
    "an undefined thing": (
        "{{ messages[0].name.first }}",
        ANSWERS,
        "all_assistant",
        "the chat template refuses this conversation ('dict object' has no attribute 'name')",
    ),
    "prints what has no JSON": (
        CHATML + "{{ missing | tojson }}",
        ANSWERS,
        "all_assistant",
        "the chat template refuses this conversation (Object of type Undefined is not JSON serializable)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    template, messages, train_on, sentence = REFUSALS[name]
    assert refusal(template, messages, train_on) == sentence


# --- what a rendering must show ---------------------------------------------------------------------------------------

PLAIN_TALK = [turn("user", "add 1 and 1"), turn("assistant", "2")]
UNSHOWN = (
    "the chat template does not show the tool add, so the model would learn to call what it was not told of; give another by "
    "model.chat_template, or leave the tools of the rows out by data.tool_key=none"
)


@pytest.mark.parametrize("template", [CHATML, MISTRAL, None, QWEN_TOOLS.replace("if tools", "if false")])
@pytest.mark.parametrize("train_on", ["all_assistant", "all"])
def test_tools_that_the_template_does_not_show(template: str | None, train_on: str) -> None:
    """That the question has the tool's name in it, or a call that is shown, tells the model of no tool."""
    with pytest.raises(RowError) as caught:
        marked(template, PLAIN_TALK, train_on, tools=TOOLS)
    assert str(caught.value) == UNSHOWN
    if template is not None and "tool_calls" in template:
        with pytest.raises(RowError, match="^the chat template does not show the tool add, so"):
            marked(template, CONVERSATION, train_on, tools=TOOLS)


def test_tools_that_are_shown() -> None:
    odd = [{"name": 'say "é"\n'}]
    for tools in (TOOLS, odd):
        for template in (QWEN_TOOLS, LLAMA_TOOLS, QWEN_TOOLS_GENERATION):
            assert marked(template, PLAIN_TALK, tools=tools)
    by_hand = [turn("system", "You may call add(a, b)."), *PLAIN_TALK]
    assert marked(CHATML, by_hand, tools=TOOLS) == marked(CHATML, by_hand)
    needs = (
        "{%- if messages[0].content != 'x' and not tools -%}{{ raise_exception('tools, please') }}{%- endif -%}{{ tools | tojson }}"
        + CHATML
    )
    assert len(marked(needs, PLAIN_TALK, tools=TOOLS)) == 1


def test_messages_that_are_changed_are_not_left_out() -> None:
    """A content is shown if it is there in order, as JSON, or if something else in its place would be."""
    talk = [turn("system", " Be brief. /no_think"), turn("user", 'Q\n"é"'), turn("assistant", "A")]
    for template in (
        CHATML.replace("m.content +", "m.content.replace('/no_think', '') +"),
        CHATML.replace("m.content +", "(m.content if m.role == 'assistant' else m.content | upper) +"),
        CHATML.replace("m.content +", "(m.content if m.role == 'assistant' else m.content | tojson) +"),
        CHATML.replace(
            "m.content +", "(m.content if m.role == 'assistant' else m.content | tojson(ensure_ascii=true)) +"
        ),
    ):
        assert template != CHATML
        assert len(marked(template, talk)) == 1
    assert len(marked(MISTRAL, talk)) == 1
    assert len(marked(MISTRAL, [turn("user", "Q"), turn("assistant", "A"), turn("system", "S"), *talk[1:]])) == 1


# --- a date that stays ------------------------------------------------------------------------------------------------

# As Llama 3.2's.
DATED = (
    "{%- if not date_string is defined -%}{%- if strftime_now is defined -%}"
    "{%- set date_string = strftime_now('%d %b %Y') -%}{%- else -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}{%- endif -%}"
    "{{- 'Today Date: ' + date_string + '\n' -}}"
)


def test_a_template_does_not_know_the_date() -> None:
    talk = [turn("user", "Q"), turn("assistant", "A")]
    shown = marked(CHATML, talk)[0]
    assert marked(DATED + CHATML, talk) == ["Today Date: 26 Jul 2024\n" + shown]
    assert marked(DATED + CHATML, talk, date_string="1 May 2025") == ["Today Date: 1 May 2025\n" + shown]
    from transformers.utils.chat_template_utils import _compile_jinja_template

    assert "strftime_now" in _compile_jinja_template("").environment.globals


# --- a tokenizer of several templates ---------------------------------------------------------------------------------


def named_templates(**templates: str) -> Any:
    tokenizer = byte_plain()
    tokenizer.chat_template = templates
    return tokenizer


def test_a_tokenizer_with_a_template_for_tools() -> None:
    tokenizer = named_templates(default=CHATML, tool_use=QWEN_TOOLS, rag="x")
    assert Template(tokenizer, "default").text == CHATML
    assert Template(tokenizer, "default", tools=True).text == QWEN_TOOLS
    assert Template(named_templates(default=CHATML), "default", tools=True).text == CHATML
    assert Template(tokenizer, MISTRAL, tools=True).text == MISTRAL
    with pytest.raises(UserError) as caught:
        Template(named_templates(tool_use=QWEN_TOOLS, rag="x"), "default")
    assert str(caught.value).endswith(
        " has several chat templates (rag, tool_use) and none of them is called default; give one as a file."
    )


# --- empty answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["all_assistant", "last_assistant", "all"])
@pytest.mark.parametrize("template", [CHATML, QWEN_TOOLS, QWEN_TOOLS_GENERATION, None])
def test_empty_answers_are_dropped(template: str | None, train_on: str) -> None:
    for answer in ("", " \n"):
        with pytest.raises(Dropped, match="^empty answer$"):
            marked(template, [*ASK, turn("assistant", answer)], train_on)
        with pytest.raises(Dropped, match="^empty answer$"):
            marked(template, [*ASK, turn("assistant", "A", train=False), *ASK, turn("assistant", answer)], train_on)
    assert marked(template, [*ASK, turn("assistant", "", train=False), *ASK, turn("assistant", "A")], train_on)
    assert marked(template, [*ASK, turn("assistant", "", train=True), *ASK, turn("assistant", "A")], train_on)


def test_an_answer_is_not_empty_with_calls_or_reasoning() -> None:
    thought = [*ASK, turn("assistant", "", reasoning_content="r")]
    assert marked(QWEN_TOOLS, thought)[0].endswith("⟦<think>\nr\n</think>\n\n<|im_end|>⟧\n")
    assert marked(QWEN_TOOLS, [*ASK, calls("{}")])
    with pytest.raises(Dropped, match="^empty answer$"):
        marked(CHATML, thought)  # it never shows reasoning
    with pytest.raises(Dropped, match="^empty answer$"):
        marked(QWEN_TOOLS, [*ASK, turn("assistant", "", reasoning_content=" ")])


def test_no_turn_to_train() -> None:
    with pytest.raises(Dropped, match="^no turn to train$"):
        marked(CHATML, [*ASK, turn("assistant", "A", train=False)])


def test_the_whole_alone_refuses_what_documents_divide() -> None:
    made = Template(tokenizer_named("byte_plain"), QWEN3)
    with pytest.raises(RowError) as caught:
        made.trained_spans(Conversation(THINKING), "all_assistant")
    assert str(caught.value) == (
        "the chat template does not show messages[1] as it was written (it rewrites earlier turns, say), so it cannot be masked "
        "exactly; set data.train_on=last_assistant, or give another template by model.chat_template"
    )


def test_json_of_the_examples_is_json() -> None:
    assert json.loads(ODD) == {"a": 1, "b": 1000.0, "c": "é"}
