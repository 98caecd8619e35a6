"""The GELU against its definition in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.models.kernels.gelu import gelu


def exact(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x Φ(x) and its derivative, in float64."""
    below = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    return x * below, below + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def test_value_and_derivative_to_float32_rounding():
    x = np.linspace(-9, 9, 7201)
    value, derivative = exact(np.float64(np.float32(x)))
    actual, back = jax.vjp(gelu, jnp.asarray(x, jnp.float32))
    (slope,) = back(jnp.ones_like(actual))
    # Φ is at most 7.5e-8 off, and rounded.
    assert np.abs(actual - value).max() < 1e-6
    assert np.abs(slope - derivative).max() < 4e-7
    # In the tail, where Φ is tiny, the relative error is within bfloat16's rounding.
    tail = (x > -6) & (x < -2)
    assert np.abs(actual[tail] / value[tail] - 1).max() < 2**-8


def test_far_from_zero_it_is_x_or_zero():
    ends = jnp.asarray([-1e4, -40.0, 0.0, 40.0, 1e4])
    np.testing.assert_array_equal(gelu(ends), [0, 0, 0, 40, 1e4])
    np.testing.assert_array_equal(jax.vmap(jax.grad(gelu))(ends), [0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_result_has_the_inputs_dtype(dtype):
    x = jnp.ones((2, 3), dtype)
    value, back = jax.vjp(gelu, x)
    assert value.dtype == back(value)[0].dtype == dtype
