"""Attention kernels where there is no chip for them."""

import functools

import pytest
from jax.experimental.pallas import tpu as pltpu

from beit_jax.models import attention


@pytest.fixture
def attention_anywhere(monkeypatch):
    """The TPU's kernel interpreted; what cuDNN is given, computed by XLA."""
    monkeypatch.setattr(
        attention, "_cudnn", functools.partial(attention._cudnn, library="xla"), raising=True
    )
    with pltpu.force_tpu_interpret_mode():
        yield
