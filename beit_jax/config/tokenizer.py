"""The frozen tokenizer's settings."""

import dataclasses

from beit_jax.config.parse import check, one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The frozen tokenizer that names the targets.

    `kind` "dalle": the DALL-E dVAE (openai/DALL-E), stride 8, vocabulary 8192. "dvae": own discrete
    VAE (modeling_discrete_vae.py), trained with `tasks/tokenizer.py`, stride 2**levels.
    """

    kind: str
    path: str = ""  # safetensors file; "" with `random_weights` only
    random_weights: bool = False  # for trying the machinery: ids then mean nothing
    vocabulary: int = 8192
    image_size: int = 112
    # Of the convolutions: "auto" is bfloat16 on accelerators, float32 on CPU. The last one, which
    # scores the tokens, is always float32. Ids near ties depend on it (bench/tokenizer.py).
    dtype: str = "auto"
    width: int = 256  # hidden channels (both kinds)
    levels: int = 3  # dvae: halvings
    codebook_width: int = 512  # dvae
    sha256: str = ""  # of the file at `path`; "" means not checked

    def __post_init__(self):
        one_of(self.kind, "kind", "dalle", "dvae")
        one_of(self.dtype, "dtype", "auto", "float32", "bfloat16")
        check(self.vocabulary > 1, "vocabulary", f"must be at least 2, got {self.vocabulary}")
        check(
            self.image_size > 0 and self.image_size % self.stride == 0,
            "image_size",
            f"{self.image_size} is not a positive multiple of the stride {self.stride}",
        )
        check(self.width > 0 and self.width % 4 == 0, "width", "must be a multiple of 4")

    @property
    def stride(self) -> int:
        """Pixels of the token view per token, along one side."""
        return 8 if self.kind == "dalle" else 2**self.levels

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.image_size // self.stride
