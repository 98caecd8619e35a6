"""The arguments of a timm BEiT, and what its training script saves beside the weights.

As for Hugging Face's config, every argument of the model is in one of three tables: read (`USED`),
refused unless it leaves the function as it is (`ONLY`), or known to act in training alone (`KEPT`).
"""

import dataclasses
import re
from collections.abc import Mapping

from beit_jax.types import Json, JsonObject
from beit_jax.weights.description import Description, normalization_of
from beit_jax.weights.formats import fields, official
from beit_jax.weights.formats.fields import quoted
from beit_jax.weights.formats.format import Described, Opened, State, Stated
from beit_jax.weights.formats.official import Known
from beit_jax.weights.report import WeightsError

# fmt: off
USED = frozenset((
    "num_heads", "global_pool", "use_fc_norm", "img_size", "patch_size", "embed_dim", "depth",
    "mlp_ratio", "num_classes", "use_abs_pos_emb", "use_rel_pos_bias",
    "use_shared_rel_pos_bias", "init_values",
))
ONLY: dict[str, tuple[Json, ...]] = {
    "in_chans": (3, None),
    "qkv_bias": (True, None),
    "swiglu_mlp": (False, None),
    "scale_mlp": (False, None),
    "norm_layer": (None,),
    "act_layer": (None,),
}
KEPT = frozenset((
    "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    "head_init_scale", "drop_block_rate",
))
# fmt: on
_HEADS = {"base": 12, "large": 16}
# timm's names end in the size of the image; the official ones go on.
_TIMM = re.compile(r"beit(v2)?_(base|large)_patch16_\d+(\.\w+)?")
_BEIT = re.compile(r"beit(?![-_ ]?3)")
# Models that share BEiT's names of parameters, and compute something else.
_OTHERS = re.compile(
    r"eva|rope|dino|beit[-_ ]?3|sapiens|lingbot|vit_pe_|deit|swin|convnext|clip|resnet|xcit|cait"
)


def is_beit(name: str, *, source: str) -> bool:
    """Whether a model's name says that it is a BEiT; false where it says nothing.

    Raises:
      WeightsError: it is the name of another architecture.
    """
    if _BEIT.search(name.lower()):
        return True
    if _OTHERS.search(name.lower()):
        raise WeightsError(f"{source}: its architecture is {quoted(name)}, not a BEiT")
    return False


def known(
    arguments: JsonObject, *, name: str, pool: Json | None, state: State, source: str
) -> Known:
    """What the arguments of a timm model say.

    Args:
      arguments: of `timm.create_model`.
      name: the model's.
      pool: what is said of pooling beside the arguments; None for nothing.
      state: the tensors.
      source: for messages.

    Raises:
      WeightsError: an argument is unknown, wrong, or of another function.
    """
    fields.check_fields(arguments, used=USED, only=ONLY, kept=KEPT, source=source)
    pool = arguments.get("global_pool", pool)
    pool = "avg" if pool is None else pool
    if "head.weight" in state and pool == "":
        raise WeightsError(
            f"{source}: global_pool is '': its classifier gives logits of every token, which this"
            " project's do not"
        )
    norm = "fc_norm" if "fc_norm.weight" in state else "norm"
    if "head.weight" in state and (pool, norm) not in (("avg", "fc_norm"), ("token", "norm")):
        raise WeightsError(
            f"{source}: global_pool {quoted(pool)} with the norm {norm!r} (use_fc_norm): this"
            " project's classifiers pool the mean before their norm, or the class token after it"
        )
    heads = 0
    if arguments.get("num_heads") is not None:
        heads = fields.integer(arguments, "num_heads", default=0, source=source)
    return Known(
        beit=True,
        heads=heads or _heads_by_name(name, state),
        arguments=arguments,
        source=source,
        pooling=True,
    )


def _heads_by_name(name: str, state: State) -> int:
    """timm's default for a name; 0 where the width is no multiple of it."""
    width = state["cls_token"].shape[-1] if state["cls_token"].ndim else 0
    return next((n for size, n in _HEADS.items() if size in name and width % n == 0), 0)


