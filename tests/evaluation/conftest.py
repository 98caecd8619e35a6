"""The small encoder, written and loaded once for each file of tests."""

import pytest

from beit_jax.evaluation import features
from tests.evaluation import examples


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    return examples.write_encoder(str(tmp_path_factory.mktemp("weights") / "encoder"))


@pytest.fixture(scope="module")
def frozen(encoder) -> features.FrozenEncoder:
    return features.load_frozen_encoder(encoder)
