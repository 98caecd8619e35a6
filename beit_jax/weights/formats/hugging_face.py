"""Hugging Face: a folder with config, safetensors, image processor and model card.

The key names are the hub's (`microsoft/beit-*`), which are transformers 4's own; transformers 5
renames them on loading and writes them again on saving.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from beit_jax.config import ModelConfig
from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.weights import resize
from beit_jax.weights.description import Description
from beit_jax.weights.keys import CONV, LINEAR, Table, norm, row, weight_and_bias
from beit_jax.weights.report import WeightsError

_BLOCK = "encoder/blocks"
_ATTENTION = f"{_BLOCK}/attention"
_LAYER = "beit.encoder.layer.{}"

_ENCODER: Table = (
    row("beit.embeddings.cls_token", "encoder/cls_token"),
    row("beit.embeddings.mask_token", "encoder/mask_token"),
    row("beit.embeddings.position_embeddings", "encoder/pos_embed"),
    *weight_and_bias("beit.embeddings.patch_embeddings.projection", "encoder/patch_embed", CONV),
    row(
        "beit.encoder.relative_position_bias.relative_position_bias_table",
        "encoder/relative_position_bias/table",
    ),
    row(f"{_LAYER}.lambda_1", f"{_BLOCK}/gamma_1"),
    row(f"{_LAYER}.lambda_2", f"{_BLOCK}/gamma_2"),
    *weight_and_bias(f"{_LAYER}.attention.attention.query", f"{_ATTENTION}/query", LINEAR),
    row(f"{_LAYER}.attention.attention.key.weight", f"{_ATTENTION}/key/kernel", LINEAR),
    *weight_and_bias(f"{_LAYER}.attention.attention.value", f"{_ATTENTION}/value", LINEAR),
    row(
        f"{_LAYER}.attention.attention.relative_position_bias.relative_position_bias_table",
        f"{_ATTENTION}/relative_position_bias/table",
    ),
    *weight_and_bias(f"{_LAYER}.attention.output.dense", f"{_ATTENTION}/proj", LINEAR),
    *weight_and_bias(f"{_LAYER}.intermediate.dense", f"{_BLOCK}/mlp/fc1", LINEAR),
    *weight_and_bias(f"{_LAYER}.output.dense", f"{_BLOCK}/mlp/fc2", LINEAR),
    *norm(f"{_LAYER}.layernorm_before", f"{_BLOCK}/norm1"),
    *norm(f"{_LAYER}.layernorm_after", f"{_BLOCK}/norm2"),
)

# The final norm has two names: BeitForMaskedImageModeling holds it beside BeitModel, the others
# inside. `use_mean_pooling` must be true for the former, or BeitModel adds a second one.
TABLES: dict[str, Table] = {
    "pretrain": (
        *_ENCODER,
        *norm("layernorm", "encoder/norm"),
        *weight_and_bias("lm_head", "lm_head", LINEAR),
    ),
    "classify": (
        *_ENCODER,
        *norm("beit.layernorm", "encoder/norm"),
        *norm("beit.pooler.layernorm", "fc_norm"),
        *weight_and_bias("classifier", "head", LINEAR),
    ),
    "encoder": (
        *_ENCODER,
        *norm("beit.layernorm", "encoder/norm"),
        *norm("beit.pooler.layernorm", "fc_norm"),
    ),
}
CLASSES = {
    "pretrain": "BeitForMaskedImageModeling",
    "classify": "BeitForImageClassification",
    "encoder": "BeitModel",
}
PIL_BICUBIC = 3


def config_json(description: Description) -> dict[str, Any]:
    """`config.json`."""
    model = description.model
    config = {
        "architectures": [CLASSES[description.task]],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": model.drop_path_rate,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": model.width,
        "image_size": model.image_size,
        "initializer_range": 0.02,
        "intermediate_size": model.mlp_width,
        # Published configs say 1e-12 where the official code has 1e-6; ours says what is true.
        "layer_norm_eps": model.layer_norm_epsilon,
        "layer_scale_init_value": model.layer_scale_init or 0.0,
        "model_type": "beit",
        "num_attention_heads": model.heads,
        "num_channels": 3,
        "num_hidden_layers": model.layers,
        "patch_size": model.patch_size,
        "torch_dtype": "float32",
        "use_absolute_position_embeddings": model.positions == "absolute",
        "use_mask_token": description.task == "pretrain" or description.mask_token,
        "use_mean_pooling": description.task == "pretrain" or description.pooling != "cls",
        "use_relative_position_bias": model.positions == "relative_per_block",
        "use_shared_relative_position_bias": model.positions == "relative_shared",
        "vocab_size": description.outputs if description.task == "pretrain" else 8192,
    }
    if description.task == "classify":
        labels = description.labels or [f"LABEL_{i}" for i in range(description.outputs)]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
        config["num_labels"] = description.outputs
    return config


def preprocessor_json(description: Description) -> dict[str, Any]:
    """`preprocessor_config.json`: straight to the model's size, bicubic; mean and deviation."""
    mean, std = NORMALIZATIONS[description.normalization]
    size = {"height": description.model.image_size, "width": description.model.image_size}
    return {
        "image_processor_type": "BeitImageProcessor",
        "crop_size": size,
        "do_center_crop": False,
        "do_normalize": True,
        "do_reduce_labels": False,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": PIL_BICUBIC,
        "rescale_factor": 1 / 255,
        "size": size,
    }


