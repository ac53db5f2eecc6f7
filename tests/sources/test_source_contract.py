"""What every source promises. A new kind of source is one line in FACTORIES."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from shardmix.dtypes import element_nbytes
from shardmix.errors import SourceChangedError
from shardmix.sources.resolve import open_source
from tests.support.adapters import random_adapter, save_adapter
from tests.support.dcp_checkpoints import cut_along, save_dcp
from tests.support.mapped_source import MARK as MAPPED_MARK
from tests.support.mapped_source import add_mapping
from tests.support.models import random_model, random_tensor, save_model
from tests.support.negated_source import MARK, add_kind
from tests.support.quantised_models import FORMS, FP8, mxfp4_experts
from tests.support.vocabularies import model_of, numbered


def single_file(folder):
    return save_model(folder / "m", random_model(1)) / "model.safetensors"


def sharded(folder):
    tensors = random_model(2, torch.bfloat16)
    names = sorted(tensors)
    return save_model(folder / "m", tensors, shards=[names[::2], names[1::2]])


def links(folder):
    """A folder as the Hub's cache has them: its files are links to blobs."""
    cache = folder / "models--org--name"
    snapshot = cache / "snapshots" / ("a" * 40)
    save_model(snapshot, random_model(3))
    (cache / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    return snapshot


def modules(folder):
    """A sentence-transformers model whose Dense module has weights of its own."""
    save_model(folder / "m", random_model(4))
    save_model(folder / "m" / "2_Dense", {"linear.weight": random_tensor((4, 4), seed=5)})
    (folder / "m" / "modules.json").write_text(
        '[{"idx": 0, "name": "0", "path": "",'
        ' "type": "sentence_transformers.models.Transformer"},'
        ' {"idx": 1, "name": "1", "path": "2_Dense",'
        ' "type": "sentence_transformers.models.Dense"}]'
    )
    return folder / "m"


def negated(folder):
    """A model of which some tensors are decoded and others are not."""
    tensors = {f"w{n}": random_tensor((7, 5 + n), seed=n).bfloat16() for n in range(3)}
    tensors |= {"empty": torch.empty((0, 4), dtype=torch.bfloat16), "norm": torch.ones(5)}
    path = save_model(folder / "m", tensors)
    (path / MARK).touch()
    return path


def adapted(folder):
    """A model with adapters that change, replace and scale some of its tensors."""
    tensors = {
        "a.weight": random_tensor((7, 5), seed=1).bfloat16(),
        "a.bias": random_tensor((7,), seed=2),
        "b.weight": random_tensor((300, 9), seed=3).half(),
        "norm": torch.ones(5),
    }
    base = save_model(folder / "m", tensors)
    save_adapter(folder / "one", random_adapter(tensors, ["a", "b"], rank=2, seed=4), r=2)
    scaled = random_adapter(tensors, ["b"], rank=3, seed=5)
    scaled["base_model.model.b.lora_magnitude_vector"] = torch.rand(300)
    scaled["base_model.model.a.bias"] = torch.rand(7)
    save_adapter(folder / "two", scaled, r=3, use_dora=True)
    return f"{base}+{folder / 'one'}+{folder / 'two'}"


def torch_files(folder):
    """A model as torch.save writes it, with transposed matrices."""
    tensors = {name: x.t() if x.ndim == 2 else x for name, x in random_model(6).items()}
    (folder / "m").mkdir()
    torch.save(tensors, folder / "m" / "pytorch_model.bin")
    return folder / "m"


def distributed(folder):
    """A checkpoint of several ranks, of which some tensors are in one chunk."""
    tensors = random_model(7) | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}
    return save_dcp(folder / "m", tensors, cut=cut_along(1, 3))


def quantised(folder):
    """A model in FP8 by blocks and with experts in MXFP4, beside a norm."""
    g = torch.Generator().manual_seed(6)
    stored, _ = next(iter(FORMS))((131, 130), g)
    experts, _ = mxfp4_experts((2, 9, 64), g)
    tensors = {f"w.{name}": tensor for name, tensor in stored.items()}
    tensors |= {f"e.up_{name}": tensor for name, tensor in experts.items()}
    config = {"model_type": "test", "quantization_config": FP8}
    return save_model(folder / "m", {**tensors, "norm": torch.ones(5)}, config=config)


