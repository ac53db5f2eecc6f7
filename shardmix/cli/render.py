"""Reports for people (rich tables) and for machines (JSON, without rich)."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from shardmix.errors import printable
from shardmix.errors.redaction import without_secrets
from shardmix.system.units import format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from shardmix.plan.low_rank import LowRankReport
    from shardmix.reports.merge_report import MergeReport
    from shardmix.reports.model_report import ModelReport
    from shardmix.reports.plan_facts import ShardReport
    from shardmix.reports.plan_report import ParametersReport, PlanReport
    from shardmix.scoring.report import ScoreReport
    from shardmix.verification.status import StatusReport
    from shardmix.verification.verify import VerifyReport

_NUM_ROWS = 40
_NUM_WORST = 5

# The longest text that is printed whole; of a longer one, its beginning and its end (the
# remedy).
_MAX_SHOWN, _SHOWN_START, _SHOWN_END = 2_000, 1_500, 300


def error(message: str) -> None:
    """Print an error: one line on standard error."""
    _console(stderr=True).print(f"[bold red]error:[/] {_plain(message)}", soft_wrap=True)


def error_object(
    kind: str,
    message: str,
    *,
    subject: str = "",
    finding: str,
    remedy: str = "",
    hints: Sequence[str] = (),
) -> None:
    """Print the error that ended a command, for machines: kind, whole text, and its parts."""
    texts = {"message": message, "subject": subject, "finding": finding, "remedy": remedy}
    parts: dict[str, object] = {key: _shortened(text) for key, text in texts.items()}
    _print_json({"error": {"kind": kind, **parts, "hints": [_shortened(hint) for hint in hints]}})


def merge_report(report: "MergeReport", *, profile: Path | None, json: bool, quiet: bool) -> None:
    """Print the result of a merge, and the path of its profile."""
    if json:
        _print_json(report)
    elif not quiet:
        console = _console()
        if report.scores is not None:
            console.print(_score_table(report.scores))
        rate = (report.bytes_read + report.bytes_written) / max(report.seconds, 1e-9)
        console.print(
            f"[bold green]merged[/] {report.num_models} models, {report.num_tensors} tensors: "
            f"{_plain(report.output)}",
            soft_wrap=True,
        )
        console.print(
            f"read {format_size(report.bytes_read)}, wrote {format_size(report.bytes_written)} in "
            f"{report.seconds:.2f} s ({format_size(rate)}/s); peak memory "
            f"{format_size(report.peak_rss_bytes)} of {format_size(report.projected_peak_bytes)} "
            "projected",
            soft_wrap=True,
        )
        if report.low_rank is not None:
            _low_rank(console, report.low_rank)
        if report.bytes_kept:
            console.print(
                f"went on where an earlier merge was cut off: {format_size(report.bytes_kept)} did "
                "not have to be read again",
                soft_wrap=True,
            )
        for note in report.notes:
            console.print(f"note: {_plain(note)}", soft_wrap=True)
        if profile is not None:
            console.print(f"profile: {_plain(str(profile))}", soft_wrap=True)
        console.print(f"shardmix.json: sha256 {report.provenance_sha256}", soft_wrap=True)
    if not (json and quiet):
        _warnings(report.warnings)


def _low_rank(console: "Console", report: "LowRankReport") -> None:
    """Print the error of an adapter's factors, in all and of the worst ones."""
    console.print(
        f"factors of {len(report.parameters)} parameters: relative error "
        f"{report.relative_error:.3g} in all; low_rank.json in the output has each",
        soft_wrap=True,
    )
    worst = sorted(report.parameters, key=lambda each: -each.relative_error)
    for each in worst[:_NUM_WORST]:
        console.print(
            f"    {_plain(each.name)}: rank {each.rank}, error {each.relative_error:.3g}, energy "
            f"{each.energy:.4g}",
            soft_wrap=True,
        )
    if report.kept_whole:
        console.print(f"kept whole: {len(report.kept_whole)} parameters", soft_wrap=True)


