"""Runs a combiner on whole tensors, without files or engine."""

import dataclasses

import pytest
import torch

from shardmix.compute.torch_cpu import TorchBackend
from shardmix.compute.torch_cuda import cuda_methods, cuda_sums
from shardmix.dtypes import BY_NAME, DTYPES, FLOAT_DTYPES, LLVM_DTYPES
from shardmix.methods.registry import merge_method
from shardmix.plan.chunk_size import chunk_num_elements
from shardmix.plan.merge_plan import Segment, SegmentSource
from tests.support.simulated_cuda import SimulatedCuda

NAMES = {getattr(torch, BY_NAME[name].torch_name): name for name in DTYPES if name in FLOAT_DTYPES}
FLOATS = list(NAMES)
COMPILED = [dtype for dtype, name in NAMES.items() if name in LLVM_DTYPES]


def segment_of(dtypes, out_dtype, weights, num_elements, method="linear"):
    return Segment(
        name="t",
        num_tensors=1,
        num_elements=num_elements,
        method=method,
        parameters=0,
        out_dtype=out_dtype,
        out_offset=0,
        sources=tuple(SegmentSource(source, dtype, 0, 0) for source, dtype in enumerate(dtypes)),
        factors=tuple(weights),
    )


def at_offsets(segment, offsets, *, out_offset):
    """Return a segment whose sources lie elsewhere in their files."""
    sources = [
        source._replace(offset=offset)
        for source, offset in zip(segment.sources, offsets, strict=True)
    ]
    return dataclasses.replace(segment, sources=tuple(sources), out_offset=out_offset)


def raw_bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def backend_of(name, segment):
    if name == "llvm":
        pytest.importorskip("llvmlite", reason="needs llvmlite")
        from shardmix.compute.llvm_cpu import LlvmBackend

        return LlvmBackend([segment])
    return TorchBackend(name, [segment])


def combined_chunks(
    sources, factors, out_dtype, *, method="linear", chunk_nbytes=1 << 16, backend="cpu"
):
    """Reduce whole tensors chunk by chunk, as the engine does; yield each chunk's first element,
    its combiner and its bytes, before the next one takes their place.

    `backend` is llvm, torch's name of a device, or a `SimulatedCuda`.
    """
    dtypes = [NAMES[s.dtype] for s in sources]
    segment = segment_of(dtypes, NAMES[out_dtype], factors, sources[0].numel(), method)
    if isinstance(backend, SimulatedCuda):
        make = cuda_sums if merge_method(method).is_weighted_sum else cuda_methods
        combiners = make(torch.device("cpu"), chunk_nbytes=chunk_nbytes, cuda=backend)
    else:
        combiners = backend_of(backend, segment).make_combiners(chunk_nbytes=chunk_nbytes)
    combiner, *_ = combiners
    step = chunk_num_elements(segment, chunk_nbytes=chunk_nbytes)
    for start in range(0, segment.num_elements, step):
        num_elements = min(step, segment.num_elements - start)
        combiner.begin(segment, start, num_elements)
        for source, tensor in enumerate(sources):
            staging = combiner.staging(source)
            staging[:] = raw_bytes(tensor.view(-1)[start : start + num_elements])
            combiner.add(source, staging)
        data = combiner.finish()
        combiner.wait()
        yield start, combiner, data


def reduce(sources, factors, out_dtype, **options):
    """Reduce whole tensors and return the result."""
    out = bytearray()
    for _start, _combiner, chunk in combined_chunks(sources, factors, out_dtype, **options):
        out += chunk
    return torch.frombuffer(out, dtype=out_dtype).view(sources[0].shape)
