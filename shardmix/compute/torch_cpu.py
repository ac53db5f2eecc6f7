"""The torch backend: every method and float dtype, on the CPU, one GPU or several."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from shardmix.anomalies import NonfiniteCounts
from shardmix.compute.nonfinite import count_nonfinite
from shardmix.compute.staged_chunk import StagedChunk
from shardmix.compute.torch_cuda import CudaMethod, CudaSum, cuda_methods, cuda_sums
from shardmix.compute.torch_ops import (
    TORCH_DTYPES,
    ChunkSum,
    PieceOps,
    accumulate,
    canonicalise_nans,
    factors_in,
    is_finite,
    round_into,
    sum_dtype,
)
from shardmix.dtypes import WIDEST_NBYTES, element_nbytes
from shardmix.errors import DeviceError, one_line
from shardmix.methods.registry import merge_method
from shardmix.plan.chunk_size import VECTOR
from shardmix.plan.memory_budget import BUFFERS_PER_WORKER
from shardmix.plan.merge_plan import Segment
from shardmix.system.buffers import PAGE_NBYTES, buffer_of_pages, offset_in_page


class TorchBackend:
    """Makes workers' objects for cpu, cuda (all GPUs) or cuda:N."""

    def __init__(
        self, device: str, segments: Iterable[Segment] = (), *, num_visible: int | None = None
    ) -> None:
        """Prepare for these segments, with `num_visible` GPUs (None: as many as torch finds)."""
        self._device = device
        self._kinds = {
            (segment.method, len(segment.factors), segment.dtypes, segment.out_dtype): segment
            for segment in segments
        }
        # A sum adds up sources as they come, so its factors must be known by then.
        self._is_weighted_sum = all(
            merge_method(segment.method).is_weighted_sum and segment.factors
            for segment in self._kinds.values()
        )
        self._most_sources = max(map(len, (s.sources for s in self._kinds.values())), default=0)
        if num_visible is None:
            num_visible = 0 if device == "cpu" else torch.cuda.device_count()
        self._num_visible = num_visible
        self._turns = itertools.count()

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The GPUs in use; none on the CPU."""
        if self._device == "cpu":
            return ()
        index = torch.device(self._device).index
        indices = range(self._num_visible) if index is None else [index]
        return tuple(torch.device("cuda", number) for number in indices)

    def next_device(self) -> torch.device:
        """Return the GPU for the next worker, in turn."""
        # A worker stays with its file, so GPUs share the files; `next` is one step for all
        # threads.
        return self.devices[next(self._turns) % len(self.devices)]

    def make_combiners(
        self, *, chunk_nbytes: int
    ) -> "tuple[CpuSum | CpuMethod | CudaSum | CudaMethod, ...]":
        """Return one worker's objects, with all their buffers: on a GPU, two."""
        # Workers are the parallelism; torch's own threads would only get in their way.
        torch.set_num_threads(1)
        if self._device == "cpu":
            if self._is_weighted_sum:
                return (CpuSum(chunk_nbytes=chunk_nbytes),)
            return (CpuMethod(chunk_nbytes=chunk_nbytes, most_sources=self._most_sources),)
        device = self.next_device()
        torch.cuda.set_device(device)  # for this thread, also for pinned memory
        return self._on_gpu(device, chunk_nbytes=chunk_nbytes)

    def _on_gpu(
        self, device: torch.device, *, chunk_nbytes: int
    ) -> "tuple[CudaSum | CudaMethod, ...]":
        if self._is_weighted_sum:
            return cuda_sums(device, chunk_nbytes=chunk_nbytes)
        return cuda_methods(device, chunk_nbytes=chunk_nbytes)

    def finding(self) -> str | None:
        """Return why the device cannot be used here, or None if it can."""
        if self._device == "cpu":
            return None
        if not torch.cuda.is_available() or not self.devices:
            return f"device {self._device}: torch {torch.__version__} finds no usable CUDA device"
        if self.devices[-1].index >= self._num_visible:
            return f"device {self._device}: there are only {self._num_visible} CUDA devices"
        try:
            # Make contexts and load kernels now, so that their share of the host's memory is
            # measured.
            torch.cuda.init()  # type: ignore[no-untyped-call]
            for device in self.devices:
                with torch.cuda.device(device):
                    self._use_once(device)
            _give_back_caches()
        # torch's, for whatever reason: no memory left, used by others, ...
        except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
            return f"device {self._device} cannot be used ({one_line(error)})"
        return None

    def _use_once(self, device: torch.device) -> None:
        chunk_nbytes = VECTOR * WIDEST_NBYTES * max(1, self._most_sources)
        combiner, *_ = self._on_gpu(device, chunk_nbytes=chunk_nbytes)
        for segment in self._kinds.values():
            combiner.begin(segment.with_placeholders(), 0, VECTOR)
            for source in range(len(segment.dtypes)):
                staging = combiner.staging(source)
                staging[:] = bytes(len(staging))
                combiner.add(source, staging)
            combiner.finish()
            combiner.wait()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run a merge, and restore torch's settings and caches afterwards.

        Raises `DeviceError` instead of torch's error if a GPU fails.
        """
        num_threads = torch.get_num_threads()
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
        try:
            yield
        except RuntimeError as error:
            if "CUDA" not in str(error):
                raise
            raise DeviceError(
                f"device {self._device} failed ({one_line(error)})",
                remedy="if it has too little memory left, lower --max-vram, or merge with "
                "--device cpu",
            ) from error
        finally:
            torch.set_num_threads(num_threads)
            if self.devices:
                with suppress(RuntimeError):  # a failed GPU raises again
                    _give_back_caches()

    def peak_vram_nbytes(self) -> int:
        """Return the most memory that torch has reserved on a GPU; 0 on the CPU."""
        peaks = (int(torch.cuda.max_memory_reserved(device)) for device in self.devices)
        return max(peaks, default=0)


def _give_back_caches() -> None:
    """Give back torch's caches of GPU memory, and of pinned host memory.

    Otherwise they would count against the next merge's budget.
    """
    torch.cuda.empty_cache()
    # Public since torch 2.12; from 2.5 on there is the private one.
    public = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
    give_back = public or getattr(torch._C, "_host_emptyCache", None)
    if give_back is not None:
        give_back()


class CpuSum(ChunkSum):
    """The weighted sum on the CPU."""

    def __init__(self, *, chunk_nbytes: int) -> None:
        nbytes = max(chunk_nbytes, WIDEST_NBYTES)
        self._wide, self._sum = (
            torch.empty(nbytes, dtype=torch.uint8, device="cpu") for _ in range(2)
        )
        self._staging, self._out_pages = (buffer_of_pages(nbytes + PAGE_NBYTES) for _ in range(2))

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part of the chunk into."""
        width = element_nbytes(self._segment.dtypes[source])
        begin = offset_in_page(self._segment.sources[source].offset + self._start * width)
        return self._staging[begin : begin + self._num_elements * width]

    def add(self, source: int, raw: memoryview) -> None:
        """Add a source's bytes, in source order; `raw` may be reused afterwards."""
        values = torch.frombuffer(raw, dtype=TORCH_DTYPES[self._segment.dtypes[source]])
        accumulate(
            self._accumulator,
            self._values,
            values,
            self._segment.factors[source],
            first=source == 0,
        )

    def finish(self) -> memoryview:
        """Return the chunk's output bytes, valid until the next `begin`."""
        width = element_nbytes(self._segment.out_dtype)
        begin = offset_in_page(self._segment.out_offset + self._start * width)
        self._finished = self._out_pages[begin : begin + self._num_elements * width]
        out = torch.frombuffer(self._finished, dtype=TORCH_DTYPES[self._segment.out_dtype])
        round_into(out, self._accumulator, self._values)
        self.is_finite = is_finite(out)
        if not self.is_finite:
            canonicalise_nans(out)
        return self._finished

    def wait(self) -> None:
        """Return at once: `finish` leaves nothing pending."""


