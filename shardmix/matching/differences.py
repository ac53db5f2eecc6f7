"""Differences between models: what was found, and whether its user allows it.

Pure. Who finds them is elsewhere; this is where they become an error or a warning.
"""

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardmix.errors import MismatchError, printable

_MOST_TOLD = 5
_ROUNDED = 2.0**-23
EVERYTHING = "\0"
"""Allows every difference: of a merge that was made, and is only computed again. Nobody's key."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which models differ, so that their average may mean nothing."""

    key: str
    """What `allow_differences` names it by: a config's key, `tokenizer`, a file, ..."""
    finding: str
    """A clause that names the models and both values: `hidden_act: "gelu" in a, "relu" in b`."""
    consequence: str
    """What the output takes of it: `the output takes "gelu"`; may be empty."""
    is_refused: bool
    """Nobody can have meant an average over this, unless it is allowed by name."""
    other_keys: tuple[str, ...] = ()
    """Further keys that it is about."""
    remedy: str = (
        "an average over this computes what none of the models means: merge models that agree in it"
    )
    """The rule, and a way on without allowing it."""

    def is_of(self, allowed: str) -> bool:
        """Tell whether a key of `allow_differences` names this, or something above it."""
        return allowed == EVERYTHING or any(
            key == allowed or key.startswith(f"{allowed}.") for key in (self.key, *self.other_keys)
        )


def shown_value(value: object, limit: int = 60) -> str:
    """Return a value of a stranger's JSON as JSON, cut short."""
    try:
        text = printable(json.dumps(value, ensure_ascii=False))
    except (ValueError, TypeError, RecursionError):  # an integer of thousands of digits
        return f"a large {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def same_number(one: object, other: object) -> bool:
    """Tell whether two values are equal, but for numbers that a program rounded to float32.

    0.485 has become 0.48500001430511475 so. Of two lists the items are compared.
    """
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(map(_is_close, one, other))
    return _is_close(one, other)


def _is_close(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_ROUNDED)
    return one == other


def settle(differences: Sequence[Difference], allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the differences as warnings, and a warning for each allowed key that names none.

    A key allows what lies below it, too: `text_config` allows `text_config.hidden_act`. Raises
    `MismatchError` if one is refused and not allowed.
    """
    refused = [
        difference
        for difference in differences
        if difference.is_refused and not any(map(difference.is_of, allowed))
    ]
    unused = [
        key
        for key in allowed
        if key != EVERYTHING and not any(found.is_of(key) for found in differences)
    ]
    if refused:
        raise MismatchError(_refusal(refused, unused))
    told = [
        f"{difference.finding}; {difference.consequence}"
        if difference.consequence
        else difference.finding
        for difference in differences
    ]
    return (*told, *(_unused(key, differences) for key in unused))


def _refusal(refused: Sequence[Difference], unused: Sequence[str]) -> str:
    findings = list(dict.fromkeys(difference.finding for difference in refused))
    if len(findings) > _MOST_TOLD:
        findings = [*findings[:_MOST_TOLD], f"and {len(findings) - _MOST_TOLD} more differences"]
    keys = ",".join(dict.fromkeys(difference.key for difference in refused))
    remedies = list(dict.fromkeys(difference.remedy for difference in refused))
    remedies[-1] += (
        f", or use --allow-differences {keys} (allow_differences in a recipe or in Python) if it "
        "is meant"
    )
    return "; ".join((*findings, *remedies, *(_unused(key, refused) for key in unused)))


def _unused(key: str, differences: Iterable[Difference]) -> str:
    known = [name for found in differences for name in (found.key, *found.other_keys)]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    suggestion = f" (did you mean {near[0]}?)" if near else ""
    return f"allow_differences names {key}, in which no models differ{suggestion}"
