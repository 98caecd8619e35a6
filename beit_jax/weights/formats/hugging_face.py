"""Hugging Face: a folder with config, safetensors, image processor and model card.

The key names are the hub's (`microsoft/beit-*`), which are transformers 4's own; transformers 5
renames them on loading and writes them again on saving.
"""

from etils import epath

from beit_jax.config import ModelConfig
from beit_jax.files import write_json, write_whole
from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.types import JsonObject
from beit_jax.weights import containers, keys
from beit_jax.weights.description import Description, normalization_of
from beit_jax.weights.formats.format import Export, Format, Opened, Reader, State, Written
from beit_jax.weights.formats.model_card import model_card
from beit_jax.weights.formats.unilm import is_index_buffer
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
FILES = ("config.json", "preprocessor_config.json", "README.md", "model.safetensors")
PIL_BICUBIC = 3


def config_json(description: Description) -> JsonObject:
    """`config.json`: what transformers builds the model from."""
    model = description.model
    config: JsonObject = {
        "architectures": [CLASSES[description.task]],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": model.drop_path_rate,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": model.width,
        "image_size": model.image_size,
        "initializer_range": 0.02,
        "intermediate_size": model.mlp_width,
        # Published configs say 1e-12 where the official code has 1e-6; the value here is true.
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


def preprocessor_json(description: Description) -> JsonObject:
    """`preprocessor_config.json`: bicubic, straight to the model's size, then normalised."""
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


def write(export: Export) -> Written:
    """Writes the folder that transformers' `from_pretrained` loads.

    Raises:
      WeightsError: the output is a file.
    """
    folder, description = epath.Path(export.output), export.description
    if folder.exists() and not folder.is_dir():
        raise WeightsError(f"{export.output} is a file; a Hugging Face export is a folder")
    class_name = CLASSES[description.task]
    for name, value in (
        ("config.json", config_json(description)),
        ("preprocessor_config.json", preprocessor_json(description)),
    ):
        write_json(folder / name, value)
    card = model_card(
        description,
        class_name=class_name,
        config=export.config,
        metrics=export.metrics,
        source=export.source,
        name=folder.name,
    )
    write_whole(folder / "README.md", card.encode())
    state = keys.to_foreign(export.params, TABLES[description.task])
    # "format" is what transformers looks for first.
    containers.write_safetensors(
        str(folder / "model.safetensors"), state, metadata={"format": "pt"}
    )
    return Written(
        load=f"transformers.{class_name}.from_pretrained({export.output!r})",
        used=tuple(export.params),
        files={name: str(folder / name) for name in FILES},
    )


def detect(opened: Opened) -> bool:
    """Whether the keys are those of transformers' BEiT, with its prefix or without."""
    return any(key.startswith("beit.") for key in canonical(opened.state))


def canonical(state: State) -> State:
    """Adds the prefix that the larger models' files have to the keys of a saved `BeitModel`."""
    if "embeddings.cls_token" in state:
        return {f"beit.{key}": array for key, array in state.items()}
    return state


def describe(opened: Opened, *, normalization: str, heads: int) -> Description:
    """Describes a folder by its `config.json` and, for the head, its keys.

    Args:
      opened: its keys as `canonical` gives them.
      normalization: of the pixels; "" takes the image processor's, and "half" without one.
      heads: ignored, since the config says.

    Raises:
      WeightsError: there is no config, it is not a BEiT's or has an impossible value, or the image
        processor normalises differently.
    """
    config, state = opened.config, opened.state
    if not config:
        raise WeightsError(
            f"{opened.path} has Hugging Face's keys; give the folder that also has config.json"
        )
    if opened.preprocessor and not normalization:
        mean, std = (opened.preprocessor.get(key, ()) for key in ("image_mean", "image_std"))
        normalization = normalization_of(
            mean, std, source=f"{opened.path}: preprocessor_config.json"
        )
    model = _model_config(config, source=opened.path)
    task, outputs, labels = "encoder", 0, tuple[str, ...]()
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
        normalization=normalization or "half",
        labels=labels if len(labels) == outputs else (),
    )


def _model_config(config: JsonObject, *, source: str) -> ModelConfig:
    if config.get("model_type") not in ("beit", "data2vec-vision"):
        found = config.get("model_type")
        raise WeightsError(f"{source}: config.json describes a {found!r}, not a BEiT")
    positions = "absolute"
    if config.get("use_shared_relative_position_bias"):
        positions = "relative_shared"
    elif config.get("use_relative_position_bias"):
        positions = "relative_per_block"
    # Published configs say 1e-12; the official models were trained with 1e-6.
    epsilon = config.get("layer_norm_eps", 1e-6)
    epsilon = 1e-6 if epsilon == 1e-12 else epsilon
    try:
        return ModelConfig(
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


FORMAT = Format(
    name="hugging_face",
    help="a folder that transformers' from_pretrained loads",
    suffix="",
    write=write,
    reader=Reader(
        detect=detect,
        describe=describe,
        table=lambda description: TABLES[description.task],
        canonical=canonical,
        rebuilt=is_index_buffer,
    ),
)
