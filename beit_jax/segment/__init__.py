"""Class maps of a folder of images: `python -m beit_jax.segment IMAGES --weights=W --output=DIR`.

    python -m beit_jax.segment photos --weights=runs/camvid --output=painted
    python -m beit_jax.segment photos --weights=official.pth --output=painted --scales=0.5,1 --flip

Every readable image under the folder becomes a class map and an overlay under the same name. Needs
neither TensorFlow nor PyTorch: Pillow decodes.
"""

from beit_jax.segment.command import main

__all__ = ["main"]
