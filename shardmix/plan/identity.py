"""The identity of a merge, and the differences between two. Knows no journal."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec
import xxhash

from shardmix.plan.merge_plan import FileIdentity, MergePlan
from shardmix.recipe import Recipe
from shardmix.recipe.parameters import used_weights
from shardmix.recipe.recipe import NORMALIZE, WEIGHT, plain_value
from shardmix.recipe.tokenizer import tokenizer_entries


@dataclass(frozen=True, slots=True)
class MergeDescription:
    """The identity of a merge, in words that its user knows."""

    recipe: Recipe
    """The recipe; models by public name."""
    config_from: str
    config_source_commit: str | None
    """Commit of a config source from the Hub."""
    digest: str
    record_paths: bool
    files: tuple[FileIdentity, ...]
    """The weight files of all models."""
    vocabulary: str = ""
    """Digest of the map of rows to the output's vocabulary; "" without one."""

    @classmethod
    def of(cls, plan: MergePlan) -> "MergeDescription":
        """Describe a planned merge."""
        return cls(
            recipe=plan.public_recipe,
            config_from=plan.config_source_name,
            config_source_commit=plan.config_source_commit,
            digest=plan.digest_algorithm,
            record_paths=plan.record_paths,
            files=plan.file_identities(),
            vocabulary=_vocabulary_digest(plan),
        )


def _vocabulary_digest(plan: MergePlan) -> str:
    if plan.vocabulary is None:
        return ""
    maps = [source.identity.decoding for source in plan.sources]
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode((plan.vocabulary, maps)))


def asked_otherwise(then: MergeDescription, now: MergeDescription) -> list[str]:
    """Describe the user's requests that differ."""
    before, after = dict(_asked(then)), dict(_asked(now))
    return [
        f"{name} {_shown(before[name])} then, {_shown(after[name])} now"
        for name in before
        if before[name] != after[name]
    ]


def _asked(merge: MergeDescription) -> Iterator[tuple[str, object]]:
    """Yield what was asked for, by the names that a user knows."""
    recipe = merge.recipe
    weights = used_weights(recipe)
    yield "method", recipe.merge_method
    yield "models", recipe.sources
    yield "weights", weights
    levels = (recipe.parameters, *(model.parameters for model in recipe.models))
    others = [
        f"{setting.name} {plain_value(setting)}"
        for level in levels
        for setting in level
        if setting.name not in (WEIGHT, NORMALIZE) or not weights
    ]
    yield "parameters", tuple(others)
    yield "dtype", recipe.output_dtype
    yield "quantize", recipe.quantize
    yield "config from", merge.config_from
    yield "max shard size", recipe.max_shard_size
    yield "model type", recipe.model_type
    yield "allow differences", recipe.allow_differences
    yield "pooling", recipe.pooling
    yield "as adapter", recipe.as_adapter
    yield "rank", recipe.rank
    yield "energy", recipe.energy
    yield "tokenizer", ", ".join(map(str, tokenizer_entries(recipe.tokenizer).values())) or None
    yield "skip others", recipe.skip_others
    yield "digest", merge.digest
    yield "record paths", merge.record_paths


def changed_files(then: MergeDescription, now: MergeDescription) -> list[str]:
    """Describe the sources that changed."""
    before, after = [_key(file) for file in then.files], [_key(file) for file in now.files]
    found = [f"{name} was not among its files" for _, name in _without(after, before)]
    found += [f"{name} is no longer among its files" for _, name in _without(before, after)]
    if before == after:
        # By number, since one model may occur twice.
        pairs = list(zip(then.files, now.files, strict=True))
    else:
        was = dict(zip(before, then.files, strict=True))
        pairs = [(was[_key(file)], file) for file in now.files if _key(file) in was]
    for earlier, file in pairs:
        if earlier.commit != file.commit:
            found.append(f"{file.file}: commit {earlier.commit} then, {file.commit} now")
        elif (earlier.size, earlier.header) != (file.size, file.header):
            what = "size" if earlier.size != file.size else "header"
            found.append(f"{file.file} has changed since ({what})")
        elif earlier.modified != file.modified:
            found.append(f"{file.file} has changed since (time of modification)")
        elif earlier.stamp and file.stamp and file.stamp.may_be_written_since(earlier.stamp):
            found.append(
                f"{file.file} has changed since (its status did: it was written to or replaced and "
                "its time of modification set back, or only its rights or links are others)"
            )
    if then.vocabulary != now.vocabulary:
        found.append("a tokenizer has changed since, or a config: rows or ids follow other tokens")
    is_told = now.config_source_commit in {file.commit for file in now.files}
    if then.config_source_commit != now.config_source_commit and not is_told:
        found.append(
            f"{now.config_from}: commit {then.config_source_commit} then, "
            f"{now.config_source_commit} now"
        )
    return found


def _key(file: FileIdentity) -> tuple[str, str]:
    return file.model, file.file


def _without(
    keys: Iterable[tuple[str, str]], others: Iterable[tuple[str, str]]
) -> list[tuple[str, str]]:
    left_out = set(others)
    return [key for key in keys if key not in left_out]


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
