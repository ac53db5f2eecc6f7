"""The one file of an adapter, its config, and the plan that is made of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from shardmix._typing import Unpack
from shardmix.conventions import peft
from shardmix.dtypes import DTYPES, FLOAT_DTYPES, OUT_DTYPES, WIDE_DTYPES, element_nbytes
from shardmix.formats.safetensors_layout import HEADER_LENGTH_NBYTES, encode_header
from shardmix.methods import passthrough, task_arithmetic
from shardmix.methods.base import Params
from shardmix.methods.task_arithmetic import TaskArithmetic
from shardmix.options import RunSettings
from shardmix.plan.backend_choice import decide
from shardmix.plan.factoring import LEFT_NBYTES, Factoring, LowRankFacts
from shardmix.plan.layout import FileNumbers
from shardmix.plan.memory_budget import plan_memory
from shardmix.plan.merge_plan import (
    MergePlan,
    OutputModules,
    OutputShard,
    PlannedSource,
    Segment,
    SegmentSource,
)
from shardmix.plan.outcome import Outcome
from shardmix.plan.planned_sources import reader_memory
from shardmix.recipe import Recipe
from shardmix.recipe.recipe import KEEP
from shardmix.sources.adapters import Adapter
from shardmix.sources.base import Source
from shardmix.system.hashing import XXH3
from shardmix.system.page_cache import plan_cache_use

METHOD = TaskArithmetic()
"""The method of all adapters."""


class AdapterLayout:
    """The output's one file: its tensors, and where their values are read."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Sequence[Source],
        planned: tuple[PlannedSource, ...],
        numbers: Sequence[FileNumbers],
        groups: Sequence[Params],
    ) -> None:
        self.planned = planned
        """The sources, and what decodes them."""
        self._keep = recipe.output_dtype == KEEP
        self._dtype = out_dtype(recipe)
        self._sources, self._numbers = sources, numbers
        self._groups = groups
        self._segments: dict[str, Segment] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add_source(self, source: Source) -> None:
        """Add all tensors that a source decodes, as they are; it belongs to the last model."""
        last = self.planned[-1]
        stream = sum(len(each.identity.files) for each in self.planned)
        stream += sum(len(each.decoders) for each in self.planned)
        self.planned = (*self.planned[:-1], replace(last, decoders=(*last.decoders, source)))
        number = len(self.planned) - 1
        for row, info in enumerate(source.tensors):
            own = SegmentSource(number, info.dtype, stream, int(source.tensors.starts[row]))
            self._add(info.name, info.shape, info.dtype, passthrough.NAME, 0, (own,), ())

    def add_value(self, name: str, rows: Sequence[int], group: int, dtype: str) -> None:
        """Add a parameter as the merged model has it.

        `rows` are those of each source's table, `group` the number of its parameters, and `dtype`
        the one to keep.
        """
        params = self._groups[group]
        dtypes = {
            DTYPES[source.tensors.dtype_ranks[row]]
            for source, row in zip(self._sources, rows, strict=True)
        }
        is_wide = not WIDE_DTYPES.isdisjoint(dtypes)
        models = METHOD.contributors(params, is_wide=is_wide)
        factors = METHOD.factors(params, models, ())
        is_copied = factors == (1.0,)
        own = []
        for number in (*(() if is_copied else (0,)), *(model + 1 for model in models)):
            table, files, row = self._sources[number].tensors, self._numbers[number], rows[number]
            file = files.decoded if table.is_decoded(row) else files.first + int(table.files[row])
            info = table[row]
            own.append(SegmentSource(number, info.dtype, file, info.start))
        shape = self._sources[0].tensors.shapes[rows[0]]
        method = passthrough.NAME if is_copied else task_arithmetic.NAME
        self._add(name, shape, dtype, method, group, tuple(own), () if is_copied else factors)

    def _add(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        method: str,
        parameters: int,
        sources: tuple[SegmentSource, ...],
        factors: tuple[float, ...],
    ) -> None:
        out_dtype = dtype if self._keep or dtype not in FLOAT_DTYPES else self._dtype
        num_elements = int(np.prod(shape, dtype=np.int64))
        self._shapes[name] = shape
        self._segments[name] = Segment(
            name, 1, num_elements, method, parameters, out_dtype, 0, sources, factors
        )

    def shard(self) -> OutputShard:
        """Return the output's file."""
        header = encode_header(
            (
                (name, segment.out_dtype, self._shapes[name])
                for name, segment in self._segments.items()
            ),
            {"format": "pt"},
        )
        segments = tuple(
            replace(self._segments[name], out_offset=offset)
            for name, offset in zip(header.names, header.offsets, strict=False)
            if self._segments[name].num_elements
        )
        return OutputShard(
            filename=peft.WEIGHTS_NAME,
            header=header.encoded[HEADER_LENGTH_NBYTES:].decode(),
            file_nbytes=header.file_nbytes,
            read_nbytes=sum(
                each.num_elements * sum(map(element_nbytes, each.dtypes)) for each in segments
            ),
            tensor_names=header.names,
            segments=segments,
        )


