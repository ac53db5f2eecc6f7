"""Corresponding parts of models: the model itself, and modules with weights of their own."""

from collections.abc import Sequence
from dataclasses import dataclass

from shardmix.errors import MismatchError
from shardmix.sources.base import Source


@dataclass(frozen=True, slots=True)
class MatchedParts:
    """The parts of all models, grouped by correspondence."""

    groups: tuple[tuple[Source, ...], ...]
    """Parts merged together, one of each model; the first model's main part first."""
    unmatched: tuple[Source, ...]
    """Parts that not every model has."""


def match_parts(sources: Sequence[Source]) -> MatchedParts:
    """Match the parts of models by their keys among their model's modules.

    Folders may have other names in each model. A model without modules is its own main part. Raises
    `MismatchError` if nothing corresponds.
    """
    first = sources[0]
    groups, matched = [], set()
    for part in first.parts:
        group = [_counterpart(part, first, other) for other in sources]
        if all(group):
            found = tuple(each for each in group if each is not None)
            groups.append(found)
            matched |= {id(each) for each in found}
    if not groups:
        raise MismatchError(
            "have no module with weights in common, by their modules.json; models of a merge "
            "must have the same modules",
            subject=f"{first.text} and {sources[-1].text}",
            remedy="leave one of them out",
        )
    unmatched = (part for source in sources for part in source.parts if id(part) not in matched)
    return MatchedParts(tuple(groups), tuple(unmatched))


def _counterpart(part: Source, first: Source, other: Source) -> Source | None:
    """Return another model's counterpart of a part of the first, or None."""
    is_bare = not (first.modules and other.modules)
    if is_bare:
        return other if part is first else None
    return next((each for each in other.parts if each.key == part.key), None)
