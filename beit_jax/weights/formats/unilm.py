"""The official format, `microsoft/unilm` beit: a `.pth` with {"model": state dict}.

Names: `modeling_pretrain.py` and `modeling_finetune.py`. timm kept them, so its table is this one.
Queries, keys and values are one matrix; only queries and values have a bias, separately. A file
also holds `relative_position_index` buffers: written from the geometry, ignored when read.
"""

import io

import numpy as np

from beit_jax.files import write_whole
from beit_jax.models.relative_positions import relative_position_index
from beit_jax.types import FlatParams
from beit_jax.weights import keys
from beit_jax.weights.formats import official, timm_arguments
from beit_jax.weights.formats.format import (
    Described,
    Export,
    Format,
    Opened,
    Reader,
    Stated,
    Written,
)
from beit_jax.weights.keys import CONV, FUSED_QKV, LINEAR, Table, norm, row, weight_and_bias
from beit_jax.weights.report import WeightsError

_BLOCK = "encoder/blocks"
_ATTENTION = f"{_BLOCK}/attention"

TABLE: Table = (
    row("cls_token", "encoder/cls_token"),
    row("mask_token", "encoder/mask_token"),
    row("pos_embed", "encoder/pos_embed"),
    *weight_and_bias("patch_embed.proj", "encoder/patch_embed", CONV),
    row("rel_pos_bias.relative_position_bias_table", "encoder/relative_position_bias/table"),
    row("blocks.{}.gamma_1", f"{_BLOCK}/gamma_1"),
    row("blocks.{}.gamma_2", f"{_BLOCK}/gamma_2"),
    *norm("blocks.{}.norm1", f"{_BLOCK}/norm1"),
    row("blocks.{}.attn.q_bias", f"{_ATTENTION}/query/bias"),
    row("blocks.{}.attn.v_bias", f"{_ATTENTION}/value/bias"),
    row(
        "blocks.{}.attn.relative_position_bias_table",
        f"{_ATTENTION}/relative_position_bias/table",
    ),
    row(
        "blocks.{}.attn.qkv.weight",
        (f"{_ATTENTION}/query/kernel", f"{_ATTENTION}/key/kernel", f"{_ATTENTION}/value/kernel"),
        FUSED_QKV,
    ),
    *weight_and_bias("blocks.{}.attn.proj", f"{_ATTENTION}/proj", LINEAR),
    *norm("blocks.{}.norm2", f"{_BLOCK}/norm2"),
    *weight_and_bias("blocks.{}.mlp.fc1", f"{_BLOCK}/mlp/fc1", LINEAR),
    *weight_and_bias("blocks.{}.mlp.fc2", f"{_BLOCK}/mlp/fc2", LINEAR),
    *norm("norm", "encoder/norm"),
    *weight_and_bias("lm_head", "lm_head", LINEAR),
    *norm("fc_norm", "fc_norm"),
    *weight_and_bias("head", "head", LINEAR),
)

INDEX = "relative_position_index"


def is_index_buffer(key: str) -> bool:
    """Whether a key is an index buffer, which follows from the geometry and is not read."""
    return key.split(".")[-1] == INDEX


def with_index_buffers(state: FlatParams, *, grid: int) -> dict[str, np.ndarray]:
    """Puts an int64 index buffer `[n, n]` behind every relative-position table."""
    index = relative_position_index(grid).astype(np.int64)
    result = {}
    for key, array in state.items():
        result[key] = array
        if key.endswith("relative_position_bias_table"):
            result[key.removesuffix("relative_position_bias_table") + INDEX] = index
    return result


def write(export: Export) -> Written:
    """Writes the `.pth` that the official scripts load.

    Raises:
      WeightsError: PyTorch is not installed, or the official models have another epsilon.
    """
    official.check_epsilon(export.description, format="the official models")
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{export.output}: writing a .pth file takes PyTorch, which is not installed; only this"
            " format needs it"
        ) from None
    state = keys.to_foreign(export.params, TABLE)
    whole = with_index_buffers(state, grid=export.description.model.grid)
    tensors = {key: torch.from_numpy(np.array(array, order="C")) for key, array in whole.items()}
    buffer = io.BytesIO()
    # The official scripts read "model" alone; the other entry says what its tensors can't.
    own = official.own_entry(export.description, config=export.config)
    torch.save({"model": tensors, official.OWN: own}, buffer)
    write_whole(export.output, buffer.getvalue())
    return Written(
        load=f"torch.load({export.output!r}, weights_only=True)['model']",
        used=tuple(export.params),
        rebuilt=tuple(key for key in whole if key not in state),
    )


def describe(opened: Opened, *, stated: Stated) -> Described:
    """Describes a `.pth` by what its training script saved beside it, and by names and shapes.

    Raises:
      WeightsError: as `timm_arguments.describe`, or a config of transformers is beside the file.
    """
    if "model_type" in opened.config:
        raise WeightsError(
            f"{opened.path} has the official names, and the config.json beside it is of"
            " transformers, which has others; move the file away from it"
        )
    return timm_arguments.describe(opened, stated=stated, said=official.Known())


FORMAT = Format(
    name="unilm",
    help="a .pth file that the official BEiT scripts load",
    writing="takes PyTorch",
    suffix=".pth",
    write=write,
    reader=Reader(
        detect=lambda opened: official.has_official_keys(opened.state),
        describe=describe,
        table=lambda description: TABLE,
        in_encoder=official.in_encoder,
        rebuilt=is_index_buffer,
    ),
)
