"""The official segmentation format: a `.pth` of mmsegmentation 0.11, {"meta", "state_dict"}.

The backbone has the official names (`beit/semantic_segmentation/backbone/beit.py`) under
"backbone."; the heads are mmseg's UPerHead and FCNHead. Which blocks are read, how finely features
are pooled and how pixels are normalised is in no tensor: `meta["config"]` says it where it was
saved, and else the official values are taken for what they are, guesses.
"""

import dataclasses
import io

import numpy as np

from beit_jax.config.segment import SegmentHeadConfig
from beit_jax.files import write_whole
from beit_jax.types import JsonObject
from beit_jax.weights import keys
from beit_jax.weights.description import Description
from beit_jax.weights.formats import mmseg_settings, official, unilm
from beit_jax.weights.formats.format import (
    Described,
    Export,
    Format,
    Opened,
    Reader,
    State,
    Stated,
    Written,
)
from beit_jax.weights.formats.mmseg_settings import Said
from beit_jax.weights.formats.segmenter_keys import check_upernet, segmenter_rows
from beit_jax.weights.formats.view import kept_of
from beit_jax.weights.keys import Table
from beit_jax.weights.report import WeightsError

_BACKBONE = "backbone."
_HEAD, _AUXILIARY = "decode_head.", "auxiliary_head."
_SCALES = SegmentHeadConfig().pool_scales  # official
# What a backbone keeps of the model that it was fine-tuned from (the official loader drops them).
_LEFT_OUT = tuple(f"{_BACKBONE}{name}" for name in ("mask_token", "norm", "fc_norm", "lm_head"))


def table(description: Description) -> Table:
    """The keys of a segmenter with UperNet's head."""
    encoder = tuple(
        dataclasses.replace(row, foreign=f"{_BACKBONE}{row.foreign}")
        for row in unilm.TABLE
        if row.native[0].startswith("encoder/")
    )
    return encoder + segmenter_rows(description, neck=_BACKBONE, classifier="conv_seg")


