"""Differences between models, and whether the user allows them.

Pure. Other modules find differences; this one turns them into an error or a warning.
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
"""Allows every difference, for a finished merge that is only computed again. Nobody's key."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference between models that may make their average meaningless."""

    key: str
    """Its name in `allow_differences`: a config's key, `tokenizer`, a file, ..."""
    finding: str
    """A clause that names the models and both values: `hidden_act: "gelu" in a, "relu" in b`."""
    consequence: str
    """Effect on the output: `the output takes "gelu"`; may be empty."""
    is_refused: bool
    """True if no average over this makes sense, unless it is allowed by name."""
    other_keys: tuple[str, ...] = ()
    """Further keys that it is about."""
    rule: str = "an average over this computes what none of the models means"
    """The reason why it is refused."""
    remedy: str = "merge models that agree in it"
    """The way to merge without allowing the difference."""

    def is_of(self, allowed: str) -> bool:
        """Return True if a key of `allow_differences` names this, or something above it."""
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
    """Return True if two values are equal, up to rounding of numbers to float32.

    Some programs turn 0.485 into 0.48500001430511475. Two lists are compared item by item.
    """
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(map(_is_close, one, other))
    return _is_close(one, other)


def _is_close(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_ROUNDED)
    return one == other


def settle(differences: Sequence[Difference], allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the differences as warnings, and a warning for each allowed key without effect.

    A key also allows what lies below it: `text_config` allows `text_config.hidden_act`. Raises
    `MismatchError` if a difference is refused and not allowed.
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
        raise _refusal(refused, unused)
    told = [
        f"{difference.finding}; {difference.consequence}"
        if difference.consequence
        else difference.finding
        for difference in differences
    ]
    return (*told, *(_unused(key, differences) for key in unused))


def _refusal(refused: Sequence[Difference], unused: Sequence[str]) -> MismatchError:
    findings = list(dict.fromkeys(difference.finding for difference in refused))
    if len(findings) > _MOST_TOLD:
        findings = [*findings[:_MOST_TOLD], f"and {len(findings) - _MOST_TOLD} more differences"]
    keys = ",".join(dict.fromkeys(difference.key for difference in refused))
    rules = dict.fromkeys(difference.rule for difference in refused)
    remedies = list(dict.fromkeys(difference.remedy for difference in refused))
    remedies[-1] += (
        f", or use --allow-differences {keys} (allow_differences in a recipe or in Python) if it "
        "is meant"
    )
    return MismatchError(
        "; ".join((*findings, *rules)),
        remedy=", ".join(remedies),
        hints=[_unused(key, refused) for key in unused],
    )


def _unused(key: str, differences: Iterable[Difference]) -> str:
    known = [name for found in differences for name in (found.key, *found.other_keys)]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    suggestion = f" (did you mean {near[0]}?)" if near else ""
    return f"allow_differences names {key}, in which no models differ{suggestion}"
