"""Finds the model's state dict in what a training script saved, whatever is around it.

found = unwrap({"state_dict": {"module.cls_token": array}, "epoch": 3}, source="last.pth.tar")
found.state      # {"cls_token": array}
found.notes      # ("names: module. is left off all 1 of them",)
found.extras     # {"epoch": 3}
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from beit_jax.types import Json, JsonObject, PyTree
from beit_jax.weights import pickles
from beit_jax.weights.report import WeightsError, compact

State = dict[str, np.ndarray]

# Where a state dict is kept: timm, Lightning, OpenMMLab; official BEiT; DeepSpeed; PyTorch's
# tutorials; pycls. In timm's order.
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict", "model_state")
# Where its moving average is kept, in timm's order (`timm.models.load_state_dict`).
_AVERAGES = ("state_dict_ema", "model_ema")
# Modules that change nothing and may stand anywhere in a name: torch.compile, FSDP, checkpointing.
_TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What a name starts with where the model is a part of something: DataParallel, Lightning modules,
# Accelerate, transformers' wrapper of timm.
_PREFIXES = (
    *("module.", "model.", "net.", "_forward_module.", "timm_model."),
    *(f"{name}." for name in _TRANSPARENT),
)
# What stands beside the model in a Lightning module or in an averaged model, and is no part of it.
_NOT_MODEL = (
    *("n_averaged", "criterion", "loss", "loss_fn", "loss_func", "loss_function", "loss_module"),
    *("train_loss", "val_loss", "test_loss", "metric", "metrics", "train_metrics", "val_metrics"),
    *("test_metrics", "accuracy", "acc", "train_acc", "val_acc", "test_acc", "val_acc_best"),
)
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
    key, notes = _chosen(whole, source=source, weights=weights)
    state = _inner(whole if key is None else whole[key])
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


def plain_names(state: State, *, source: str) -> tuple[State, tuple[str, ...]]:
    """Removes the prefixes that wrappers put before every name.

    `module.`, `model.` and their like go only where every key has them, but for those that are
    known to be no part of a model (a loss beside it), which then go too. Modules that mean nothing
    to a name, `_orig_mod` of torch.compile, go anywhere.

    Returns:
      The state and lines that say what was removed.

    Raises:
      WeightsError: two keys would have the same name.
    """
    notes: list[str] = []
    prefix = ""
    apart = [key for key in state if key.split(".")[0] in _NOT_MODEL]
    inside = [key for key in state if key not in apart]
    while inside:
        begin = next(
            (p for p in _PREFIXES if all(_under(p, key[len(prefix) :]) for key in inside)), ""
        )
        if not begin:
            break
        prefix += begin
    if apart and (prefix or apart == ["n_averaged"]):
        notes.append(f"left aside, beside the model: {compact(apart)}")
        state = {key: state[key] for key in inside}
    if prefix:
        notes.append(f"names: {prefix} is left off all {len(inside)} of them")
    names = {key: _without_transparent(key.removeprefix(prefix)) for key in state}
    within = [key for key, name in names.items() if name != key.removeprefix(prefix)]
    if within:
        notes.append(f"names: {', '.join(_found(within))} is left out of {len(within)} of them")
    result: State = {}
    for key, name in names.items():
        if name in result:
            raise WeightsError(f"{source} holds {name} twice, once as {key}")
        result[name] = state[key]
    return result, tuple(notes)


def _under(prefix: str, key: str) -> bool:
    return key.startswith(prefix) and len(key) > len(prefix)


def _without_transparent(key: str) -> str:
    first, *parts = key.split(".")
    # At the start such a name is a prefix: of some keys only, it is not ours to remove.
    return ".".join((first, *(part for part in parts if part not in _TRANSPARENT)))


def _found(keys: Iterable[str]) -> list[str]:
    return [name for name in _TRANSPARENT if any(name in key.split(".") for key in keys)]


def _chosen(whole: Mapping, *, source: str, weights: str) -> tuple[str | None, list[str]]:
    """The key of the state dict, None for the whole itself; and notes."""
    average = next((key for key in _AVERAGES if _inner(whole.get(key))), None)
    model = next((key for key in _WRAPPERS if _inner(whole.get(key))), None)
    is_bare = _is_bare(whole)
    if weights == "ema" and average is None:
        others = [str(key) for key, value in whole.items() if _is_average(key) and _inner(value)]
        if len(others) != 1:
            raise WeightsError(
                f"{source} holds no moving average (model_ema, state_dict_ema); its keys are"
                f" {_some(whole)}"
            )
        average = others[0]
    if weights == "model" and model is None and not is_bare and average is not None:
        raise WeightsError(f"{source} holds only a moving average, {average}; no model beside it")
    if average is not None and weights != "model":
        if model is None and not is_bare:
            return average, [f"weights: {average} taken, the only ones there"]
        other = "the bare ones" if model is None else model
        return average, [
            f"weights: {average} taken, beside {other} (--weights model takes the other)"
        ]
    if average is not None:
        other = "the bare ones" if model is None else model
        return model, [f"weights: {other} taken, beside {average} (--weights ema takes the other)"]
    if model is None and is_bare:
        return None, []
    if model is None:
        return _only(whole, source=source)
    taken = _inner(whole[model])
    aside = [str(key) for key, value in whole.items() if key != model and _alike(value, taken)]
    if not aside:
        return model, []
    hint = " (--weights ema takes it)" if len(aside) == 1 and _is_average(aside[0]) else ""
    return model, [f"weights: {model} taken, beside {', '.join(aside)}{hint}"]


def _alike(value: PyTree, taken: State) -> bool:
    """Whether a value is another set of weights of the same model: an average, a teacher."""
    return len(_inner(value).keys() & taken.keys()) > len(taken) // 2


def _is_bare(whole: Mapping) -> bool:
    """Whether a dict is a state dict itself, and not one around it with a tensor among its facts.

    A model's names have dots, "best_accuracy" has none.
    """
    names = _tensors(whole)
    return any("." in name for name in names) or (
        bool(names) and not any(_tensors(value) for value in whole.values())
    )


def _only(whole: Mapping, *, source: str) -> tuple[str, list[str]]:
    """The one key with tensors under it, where no key is known."""
    keys = [key for key, value in whole.items() if isinstance(key, str) and _tensors(value)]
    if len(keys) > 1:
        raise WeightsError(
            f"{source} holds several sets of tensors, {', '.join(keys)}, and which is the model is"
            ' not known; save the right one alone: torch.save({"model": checkpoint[KEY]}, path)'
        )
    if not keys:
        raise WeightsError(f"{source} holds no tensors; its keys are {_some(whole)}")
    return keys[0], [f"weights: {keys[0]} taken, the only tensors there"]


def _is_average(key: object) -> bool:
    return isinstance(key, str) and "ema" in key.lower().replace("-", "_").split("_")


def _some(whole: Mapping) -> str:
    keys = [str(key)[:40] for key in list(whole)[:13]]
    return ", ".join(keys[:12]) + (", ..." if len(keys) > 12 else "") if keys else "none"


def _inner(value: PyTree) -> State:
    """The tensors of a state dict, through wrappers within wrappers; {} where there are none."""
    for _ in range(_DEEPEST):
        if isinstance(value, pickles.Record):
            try:
                value = _module(value, source="")
            except WeightsError:
                return {}
        if not isinstance(value, Mapping):
            return {}
        key = next((key for key in _WRAPPERS if isinstance(value.get(key), Mapping)), None)
        if key is None:
            break
        value = value[key]
    return _tensors(value)


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
    for key in ("args", "hyper_parameters", "beit_jax"):
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
