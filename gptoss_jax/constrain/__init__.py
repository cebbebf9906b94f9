"""Answers held to a form: JSON schemas, expressions, grammars. Knows bytes, ids and text; knows no model and no jax."""

from gptoss_jax.constrain.grammars import Grammar, Grammars
from gptoss_jax.constrain.schema import UnsupportedSchema

__all__ = ["Grammar", "Grammars", "UnsupportedSchema"]
