"""Differences between the configs of models, and whether an average over them makes sense.

Pure: configs in, differences out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardmix.conventions.class_defaults import ClassDefaults
from shardmix.conventions.config_keys import (
    COUNTS_OF_LAYERS,
    Meaning,
    meaning,
    same_function,
    same_model_type,
)
from shardmix.errors import printable
from shardmix.matching.config_labels import LABEL_KEYS, has_no_classifier, label_difference
from shardmix.matching.config_spelling import (
    UNSAID,
    UNSCALED_ROPE,
    class_of,
    is_optional,
    normal_spelling,
    value_of,
    with_parts,
)
from shardmix.matching.differences import Difference, same_number, shown_value

_NUM_LISTED = 6
_NUM_NAMED = 3

_ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@dataclass(frozen=True, slots=True)
class NamedConfig:
    """A model's config."""

    name: str
    """The user's name for the model."""
    content: Mapping[str, Any]
    """Content of its config.json."""


_NOT_SAID = "not said"


def config_differences(configs: Sequence[NamedConfig], *, output: int = 0) -> list[Difference]:
    """Return the differences between configs: refused ones first, a list of minor ones last.

    `output` is the number of the config that the output takes.
    """
    told = [config for config in configs if config.content]
    if len(told) < 2 or all(config.content == told[0].content for config in told[1:]):
        return []
    comparison = _Comparison(
        names=[config.name for config in told],
        output=told.index(configs[output]) if configs[output].content else None,
    )
    comparison.compare([config.content for config in told], [None] * len(told), prefix="")
    return comparison.result()


class _Comparison:
    """Walks through configs part by part and gathers the differences."""

    def __init__(self, names: Sequence[str], output: int | None) -> None:
        self._names = names
        self._output = output
        self._found: list[Difference] = []
        self._found_paths: set[str] = set()
        self._listed: list[tuple[str, str]] = []
        self._has_classifier = True

    def compare(
        self, parts: Sequence[Mapping[str, Any]], types: Sequence[str | None], prefix: str
    ) -> None:
        """Compare one part of all configs; `types` are their model types if they state none."""
        if not prefix:
            self._has_classifier = not all(map(has_no_classifier, parts))
        # A part without a model type is a plain group of keys, of no class.
        classes = [class_of(part, own) for part, own in zip(parts, types, strict=True)]
        parts = with_parts(parts, classes)
        normal = [normal_spelling(part, own) for part, own in zip(parts, classes, strict=True)]
        for key in dict.fromkeys(key for part in normal for key in part):
            is_part = any(isinstance(part.get(key), dict) for part in normal)
            if is_part and key not in LABEL_KEYS and meaning(key) is not Meaning.NOTHING:
                self._compare_nested(normal, classes, key, prefix)
            else:
                values = [
                    # The tensors define a number of layers that is left out, not the class.
                    part.get(key, UNSAID) if key in COUNTS_OF_LAYERS else value_of(part, key, own)
                    for part, own in zip(normal, classes, strict=True)
                ]
                is_known = any(own is None or key in own.fields for own in classes)
                self._judge(prefix, key, values, is_known=is_known)
        self._judge_labels(parts, prefix)
        self._judge_architectures(parts, prefix)

    def result(self) -> list[Difference]:
        """Return the differences, refused ones first; minor ones are listed in one."""
        found = sorted(self._found, key=lambda difference: not difference.is_refused)
        if self._listed:
            words = [f"{key} ({values})" for key, values in self._listed[:_NUM_LISTED]]
            more = len(self._listed) - _NUM_LISTED
            rest = f" and {more} more keys" if more > 0 else ""
            found.append(
                Difference(
                    key=self._listed[0][0],
                    other_keys=tuple(key for key, _ in self._listed[1:]),
                    finding=f"configs also differ in {', '.join(words)}{rest}",
                    consequence=(
                        ""
                        if self._output is None
                        else f"the output takes those of {self._names[self._output]}"
                    ),
                    is_refused=False,
                )
            )
        return found

    def _compare_nested(
        self,
        normal: Sequence[Mapping[str, Any]],
        classes: Sequence[ClassDefaults | None],
        key: str,
        prefix: str,
    ) -> None:
        parts = [part.get(key) for part in normal]
        if all(isinstance(part, dict) for part in parts):
            types = [None if own is None else own.parts.get(key) for own in classes]
            self.compare(parts, types, f"{prefix}{key}.")  # type: ignore[arg-type]
        elif any(parts):
            # A missing part says nothing; the tensors show if a part of the model is missing.
            self._list(f"{prefix}{key}", [{} if part else UNSAID for part in parts])

    def _judge(self, prefix: str, key: str, values: Sequence[object], *, is_known: bool) -> None:
        """Judge a key's values; `is_known`: a class may read the key."""
        path, kind = f"{prefix}{key}", meaning(key)
        if kind is Meaning.CLASSIFIER:
            is_known = True  # to every class, by the base of all
            kind = Meaning.COMPUTATION if self._has_classifier else Meaning.UNKNOWN
        if kind is Meaning.NOTHING or key == "architectures" or key in LABEL_KEYS:
            return
        said = [value for value in values if value is not UNSAID]
        if key == "model_type":
            self._judge_model_type(path, values, is_nested=bool(prefix))
        elif all(_same(value, said[0]) for value in said[1:]):
            if len(said) == len(values) or all(_is_blank(value, key) for value in said):
                return
            if kind in (Meaning.COMPUTATION, Meaning.ACTIVATION) and is_known:
                self._tell(path, values, is_refused=False)
            elif kind is not Meaning.LAYER_KINDS and not self._is_of_told_rope(path):
                self._list(path, values)
        elif kind is Meaning.ACTIVATION and all(isinstance(value, str) for value in said):
            verdicts = {same_function(str(said[0]), str(value)) for value in said[1:]}
            if verdicts != {True}:
                self._tell(path, values, is_refused=False in verdicts)
        elif kind is Meaning.LAYER_KINDS:
            self._tell(path, values, is_refused=not all(map(_is_attention, said)))
        elif kind in (Meaning.COMPUTATION, Meaning.ACTIVATION):
            # null says no more than a missing key.
            stated = [value for value in said if value is not None]
            is_refused = not all(_same(value, stated[0]) for value in stated[1:])
            self._tell(path, values, is_refused=is_refused)
        elif kind is Meaning.TUNING and not (is_optional(key) and None in said):
            self._tell(path, values, is_refused=False)
        else:
            self._list(path, values)

    def _is_of_told_rope(self, path: str) -> bool:
        """Return True if this parameter's kind of scaling already differs between models."""
        return f"{path.rpartition('.')[0]}.rope_type" in self._found_paths

    def _judge_model_type(self, path: str, values: Sequence[object], *, is_nested: bool) -> None:
        types = [value for value in values if isinstance(value, str)]
        if types:
            same = [same_model_type(types[0], other, is_nested=is_nested) for other in types[1:]]
            if not all(same):
                self._tell(path, values, is_refused=True)
            elif not is_nested and len(set(types)) > 1:
                self._tell(path, values, is_refused=False)

    def _judge_labels(self, parts: Sequence[Mapping[str, Any]], prefix: str) -> None:
        judged = label_difference(parts)
        if judged is not None:
            texts = [text or "none" for text in judged.texts]
            self._add(f"{prefix}{judged.key}", texts, judged.is_refused)

    def _judge_architectures(self, parts: Sequence[Mapping[str, Any]], prefix: str) -> None:
        tasks = {_task(part.get("architectures")) for part in parts} - {None}
        if len(tasks) > 1:
            names = [_shown(part.get("architectures")) for part in parts]
            # A second head beside a language model may be one that the tensors don't have.
            self._add(f"{prefix}architectures", names, len(tasks - {_LANGUAGE}) > 1)

    def _tell(self, path: str, values: Sequence[object], *, is_refused: bool) -> None:
        self._add(path, [_shown(value) for value in values], is_refused)

    def _add(self, path: str, texts: Sequence[str], is_refused: bool) -> None:
        finding = f"{printable(path)}: {self._by_text(texts)}"
        taken = ""
        if self._output is not None:
            text = texts[self._output]
            taken = "the output does not say" if text == _NOT_SAID else f"the output takes {text}"
        self._found.append(Difference(path, finding, taken, is_refused))
        self._found_paths.add(path)

    def _list(self, path: str, values: Sequence[object]) -> None:
        self._listed.append((path, self._by_text([_shown(value) for value in values])))

    def _by_text(self, texts: Sequence[str]) -> str:
        """Return each value with the models that have it: `2 in a and c, 4 in b`."""
        by_text: dict[str, list[str]] = {}
        for text, name in zip(texts, self._names, strict=True):
            by_text.setdefault(text, []).append(name)
        return ", ".join(f"{text} in {_and(names)}" for text, names in by_text.items())


