"""Names of tensors that mean one parameter: wrappers' prefixes, older names, a base model's prefix.

Translates each model's names into its class's names, so that models saved by different programs can
be matched. Reads no tensor; changes no file.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from shardmix.conventions.adapters import PEFT_PREFIX

if TYPE_CHECKING:
    from shardmix.conventions.declarations import Declaration, Renaming

# Added by torch.compile, FSDP and activation checkpointing around modules, anywhere in a name.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
# Experts stacked; experts stacked, each of several parts in a row.
STACKED = (("MergeModulelist", 0),)
STACKED_PARTS = (("MergeModulelist", 0), ("Concatenate", 1))
_TAKING_APART = frozenset({"Chunk", "Split", "Interleave", "Transpose"})
# Added by PEFT to modules that an adapter changes: such a name is not the model's own.
_PEFT_MODULES = (".base_layer.", ".modules_to_save.", ".original_module.")
_MODULE_PREFIX = "module."  # added by DataParallel and DDP, before every name


def without_wrappers(names: Sequence[str]) -> Sequence[str]:
    """Return names without the parts that wrappers of modules add, or the same object if none did.

    transformers does not read such names, so no output should have them.
    """
    if any("_orig_mod." in name or "_wrapped_module." in name for name in names):
        names = [_WRAPPERS.sub("", name) for name in names]
    # Afterwards, since a compiled module may be distributed as well as the other way round.
    if names and all(name.startswith(_MODULE_PREFIX) for name in names):
        names = [name.removeprefix(_MODULE_PREFIX) for name in names]
    is_in_peft = names and all(name.startswith(PEFT_PREFIX) for name in names)
    if is_in_peft and not any(part in name for name in names for part in _PEFT_MODULES):
        names = [name.removeprefix(PEFT_PREFIX) for name in names]
    return names


def class_names(names: Sequence[str], declaration: "Declaration") -> Sequence[str]:
    """Return the names as which transformers reads a checkpoint's names.

    If two names would become one, all are returned unchanged.
    """
    renamed = list(names)
    for renaming in declaration.renames:
        if not renaming.ops:
            renamed = _renamed(renamed, renaming)
    if declaration.own:
        renamed = [
            name if without_numbers(name) in declaration.own else new
            for name, new in zip(names, renamed, strict=True)
        ]
    return renamed if len(set(renamed)) == len(renamed) else names


def without_numbers(name: str) -> str:
    """Return a name with a sign in place of each number: one text for all layers and experts."""
    return _NUMBER.sub("#", name)


def aligned(
    names: Sequence[str], others: Collection[str], prefix: str, shared: Collection[str] = ()
) -> Sequence[str]:
    """Return names with a base model's prefix added or removed, if that makes them the others'.

    transformers does the same when it loads a base model's weights into a model with a head, or the
    reverse. A name that is none of the others' goes as its model's other names do: it may be
    another name of a shared parameter; `shared` has these.
    """
    if not prefix:
        return names
    before = f"{prefix}."
    found = []
    unmatched = []
    is_added = is_removed = False
    for name in names:
        if name in others:
            found.append(name)
        elif before + name in others:
            is_added = True
            found.append(before + name)
        elif name.startswith(before) and name.removeprefix(before) in others:
            is_removed = True
            found.append(name.removeprefix(before))
        else:
            unmatched.append(len(found))
            found.append(name)
    for at in unmatched if is_added != is_removed else ():
        if is_removed:
            found[at] = found[at].removeprefix(before)
        elif before + found[at] in shared:
            found[at] = before + found[at]
    return found if len(set(found)) == len(found) else names


def prefix_of(names: Sequence[str], others: Collection[str]) -> str:
    """Return the prefix that turns names into the others, or the others into these, or "".

    For a class of which nothing is known: most names must agree that way.
    """
    stored = set(names)
    for longer, shorter in ((names, others), (others, stored)):
        found: dict[str, int] = {}
        for name in longer:
            head, dot, rest = name.partition(".")
            if dot and rest in shorter:
                found[head] = found.get(head, 0) + 1
        for head, count in found.items():
            if 2 * count > len(stored):
                return head
    return ""


def _renamed(names: Sequence[str], renaming: "Renaming") -> list[str]:
    pattern = re.compile(renaming.pattern)
    if renaming.guarded:
        first = re.compile(renaming.pattern.partition("|(?P<g1>")[0])
        if not any(_match(first, name, renaming) for name in names):
            return list(names)
    return [_rename(pattern, name, renaming) for name in names]


def _match(
    pattern: re.Pattern[str], name: str, renaming: "Renaming"
) -> tuple[str, re.Match[str]] | None:
    """Return the text before a name in a renaming's scope, and the match; or None."""
    before = ""
    if renaming.scope is not None:
        scope = f"{renaming.scope}." if renaming.scope else ""
        base = f"{renaming.base}." if renaming.base else ""
        before = base + scope if name.startswith(base + scope) else scope
        if not name.startswith(before):
            return None
    match = pattern.search(name.removeprefix(before))
    return None if match is None else (before, match)


def _rename(pattern: re.Pattern[str], name: str, renaming: "Renaming") -> str:
    found = _match(pattern, name, renaming)
    if found is None:
        return name
    before, match = found
    group = next(key for key, value in match.groupdict().items() if value is not None)
    replacement = renaming.to[int(group[1:]) if renaming.guarded else 0]
    number = pattern.groupindex[group]
    groups: Mapping[int, str] = {
        index: match.group(number + index) or "" for index in range(1, pattern.groups - number + 1)
    }
    replacement = re.sub(r"\\(\d)", lambda index: groups.get(int(index[1]), ""), replacement)
    return before + name.removeprefix(before).replace(match.group(0), replacement, 1)


def whole_endings(renaming: "Renaming") -> tuple[str, ...]:
    """Return the parts of names that a tensor in one piece has where its pieces have theirs."""
    wholes = renaming.sources[:1] if takes_apart(renaming) else renaming.to
    return tuple(map(plain_ending, wholes))


def whole_ending(renaming: "Renaming") -> str:
    """Return the same of a tensor that its pieces are all of."""
    return whole_endings(renaming)[0]


def takes_apart(renaming: "Renaming") -> bool:
    """Return True if files have one piece and the class several, or one of another order."""
    return renaming.kinds[0] in _TAKING_APART


def plain_ending(pattern: str) -> str:
    """Return a pattern of the table without its escapes: a part of a name, perhaps with a star."""
    return pattern.replace("\\.", ".").removeprefix("^")


def is_matched(renaming: "Renaming", name: str) -> bool:
    """Return True if a renaming holds for a name."""
    return _match(re.compile(renaming.pattern), name, renaming) is not None
