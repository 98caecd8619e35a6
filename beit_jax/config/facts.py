"""Facts of a model that its parameters' names and shapes do not show, but that its numbers need.

Parameters fit a model with other heads, another epsilon or other pixels, and are then another
function. `FACTS` has one row for each such fact: a warm start compares them all
(`weights/facts.py`), and `config.run.init_allow_different` takes their names.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping

from beit_jax.types import Json, JsonObject


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """A fact of a model.

    Attributes:
      setting: its place in the config of a job and in that of a checkpoint: "model.heads".
      why: what another value changes; the end of a sentence.
      compared: `(source, target) -> bool`, both configs: whether the fact concerns both, and
        nothing else would show a difference.
      same: whether two values are one function.
      show: a value as a message has it.
      from_data: whether the target's value is known only once its images are open, and follows from
        them: no setting changes it.
    """

    setting: str
    why: str
    compared: Callable[[JsonObject, JsonObject], bool] = lambda source, target: True
    same: Callable[[Json, Json], bool] = operator.eq
    show: Callable[[Json], str] = str
    from_data: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A fact of which a checkpoint has another value than the model it is to start.

    Attributes:
      name: a key of `FACTS`.
      source: the checkpoint's value.
      target: the model's.
    """

    name: str
    source: Json
    target: Json


def _either_absolute(source: JsonObject, target: JsonObject) -> bool:
    """Relative tables have a column for each head, so their shapes show another number."""
    return "absolute" in (value_of(source, "model.positions"), value_of(target, "model.positions"))


def _both_classify(source: JsonObject, target: JsonObject) -> bool:
    return source.get("task") == target.get("task") == "classify"


def _both_with_classes(source: JsonObject, target: JsonObject) -> bool:
    return source.get("task") == target.get("task") and source.get("task") in (
        "classify",
        "segment",
    )


def _both_segment(source: JsonObject, target: JsonObject) -> bool:
    return source.get("task") == target.get("task") == "segment"


def _both_pool(source: JsonObject, target: JsonObject) -> bool:
    kinds = {value_of(config, "head.kind") for config in (source, target)}
    return _both_segment(source, target) and kinds == {"upernet"}


def _same_items(there: Json, here: Json) -> bool:
    """Whether two lists, or tuples before they are written as JSON, are the same."""
    return list(there) == list(here)


def _items(value: Json) -> str:
    """A list as a flag takes it, in quotes for the shell: '(4,6,8,12)'."""
    return f"'({','.join(map(str, value))}{',' if len(value) == 1 else ''})'"


def _same_vocabulary(source: JsonObject, target: JsonObject) -> bool:
    """A head for another number of tokens is refused, or starts anew, by its shape."""
    both = source.get("task") == target.get("task") == "pretrain"
    vocabulary = "tokenizer.vocabulary"
    return both and value_of(source, vocabulary) == value_of(target, vocabulary)


def _as_many_labels(source: JsonObject, target: JsonObject) -> bool:
    """A head for another number of classes is refused, or starts anew, by its shape."""
    there, here = (value_of(config, "labels") or () for config in (source, target))
    return _both_with_classes(source, target) and len(there) in (0, len(here))


def _no_label_moved(there: Json, here: Json) -> bool:
    """Whether the names that both have stand at the same outputs.

    Others say nothing: a class is "n01440764" in one data set and "tench" in another.
    """
    return all(_places(name, there) & _places(name, here) for name in set(there) & set(here))


def _places(name: str, labels: Json) -> set[int]:
    return {index for index, label in enumerate(labels) if label == name}


def _first_labels(labels: Json) -> str:
    return ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")


# One row for each fact; a new one is known everywhere.
FACTS: dict[str, Fact] = {
    "heads": Fact(
        setting="model.heads",
        why="attention splits the same width otherwise",
        compared=_either_absolute,
    ),
    "layer_norm_epsilon": Fact(
        setting="model.layer_norm_epsilon", why="every norm divides by something else"
    ),
    "normalization": Fact(
        setting="data.normalization", why="the model is given other numbers for the same picture"
    ),
    "pooling": Fact(
        setting="pooling", why="the head is given other features", compared=_both_classify
    ),
    "blocks": Fact(
        setting="head.blocks",
        why="the head is given the outputs of other blocks",
        compared=_both_segment,
        same=_same_items,
        show=_items,
    ),
    "pool_scales": Fact(
        setting="head.pool_scales",
        why="the head pools to other sizes",
        compared=_both_pool,
        same=_same_items,
        show=_items,
    ),
    "tokenizer": Fact(
        setting="tokenizer.kind",
        why="the head predicts the tokens of another tokenizer",
        compared=_same_vocabulary,
    ),
    "labels": Fact(
        setting="labels",
        why="the head's outputs are other classes",
        compared=_as_many_labels,
        same=_no_label_moved,
        show=_first_labels,
        from_data=True,
    ),
}

# The settings of `ModelConfig` that are no facts, and why parameters of a model with another value
# are either refused already or the same function.
NO_FACTS = {
    "layers": "shapes show it",
    "width": "shapes show it",
    "mlp_width": "shapes show it",
    "patch_size": "shapes show it",
    "image_size": "shapes show it; positions are resized",
    "positions": "names show it",
    "layer_scale_init": "names show whether there are gammas, and they have left their start",
    "drop_path_rate": "training only",
    "dtype": "how it is computed",
    "residual_dtype": "how it is computed",
    "attention": "how it is computed",
    "scan_unroll": "how it is computed",
    "remat": "how it is computed",
}
# The same of `SegmentHeadConfig`.
NO_HEAD_FACTS = {
    "kind": "names show it",
    "channels": "shapes show it",
    "dropout": "training only",
    "auxiliary_channels": "shapes show it, names where there is no such head",
    "auxiliary_convs": "names show it",
    "auxiliary_concat": "names show it",
    "auxiliary_weight": "training only",
}


def value_of(config: JsonObject, setting: str) -> Json:
    """The value of a setting by its full name; None where the config lacks it."""
    value: Json = config
    for part in setting.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def comparable(source: JsonObject, target: JsonObject) -> tuple[str, ...]:
    """Names of the facts that the target has and that are to be compared with the source's."""
    return tuple(
        name
        for name, fact in FACTS.items()
        if stated(target, name) and fact.compared(source, target)
    )


def stated(config: JsonObject, name: str) -> bool:
    """Whether a config says a fact."""
    return value_of(config, FACTS[name].setting) not in (None, [], ())


def differences(source: JsonObject, target: JsonObject) -> tuple[Difference, ...]:
    """The facts in which a checkpoint differs from the model that it is to start.

    Args:
      source: the config saved with the checkpoint, as plain dicts. A fact that it does not state
        does not differ.
      target: the config of the job, as plain dicts.
    """
    found = []
    for name in comparable(source, target):
        fact = FACTS[name]
        there, here = value_of(source, fact.setting), value_of(target, fact.setting)
        if stated(source, name) and not fact.same(there, here):
            found.append(Difference(name=name, source=there, target=here))
    return tuple(found)
