"""What the processes of a ``RankPool`` need, imported once: they are forked from a process that has done nothing else."""

from __future__ import annotations

import contextlib

from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.mistral import modeling_mistral  # noqa: F401

from engine import worker  # noqa: F401
from engine.backends import torch_backend  # noqa: F401

with contextlib.suppress(ImportError):  # as it comes; the backend's own changes to it are made where it is used
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401
