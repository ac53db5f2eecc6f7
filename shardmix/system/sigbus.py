"""Turns the failure of a mapped page, which would kill the process, into a mark.

A load from a mapped file has no error code. If the page is gone (the file was cut short) or cannot
be read (the disk fails, the network is away), the kernel sends SIGBUS, and the process dies. While
a mapping is guarded, a handler takes the signal. It marks the mapping as failed and maps pages of
zeros over the rest of it, so that the repeated load succeeds. The user of the bytes then checks the
mark and discards the result.

No check beforehand could do the same: between any check and the load a file can shrink. Only the
fault itself comes without a window, and waiting for it costs nothing while all goes well.

The handler is Python, called by ctypes on the thread that faulted. It is sound for these reasons:

- Only a load faults, so only a load was interrupted: a loop of a compiled kernel, or a copy. No
  allocator was, and no other code that cannot be entered twice.
- ctypes takes the interpreter's lock if the thread does not have it. A kernel runs without it, and
  holds nothing that the lock's owner could be waiting for. A copy of `bytes` has the lock; then the
  interpreter is entered as from any C function.
- The handler takes no lock of its own. It reads one immutable tuple, replaced as a whole, and makes
  one system call. Two threads on one page may both do it, with the same result.
- It runs on the thread's own stack: a signal stack is far too small for Python.
- Other faults go to the former handler, or end the process, as they always did. The former
  disposition comes back with the end of the last guarded mapping.
- A forked process has mappings, handler and marks of its own; exec leaves no handlers.

Knows only addresses.
"""

import ctypes
import errno
import mmap
import platform
import signal
import sys
import threading
from dataclasses import dataclass

# Linux, <asm-generic/mman-common.h> and <signal.h>; the same for both machines.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_SA_SIGINFO = 4
_MACHINES = ("x86_64", "aarch64")


@dataclass(slots=True, eq=False)
class GuardedRange:
    """The addresses of a mapped file, and whether a load from them failed."""

    start: int
    """Address of its first byte."""
    stop: int
    """Address behind its last page."""
    failed: bool = False
    """True if a page could not be loaded: bytes read until now may be zeros the file never had."""


class _SigInfo(ctypes.Structure):
    """siginfo_t, with the fields that faults set."""

    _fields_ = (
        ("number", ctypes.c_int),
        ("error", ctypes.c_int),
        ("code", ctypes.c_int),
        ("address", ctypes.c_size_t),
    )


class _Action(ctypes.Structure):
    """The C library's struct sigaction (glibc and musl)."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


# With an errno of its own, so that the interrupted code finds its errno unchanged.
_HANDLER = ctypes.CFUNCTYPE(
    None, ctypes.c_int, ctypes.POINTER(_SigInfo), ctypes.c_void_p, use_errno=True
)


class _SigbusHandler:
    """The handler of SIGBUS, and the one it replaced."""

    def __init__(self) -> None:
        if sys.platform != "linux" or platform.machine() not in _MACHINES or sys.maxsize < 1 << 32:
            raise OSError(errno.ENOTSUP, "a page that fails to load would kill the process here")
        libc = ctypes.PyDLL(None)  # keeps the interpreter's lock: these calls are short
        self._sigaction, self._mmap = libc.sigaction, libc.mmap
        self._raise = getattr(libc, "raise")
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [
            *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
            *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
        ]
        self._callback = _HANDLER(self._answer)
        address = ctypes.cast(self._callback, ctypes.c_void_p).value
        self._own = _Action(handler=address, flags=_SA_SIGINFO)
        self._former = _Action()

    def install(self) -> None:
        self._sigaction(signal.SIGBUS, ctypes.byref(self._own), ctypes.byref(self._former))

    def uninstall(self) -> None:
        current = _Action()
        self._sigaction(signal.SIGBUS, None, ctypes.byref(current))
        if current.handler == self._own.handler:  # otherwise another handler came on top, and stays
            self._hand_back()

    def _hand_back(self) -> None:
        self._sigaction(signal.SIGBUS, ctypes.byref(self._former), None)

    def _answer(self, number: int, info: "ctypes._Pointer[_SigInfo]", _context: int | None) -> None:
        try:
            was_sent = info.contents.code <= 0  # by a process: then there is no address
            address = 0 if was_sent else info.contents.address
            for guarded in _guarded:
                if guarded.start <= address < guarded.stop and self._cover(guarded, address):
                    return
            self._hand_back()  # returning repeats the load, and the former handler gets the fault
            if was_sent:
                self._raise(number)
        except Exception:  # whatever it is, to fault here for ever would be worse
            self._hand_back()

    def _cover(self, guarded: GuardedRange, address: int) -> bool:
        """Mark a range as failed and map zeros from the page of an address to its end."""
        guarded.failed = True  # first: no zero is ever read without the mark
        page = address - address % mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        mapped = self._mmap(page, guarded.stop - page, protection, flags, -1, 0)
        return bool(mapped == page)


# A signal's disposition belongs to the process, and so does this state.
_lock = threading.Lock()
_guarded: tuple[GuardedRange, ...] = ()
_handler: _SigbusHandler | None = None  # never dropped: a signal may be on its way to it


def guard(mapping: mmap.mmap) -> GuardedRange:
    """Make failures to load a mapping's pages set the returned mark, until `unguard`.

    Raises OSError if they cannot be caught: on systems other than Linux on x86_64 and aarch64.
    """
    global _guarded, _handler
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    num_pages = -(-len(mapping) // mmap.PAGESIZE)
    guarded = GuardedRange(start, start + num_pages * mmap.PAGESIZE)
    with _lock:
        _handler = _handler or _SigbusHandler()
        if not _guarded:
            _handler.install()
        _guarded = (*_guarded, guarded)
    return guarded


def unguard(guarded: GuardedRange) -> None:
    """Stop guarding a mapping; call this before it is unmapped."""
    global _guarded
    with _lock:
        # These addresses may soon belong to another mapping.
        _guarded = tuple(other for other in _guarded if other is not guarded)
        if not _guarded and _handler is not None:
            _handler.uninstall()
