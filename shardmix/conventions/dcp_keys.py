"""The keys of a distributed checkpoint that are a model's, among those of optimizer and trainer.

A trainer saves nested dictionaries: accelerate and Lightning have the model under `model`, torch's
own examples under `model` or `app`, torchtitan has its tensors beside `optimizer`. Pure rules on
names.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from shardmix.errors import SourceError, listed, shown
from shardmix.formats.torch_file import STATE_DICT_KEYS

Path = tuple[str | int, ...]

# What holds the model and the rest of a trainer's state.
_AROUND = (*STATE_DICT_KEYS, "app")
# Beside the tensors of a model, these are a trainer's.
_TRAINERS = frozenset(
    (
        *("optimizer", "optimizers", "optim", "opt", "optimizer_states", "optimizer_state_dict"),
        *("lr_scheduler", "lr_schedulers", "scheduler", "schedulers", "scaler", "grad_scaler"),
        *("train_state", "trainer", "trainer_state", "dataloader", "rng_state", "rng", "loops"),
        *("callbacks", "hyper_parameters", "client_state", "progress", "ft_dataloader"),
    )
)
_MOST_DEPTH = 4
_EXTRA = "_extra_state"


@dataclass(frozen=True, slots=True)
class _Group:
    """All keys below a path of the saved state."""

    tensors: Mapping[str, Path]
    """Key of each tensor → its path from here."""
    others: Mapping[str, Path]
    """The same of values that are no tensors."""

    def below(self, name: str) -> "_Group":
        """Return the keys below one entry."""
        return _Group(_below(self.tensors, name), _below(self.others, name))


def model_keys(
    tensors: Collection[str], others: Iterable[str], paths: Mapping[str, Path]
) -> dict[str, str]:
    """Return the key of each tensor of the model → its name in the model.

    `tensors` and `others` are the keys that are saved, and `paths` their places in the state that
    was saved; a key without one is a name itself. Raises `SourceError` if it is not clear which are
    the model's.
    """
    for key, path in paths.items():
        if ".".join(map(str, path)) != key:
            raise SourceError(
                f"says that {shown(key)} was saved at {shown(path)}", remedy="fetch it again"
            )
    group = _Group(
        {key: paths.get(key, (key,)) for key in tensors},
        {key: paths.get(key, (key,)) for key in others},
    )
    is_top = True
    for _ in range(_MOST_DEPTH):
        own = {key: path[0] for key, path in group.tensors.items() if len(path) == 1}
        inner = dict.fromkeys(str(path[0]) for path in group.tensors.values() if len(path) > 1)
        if own:
            _check_rest(group, inner, is_top=is_top)
            return {key: str(name) for key, name in own.items()}
        around = [name for name in inner if name in _AROUND]
        if len(around) != 1:
            break
        group, is_top = group.below(around[0]), False
    found = f", under {listed(list(map(shown, inner)), 3)}" if inner else ""
    raise SourceError(
        f"holds no state dict of tensors{found}; it is looked for at the top, and under "
        f"{listed(_AROUND)}",
        remedy="save it as {'model': model.state_dict()}",
    )


def _check_rest(group: _Group, inner: Iterable[str], *, is_top: bool) -> None:
    """Raise `SourceError` if there is more beside a model's tensors than a trainer leaves there."""
    unknown = [name for name in inner if name not in _TRAINERS]
    if unknown:
        raise SourceError(
            f"holds tensors under {listed(list(map(shown, unknown)), 3)} beside others, so that it "
            "is not clear which are the model's",
            remedy="save the model's under 'model', in one plain dictionary",
        )
    values = [
        str(path[0])
        for path in group.others.values()
        if len(path) == 1 and not str(path[0]).endswith(_EXTRA)
    ]
    if values and not is_top:
        raise SourceError(
            f"holds {shown(values[0])} among the model's tensors, which is none",
            remedy="save the model's state dict alone",
        )


def _below(paths: Mapping[str, Path], name: str) -> dict[str, Path]:
    return {key: path[1:] for key, path in paths.items() if len(path) > 1 and str(path[0]) == name}
