"""Data: from rows to the micro-batches of a step."""
