"""The loss of every pixel against PyTorch's interpolation and cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax.training.pixel_loss import pixel_sums

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(("side", "size"), [(6, 24), (5, 80), (3, 3)])
def test_equals_pytorch_in_loss_and_gradient(side, size):
    random = np.random.default_rng(side)
    logits = random.normal(size=(2, side, side, 7)).astype(np.float32) * 3
    labels = random.integers(0, 7, (2, size, size)).astype(np.uint8)
    labels[random.random(labels.shape) < 0.2] = 255

    leaf = torch.from_numpy(logits.transpose(0, 3, 1, 2).copy()).requires_grad_()
    upsampled = torch.nn.functional.interpolate(leaf, size=(size, size), mode="bilinear")
    targets = torch.from_numpy(labels.astype(np.int64))
    expected = torch.nn.functional.cross_entropy(
        upsampled, targets, ignore_index=255, reduction="sum"
    )
    expected.backward()

    def loss(logits):
        sums = pixel_sums(logits, jnp.asarray(labels))
        return sums["loss"], sums

    (value, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(
        gradient, leaf.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5
    )
    assert float(sums["labelled"]) == (labels != 255).sum()
    assert float(sums["correct"]) == int((upsampled.argmax(1) == targets).sum())


def test_labels_that_are_no_multiple_are_refused():
    with pytest.raises(ValueError, match="10 pixels wide are not a multiple of logits 4 wide"):
        pixel_sums(jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 10, 10), jnp.uint8))
