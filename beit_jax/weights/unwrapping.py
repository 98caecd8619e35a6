"""Finds the model's state dict in what a training script saved, whatever is around it.

found = unwrap({"state_dict": {"module.cls_token": array}, "epoch": 3}, source="last.pth.tar")
found.state      # {"cls_token": array}
found.notes      # ("names: module. is left off all 1 of them",)
found.extras     # {"epoch": 3}
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from beit_jax.types import Json, JsonObject, PyTree
from beit_jax.weights import pickles
from beit_jax.weights.prefixes import State, plain_names
from beit_jax.weights.report import WeightsError

# Where a state dict is kept: timm, Lightning, OpenMMLab; official BEiT; DeepSpeed; PyTorch's
# tutorials; pycls. In timm's order.
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict", "model_state")
# Where its moving average is kept, in timm's order (`timm.models.load_state_dict`).
_AVERAGES = ("state_dict_ema", "model_ema")
_CHOICES = ("", "ema", "model")
_DEEPEST = 6
_MOST_VALUES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unwrapped:
    """A state dict and what was around it.

    Attributes:
      state: key → array, prefixes removed.
      notes: lines for the report: what was chosen or removed.
      extras: see `Opened.extras`.
    """

    state: State
    notes: tuple[str, ...] = ()
    extras: JsonObject = dataclasses.field(default_factory=dict)


def unwrap(whole: PyTree, *, source: str, weights: str = "") -> Unwrapped:
    """Finds the tensors in the content of a `.pth`: bare, wrapped, or a whole pickled module.

    Args:
      whole: what `pickles.loads` gave.
      source: for messages.
      weights: "ema" for the moving average, "model" for the model beside it; "" for the average
        where there is one, as timm chooses.

    Raises:
      WeightsError: there are none, not those asked for, or several that could be meant.
    """
    check_choice(weights)
    if isinstance(whole, pickles.Record):
        whole = _module(whole, source=source)
    if not isinstance(whole, Mapping):
        raise WeightsError(f"{source} holds a {type(whole).__name__}, no state dict")
    sets = _Sets(whole, source=source)
    state, notes = sets.chosen(weights)
    if all(array.size == 0 for array in state.values()):
        raise WeightsError(
            f"{source} holds only empty tensors, as each process saves under DeepSpeed's ZeRO-3;"
            " zero_to_fp32.py in the checkpoint's folder writes the whole weights"
        )
    state, more = plain_names(state, source=source)
    return Unwrapped(state=state, notes=(*notes, *more), extras=_extras(whole))


def check_choice(weights: str) -> None:
    """Raises WeightsError where `weights` is none of its three values."""
    if weights not in _CHOICES:
        raise WeightsError(f"weights: {weights!r} is neither 'ema' nor 'model'")


def refuse_average(weights: str, *, source: str) -> None:
    """Raises WeightsError where an average is asked of a file that has none."""
    if weights == "ema":
        raise WeightsError(f"{source} holds no moving average; leave out --weights ema")


class _Sets:
    """The sets of weights in a file, by where they are."""

    def __init__(self, whole: Mapping, *, source: str):
        self._source = source
        self._seen: dict[int, State] = {}
        self._aside: list[str] = []
        self._whole = _with_average_apart(whole)
        whole = self._whole
        self.average = next((key for key in _AVERAGES if self._under(whole.get(key))), None)
        self.model = next((key for key in _WRAPPERS if self._under(whole.get(key))), None)
        self.is_bare = self.model is None and _is_bare(whole)

    def chosen(self, weights: str) -> tuple[State, list[str]]:
        """The tensors, and lines that say which were taken where there are others."""
        if self.model is None and not self.is_bare and self.average is None:
            if weights == "ema":
                raise self._no_average()
            return self._only()
        model = _tensors(self._whole) if self.is_bare else self._under(self._whole.get(self.model))
        name = self.model or "the bare ones"
        if not model:
            if weights == "model":
                raise WeightsError(
                    f"{self._source} holds only a moving average, {self.average}, and no model"
                )
            return self._under(self._whole[self.average]), [
                f"weights: {self.average} taken, the only ones there"
            ]
        others = self._beside(model)
        average = self.average or self._only_average(others)
        if weights == "ema" and average is None:
            raise self._no_average()
        if weights == "ema" or (weights == "" and self.average is not None):
            average = str(average)
            state = others.get(average) or self._under(self._whole.get(average))
            self._check_whole(state, model, average=average, name=name)
            return state, [
                f"weights: {average} taken, beside {name} (--weights model takes the other)"
            ]
        if average is not None:
            return model, [
                f"weights: {name} taken, beside {average} (--weights ema takes the other)"
            ]
        notes = [f"weights: {name} taken, beside {', '.join(others)}"] if others else []
        nameless = [
            key for key in self._whole if _is_average(key) and _is_nameless(self._whole[key])
        ]
        if nameless:
            notes.append(f"weights: {nameless[0]} left aside: its tensors have no names")
        if not self.is_bare:
            for key, value in self._whole.items():
                is_other = isinstance(key, str) and key != self.model and key not in others
                if is_other and not _is_training(key) and _is_bare_dict(value):
                    self._aside.append(key)
        return model, [*notes, *self._left_aside()]

    def _check_whole(self, state: State, model: State, *, average: str, name: str) -> None:
        """Raises WeightsError where an average is one of a part of the model."""
        if not _alike(state, model):
            raise WeightsError(
                f"{self._source}: {average} holds {len(state)} tensors that are not those of {name}"
                f" ({len(model)}); --weights model takes {name}"
            )

    def _no_average(self) -> WeightsError:
        nameless = [
            key for key in self._whole if _is_average(key) and _is_nameless(self._whole[key])
        ]
        if nameless:
            return WeightsError(
                f"{self._source} holds a moving average in {nameless[0]}, but its tensors have no"
                " names; leave out --weights ema"
            )
        return WeightsError(
            f"{self._source} holds no moving average (model_ema, state_dict_ema); its keys are"
            f" {_some(self._whole)}"
        )

    def _only(self) -> tuple[State, list[str]]:
        """The one key with a state dict under it, where no key is known."""
        found = {
            key: self._under(value) for key, value in self._whole.items() if isinstance(key, str)
        }
        found = self._likely({key: state for key, state in found.items() if state})
        if len(found) > 1:
            raise WeightsError(
                f"{self._source} holds several sets of tensors, {', '.join(found)}, and which is"
                " the model is not known; save the right one alone:"
                ' torch.save({"model": checkpoint[KEY]}, path)'
            )
        if not found:
            raise WeightsError(
                f"{self._source} holds no tensors of a model; its keys are {_some(self._whole)}"
            )
        ((key, state),) = found.items()
        return state, [f"weights: {key} taken, the only ones there", *self._left_aside()]

    def _beside(self, model: State) -> dict[str, State]:
        """Other sets of the same weights, by their place: "model_ema", "callbacks.EMA"."""
        found: dict[str, State] = {}
        seen: set[int] = set()
        level: list[tuple[str, PyTree]] = [("", self._whole)]
        for _ in range(_DEEPEST):
            inner: list[tuple[str, PyTree]] = []
            for place, value in level:
                if not isinstance(value, Mapping) or id(value) in seen or len(seen) > _MOST_VALUES:
                    continue
                seen.add(id(value))
                state = _tensors(value)
                is_model = all(model.get(key) is array for key, array in state.items())
                if state and place and not is_model and _alike(state, model):
                    found[place] = state
                else:
                    inner += [
                        (f"{place}.{key}" if place else key, item)
                        for key, item in value.items()
                        if isinstance(key, str)
                    ]
            level = inner
        return found

    def _likely(self, found: dict[str, State]) -> dict[str, State]:
        """Those with names like a model's, if any: a generator's state and a head have no dots."""
        dotted = {key: state for key, state in found.items() if any("." in name for name in state)}
        if dotted:
            self._aside += [key for key in found if key not in dotted and not _is_training(key)]
        return dotted or found

    def _left_aside(self) -> list[str]:
        names = list(dict.fromkeys(self._aside))
        return [f"left aside: the tensors of {', '.join(names[:5])}"] if names else []

    def _only_average(self, others: Mapping[str, State]) -> str | None:
        averages = [place for place in others if any(map(_is_average, place.split(".")))]
        return averages[0] if len(averages) == 1 else None

    def _under(self, value: PyTree, depth: int = _DEEPEST) -> State:
        """The tensors of a state dict, through what is around it; {} where there is not one."""
        if isinstance(value, pickles.Record):
            try:
                return _module(value, source=self._source)
            except WeightsError:
                return {}
        if not isinstance(value, Mapping) or depth == 0:
            return {}
        if id(value) not in self._seen:
            self._seen[id(value)] = {}  # for a dict within itself
            known = next((key for key in _WRAPPERS if isinstance(value.get(key), Mapping)), None)
            if known is not None:
                state = self._under(value[known], depth - 1)
            elif _is_bare(value):
                state = _tensors(value)
            else:
                inner = {
                    key: self._under(item, depth - 1)
                    for key, item in value.items()
                    if isinstance(key, str)
                }
                found = self._likely({key: state for key, state in inner.items() if state})
                state = next(iter(found.values())) if len(found) == 1 else {}
            self._seen[id(value)] = state
        return self._seen[id(value)]


def _with_average_apart(whole: Mapping) -> Mapping:
    """Takes a model's average out of its state dict, where a Lightning module holds both."""
    key = next((key for key in _WRAPPERS if isinstance(whole.get(key), Mapping)), None)
    state = whole if key is None else whole[key]
    names = [name for name in _tensors(state) if "." in name]
    inside = {name for name in names if _is_average(name.split(".")[0])}
    if not inside or len(inside) == len(names) or any(name in whole for name in _AVERAGES):
        return whole
    rest = {name: item for name, item in state.items() if name not in inside}
    own = _names({name: item for name, item in rest.items() if isinstance(item, np.ndarray)})
    average = {}
    for name in sorted(inside):
        inner = name.partition(".")[2]
        if "." in inner or inner in own:  # not the average's own step and decay
            average[inner] = state[name]
    averages = {"model_ema": average} if _alike(average, _tensors(rest)) else {}
    return {**({} if key is None else whole), key or "state_dict": rest, **averages}


