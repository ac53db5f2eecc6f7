"""Tied parameters: the tensors that hold them, and those that an output must store.

Models share one tensor between parameters ("tie" them): an output head and the input embedding,
copies of it in encoder and decoder, biases of heads. A checkpoint stores one of them, or several. A
name that some model stores is left out of the output only if loading the output gives it, in every
model, the same tensor. So the output does not depend on the order of models, and it computes what
the weighted sum of all parameters computes. Stored values count as stored: a copy of a tied head
may differ from it.

transformers from version 5 on reads both parameters if a file has both; older versions and other
programs follow only the config. So the output's config says `tie_word_embeddings: false` if some
model's does, all parameters that it then reads by their own names are stored, and the key means no
more than the tie. For T5 and its relatives it also decides a scale, and stays.

Knows names and configs; reads no tensor.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardmix.conventions import naming
from shardmix.conventions.declarations import Declaration, Tie, config_part

# Shared in transformers before version 5, whatever the config said. If one is missing from a
# file of a model that is not tied, such a version wrote the file.
_ALWAYS_SHARED = re.compile(r"(^|\.)((encoder|decoder)\.embed_tokens\.weight|decoder\.bias)$")
_ANYWHERE = "*"


@dataclass(frozen=True, slots=True)
class Pair:
    """A parameter and the one that it shares, by the names of a merge's models."""

    target: str
    source: str
    tie: Tie
    """The declaration of the pair."""


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model as its names, config and class describe it."""

    config: Mapping[str, Any]
    """Content of its config.json."""
    declaration: Declaration
    """Declarations of its class."""
    rows: Mapping[str, int] = field(repr=False)
    """Name of each stored tensor → its row in the source's table."""


@dataclass(frozen=True, slots=True)
class SharedTensors:
    """The shared tensors that the output stores, and the source of each."""

    added: tuple[str, ...]
    """Names that the first model does not store, sorted."""
    rows: tuple[dict[str, int], ...]
    """For each model, name → row of a tensor that it holds by another name."""
    untied: tuple[str, ...] = ()
    """Parts of the output's config that must say that they tie nothing: "" is its top."""
    split: tuple[str, ...] = ()
    """Parameters that some model shares and the output stores one by one."""
    is_kept_tied: bool = False
    """True if the output's config says that some of these are tied."""


def share(
    models: Sequence[NamedModel], output: NamedModel, partial: Collection[str]
) -> SharedTensors:
    """Return the tensors that the output stores for parameters that models share.

    `output` has the config of the output. `partial` are the names that not all models store. A name
    that a model does not hold by any name is in none of its rows.
    """
    universe = dict.fromkeys(name for model in models for name in model.rows)
    pairs = [list(pairs_of(model, universe)) for model in models]
    holders = [_Holder(model, own) for model, own in zip(models, pairs, strict=True)]
    declared = list(pairs_of(output, universe))
    # The first model's pairs, too: the output's config may not name its class.
    groups = _groups([pair for own in (declared, *pairs) for pair in own])
    is_tied = {pair.tie: pair.tie.is_in_force(output.config) for pair in declared}
    needed = _needed(models, holders, declared, groups, is_tied, partial)
    off = {
        (pair.target, pair.source)
        for model, own in zip(models, pairs, strict=True)
        for pair in own
        if not pair.tie.is_in_force(model.config)
    }
    untied = _untied(output, declared, needed, is_tied, holders, off)
    if untied:
        is_tied = {tie: tied and tie.of not in untied for tie, tied in is_tied.items()}
        needed = _needed(models, holders, declared, groups, is_tied, partial)
    stored = models[0].rows
    added = tuple(sorted(name for name in needed if name not in stored))
    split = [
        name
        for name in needed
        if any(name not in model.rows for model in models) and name in groups
    ]
    return SharedTensors(
        added=added,
        rows=tuple(
            {
                name: row
                for name in needed
                if name not in model.rows and (row := holder.row(name)) is not None
            }
            for model, holder in zip(models, holders, strict=True)
        ),
        untied=untied,
        split=tuple(sorted(split)),
        is_kept_tied=any(
            is_tied[pair.tie] and {pair.target, pair.source} <= needed.keys() for pair in declared
        ),
    )


class _Holder:
    """One model's parameters, and the tensors that hold them."""

    def __init__(self, model: NamedModel, pairs: Sequence[Pair]) -> None:
        self._rows = model.rows
        self._neighbours: dict[str, list[str]] = {}
        for pair in pairs:
            if pair.tie.is_in_force(model.config) or _ALWAYS_SHARED.search(pair.target):
                # The source first, then targets in order of declaration: transformers' order of
                # search.
                self._neighbours.setdefault(pair.target, []).insert(0, pair.source)
                self._neighbours.setdefault(pair.source, []).append(pair.target)

    def row(self, name: str) -> int | None:
        """Return the row of the tensor that holds a parameter, or None."""
        seen, queue = {name}, [name]
        for current in queue:
            if current in self._rows:
                return self._rows[current]
            for other in self._neighbours.get(current, ()):
                if other not in seen:
                    seen.add(other)
                    queue.append(other)
        return None


