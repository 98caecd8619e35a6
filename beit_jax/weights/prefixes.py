"""Names of tensors without what wrappers put before them.

plain_names({"module.cls_token": array}, source="x.pth")
# ({"cls_token": array}, ("names: module. is left off all 1 of them",))
"""

from collections.abc import Iterable

import numpy as np

from beit_jax.weights.report import WeightsError, compact

State = dict[str, np.ndarray]

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
# The class token and the start of a block in every kind of names, the longest first.
_BEIT = (
    ("beit.embeddings.cls_token", "beit."),
    ("data2vec_vision.embeddings.cls_token", "data2vec_vision."),
    ("embeddings.cls_token", "encoder.layer."),
    ("cls_token", "blocks.0."),
)
# How the names of a BEiT begin, in every kind of names.
_OWN = {
    *("cls_token", "mask_token", "pos_embed", "patch_embed", "blocks", "rel_pos_bias", "norm"),
    *("fc_norm", "head", "lm_head", "beit", "data2vec_vision", "embeddings", "encoder", "layers"),
    *("layernorm", "pooler", "classifier"),
}
# The head of a segmentation model, whose formats have "backbone." before the encoder's names.
_SEGMENTATION = "decode_head"


def plain_names(state: State, *, source: str) -> tuple[State, tuple[str, ...]]:
    """Removes the prefixes that wrappers put before every name.

    `module.`, `model.` and their like go only where every key has them, but for those that are
    known to be no part of a model (a loss beside it), which then go too. So does any other prefix
    before what are then a BEiT's names. Modules that mean nothing to a name, `_orig_mod` of
    torch.compile, go anywhere.

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
        rest = [key[len(prefix) :] for key in inside]
        begin = next((p for p in _PREFIXES if all(_under(p, key) for key in rest)), "")
        begin = begin or _before_beit(rest)
        if not begin:
            break
        prefix += begin
    if not prefix:
        prefix = _before_most(inside)
    if apart and (prefix or apart == ["n_averaged"]):
        notes.append(f"left aside, beside the model: {compact(apart)}")
        state = {key: state[key] for key in inside}
    if prefix:
        under = sum(key.startswith(prefix) for key in inside)
        some = "all" if under == len(inside) else f"{under} of the"
        notes.append(f"names: {prefix} is left off {some} {len(inside)} of them")
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


def _before_beit(keys: list[str]) -> str:
    """What stands before the names of a BEiT in every key: "backbone.", "student."; "" for none."""
    for token, block in _BEIT:
        first = next((key for key in keys if f".{key}".endswith(f".{token}")), None)
        if first is None:
            continue
        prefix = first.removesuffix(token)
        is_beit = any(key.startswith(prefix + block) for key in keys)
        return prefix if is_beit and all(_under(prefix, key) for key in keys) else ""
    return ""


def _before_most(keys: list[str]) -> str:
    """What stands before a whole BEiT that shares its state dict with something else's tensors.

    Those keep their names, so that they are named as left over; with names of a BEiT's own, such
    as a head of somebody else's making, nobody can tell what they are, and "" is returned.
    """
    for token, block in _BEIT:
        if token in keys:
            return ""
        first = next((key for key in keys if key.endswith(f".{token}")), None)
        if first is None or f"{first.removesuffix(token)}{block}" not in "\n".join(keys):
            continue
        prefix = first.removesuffix(token)
        beside = {key.split(".")[0] for key in keys if not key.startswith(prefix)}
        if _SEGMENTATION in beside:
            return ""
        return "" if beside & _OWN or any(f"{name}." == prefix for name in beside) else prefix
    return ""


def _under(prefix: str, key: str) -> bool:
    return key.startswith(prefix) and len(key) > len(prefix)


def _without_transparent(key: str) -> str:
    first, *parts = key.split(".")
    # At the start such a name is a prefix: of some keys only, it is not ours to remove.
    return ".".join((first, *(part for part in parts if part not in _TRANSPARENT)))


def _found(keys: Iterable[str]) -> list[str]:
    return [name for name in _TRANSPARENT if any(name in key.split(".") for key in keys)]
