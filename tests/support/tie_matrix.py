"""Merges of every way to store a model with tied weights with every other, judged by transformers.

    python -m tests.support.tie_matrix [--classes REGEX] [--sample N] [--pairs N] ...

The output of a merge must load whole, hold the mean of what both models hold, name by name, and
compute what that mean computes.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # threads cost more than they save here
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

import shardmix
from shardmix.errors import ShardmixError
from tests.support import tied_models
from tests.support.small_configs import small_config
from tests.support.tie_states import (
    USUAL,
    NotWholeError,
    State,
    StoredModels,
    Values,
    config_digest,
    difference,
    folder_digest,
    load_whole,
    one_line,
    values_digest,
)
from tests.support.tied_classes import Variant, model_class, tied_class_names, variants

MERGED, REFUSED, WRONG, CRASH = "merged", "refused", "wrong", "crash"
"""Verdicts."""


@dataclass(slots=True)
class Verdict:
    """What became of one merge."""

    states: list[str]
    """How each model is stored."""
    variant: str = ""
    """The kind of config of the class."""
    weights: list[float] = field(default_factory=list)
    """In the order of the models."""
    config_from: int = 0
    """The place of the model that gives the config."""
    verdict: str = MERGED
    """merged, refused, wrong or crash."""
    is_right: bool = True
    """Whether that is how it should be: a mean that no file of the class expresses is refused."""
    reason: str = ""
    """The refusal, or what is wrong."""
    remarks: list[str] = field(default_factory=list)
    """Further observations."""


@dataclass(slots=True)
class ClassResult:
    """What became of one class."""

    name: str
    """folder:module:Class"""
    failure: str = ""
    """Why there are no small models of it."""
    kinds: list[str] = field(default_factory=list)
    """Kinds of config tried."""
    forward: str = ""
    """What the forward pass was given; "none: " and why if there was none."""
    ties: dict[str, str] = field(default_factory=dict)
    """Tied name → name it is tied to."""
    is_tied_by_default: bool = False
    """Whether its small config ties without being told to."""
    can_be_untied: bool = False
    """Whether a config unties it."""
    states: list[str] = field(default_factory=list)
    """The ways in which its models are stored."""
    not_valid: dict[str, str] = field(default_factory=dict)
    """State → why transformers itself doesn't load it."""
    verdicts: list[Verdict] = field(default_factory=list)
    """One a merge."""
    seconds: float = 0.0
    """Time taken."""


