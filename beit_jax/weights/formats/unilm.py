"""The official format, `microsoft/unilm` beit: a `.pth` with {"model": state dict}.

Names: `modeling_pretrain.py` and `modeling_finetune.py`. timm kept them, so its table is this one.
Queries, keys and values are one matrix; only queries and values have a bias, separately. A file
also holds `relative_position_index` buffers: written from the geometry, ignored when read.
"""

import io
import re
from collections.abc import Mapping

import numpy as np
from etils import epath

from beit_jax.models.relative_positions import relative_position_index
from beit_jax.weights.description import Description
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


def with_index_buffers(state: Mapping[str, np.ndarray], *, grid: int) -> dict[str, np.ndarray]:
    """Puts an int64 index buffer `[n, n]` behind every relative-position table."""
    index = relative_position_index(grid).astype(np.int64)
    result = {}
    for key, array in state.items():
        result[key] = array
        if key.endswith("relative_position_bias_table"):
            result[key.removesuffix("relative_position_bias_table") + INDEX] = index
    return result


def write(path: str, state: Mapping[str, np.ndarray], *, description: Description) -> list[str]:
    """Writes the `.pth` that the official scripts load.

    Args:
      path: the file.
      state: under the names of `TABLE`.
      description: what it is.

    Returns:
      The keys of the buffers that were added.

    Raises:
      WeightsError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{path}: writing a .pth file takes PyTorch, which is not installed; the formats"
            " hugging_face and timm don't need it"
        ) from None
    whole = with_index_buffers(state, grid=description.model.grid)
    tensors = {key: torch.from_numpy(np.array(array, order="C")) for key, array in whole.items()}
    buffer = io.BytesIO()
    torch.save({"model": tensors}, buffer)
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(buffer.getvalue())
    return [key for key in whole if key not in state]


def heads(state: Mapping[str, np.ndarray]) -> int:
    """Attention heads: a relative-position table's columns; else the published head width, 64."""
    tables = [a for key, a in state.items() if key.endswith("relative_position_bias_table")]
    width = state["cls_token"].shape[-1]
    return tables[0].shape[-1] if tables else max(width // 64, 1)


def blocks(state: Mapping[str, np.ndarray], pattern: str) -> int:
    """One more than the largest block number; `pattern` has one group, the number."""
    numbers = [int(m[1]) for m in (re.match(pattern, key) for key in state) if m]
    return max(numbers, default=-1) + 1
