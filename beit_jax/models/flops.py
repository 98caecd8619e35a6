"""FLOPs of matrix products and convolutions, two per multiply-add: the basis of MFU.

Formulas for the encoder and its heads, and a counter that reads any function's jaxpr. Unlike XLA's
count the counter gives the same on every backend: convolutions at the padded border count in full,
and elementwise work does not count.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from beit_jax.config import ModelConfig, SegmentHeadConfig
from beit_jax.models.functional import flatten
from beit_jax.models.segmentation_heads import HEADS, auxiliary_side
from beit_jax.models.segmenter import segmenter
from beit_jax.types import PyTree


def encoder_flops(config: ModelConfig) -> float:
    """Forward FLOPs of the encoder for one image: 35.13e9 for base at 224 pixels."""
    n, d = config.tokens + 1, config.width
    projections = 2 * n * d * (4 * d + 2 * config.mlp_width)
    attention = 2 * 2 * n * n * d
    return patch_embedding_flops(config) + float(config.layers * (projections + attention))


def patch_embedding_flops(config: ModelConfig) -> float:
    """Forward FLOPs of the patch projection for one image."""
    return 2.0 * config.tokens * 3 * config.patch_size**2 * config.width


def mim_head_flops(config: ModelConfig, *, vocabulary: int, slots: int) -> float:
    """Forward FLOPs of the masked-image-modelling head for one image.

    Args:
      config: the encoder's.
      vocabulary: visual tokens.
      slots: patches that are scored.
    """
    return 2.0 * slots * config.width * vocabulary


def student_flops(config: ModelConfig, *, vocabulary: int, slots: int) -> float:
    """FLOPs of one image's pre-training step, without the tokenizer: 107.98e9 for base.

    The backward pass takes twice the forward pass, except at the patch projection: nothing asks for
    the pixels' gradient.
    """
    forward = encoder_flops(config) + mim_head_flops(config, vocabulary=vocabulary, slots=slots)
    return 3 * forward - patch_embedding_flops(config)


def classifier_flops(config: ModelConfig, *, classes: int) -> float:
    """Forward FLOPs of the encoder and a linear head for one image."""
    return encoder_flops(config) + 2.0 * config.width * classes


def segmenter_flops(
    config: ModelConfig, *, head: SegmentHeadConfig, classes: int, auxiliary: bool = False
) -> float:
    """Forward FLOPs of a segmenter for one image: 1209.9e9 for base at 512 with 150 classes.

    Of the encoder the blocks that run, and every kernel of neck and head once for each pixel.
    Resizing and pooling are not counted as work, though they are matrix products here.

    Args:
      config: the encoder's.
      head: the head's.
      classes: number of logits.
      auxiliary: whether the auxiliary head is computed, as in training.
    """
    encoder = dataclasses.replace(config, layers=max(head.blocks))
    places = {f"head/{name}": side for name, side in HEADS[head.kind].sides(config, head).items()}
    # A doubling multiplies each pixel of the map that it is given by all of its kernel.
    places |= {"neck/up4/conv1": config.grid, "neck/up4/conv2": 2 * config.grid}
    places |= {"neck/up2/conv": config.grid}
    total = encoder_flops(encoder)
    for name, leaf in flatten(segmenter(config, head=head, classes=classes).shapes()).items():
        part, leaf_name = name.partition("/")[0], name.rpartition("/")[-1]
        if leaf_name != "kernel" or part == "encoder" or (part == "auxiliary" and not auxiliary):
            continue
        module = name.removesuffix("/kernel")
        if part == "head":
            module = module.removesuffix("/conv")
        side = auxiliary_side(config, head) if part == "auxiliary" else places[module]
        total += 2.0 * math.prod(leaf.shape) * side**2
    return total


def segmenter_step_flops(
    config: ModelConfig, *, head: SegmentHeadConfig, classes: int, frozen_encoder: bool = False
) -> float:
    """FLOPs of one image's training step: three forward passes, as in `student_flops`.

    Args:
      config: the encoder's.
      head: the head's.
      classes: number of logits.
      frozen_encoder: whether the encoder is not trained; it then has no backward pass.
    """
    forward = segmenter_flops(config, head=head, classes=classes, auxiliary=True)
    if frozen_encoder:
        encoder = dataclasses.replace(config, layers=max(head.blocks))
        return 3 * forward - 2 * encoder_flops(encoder)
    return 3 * forward - patch_embedding_flops(config)


def matmul_flops(function: Callable, *args: PyTree) -> float:
    """FLOPs of all matrix products and convolutions of a function.

    Args:
      function: is traced; nothing is computed.
      *args: arrays or `ShapeDtypeStruct`s, or trees of them.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
        elif name == "conv_general_dilated":
            kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval
            outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            # A transposed convolution multiplies by inserted zeros; they are not work.
            holes = math.prod(equation.params["lhs_dilation"])
            total += 2.0 * math.prod(out.shape) * math.prod(kernel) / outputs / holes
        elif name == "cond":  # one branch runs; `jax.lax.platform_dependent` is a cond, too
            total += max(_count(branch.jaxpr) for branch in equation.params["branches"])
        else:
            repeat = equation.params.get("length", 1) if name == "scan" else 1
            for parameter in equation.params.values():
                total += repeat * sum(_count(inner) for inner in _jaxprs(parameter))
    return total


def _jaxprs(parameter: Any) -> list[Any]:
    """The jaxprs among an equation's parameter, closed ones opened."""
    values = parameter if isinstance(parameter, (list, tuple)) else [parameter]
    opened = (getattr(value, "jaxpr", value) for value in values)
    return [jaxpr for jaxpr in opened if hasattr(jaxpr, "eqns")]
