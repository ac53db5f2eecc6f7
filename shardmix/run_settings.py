"""How a merge is run: device, backend, budgets."""

from dataclasses import dataclass

TORCH = "torch"
"""Backend: every dtype, on the CPU and on GPUs."""
LLVM = "llvm"
"""Backend: compiled kernels on the CPU, without torch in the process."""
LLVM_DTYPES = frozenset({"BF16", "F16", "F32"})
"""What those kernels read and write."""

WARN = "warn"
"""On NaN and Inf in the output: count them, and tell of them."""
ERROR = "error"
"""On NaN and Inf in the output: stop at the first."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a merge is run. Nothing here changes a byte of the output."""

    device: str = "cpu"
    """cpu, cuda (all GPUs), cuda:N, or auto until the planner knows how much there is to sum."""
    is_device_open: bool = False
    """A GPU is there but nobody asked for it: the merge begins by trying if the CPU is faster."""
    io: str = "auto"
    """How sources are read: mmap, pread, or auto until the planner has decided."""
    backend: str = "auto"
    """What does the sums: TORCH, LLVM, or auto until the planner has seen the dtypes."""
    workers: int | None = None
    """Threads; None: as many as speed needs."""
    max_memory_nbytes: int | None = None
    """Bound on the process's peak resident memory."""
    max_vram_nbytes: int | None = None
    """Bound on the memory of each GPU."""
    overwrite: bool = False
    """Replace an existing output."""
    fsync: bool = True
    """Force files to disk before the output appears."""
    share: bool = False
    """The output can be read by whom the umask lets in, though a source is private."""
    restart: bool = False
    """Throw away what an earlier run has left, rather than go on from it."""
    on_nonfinite: str = WARN
    """WARN or ERROR: what to do about NaN and Inf in the output."""
    profile: str | None = None
    """Absolute path of the file that memory and speed are written to; None: they are not."""

    @property
    def on_cuda(self) -> bool:
        """Whether the arithmetic runs on a GPU, or is assumed to."""
        return self.device.startswith("cuda")
