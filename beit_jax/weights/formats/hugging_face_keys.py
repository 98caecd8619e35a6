"""Hugging Face's names of a BEiT's encoder: transformers 4's, which files have, and 5's.

transformers 5 renames parameters on loading and writes the old names again on saving.
"""

import re

from beit_jax.weights.keys import CONV, LINEAR, Table, norm, row, weight_and_bias

_BLOCK = "encoder/blocks"
_ATTENTION = f"{_BLOCK}/attention"
_LAYER = "beit.encoder.layer.{}"
_TABLES = "attention.relative_position_bias."
_LIVE = r"beit.encoder.layer.\1.attention"

ENCODER: Table = (
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

# Names that parameters have in a model of transformers 5, which `save_pretrained` translates to
# those of version 4 and `state_dict` does not.
_VERSION_5 = (
    (
        r"^beit\.layers\.(\d+)\.relative_position_bias\.",
        rf"{_LIVE}.{_TABLES}",
    ),
    (r"^beit\.layers\.(\d+)\.attention\.q_proj\.", rf"{_LIVE}.attention.query."),
    (r"^beit\.layers\.(\d+)\.attention\.k_proj\.", rf"{_LIVE}.attention.key."),
    (r"^beit\.layers\.(\d+)\.attention\.v_proj\.", rf"{_LIVE}.attention.value."),
    (r"^beit\.layers\.(\d+)\.attention\.o_proj\.", rf"{_LIVE}.output.dense."),
    (r"^beit\.layers\.(\d+)\.mlp\.fc1\.", r"beit.encoder.layer.\1.intermediate.dense."),
    (r"^beit\.layers\.(\d+)\.mlp\.fc2\.", r"beit.encoder.layer.\1.output.dense."),
    (r"^beit\.layers\.", "beit.encoder.layer."),
    (r"^beit\.shared_position_bias\.", "beit.encoder.relative_position_bias."),
)


def version_4(key: str) -> str:
    """The name that transformers 4 has for a parameter of transformers 5, or of its own."""
    for pattern, name in _VERSION_5:
        renamed = re.sub(pattern, name, key)
        if renamed != key:
            return renamed
    return key