def verify_report(report: "VerifyReport", *, json: bool, quiet: bool) -> None:
    """Print the result of a verification; problems also with `quiet`, on standard error."""
    if json:
        _print_json(report)
    elif report.is_verified and not quiet:
        how = "and are what the sources give, " if report.recomputed else ""
        _console().print(
            f"[bold green]verified[/] {_plain(report.output)}: {report.num_files} files, "
            f"{format_size(report.bytes_read)} read in {report.seconds:.2f} s, are as the merge "
            f"wrote them, {how}by their {report.digest} digests",
            soft_wrap=True,
        )
        _console().print(_plain(report.proof), soft_wrap=True)
    for problem in report.problems:
        _console(stderr=True).print(f"[bold red]error:[/] {_plain(problem)}", soft_wrap=True)


def status_report(report: "StatusReport", *, json: bool) -> None:
    """Print the state of an output path, and the files of an unfinished merge to it."""
    if json:
        _print_json(report)
        return
    console = _console()
    output = _plain(report.output)
    if report.complete is not None:
        models = _models(report.complete.sources, report.complete.weights)
        console.print(
            f"{output}: [bold green]complete[/], {models}; {report.complete.num_files} files, "
            f"{format_size(report.complete.bytes)}, merged by shardmix "
            f"{_plain(report.complete.shardmix)}; `shardmix verify` reads them again",
            soft_wrap=True,
        )
        if report.note:
            console.print(f"[bold red]but[/] {_plain(report.note)}", soft_wrap=True)
    else:
        finding = report.note if report.exists else "does not exist"
        console.print(f"{output}: {_plain(finding)}", soft_wrap=True)
    unfinished = report.unfinished
    if unfinished is None:
        return
    if unfinished.note:
        console.print(f"{_plain(unfinished.staging)}: {_plain(unfinished.note)}", soft_wrap=True)
    if unfinished.is_left_over:
        return
    merge = unfinished.merge
    models = _models(merge.models, merge.weights) if merge else "nothing written yet"
    console.print(
        f"{_plain(unfinished.staging)}: [bold yellow]unfinished[/], {models}; "
        f"{format_size(unfinished.bytes_done)} of {format_size(unfinished.bytes_total)}, "
        f"{unfinished.num_shards_done} of {unfinished.num_shards} files",
        soft_wrap=True,
    )
    if unfinished.num_models_scored:
        console.print(
            f"weights come from examples: the losses of {unfinished.num_models_scored} models are "
            "kept"
        )
    if unfinished.process is None:
        console.print(
            "no process is at work on it; the same merge goes on from there, and --restart "
            "discards it",
            soft_wrap=True,
        )
    else:
        console.print(f"process {unfinished.process or '(unknown)'} is at work on it")


def _models(sources: Sequence[str], weights: Sequence[float | None]) -> str:
    return ", ".join(itertools.starmap(_model, zip(sources, weights, strict=False)))


def _model(source: str, weight: float | None) -> str:
    return f"{_plain(str(source))}{'' if weight is None else f' × {weight:g}'}"


def score_report(report: "ScoreReport", *, json: bool, quiet: bool) -> None:
    """Print the losses and weights of scored models."""
    if json:
        _print_json(report)
    elif not quiet:
        console = _console()
        console.print(_score_table(report))
        console.print(
            f"{report.num_examples} examples, temperature {report.temperature:g}; read "
            f"{format_size(report.bytes_read)} in {report.seconds:.2f} s on {report.device}; peak "
            f"memory {format_size(report.peak_rss_bytes)} of "
            f"{format_size(report.projected_peak_bytes)} projected",
            soft_wrap=True,
        )
    if not (json and quiet):
        _warnings(report.warnings)


