"""What makes a merge this one and no other, and in what two of them differ. Knows no journal."""

from dataclasses import dataclass, fields

from shardmix.plan import FileIdentity, MergePlan


@dataclass(frozen=True, slots=True)
class MergeDescription:
    """What makes a merge this one and no other, in words that its user knows."""

    models: tuple[str, ...]
    """By public name, in order."""
    weights: tuple[float, ...]
    """In full precision."""
    dtype: str
    base: str
    base_commit: str | None
    """Of a base from the Hub."""
    max_shard_size: int | None
    model_type: str | None
    allow_differences: tuple[str, ...]
    pooling: str | None
    digest: str
    record_paths: bool
    files: tuple[FileIdentity, ...]
    """The weight files of all models."""

    @classmethod
    def of(cls, plan: MergePlan) -> "MergeDescription":
        """Describe a planned merge."""
        return cls(
            models=plan.public_names,
            weights=plan.weights,
            dtype=plan.dtype,
            base=plan.base_name,
            base_commit=plan.base_commit,
            max_shard_size=plan.max_shard_size,
            model_type=plan.model_type,
            allow_differences=plan.allow_differences,
            pooling=plan.modules.pooling,
            digest=plan.digest_algorithm,
            record_paths=plan.record_paths,
            files=plan.file_identities(),
        )


def asked_otherwise(then: MergeDescription, now: MergeDescription) -> list[str]:
    """Say what was asked for otherwise."""
    found = []
    for field in fields(MergeDescription):
        before, after = getattr(then, field.name), getattr(now, field.name)
        if field.name not in ("files", "base_commit") and before != after:
            name = field.name.replace("_", " ")
            found.append(f"{name} {_shown(before)} then, {_shown(after)} now")
    return found


def changed_files(then: MergeDescription, now: MergeDescription) -> list[str]:
    """Say which sources are not what they were."""
    was = {(file.model, file.file): file for file in then.files}
    found = []
    for file in now.files:
        earlier = was.pop((file.model, file.file), None)
        if earlier is None:
            found.append(f"{file.file} was not among its files")
        elif earlier.commit != file.commit:
            found.append(f"{file.file}: commit {earlier.commit} then, {file.commit} now")
        elif (earlier.size, earlier.header) != (file.size, file.header):
            what = "size" if earlier.size != file.size else "header"
            found.append(f"{file.file} has changed since ({what})")
        elif earlier != file:
            found.append(f"{file.file} has changed since (time of modification)")
    found += [f"{file} is no longer among its files" for _, file in was]
    is_told = now.base_commit in {file.commit for file in now.files}
    if then.base_commit != now.base_commit and not is_told:
        found.append(f"{now.base}: commit {then.base_commit} then, {now.base_commit} now")
    return found


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
