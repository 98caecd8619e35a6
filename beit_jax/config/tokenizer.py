"""What the settings of every tokenizer have in common."""

import dataclasses
from typing import Annotated

from beit_jax.config.bounds import (
    Name,
    OneOf,
    PathOrNone,
    Pixels,
    Sha256,
    Within,
    check_fields,
)
from beit_jax.config.parse import check, shape_setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer that gives the targets: the part that all kinds share.

    A kind's own settings are a subclass beside its code (`tokenizers/dalle.py`, `dvae.py`), which
    also gives `kind` its default and defines `stride`. `tokenizers/kinds.py` has the table.
    """

    kind: Name = shape_setting()
    path: PathOrNone = ""  # safetensors file; "" with `random_weights` only
    random_weights: bool = False  # for trying the machinery: ids then mean nothing
    vocabulary: Annotated[int, Within(ge=2, le=1_048_576)] = shape_setting(8192)
    image_size: Pixels = 112
    # Of the convolutions: "auto" is bfloat16 on accelerators, float32 on CPU. The last one, which
    # scores the tokens, is always float32. Ids near ties depend on it (bench/tokenizer.py).
    dtype: Annotated[str, OneOf("auto", "float32", "bfloat16")] = "auto"
    sha256: Sha256 = ""  # of the file at `path`; "" means not checked

    def __post_init__(self) -> None:
        check_fields(self)
        check(
            self.image_size % self.stride == 0,
            "image_size",
            f"{self.image_size} is not a multiple of the stride {self.stride}",
        )

    @property
    def stride(self) -> int:
        """Pixels of the token view per token, along one side."""
        raise NotImplementedError(f"{type(self).__name__} must define its stride")

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.image_size // self.stride