def mapped(folder):
    """A model with rows of its own, of another model, and computed ones."""
    model_of(folder / "other", numbered(list("abcdefgh")), seed=7, dtype=torch.float32)
    model_of(folder / "m", numbered(list("abcdefghij")), seed=8)
    (folder / "m" / MAPPED_MARK).touch()
    return folder / "m"


FACTORIES = (
    *(single_file, sharded, links, modules, torch_files, distributed),
    *(quantised, negated, adapted, mapped),
)


@pytest.fixture(params=FACTORIES, ids=lambda factory: factory.__name__)
def path(request, tmp_path, monkeypatch):
    add_kind(monkeypatch)
    add_mapping(monkeypatch)
    return request.param(tmp_path)


def read(part, row, start=0, num_elements=None):
    """Return elements of a tensor as bytes."""
    info = part.tensors[row]
    count = info.num_elements - start if num_elements is None else num_elements
    buffer = bytearray(count * element_nbytes(info.dtype))
    reader = part.open_reader()
    reader.prefetch(row, start, count)
    reader.read(row, start, memoryview(buffer))
    reader.close()
    return bytes(buffer)


def rows(source):
    return [(part, row) for part in source.parts for row in range(len(part.tensors))]


def change(source):
    """Write to the last file."""
    with Path(source.parts[-1].identity.files[-1].path).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    status = Path(file.name).stat()
    os.utime(file.name, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


def test_identity_stands_for_the_bytes(path):
    """It is the same each time the source is opened, and another once bytes change."""
    first, again = open_source(str(path)), open_source(str(path))
    identities = [part.identity for part in first.parts]
    assert [part.identity for part in again.parts] == identities
    change(first)
    assert [part.identity for part in open_source(str(path)).parts] != identities


def test_an_extent_holds_what_is_read(path):
    source = open_source(str(path))
    extents = [part.extent(row) for part, row in rows(source)]
    assert any(extents)
    for (part, row), extent in zip(rows(source), extents, strict=True):
        content = read(part, row)
        assert len(content) == part.tensors[row].nbytes
        if extent is None:
            assert part.tensors.is_decoded(row)
            continue
        assert part.tensors[row].start == extent.offset
        stored = Path(extent.file.path).read_bytes()
        assert stored[extent.offset : extent.offset + extent.nbytes] == content


def test_decoded_tensors_are_one_stream(path):
    for part in open_source(str(path)).parts:
        end = 0
        for row, info in enumerate(part.tensors):
            if part.tensors.is_decoded(row):
                assert info.start == end
                end += info.nbytes


def test_any_part_of_a_tensor_is_read(path):
    for part, row in rows(open_source(str(path))):
        whole, info = read(part, row), part.tensors[row]
        width = element_nbytes(info.dtype)
        for start in {0, 1, info.num_elements // 2, info.num_elements - 1}:
            for count in {0, 1, info.num_elements - start}:
                if start >= 0 and 0 <= count <= info.num_elements - start:
                    expected = whole[start * width : (start + count) * width]
                    assert read(part, row, start, count) == expected


def test_it_is_the_same_once_pickled(path):
    source = open_source(str(path))
    again = pickle.loads(pickle.dumps(source))
    assert again.config == source.config
    for (part, row), (other, _) in zip(rows(source), rows(again), strict=True):
        assert part.identity == other.identity
        assert part.tensors[row] == other.tensors[row]
        assert part.extent(row) == other.extent(row)
        assert read(part, row) == read(other, row)


def test_a_change_is_found(path):
    source = open_source(str(path))
    source.check_unchanged()
    change(source)
    with pytest.raises(SourceChangedError, match="has changed since its header was read"):
        source.check_unchanged()


def test_a_closed_reader_holds_no_file(path):
    source = open_source(str(path))
    before = len(os.listdir("/proc/self/fd"))
    readers = [part.open_reader() for part in source.parts for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) == before
    for reader in readers:
        assert reader.overhead_nbytes == readers[0].overhead_nbytes >= 0
    for part, row in rows(source):
        read(part, row)
    for reader in readers:
        reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
