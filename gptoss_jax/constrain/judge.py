"""Whether a text is JSON that fits a schema, by all of the schema's keywords. Knows JSON and schemas; knows no ids.

Text and schema may both come from strangers, and judging ends in any case: it has a budget, recursion ends as an error,
nothing is fetched, and an expression is not given to Python's `re`, which some keep busy for years.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jsonschema.validators
from jsonschema.exceptions import ValidationError

from gptoss_jax.constrain.dialects import validator_kind
from gptoss_jax.constrain.schema import resolve
from gptoss_jax.errors import UserError

MAX_COMPLAINTS = 20
MAX_WORK = 50_000  # keywords that are looked at, a second's worth; and twice as many as the text has characters
_PER_KEYWORD = 32  # values of an enum, or characters of a string with a pattern, in the time of a keyword

Fits: TypeAlias = Callable[[str], bool]
_Rule: TypeAlias = Callable[[Any, Any, Any, dict[str, Any]], Iterator[ValidationError] | None]


class Judge:
    """Judges answers by a schema.

    Args:
        schema: as `read_schema` gives it.
        fits_pattern: makes of an expression what says whether a string, as JSON, fits it.
    """

    def __init__(self, schema: dict[str, Any], fits_pattern: Callable[[str], Fits]):
        self._schema = schema
        self._fits_pattern = fits_pattern

    def complaints(self, text: str) -> list[str]:
        """What is wrong, at most MAX_COMPLAINTS; nothing if the text fits."""
        try:
            answer = json.loads(text, parse_float=_number)
        except (ValueError, RecursionError) as error:
            return [f"the text is no JSON: {error}"]
        found = []
        rules = _Rules(self._schema, self._fits_pattern, work=MAX_WORK + 2 * len(text))
        try:
            for error in rules.validator().iter_errors(answer):
                complaint = f"{error.json_path}: {error.message[:200]}"
                found.append(complaint.encode(errors="backslashreplace").decode())  # a name may be half a character
                if len(found) == MAX_COMPLAINTS:
                    break
        except (UserError, ArithmeticError, RecursionError) as error:  # multipleOf of an integer that no float holds
            found.append(f"the text cannot be judged: {error}")
        return found


class _Rules:
    """What keywords mean: for one answer, as they share a budget."""

    def __init__(self, schema: dict[str, Any], fits_pattern: Callable[[str], Fits], *, work: int):
        self._schema = schema
        self._fits_pattern = fits_pattern
        self._patterns: dict[str, Fits] = {}
        self._left = work

    def validator(self) -> Any:
        """jsonschema's, with the rules below in place of its own."""
        own: dict[str, _Rule] = {
            "$ref": self._ref,
            "$dynamicRef": self._no_ref,
            "$recursiveRef": self._no_ref,
            "pattern": self._pattern,
            "patternProperties": self._pattern_properties,
            "additionalProperties": self._additional_properties,
            "uniqueItems": self._unique_items,
        }
        kind = validator_kind(self._schema)
        rules = {keyword: self._counted(rule) for keyword, rule in {**kind.VALIDATORS, **own}.items()}
        return jsonschema.validators.extend(kind, rules)(self._schema)

    def _counted(self, rule: _Rule) -> _Rule:
        def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError] | None:
            # The values of an `enum` are compared with one by one.
            self._spend(1 + (len(value) // _PER_KEYWORD if isinstance(value, list) else 0))
            return rule(validator, value, instance, schema)

        return counted

    def _spend(self, work: int) -> None:
        self._left -= work
        if self._left < 0:
            raise UserError("the schema has it look at too much")

    def _ref(self, validator: Any, reference: str, instance: Any, _: dict[str, Any]) -> Iterator[ValidationError]:
        yield from validator.descend(instance, resolve(self._schema, reference))

    def _no_ref(self, _: Any, reference: Any, __: Any, ___: dict[str, Any]) -> None:
        raise UserError(f"{reference!r} is a dynamic reference, which is not followed")

    def _matches(self, pattern: str, text: str) -> bool:
        self._spend(1 + len(text) // _PER_KEYWORD)
        if pattern not in self._patterns:
            self._patterns[pattern] = self._fits_pattern(pattern)
        # As the grammar has it: characters by themselves, but for those that it wants escaped.
        return self._patterns[pattern](json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f"))

    def _pattern(self, _: Any, pattern: str, instance: Any, __: dict[str, Any]) -> Iterator[ValidationError]:
        if isinstance(instance, str) and not self._matches(pattern, instance):
            yield ValidationError(f"{instance[:100]!r} does not match {pattern!r}")

    def _pattern_properties(
        self, validator: Any, patterns: dict[str, Any], instance: Any, _: dict[str, Any]
    ) -> Iterator[ValidationError]:
        if isinstance(instance, dict):
            for pattern, schema in patterns.items():
                for key in [key for key in instance if self._matches(pattern, key)]:
                    yield from validator.descend(instance[key], schema, path=key, schema_path=pattern)

    def _additional_properties(
        self, validator: Any, allowed: Any, instance: Any, schema: dict[str, Any]
    ) -> Iterator[ValidationError]:
        patterns = schema.get("patternProperties", {})
        named = schema.get("properties", {})
        for key in instance if isinstance(instance, dict) else ():
            if key in named or any(self._matches(pattern, key) for pattern in patterns):
                continue
            if allowed is False:
                yield ValidationError(f"{key[:100]!r} is not among the properties")
            elif isinstance(allowed, dict):
                yield from validator.descend(instance[key], allowed, path=key)

    def _unique_items(
        self, _: Any, is_wanted: bool, instance: Any, __: dict[str, Any]
    ) -> Iterator[ValidationError]:  # jsonschema's own compares each object with each
        if is_wanted and isinstance(instance, list):
            different = {json.dumps(item, sort_keys=True) for item in instance}
            if len(different) < len(instance):
                yield ValidationError(f"{len(instance)} items are only {len(different)} different ones")


def _number(text: str) -> int | float:
    """1.0 is the integer 1 to a schema."""
    number = float(text)
    return int(number) if number.is_integer() else number
