"""Attention kernels where there is no chip for them."""

import functools

import pytest
from jax.experimental.pallas import tpu as pltpu

from beit_jax.models import attention


@pytest.fixture
def attention_anywhere(monkeypatch):
    """Interprets the TPU kernel, and computes cuDNN's calls with XLA."""
    monkeypatch.setattr(
        attention, "_cudnn", functools.partial(attention._cudnn, library="xla"), raising=True
    )
    with pltpu.force_tpu_interpret_mode():
        yield