class Judge:
    """Merges two models of one class, each in all its states, and compares with the mean."""

    def __init__(self, stored: StoredModels) -> None:
        self.stored = stored
        self.cls: type[PreTrainedModel] = stored.cls
        self.forward = "not tried"
        self._inputs: dict[str, Any] | None = None
        self._judged: dict[str, Verdict] = {}
        self._expressible: dict[str, bool] = {}
        self._runs_alike: dict[str, str] = {}
        self._apart: dict[str, PreTrainedModel] = {}

    def judge(
        self,
        states: Sequence[State],
        *,
        weights: Sequence[float] | None = None,
        config_from: int = 0,
    ) -> Verdict:
        """Merge models and compare what comes out with the mean."""
        weights = [1 / len(states)] * len(states) if weights is None else list(weights)
        labels = [state.label for state in states]
        verdict = Verdict(labels, self.stored.variant.label, weights, config_from)
        mean = _mean([state.values for state in states], weights)
        output = self.stored.root / "output"
        shutil.rmtree(output, ignore_errors=True)
        sources = [(str(s.folder), weight) for s, weight in zip(states, weights, strict=True)]
        options: dict[str, Any] = {"fsync": False, "workers": 1, "backend": "torch"}
        if config_from:
            options["config_from"] = str(states[config_from].folder)
        is_one_computation = all(self._compute_alike(states[0], s, mean) for s in states[1:])
        try:
            report = shardmix.merge(sources, output, device="cpu", **options)
        except ShardmixError as error:
            verdict.verdict = REFUSED
            verdict.reason = one_line(error).replace(str(self.stored.root), "")
            verdict.is_right = not is_one_computation or not self._is_expressible(states[0], mean)
            return verdict
        except Exception as error:
            verdict.verdict, verdict.is_right = CRASH, False
            verdict.reason = f"{type(error).__name__}: {one_line(error)}"
            return verdict
        key = "-".join(
            (folder_digest(output), values_digest(mean), states[config_from].computation)
        )
        if key not in self._judged:
            self._judged[key] = self._compare(output, states[config_from], mean)
        known = self._judged[key]
        verdict.verdict, verdict.is_right = known.verdict, known.is_right
        verdict.reason, verdict.remarks = known.reason, list(known.remarks)
        if not is_one_computation:
            told = "warned of" if report.warnings else "not a word"
            verdict.remarks.append(f"the models compute different things: {told}")
            verdict.is_right = verdict.is_right and bool(report.warnings)
        return verdict

    def _compare(self, output: Path, config_source: State, mean: Values) -> Verdict:
        found = Verdict([])
        try:
            model = load_whole(self.cls, output)
            wrong = difference(model.state_dict(), mean)
            wrong = wrong or self._runs_otherwise(model, config_source, mean)
        except NotWholeError as error:
            wrong = str(error)
        if wrong:
            found.verdict, found.is_right, found.reason = WRONG, False, wrong
        elif self._split(mean) and self.stored.bare(model.config).all_tied_weights_keys:
            found.remarks.append("the config says tied, the values differ: version 4 ties them")
        return found

    def _runs_otherwise(self, model: PreTrainedModel, source: State, mean: Values) -> str:
        """Return in what the outputs of the forward pass differ from the mean's."""
        if self.forward.startswith("none"):
            return ""
        # The values are the mean's: whether they are used alike depends on the config alone.
        key = "-".join((config_digest(model.config), source.computation, self._split(mean)))
        if key not in self._runs_alike:
            self._runs_alike[key] = self._run_both(model, self._holding(source.config, mean))
        return self._runs_alike[key]

    def _compute_alike(self, first: State, second: State, values: Values) -> bool:
        """Tell whether both models' configs make the same of the same values."""
        if first.computation == second.computation:
            return True
        key = f"{first.computation}-{second.computation}"
        if key not in self._runs_alike:
            theirs = self._holding(second.config, values)
            self._runs_alike[key] = self._run_both(theirs, self._holding(first.config, values))
        return not self._runs_alike[key] and not self.forward.startswith("none")

    def _run_both(self, model: PreTrainedModel, reference: PreTrainedModel) -> str:
        if self._inputs is None:
            try:
                self._inputs = tied_models.find_inputs(reference)
                self.forward = ", ".join(self._inputs)
            except Exception as error:
                self.forward = f"none: {one_line(error)[:120]}"
                return ""
        right = tied_models.outputs_of(reference, self._inputs)
        if first_off(tied_models.outputs_of(reference, self._inputs), right):
            self.forward = "none: it is not deterministic"
            return ""
        return first_off(tied_models.outputs_of(model, self._inputs), right)

    def _holding(self, config: PreTrainedConfig, values: Values) -> PreTrainedModel:
        """Return a model that shares nothing and holds these values."""
        key = config.to_json_string()
        if key not in self._apart:
            self._apart[key] = tied_models.separate(tied_models.build(self.cls, config), seed=None)
        self._apart[key].load_state_dict(values)
        return self._apart[key]

    def _split(self, values: Values) -> str:
        """Return the tied names that differ from what they are tied to."""
        return ",".join(
            target
            for target, source in sorted(self.stored.ties().items())
            if target in values and not torch.equal(values[target], values[source])
        )

    def _is_expressible(self, first: State, mean: Values) -> bool:
        """Tell whether a file that stores each name of the mean loads as the mean."""
        key = first.label + self._split(mean)
        if key not in self._expressible:
            folder = self.stored.root / "by-transformers"
            shutil.rmtree(folder, ignore_errors=True)
            try:
                self._holding(first.config, mean).save_pretrained(folder)
                loaded = load_whole(self.cls, folder).state_dict()
                self._expressible[key] = not difference(loaded, mean)
            except Exception:
                self._expressible[key] = False
        return self._expressible[key]


def _mean(models: Sequence[Values], weights: Sequence[float]) -> Values:
    mean: dict[str, torch.Tensor] = {}
    for name, tensor in models[0].items():
        mean[name] = tensor
        if tensor.is_floating_point():
            summands = [m[name].double() * w for m, w in zip(models, weights, strict=True)]
            mean[name] = torch.stack(summands).sum(dim=0).to(tensor.dtype)
    return mean


