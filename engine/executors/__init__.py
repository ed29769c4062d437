"""Executors: where the ranks of a run are."""
