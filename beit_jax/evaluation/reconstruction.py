"""What a masked image model fills in: the tokens of hidden patches, the most likely or drawn."""

import jax
import jax.numpy as jnp


def fill_in(
    logits: jax.Array, true_ids: jax.Array, mask: jax.Array, *, key: jax.Array | None = None
) -> jax.Array:
    """True tokens where patches are seen, predicted ones where they are hidden.

    Args:
      logits: float `[b, grid², v]`, of every patch.
      true_ids: int32 `[b, grid, grid]`, the tokenizer's.
      mask: bool or 0 and 1, `[b, grid, grid]`; true patches are hidden.
      key: draws each token from its predicted distribution; None takes the most likely.

    Returns:
      int32 `[b, grid, grid]`.
    """
    ids = jnp.argmax(logits, axis=-1) if key is None else jax.random.categorical(key, logits)
    return jnp.where(mask.astype(bool), ids.reshape(true_ids.shape).astype(jnp.int32), true_ids)