def _score_table(report: "ScoreReport") -> "Table":
    table = _table("model", "loss", "weight")
    for source, loss, weight in zip(report.sources, report.losses, report.weights, strict=True):
        table.add_row(_plain(source), f"{loss:.4f}", f"{weight:.4f}")
    return table


def plan_report(report: "PlanReport", *, json: bool, quiet: bool = False) -> None:
    """Print the plan of a merge."""
    if json:
        _print_json(report)
        return
    if not quiet:
        console = _console()
        facts = _table("", "")
        facts.show_header = False
        for number, pair in enumerate(zip(report.sources, report.weights, strict=True)):
            is_base = "base_model" in report.recipe and number == 0
            facts.add_row("base model" if is_base else "model", _model(*pair))
        facts.add_row("method", _method(report))
        free = report.disk_free_bytes
        for name, value in (
            ("output", _plain(report.output) or "not named"),
            ("tensors", str(report.num_tensors)),
            *_quantized(report),
            ("read", format_size(report.bytes_read)),
            ("write", format_size(report.bytes_written)),
            (
                "disk",
                f"{format_size(report.disk_needed_bytes)} needed"
                + (f", {format_size(free)} free" if free is not None else ""),
            ),
            (
                "peak memory",
                f"{format_size(report.projected_peak_bytes)} projected, "
                f"{format_size(report.reserved_bytes)} of it Python and libraries",
            ),
            *(
                [("peak VRAM", f"{format_size(report.projected_vram_bytes)} projected")]
                if report.projected_vram_bytes
                else []
            ),
            (
                "chunks",
                f"{format_size(report.strip_bytes)} × {report.workers} workers on {report.device}, "
                f"read by {report.io}, summed by {report.backend}",
            ),
            ("page cache", _cache_use(report)),
        ):
            facts.add_row(name, value)
        console.print(facts)
        if len(report.parameters) > 1:
            console.print(_parameter_table(report.parameters))
        console.print(_shard_table(report.shards, reads=True))
    too_full = report.disk_free_bytes is not None and (
        report.disk_free_bytes < report.disk_needed_bytes
    )
    shortage = ("the output's disk has too little room: the merge would be refused",)
    _warnings(report.warnings + shortage * too_full)


def _quantized(report: "PlanReport") -> Iterator[tuple[str, str]]:
    if report.quantized is not None:
        quantized = report.quantized
        yield (
            "quantised",
            f"{quantized.quantization}: {quantized.num_tensors} tensors, {quantized.rule}",
        )


def _method(report: "PlanReport") -> str:
    """Return the method with the parameters that all tensors share, without the weights."""
    name = _plain(report.recipe["merge_method"])
    if len(report.parameters) != 1:
        return f"{name}, with parameters by tensor" if report.parameters else name
    (parameters,) = report.parameters
    own = {key for model in parameters.by_model for key in model} - {"weight"}
    texts = [f"{key} {_value(value)}" for key, value in parameters.shared.items()]
    texts += [f"{key} {_by_model(parameters, key)}" for key in sorted(own)]
    return ", ".join([name, *texts])


def _parameter_table(groups: "tuple[ParametersReport, ...]") -> "Table":
    names = [*groups[0].shared, *(groups[0].by_model[0] if groups[0].by_model else ())]
    table = _table("parameters of", "tensors", *names)
    for group in groups[:_NUM_ROWS]:
        values = [
            _value(group.shared[name]) if name in group.shared else _by_model(group, name)
            for name in names
        ]
        table.add_row(_plain(group.first_tensor), str(group.num_tensors), *values)
    if len(groups) > _NUM_ROWS:
        table.add_row(f"... and {len(groups) - _NUM_ROWS} more (--json)", *[""] * (len(names) + 1))
    return table


def _by_model(parameters: "ParametersReport", name: str) -> str:
    return " / ".join(_value(model[name]) for model in parameters.by_model)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else _plain(str(value))


