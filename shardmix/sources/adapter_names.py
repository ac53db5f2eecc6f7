"""A base's tensors by the names of an adapter's modules: prefixes, stacked experts, copies."""

import re
from functools import cached_property
from typing import NamedTuple

from shardmix.conventions.declarations import Declaration, Renaming, declaration_of
from shardmix.conventions.tensor_names import (
    STACKED,
    STACKED_PARTS,
    class_names,
    plain_ending,
    whole_ending,
)
from shardmix.errors import SourceError, listed
from shardmix.sources.base import Source


class Place(NamedTuple):
    """The rows of a base's tensor that are one parameter of its class, or a part of one."""

    row: int
    """Row of the tensor in the base's table."""
    first_row: int
    """First of the tensor's own rows; see `Patch.first_row`."""
    num_rows: int
    """Number of rows."""


class Stack(NamedTuple):
    """A parameter of stacked experts, and the tensors that hold it, in order."""

    shape: tuple[int, int, int]
    places: tuple[Place, ...]


class BaseNames:
    """The names of a base's tensors, and the ways in which an adapter's names differ from them.

    A base may store the names of its class, of a model without a head, or with a wrapper's prefix.
    """

    def __init__(self, base: Source) -> None:
        self._base, self._text = base, base.text
        self._shapes = base.tensors.shapes
        self._rows = {name: row for row, name in enumerate(base.tensors.names)}
        self._prefixes: list[tuple[str, str]] = []
        self._unknown: set[str] = set()

    @cached_property
    def _declaration(self) -> Declaration:
        return declaration_of(self._base.config, self._base.folder)

    @cached_property
    def _class_rows(self) -> dict[str, int]:
        """Name in the base's class → row."""
        names = class_names(self._base.tensors.names, self._declaration)
        return {name: row for row, name in enumerate(names)}

    def find(self, name: str) -> int | None:
        """Return the row of a tensor by an adapter's name for it, or None."""
        for old, new in (("", ""), *self._prefixes):
            if name.startswith(old):
                row = self._rows.get(new + name.removeprefix(old))
                if row is not None:
                    return row
        row = self._class_rows.get(name)
        if row is not None:
            return row
        found = self._another_prefix(name)
        if found is None:
            return None
        self._prefixes.append(found)
        return self._rows[found[1] + name.removeprefix(found[0])]

    def shared(self) -> list[set[str]]:
        """Return the names of parameters in the base's class that share a tensor, in sets."""
        found: dict[str, set[str]] = {}
        for tie in self._declaration.ties:
            start = f"{tie.at}." if tie.at else ""
            for target, source in tie.pairs if tie.is_in_force(self._base.config) else ():
                found.setdefault(start + source, {start + source}).add(start + target)
        return list(found.values())

    def stacks(self, module: str) -> dict[str, Stack]:
        """Return the parameters of experts in a module that the base stores one by one."""
        found = {}
        for fusion in self._fusions:
            ending = whole_ending(fusion)
            name = f"{module}.{ending.rpartition('.')[2]}"
            if f".{name}".endswith(ending if ending.startswith(".") else f".{ending}"):
                stack = self._stack(name.removesuffix(ending), fusion)
                if stack is not None:
                    found[name] = stack
        return found

    def _stack(self, head: str, fusion: Renaming) -> Stack | None:
        parts = [head + plain_ending(part) for part in fusion.sources]
        places: list[Place] = []
        num = rows = columns = 0
        while all(part.replace("*", str(num), 1) in self._class_rows for part in parts):
            for part in parts:
                row = self._class_rows[part.replace("*", str(num), 1)]
                if len(self._shapes[row]) != 2:
                    return None
                height, columns = self._shapes[row]
                places.append(Place(row, 0, height))
                rows += height
            num += 1
        shapes = {self._shapes[place.row] for place in places}
        return Stack((num, rows // num, columns), tuple(places)) if len(shapes) == 1 else None

    def expert(self, name: str) -> tuple[Place, int] | None:
        """Return the rows of one expert's weight, and its columns, if the base stacks them all."""
        if name in self._rows or not re.search(r"\.\d+\.[^.]+\.weight$", name):
            return None
        for fusion in self._fusions:
            for number, part in enumerate(map(plain_ending, fusion.sources)):
                pattern = re.escape(part).replace(re.escape("*"), r"(\d{1,6})", 1)
                match = re.search(rf"{pattern}$", name)
                if match is None or "*" not in part:
                    continue
                row = self.find(name[: match.start()] + whole_ending(fusion))
                if row is None or len(self._shapes[row]) != 3:
                    continue
                num, height, columns = self._shapes[row]
                piece, rest = divmod(height, len(fusion.sources))
                if rest or int(match[1]) >= num:
                    continue
                first = int(match[1]) * height + number * piece
                return Place(row, first, piece), columns
        return None

    @property
    def _fusions(self) -> list[Renaming]:
        """The ways in which transformers stacks this class's experts."""
        renames = self._declaration.renames
        return [each for each in renames if each.ops in (STACKED, STACKED_PARTS)]

    def below(self, module: str) -> dict[str, int]:
        """Return the parameters directly in a module: the adapter's name of each → row."""
        found = {}
        for old, new in (("", ""), *self._prefixes):
            if not module.startswith(old):
                continue
            start = f"{new}{module.removeprefix(old)}."
            for name, row in self._rows.items():
                end = name.removeprefix(start)
                if end != name and "." not in end:
                    found[f"{module}.{end}"] = row
            if found:
                break
        return found

    def _another_prefix(self, name: str) -> tuple[str, str] | None:
        """Return the prefix to take off a name, and the one to put there; None if neither helps.

        What follows the prefix has the number of a layer, or is a module and its parameter.
        """
        parts = name.split(".")
        numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
        most = max(0, numbers[0] - 1 if numbers else len(parts) - 2)
        key = parts[-2] if len(parts) > 1 else name
        if key in self._unknown:  # names of one kind fail alike: look through all names once
            return None
        for count in range(most + 1):
            end = ".".join(parts[count:])
            names = [each for each in self._rows if each == end or each.endswith(f".{end}")]
            if len(names) == 1:
                old = "".join(f"{part}." for part in parts[:count])
                return old, names[0].removesuffix(end)
            if len(names) > 1:
                raise SourceError(
                    f"changes {name}, and {self._text} has several of such a name "
                    f"({listed(names, 2)})",
                    remedy="name the model that it was trained on",
                )
        self._unknown.add(key)
        return None
