"""Recipes: their schema, their composition, and what can be checked before a run starts."""
