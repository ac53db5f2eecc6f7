"""The merge plan: a value that says everything a merge will do, decided before a weight is read.

Plain frozen data that prints, hashes and goes through JSON unchanged. The planner makes it, the
engine carries it out, and neither has to ask the other anything.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import msgspec

from shardmix.conventions.file_kinds import LeftOut
from shardmix.conventions.module_tree import inner_path
from shardmix.formats.safetensors_layout import HEADER_LENGTH_NBYTES
from shardmix.methods.base import Params
from shardmix.options import RunSettings
from shardmix.plan.memory_budget import Gathering, MemoryPlan
from shardmix.sources.base import Source
from shardmix.sources.identity import FileStamp, SourceFile, SourceIdentity
from shardmix.system.page_cache import CacheUse

_PIECE_NBYTES = 1 << 20
# A tensor's entry as `safetensors_layout.encode_header` writes it. No name can look like one, since
# in a name a quotation mark has a backslash before it.
_ENTRY = re.compile(r'"dtype":"(\w+)","shape":\[[\d,]*\],"data_offsets":\[(\d+),(\d+)\]')


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """A model that is merged, and what is read of it."""

    text: str
    """As the user named it."""
    name: str
    """What the model card calls it: Hub id with revision, or a name without a path."""
    path: str
    """Absolute path of its folder, or of the file that the user named."""
    identity: SourceIdentity
    """What its bytes are known by: the weight files that will be read, and their commit."""
    weight: float | None
    """Its weight, in double precision; None if it has none, or not the same in all tensors."""
    reader_nbytes: int = 0
    """What its readers take for each worker, besides the buffers of a chunk."""
    decoders: tuple[Source, ...] = field(default=(), repr=False, compare=False)
    """Its parts that have tensors which are decoded while they are read; opened."""

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if the model is not what it was when it was opened."""
        self.identity.check_unchanged()
        for decoder in self.decoders:
            decoder.check_unchanged()


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What a source's file is known by: as long as it is the same, so is the file."""

    model: str
    """Whose it is, by public name."""
    file: str
    """Absolute path, or that within the model of a file from the Hub."""
    commit: str | None
    """The commit on the Hub."""
    size: int
    """In bytes."""
    modified: int | None
    """In nanoseconds since 1970; None from the Hub."""
    header: str
    """SHA-256 (hex) of its header."""
    stamp: FileStamp | None
    """What its file system tells besides; None from the Hub."""


class SegmentSource(NamedTuple):
    """Where a segment's elements lie in one source. A tuple, since plans hold very many."""

    source: int
    """Whose they are: an index into `MergePlan.sources`."""
    dtype: str
    """Safetensors dtype there."""
    file: int
    """Index into `MergePlan.files`, and beyond these into `MergePlan.decoders`."""
    offset: int
    """First byte in that file, or in that decoder's stream."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of elements that lies in one piece in the output and in every source.

    One tensor, or several neighbours where they are neighbours everywhere and have the same
    parameters. Any part of it (a chunk) is one byte range per source, so a segment of any length
    streams in any memory.
    """

    name: str
    """Its first tensor, for messages."""
    num_tensors: int
    """How many tensors it spans."""
    num_elements: int
    """Its length."""
    method: str
    """Name of the method that merges it; `keep_first.NAME` for integers."""
    parameters: int
    """Index into `MergePlan.parameters`."""
    out_dtype: str
    """Safetensors dtype of the output."""
    out_offset: int
    """First byte in the output shard's file."""
    sources: tuple[SegmentSource, ...]
    """The sources that count, the base model first if there is one."""
    factors: tuple[float, ...]
    """The numbers that the method combines them with, in double precision; empty if they follow
    from statistics of the whole tensor, which nobody knows yet."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The safetensors dtype in each source."""
        return tuple(source.dtype for source in self.sources)

    @property
    def files(self) -> tuple[int, ...]:
        """For each source, an index into `MergePlan.files`, and beyond these into its decoders."""
        return tuple(source.file for source in self.sources)


