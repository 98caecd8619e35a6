"""The tiny model that the tests share: 3 × 3 patches, three blocks 32 wide, float32.

Tests change what they need with `dataclasses.replace`. Config files as small as this, for tests
that run whole jobs, are in tests/tasks/tiny.py.
"""

import dataclasses

from beit_jax.config.model import ModelConfig

TINY = ModelConfig(
    layers=3,
    width=32,
    heads=4,
    mlp_width=64,
    image_size=24,
    patch_size=8,
    drop_path_rate=0.0,
    dtype="float32",
)
PLAIN = dataclasses.replace(TINY, positions="absolute", layer_scale_init=None)
PER_BLOCK = dataclasses.replace(TINY, positions="relative_per_block")