def _alike(state: State, model: State) -> bool:
    """Whether two sets are of the same model: most of the second's names are in the first."""
    half = len(model) // 2  # asked first: an optimizer has a small dict for every tensor
    return len(state) > half and len(_names(state) & _names(model)) > half


def _names(state: State) -> set[str]:
    try:
        return set(plain_names(state, source="")[0])
    except WeightsError:  # two names fall together
        return set(state)


def _is_bare(whole: Mapping) -> bool:
    """Whether a dict is a state dict itself, and not one around it with a tensor among its facts.

    A model's names have dots, "best_accuracy" has none.
    """
    names = _tensors(whole)
    return any("." in name for name in names) or (
        bool(names) and not any(_tensors(value) for value in whole.values())
    )


def _is_bare_dict(value: PyTree) -> bool:
    return isinstance(value, Mapping) and _is_bare(value)


def _is_training(key: str) -> bool:
    """Whether a name is that of what training needs beside a model: no part of it is lost."""
    words = ("optim", "sched", "scaler", "rng", "random", "generator", "state", "amp", "ema")
    return any(word in key.lower() for word in words)


def _is_average(key: object) -> bool:
    return isinstance(key, str) and "ema" in key.lower().replace("-", "_").split("_")


def _is_nameless(value: PyTree) -> bool:
    """Whether a value is a list of tensors, or holds one, as torch_ema's `shadow_params`."""
    items = [value, *value.values()] if isinstance(value, Mapping) else [value]
    return any(
        isinstance(item, list | tuple) and any(isinstance(one, np.ndarray) for one in item)
        for item in items
    )


