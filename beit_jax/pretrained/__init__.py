"""Trained models as objects: load one from any checkpoint and call it on uint8 images.

    import beit_jax

    encoder = beit_jax.load_encoder("beit_base_patch16_224_pt22k.pth")
    out = encoder(images)                                # uint8 [b, 224, 224, 3]
    out.cls, out.patches                                 # [b, d], [b, 14, 14, d]
    middle = encoder.blocks(images, (3, 6, 12))          # raw outputs of these blocks

    def loss(params, images):                            # for your own jit, grad and shardings
        return encoder.apply(params, encoder.normalize(images)).cls.mean()

    gradients = jax.grad(loss)(encoder.params, images)

The convenience calls check the images, normalise them as the checkpoint expects, and are compiled
once per shape. They don't resize images; `image_size=` makes the model fit the images instead, by
interpolating its positions as the official code does. Nothing here imports TensorFlow, and Orbax is
imported only to read a checkpoint of this project.

Shapes: b images, s pixels a side, d width, c classes, v token ids.
"""

from beit_jax.pretrained.encoder import EncoderOutput, PretrainedEncoder
from beit_jax.pretrained.heads import PretrainedClassifier, PretrainedMaskedImageModel
from beit_jax.pretrained.loading import (
    load_classifier,
    load_encoder,
    load_masked_image_model,
    load_segmenter,
)
from beit_jax.pretrained.segmenter import PretrainedSegmenter
from beit_jax.pretrained.tokenizer import PretrainedTokenizer, load_tokenizer

__all__ = [
    "EncoderOutput",
    "PretrainedClassifier",
    "PretrainedEncoder",
    "PretrainedMaskedImageModel",
    "PretrainedSegmenter",
    "PretrainedTokenizer",
    "load_classifier",
    "load_encoder",
    "load_masked_image_model",
    "load_segmenter",
    "load_tokenizer",
]
