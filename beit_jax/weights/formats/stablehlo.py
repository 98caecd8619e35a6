"""StableHLO: the model as one program that runs without Flax and without this package.

    program = jax.export.deserialize(open("beit.stablehlo", "rb").read())
    outputs = jax.jit(program.call)(images)  # uint8 [b, s, s, 3], any b

One file holds the program and, as constants, the parameters. A classifier gives logits, float32
`[b, classes]`; anything else gives the tokens of its encoder, after the final norm where there is
one: `{"cls": [b, d], "patches": [b, grid, grid, d]}`, float32. Pixels are normalised inside.

The program is lowered for CPU, TPU and CUDA, with plain attention (a TPU kernel would run nowhere
else), the blocks in a loop, in float32. On a TPU, JAX computes float32 products from bfloat16 parts
unless the caller sets `jax.default_matmul_precision`. The format can be written and not read,
since LayerScale is multiplied into the weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import numpy as np
from jax import export

from beit_jax.config import ModelConfig
from beit_jax.files import write_whole
from beit_jax.models.functional import functional, unflatten
from beit_jax.models.heads import classifier
from beit_jax.models.vit import Encoder
from beit_jax.preprocessing import normalize
from beit_jax.types import FlatParams
from beit_jax.weights.description import Description
from beit_jax.weights.formats.format import Export, Format, Written
from beit_jax.weights.report import allowed

PLATFORMS = ("cpu", "tpu", "cuda")
Outputs: TypeAlias = jax.Array | dict[str, jax.Array]
# LayerScale's vector → the projection whose output it multiplies.
_SCALED = {"gamma_1": "attention/proj", "gamma_2": "mlp/fc2"}
_BLOCKS = "encoder/blocks"


def write(export: Export) -> Written:
    """Writes the program of a classifier or, of any other checkpoint, of its encoder."""
    description = export.description
    wanted = [""] if description.task == "classify" else ["encoder/"]
    not_wanted = [] if description.task == "classify" else ["encoder/mask_token"]
    used = {
        name: array
        for name, array in export.params.items()
        if name.startswith(tuple(wanted)) and not allowed(name, not_wanted)
    }
    function = inference_function(used, description)
    write_whole(export.output, serialized(function, image_size=description.model.image_size))
    return Written(
        load=f"jax.export.deserialize(open({export.output!r}, 'rb').read()).call(images)",
        used=tuple(used),
        left_out=tuple(name for name in export.params if name not in used),
    )


def inference_function(
    params: FlatParams, description: Description
) -> Callable[[jax.Array], Outputs]:
    """The exported function of uint8 images `[b, s, s, 3]`, with the parameters inside.

    Args:
      params: flat; a classifier's, or those of an encoder under "encoder/".
      description: the checkpoint's.
    """
    normalization = description.normalization
    folded = unflatten(fold_layer_scale(params))
    model = _portable(description.model)
    if description.task == "classify":
        whole = classifier(model, classes=description.outputs, pooling=description.pooling)
        return lambda images: whole.apply(folded, normalize(images, kind=normalization))
    build = functools.partial(
        Encoder, model, mask_token=False, final_norm="encoder/norm/scale" in params
    )
    encoder = functional(lambda rngs: build(rngs=rngs))

    def tokens(images: jax.Array) -> Outputs:
        result = encoder.apply(folded["encoder"], normalize(images, kind=normalization))
        patches = result[:, 1:].reshape(-1, model.grid, model.grid, model.width)
        return {"cls": result[:, 0], "patches": patches}

    return tokens


def serialized(function: Callable[[jax.Array], Outputs], *, image_size: int) -> bytes:
    """Lowers a function of uint8 images for every platform, the batch size symbolic."""
    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, image_size, image_size, 3), np.uint8)
    program = export.export(jax.jit(function), platforms=PLATFORMS)(images)
    return bytes(program.serialize())


def fold_layer_scale(params: FlatParams) -> dict[str, np.ndarray]:
    """Multiplies LayerScale into the projections before it, where the model has one.

    The function is the same at inference. The model otherwise picks the cheaper of the two forms by
    comparing the batch size, which a symbolic batch size does not allow.
    """
    result = dict(params)
    for gamma, projection in _SCALED.items():
        scale = result.pop(f"{_BLOCKS}/{gamma}", None)
        if scale is None:
            continue
        for part, factor in (("kernel", scale[:, None, :]), ("bias", scale)):
            name = f"{_BLOCKS}/{projection}/{part}"
            result[name] = result[name] * factor
    return result


def _portable(model: ModelConfig) -> ModelConfig:
    """The same model as it runs on every platform, without LayerScale."""
    return dataclasses.replace(
        model,
        dtype="float32",
        residual_dtype="float32",
        attention="xla",
        scan_unroll=1,
        remat="none",
        layer_scale_init=None,
    )


FORMAT = Format(
    name="stablehlo",
    help="a .stablehlo file that jax.export loads: uint8 images in, tokens or logits out",
    suffix=".stablehlo",
    write=write,
)
