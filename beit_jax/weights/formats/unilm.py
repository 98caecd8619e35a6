"""The official format, `microsoft/unilm` beit: a `.pth` with {"model": state dict}.

Names: `modeling_pretrain.py` and `modeling_finetune.py`. timm kept them, so its table is this one.
Queries, keys and values are one matrix; only queries and values have a bias, separately. A file
also holds `relative_position_index` buffers: written from the geometry, ignored when read.
"""

import io
import re

import numpy as np

from beit_jax.config import ModelConfig
from beit_jax.files import write_whole
from beit_jax.models.relative_positions import relative_position_index
from beit_jax.types import FlatParams
from beit_jax.weights import keys, resize
from beit_jax.weights.description import Description
from beit_jax.weights.formats.format import Export, Format, Opened, Reader, State, Written
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
      WeightsError: PyTorch is not installed.
    """
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
    torch.save({"model": tensors}, buffer)
    write_whole(export.output, buffer.getvalue())
    return Written(
        load=f"torch.load({export.output!r}, weights_only=True)['model']",
        used=tuple(export.params),
        rebuilt=tuple(key for key in whole if key not in state),
    )


def has_official_keys(state: State) -> bool:
    """Whether the keys are those of the official models, which timm has too."""
    return "cls_token" in state and "blocks.0.attn.qkv.weight" in state


def describe(opened: Opened, *, normalization: str, heads: int) -> Description:
    """Describes a state dict by its shapes, since the file says nothing about itself.

    Args:
      opened: official keys.
      normalization: of the pixels; "" means "half".
      heads: attention heads; 0 means a relative-position table's columns or width / 64.

    Raises:
      WeightsError: a key is missing, or the shapes make no model.
    """
    state = opened.state
    try:
        model = _model_config(state, heads=heads)
    except (KeyError, IndexError) as error:
        raise WeightsError(f"{opened.path}: missing {error}") from None
    except ValueError as error:
        raise WeightsError(f"{opened.path}: {error}") from None
    task, outputs = "encoder", 0
    if "lm_head.weight" in state:
        task, outputs = "pretrain", state["lm_head.weight"].shape[0]
    elif "head.weight" in state:
        task, outputs = "classify", state["head.weight"].shape[0]
    pooling = "mean" if task == "pretrain" or "fc_norm.weight" in state else "none"
    if task != "pretrain" and "norm.weight" in state:
        pooling = "cls"
    if task == "classify" and pooling == "none":
        raise WeightsError(f"{opened.path}: missing fc_norm.weight (or norm.weight)")
    return Description(
        task=task,
        model=model,
        outputs=outputs,
        pooling=pooling,
        mask_token=task == "encoder" and "mask_token" in state,
        normalization=normalization or "half",
    )


def _model_config(state: State, *, heads: int) -> ModelConfig:
    """Sizes from shapes; KeyError, IndexError or ValueError where they make no model."""
    patch = state["patch_embed.proj.weight"].shape[-1]
    grid = resize.grid_of_state(state)
    if grid is None:
        raise ValueError("there are neither absolute nor relative positions")
    positions = "relative_per_block"
    if "pos_embed" in state:
        positions = "absolute"
    elif "rel_pos_bias.relative_position_bias_table" in state:
        positions = "relative_shared"
    layers = _blocks(state)
    scale = None
    if "blocks.0.gamma_1" in state:
        # The file has gamma but not where it started; the recipes' values keep the config valid.
        scale = 0.1 if layers <= 12 else 1e-5
    return ModelConfig(
        layers=layers,
        width=state["cls_token"].shape[-1],
        heads=heads or _heads(state),
        mlp_width=state["blocks.0.mlp.fc1.weight"].shape[0],
        image_size=grid * patch,
        patch_size=patch,
        positions=positions,
        layer_scale_init=scale,
    )


def _heads(state: State) -> int:
    """Attention heads: a relative-position table's columns; else the published head width, 64."""
    tables = [a for key, a in state.items() if key.endswith("relative_position_bias_table")]
    width = state["cls_token"].shape[-1]
    return tables[0].shape[-1] if tables else max(width // 64, 1)


def _blocks(state: State) -> int:
    """One more than the largest block number."""
    matches = (re.match(r"blocks\.(\d+)\.", key) for key in state)
    return max((int(match[1]) for match in matches if match), default=-1) + 1


FORMAT = Format(
    name="unilm",
    help="a .pth file that the official BEiT scripts load (writing it takes PyTorch)",
    suffix=".pth",
    write=write,
    reader=Reader(
        detect=lambda opened: has_official_keys(opened.state),
        describe=describe,
        table=lambda description: TABLE,
        rebuilt=is_index_buffer,
    ),
)
