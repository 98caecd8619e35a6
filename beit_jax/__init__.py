"""BEiT masked-image-modelling pre-training in JAX/Flax, and the way from there into PyTorch."""

__version__ = "0.1.0"
