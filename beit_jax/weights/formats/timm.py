"""timm: a safetensors file for `timm.create_model("beit_base_patch16_224", ...)`, loaded strictly.

timm's names are the official ones (`unilm.TABLE`) without index buffers. Its BEiT has no mask
token and no head for visual tokens: of a pre-training checkpoint the encoder is exported, with its
final norm, and the shared relative-position table is copied to every block.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from beit_jax.weights import adapt
from beit_jax.weights.description import Description

# Parameters of a pre-training checkpoint that timm's model has no place for.
WITHOUT_PLACE = ("encoder/mask_token", "lm_head")

# (layers, width, heads, mlp_width) → size in timm's names.
_SIZES = {(12, 768, 12, 3072): "base", (24, 1024, 16, 4096): "large"}
_NAMES = {
    ("base", 224): "beit_base_patch16_224",
    ("base", 384): "beit_base_patch16_384",
    ("large", 224): "beit_large_patch16_224",
    ("large", 384): "beit_large_patch16_384",
    ("large", 512): "beit_large_patch16_512",
}


def reduce(
    params: Mapping[str, np.ndarray], description: Description
) -> tuple[dict[str, np.ndarray], Description, list[str]]:
    """What timm's model takes: per-block tables, no mask token, no `lm_head`.

    Returns:
      The parameters (flat), their description, and the names left out.
    """
    left_out = [
        name for name in params if name.startswith(tuple(f"{p}/" for p in WITHOUT_PLACE))
    ] + [name for name in params if name in WITHOUT_PLACE]
    kept = {name: array for name, array in params.items() if name not in left_out}
    model = description.model
    if model.positions == "relative_shared":
        kept = adapt.per_block(kept)
        model = dataclasses.replace(model, positions="relative_per_block")
    task, pooling = description.task, description.pooling
    if task == "pretrain":
        task, pooling = "encoder", "cls"
    description = dataclasses.replace(
        description,
        task=task,
        model=model,
        pooling=pooling,
        mask_token=False,
        outputs=description.outputs if task == "classify" else 0,
    )
    return kept, description, left_out


def create_model_arguments(description: Description) -> tuple[str, dict[str, Any]]:
    """The name and keyword arguments of `timm.create_model` that give this model.

    Args:
      description: as `reduce` gives it.
    """
    model = description.model
    size = _SIZES.get((model.layers, model.width, model.heads, model.mlp_width))
    name = _NAMES.get((size, model.image_size)) if model.patch_size == 16 else None
    arguments: dict[str, Any] = {}
    if name is None:
        name = "beit_base_patch16_224"
        arguments |= {
            "img_size": model.image_size,
            "patch_size": model.patch_size,
            "embed_dim": model.width,
            "depth": model.layers,
            "num_heads": model.heads,
            "mlp_ratio": model.mlp_width / model.width,
        }
    if model.positions == "absolute":
        arguments |= {"use_abs_pos_emb": True, "use_rel_pos_bias": False}
    if model.layer_scale_init is None:
        arguments["init_values"] = 0.0  # not None: create_model leaves out what is None
    if description.task == "encoder":
        arguments["num_classes"] = 0
    elif description.outputs != 1000:
        arguments["num_classes"] = description.outputs
    if description.pooling != "mean":
        # Without mean pooling timm ends in `norm`, as our encoder does; "" returns every token.
        arguments["global_pool"] = "token" if description.task == "classify" else ""
    return name, arguments


def create_model_call(description: Description, *, path: str) -> str:
    """The line of Python that loads the file at `path`."""
    name, arguments = create_model_arguments(description)
    parts = [repr(name), f"checkpoint_path={path!r}"]
    parts += [f"{key}={value!r}" for key, value in arguments.items()]
    return f"timm.create_model({', '.join(parts)})"


def metadata(description: Description) -> dict[str, str]:
    """For the safetensors header: what the file is and how to make the model for it."""
    name, arguments = create_model_arguments(description)
    return {
        "format": "pt",
        "timm": json.dumps({"name": name, "arguments": arguments}),
        "normalization": description.normalization,
    }
