"""Modules as pure functions over plain dicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from beit_jax.models.functional import flatten, functional, unflatten


class Affine(nnx.Module):
    """Two layers with names that sort differently from the order they are made in."""

    def __init__(self, rngs: nnx.Rngs):
        self.second = nnx.Linear(4, 2, rngs=rngs)
        self.first = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.first(x))

    def hidden(self, x: jax.Array, *, scale: float) -> jax.Array:
        return scale * self.first(x)


class Noisy(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@pytest.fixture
def model():
    return functional(Affine)


def test_params_are_plain_nested_dicts_of_arrays(model):
    params = model.init(jax.random.key(0))
    assert type(params) is dict
    assert type(params["first"]) is dict
    assert isinstance(params["first"]["kernel"], jax.Array)
    assert set(flatten(params)) == {"first/kernel", "first/bias", "second/kernel", "second/bias"}


def test_apply_computes_with_the_given_params(model):
    params = model.init(jax.random.key(0))
    x = jnp.arange(6.0).reshape(2, 3)
    hidden = x @ params["first"]["kernel"] + params["first"]["bias"]
    expected = hidden @ params["second"]["kernel"] + params["second"]["bias"]
    np.testing.assert_allclose(model.apply(params, x), expected, rtol=1e-5)
    named = model.apply(params, x, method="hidden", scale=2.0)
    np.testing.assert_allclose(named, 2 * hidden, rtol=1e-5)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    np.testing.assert_allclose(model.apply(doubled, x), 4 * expected, rtol=1e-5)


def test_init_depends_on_the_key_alone_with_and_without_jit(model):
    eager = model.init(jax.random.key(1))
    jitted = jax.jit(model.init)(jax.random.key(1))
    other = model.init(jax.random.key(2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, jitted)
    assert not np.allclose(eager["first"]["kernel"], other["first"]["kernel"])


def test_shapes_match_init(model):
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.shapes())
    params = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.init(jax.random.key(0)))
    assert shapes == params


def test_nothing_is_materialised():
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Linear(2**20, 2**20, rngs=rngs)  # 4 TiB

    assert functional(build).shapes()["kernel"].shape == (2**20, 2**20)


def test_gradients_are_plain_dicts_too(model):
    params = model.init(jax.random.key(0))
    x = jnp.ones((5, 3))
    gradients = jax.grad(lambda params: model.apply(params, x).sum())(params)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    np.testing.assert_allclose(gradients["second"]["bias"], [5.0, 5.0], rtol=1e-6)


def test_a_renamed_parameter_is_an_error_that_names_it(model):
    params = model.init(jax.random.key(0))
    params["first"]["weight"] = params["first"].pop("kernel")
    with pytest.raises(ValueError, match="missing: first/kernel; unexpected: first/weight"):
        model.apply(params, jnp.ones((1, 3)))


def test_random_state_in_a_module_is_refused():
    with pytest.raises(TypeError, match=r"dropout/rngs/count is a RngCount"):
        functional(Noisy)


def test_functional_is_hashable_and_jits_as_a_static_argument(model):
    apply = jax.jit(lambda model, params, x: model.apply(params, x), static_argnums=0)
    params = model.init(jax.random.key(0))
    np.testing.assert_allclose(
        apply(model, params, jnp.ones((1, 3))), model.apply(params, jnp.ones((1, 3))), rtol=1e-5
    )


def test_unflatten_inverts_flatten(model):
    params = model.init(jax.random.key(0))
    again = unflatten(flatten(params))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert again["second"]["kernel"] is params["second"]["kernel"]
