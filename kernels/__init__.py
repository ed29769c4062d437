"""Tensors in, tensors out: log-probabilities without logits, and attention over packed documents.

Shape suffixes: T tokens, N trained tokens, V vocabulary, H hidden size, C tokens of a chunk, B batch, L tokens of a document,
A attention heads, K key/value heads, D size of a head.
"""
