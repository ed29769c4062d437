"""Small tokenizers, chat templates and an oracle for "which characters does this token hold", independent of the engine."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from engine.data.conversation import Conversation
from engine.data.encode import TokenMask
from engine.data.template import Span, Template

SPECIAL = (
    "<|begin_of_text|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<s>",
    "</s>",
)
SENTENCES = (
    "What is the capital of France? The capital of France is Paris.",
    "Context: the sky is blue. Question: which colour is the sky? Answer: blue.",
    "<think>\nThe user asks for a number, so the answer is forty-two.\n</think>\n\nThe answer is 42.",
    "  Indented text,  with   spaces,\n\n\tand a tab at the end.  \n",
    "user assistant system tool the the the answer answer answer",
)

CHATML = (
    "{%- for m in messages -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
CHATML_GENERATION = (
    "{%- for m in messages -%}"
    "{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' -%}"
    "{%- generation -%}{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}"
    "{%- else -%}{{- m.content + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
LLAMA3 = (
    "{%- for m in messages -%}"
    "{%- if loop.first -%}{{- '<|begin_of_text|>' -}}{%- endif -%}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
)
MISTRAL = (
    "{{- '<s>' -}}"
    "{%- set ns = namespace(system='') -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{%- set ns.system = m.content + '\n\n' -%}"
    "{%- elif m.role == 'user' -%}{{- '[INST] ' + ns.system + m.content + ' [/INST]' -}}{%- set ns.system = '' -%}"
    "{%- elif loop.first -%}{{- raise_exception('the first turn must be the user\\'s') -}}"
    "{%- else -%}{{- ' ' + m.content + '</s>' -}}{%- endif -%}"
    "{%- endfor -%}"
)
STRIPS_REASONING = (
    "{%- for m in messages -%}"
    "{%- set content = m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content -%}"
    "{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
QWEN3 = (
    "{%- for m in messages -%}"
    "{%- set ns = namespace(content=m.content, reasoning='') -%}"
    "{%- if m.role == 'assistant' and '</think>' in m.content -%}"
    "{%- set ns.reasoning = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}"
    "{%- set ns.content = m.content.split('</think>')[-1].lstrip('\n') -%}"
    "{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.last and ns.reasoning -%}"
    "{{- '<think>\n' + ns.reasoning.strip('\n') + '\n</think>\n\n' + ns.content.lstrip('\n') -}}"
    "{%- else -%}{{- ns.content -}}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
PLAIN = (
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{- 'Context: ' + m.content | trim + '\n' -}}"
    "{%- elif m.role == 'user' -%}{{- 'Question: ' + m.content | trim + '\n' -}}"
    "{%- else -%}{{- 'Answer: ' + m.content | trim + '\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Answer: ' -}}{%- endif -%}"
)
QWEN_TOOLS = (
    "{%- set ns = namespace(query=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.query = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- if tools -%}"
    "{{- '<|im_start|>system\n' -}}"
    "{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\n\n' -}}{%- endif -%}"
    "{{- '# Tools' -}}{%- for tool in tools -%}{{- '\n' + tool | tojson -}}{%- endfor -%}{{- '<|im_end|>\n' -}}"
    "{%- elif messages[0].role == 'system' -%}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' -}}"
    "{%- elif m.role == 'assistant' -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- set reasoning = m.reasoning_content | default('') -%}"
    "{%- if loop.index0 > ns.query and (loop.last or reasoning) -%}"
    "{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' -}}"
    "{%- endif -%}"
    "{{- m.content -}}"
    "{%- for call in m.tool_calls -%}"
    "{%- if m.content or not loop.first -%}{{- '\n' -}}{%- endif -%}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' -}}'
    "{%- if call.function.arguments is string -%}{{- call.function.arguments -}}"
    "{%- else -%}{{- call.function.arguments | tojson -}}{%- endif -%}"
    "{{- '}\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- elif m.role == 'tool' -%}"
    "{%- if messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{%- endif -%}"
)
# As Llama 3.1's: one call a turn, which is closed by another token than an answer (</s> here).
LLAMA_TOOLS = (
    "{{- '<|begin_of_text|>' -}}"
    "{%- if tools -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' -}}"
    "{%- for tool in tools -%}{{- tool | tojson(indent=4) + '\n\n' -}}{%- endfor -%}{{- '<|eot_id|>' -}}"
    "{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'tool' -%}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' -}}"
    "{%- elif m.tool_calls -%}"
    "{%- if m.tool_calls | length != 1 -%}{{- raise_exception('one call at a time') -}}{%- endif -%}"
    "{%- set call = m.tool_calls[0].function -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}"
    "{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' -}}{{- call.arguments | tojson -}}{{- '}</s>' -}}"
    "{%- else -%}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
)
QWEN_TOOLS_GENERATION = QWEN_TOOLS.replace(
    "{{- '<|im_start|>assistant\n' -}}{%- set", "{{- '<|im_start|>assistant\n' -}}{%- generation -%}{%- set"
).replace(
    "{{- '<|im_end|>\n' -}}{%- elif m.role == 'tool' -%}",
    "{{- '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}{%- elif m.role == 'tool' -%}",
)
TEMPLATES: dict[str, str] = {
    "chatml_generation": CHATML_GENERATION,
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "strips_reasoning": STRIPS_REASONING,
    "qwen3": QWEN3,
    "plain": PLAIN,
}


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|im_end|>")


def byte_symbols() -> dict[int, str]:
    """Return GPT-2's printable stand-in for each byte: printable Latin-1 as it is, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def byte_plain() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer without merges: a token is a byte or a special token."""
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(byte_symbols().values())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer)


