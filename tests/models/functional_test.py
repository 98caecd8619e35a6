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


class Normalised(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.second = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.codes = nnx.Variable(jax.random.normal(rngs.params(), (4, 2)))

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.second(self.norm(x, use_running_average=not train))

    def nearest(self, x: jax.Array) -> jax.Array:
        return jnp.square(x[:, None] - self.codes[...]).sum(-1).argmin(-1)


def test_a_module_without_other_state_has_no_variables(model):
    assert not model.has_variables
    assert model.init_variables(jax.random.key(0)) == {}
    params, x = model.init(jax.random.key(0)), jnp.ones((2, 3))
    result, variables = model.apply_and_update(params, {}, x)
    np.testing.assert_array_equal(result, model.apply(params, x))
    assert variables == {}
    with pytest.raises(ValueError, match=r"variables do not fit .* unexpected: mean"):
        model.apply(params, x, variables={"mean": x})


def test_state_that_no_gradient_trains_is_a_second_plain_dict():
    model = functional(Normalised)
    key = jax.random.key(0)
    params, variables = model.init(key), model.init_variables(key)
    assert model.has_variables
    assert set(flatten(params)) == {"norm/bias", "norm/scale", "second/bias", "second/kernel"}
    assert set(flatten(variables)) == {"codes", "norm/mean", "norm/var"}
    shapes = jax.tree.map(jnp.shape, variables)
    assert jax.tree.map(lambda leaf: leaf.shape, model.variables_shapes()) == shapes
    whole = Normalised(nnx.Rngs(key))  # both come from the same module
    np.testing.assert_array_equal(variables["codes"], whole.codes[...])
    np.testing.assert_array_equal(params["second"]["kernel"], whole.second.kernel[...])


def test_apply_reads_variables_and_apply_and_update_returns_them_changed():
    model = functional(Normalised)
    params, variables = model.init(jax.random.key(0)), model.init_variables(jax.random.key(0))
    x = jnp.arange(12.0).reshape(4, 3)
    trained, updated = jax.jit(model.apply_and_update, static_argnames="train")(
        params, variables, x, train=True
    )
    np.testing.assert_allclose(updated["norm"]["mean"], 0.5 * x.mean(0), rtol=1e-6)
    np.testing.assert_array_equal(updated["codes"], variables["codes"])
    np.testing.assert_array_equal(variables["norm"]["mean"], np.zeros(3))
    dropped = model.apply(params, x, variables=variables, train=True)
    np.testing.assert_allclose(dropped, trained, rtol=1e-5)
    before = model.apply(params, x, variables=variables, train=False)
    after = model.apply(params, x, variables=updated, train=False)
    assert not np.allclose(before, after)
    codes = model.apply(params, variables["codes"], variables=variables, method="nearest")
    np.testing.assert_array_equal(codes, range(4))


def test_missing_variables_are_an_error_that_names_them():
    model = functional(Normalised)
    params = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"variables .* missing: codes, norm/mean, norm/var;"):
        model.apply(params, jnp.ones((1, 3)), train=False)


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