def describe(opened: Opened, *, stated: Stated, said: Known) -> Described:
    """Describes a file with official names by everything that timm or a training script says.

    Args:
      opened: the file.
      stated: the caller's own facts.
      said: what its config says.

    Raises:
      WeightsError: as `official.describe`, or what is said is of another model than the tensors.
    """
    said = trained(said, opened, stated=stated)
    described = official.describe(opened, stated=stated, known=said)
    check_sizes(said.arguments, described.description, source=said.source)
    return described


def check_sizes(arguments: JsonObject, description: Description, *, source: str) -> None:
    """Raises WeightsError where arguments are of another model than the tensors make."""
    model = description.model
    for name, ours in (
        ("img_size", model.image_size),
        ("patch_size", model.patch_size),
        ("embed_dim", model.width),
        ("depth", model.layers),
        ("num_heads", model.heads),
    ):
        _same(name, fields.side(arguments, name, default=ours, source=source), ours, source)
    if arguments.get("mlp_ratio") is not None:
        ratio = fields.number(
            arguments, "mlp_ratio", default=4, source=source, least=0.001, most=1000
        )
        _same("embed_dim * mlp_ratio", int(model.width * ratio), model.mlp_width, source)
    if "init_values" in arguments:
        scaled = bool(arguments["init_values"])
        _same("init_values", scaled, model.layer_scale_init is not None, source)
    for name, holds in (
        ("use_abs_pos_emb", model.positions == "absolute"),
        ("use_rel_pos_bias", model.positions == "relative_per_block"),
        ("use_shared_rel_pos_bias", model.positions == "relative_shared"),
        ("use_fc_norm", description.pooling == "mean"),
    ):
        _same(name, fields.flag(arguments, name, default=holds, source=source), holds, source)


def _same(name: str, stated: int, ours: int, source: str) -> None:
    if stated != ours:
        raise WeightsError(f"{source}: {name} is {stated}, but by the tensors it is {ours}")


def trained(known_: Known, opened: Opened, *, stated: Stated) -> Known:
    """Adds what a training script of timm or unilm saved beside the weights.

    Args:
      known_: what is known from elsewhere.
      opened: the file; its `extras` are read.
      stated: the caller's own facts.

    Raises:
      WeightsError: it is another architecture, or a setting is of another function.
    """
    arguments = opened.extras.get("args")
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    arch = opened.extras.get("arch")
    name = arch or arguments.get("model")
    if not isinstance(name, str) or not is_beit(name, source=opened.path):
        return known_
    result = dataclasses.replace(known_, beit=True)
    by_timm = arch == name and _TIMM.fullmatch(name) is not None
    if by_timm or isinstance(arguments.get("model_kwargs"), Mapping):
        source = f"{opened.path}: args"
        extra = arguments.get("model_kwargs")
        said = known(
            dict(extra) if isinstance(extra, Mapping) else {},
            name=name,
            pool=arguments.get("gp"),
            state=opened.state,
            source=source,
        )
        result = dataclasses.replace(
            result,
            heads=known_.heads or said.heads,
            arguments=said.arguments,
            source=source,
            pooling=True,
        )
    elif arguments.get("use_mean_pooling") is False or arguments.get("use_cls") is True:
        result = dataclasses.replace(result, pooling=True)
    elif arch is None and "fc_norm.weight" in opened.state:
        # The official models have this norm where they pool the mean, and only there.
        result = dataclasses.replace(result, pooling=True)
    if not result.normalization and not stated.normalization:
        found = _normalization(arguments, name=name, by_timm=by_timm, source=opened.path)
        result = dataclasses.replace(result, normalization=found)
    return result


def _normalization(arguments: JsonObject, *, name: str, by_timm: bool, source: str) -> str:
    mean, std = arguments.get("mean"), arguments.get("std")
    if isinstance(mean, list) and isinstance(std, list):
        return normalization_of(mean, std, source=f"{source}: args")
    imagenet = arguments.get("imagenet_default_mean_and_std")
    if isinstance(imagenet, bool):
        return "imagenet" if imagenet else "half"  # datasets.py:29-33
    if by_timm and mean is None and std is None:
        return "imagenet" if name.startswith("beitv2") else "half"  # timm's defaults of the name
    return ""