@dataclass(frozen=True, slots=True)
class OutputShard:
    """A file that will be written."""

    filename: str
    """Its path in the output folder, with `/`; tensors of modules are in the module's folder."""
    header: str
    """The file's first bytes but for the length prefix: JSON, padded."""
    file_nbytes: int
    """Size of the whole file."""
    read_nbytes: int
    """Bytes of all sources that go into it."""
    tensor_names: tuple[str, ...]
    """Its tensors, in data order."""
    segments: tuple[Segment, ...]
    """Its data, in order."""

    @property
    def place(self) -> str:
        """The folder within the output that it is in; empty: the output itself."""
        return self.filename.rpartition("/")[0]

    @property
    def data_start(self) -> int:
        """Where in the file its data begins; the file's end if it has none."""
        return self.segments[0].out_offset if self.segments else self.file_nbytes

    def full_name(self, name: str) -> str:
        """Return a tensor's name as it is told: behind its module's folder, if it is in one."""
        return inner_path(self.place, name)

    def head_nbytes(self) -> int:
        """Return where in the file the header ends."""
        is_ascii = self.header.isascii()
        return HEADER_LENGTH_NBYTES + len(self.header if is_ascii else self.header.encode())

    def head(self) -> Iterator[bytes]:
        """Yield the file's first bytes, piece by piece: the header's length, then the header."""
        yield (self.head_nbytes() - HEADER_LENGTH_NBYTES).to_bytes(HEADER_LENGTH_NBYTES, "little")
        for start in range(0, len(self.header), _PIECE_NBYTES):
            yield self.header[start : start + _PIECE_NBYTES].encode()

    def head_between(self, start: int, stop: int) -> bytes:
        """Return what of the file's first bytes lies in a range of the file."""
        parts, position = [], 0
        for piece in self.head():
            if position >= stop:
                break
            parts.append(piece[max(start - position, 0) : stop - position])
            position += len(piece)
        return b"".join(parts)

    def tensors(self) -> Iterator[tuple[str, str, int]]:
        """Yield each tensor's name, safetensors dtype and last byte + 1, counted from the header's.

        One after the other, out of the header: as objects all of them take more than a plan does.
        """
        for name, entry in zip(self.tensor_names, _ENTRY.finditer(self.header), strict=True):
            yield name, entry[1], int(entry[3])


@dataclass(frozen=True, slots=True)
class OutputModules:
    """The output's sentence-transformers modules, besides the config source's files."""

    files: tuple[str, ...] = ()
    """Files of the model that gives modules that the config source lacks; in its folder."""
    main_place: str = ""
    """Where in that folder its encoder is; the output's is in the output itself."""
    pooling: str | None = None
    """How the output is to pool, if that was said: one of `sentence_modules.POOLINGS`."""
    pooling_configs: tuple[str, ...] = ()
    """Configs of modules that pool otherwise by themselves, relative to the output."""


