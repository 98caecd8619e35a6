"""DALL-E's tokenizer weights → the safetensors file that `tokenizers` loads.

Four sources, one table: `encoder.pkl` and `decoder.pkl` as OpenAI published them (whole pickled
modules), their state dicts (OpenMMLab's `dalle_encoder.pth`), and FLAVA's image codebook, which is
the encoder under other names (transformers `convert_dalle_to_flava_codebook.py`).
"""

import dataclasses
import re

import numpy as np

from beit_jax.models.functional import flatten, unflatten
from beit_jax.tokenizers.dalle import BLOCKS_PER_GROUP, GROUPS, DalleConfig, dalle_networks
from beit_jax.tokenizers.loading import save_params
from beit_jax.types import FlatParams, Params
from beit_jax.weights import containers, keys
from beit_jax.weights.keys import CONV, Table, row
from beit_jax.weights.report import Report, WeightsError, check_names


def _conv(foreign: str, native: str) -> Table:
    return row(f"{foreign}.w", f"{native}/kernel", CONV), row(f"{foreign}.b", f"{native}/bias")


def _table() -> Table:
    rows = [*_conv("blocks.input", "input")]
    for group in range(1, GROUPS + 1):
        for block in range(1, BLOCKS_PER_GROUP + 1):
            foreign = f"blocks.group_{group}.block_{block}"
            native = f"group_{group}/block_{block}"
            rows += _conv(f"{foreign}.id_path", f"{native}/identity")
            for conv in range(1, 5):
                rows += _conv(f"{foreign}.res_path.conv_{conv}", f"{native}/conv_{conv}")
    return (*rows, *_conv("blocks.output.conv", "output"))


# The same for encoder and decoder; a block without an identity convolution skips that row.
TABLE: Table = _table()
# Prefixes that training code adds where the tokenizer is a part of a larger module.
_PREFIXES = ("module.", "image_codebook.", "target_generator.", "encoder.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertedTokenizer:
    """The result of `convert_tokenizer`.

    Attributes:
      output: the file written.
      sha256: of that file, for `config.tokenizer.sha256`.
      sources: "encoder" and "decoder" → SHA-256 of the files read.
      reports: "encoder" and "decoder" → report.
      config: the settings the file fits.
    """

    output: str
    sha256: str
    sources: dict[str, str]
    reports: dict[str, Report]
    config: DalleConfig


def original_names(state: FlatParams) -> dict[str, np.ndarray]:
    """Renames FLAVA's and prefixed keys to the original ones; others stay."""
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): array for key, array in state.items()}
    result = {}
    for key, array in state.items():
        name = re.sub(r"(group_\d)\.group\.", r"\1.", key).replace("res_path.path.", "res_path.")
        name = re.sub(r"\.weight$", ".w", re.sub(r"\.bias$", ".b", name))
        result[name] = array
    return result


def convert_tokenizer(
    *,
    output: str,
    encoder: str,
    decoder: str = "",
    encoder_sha256: str = "",
    decoder_sha256: str = "",
    vocabulary: int = 8192,
    width: int = 256,
) -> ConvertedTokenizer:
    """Writes DALL-E's weights as one tokenizer file.

    Args:
      output: the safetensors file.
      encoder: a pickled module, a state dict (.pth, .bin, .safetensors), or FLAVA's codebook.
      decoder: the same; "" for none. Only pictures of tokens need it.
      encoder_sha256, decoder_sha256: what the files must have; "" skips the check.
      vocabulary: tokens the codebook must have.
      width: hidden channels, 256 in the published weights.

    Raises:
      WeightsError: a file is missing, damaged, refused, not what is expected, or does not fit.
    """
    if not output.endswith(".safetensors"):
        raise WeightsError(f"--output: {output} must end in .safetensors")
    config = DalleConfig(path=output, vocabulary=vocabulary, width=width)
    files = {"encoder": (encoder, encoder_sha256), "decoder": (decoder, decoder_sha256)}
    params, sources, reports = {}, {}, {}
    for part, (path, sha256) in files.items():
        if not path:
            continue
        content = containers.read_bytes(path)
        sources[part] = containers.check_sha256(content, sha256, source=path)
        state = containers.load(content, source=path).state
        params[part], reports[part] = to_params(state, part=part, config=config, source=path)
    save_params(output, params, config=config)
    return ConvertedTokenizer(
        output=output,
        sha256=containers.check_sha256(containers.read_bytes(output), "", source=output),
        sources=sources,
        reports=reports,
        config=config,
    )


def to_params(
    state: FlatParams, *, part: str, config: DalleConfig, source: str
) -> tuple[Params, Report]:
    """Converts one network's state dict to nested parameters, strictly.

    Args:
      state: original or FLAVA names.
      part: "encoder" or "decoder".
      config: width and vocabulary that are expected.
      source: for messages.
    """
    some = ", ".join(list(state)[:3])
    state = original_names(state)
    first, last = state.get("blocks.input.w"), state.get("blocks.output.conv.w")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        raise WeightsError(f"{source} is not DALL-E's {part}: its keys are {some}, ...")
    is_encoder = first.shape[-1] == 7
    if is_encoder != (part == "encoder"):
        other = "encoder" if is_encoder else "decoder"
        raise WeightsError(f"{source} is DALL-E's {other}, needed here: the {part}")
    vocabulary = last.shape[0] if is_encoder else first.shape[1]
    if vocabulary != config.vocabulary:
        raise WeightsError(
            f"{source} has a vocabulary of {vocabulary} tokens, expected {config.vocabulary}"
            " (--vocabulary)"
        )
    network = dalle_networks(config)[part]
    shapes = {name: leaf.shape for name, leaf in flatten(network.shapes()).items()}
    wanted = keys.foreign_shapes(shapes, TABLE)
    check_names(wanted, {key: a.shape for key, a in state.items()}, source=source)
    cast = tuple(f"{k} ({a.dtype})" for k, a in state.items() if a.dtype != np.float32)
    params = unflatten(keys.to_native(state, TABLE, layers=0))
    return params, Report(used=tuple(wanted), cast=cast)


def to_state(params: Params) -> dict[str, np.ndarray]:
    """Converts one network's nested parameters to a state dict that the original module loads."""
    return keys.to_foreign({k: np.asarray(a) for k, a in flatten(params).items()}, TABLE)