def _is_attention(kinds: object) -> bool:
    return isinstance(kinds, list) and all(
        isinstance(kind, str) and kind in _ATTENTION_KINDS for kind in kinds
    )


_TASKS = (
    *("SequenceClassification", "TokenClassification", "MultipleChoice", "QuestionAnswering"),
    *("NextSentencePrediction", "ImageClassification", "AudioClassification", "CTC"),
)


_LANGUAGE = "CausalLM"
_OF_LANGUAGE = (_LANGUAGE, "LMHeadModel", "MaskedLM", "ConditionalGeneration")


def _task(architectures: object) -> str | None:
    """Return the task of a class's head, if its tensors could also be another task's."""
    if not isinstance(architectures, list) or len(architectures) != 1:
        return None
    name = str(architectures[0])
    if name.endswith(_OF_LANGUAGE):
        return _LANGUAGE
    return next((task for task in _TASKS if name.endswith(f"For{task}")), None)


def _same(one: object, other: object) -> bool:
    if (_is_blank(one) and _is_blank(other)) or same_number(one, other):
        return True
    return one != one and other != other


def _is_blank(value: object, key: str = "") -> bool:
    """Return True if a value says no more than a missing key."""
    if value == UNSCALED_ROPE.get(key.rpartition(".")[2], UNSAID):
        return True
    return value is None or value is False or value in ("", [], {})


def _shown(value: object) -> str:
    if value is UNSAID:
        return _NOT_SAID
    if value == {}:
        return "there"
    return shown_value(value)


def _and(names: Sequence[str]) -> str:
    shown = list(names[:_NUM_NAMED])
    if len(names) > _NUM_NAMED:
        shown.append(f"{len(names) - _NUM_NAMED} more")
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
