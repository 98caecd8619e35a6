"""Hugging Face's `BeitForSemanticSegmentation`, as Microsoft's published segmentation models are.

Its graph reads other blocks than the official one (`hugging_face_segment`), so an export says where
it can't be the same function. The format hugging_face writes segmenters as UperNet, which can.
"""

from beit_jax.weights.formats import hugging_face, hugging_face_segment
from beit_jax.weights.formats.format import (
    Described,
    Export,
    Format,
    Opened,
    Reader,
    Stated,
    Written,
)
from beit_jax.weights.formats.segmenter_keys import check_upernet
from beit_jax.weights.formats.unilm import is_index_buffer


def write(export: Export) -> Written:
    """Writes the folder that transformers' `from_pretrained` loads.

    Raises:
      WeightsError: the output is a file, or the class has no such head.
    """
    check_upernet(export.description, format="transformers")
    config, note = hugging_face_segment.beit_json(
        export.description, kept=hugging_face.kept_config(export)
    )
    return hugging_face.write_folder(
        export,
        class_name=hugging_face_segment.BEIT,
        config=config,
        table=hugging_face_segment.beit_table(export.description),
        notes=(note,) if note else (),
    )


def describe(opened: Opened, *, stated: Stated) -> Described:
    """Describes a folder by its `config.json`.

    Raises:
      WeightsError: there is no config, it is another model's, or it does not fit the tensors.
    """
    hugging_face.check_has_config(opened)
    config, head = hugging_face_segment.read_beit(opened, stated=stated)
    return hugging_face.describe_segmenter(
        opened,
        config,
        head,
        stated=stated,
        encoder=opened.state,
        left_out=hugging_face_segment.BEIT_LEFT_OUT,
        format="hugging_face_beit",
    )


FORMAT = Format(
    name="hugging_face_beit",
    help="a folder for BeitForSemanticSegmentation, which reads other blocks",
    suffix="",
    kinds=("segment",),
    write=write,
    reader=Reader(
        detect=lambda opened: hugging_face_segment.is_beit(opened.state),
        describe=describe,
        table=hugging_face_segment.beit_table,
        canonical=hugging_face_segment.canonical_beit,
        in_encoder=hugging_face.in_encoder,
        rebuilt=is_index_buffer,
    ),
)
