"""Products with weights, in the form that each platform multiplies best.

What is chosen here follows the platform that a program is compiled for, not the one that compiles.
"""

import jax
import jax.numpy as jnp
from einops import rearrange


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[..., d] @ [d, f]` → `[..., f]`.

    JAX makes a kernel's gradient as `(gradientᵀ x)ᵀ`. XLA's TPU compiler chooses layouts for that;
    its CPU compiler makes a turned copy of the left factor, element by element with everything that
    was fused into it. There the narrower factor is the one to be turned.
    """
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    of_kernel = jax.lax.platform_dependent(
        x, gradient, cpu=_over_rows_on_cpu, default=lambda x, g: _over_rows(g, x).T
    )
    return gradient @ kernel.T, of_kernel


def _over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """`[..., d]` and `[..., f]` → `[d, f]`, summed over what they share."""
    rows = tuple(range(a.ndim - 1))
    return jax.lax.dot_general(a, b, ((rows, rows), ((), ())))


def _over_rows_on_cpu(x: jax.Array, gradient: jax.Array) -> jax.Array:
    if x.shape[-1] > gradient.shape[-1]:
        return _over_rows(gradient, x).T
    return _over_rows(x, gradient)


matmul.defvjp(_forward, _backward)


def matmul_heads_first(x: jax.Array, kernel: jax.Array, *, heads: int) -> jax.Array:
    """`[b, n, d] @ [d, h k]` → `[b, h, n, k]`.

    On TPU the weight is cut by head, which saves a copy of the activations. XLA's CPU compiler then
    copies weights and activations both: there the activations are cut.
    """
    return _heads_first(x, rearrange(kernel, "d (h k) -> d h k", h=heads))


def _cut_weight(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("bnd,dhk->bhnk", x, kernel)


def _cut_activations(x: jax.Array, kernel: jax.Array) -> jax.Array:
    d, h, k = kernel.shape
    return rearrange(x @ kernel.reshape(d, h * k), "b n (h k) -> b h n k", h=h)


@jax.custom_vjp
def _heads_first(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, kernel, cpu=_cut_activations, default=_cut_weight)


def _heads_first_backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def cut_weight(x, kernel, gradient):
        return jax.vjp(_cut_weight, x, kernel)[1](gradient)

    def cut_activations(x, kernel, gradient):
        flat = rearrange(gradient, "b h n k -> b n (h k)")
        of_kernel = _over_rows_on_cpu(x, flat).reshape(kernel.shape)
        return flat @ kernel.reshape(kernel.shape[0], -1).T, of_kernel

    return jax.lax.platform_dependent(*saved, gradient, cpu=cut_activations, default=cut_weight)


_heads_first.defvjp(lambda x, kernel: (_heads_first(x, kernel), (x, kernel)), _heads_first_backward)
