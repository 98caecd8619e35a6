"""The residual stream: factors of branches, and a gradient that is stored on CPUs alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.models.kernels.residual import add_branch


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32) for _ in range(3))


def test_a_factor_multiplies_a_samples_branch(arrays):
    x, branch, _ = arrays
    factor = jnp.asarray([0.0, 1.0, 1.25])
    out = add_branch(x, branch, factor=factor)
    np.testing.assert_array_equal(out[0], x[0])
    np.testing.assert_array_equal(out[1], x[1] + branch[1])
    np.testing.assert_allclose(out[2], x[2] + 1.25 * branch[2], rtol=1e-6)
    np.testing.assert_array_equal(add_branch(x, branch, factor=None), x + branch)


@pytest.mark.parametrize("factor", [None, jnp.asarray([0.0, 1.0, 1.25])])
def test_gradients_equal_a_plain_sums(arrays, factor):
    x, branch, weights = arrays

    def gradients(add):
        return jax.jit(jax.grad(lambda x, y: (weights * add(x, y)).sum(), argnums=(0, 1)))(
            x, branch
        )

    def plain(x, y):
        return x + (y if factor is None else factor[:, None, None] * y)

    actual = gradients(lambda x, y: add_branch(x, y, factor=factor))
    jax.tree.map(np.testing.assert_array_equal, actual, gradients(plain))


def test_the_result_has_the_streams_dtype(arrays):
    x, branch, _ = arrays
    out = add_branch(x.astype(jnp.bfloat16), branch, factor=jnp.ones(3))
    assert out.dtype == jnp.bfloat16


def test_only_on_cpus_the_gradient_goes_through_a_conditional(arrays):
    x, branch, _ = arrays
    gradient = jax.jit(jax.grad(lambda x, y: add_branch(x, y, factor=None).sum())).trace(x, branch)
    assert " conditional(" in gradient.lower(lowering_platforms=("cpu",)).compile().as_text()
    for platform, expected in (("cpu", True), ("tpu", False), ("cuda", False)):
        program = gradient.lower(lowering_platforms=(platform,)).as_text()
        assert ("optimization_barrier" in program) == expected
