"""Turns a mapped page's failure, which would kill the process, into a mark. Knows addresses alone.

A load from a mapped file has no error code. Where the page is gone (the file was cut short) or
cannot be read (the disk fails, the network is away), the kernel sends SIGBUS, and the process dies.
While a mapping is guarded, a handler takes the signal: it marks the mapping as failed and lays
pages of zeros over the rest of it, so that the load, tried again, goes on. Whoever used the bytes
looks at the mark afterwards and throws the result away.

Nothing checked or loaded beforehand could do the same: between any check and the load a file can
shrink. The fault itself is the one moment without a window, and waiting for it costs nothing while
all goes well.

The handler is Python, called by ctypes on the thread that faulted. What makes that sound:

- A load faults, so a load is all that was interrupted: a loop of a compiled kernel, or a copy. No
  allocator, and no other code that could not be entered twice.
- ctypes takes the interpreter's lock if the thread does not have it: a kernel runs without it, and
  holds nothing that the lock's owner could be waiting for. A copy of `bytes` has the lock; then
  there is nothing to take, and the interpreter is entered as from any C function.
- The handler takes no lock of its own. It reads one immutable tuple, replaced as a whole, and makes
  one system call. What it does twice, for two threads on one page, is done as well as once.
- It runs on the thread's own stack: the one set aside for signals is far too small for Python.
- Other faults are not its business: the former handler, or death, gets them as it always did. The
  former disposition comes back, as it was, with the last guarded mapping.
- A process forked off has mappings, handler and marks of its own; exec leaves no handlers.
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
    """A mapped file's addresses, and what became of them."""

    start: int
    """Address of its first byte."""
    stop: int
    """Address behind its last page."""
    failed: bool = False
    """A page could not be loaded: bytes read until now may be zeros that the file never had."""


class _SigInfo(ctypes.Structure):
    """siginfo_t, as far as faults fill it in."""

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


# With an errno of its own: the interrupted code finds its errno as it was.
_HANDLER = ctypes.CFUNCTYPE(
    None, ctypes.c_int, ctypes.POINTER(_SigInfo), ctypes.c_void_p, use_errno=True
)


class _SigbusHandler:
    """What answers SIGBUS, and what did so before."""

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
        if current.handler == self._own.handler:  # else another came on top, and stays
            self._hand_back()

    def _hand_back(self) -> None:
        self._sigaction(signal.SIGBUS, ctypes.byref(self._former), None)

    def _answer(self, number: int, info: "ctypes._Pointer[_SigInfo]", _context: int | None) -> None:
        try:
            was_sent = info.contents.code <= 0  # by a process: there is no address then
            address = 0 if was_sent else info.contents.address
            for guarded in _guarded:
                if guarded.start <= address < guarded.stop and self._cover(guarded, address):
                    return
            self._hand_back()  # returning repeats the load, and the former handler gets the fault
            if was_sent:
                self._raise(number)
        except Exception:  # whatever it is, faulting here for ever would be worse
            self._hand_back()

    def _cover(self, guarded: GuardedRange, address: int) -> bool:
        """Mark a range as failed and map zeros from the page of an address to its end."""
        guarded.failed = True  # first: no zero is ever read without the mark
        page = address - address % mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        mapped = self._mmap(page, guarded.stop - page, protection, flags, -1, 0)
        return bool(mapped == page)


# A signal's disposition is the process's, and so is this.
_lock = threading.Lock()
_guarded: tuple[GuardedRange, ...] = ()
_handler: _SigbusHandler | None = None  # kept once made: a signal may be on its way to it


def guard(mapping: mmap.mmap) -> GuardedRange:
    """Let failures to load a mapping's pages set the mark that is returned, until `unguard`.

    Raises OSError where they cannot be caught: on other systems than Linux on x86_64 and aarch64.
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
    """Leave a mapping alone from now on; call this before it is unmapped."""
    global _guarded
    with _lock:
        # Elsewhere its addresses may soon mean something else.
        _guarded = tuple(other for other in _guarded if other is not guarded)
        if not _guarded and _handler is not None:
            _handler.uninstall()
