"""The torch backend: weighted sums of every float dtype, on the CPU, one GPU or several."""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import torch

from shardmix.compute.chunk_size import VECTOR
from shardmix.compute.torch_cuda import CudaSum, cuda_sums
from shardmix.compute.torch_ops import (
    TORCH_DTYPES,
    WIDEST_NBYTES,
    ChunkSum,
    accumulate,
    are_finite,
    canonicalise_nans,
    round_into,
)
from shardmix.dtypes import element_nbytes
from shardmix.errors import DeviceError, one_line
from shardmix.plan.merge_plan import Segment
from shardmix.system.buffers import PAGE_NBYTES, buffer_of_pages, offset_in_page


class TorchBackend:
    """Makes reducers for cpu, cuda (all GPUs there are) or cuda:N."""

    def __init__(
        self, device: str, segments: Iterable[Segment] = (), *, num_visible: int | None = None
    ) -> None:
        """`segments` are to be summed; `num_visible` GPUs, or None: as many as torch finds."""
        self._device = device
        self._kinds = (
            {}
            if device == "cpu"
            else {(segment.dtypes, segment.out_dtype): segment for segment in segments}
        )
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
        """Return the GPU for the next worker: they are dealt out in turn."""
        # A worker stays with its file, so GPUs share the files; `next` is one step for all threads.
        return self.devices[next(self._turns) % len(self.devices)]

    def make_reducers(self, *, chunk_nbytes: int) -> "tuple[CpuSum | CudaSum, ...]":
        """Return one worker's reducers, with all their buffers: on a GPU, two."""
        # Workers are the parallelism; torch's own threads would only get in their way.
        torch.set_num_threads(1)
        if self._device == "cpu":
            return (CpuSum(chunk_nbytes=chunk_nbytes),)
        device = self.next_device()
        torch.cuda.set_device(device)  # of this thread, also for pinned memory
        return cuda_sums(device, chunk_nbytes=chunk_nbytes)

    def finding(self) -> str | None:
        """Say why the device cannot be used here, or None if it can."""
        if self._device == "cpu":
            return None
        if not torch.cuda.is_available() or not self.devices:
            return f"device {self._device}: torch {torch.__version__} finds no usable CUDA device"
        if self.devices[-1].index >= self._num_visible:
            return f"device {self._device}: there are only {self._num_visible} CUDA devices"
        try:
            # Make contexts and load kernels now, so that what they take of the host's memory is
            # measured.
            torch.cuda.init()  # type: ignore[no-untyped-call]
            for device in self.devices:
                with torch.cuda.device(device):
                    self._use_once(device)
            _give_back_caches()
        # torch's, whatever is wrong: no memory left, in other hands, ...
        except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
            return f"device {self._device} cannot be used ({one_line(error)})"
        return None

    def _use_once(self, device: torch.device) -> None:
        reducer, *_ = cuda_sums(device, chunk_nbytes=VECTOR * WIDEST_NBYTES)
        for segment in self._kinds.values():
            reducer.begin(segment, 0, VECTOR)
            for source in range(len(segment.dtypes)):
                staging = reducer.staging(source)
                staging[:] = bytes(len(staging))
                reducer.add(source, staging)
            reducer.finish()
            reducer.wait()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Leave torch's settings and caches as they were once the merge has ended.

        Raises `DeviceError` in the place of what torch raises where a GPU fails.
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
                f"device {self._device} failed ({one_line(error)}); if it has too little memory "
                "left, lower --max-vram; or merge with --device cpu"
            ) from error
        finally:
            torch.set_num_threads(num_threads)
            if self.devices:
                with suppress(RuntimeError):  # of a GPU that has failed, as it says again
                    _give_back_caches()

    def peak_vram_nbytes(self) -> int:
        """Return what torch has reserved of a GPU's memory at most; 0 on the CPU."""
        peaks = (int(torch.cuda.max_memory_reserved(device)) for device in self.devices)
        return max(peaks, default=0)


def _give_back_caches() -> None:
    """Give back what torch keeps for later, of GPUs' memory and of the host's that is pinned.

    Else it would count against the next merge's budget.
    """
    torch.cuda.empty_cache()
    # Public since torch 2.12; from 2.5 on there is the second.
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
        begin = offset_in_page(self._segment.offsets[source] + self._start * width)
        return self._staging[begin : begin + self._num_elements * width]

    def add(self, source: int, raw: memoryview) -> None:
        """Take in a source's bytes, in source order; `raw` may be reused afterwards."""
        values = torch.frombuffer(raw, dtype=TORCH_DTYPES[self._segment.dtypes[source]])
        accumulate(
            self._accumulator,
            self._values,
            values,
            self._segment.weights[source],
            first=source == 0,
        )

    def finish(self) -> memoryview:
        """Return the chunk's output bytes, valid until the next `begin`."""
        width = element_nbytes(self._segment.out_dtype)
        begin = offset_in_page(self._segment.out_offset + self._start * width)
        self._finished = self._out_pages[begin : begin + self._num_elements * width]
        out = torch.frombuffer(self._finished, dtype=TORCH_DTYPES[self._segment.out_dtype])
        round_into(out, self._accumulator, self._values)
        # A sum is not finite if any value isn't: one cheap pass finds the rare case. It may have
        # overflowed by itself; the extremes can't, but take twice as long.
        self.is_finite = math.isfinite(out.sum().item()) or are_finite(torch.aminmax(out))
        if not self.is_finite:
            canonicalise_nans(out)
        return self._finished

    def wait(self) -> None:
        """Return at once: `finish` has done it all."""
