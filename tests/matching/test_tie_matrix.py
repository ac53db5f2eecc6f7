"""Models with tied weights, stored in every way, merge to the mean: see tie_matrix.py.

A sample of classes by chance, unless the campaigns run whole (half an hour).
"""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import shardmix
from tests.support import tie_matrix
from tests.support.sampling import SAMPLING, sample
from tests.support.tie_matrix import MERGED, REFUSED, WRONG, ClassResult
from tests.support.tie_states import StoredModels
from tests.support.tied_classes import Variant, model_class, tied_class_names

# Of the kinds that most models are of.
ALWAYS = (
    "llama:modeling_llama:LlamaForCausalLM",
    "bert:modeling_bert:BertForMaskedLM",
    "bart:modeling_bart:BartForConditionalGeneration",
    "t5:modeling_t5:T5ForConditionalGeneration",
)


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    with tie_matrix.quiet():
        yield


def test_merges_of_a_sample_are_the_mean() -> None:
    """No merge is wrong in silence, at least 95 % of what a file can say is merged."""
    results = list(_judge(_names(), most_pairs=None if SAMPLING.is_whole else 6))
    assert not [text for result in results for text in _faults(result)]
    totals = tie_matrix.summary(results)
    assert totals["built"] >= (110 if SAMPLING.is_whole else len(ALWAYS))
    assert totals["merged of what can be"] >= 0.95, [tie_matrix.describe(r) for r in results]


@pytest.mark.parametrize("name", ALWAYS)
def test_three_models_merge_in_any_order(name: str, tmp_path: Path) -> None:
    """A tied model, an untied or separately stored one, and one stored with copies."""
    stored = StoredModels(model_class(name), Variant(), tmp_path, num_models=3)
    own = "untied" if "untied" in stored.models[0] else "separate"
    judge = tie_matrix.Judge(stored)
    for labels in itertools.permutations(("tied", own, "copy")):
        states = [states[label] for states, label in zip(stored.models, labels, strict=True)]
        verdict = judge.judge(states, weights=(0.2, 0.3, 0.5))
        assert (verdict.verdict, verdict.reason) == (MERGED, ""), labels


def test_a_forgotten_head_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: the first model in the mean's place is wrong."""

    def copy_first(models: Any, output: Path, **options: Any) -> Any:
        shutil.copytree(models[0][0], output)
        return shardmix.MergeReport

    monkeypatch.setattr(shardmix, "merge", copy_first)
    (result,) = _judge([ALWAYS[0]], most_pairs=1)
    assert [verdict.verdict for verdict in result.verdicts] == [WRONG]
    assert "not the mean" in result.verdicts[0].reason


def test_a_refusal_of_what_can_be_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise shardmix.MismatchError("no")

    monkeypatch.setattr(shardmix, "merge", refuse)
    (result,) = _judge([ALWAYS[0]], most_pairs=1)
    assert [(v.verdict, v.is_right) for v in result.verdicts] == [(REFUSED, False)]


def test_scaled_head_without_scale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scaled head without scale is found.

    All values are right, and the config makes another computation of them.
    """
    merge = shardmix.merge

    def merge_and_say_untied(models: Any, output: Path, **options: Any) -> Any:
        report = merge(models, output, **options)
        config = output / "config.json"
        config.write_text(
            config.read_text().replace(
                '"scale_decoder_outputs": true', '"scale_decoder_outputs": false'
            )
        )
        return report

    monkeypatch.setattr(shardmix, "merge", merge_and_say_untied)
    (result,) = _judge([ALWAYS[3]], most_pairs=1)
    verdict = result.verdicts[0]
    assert verdict.verdict == WRONG
    assert "the forward pass is off" in verdict.reason


def test_hundreds_of_classes_tie() -> None:
    names = tied_class_names()
    assert len(names) > 300
    assert set(ALWAYS) <= set(names)


def _names() -> list[str]:
    others = [name for name in tied_class_names() if name not in ALWAYS]
    return [*ALWAYS, *sample("classes that tie weights", others, 4)]


def _judge(names: list[str], *, most_pairs: int | None) -> Iterator[ClassResult]:
    for name in names:
        result = tie_matrix.judge_class(name, most_pairs=most_pairs, seed=SAMPLING.seed)
        print(tie_matrix.describe(result))
        yield result


def _faults(result: ClassResult) -> list[str]:
    """Return what is worse than a refusal."""
    return [
        f"{result.name} {verdict.variant}: {verdict.states}: {verdict.reason}"
        for verdict in result.verdicts
        if verdict.verdict != REFUSED and not verdict.is_right
    ]