@dataclass(frozen=True, slots=True)
class ModuleConfig:
    """Statements that the config of a module with weights must make."""

    place: str
    """The module's folder within the output."""
    dtypes: tuple[tuple[str, str], ...]
    """What it must say of dtypes, as `MergePlan.config_dtypes`."""
    untied: tuple[str, ...]
    """Parts of it that must say `tie_word_embeddings: false`."""


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything a merge will do. Sizes in bytes."""

    sources: tuple[PlannedSource, ...]
    """The models, in order."""
    parameters: tuple[Params, ...]
    """The method's parameters; segments name theirs by index."""
    dtype: str
    """What was asked for: keep, float32, float16 or bfloat16."""
    max_shard_size: int | None
    """What was asked for; None: the first model's own shards."""
    model_type: str | None
    """What was asked for; an encoder's output also loads in sentence-transformers."""
    allow_differences: tuple[str, ...]
    """Keys in which the models were allowed to differ; sorted."""
    digest_algorithm: str
    """What the output's files are hashed with: one of `digests.ALGORITHMS`."""
    record_paths: bool
    """The output's provenance tells where on this machine the sources lie."""
    output: str
    """Absolute path of the output folder."""
    config_source_name: str
    """What the model card calls the model that gives config, tokenizer and the like."""
    config_source_commit: str | None
    """The commit of that model, where it came from the Hub."""
    config_source_folder: str
    """Absolute path of the folder that gives config, tokenizer and other auxiliary files."""
    auxiliary_files: tuple[str, ...]
    """Those files, relative to that folder."""
    left_out: tuple[LeftOut, ...]
    """What else is there, and why it does not go along."""
    config_dtypes: tuple[tuple[str, str], ...]
    """What dtypes the output's config must state, if it states any: a part's keys with dots ("" for
    the whole), and a torch name."""
    untied: tuple[str, ...]
    """Parts of the output's config that must say `tie_word_embeddings: false`, since parameters
    that they tie are stored one by one: "" is its top, others are dotted keys."""
    main_place: str
    """Where in the output that config is: "", or the folder of the module that it belongs to."""
    module_configs: tuple["ModuleConfig", ...]
    """The same of further modules with weights."""
    modules_folder: str
    """Absolute path of the model that gives modules that the config source lacks, or empty."""
    modules: OutputModules
    """What is written of sentence-transformers modules besides auxiliary files."""
    shards: tuple[OutputShard, ...]
    """All weight files that will be written."""
    disk_needed_nbytes: int
    """What the output takes of the disk, all files counted in whole blocks, and the journal."""
    settings: RunSettings
    """Device, way to read, budgets."""
    gathering: Gathering | None
    """Needs of gathering statistics; None if the method needs none."""
    memory: MemoryPlan
    """Chunk size, workers and projected peak."""
    cache_use: CacheUse
    """Whose pages stay in the system's page cache."""
    warnings: tuple[str, ...]
    """What a user should know before the merge."""

    @property
    def num_models(self) -> int:
        """How many models are merged."""
        return len(self.sources)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """All weight files that will be read, model by model; segments know them by number."""
        return tuple(file for source in self.sources for file in source.identity.files)

    @property
    def decoders(self) -> tuple[Source, ...]:
        """What is decoded while it is read; by the numbers that follow those of the files."""
        return tuple(decoder for source in self.sources for decoder in source.decoders)

    @property
    def reader_nbytes(self) -> int:
        """What the sources' own readers take for each worker."""
        return sum(source.reader_nbytes for source in self.sources)

    @property
    def num_tensors(self) -> int:
        """How many tensors the output stores."""
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
        """Yield every segment, in output order."""
        return (segment for shard in self.shards for segment in shard.segments)

    def tensor_dtype(self, name: str) -> str:
        """Return the safetensors dtype that the output stores a tensor in. Slow: reads a header."""
        return next(
            dtype
            for shard in self.shards
            if name.startswith(shard.full_name(""))
            for stored, dtype, _ in shard.tensors()
            if shard.full_name(stored) == name
        )

    def with_disk_needed(self, nbytes: int) -> "MergePlan":
        """Return the same merge, now that it is known what its output takes of the disk."""
        return replace(self, disk_needed_nbytes=nbytes)

    def with_memory(self, memory: MemoryPlan) -> "MergePlan":
        """Return the same merge within other memory; its output is the same, byte for byte."""
        return replace(self, memory=memory)

    def digest(self) -> str:
        """Return a SHA-256 (hex) of all that decides the output's bytes.

        Where sources lie and the output goes, how they are read, how much memory that takes and
        what stays in the page cache are left out: from the same bytes, two plans of one digest
        write the same files.

        Goes segment by segment, since in one piece its JSON takes as much memory as the plan.
        """
        hasher = hashlib.sha256()
        for part in self._decisive_parts():
            # A line each: JSON has no line break within a value.
            hasher.update(msgspec.json.encode(part))
            hasher.update(b"\n")
        return hasher.hexdigest()

    def _decisive_parts(self) -> Iterator[object]:
        """Yield all that decides the output's bytes, in an order that is always the same."""
        places = {"output", "config_source_folder", "modules_folder"}
        irrelevant = places | {
            *(
                "gathering",
                "settings",
                "memory",
                "cache_use",
                "warnings",
                "left_out",
                "disk_needed_nbytes",
            ),
        }
        in_parts = {"sources", "shards"}
        for each in fields(self):
            if each.name not in irrelevant | in_parts:
                yield each.name, getattr(self, each.name)
        for source in self.sources:
            identity = source.identity
            yield source.name, source.weight, identity.hub_id, identity.commit, identity.decoding
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
        """Return what every weight file is known by.

        Of a file from the Hub neither place nor age matter, since its commit stands for it.
        """
        return tuple(
            FileIdentity(
                model=source.name,
                file=file.name if commit else file.path,
                commit=commit,
                size=file.nbytes,
                modified=None if commit else file.mtime_ns,
                header=file.header_sha256,
                stamp=None if commit else file.stamp,
            )
            for source in self.sources
            for commit in (source.identity.commit,)
            for file in source.identity.files
        )

    def to_json(self) -> bytes:
        """Return the plan as JSON; `from_json` gives an equal plan back.

        Opened sources are no JSON: a plan that decodes is handed on by pickle.
        """
        if self.decoders:
            raise ValueError("a plan of sources that are decoded while they are read is no JSON")
        return msgspec.json.encode(self)

    @staticmethod
    def from_json(encoded: bytes) -> "MergePlan":
        """Return the plan that `to_json` encoded."""
        return msgspec.json.decode(encoded, type=MergePlan)