class CpuMethod:
    """Any method on the CPU: its sources' bytes wait until the last one is there."""

    disagreeing: frozenset[int] = frozenset()
    is_finite = True

    def __init__(self, *, chunk_nbytes: int, most_sources: int) -> None:
        # The scratch is one of a worker's buffers.
        self._staged = StagedChunk(
            chunk_nbytes=chunk_nbytes, num_buffers=BUFFERS_PER_WORKER - 1, most_sources=most_sources
        )
        self._scratch = torch.empty(
            max(chunk_nbytes, WIDEST_NBYTES), dtype=torch.uint8, device="cpu"
        )

    def begin(self, segment: Segment, start: int, num_elements: int) -> None:
        """Start a chunk of a segment."""
        dtype = sum_dtype(segment)
        if not self._staged.is_divided(segment, start, num_elements):
            widths = map(element_nbytes, (*segment.dtypes, segment.out_dtype))
            self._staged.divide(segment, start, num_elements, (*widths, dtype.itemsize))
            self._factors = factors_in(dtype, segment.factors)
            self._ops = PieceOps(self._scratch, segment)
            self._dtypes = [TORCH_DTYPES[source.dtype] for source in segment.sources]
            self._values = [torch.empty(0)] * len(segment.sources)
            self._segment, self._dtype = segment, dtype

    def read(self, descriptors: Sequence[int]) -> None:
        """Do nothing: others read."""

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part of the chunk into."""
        return self._staged.sources[source]

    def add(self, source: int, raw: memoryview) -> None:
        """Add a source's bytes; they must stay unchanged until `finish`."""
        self._values[source] = torch.frombuffer(raw, dtype=self._dtypes[source])

    def finish(self) -> memoryview:
        """Return the chunk's output bytes, valid until the next `begin`."""
        out = torch.frombuffer(self._staged.out, dtype=TORCH_DTYPES[self._segment.out_dtype])
        self._ops.combine(self._values, self._factors, out)
        self.is_finite = is_finite(out)
        if not self.is_finite:
            # Also unrounded, and now, while the sources are there: to see the effect of
            # rounding.
            unrounded = torch.frombuffer(self._staged.unrounded, dtype=self._dtype)
            self._ops.combine(self._values, self._factors, unrounded)
            canonicalise_nans(out)
        self._values = [torch.empty(0)] * len(self._values)  # mapped ones may be unmapped now
        return self._staged.out

    def wait(self) -> None:
        """Return at once: `finish` leaves nothing pending."""

    def count_nonfinite(self, start: int, stop: int) -> NonfiniteCounts:
        """Count in a range of elements of the last finished chunk."""
        unrounded = torch.frombuffer(self._staged.unrounded, dtype=self._dtype).numpy()
        out_dtype = self._segment.out_dtype
        return count_nonfinite(self._staged.out, out_dtype, unrounded.__getitem__, start, stop)