def _needed(
    models: Sequence[NamedModel],
    holders: Sequence[_Holder],
    declared: Sequence[Pair],
    groups: Mapping[str, str],
    is_tied: Mapping[Tie, bool],
    partial: Collection[str],
) -> dict[str, None]:
    """Return the shared or partial names that the output must store."""
    tied = _groups([pair for pair in declared if is_tied[pair.tie]])
    needed = {name: None for name in models[0].rows if name in groups}
    held: dict[str, list[str]] = {}
    for name in needed:
        held.setdefault(tied.get(name, name), []).append(name)
    for name in partial:
        if name in needed or name in models[0].rows:
            continue
        rows = [holder.row(name) for holder in holders]
        same = held.get(tied.get(name, name), [])
        if any(rows == [holder.row(other) for holder in holders] for other in same):
            continue  # loading the output ties it to that one
        needed[name] = None
        held.setdefault(tied.get(name, name), []).append(name)
    for pair in declared:
        # A parameter that is not tied in the output is loaded by its own name.
        if not is_tied[pair.tie]:
            for name in (pair.target, pair.source):
                if _is_held(name, holders):
                    needed[name] = None
    return needed


def _untied(
    output: NamedModel,
    declared: Sequence[Pair],
    needed: Collection[str],
    is_tied: Mapping[Tie, bool],
    holders: Sequence[_Holder],
    off: Collection[tuple[str, str]],
) -> tuple[str, ...]:
    """Return the parts of the output's config that must say that they tie nothing.

    transformers before version 5, and other programs, follow only that: they don't read a head
    beside a config that ties it. It is written if some model's config says so (`off`: the pairs of
    such models). It is not written for a class in which it decides more than the tie, nor if no
    model has a parameter that the class would then read by its own name.
    """
    if output.declaration.scale:
        return ()
    untied: dict[str, None] = {}
    for pair in declared:
        is_split = pair.target in needed and pair.source in needed
        if is_tied[pair.tie] and is_split and (pair.target, pair.source) in off:
            untied[pair.tie.of] = None
            # Otherwise that would bring the tie back, for transformers or for other programs.
            if config_part(output.config, pair.tie.nested).get(naming.TIE_KEY) is True:
                untied[pair.tie.nested] = None
    for pair in declared:
        if pair.tie.of in untied and not (
            _can_be_untied(pair.tie, output.config)
            and len({_is_held(pair.target, holders), _is_held(pair.source, holders)}) == 1
        ):
            return ()
    return tuple(untied)


def _can_be_untied(tie: Tie, config: Mapping[str, Any]) -> bool:
    return "F" in tie.tied and not (tie.key and isinstance(config.get(tie.key), bool))


def _is_held(name: str, holders: Sequence[_Holder]) -> bool:
    return all(holder.row(name) is not None for holder in holders)


def _groups(pairs: Sequence[Pair]) -> dict[str, str]:
    """Return name → a name that stands for all names that share its tensor."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    for pair in pairs:
        first, second = root(pair.target), root(pair.source)
        if first != second:
            parent[first] = second
    return {name: root(name) for name in list(parent)}


def pairs_of(model: NamedModel, universe: Mapping[str, None]) -> Iterator[Pair]:
    """Yield the pairs of a model's class with at least one name present."""
    declaration = model.declaration
    ties = _conventional(universe) if declaration.is_conventional else declaration.ties
    for tie in ties:
        found: dict[str, Pair] = {}  # of two declarations for one parameter the last holds
        for at in _prefixes(tie, universe):
            for target, source in tie.pairs:
                if target.startswith("~"):
                    for pair in _by_beginning(tie, at, target[1:], source, universe):
                        found[pair.target] = pair
                    continue
                names = _spelled(at + target, at + source, declaration.prefix, universe)
                # A kind of inner model has its names, but maybe not its head.
                if names is not None and (tie.at != _ANYWHERE or names[0] in universe):
                    found[names[0]] = Pair(*names, tie)
        yield from found.values()


def _prefixes(tie: Tie, universe: Mapping[str, None]) -> list[str]:
    """Return the prefixes, with their dots, of a tie's names here."""
    if tie.at != _ANYWHERE:
        return [f"{tie.at}." if tie.at else ""]
    ends = [f".{name}" for pair in tie.pairs for name in pair if not name.startswith("~")]
    found = {name[: -len(end) + 1]: None for name in universe for end in ends if name.endswith(end)}
    return list(found)


def _spelled(
    target: str, source: str, prefix: str, universe: Mapping[str, None]
) -> tuple[str, str] | None:
    """Return a pair as these models spell it: with the base model's prefix, or without."""
    if source in universe:
        return target, source
    before = f"{prefix}."
    bare = target.removeprefix(before), source.removeprefix(before)
    if prefix and (bare[1] in universe or (bare[0] != target and bare[0] in universe)):
        return bare
    return (target, source) if target in universe else None


def _by_beginning(
    tie: Tie, at: str, pattern: str, source: str, universe: Mapping[str, None]
) -> Iterator[Pair]:
    """Yield pairs of names that begin as a regex and as a text, and go on alike."""
    compiled = re.compile(pattern)
    for name in universe:
        if name.startswith(at) and (match := compiled.match(name, len(at))):
            other = at + source + name[match.end() :]
            if other != name:
                yield Pair(name, other, tie)


def shared_with(model: NamedModel) -> dict[str, str]:
    """Return each parameter that a model does not store → the stored one that it shares."""
    found = {}
    pairs = list(pairs_of(model, dict.fromkeys(model.rows)))
    holder = _Holder(model, pairs)
    stored = {row: name for name, row in model.rows.items()}
    for pair in pairs:
        for name in (pair.target, pair.source):
            row = holder.row(name)
            if name not in model.rows and row is not None:
                found[name] = stored[row]
    return found


def _conventional(universe: Mapping[str, None]) -> list[Tie]:
    """Return the ties that names imply, for a class with its own code, or no class at all."""
    pairs = naming.tie_sources(universe)
    return [Tie("", "", tuple(sorted(pairs.items())), "TTTTTTFFF")] if pairs else []
