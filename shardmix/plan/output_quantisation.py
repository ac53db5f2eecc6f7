"""The part of an output that is written as codes: its tensors, memory and warnings."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from shardmix.conventions.output_quantisations import OUTPUT_QUANTISATIONS, unconverted_modules
from shardmix.dtypes import FLOAT_DTYPES
from shardmix.errors import RecipeError
from shardmix.matching.tensors import MatchedTensors
from shardmix.plan.chunk_size import band_chunk_nbytes
from shardmix.plan.layout import OutputTensors
from shardmix.plan.memory_budget import TENSOR_SCALES_NBYTES, CodingMemory
from shardmix.plan.merge_plan import OutputShard, QuantisedOutput
from shardmix.recipe import Recipe


class Chosen(NamedTuple):
    """The tensors of the output that are quantised."""

    indexes: frozenset[int]
    """Their indexes among the matched tensors."""
    output: QuantisedOutput
    """The quantised output."""


def quantised(
    recipe: Recipe,
    matched: MatchedTensors,
    out_dtypes: Sequence[str],
    config: Mapping[str, Any],
) -> Chosen | None:
    """Choose the tensors to quantise; None if none is asked for.

    `config` is the output's. Raises `RecipeError` if there is nothing to quantise.
    """
    if recipe.quantize is None:
        return None
    quantisation = OUTPUT_QUANTISATIONS[recipe.quantize]
    index_of = {name: index for index, name in enumerate(matched.names)}
    shapes = {
        name: shape
        for name, shape, dtype in zip(matched.names, matched.shapes, out_dtypes, strict=True)
        if dtype in FLOAT_DTYPES
    }
    names = set(quantisation.chosen(shapes, config))
    if not names:
        raise RecipeError(
            f"nothing to quantise among {len(matched.names)} tensors; chosen are "
            f"{quantisation.rule}",
            subject=f"quantize {quantisation.name}",
            remedy="leave it out",
        )
    taken = next(
        (name for name in names if f"{name}{quantisation.scales_ending}" in index_of), None
    )
    if taken is not None:
        raise RecipeError(
            f"{taken}{quantisation.scales_ending} is the name of the scales of {taken}, and the "
            "model has a tensor of that name",
            subject=f"quantize {quantisation.name}",
            remedy="leave it out, or remove that tensor",
        )
    from shardmix.conventions.declarations import declaration_of  # other merges need no table

    ties = (tie for tie in declaration_of(config).ties if tie.is_declared(config))
    return Chosen(
        frozenset(index_of[name] for name in names),
        QuantisedOutput(quantisation.name, len(names), unconverted_modules(shapes, names, ties)),
    )


def check_config(recipe: Recipe, auxiliary_files: Collection[str], name: str) -> None:
    """Raise `RecipeError` if the output has no config of this name to declare codes in."""
    if recipe.quantize is not None and name not in auxiliary_files:
        raise RecipeError(
            f"the output has no {name}, which must tell that its weights are codes",
            subject=f"quantize {recipe.quantize}",
            remedy="name a model that has one with --config-from",
        )


def written(recipe: Recipe, out_dtypes: Sequence[str], chosen: Chosen | None) -> OutputTensors:
    """Return the output's tensors; those that are quantised are first merged in float32."""
    if chosen is None or recipe.quantize is None:
        return OutputTensors(out_dtypes)
    dtypes = ["F32" if n in chosen.indexes else own for n, own in enumerate(out_dtypes)]
    return OutputTensors(dtypes, OUTPUT_QUANTISATIONS[recipe.quantize], chosen.indexes)


def ragged_notes(shards: Sequence[OutputShard]) -> Iterator[str]:
    """Yield a warning of codes that some loader would read wrongly."""
    ragged = [
        segment.name
        for shard in shards
        for segment in shard.merged
        if segment.coded is not None
        and any(
            length > size and length % size
            for length, size in zip(segment.coded[-2:], segment.coded.bands.block, strict=True)
        )
    ]
    if ragged:
        yield (
            f"{len(ragged)} quantised tensors, {ragged[0]} first, end in ragged blocks, as "
            "DeepSeek-V3's do: transformers' dequantisation on a CPU takes blocks to be of equal "
            "size, and refuses or misreads them; whoever goes by weight_block_size reads them"
        )


def coding_memory(shards: Sequence[OutputShard]) -> CodingMemory | None:
    """Return the needs of quantising; None if nothing is quantised."""
    coded = [segment for shard in shards for segment in shard.merged if segment.coded is not None]
    if not coded:
        return None
    all_bands = [segment.coded.bands for segment in coded if segment.coded is not None]
    return CodingMemory(
        band_chunk_nbytes=max(map(band_chunk_nbytes, coded)),
        num_scales=max(bands.num_scales for bands in all_bands),
        most_known_nbytes=sum(
            TENSOR_SCALES_NBYTES + bands.num_bands * (4 * bands.num_scales + 1)
            for bands in all_bands
        ),
    )
