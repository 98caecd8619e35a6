"""Adding a branch to the residual stream, with a gradient that the CPU compiler stores."""

import jax
import jax.numpy as jnp


def add_branch(x: jax.Array, branch: jax.Array, *, factor: jax.Array | None) -> jax.Array:
    """`x + factor · branch` in the dtype of `x`.

    Args:
      x: the stream, `[b, n, d]`.
      branch: `[b, n, d]`.
      factor: `[b]`, multiplies a sample's branch (drop path); None: all ones.
    """
    branch = branch.astype(x.dtype)
    if factor is not None:
        branch = branch * factor.astype(x.dtype)[:, None, None]
    return _stored_gradient(x + branch)


@jax.custom_vjp
def _stored_gradient(x: jax.Array) -> jax.Array:
    """Returns `x`; makes XLA's CPU compiler write its gradient to memory.

    The stream's gradient is a long sum of cheap terms, two per block. Where blocks are unrolled,
    that compiler fuses the sum into every reader, which then computes all of it from the head down:
    a third of BEiT-B's step. It ignores an optimization barrier here, but does not fuse a
    conditional.
    """
    return x


def _backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    def through_a_conditional(gradient: jax.Array) -> jax.Array:
        always = jax.lax.optimization_barrier(jnp.bool_(True))  # not known while compiling
        return jax.lax.cond(always, lambda g: g, lambda g: jnp.full_like(g, jnp.nan), gradient)

    return (jax.lax.platform_dependent(gradient, cpu=through_a_conditional, default=lambda g: g),)


_stored_gradient.defvjp(lambda x: (x, None), _backward)