def canonical(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A saved `BeitModel` lacks the prefix that the larger models' files have."""
    if "embeddings.cls_token" in state:
        return {f"beit.{key}": array for key, array in state.items()}
    return dict(state)


def description_of(
    state: Mapping[str, np.ndarray], config: Mapping[str, Any], *, normalization: str, source: str
) -> Description:
    """What a folder holds, by its `config.json` and, for the head, its keys.

    Args:
      state: as `canonical` gives it.
      config: `config.json`.
      normalization: "half" or "imagenet", from the image processor or the caller.
      source: for messages.

    Raises:
      WeightsError: no BEiT, or a key of the config is missing.
    """
    if config.get("model_type") not in ("beit", "data2vec-vision"):
        raise WeightsError(f"{source}: config.json is of a {config.get('model_type')!r}, no BEiT")
    positions = "absolute"
    if config.get("use_shared_relative_position_bias"):
        positions = "relative_shared"
    elif config.get("use_relative_position_bias"):
        positions = "relative_per_block"
    # Published configs say 1e-12; what the official models were trained with is 1e-6.
    epsilon = config.get("layer_norm_eps", 1e-6)
    epsilon = 1e-6 if epsilon == 1e-12 else epsilon
    try:
        model = ModelConfig(
            layers=config.get("num_hidden_layers", 12),
            width=config.get("hidden_size", 768),
            heads=config.get("num_attention_heads", 12),
            mlp_width=config.get("intermediate_size", 3072),
            image_size=config.get("image_size", 224),
            patch_size=config.get("patch_size", 16),
            positions=positions,
            layer_scale_init=config.get("layer_scale_init_value", 0.1) or None,
            drop_path_rate=config.get("drop_path_rate", 0.1),
            layer_norm_epsilon=epsilon,
        )
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{source}: config.json: {error}") from None
    outputs, task, labels = 0, "encoder", ()
    if "lm_head.weight" in state:
        task, outputs = "pretrain", config.get("vocab_size", 8192)
    elif "classifier.weight" in state:
        task, outputs = "classify", state["classifier.weight"].shape[0]
        names = config.get("id2label", {})
        labels = tuple(str(names[key]) for key in sorted(names, key=int))
    if task == "pretrain" or "beit.pooler.layernorm.weight" in state:
        pooling = "mean"
    else:
        pooling = "cls" if "beit.layernorm.weight" in state else "none"
    return Description(
        task=task,
        model=model,
        outputs=outputs,
        pooling=pooling,
        mask_token=task == "encoder" and "beit.embeddings.mask_token" in state,
        normalization=normalization,
        labels=labels if len(labels) == outputs else (),
    )


def normalization_of(preprocessor: Mapping[str, Any]) -> str | None:
    """Which normalisation a `preprocessor_config.json` has; None where it is another one."""
    for name, (mean, std) in NORMALIZATIONS.items():
        given = [preprocessor.get("image_mean", ()), preprocessor.get("image_std", ())]
        if np.shape(given) == (2, 3) and np.allclose(given, [mean, std]):
            return name
    return None


def model_card(
    description: Description,
    *,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    source: str,
    name: str,
) -> str:
    """`README.md`: what it is, how it was made, how to load it.

    Args:
      description: what it is.
      config: the run's config.
      summary: numbers about the run; empty where there are none.
      source: the checkpoint.
      name: the folder's name.
    """
    model = description.model
    kind = {
        "pretrain": "pre-trained by masked image modelling",
        "classify": f"fine-tuned to tell {description.outputs} classes apart",
        "encoder": "an encoder without a head",
    }[description.task]
    positions = {
        "relative_shared": "one relative-position-bias table for all blocks",
        "relative_per_block": "a relative-position-bias table for each block",
        "absolute": "learned absolute positions",
    }[model.positions]
    tag = {
        "pretrain": "image-feature-extraction",
        "classify": "image-classification",
        "encoder": "image-feature-extraction",
    }[description.task]
    mean, std = NORMALIZATIONS[description.normalization]
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {tag}",
        "tags: [beit, vision, beit_jax]",
        "---",
        "",
        f"# {name}",
        "",
        f"BEiT (arXiv 2106.08254), {kind} with beit_jax.",
        "",
        f"- {model.layers} layers, width {model.width}, {model.heads} heads, MLP {model.mlp_width}",
        f"- images {model.image_size} × {model.image_size}, patches of {model.patch_size} pixels",
        f"- {positions}; LayerScale {'yes' if model.layer_scale_init else 'no'};"
        f" LayerNorm epsilon {model.layer_norm_epsilon:g}",
        f"- pixels in [0, 1], mean {mean}, standard deviation {std}",
        "",
        "```python",
        f"from transformers import {CLASSES[description.task]}",
        "",
        f"model = {CLASSES[description.task]}.from_pretrained({name!r})",
        "```",
    ]
    data, run = config.get("data", {}), config.get("run", {})
    optimizer = config.get("optimizer", {})
    lines += ["", "## Data", ""]
    lines += [
        f"- {key.replace('_', ' ')}: {data[key]}"
        for key in ("source", "eval_source", "image_size", "normalization")
        if data.get(key)
    ]
    if run or optimizer:
        lines += ["", "## Recipe", ""]
        lines += [f"- {k.replace('_', ' ')}: {run[k]}" for k in _RUN_KEYS if run.get(k)]
        lines += [f"- {k.replace('_', ' ')}: {v}" for k, v in optimizer.items() if v is not None]
    if "tokenizer" in config and config["tokenizer"].get("kind"):
        tokenizer = config["tokenizer"]
        meaning = " with RANDOM weights" if tokenizer.get("random_weights") else ""
        lines.append(f"- tokenizer: {tokenizer['kind']}{meaning}, {tokenizer['vocabulary']} tokens")
    if summary:
        lines += ["", "## Metrics", "", "| | |", "|---|---|"]
        lines += [f"| {k.replace('_', ' ')} | {_number(v)} |" for k, v in summary.items() if v]
    lines += ["", f"Exported from `{source}`. The whole config:", "", "```json"]
    lines += [json.dumps(config, indent=2), "```", ""]
    return "\n".join(lines)


_RUN_KEYS = ("steps", "batch_size", "init_from")


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def grid_of(state: Mapping[str, np.ndarray]) -> int | None:
    """The patch grid that a state dict's tables or positions are for."""
    for key, array in state.items():
        if key.endswith("relative_position_bias_table"):
            return resize.grid_of_table(array.shape[0])
        if key.endswith(("position_embeddings", "pos_embed")):
            return round((array.shape[1] - 1) ** 0.5)
    return None