def _some(whole: Mapping) -> str:
    keys = [str(key)[:40] for key in list(whole)[:13]]
    return ", ".join(keys[:12]) + (", ..." if len(keys) > 12 else "") if keys else "none"


def _tensors(value: PyTree) -> State:
    if not isinstance(value, Mapping):
        return {}
    return {str(key): array for key, array in value.items() if isinstance(array, np.ndarray)}


def _module(record: pickles.Record, *, source: str) -> State:
    try:
        return pickles.module_state(record)
    except (RecursionError, AttributeError):  # a module inside itself, or no dicts in it
        raise WeightsError(f"{source} holds a damaged module") from None


def _extras(whole: Mapping) -> JsonObject:
    """What a file says beside its tensors, as plain values."""
    result = _scalars(whole)
    for key in ("args", "hyper_parameters", "beit_jax", "meta"):
        plain = _plain(whole.get(key), budget=[_MOST_VALUES])
        if isinstance(plain, dict):
            result[key] = {name: value for name, value in plain.items() if value is not None}
    return result


def _scalars(values: Mapping) -> JsonObject:
    return {
        key: value
        for key, value in values.items()
        if isinstance(key, str) and isinstance(value, str | int | float)
    }


def _plain(value: PyTree, *, budget: list[int], depth: int = 0) -> Json:
    """Strings, numbers, lists and dicts; None for anything else, too deep or too much.

    The budget is what a list within a list within a list would exhaust, each ten times the same.
    """
    budget[0] -= 1
    value = _content(value)
    if isinstance(value, str | int | float):
        return value
    if depth > _DEEPEST or budget[0] < 0:
        return None
    if isinstance(value, Mapping):
        return {
            key: _plain(item, budget=budget, depth=depth + 1)
            for key, item in value.items()
            if isinstance(key, str)
        }
    if isinstance(value, list | tuple):
        return [_plain(item, budget=budget, depth=depth + 1) for item in value]
    return None


def _content(value: PyTree) -> PyTree:
    """A Namespace's attributes, an OmegaConf container's or node's content; others as they are."""
    if not isinstance(value, pickles.Record):
        return value
    if value.of.startswith("omegaconf."):
        return value.fields.get("_content", value.fields.get("_val"))
    return value.fields if value.of in ("argparse.Namespace", "types.SimpleNamespace") else None
