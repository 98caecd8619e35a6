"""The model card of a Hugging Face folder: what the model is, how it was made, how to load it."""

import json
import os

from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.types import Json, JsonObject
from beit_jax.weights.description import Description

_KINDS = {
    "pretrain": "pre-trained by masked image modelling",
    "classify": "fine-tuned to tell {outputs} classes apart",
    "segment": "fine-tuned to give every pixel one of {outputs} classes",
    "encoder": "an encoder without a head",
}
_ORIGINS = {
    "pretrain": "a masked image model",
    "classify": "a classifier of {outputs} classes",
    "segment": "a segmentation model of {outputs} classes",
    "encoder": "an encoder without a head",
}
_TAGS = {
    "pretrain": "image-feature-extraction",
    "classify": "image-classification",
    "segment": "image-segmentation",
    "encoder": "image-feature-extraction",
}
_POSITIONS = {
    "relative_shared": "one relative-position-bias table for all blocks",
    "relative_per_block": "a relative-position-bias table for each block",
    "absolute": "learned absolute positions",
}
_DATA_KEYS = ("source", "eval_source", "image_size", "normalization")
_RUN_KEYS = ("steps", "batch_size", "init_from")


def model_card(
    description: Description,
    *,
    class_name: str,
    config: JsonObject,
    metrics: JsonObject,
    source: str,
    name: str,
) -> str:
    """The text of `README.md`, with the hub's front matter.

    Args:
      description: what the model is.
      class_name: of the class in transformers that loads it.
      config: the run's config.
      metrics: the numbers of these parameters' step; empty where there are none.
      source: the checkpoint.
      name: the folder's name.
    """
    lines = [
        *_architecture(description, config=config, class_name=class_name, name=name),
        *_recipe(config),
        *_metrics(metrics),
        "",
        # A card is published: no paths of the machine that wrote it.
        f"Exported from `{os.path.basename(source.rstrip('/'))}`. The whole config:",
        "",
        "```json",
        json.dumps(_published(config), indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _published(config: JsonObject) -> JsonObject:
    """The config without the place that a file was imported from."""
    origin = config.get("imported_from")
    if not isinstance(origin, dict) or not isinstance(origin.get("source"), str):
        return config
    name = origin["source"]
    if not name.startswith("hf:"):
        name = os.path.basename(name.rstrip("/"))
    return config | {"imported_from": origin | {"source": name}}


def _architecture(
    description: Description, *, config: JsonObject, class_name: str, name: str
) -> list[str]:
    model = description.model
    mean, std = NORMALIZATIONS[description.normalization]
    made = _KINDS[description.task].format(outputs=description.outputs) + " with beit_jax"
    if "imported_from" in config:  # somebody else's, who may have trained it with anything
        what = _ORIGINS[description.task].format(outputs=description.outputs)
        made = f"{what}, converted by beit_jax"
    return [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {_TAGS[description.task]}",
        "tags: [beit, vision, beit_jax]",
        "---",
        "",
        f"# {name}",
        "",
        f"BEiT (arXiv 2106.08254), {made}.",
        "",
        f"- {model.layers} layers, width {model.width}, {model.heads} heads, MLP {model.mlp_width}",
        f"- images {model.image_size} × {model.image_size}, patches of {model.patch_size} pixels",
        f"- {_POSITIONS[model.positions]}; LayerScale {'yes' if model.layer_scale_init else 'no'};"
        f" LayerNorm epsilon {model.layer_norm_epsilon:g}",
        f"- pixels in [0, 1], mean {mean}, standard deviation {std}",
        *_head(description),
        "",
        "```python",
        f"from transformers import {class_name}",
        "",
        f"model = {class_name}.from_pretrained({name!r})",
        "```",
    ]


def _head(description: Description) -> list[str]:
    """What a segmentation model reads of the encoder, which no tensor shows."""
    head = description.head
    if head is None:
        return []
    blocks = ", ".join(map(str, head.blocks))
    auxiliary = "with" if head.auxiliary_channels else "without"
    return [f"- {head.kind} on the outputs of blocks {blocks}, {auxiliary} the auxiliary head"]


def _recipe(config: JsonObject) -> list[str]:
    """The data, the optimizer and the tokenizer, as far as the config has them."""
    data, run = config.get("data", {}), config.get("run", {})
    optimizer, tokenizer = config.get("optimizer", {}), config.get("tokenizer", {})
    lines = ["", "## Data", ""]
    lines += [f"- {k.replace('_', ' ')}: {data[k]}" for k in _DATA_KEYS if data.get(k)]
    if run or optimizer:
        lines += ["", "## Recipe", ""]
        lines += [f"- {k.replace('_', ' ')}: {run[k]}" for k in _RUN_KEYS if run.get(k)]
        lines += [f"- {k.replace('_', ' ')}: {v}" for k, v in optimizer.items() if v is not None]
    if tokenizer.get("kind"):
        meaning = " with RANDOM weights" if tokenizer.get("random_weights") else ""
        lines.append(f"- tokenizer: {tokenizer['kind']}{meaning}, {tokenizer['vocabulary']} tokens")
    return lines


def _metrics(metrics: JsonObject) -> list[str]:
    if not metrics:
        return []
    lines = ["", "## Metrics", "", "| | |", "|---|---|"]
    return lines + [f"| {k.replace('_', ' ')} | {_number(v)} |" for k, v in metrics.items()]


def _number(value: Json) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
