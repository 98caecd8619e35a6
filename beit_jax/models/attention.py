"""softmax(query keyᵀ + bias) value: one function with several implementations.

"xla" leaves everything to the compiler and runs anywhere. "fused" is the TPU kernel of
`kernels/fused_attention.py`. "cudnn" is cuDNN's kernel on NVIDIA GPUs. "auto" is the fused kernel
on a TPU where heads are 64 wide, and "xla" elsewhere. They agree up to the rounding of their
inputs' dtype.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from beit_jax.models.kernels.fused_attention import HEAD_WIDTH, MASKED, fused_attention

# Where kernels run; the others run anywhere.
PLATFORMS = {"fused": "tpu", "cudnn": "gpu"}


def resolve_implementation(chosen: str, *, head_width: int, platform: str) -> str:
    """The implementation that is used: resolves "auto".

    Args:
      chosen: `ModelConfig.attention`.
      head_width: channels of a head.
      platform: "tpu", "gpu" or "cpu", where the program is to run.
    """
    if chosen != "auto":
        return chosen
    return "fused" if platform == "tpu" and head_width == HEAD_WIDTH else "xla"


def plain_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """Attention in plain JAX, for the compiler to optimise; the scores go to memory.

    Args:
      query, key, value: `[b, h, n, k]`, queries scaled.
      bias: float32 `[h, n, n]`; None adds nothing.

    Returns:
      `[b, n, h, k]` in the dtype of `query`.
    """
    scores = jnp.einsum("bhqk,bhnk->bhqn", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    # The division by the sums comes after mixing: a pass over [n, k] instead of [n, n], here and in
    # the backward pass.
    largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    sums = rearrange(weights.sum(axis=-1), "b h q -> b q h 1")
    mixed = jnp.einsum("bhqn,bhnk->bqhk", weights.astype(query.dtype), value)
    return (mixed / sums).astype(query.dtype)


def flat_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    *,
    heads: int,
    implementation: str,
) -> jax.Array:
    """Attention by a kernel that takes heads side by side.

    Args:
      query, key, value: `[b, n, h * k]`, queries scaled.
      bias: float32 `[copies, h, n, n]`, of a table from `split_over_devices`; None adds nothing.
      heads: h.
      implementation: "fused" or "cudnn".

    Returns:
      `[b, n, h * k]`.
    """
    b, n, _ = query.shape
    if bias is None:
        bias = jnp.zeros((1, heads, n, n), jnp.float32)
    if implementation == "cudnn":
        return _cudnn(query, key, value, bias[0], heads=heads)
    axes = _batch_axes(b)
    if not axes:
        return fused_attention(query, key, value, bias[0])
    # A kernel is opaque to the partitioner, so every device calls it on its own images.
    bias = jnp.broadcast_to(bias, (jax.sharding.get_abstract_mesh().size, *bias.shape[1:]))
    split = PartitionSpec(axes)
    return jax.shard_map(
        lambda q, k, v, copy: fused_attention(q, k, v, copy[0]),
        in_specs=(split, split, split, split),
        out_specs=split,
        check_vma=False,
    )(query, key, value, bias)


def split_over_devices(table: jax.Array, *, batch: int) -> jax.Array:
    """Copies a relative-position table for every device that images are split over.

    A device's kernel gives the gradient of its own copy of the bias. With the copies made here, the
    devices sum the gradient of a table, 35 kB, and not that of every block's bias, 1.9 MB.

    Args:
      table: `[rows, h]`.
      batch: images on all devices.

    Returns:
      `[copies, rows, h]`; one copy where there is no mesh (`training.sharding.on_mesh`).
    """
    axes = _batch_axes(batch)
    if not axes:
        return table[None]
    copies = jnp.broadcast_to(table, (jax.sharding.get_abstract_mesh().size, *table.shape))
    return jax.lax.with_sharding_constraint(copies, PartitionSpec(axes))


def _batch_axes(batch: int) -> tuple[str, ...]:
    """The axes of the current mesh, over all of which batches are split; () for one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or batch % mesh.size:
        return ()
    return tuple(mesh.axis_names)


def _cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    *,
    heads: int,
    library: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """cuDNN's flash attention; with a bias it trains on even token counts only."""
    _b, n, _ = query.shape
    odd = n % 2
    query, key, value = (
        jnp.pad(rearrange(x, "b n (h k) -> b n h k", h=heads), ((0, 0), (0, odd), (0, 0), (0, 0)))
        for x in (query, key, value)
    )
    bias = jnp.pad(bias, ((0, 0), (0, odd), (0, odd)), constant_values=MASKED)
    mixed = jax.nn.dot_product_attention(
        query, key, value, bias[None].astype(query.dtype), scale=1.0, implementation=library
    )
    return rearrange(mixed[:, :n], "b n h k -> b n (h k)")
