"""Plays a GPU's streams and events on the CPU: what is queued runs late, in any legal order.

Operations on tensors within `stream` are not done but queued. When the host waits for an event, or
for nothing, streams are let go on by chance, each in its own order and held up by the events that
it waits for. So an event that is missing shows as a wrong result, as it would, now and then, on a
GPU. Stands in for `torch.cuda` in `cuda_sums`.
"""

import random
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class SimulatedCuda:
    """A GPU whose schedule is chance's, by a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams = []
        self.most_queued = 0

    def Stream(self, *, device):  # noqa: N802 - torch's name
        return SimulatedStream(self)

    def Event(self, *, blocking=False):  # noqa: N802
        return SimulatedEvent(self)

    @contextmanager
    def stream(self, stream):
        with _Queueing(stream):
            yield

    def step(self):
        """Run the next operation of one stream that is not held up; return whether there is one."""
        free = [stream for stream in self.streams if stream.is_free()]
        if free:
            self.random.choice(free).run_next()
        return bool(free)

    def go_on_by_chance(self):
        """Let the GPU get ahead of the host by some operations, or by none."""
        for _ in range(self.random.choice([0, 0, 0, 1, 3, 20])):
            self.step()

    def queued(self):
        self.most_queued = max(self.most_queued, sum(len(stream.queue) for stream in self.streams))


class SimulatedStream:
    def __init__(self, cuda):
        self.cuda = cuda
        self.queue = []
        cuda.streams.append(self)

    def wait_event(self, event):
        # Of what was recorded when the wait was queued, as CUDA has it.
        self.queue.append((None, event.num_recorded, event))

    def is_free(self):
        if not self.queue:
            return False
        run, number, event = self.queue[0]
        return run is not None or event.num_done >= number

    def run_next(self):
        run, _, _ = self.queue.pop(0)
        if run is not None:
            run()

    def finish(self):
        while self.queue:
            assert self.cuda.step(), "streams wait for one another"


class SimulatedEvent:
    def __init__(self, cuda):
        self.cuda = cuda
        self.num_recorded = 0
        self.num_done = 0

    def record(self, stream):
        self.num_recorded += 1
        number = self.num_recorded

        def done():
            self.num_done = number

        stream.queue.append((done, 0, None))
        self.cuda.queued()

    def synchronize(self):
        self.cuda.go_on_by_chance()
        while self.num_done < self.num_recorded:
            assert self.cuda.step(), "the host waits for nothing"


class _Queueing(TorchDispatchMode):
    """Queues operations that change tensors; does at once those that only look at them anew."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self.stream.queue.append((lambda: func(*args, **kwargs), 0, None))
            names = [argument.name for argument in func._schema.arguments if argument.is_out]
            changed = tuple(kwargs[name] for name in names) or args[:1]
            return changed if len(changed) > 1 else changed[0]
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        if not is_view and any(isinstance(arg, torch.Tensor) for arg in args):
            # Its result is needed now: the GPU has been quick.
            self.stream.finish()
        return func(*args, **kwargs)
