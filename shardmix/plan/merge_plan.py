"""The merge plan: a value with everything that a merge will do, decided before a weight is read.

Plain frozen data that prints, hashes and goes through JSON unchanged. The planner makes it,
`execute` carries it out, and neither has to ask the other anything.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import msgspec

from shardmix.conventions.file_kinds import LeftOut
from shardmix.conventions.module_tree import inner_path
from shardmix.conventions.output_quantisations import OUTPUT_QUANTISATIONS
from shardmix.conventions.tokenizer_splices import Splice
from shardmix.dtypes import element_nbytes
from shardmix.formats.matrices import CODE_NBYTES, Bands
from shardmix.formats.safetensors_layout import HEADER_LENGTH_NBYTES
from shardmix.methods.base import Params
from shardmix.methods.registry import merge_method
from shardmix.methods.statistics import Statistic
from shardmix.options import RunSettings
from shardmix.plan.factoring import Factoring, LowRankFacts
from shardmix.plan.memory_budget import CodingMemory, Gathering, MemoryPlan, ReaderMemory
from shardmix.recipe import Recipe
from shardmix.sources.base import Source
from shardmix.sources.identity import FileStamp, SourceFile, SourceIdentity
from shardmix.system.page_cache import CacheUse

_PIECE_NBYTES = 1 << 20
# A tensor's entry as `safetensors_layout.encode_header` writes it. No name can look like one,
# since a quotation mark in a name follows a backslash.
_ENTRY = re.compile(r'"dtype":"(\w+)","shape":\[[\d,]*\],"data_offsets":\[(\d+),(\d+)\]')


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """A model of the merge, and the files to read."""

    text: str
    """The user's name for it."""
    name: str
    """Its name in the model card: Hub id with revision, or a name without a path."""
    path: str
    """A text that opens it again, from any folder: an absolute path, for most."""
    identity: SourceIdentity
    """Identity of its bytes: the weight files to read, and their commit."""
    decoders: tuple[Source, ...] = field(default=(), repr=False, compare=False)
    """Its opened parts with tensors that are decoded while they are read."""

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if the model changed since it was opened."""
        self.identity.check_unchanged()
        for decoder in self.decoders:
            decoder.check_unchanged()


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """The identity of a source's file: as long as it is the same, so is the file."""

    model: str
    """Public name of its model."""
    file: str
    """Absolute path, or for a file from the Hub its path within the model."""
    commit: str | None
    """The commit on the Hub."""
    size: int
    """Size in bytes."""
    modified: int | None
    """Time of modification in nanoseconds since 1970; None from the Hub."""
    header: str
    """SHA-256 (hex) of its header."""
    stamp: FileStamp | None
    """Further status of its file system; None from the Hub."""


class SegmentSource(NamedTuple):
    """The position of a segment's elements in one source. A tuple, since plans have very many."""

    source: int
    """Index into `MergePlan.sources`."""
    dtype: str
    """Safetensors dtype there."""
    file: int
    """Index into `MergePlan.files`, and beyond these into `MergePlan.decoders`."""
    offset: int
    """First byte in that file, or in that decoder's stream."""
    is_change: bool = False
    """True if its values are the model's changes to the base model."""


