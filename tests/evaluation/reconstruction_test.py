"""Hidden patches get predicted tokens, seen ones keep theirs."""

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.evaluation.reconstruction import fill_in


def test_only_hidden_patches_are_filled_in_and_drawn_ones_follow_the_prediction():
    true_ids = jnp.zeros((500, 1, 2), jnp.int32)
    hidden = jnp.tile(jnp.array([True, False]), (500, 1)).reshape(500, 1, 2)
    logits = jnp.tile(jnp.log(jnp.array([1e-9, 0.25, 0.75])), (500, 2, 1))
    likely = np.asarray(fill_in(logits, true_ids, hidden))
    assert (likely == [2, 0]).all()
    drawn = np.asarray(fill_in(logits, true_ids, hidden, key=jax.random.key(0)))
    assert (drawn[..., 1] == 0).all()
    assert set(np.unique(drawn[..., 0])) == {1, 2}
    assert abs((drawn[..., 0] == 1).mean() - 0.25) < 0.08
