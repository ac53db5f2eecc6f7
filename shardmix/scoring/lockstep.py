"""Many forward passes side by side, so that each unit's weights are read once for all of them.

A pass runs as an ordinary call of the model until it comes to a unit whose weights are not there.
There it waits (as a greenlet: one thread, no locks), and the next pass runs. When all wait, the
unit that the hindmost wants is brought into memory, all passes that wait for it go on, and its
memory is given back. No knowledge of any model's architecture is needed, and what a pass computes
is what it would compute alone.

Knows neither tensors nor files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from greenlet import getcurrent, greenlet


class Stage(Protocol):
    """A unit as passes meet it."""

    def serve(self, payloads: Sequence[Any]) -> Sequence[Any]:
        """Bring the weights; return what each of the waiting passes is to get."""

    def release(self) -> None:
        """Give the weights' memory back."""


@dataclass(slots=True)
class _Pass:
    """One forward pass on its way."""

    greenlet: greenlet
    stage: Stage | None = None
    """What it waits for."""
    payload: Any = None
    """What it brought along."""
    num_stages: int = 0
    """How far it has come."""
    result: Any = None


class Lockstep:
    """Runs passes to their ends, each stage served to all of them before the next."""

    def __init__(self) -> None:
        self._served: Stage | None = None

    def arrive(self, stage: Stage, payload: Any) -> Any:
        """Wait, within a pass, until the stage has been served; return what it gave."""
        return getcurrent().parent.switch(stage, payload)

    def pass_through(self, stage: Stage) -> None:
        """Wait, within a pass, until the stage's weights are there; they may be already."""
        if self._served is not stage:
            self.arrive(stage, None)

    def run(
        self,
        passes: Sequence[Callable[[], Any]],
        on_stage: Callable[[Stage], None] = lambda _stage: None,
    ) -> list[Any]:
        """Run all passes and return their results in order; `on_stage` is told what comes next.

        What a pass, a stage or `on_stage` raises ends them all.
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
                    each.greenlet.throw()  # unwinds what is left after an error
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