class CodedMatrices(NamedTuple):
    """The matrices of a segment that is written as codes; bands of blocks go into one chunk."""

    quantisation: str
    """Name in `output_quantisations.OUTPUT_QUANTISATIONS`."""
    num_matrices: int
    """Number of matrices, which lie one after another."""
    rows: int
    """Rows of each."""
    columns: int
    """Columns of each."""

    @property
    def bands(self) -> Bands:
        """Their bands."""
        block = OUTPUT_QUANTISATIONS[self.quantisation].coding.block
        return Bands(self.num_matrices, self.rows, self.columns, block)


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of elements that is contiguous in the output and in every source.

    It is one tensor, or several that are neighbours everywhere and have the same parameters. Any
    part of it (a chunk) is one byte range per source, so a segment of any length streams in any
    memory.
    """

    name: str
    """Its first tensor, for messages."""
    num_tensors: int
    """Number of tensors that it spans."""
    num_elements: int
    """Number of its elements."""
    method: str
    """Name of the method that merges it; `keep_first.NAME` for integers."""
    parameters: int
    """Index into `MergePlan.parameters`."""
    out_dtype: str
    """Safetensors dtype of the output; of one that is quantised, of its values before that."""
    out_offset: int
    """First byte in the output shard's file."""
    sources: tuple[SegmentSource, ...]
    """The sources that count, the base model first if there is one."""
    factors: tuple[float, ...]
    """The method's factors, in double precision; empty as long as they are pending."""
    num_pending: int = 0
    """Number of factors that follow from statistics of the whole tensor."""
    coded: CodedMatrices | None = None
    """Its one tensor's matrices, if it is written as codes."""
    scales_of: int | None = None
    """Index in its file's segments of that whose scales it is; without sources of its own."""

    @property
    def out_width(self) -> int:
        """Bytes of an element in the output."""
        return element_nbytes(self.out_dtype) if self.coded is None else CODE_NBYTES

    @property
    def is_pending(self) -> bool:
        """True if it has factors that are not known yet."""
        return self.num_pending > 0 and not self.factors

    def with_placeholders(self) -> "Segment":
        """Return the same segment with as many factors as it will have."""
        return replace(self, factors=(1.0,) * self.num_pending) if self.is_pending else self

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Safetensors dtype in each source."""
        return tuple([source.dtype for source in self.sources])

    @property
    def are_changes(self) -> tuple[bool, ...]:
        """For each source, True if its values are changes to the base model."""
        return tuple([source.is_change for source in self.sources])

    @property
    def files(self) -> tuple[int, ...]:
        """For each source, an index into `MergePlan.files`, and beyond these into its decoders."""
        return tuple([source.file for source in self.sources])


@dataclass(frozen=True, slots=True)
class OutputShard:
    """A file that will be written."""

    filename: str
    """Its path in the output folder, with `/`; tensors of modules are in the module's folder."""
    header: str
    """The file's first bytes without the length prefix: JSON, padded."""
    file_nbytes: int
    """Size of the whole file."""
    read_nbytes: int
    """Bytes of all sources that go into it."""
    tensor_names: tuple[str, ...]
    """Its tensors, in data order."""
    segments: tuple[Segment, ...]
    """Its data, in order."""

    @property
    def merged(self) -> Iterator[Segment]:
        """Its segments with sources: all but the scales of others."""
        return (segment for segment in self.segments if segment.scales_of is None)

    @property
    def scales_stop(self) -> int:
        """Offset of the end of the scales in the file; 0 if there are none."""
        return max(
            (
                segment.out_offset + segment.num_elements * segment.out_width
                for segment in self.segments
                if segment.scales_of is not None
            ),
            default=0,
        )

    @property
    def subfolder(self) -> str:
        """Its folder within the output; empty for the output itself."""
        return self.filename.rpartition("/")[0]

    @property
    def data_start(self) -> int:
        """Offset of its data in the file; the file's end if it has none."""
        return self.segments[0].out_offset if self.segments else self.file_nbytes

    def full_name(self, name: str) -> str:
        """Return a tensor's name for messages: after its module's folder, if it is in one."""
        return inner_path(self.subfolder, name)

    def head_nbytes(self) -> int:
        """Return the offset of the header's end in the file."""
        is_ascii = self.header.isascii()
        return HEADER_LENGTH_NBYTES + len(self.header if is_ascii else self.header.encode())

    def head(self) -> Iterator[bytes]:
        """Yield the file's first bytes, piece by piece: the header's length, then the header."""
        yield (self.head_nbytes() - HEADER_LENGTH_NBYTES).to_bytes(HEADER_LENGTH_NBYTES, "little")
        for start in range(0, len(self.header), _PIECE_NBYTES):
            yield self.header[start : start + _PIECE_NBYTES].encode()

    def head_between(self, start: int, stop: int) -> bytes:
        """Return the part of the file's first bytes in a range of the file."""
        parts, position = [], 0
        for piece in self.head():
            if position >= stop:
                break
            parts.append(piece[max(start - position, 0) : stop - position])
            position += len(piece)
        return b"".join(parts)

    def tensors(self) -> Iterator[tuple[str, str, int]]:
        """Yield each tensor's name, safetensors dtype and last byte + 1, counted from the header's
        end.

        One after the other, from the header: as objects they would take more memory than a plan.
        """
        for name, entry in zip(self.tensor_names, _ENTRY.finditer(self.header), strict=True):
            yield name, entry[1], int(entry[3])