def write(export: Export) -> Written:
    """Writes the `.pth` that mmseg's `load_checkpoint` reads.

    Raises:
      WeightsError: PyTorch is not installed, the official models have another epsilon or head, or
        none with such patches.
    """
    description = export.description
    head = check_upernet(description, format="mmseg")
    _check_patch(description.model.patch_size)
    official.check_epsilon(description, format="the official models")
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"{export.output}: writing a .pth file takes PyTorch, which is not installed"
        ) from None
    state = keys.to_foreign(export.params, table(description))
    whole = unilm.with_index_buffers(state, grid=description.model.grid)
    tensors = {key: torch.from_numpy(np.array(array, order="C")) for key, array in whole.items()}
    content = {
        "meta": _meta(description, config=export.config),
        "state_dict": tensors,
        official.OWN: official.own_entry(description, config=export.config),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(export.output, buffer.getvalue())
    return Written(
        load=f"torch.load({export.output!r}, weights_only=True)['state_dict']",
        used=tuple(export.params),
        rebuilt=tuple(key for key in whole if key not in state),
        notes=(
            f"mmseg's config must say out_indices={[block - 1 for block in head.blocks]} and"
            f" pool_scales={head.pool_scales}, which no tensor shows",
        ),
    )


def _check_patch(size: int, *, source: str = "") -> None:
    if size not in mmseg_settings.PATCHES:
        raise WeightsError(
            f"{source}the official segmentation models have patches of"
            f" {' or '.join(map(str, mmseg_settings.PATCHES))} pixels, not {size}"
        )


def _meta(description: Description, *, config: JsonObject) -> JsonObject:
    """`meta` with the names and colours of the classes, as far as they are known."""
    meta: JsonObject = {}
    if description.labels:
        meta["CLASSES"] = tuple(description.labels)
    palette = kept_of(config).get("palette")
    if palette and len(palette) == description.outputs:
        meta["PALETTE"] = [list(color) for color in palette]
    return meta


def detect(opened: Opened) -> bool:
    """Whether the keys are those of an official backbone under mmseg's heads."""
    return f"{_BACKBONE}blocks.0.attn.qkv.weight" in opened.state and any(
        key.startswith(_HEAD) for key in opened.state
    )


def describe(opened: Opened, *, stated: Stated) -> Described:
    """Describes a `.pth` by what was saved beside the tensors, and by names and shapes.

    Raises:
      WeightsError: a key is missing, the shapes make no model, or what the file says of itself is
        of another function.
    """
    encoder = dataclasses.replace(opened, state=_encoder_state(opened.state))
    by_itself = official.described_by_itself(encoder, stated=stated)
    said = mmseg_settings.read_meta(
        opened.extras.get("meta"), normalization=stated.normalization, source=opened.path
    )
    if by_itself is not None:
        if by_itself.description.task != "segment":
            raise WeightsError(f"{opened.path}: its tensors do not fit its entry {official.OWN!r}")
        return dataclasses.replace(by_itself, kept={**by_itself.kept, **_kept(said)})
    guessed: dict[str, str] = {}
    known = official.Known(beit=said.is_beit, heads=said.heads)
    model = official.encoder_of(encoder, stated=stated, known=known, guessed=guessed)
    _check_patch(model.patch_size, source=f"{opened.path}: ")
    for field, value, found in (
        ("patch_size", said.patch_size, model.patch_size),
        ("num_heads", 0 if stated.heads else said.heads, model.heads),
    ):
        if value not in (0, found):
            raise WeightsError(
                f"{opened.path}: meta.config: {field} is {value}, the tensors' {found}"
            )
    normalization = stated.normalization or said.normalization
    if not normalization:
        normalization = "imagenet"
        guessed["normalization"] = (
            "imagenet: as in the official segmentation models (--normalization says otherwise)"
        )
    classes = _outputs(opened)
    labels = said.labels if len(said.labels) == classes else ()
    notes: tuple[str, ...] = ()
    if said.labels and not labels:
        notes = (f"labels left out: there are {len(said.labels)} for {classes} classes",)
    return Described(
        description=Description(
            task="segment",
            model=model,
            outputs=classes,
            normalization=normalization,
            labels=labels,
            head=_head(opened, said, layers=model.layers, guessed=guessed, stated=stated),
        ),
        guessed=guessed,
        left_out=_LEFT_OUT,
        kept={"format": "mmseg", **_kept(said)},
        notes=notes,
    )


def _kept(said: Said) -> JsonObject:
    return {"palette": [list(color) for color in said.palette]} if said.palette else {}


def _encoder_state(state: State) -> State:
    return {
        key.removeprefix(_BACKBONE): array
        for key, array in state.items()
        if key.startswith(_BACKBONE)
    }


def _outputs(opened: Opened) -> int:
    key = f"{_HEAD}conv_seg.weight"
    array = opened.state.get(key)
    if array is None or array.ndim != 4 or not array.shape[0]:
        raise WeightsError(f"{opened.path}: no {key} [classes, channels, 1, 1]")
    return array.shape[0]


def _head(
    opened: Opened, said: Said, *, layers: int, guessed: dict[str, str], stated: Stated
) -> SegmentHeadConfig:
    """The heads, by names and shapes, by what the file says, and by the official values."""
    state, official_head = opened.state, SegmentHeadConfig()
    blocks = said.blocks
    if blocks is None:
        if layers % 6:
            raise WeightsError(
                f"{opened.path} does not say which of its {layers} blocks the head reads, and there"
                " is no official model of this depth"
            )
        blocks = (layers // 3, layers // 2, 2 * layers // 3, layers)
        guessed["blocks"] = (
            f"{', '.join(map(str, blocks))}: as the official models of 12 and 24 blocks"
        )
    scales = said.pool_scales
    count = sum(
        key.startswith(f"{_HEAD}psp_modules.") and key.endswith("conv.weight") for key in state
    )
    if scales is None:
        scales = _SCALES if count == len(_SCALES) else tuple(range(1, count + 1))
        guessed["pool_scales"] = f"{', '.join(map(str, scales))}: as in the official models"
        if count != len(_SCALES) and not stated.elsewhere:
            raise WeightsError(
                f"{opened.path} does not say to which sizes its {count} modules pool, and the"
                f" official models have {len(_SCALES)}"
            )
    auxiliary = state.get(f"{_AUXILIARY}conv_seg.weight")
    convs = sum(
        key.startswith(f"{_AUXILIARY}convs.") and key.endswith("conv.weight") for key in state
    )
    lateral = state.get(f"{_HEAD}lateral_convs.0.conv.weight")
    if lateral is None or lateral.ndim != 4 or (auxiliary is not None and auxiliary.ndim != 4):
        raise WeightsError(f"{opened.path}: its head is not mmseg's UPerHead")
    try:
        return SegmentHeadConfig(
            blocks=blocks,
            channels=lateral.shape[0],
            pool_scales=scales,
            dropout=official_head.dropout if said.dropout is None else said.dropout,
            auxiliary_channels=0 if auxiliary is None else auxiliary.shape[1],
            auxiliary_convs=convs if auxiliary is not None else official_head.auxiliary_convs,
            auxiliary_concat=f"{_AUXILIARY}conv_cat.conv.weight" in state,
            auxiliary_weight=(
                official_head.auxiliary_weight
                if said.auxiliary_weight is None
                else said.auxiliary_weight
            ),
        )
    except ValueError as error:
        raise WeightsError(f"{opened.path}: {error}") from None


def _in_encoder(key: str) -> bool:
    return key.startswith(_BACKBONE) and official.in_encoder(key.removeprefix(_BACKBONE))


FORMAT = Format(
    name="mmseg",
    help="a .pth file that the official segmentation scripts load",
    writing="takes PyTorch",
    suffix=".pth",
    kinds=("segment",),
    write=write,
    reader=Reader(
        detect=detect,
        describe=describe,
        table=table,
        in_encoder=_in_encoder,
        rebuilt=unilm.is_index_buffer,
    ),
)
