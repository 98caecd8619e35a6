"""timm: a safetensors file for `timm.create_model("beit_base_patch16_224", ...)`, loaded strictly.

timm's names are the official ones (`unilm.TABLE`) without index buffers. Its BEiT has no mask
token and no head for visual tokens: of a pre-training checkpoint the encoder is exported, with its
final norm, and the shared relative-position table is copied to every block.
"""

import dataclasses
import json

import numpy as np

from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.types import FlatParams, JsonObject
from beit_jax.weights import adapt, containers, keys
from beit_jax.weights.description import Description, normalization_of
from beit_jax.weights.formats import unilm
from beit_jax.weights.formats.format import Export, Format, Opened, Reader, Written
from beit_jax.weights.report import allowed

# Parameters of a pre-training checkpoint that timm's model does not have.
NOT_IN_TIMM = ("encoder/mask_token", "lm_head")

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
    params: FlatParams, description: Description
) -> tuple[dict[str, np.ndarray], Description, list[str]]:
    """Keeps what timm's model takes: per-block tables, no mask token, no `lm_head`.

    Returns:
      The parameters (flat), their description, and the names left out.
    """
    left_out = [name for name in params if allowed(name, NOT_IN_TIMM)]
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


def create_model_arguments(description: Description) -> tuple[str, JsonObject]:
    """The name and keyword arguments of `timm.create_model` that give this model.

    Args:
      description: as `reduce` gives it.
    """
    model = description.model
    size = _SIZES.get((model.layers, model.width, model.heads, model.mlp_width))
    known = size is not None and model.patch_size == 16
    name = _NAMES.get((size or "", model.image_size)) if known else None
    arguments: JsonObject = {}
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
        # Without mean pooling timm ends in `norm`, as this encoder does; "" returns every token.
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


def hub_config(description: Description) -> JsonObject:
    """The `config.json` with which `timm.create_model("hf-hub:OWNER/NAME")` finds the model."""
    name, arguments = create_model_arguments(description)
    mean, std = NORMALIZATIONS[description.normalization]
    size, classes = description.model.image_size, description.outputs
    return {
        "architecture": name,
        "num_classes": classes,
        "num_features": description.model.width,
        "model_args": {k: v for k, v in arguments.items() if k != "num_classes"},
        "pretrained_cfg": {
            "num_classes": classes,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(mean),
            "std": list(std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def write(export: Export) -> Written:
    """Writes the safetensors file; a pre-training checkpoint's head and mask token are left out."""
    shared = export.description.model.positions == "relative_shared"
    params, description, left_out = reduce(export.params, export.description)
    state = keys.to_foreign(params, unilm.TABLE)
    containers.write_safetensors(export.output, state, metadata=metadata(description))
    return Written(
        load=create_model_call(description, path=export.output),
        used=tuple(params),
        left_out=tuple(left_out),
        reshaped=(f"{adapt.SHARED_TABLE} → {adapt.BLOCK_TABLE}, copies",) if shared else (),
        files={
            "model.safetensors": export.output,
            "config.json": (json.dumps(hub_config(description), indent=2) + "\n").encode(),
        },
    )


def detect(opened: Opened) -> bool:
    """Whether the keys are the official ones in a safetensors file, as timm saves them."""
    return opened.path.endswith(".safetensors") and unilm.has_official_keys(opened.state)


def describe(opened: Opened, *, normalization: str, heads: int) -> Description:
    """Describes a file by its shapes and by what `metadata` or timm's `config.json` adds."""
    arguments = opened.config.get("model_args", {})
    if "timm" in opened.metadata:
        arguments = json.loads(opened.metadata["timm"])["arguments"]
    return unilm.describe(
        opened,
        normalization=normalization or _stated_normalization(opened),
        heads=heads or arguments.get("num_heads", 0),
    )


def _stated_normalization(opened: Opened) -> str:
    """The normalisation that the file or its config names; "" where neither does."""
    settings = opened.config.get("pretrained_cfg", opened.config)
    if "mean" in settings and "std" in settings:
        source = f"{opened.path}: config.json"
        return normalization_of(settings["mean"], settings["std"], source=source)
    return opened.metadata.get("normalization", "")


FORMAT = Format(
    name="timm",
    help="a .safetensors file that timm.create_model loads strictly",
    suffix=".safetensors",
    write=write,
    reader=Reader(
        detect=detect,
        describe=describe,
        table=lambda description: unilm.TABLE,
        rebuilt=unilm.is_index_buffer,
    ),
)
