"""Many forward passes side by side, so that each unit's weights are read once for all of them.

A pass runs as an ordinary call of the model until it comes to a unit without weights. There it
waits (as a greenlet: one thread, no locks), and the next pass runs. When all wait, the unit that
the hindmost wants is loaded, all passes that wait for it go on, and its memory is given back. This
needs no knowledge of any model's architecture, and each pass computes the same as it would without
the others.

Knows neither tensors nor files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from greenlet import getcurrent, greenlet


class Stage(Protocol):
    """A unit as passes meet it."""

    def serve(self, payloads: Sequence[Any]) -> Sequence[Any]:
        """Load the weights; return the reply for each of the waiting passes."""

    def release(self) -> None:
        """Give the weights' memory back."""


@dataclass(slots=True)
class _Pass:
    """One forward pass on its way."""

    greenlet: greenlet
    stage: Stage | None = None
    """The stage that it waits for."""
    payload: Any = None
    """The value that it brought along."""
    num_stages: int = 0
    """Number of stages that it has reached."""
    result: Any = None


class Lockstep:
    """Runs passes to their ends; each stage serves all of them before the next stage."""

    def __init__(self) -> None:
        self._served: Stage | None = None

    def arrive(self, stage: Stage, payload: Any) -> Any:
        """Wait, within a pass, until the stage has been served; return its reply."""
        return getcurrent().parent.switch(stage, payload)

    def pass_through(self, stage: Stage) -> None:
        """Wait, within a pass, until the stage's weights are there, unless they are already."""
        if self._served is not stage:
            self.arrive(stage, None)

    def run(
        self,
        passes: Sequence[Callable[[], Any]],
        on_stage: Callable[[Stage], None] = lambda _stage: None,
    ) -> list[Any]:
        """Run all passes and return their results in order; calls `on_stage` before each stage.

        An exception of a pass, a stage or `on_stage` ends them all.
        """
        running = [_Pass(greenlet(function)) for function in passes]
        try:
            for each in running:
                self._advance(each)
            while waiting := [each for each in running if each.stage is not None]:
                hindmost = min(waiting, key=lambda each: each.num_stages)
                stage = hindmost.stage
                assert stage is not None
                together = [each for each in waiting if each.stage is stage]
                on_stage(stage)
                replies = stage.serve([each.payload for each in together])
                self._served = stage
                try:
                    for each, reply in zip(together, replies, strict=True):
                        self._advance(each, reply)
                finally:
                    self._served = None
                    del replies
                    stage.release()
        finally:
            for each in running:
                if not each.greenlet.dead:
                    each.greenlet.throw()  # unwinds the remaining passes after an error
        return [each.result for each in running]

    def _advance(self, each: _Pass, *reply: Any) -> None:
        """Let a pass go on until it waits again or ends."""
        each.stage = each.payload = None
        outcome = each.greenlet.switch(*reply)
        if each.greenlet.dead:
            each.result = outcome
        else:
            each.stage, each.payload = outcome
            each.num_stages += 1