def assembled(
    recipe: Recipe,
    settings: RunSettings,
    planned: tuple[PlannedSource, ...],
    shard: OutputShard,
    parameters: Sequence[Params],
    base: Source,
    content: Mapping[str, object],
    warnings: tuple[str, ...],
    factoring: Factoring | None = None,
    low_rank: LowRankFacts | None = None,
    **outcome: Unpack[Outcome],
) -> MergePlan:
    """Return the plan of an adapter, of which everything but the memory is decided.

    `factoring` is still to be done; the plan is then that of the largest adapter it may lead to.
    """
    settings = decide(settings, (shard,))
    readers = reader_memory(planned)
    if factoring is not None:
        # Only a plan tells it: what is written is planned anew.
        warnings += (
            f"factors of {factoring.num_tasks} parameters are computed first, which also reads "
            "the models; the sizes here are those of the largest adapter",
        )
    earlier = factoring.peak_nbytes if factoring is not None else 0
    earlier = max(earlier, low_rank.peak_nbytes if low_rank is not None else 0)
    return MergePlan(
        recipe=recipe,
        sources=planned,
        parameters=tuple(parameters),
        digest_algorithm=outcome.get("digest_algorithm", XXH3),
        record_paths=outcome.get("record_paths", False),
        output=str(outcome.get("output") or ""),
        config_source_name=base.public_name,
        config_source_commit=base.identity.commit,
        config_source_folder=str(base.folder.absolute()),
        auxiliary_files=(),
        left_out=(),
        config_dtypes=(),
        untied=(),
        main_subfolder="",
        module_configs=(),
        tokenizer_folder="",
        vocabulary=None,
        modules_folder="",
        modules=OutputModules(),
        factoring=factoring,
        low_rank=low_rank,
        adapter_config=json.dumps(content, indent=2, ensure_ascii=False) + "\n",
        shards=(shard,),
        disk_needed_nbytes=shard.file_nbytes,
        settings=settings,
        readers=readers,
        gathering=None,
        memory=plan_memory(
            settings,
            num_tensors=len(shard.tensor_names),
            readers=readers,
            gathering=None,
            earlier_peak=earlier,
            later_nbytes=0 if factoring is None else LEFT_NBYTES,
        ),
        cache_use=plan_cache_use(
            read_nbytes=shard.read_nbytes, write_nbytes=shard.file_nbytes, fsync=settings.fsync
        ),
        warnings=warnings,
    )


def base_name(base: Source, adapters: Sequence[Adapter], *, record_paths: bool) -> str:
    """Return the name by which users of an adapter find its base.

    It is no path of this machine, unless paths are recorded.
    """
    if base.identity.hub_id is not None:
        return base.identity.hub_id
    if record_paths:
        return base.path
    return common(adapter.config.base_model for adapter in adapters) or base.public_name


def common(texts: Iterable[str]) -> str:
    """Return the text that all are, or ""."""
    found = set(texts)
    return found.pop() if len(found) == 1 else ""


def out_dtype(recipe: Recipe) -> str:
    """Return the safetensors dtype that an adapter's matrices are rounded to."""
    return "F32" if recipe.output_dtype == KEEP else OUT_DTYPES[recipe.output_dtype]
