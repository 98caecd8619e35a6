"""Products with weights, in the form that each platform multiplies best.

The choice follows the platform that a program is compiled for, not the one that compiles it.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from beit_jax.types import PyTree


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[..., d] @ [d, f]` → `[..., f]`.

    JAX computes a kernel's gradient as `(gradientᵀ x)ᵀ`. XLA's TPU compiler chooses layouts for
    that. Its CPU compiler writes a transposed copy of the left factor, element by element, together
    with everything that was fused into it; there the narrower factor is transposed instead.
    """
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    kernel_gradient = jax.lax.platform_dependent(
        x, gradient, cpu=_over_rows_on_cpu, default=lambda x, g: _over_rows(g, x).T
    )
    return gradient @ kernel.T, kernel_gradient


def _over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """`[..., d]` and `[..., f]` → `[d, f]`, summed over the leading axes."""
    rows = tuple(range(a.ndim - 1))
    return jax.lax.dot_general(a, b, ((rows, rows), ((), ())))


def _over_rows_on_cpu(x: jax.Array, gradient: jax.Array) -> jax.Array:
    if x.shape[-1] > gradient.shape[-1]:
        return _over_rows(gradient, x).T
    return _over_rows(x, gradient)


matmul.defvjp(_forward, _backward)


def matmul_heads_first(x: jax.Array, kernel: jax.Array, *, heads: int) -> jax.Array:
    """`[b, n, d] @ [d, h k]` → `[b, h, n, k]`.

    On TPUs the weight is split by head, which saves a copy of the activations. XLA's CPU compiler
    would copy both weights and activations for that, so there the activations are split.
    """
    return _heads_first(x, rearrange(kernel, "d (h k) -> d h k", h=heads))


def _split_weight(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("bnd,dhk->bhnk", x, kernel)


def _split_activations(x: jax.Array, kernel: jax.Array) -> jax.Array:
    d, h, k = kernel.shape
    return rearrange(x @ kernel.reshape(d, h * k), "b n (h k) -> b h n k", h=h)


@jax.custom_vjp
def _heads_first(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, kernel, cpu=_split_activations, default=_split_weight)


def _heads_first_backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def split_weight(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> PyTree:
        return jax.vjp(_split_weight, x, kernel)[1](gradient)

    def split_activations(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> PyTree:
        flat = rearrange(gradient, "b h n k -> b n (h k)")
        kernel_gradient = _over_rows_on_cpu(x, flat).reshape(kernel.shape)
        return flat @ kernel.reshape(kernel.shape[0], -1).T, kernel_gradient

    return jax.lax.platform_dependent(*saved, gradient, cpu=split_activations, default=split_weight)


_heads_first.defvjp(lambda x, kernel: (_heads_first(x, kernel), (x, kernel)), _heads_first_backward)
