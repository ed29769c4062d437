"""Samples of random tokens, each as long as a sample may be: for measuring, without reading or writing anything."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from engine import hub
from engine.config.schema import RunConfig, SourceSection
from engine.data.samples import Samples, Summary
from engine.types import Sample

NUM_SAMPLES = {"train": 1_000_000, "val": 1_024}
"""By split; validation goes through all of its samples."""
FORMAT = 1
"""Raised whenever the same seed and index give other tokens."""


class DummySamples(Samples):
    """Samples made as they are asked for, a pure function of seed and index; every token is trained.

    Args:
        num_samples: How many there are.
        length: Tokens of each.
        vocabulary: Ids are below it.
        seed: Of the tokens.
    """

    def __init__(self, *, num_samples: int, length: int, vocabulary: int, seed: int) -> None:
        self.vocabulary, self.seed = vocabulary, seed
        self.lengths = np.broadcast_to(np.int32(length), num_samples)  # one number, seen as many
        self.shared = np.broadcast_to(np.int32(0), num_samples)
        self.summary = Summary(
            format="dummy",
            read=num_samples,
            used=num_samples,
            documents=num_samples,
            tokens=num_samples * length,
            trained_tokens=num_samples * (length - 1),  # the first token of a document is never predicted
            longest=length,
        )
        parts = f"dummy {FORMAT} {num_samples} {length} {vocabulary} {seed}"
        self.folder, self.revision, self.path = None, None, "builtin:dummy"
        self.fingerprint = hashlib.sha256(parts.encode()).hexdigest()[:24]

    @property
    def row_hashes(self) -> NDArray[np.uint64]:
        """A number drawn for each sample."""
        return np.random.Philox(key=[self.seed, len(self)]).random_raw(len(self))

    def __getitem__(self, i: int) -> Sample:
        length = int(self.lengths[i])
        # Philox is a counter under a key (Salmon et al., 2011); numpy keeps its raw output the same over versions.
        drawn = np.random.Philox(key=[self.seed, i]).random_raw(length)
        ids = (drawn % np.uint64(self.vocabulary)).astype(np.int32)
        return Sample(ids, np.array([[0, length]], np.int32))


def prepare(config: RunConfig, source: SourceSection) -> DummySamples:
    """Return made-up samples to train on, or fewer and others to validate on."""
    return made_up(config, source, vocabulary=len(hub.load_tokenizer(config.model)))


def made_up(config: RunConfig, source: SourceSection, *, vocabulary: int) -> DummySamples:
    """Return the same for a tokenizer of so many tokens."""
    split = "val" if source.name == "validation" or source in config.data.validation else "train"
    return DummySamples(
        num_samples=min(NUM_SAMPLES[split], source.limit or NUM_SAMPLES[split]),
        length=config.data.max_length,
        vocabulary=min(vocabulary, config.model.config_overrides.get("vocab_size", vocabulary)),
        seed=config.run.seed + (split == "val"),
    )