@dataclass(frozen=True, slots=True)
class OutputModules:
    """The output's sentence-transformers modules, besides the config source's files."""

    files: tuple[str, ...] = ()
    """Files of the model that gives modules that the config source lacks; in its folder."""
    main_subfolder: str = ""
    """Folder of its encoder in that folder; the output's encoder is in the output itself."""
    pooling: str | None = None
    """Pooling of the output if it was asked for: one of `sentence_modules.POOLINGS`."""
    pooling_configs: tuple[str, ...] = ()
    """Configs of modules whose own pooling differs, relative to the output."""


@dataclass(frozen=True, slots=True)
class ModuleConfig:
    """Statements that the config of a module with weights must make."""

    subfolder: str
    """The module's folder within the output."""
    dtypes: tuple[tuple[str, str], ...]
    """Its dtypes, as `MergePlan.config_dtypes`."""
    untied: tuple[str, ...]
    """Parts of it that must say `tie_word_embeddings: false`."""


@dataclass(frozen=True, slots=True)
class OutputVocabulary:
    """The vocabulary of an output whose models had others."""

    giver: str
    """Public name of the model that gives the tokenizer."""
    num_rows: int
    """Rows of its tensors with a row for each token."""
    num_tokens: int
    """Tokens of its tokenizer."""
    files: tuple[str, ...]
    """Files of the tokenizer within its model's folder, and within the output's main folder."""
    digests: tuple[tuple[str, str], ...]
    """XXH3 (hex) of each of these files: the rows were mapped by this content."""
    splices: tuple[Splice, ...]
    """Texts to put into these files, for tokens that the output's tokenizer has besides."""
    configs: tuple[tuple[str, str], ...]
    """Path within the output → JSON, of the configs that name other sizes or ids."""