def first_off(actual: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> str:
    """Return in what the outputs of a forward pass differ from the right ones, "" if in nothing."""
    if len(actual) != len(right):
        return f"the forward pass returns {len(actual)} tensors, not {len(right)}"
    for number, (mine, theirs) in enumerate(zip(actual, right, strict=True)):
        if mine.shape != theirs.shape:
            return f"output {number} is of shape {list(mine.shape)}, not {list(theirs.shape)}"
        usable = theirs.isfinite() & (theirs.abs() < 1e30)  # masks are filled with huge values
        if not bool(usable.any()):
            continue
        scale = max(float(theirs[usable].abs().max()), 1e-6)
        off = float((mine - theirs)[usable].abs().max())
        if not off <= 1e-4 * scale:
            return f"output {number} of the forward pass is off by {off / scale:.2g}"
    return ""


def judge_class(name: str, *, most_pairs: int | None = None, seed: int = 0) -> ClassResult:
    """Judge all arrangements of a class, or at most `most_pairs` of each kind of its config."""
    start = time.perf_counter()
    result = ClassResult(name)
    with contextlib.ExitStack() as stack:
        for variant in variants(model_class(name)):
            root = stack.enter_context(tempfile.TemporaryDirectory(dir=_scratch()))
            try:
                stored = StoredModels(model_class(name), variant, Path(root))
            except Exception as error:
                kind = variant.label or "default"
                result.failure += f"{kind}: {type(error).__name__}: {one_line(error)[:300]}; "
                continue
            _judge_variant(result, stored, most_pairs, seed)
    result.seconds = round(time.perf_counter() - start, 2)
    return result


def _judge_variant(
    result: ClassResult, stored: StoredModels, most_pairs: int | None, seed: int
) -> None:
    variant: Variant = stored.variant
    judge = Judge(stored)
    prefix = f"{variant.label}: " if variant.label else ""
    result.states += [prefix + label for label in stored.models[0]]
    result.not_valid |= {prefix + label: why for label, why in stored.not_valid.items()}
    pairs = [
        (first, second)
        for first, second in itertools.product(*(states.values() for states in stored.models))
        if _shapes(first) == _shapes(second)  # a tie may give a head another shape
    ]
    if most_pairs is not None and len(pairs) > most_pairs:
        random.Random(f"{seed} {result.name} {variant.label}").shuffle(pairs)
        pairs.sort(key=lambda pair: sum(state.label not in USUAL for state in pair))
        pairs = pairs[:most_pairs]
    for number, (first, second) in enumerate(pairs):
        weights = (0.3, 0.7) if number % 7 == 3 else None
        config_from = 1 if number % 5 == 2 else 0
        result.verdicts.append(
            judge.judge((first, second), weights=weights, config_from=config_from)
        )
    if not result.kinds:
        result.ties = stored.ties()
        result.can_be_untied = stored.untied_config is not None
        result.forward = judge.forward
        with contextlib.suppress(Exception):
            default = tied_models.build(stored.cls, small_config(stored.cls))
            result.is_tied_by_default = bool(default.all_tied_weights_keys)
    result.kinds.append(variant.label or "default")


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.values.items()}


def _scratch() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextlib.contextmanager
def quiet() -> Any:
    """Let transformers say nothing, and torch use one thread."""
    level, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
        torch.set_num_threads(threads)


def summary(results: Sequence[ClassResult]) -> dict[str, Any]:
    """Return the totals of a run."""
    verdicts = [verdict for result in results for verdict in result.verdicts]
    counts = Counter(verdict.verdict for verdict in verdicts)
    built = [result for result in results if result.kinds]
    rightly = sum(v.verdict == REFUSED and v.is_right for v in verdicts)
    return {
        "classes": len(results),
        "built": len(built),
        "with a forward pass": sum(not r.forward.startswith(("none", "not")) for r in built),
        "arrangements": len(verdicts),
        **{verdict: counts[verdict] for verdict in (MERGED, REFUSED, WRONG, CRASH)},
        "refused rightly": rightly,
        "merged without a word though they compute different things": sum(
            v.verdict == MERGED and not v.is_right for v in verdicts
        ),
        "merged of what can be": counts[MERGED] / max(1, len(verdicts) - rightly),
        "tied by version 4": sum("version 4" in " ".join(v.remarks) for v in verdicts),
        "classes with a wrong one": sum(any(v.verdict == WRONG for v in r.verdicts) for r in built),
        "seconds": round(sum(r.seconds for r in results)),
    }


def describe(result: ClassResult) -> str:
    """Return a line on a class, and one on each reason why arrangements were not merged."""
    name = result.name.rpartition(":")[2]
    if not result.kinds:
        return f"{name:50} not built: {result.failure[:160]}"
    counts = Counter(verdict.verdict for verdict in result.verdicts)
    parts = [f"{key} {counts[key]}" for key in (MERGED, REFUSED, WRONG, CRASH) if counts[key]]
    lines = [f"{name:50} {len(result.verdicts):4} {' '.join(parts)} ({result.seconds} s)"]
    for kind in (WRONG, CRASH, REFUSED):
        found = [verdict for verdict in result.verdicts if verdict.verdict == kind]
        reasons = Counter(re.sub(r"/\S+", "PATH", verdict.reason) for verdict in found)
        for reason, count in reasons.most_common(2):
            lines.append(f"    {kind} {count}x: {reason[:240]}")
    return "\n".join(lines)


def write_json(path: Path, results: Sequence[ClassResult]) -> None:
    """Write all that is known, whole or not at all."""
    content = {"summary": summary(results), "classes": [asdict(result) for result in results]}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1))
    new.replace(path)


def main() -> None:
    """Run the matrix as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", default=".", help="only classes that this regex finds")
    parser.add_argument("--sample", type=int, help="this many classes, by chance")
    parser.add_argument("--pairs", type=int, help="this many arrangements a kind of config")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write all verdicts")
    arguments = parser.parse_args()
    names = [name for name in tied_class_names() if re.search(arguments.classes, name)]
    if arguments.sample is not None:
        names = random.Random(arguments.seed).sample(names, min(arguments.sample, len(names)))
    results: list[ClassResult] = []
    with quiet():
        for name in names:
            results.append(judge_class(name, most_pairs=arguments.pairs, seed=arguments.seed))
            print(describe(results[-1]), flush=True)
            if arguments.json is not None:
                write_json(arguments.json, results)
    for key, value in summary(results).items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
