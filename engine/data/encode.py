"""From a conversation to a sample: render, mask, tokenise, cut."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.config.schema import RunConfig
from engine.data.readers import Message, RowError, check_messages
from engine.data.template import Template, TokenMask
from engine.errors import UserError
from engine.types import Sample


class Encoder:
    """Turns a row into a sample, or into the reason why not."""

    def __init__(self, tokenizer: Any, template: str | None, config: RunConfig) -> None:
        self.template = Template(tokenizer, template, config.model.template_args)
        self.mask = TokenMask(tokenizer)
        self.data = config.data
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        for key, token in (("add_bos", self.bos), ("add_eos", self.eos)):
            if getattr(self.data, key) and token is None:
                raise UserError(f"data.{key}=true: the tokenizer in {tokenizer.name_or_path} has no such token.")

    def __call__(self, messages: list[Message]) -> tuple[Sample | None, str]:
        """Return a sample and "" or "cut", or None and the reason it is dropped."""
        check_messages(messages, self.data.train_on)
        text, spans = self.template.trained_spans(messages, self.data.train_on)
        ids, mask = self.mask.encode(text, spans)
        if self.data.add_bos and (not len(ids) or ids[0] != self.bos):
            ids, mask = np.insert(ids, 0, self.bos), np.insert(mask, 0, False)
        if self.data.add_eos and (not len(ids) or ids[-1] != self.eos):
            ids, mask = np.append(ids, np.int32(self.eos)), np.append(mask, messages[-1]["role"] == "assistant")
        if not mask[1:].any():
            raise RowError("nothing to train: no token of a trained turn is left after the template")
        fate = ""
        if len(ids) > self.data.max_length:
            if self.data.overlong == "error":
                raise RowError(
                    f"{len(ids)} tokens, more than data.max_length={self.data.max_length}; raise it, or set data.overlong=drop"
                )
            if self.data.overlong == "drop":
                return None, f"longer than {self.data.max_length} tokens"
            ids, mask, fate = ids[: self.data.max_length], mask[: self.data.max_length], "cut"
            if not mask[1:].any():
                return None, "nothing to train after the cut"
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))).astype(np.int32)
        return Sample(ids, edges.reshape(-1, 2)), fate
