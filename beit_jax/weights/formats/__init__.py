"""Foreign formats of weights: one module and one row each.

    FORMATS["timm"].write(export)
    FORMATS["toy"] = Format(...)  # from anywhere, before the command line is parsed

Formats are tried in the order of the rows, so a format whose keys are a special case of another's
stands before it.
"""

from beit_jax.weights.formats import (
    hugging_face,
    hugging_face_beit,
    mmseg,
    stablehlo,
    timm,
    unilm,
)
from beit_jax.weights.formats.format import (
    Described,
    Export,
    Format,
    Opened,
    Reader,
    Stated,
    Written,
)

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        *(hugging_face_beit.FORMAT, hugging_face.FORMAT, timm.FORMAT, unilm.FORMAT),
        *(mmseg.FORMAT, stablehlo.FORMAT),
    )
}

__all__ = [
    "FORMATS",
    "Described",
    "Export",
    "Format",
    "Opened",
    "Reader",
    "Stated",
    "Written",
]
