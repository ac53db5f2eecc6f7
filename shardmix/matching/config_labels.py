"""Names of classes compared between models: `id2label` and `label2id`. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardmix.errors import printable

LABEL_KEYS = ("id2label", "label2id")
_DEFAULT_LABEL = re.compile(r"(?i)label[_ ]?\d+")
_HEAD = re.compile(
    r"(?:For\w*(?:Classification|Detection|Segmentation|MultipleChoice|CTC)|DoubleHeadsModel)$"
)
_LONGEST_TEXT = 80


@dataclass(frozen=True, slots=True)
class LabelDifference:
    """Classes that differ in name."""

    key: str
    """id2label or label2id."""
    texts: tuple[str, ...]
    """The labels of each model, in order; "" for a model without any."""
    is_refused: bool
    """True if a number stands for different classes."""


def label_difference(parts: Sequence[Mapping[str, Any]]) -> LabelDifference | None:
    """Return the difference between models' labels, or None.

    Default names (LABEL_0, or the number) contradict none; capitals and underscores don't matter.
    Without a classifier labels have no use, and are never refused.
    """
    labels = [_labels(part) for part in parts]
    named = [own for own in labels if own]
    if all(own == labels[0] for own in labels[1:]) or not named:
        return None
    first = named[0]
    contradict = any(
        _plain(own[number]) != _plain(first[number])
        for own in named[1:]
        for number in own.keys() & first.keys()
    )
    if not contradict and all(map(has_no_classifier, parts)):
        return None
    key = next(
        (key for key in LABEL_KEYS if any(isinstance(part.get(key), dict) for part in parts)),
        LABEL_KEYS[0],
    )
    return LabelDifference(
        key=key,
        texts=tuple(map(_text, labels)),
        is_refused=contradict and not all(map(has_no_classifier, parts)),
    )


def has_no_classifier(part: Mapping[str, Any]) -> bool:
    """Return True if a config names a class that has no head with classes."""
    architectures = part.get("architectures")
    return isinstance(architectures, list) and not any(
        _HEAD.search(str(name)) for name in architectures
    )


def _labels(part: Mapping[str, Any]) -> dict[int, str]:
    """Return number → name of classes; empty if a model names none."""
    pairs: list[tuple[object, object]] = []
    id2label, label2id = part.get("id2label"), part.get("label2id")
    if isinstance(id2label, dict):
        pairs = list(id2label.items())
    elif isinstance(label2id, dict):
        pairs = [(number, label) for label, number in label2id.items()]
    labels = {}
    for number, label in pairs:
        # JSON has no integers for keys.
        text = str(number)
        if text.isdecimal() and len(text) < 10:
            labels[int(text)] = str(label)
    if all(
        _DEFAULT_LABEL.fullmatch(label) or label == str(number) for number, label in labels.items()
    ):
        return {}
    return labels


def _plain(label: str) -> str:
    return re.sub(r"[\s_-]+", " ", label).strip().casefold()


def _text(labels: Mapping[int, str]) -> str:
    text = ", ".join(f"{number} {label}" for number, label in sorted(labels.items()))
    text = printable(text)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."
