"""A model whose weights come from the shards unit by unit, through accelerate's hooks.

Puts units, weights and lockstep together. A model that fits as a whole is one unit, loaded before
the first pass, and nothing waits.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from torch.nn import functional

from shardmix.scoring.lockstep import Lockstep, Stage
from shardmix.scoring.model_weights import ModelWeights
from shardmix.scoring.units import SLICE_NBYTES, Kind, Partition, Unit

OnStep = Callable[[int], None]


class StreamedModel:
    """Runs forward passes of one model; each unit's weights are read once for all of them."""

    def __init__(
        self,
        model: nn.Module,
        weights: ModelWeights,
        partition: Partition,
        device: torch.device,
    ) -> None:
        self._model = model
        self._weights = weights
        self._device = device
        self._units = partition.units
        self._place(partition.resident)
        for name, buffer in list(model.named_buffers()):
            if buffer.device.type != "meta" and buffer.device != device:
                set_module_tensor_to_device(model, name, device)
        self._lockstep = Lockstep()
        self._stages: list[Stage] = []
        if [unit.name for unit in self._units] == [""]:
            self._place(self._units[0].tensors)
        else:
            self._stages = [self._attach(unit) for unit in self._units]

    @property
    def num_stages(self) -> int:
        """Number of units that passes wait for; 0 if the whole model is in memory."""
        return len(self._stages)

    def run(self, passes: Sequence[Callable[[], Any]], on_step: OnStep) -> list[Any]:
        """Run passes, each a function that calls the model; return their results in order.

        Calls `on_step` with the number of each stage as it begins, or of each pass if there are no
        stages.
        """
        if self._stages:
            return self._lockstep.run(passes, partial(self._stage_begins, on_step))
        results = []
        for number, function in enumerate(passes):
            on_step(number)
            results.append(function())
        return results

    def _stage_begins(self, on_step: OnStep, stage: Stage) -> None:
        number = self._stages.index(stage)
        on_step(number)
        # The system reads the next unit ahead while this one computes.
        if number + 1 < len(self._units) and self._units[number + 1].kind is not Kind.ROWS:
            self._weights.prefetch(self._units[number + 1].tensors)

    def _place(self, names: Sequence[str]) -> None:
        for name, value in self._weights.read(names, self._device).items():
            set_module_tensor_to_device(self._model, name, self._device, value=value)

    def _attach(self, unit: Unit) -> Stage:
        kinds: dict[Kind, Callable[..., Stage]] = {
            Kind.ROWS: EmbeddingStage,
            Kind.SLICES: LinearStage,
            Kind.WHOLE: WholeStage,
        }
        others = (self._model, self._weights, self._device, self._lockstep)
        return kinds[unit.kind](unit, *others)


class _ModuleStage(Stage):
    """The attributes of all stages: the unit, its module, source and target of its weights."""

    def __init__(
        self,
        unit: Unit,
        model: nn.Module,
        weights: ModelWeights,
        device: torch.device,
        lockstep: Lockstep,
    ) -> None:
        self._unit, self._model, self._weights = unit, model, weights
        self._device, self._lockstep = device, lockstep
        self._weight_name = f"{unit.name}.weight"


class WholeStage(_ModuleStage, ModelHook):  # type: ignore[misc]
    """A unit with all its weights loaded while passes go through it."""

    def __init__(self, unit: Unit, model: nn.Module, *others: Any) -> None:
        super().__init__(unit, model, *others)
        add_hook_to_module(model.get_submodule(unit.name), self)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Wait for the weights."""
        self._lockstep.pass_through(self)
        return args, kwargs

    def serve(self, payloads: Sequence[Any]) -> Sequence[Any]:
        """Read the weights into the module."""
        values = self._weights.read(self._unit.tensors, self._device)
        while values:
            name, value = values.popitem()
            set_module_tensor_to_device(self._model, name, self._device, value=value)
        return [None] * len(payloads)

    def release(self) -> None:
        """Leave the module without weights."""
        for name in self._unit.tensors:
            set_module_tensor_to_device(self._model, name, "meta")


class EmbeddingStage(_ModuleStage, ModelHook):  # type: ignore[misc]
    """An embedding; only the rows that waiting passes look up are read."""

    def __init__(self, unit: Unit, model: nn.Module, *others: Any) -> None:
        super().__init__(unit, model, *others)
        module = model.get_submodule(unit.name)
        assert isinstance(module, nn.Embedding)
        self._module = module
        self._padding_idx = module.padding_idx
        # Right shape and device, for models that ask; one element in memory.
        one = torch.empty(1, dtype=module.weight.dtype, device=self._device)
        self._placeholder = nn.Parameter(one.expand(module.weight.shape), requires_grad=False)
        self.release()
        add_hook_to_module(module, self)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Wait for the rows, and replace each token id by its row among the loaded ones."""
        if args:
            return (self._lockstep.arrive(self, args[0]), *args[1:]), kwargs
        (key,) = kwargs
        return args, {key: self._lockstep.arrive(self, kwargs[key])}

    def serve(self, payloads: Sequence[torch.Tensor]) -> Sequence[Any]:
        """Read the rows that any pass wants."""
        rows = torch.unique(torch.cat([payload.flatten() for payload in payloads]))  # sorted
        num_rows = self._placeholder.shape[0]
        if int(rows[0]) < 0 or int(rows[-1]) >= num_rows:
            raise IndexError(f"token {int(rows[-1])} of a vocabulary of {num_rows}")
        values = self._weights.read_rows(self._weight_name, rows.cpu())
        self._module.weight = nn.Parameter(values.to(self._device), requires_grad=False)
        self._module.padding_idx = None  # it counts rows of the whole, and matters only to training
        return [torch.searchsorted(rows, payload.contiguous()) for payload in payloads]

    def release(self) -> None:
        """Leave the module without weights."""
        self._module.weight = self._placeholder
        self._module.padding_idx = self._padding_idx


class LinearStage(_ModuleStage):
    """A large linear layer, applied to all waiting passes some of its rows at a time."""

    def __init__(self, unit: Unit, model: nn.Module, *others: Any) -> None:
        super().__init__(unit, model, *others)
        module = model.get_submodule(unit.name)
        assert isinstance(module, nn.Linear)
        self._module = module
        module.forward = self._forward  # type: ignore[assignment, method-assign]

    def _forward(self, states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._lockstep.arrive(self, states)
        return result

    def serve(self, payloads: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Compute every pass's output, slice by slice."""
        weight, num_rows = self._module.weight, self._module.out_features
        outputs = [states.new_empty((*states.shape[:-1], num_rows)) for states in payloads]
        step = max(1, SLICE_NBYTES // (weight.shape[1] * weight.element_size()))
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            rows = self._weights.read_rows(self._weight_name, torch.arange(start, stop))
            rows = rows.to(self._device)
            for states, output in zip(payloads, outputs, strict=True):
                output[..., start:stop] = functional.linear(states, rows)
        if self._module.bias is not None:
            name = f"{self._unit.name}.bias"
            bias = self._weights.read([name], self._device)[name]
            for output in outputs:
                output += bias
        return outputs

    def release(self) -> None:
        """Do nothing: no weights are left."""