@dataclass(frozen=True, slots=True)
class QuantisedOutput:
    """The tensors of an output that are written as codes."""

    quantisation: str
    """Name in `output_quantisations.OUTPUT_QUANTISATIONS`."""
    num_tensors: int
    """Number of tensors that are quantised, scales not counted."""
    unconverted: tuple[str, ...]
    """Modules of the matrices that stay float, as the config names them."""


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything a merge will do. Sizes in bytes."""

    recipe: Recipe
    """The recipe."""
    sources: tuple[PlannedSource, ...]
    """The recipe's `sources`, in order."""
    parameters: tuple[Params, ...]
    """The method's parameters, each for tensors that share them; segments name theirs by index."""
    digest_algorithm: str
    """Algorithm of the output files' digests: one of `hashing.ALGORITHMS`."""
    record_paths: bool
    """True if the output's provenance records the sources' paths on this machine."""
    output: str
    """Absolute path of the output folder."""
    config_source_name: str
    """Name in the model card of the model that gives config, tokenizer and the like."""
    config_source_commit: str | None
    """Commit of that model, if it came from the Hub."""
    config_source_folder: str
    """Absolute path of the folder that gives config, tokenizer and other auxiliary files."""
    auxiliary_files: tuple[str, ...]
    """Those files, relative to that folder."""
    left_out: tuple[LeftOut, ...]
    """Its other files, with the reasons that they do not go along."""
    config_dtypes: tuple[tuple[str, str], ...]
    """Dtypes that the output's config must state, if it states any: a part's dotted keys ("" for
    the whole), and a torch name."""
    untied: tuple[str, ...]
    """Parts of the output's config that must say `tie_word_embeddings: false`, since parameters
    that they tie are stored one by one: "" is its top, others are dotted keys."""
    main_subfolder: str
    """Folder of that config in the output: "", or the folder of the module that it belongs to."""
    module_configs: tuple["ModuleConfig", ...]
    """The same for further modules with weights."""
    modules_folder: str
    """Absolute path of the model that gives modules that the config source lacks, or ""."""
    tokenizer_folder: str
    """Absolute path of the folder that gives the tokenizer of `vocabulary`, or ""."""
    vocabulary: OutputVocabulary | None
    """The output's vocabulary, if rows are mapped to it."""
    modules: OutputModules
    """Files of sentence-transformers modules to write besides auxiliary files."""
    factoring: Factoring | None
    """Factors that must be computed first; None if there are none, or they are known. Until then
    the files are those of the largest adapter that may follow."""
    low_rank: LowRankFacts | None
    """The factors that an adapter is made of, once they are computed."""
    adapter_config: str
    """Content of the output's adapter_config.json; "" if the output is a model."""
    shards: tuple[OutputShard, ...]
    """All weight files that will be written."""
    disk_needed_nbytes: int
    """Disk space of the output, all files counted in whole blocks, and of the journal."""
    settings: RunSettings
    """Device, way to read, budgets."""
    readers: ReaderMemory
    """The memory of the sources' own readers."""
    gathering: Gathering | None
    """The statistics' need of memory; None if the method needs no statistics."""
    memory: MemoryPlan
    """Chunk size, workers and projected peak."""
    cache_use: CacheUse
    """The files whose pages stay in the system's page cache."""
    warnings: tuple[str, ...]
    """Warnings for the user before the merge."""
    quantised: QuantisedOutput | None = None
    """The quantised part of the output; None if all of it is as merged."""
    coding: CodingMemory | None = None
    """The memory that quantising needs; None without."""

    @property
    def public_recipe(self) -> Recipe:
        """The recipe, without the paths of this machine."""
        names = [source.name for source in self.sources]
        is_other = self.config_source_name != names[0]
        return self.recipe.with_sources(
            names, config_from=self.config_source_name if is_other else None
        )

    @property
    def num_models(self) -> int:
        """Number of models."""
        return len(self.sources)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """All weight files to read, model by model; segments know them by number."""
        return tuple(file for source in self.sources for file in source.identity.files)

    @property
    def decoders(self) -> tuple[Source, ...]:
        """Sources that decode while reading; their numbers follow those of the files."""
        return tuple(decoder for source in self.sources for decoder in source.decoders)

    @property
    def factors_nbytes(self) -> int:
        """Bytes of factors that are stored until the output is complete, at most."""
        known = self.low_rank.nbytes if self.low_rank is not None else 0
        return known if self.factoring is None else self.factoring.stored_nbytes

    @property
    def num_tensors(self) -> int:
        """Number of tensors that the output stores."""
        return sum(len(shard.tensor_names) for shard in self.shards)

    @property
    def read_nbytes(self) -> int:
        """Bytes of weights to read."""
        return sum(shard.read_nbytes for shard in self.shards)

    @property
    def write_nbytes(self) -> int:
        """Bytes of weight files to write."""
        return sum(shard.file_nbytes for shard in self.shards)

    def segments(self) -> Iterator[Segment]:
        """Yield every segment that is merged, in output order."""
        return (segment for shard in self.shards for segment in shard.merged)

    def tensor_dtype(self, name: str) -> str:
        """Return the safetensors dtype of a tensor in the output. Slow: reads a header."""
        return next(
            dtype
            for shard in self.shards
            if name.startswith(shard.full_name(""))
            for stored, dtype, _ in shard.tensors()
            if shard.full_name(stored) == name
        )

    def nonfinite_finding(self, name: str, counts: tuple[int, int, int]) -> str:
        """Describe the values of a merged tensor that are not finite."""
        num_nan, num_inf, num_overflowed = counts
        parts = []
        if num_nan:
            parts.append(f"{num_nan} NaN")
        if num_inf - num_overflowed:
            parts.append(f"{num_inf - num_overflowed} Inf")
        if num_overflowed:
            parts.append(
                f"{num_overflowed} values too large for {self.tensor_dtype(name)}, made Inf by "
                "rounding (--dtype bfloat16 or float32 has room for them)"
            )
        return " and ".join(parts) + " in the merged tensor"

    def needed_statistics(self, segment: Segment) -> tuple[Statistic, ...]:
        """Return the statistics that decide a segment's factors; () if they need none."""
        if not segment.num_pending:
            return ()
        return merge_method(segment.method).needs(self.parameters[segment.parameters]).statistics

    def with_disk_needed(self, nbytes: int) -> "MergePlan":
        """Return the same merge with the disk space of its output, now that it is known."""
        return replace(self, disk_needed_nbytes=nbytes)

    def with_memory(self, memory: MemoryPlan) -> "MergePlan":
        """Return the same merge within other memory; its output is the same, byte for byte."""
        return replace(self, memory=memory)

    def digest(self) -> str:
        """Return a SHA-256 (hex) of all that decides the output's bytes.

        Paths of sources and output, the way of reading, memory and the page cache are left out:
        from the same bytes, two plans with the same digest write the same files.

        Goes segment by segment, since as one piece its JSON takes as much memory as the plan.
        """
        hasher = hashlib.sha256()
        for part in self._decisive_parts():
            # A line each: JSON has no line break within a value.
            hasher.update(msgspec.json.encode(part))
            hasher.update(b"\n")
        return hasher.hexdigest()

    def _decisive_parts(self) -> Iterator[object]:
        """Yield all that decides the output's bytes, always in the same order."""
        paths = {"output", "config_source_folder", "modules_folder", "tokenizer_folder"}
        irrelevant = paths | {
            *(
                "readers",
                "gathering",
                "coding",
                "factoring",
                "low_rank",
                "settings",
                "memory",
                "cache_use",
                "warnings",
                "left_out",
                "disk_needed_nbytes",
            ),
        }
        in_parts = {"recipe", "sources", "shards"}
        yield self.public_recipe
        if self.low_rank is not None:
            yield self.low_rank.digest
        for each in fields(self):
            if each.name not in irrelevant | in_parts:
                value = getattr(self, each.name)
                if each.name != "vocabulary" or value is not None:
                    yield each.name, value
        for source in self.sources:
            identity = source.identity
            yield source.name, identity.hub_id, identity.commit, identity.decoding
            for file in identity.files:
                yield file.name, file.nbytes, file.header_sha256
        for shard in self.shards:
            yield shard.filename, shard.file_nbytes, shard.read_nbytes, len(shard.segments)
            # The header has the tensors' names, in data order.
            header = hashlib.sha256()
            for piece in shard.head():
                header.update(piece)
            yield header.hexdigest()
            yield from shard.segments

    def file_identities(self) -> tuple[FileIdentity, ...]:
        """Return the identity of every weight file.

        For a file from the Hub neither path nor age matter, since its commit identifies it.
        """
        return tuple(
            FileIdentity(
                model=source.name,
                file=file.name if file.commit else file.path,
                commit=file.commit,
                size=file.nbytes,
                modified=None if file.commit else file.mtime_ns,
                header=file.header_sha256,
                stamp=None if file.commit else file.stamp,
            )
            for source in self.sources
            for file in source.identity.files
        )

    def to_json(self) -> bytes:
        """Return the plan as JSON; `from_json` returns an equal plan.

        Opened sources are not JSON: a plan that decodes is passed on by pickle.
        """
        if self.decoders:
            raise ValueError("a plan of sources that are decoded while they are read is no JSON")
        return msgspec.json.encode(self)

    @staticmethod
    def from_json(encoded: bytes) -> "MergePlan":
        """Return the plan that `to_json` encoded."""
        return msgspec.json.decode(encoded, type=MergePlan)
