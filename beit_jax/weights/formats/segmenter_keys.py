"""Key tables of segmentation models: one body of rows, and what the formats call its parts.

mmseg's UPerHead and FCNHead gave the names; transformers kept most of them. Of other heads no
format has a model.
"""

from beit_jax.config.segment import SegmentHeadConfig
from beit_jax.models.segmentation_heads.pyramid import largest_scale
from beit_jax.weights.description import Description
from beit_jax.weights.keys import (
    CONV,
    TRANSPOSED_CONV,
    Table,
    batch_norm,
    row,
    weight_and_bias,
)
from beit_jax.weights.report import WeightsError

LEVELS = 4  # of the pyramid, each of another block
AUXILIARY_LEVEL = 2  # official `in_index`


def segmenter_rows(
    description: Description, *, neck: str, norm: str = "bn", classifier: str = "classifier"
) -> Table:
    """The rows of everything but the encoder.

    Args:
      description: a segmenter with a head of kind "upernet".
      neck: what stands before "fpn1" and "fpn2", "backbone." or nothing.
      norm: the name of a BatchNorm in a module of a convolution and its norm.
      classifier: the name of the last layer of a head.
    """

    def module(foreign: str, native: str) -> Table:
        conv = row(f"{foreign}.conv.weight", f"{native}/conv/kernel", CONV)
        return conv, *batch_norm(f"{foreign}.{norm}", f"{native}/norm")

    head = head_of(description)
    rows: list[Table] = _neck_rows(neck, largest=largest_scale(description.model))
    for i in range(len(head.pool_scales)):
        rows.append(module(f"decode_head.psp_modules.{i}.1", f"head/pyramid_{i}"))
    rows.append(module("decode_head.bottleneck", "head/bottleneck"))
    for i in range(LEVELS - 1):
        rows.append(module(f"decode_head.lateral_convs.{i}", f"head/lateral_{i}"))
        rows.append(module(f"decode_head.fpn_convs.{i}", f"head/output_{i}"))
    rows.append(module("decode_head.fpn_bottleneck", "head/fusion"))
    rows.append(weight_and_bias(f"decode_head.{classifier}", "head/classifier", CONV))
    for i in range(head.auxiliary_convs):
        rows.append(module(f"auxiliary_head.convs.{i}", f"auxiliary/conv_{i}"))
    rows.append(module("auxiliary_head.conv_cat", "auxiliary/concat"))
    rows.append(weight_and_bias(f"auxiliary_head.{classifier}", "auxiliary/classifier", CONV))
    return tuple(line for part in rows for line in part)


def _neck_rows(neck: str, *, largest: int) -> list[Table]:
    """The rows of the pyramid; with patches of 8 pixels its first path is the one that doubles."""
    if largest == 2:
        return [weight_and_bias(f"{neck}fpn1.0", "neck/up2/conv", TRANSPOSED_CONV)]
    return [
        weight_and_bias(f"{neck}fpn1.0", "neck/up4/conv1", TRANSPOSED_CONV),
        batch_norm(f"{neck}fpn1.1", "neck/up4/norm"),
        weight_and_bias(f"{neck}fpn1.3", "neck/up4/conv2", TRANSPOSED_CONV),
        weight_and_bias(f"{neck}fpn2.0", "neck/up2/conv", TRANSPOSED_CONV),
    ]


def head_of(description: Description) -> SegmentHeadConfig:
    """The head of a segmenter's description."""
    assert description.head is not None  # `Description` has checked
    return description.head


def check_upernet(description: Description, *, format: str) -> SegmentHeadConfig:
    """The head; raises WeightsError unless it is one that official models have."""
    head = head_of(description)
    if head.kind != "upernet":
        raise WeightsError(
            f"{format} has no segmentation head of the kind {head.kind!r}, only UperNet's; of this"
            " one the checkpoint itself is the only form"
        )
    return head