def _trained_bpe(split: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    parts = [pre_tokenizers.Split(Regex(split), "isolated"), level] if split else [level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = sorted(byte_symbols().values())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_bpe() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer with Llama-3's splits and offsets that leave out spaces."""
    return _wrap(_trained_bpe(LLAMA3_SPLIT))


def byte_bpe_unsplit() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer whose tokens run over words, lines and turns."""
    return _wrap(_trained_bpe(None))


def byte_bpe_nfc() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer that composes its text first (NFC), as Qwen's do."""
    tokenizer = _trained_bpe(LLAMA3_SPLIT)
    tokenizer.normalizer = normalizers.NFC()
    return _wrap(tokenizer)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Make a BPE tokenizer as Llama-2's: spaces as ``▁``, one put in front, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.normalizer = spaces
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    vocab = dict(state["vocab"])
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [tuple(m) for m in state["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = spaces
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    return _wrap(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """Make a Unigram tokenizer as SentencePiece's: spaces as ``▁``, one put in front, unknown characters as bytes."""
    tokenizer = Tokenizer(models.Unigram())
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.normalizer = spaces
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    vocab = [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    vocab += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = spaces
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    return _wrap(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """Make a Unigram tokenizer as T5's: words behind ``▁``, unknown characters as one token that says nothing."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return _wrap(tokenizer)


def wordpiece() -> PreTrainedTokenizerFast:
    """Make a WordPiece tokenizer as BERT's: lower case, accents and white space lost."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return _wrap(tokenizer)


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    maker.__name__: maker
    for maker in (
        byte_plain,
        byte_bpe,
        byte_bpe_unsplit,
        byte_bpe_nfc,
        sentencepiece,
        unigram,
        metaspace,
        wordpiece,
    )
}


@cache
def tokenizer_named(name: str) -> PreTrainedTokenizerFast:
    """Return one of the tokenizers, made once."""
    return MAKERS[name]()


class Held(NamedTuple):
    """The characters of a text that a token holds: start:stop.

    exact: these and no others. chunk: some of these, which one cannot be said (a composed character). free: none for
    certain (a space that the tokenizer put in front).
    """

    start: int
    stop: int
    kind: Literal["exact", "chunk", "free"] = "exact"


def tokens_of(name: str, text: str) -> list[int]:
    """Tokenise without the engine."""
    ids: list[int] = tokenizer_named(name)(text, add_special_tokens=False)["input_ids"]
    return ids


def holders(name: str, text: str) -> list[Held]:
    """Return what each token of a text holds, found without the engine."""
    ids = tokens_of(name, text)
    if name.startswith("byte"):
        return _held_bytes(name, text, ids)
    return _held_pieces(name, text, ids) if name in ("sentencepiece", "unigram") else _held_offsets(name, text, ids)


def spans_of(made: Template, messages: list[dict[str, Any]], train_on: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the engine's rendering of a conversation without tools, and its spans, which weigh one."""
    text, spans = made.trained_spans(Conversation(messages), train_on)
    assert all(weight == 1.0 for _, _, weight in spans)
    return text, [(a, b) for a, b, _ in spans]


def mask_of(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Any, Any]:
    """Return the engine's tokens of a text, and which of them are trained."""
    tokens = TokenMask(tokenizer).encode(text, [Span(*span) for span in spans])
    return tokens.ids, tokens.weights > 0


def check_mask(name: str, text: str, spans: Sequence[tuple[int, int]], ids: Any, mask: Any) -> None:
    """Assert that exactly the tokens that hold a character of a span are trained."""
    assert ids.tolist() == tokens_of(name, text)
    held = holders(name, text)
    assert len(held) == len(mask)
    for token, trained, (start, stop, kind) in zip(
        tokenizer_named(name).convert_ids_to_tokens(ids.tolist()), mask.tolist(), held, strict=True
    ):
        touches = any(a < b and start < b and stop > a for a, b in spans)
        inside = any(a <= start and stop <= b for a, b in spans) and start < stop
        where = f"{name}: token {token!r} holds {text[start:stop]!r} at {start}:{stop}; spans {spans} of {text!r}"
        assert not trained or touches, f"trained, but holds nothing of a span: {where}"
        if kind == "exact":
            assert trained or not touches, f"not trained, but holds some of a span: {where}"
        elif kind == "chunk":
            assert trained or not inside, f"not trained, but lies in a span: {where}"


def _held_bytes(name: str, text: str, ids: list[int]) -> list[Held]:
    """Count bytes: the tokens' bytes, joined, are the text's (composed first, where the tokenizer composes)."""
    symbols = {symbol: byte for byte, symbol in byte_symbols().items()}
    composes = name.endswith("nfc")
    joined, owner = b"", []
    for start, stop, chunk in _chunks(text, composes):
        joined += chunk.encode()
        owner += [(start, stop)] * len(chunk.encode())
    held, at, seen = [], 0, b""
    for token in tokenizer_named(name).convert_ids_to_tokens(ids):
        own = token.encode() if token in SPECIAL else bytes(symbols[c] for c in token)
        seen += own
        owners = owner[at : at + len(own)]
        kind = "exact" if all(b - a == 1 for a, b in owners) else "chunk"
        held.append(Held(owners[0][0], owners[-1][1], kind))  # type: ignore[arg-type]
        at += len(own)
    assert seen == joined
    return held


def _chunks(text: str, composes: bool) -> list[tuple[int, int, str]]:
    """Cut a text where composing both sides apart changes nothing; returns start, stop and the composed chunk."""
    out = []
    at = 0
    for segment in re.split("(" + "|".join(map(re.escape, sorted(SPECIAL, key=len, reverse=True))) + ")", text):
        if segment in SPECIAL or not composes:
            out += [(at + i, at + i + 1, c) for i, c in enumerate(segment)]
        else:
            compose = lambda s: unicodedata.normalize("NFC", s)  # noqa: E731
            whole, n = compose(segment), len(segment)
            cuts = [k for k in range(n + 1) if compose(segment[:k]) + compose(segment[k:]) == whole]
            out += [(at + a, at + b, compose(segment[a:b])) for a, b in zip(cuts, cuts[1:], strict=False)]
        at += len(segment)
    return out


def _held_pieces(name: str, text: str, ids: list[int]) -> list[Held]:
    """Read the tokens' own strings along the text."""
    held: list[Held] = []
    at, pending, fresh = 0, b"", True
    for token in tokenizer_named(name).convert_ids_to_tokens(ids):
        start = at
        if token in SPECIAL:
            assert text.startswith(token, at)
            at, fresh = at + len(token), True
            held.append(Held(start, at))
            continue
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            pending += bytes([int(byte[1], 16)])
            held.append(Held(at, at + 1))
            if pending == text[at].encode():
                at, pending = at + 1, b""
            continue
        own = token[1:] if fresh else token
        assert not fresh or token[0] == "▁"
        fresh = False
        for c in own:
            assert text[at] == c or (c == "▁" and text[at] == " ")
            at += 1
        held.append(Held(start, at) if own else Held(start, start + 1, "free"))
    assert at == len(text) and not pending
    return held


def _held_offsets(name: str, text: str, ids: list[int]) -> list[Held]:
    """Ask the tokenizers library, without the post-processor that shortens offsets; what a tokenizer drops nobody holds."""
    raw = Tokenizer.from_str(tokenizer_named(name).backend_tokenizer.to_str())
    raw.post_processor = None
    encoding = raw.encode(text, add_special_tokens=False)
    assert encoding.ids == ids
    held, fresh = [], True
    for token, (start, stop) in zip(encoding.tokens, encoding.offsets, strict=True):
        held.append(Held(start, stop, "free" if fresh and token == "▁" else "exact"))
        fresh = token in SPECIAL
    return held
