"""timm: a safetensors file for `timm.create_model("beit_base_patch16_224", ...)`, loaded strictly.

timm's names are the official ones (`unilm.TABLE`) without index buffers. Its BEiT has no mask
token and no head for visual tokens: of a pre-training checkpoint the encoder is exported, with its
final norm, and the shared relative-position table is copied to every block.
"""

import dataclasses
import json

import numpy as np

from beit_jax.types import FlatParams, JsonObject
from beit_jax.weights import adapt, containers, keys
from beit_jax.weights.description import Description
from beit_jax.weights.formats import official, timm_arguments, timm_config, unilm
from beit_jax.weights.formats.format import (
    Described,
    Export,
    Format,
    Opened,
    Reader,
    Stated,
    Written,
)
from beit_jax.weights.report import allowed

# Parameters of a pre-training checkpoint that timm's model does not have.
NOT_IN_TIMM = ("encoder/mask_token", "lm_head")


def reduce(
    params: FlatParams, description: Description
) -> tuple[dict[str, np.ndarray], Description, list[str]]:
    """Keeps what timm's model takes: per-block tables, no mask token, no `lm_head`.

    Returns:
      The parameters (flat), their description, and the names left out.
    """
    left_out = [name for name in params if allowed(name, NOT_IN_TIMM)]
    if description.task == "segment":
        left_out = [name for name in params if not name.startswith("encoder/")]
    kept = {name: array for name, array in params.items() if name not in left_out}
    model = description.model
    if model.positions == "relative_shared":
        kept = adapt.per_block(kept)
        model = dataclasses.replace(model, positions="relative_per_block")
    task, pooling = description.task, description.pooling
    if task == "pretrain":
        task, pooling = "encoder", "cls"
    if task == "segment":
        task, pooling = "encoder", "none"
    description = dataclasses.replace(
        description,
        task=task,
        model=model,
        pooling=pooling,
        mask_token=False,
        outputs=description.outputs if task == "classify" else 0,
        labels=description.labels if task == "classify" else (),
        head=None,
    )
    return kept, description, left_out


def create_model_call(description: Description, *, config: JsonObject, path: str) -> str:
    """The line of Python that loads the file at `path`."""
    name, arguments = timm_config.create_model_arguments(description, config=config)
    parts = [repr(name), f"checkpoint_path={path!r}"]
    overlay = arguments.get("pretrained_cfg_overlay", {})
    if overlay:  # tuples, as timm's own
        overlay = {k: tuple(v) if isinstance(v, list) else v for k, v in overlay.items()}
        arguments["pretrained_cfg_overlay"] = overlay
    parts += [f"{key}={value!r}" for key, value in arguments.items()]
    return f"timm.create_model({', '.join(parts)})"


def metadata(description: Description, *, config: JsonObject) -> dict[str, str]:
    """For the safetensors header: what the file is and how to make the model for it."""
    name, arguments = timm_config.create_model_arguments(description, config=config)
    return {
        "format": "pt",
        "timm": json.dumps({"name": name, "arguments": arguments}),
        "normalization": description.normalization,
        official.OWN: official.own_entry(description, config=config),
    }


def hub_config(description: Description, *, config: JsonObject) -> JsonObject:
    """The `config.json` with which `timm.create_model("hf-hub:OWNER/NAME")` finds the model."""
    name, arguments = timm_config.create_model_arguments(description)
    result: JsonObject = {
        "architecture": name,
        "num_classes": description.outputs,
        "num_features": description.model.width,
        "model_args": {k: v for k, v in arguments.items() if k != "num_classes"},
        "pretrained_cfg": timm_config.pretrained_cfg(description, config=config),
    }
    if "global_pool" in arguments or description.task == "classify":
        result["global_pool"] = arguments.get("global_pool", "avg")
    if description.labels:
        result["label_names"] = list(description.labels)
    return result


def write(export: Export) -> Written:
    """Writes the safetensors file; a pre-training checkpoint's head and mask token are left out.

    Raises:
      WeightsError: timm's models have another epsilon.
    """
    official.check_epsilon(export.description, format="timm's models")
    shared = export.description.model.positions == "relative_shared"
    params, description, left_out = reduce(export.params, export.description)
    state = keys.to_foreign(params, unilm.TABLE)
    header = metadata(description, config=export.config)
    containers.write_safetensors(export.output, state, metadata=header)
    config = hub_config(description, config=export.config)
    return Written(
        load=create_model_call(description, config=export.config, path=export.output),
        used=tuple(params),
        left_out=tuple(left_out),
        reshaped=(f"{adapt.SHARED_TABLE} → {adapt.BLOCK_TABLE}, copies",) if shared else (),
        files={
            "model.safetensors": export.output,
            "config.json": (json.dumps(config, indent=2) + "\n").encode(),
        },
    )


def detect(opened: Opened) -> bool:
    """Whether the keys are the official ones, in a safetensors file or beside timm's config."""
    is_timm = opened.path.endswith(".safetensors") or "architecture" in opened.config
    return is_timm and official.has_official_keys(opened.state)


def describe(opened: Opened, *, stated: Stated) -> Described:
    """Describes a file by timm's `config.json` or its own header, and by names and shapes."""
    said = timm_config.known(opened, stated=stated)
    return timm_arguments.describe(opened, stated=stated, said=said)


FORMAT = Format(
    name="timm",
    help="a .safetensors file that timm.create_model loads strictly",
    suffix=".safetensors",
    kinds=("pretrain", "classify", "encoder", "segment"),
    write=write,
    reader=Reader(
        detect=detect,
        describe=describe,
        table=lambda description: unilm.TABLE,
        in_encoder=official.in_encoder,
        rebuilt=unilm.is_index_buffer,
    ),
)
