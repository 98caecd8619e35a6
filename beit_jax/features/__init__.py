"""Embeddings of a folder of images: `python -m beit_jax.features IMAGES --weights=W --output=F`.

    python -m beit_jax.features photos --weights=runs/base --output=features.npz
    python -m beit_jax.features photos --weights=beit_hf --pool=patches --block=9 --output=p.parquet

Every readable image under the folder becomes one row, with its file's name. Needs neither
TensorFlow nor PyTorch: Pillow decodes.
"""

from beit_jax.features.command import main

__all__ = ["main"]