def _cache_use(report: "PlanReport") -> str:
    if report.keeps_sources_cached:
        return "keeps sources and output"
    return "keeps only the output" if report.keeps_output_cached else "is left to other files"


def model_report(report: "ModelReport", *, json: bool, all_tensors: bool) -> None:
    """Print the tensors and shards of a checkpoint."""
    if json:
        _print_json(report)
        return
    console = _console()
    dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in sorted(report.dtypes.items()))
    console.print(f"[bold]{_plain(report.source)}[/]  {_plain(report.path)}", soft_wrap=True)
    console.print(
        f"{report.num_tensors} tensors, {report.num_parameters:,} parameters "
        f"({dtypes}), {format_size(report.bytes)} in {len(report.shards)} file(s)",
        soft_wrap=True,
    )
    for head, embedding in report.tied.items():
        console.print(f"tied: {_plain(head)} is not stored; it shares {_plain(embedding)}")
    if len(report.shards) > 1:
        console.print(_shard_table(report.shards, reads=False))
    shown = report.tensors if all_tensors else report.tensors[:_NUM_ROWS]
    table = _table("tensor", "dtype", "shape", "bytes")
    for tensor in shown:
        size = format_size(tensor.nbytes)
        table.add_row(_plain(tensor.name), tensor.dtype, str(list(tensor.shape)), size)
    console.print(table)
    if len(shown) < report.num_tensors:
        console.print(f"... and {report.num_tensors - len(shown)} more (--all)")


def _shard_table(shards: "tuple[ShardReport, ...]", *, reads: bool) -> "Table":
    columns = ["shard", "tensors", "size", *(["read", "from files"] if reads else [])]
    table = _table(*columns)
    for shard in shards[:_NUM_ROWS]:
        row = [_plain(shard.name), str(shard.num_tensors), format_size(shard.bytes)]
        if reads:
            row += [format_size(shard.bytes_read), str(len(shard.sources))]
        table.add_row(*row)
    if len(shards) > _NUM_ROWS:
        table.add_row(f"... and {len(shards) - _NUM_ROWS} more", *[""] * (len(columns) - 1))
    return table


def _table(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold" if number == 0 else "ellipsis")
    return table


def _warnings(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        _console(stderr=True).print(f"[yellow]warning:[/] {_plain(warning)}", soft_wrap=True)


def _plain(text: str) -> str:
    """Return text that rich prints as it is: no markup, no control characters."""
    from rich.markup import escape

    return escape(_shortened(printable(text)))


def _shortened(text: str) -> str:
    if len(text) <= _MAX_SHOWN:
        return text
    return f"{text[:_SHOWN_START]} [...] {text[-_SHOWN_END:]}"


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, emoji=False)


def _print_json(content: object) -> None:
    for text in map(without_secrets, _json_pieces(content)):
        # JSON may contain them, but a terminal would obey them.
        obeyed = [char for char in set(text) if not char.isprintable() and char != "\n"]
        print(text.translate({ord(char): dumps(char)[1:-1] for char in obeyed}), end="")
    print()


def _json_pieces(content: object) -> Iterator[str]:
    """Yield a report as indented JSON, an item of its lists at a time.

    As one text, a report that names every tensor takes memory that no plan counts.
    """
    if not is_dataclass(content):
        yield _indented(content)
        return
    opening = "{"
    for field in fields(content):
        value = getattr(content, field.name)
        yield f'{opening}\n  "{field.name}": '
        opening = ","
        if not isinstance(value, tuple) or not value:
            yield _indented(value, by=2)
            continue
        for number, item in enumerate(value):
            yield ("," if number else "[") + "\n    "
            yield _indented(item, by=4)
        yield "\n  ]"
    yield "\n}"


def _indented(content: object, *, by: int = 0) -> str:
    text = msgspec.json.format(msgspec.json.encode(content), indent=2).decode()
    return text.replace("\n", "\n" + " " * by)  # a line break within a string is escaped
