"""What a state dict with the official names holds: those of microsoft/unilm, which timm kept.

Such a file says little about itself, and other models have the same names: EVA-01, a ViT with
rotary positions, one that normalises after its branches. What is stated beside the tensors (a
config, an architecture's name, this project's own entry) comes first, then names and shapes; what
is left is a guess, which is reported as one.
"""

import dataclasses
import json
import re

from beit_jax.config import ModelConfig
from beit_jax.json_text import json_object
from beit_jax.types import JsonObject
from beit_jax.weights import description as descriptions
from beit_jax.weights import resize
from beit_jax.weights.description import Description
from beit_jax.weights.formats.format import Described, Opened, State, Stated
from beit_jax.weights.formats.view import View, kept_of, view_of
from beit_jax.weights.report import WeightsError

# The entry of a file that this project wrote: JSON of `description.to_config`.
OWN = "beit_jax"
OFFICIAL_EPSILON = 1e-6
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
# The shallow head that aggregates patches in BEiT v2's pre-training, beside which the encoder and
# its token head are v1's.
_AGGREGATION = ("cls_pt_layers", "cls_pt_norm", "cls_pt_lm_head")
_TABLE = "relative_position_bias_table"
_ENCODER = re.compile(
    r"(cls_token|mask_token|pos_embed|dist_token|reg_token|register_tokens|rope|norm_pre|pos_drop|patch_drop"
    r"|patch_embed|rel_pos_bias|blocks)(\.|$)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """What a file's config says of its model.

    Attributes:
      beit: whether it names an architecture that is a BEiT: pre-norm blocks, exact GELU.
      heads: attention heads; 0 where it doesn't say.
      layer_norm_epsilon: None where it doesn't say.
      normalization: a key of `NORMALIZATIONS`; "" where it doesn't say.
      labels: names of the classes.
      arguments: of the model, by the names of its library; the tensors must agree with them.
      source: where these stand, for messages.
      pooling: whether it says how a classifier pools, in agreement with the tensors.
      notes: lines for the report.
      kept: for `Described.kept`.
    """

    beit: bool = False
    heads: int = 0
    layer_norm_epsilon: float | None = None
    normalization: str = ""
    labels: tuple[str, ...] = ()
    arguments: JsonObject = dataclasses.field(default_factory=dict)
    source: str = ""
    pooling: bool = False
    notes: tuple[str, ...] = ()
    kept: JsonObject = dataclasses.field(default_factory=dict)


# Either may be another model's, which is none of this project's.
_POOLING = {
    "cls": "of the class token: by its norm; a mean behind that norm has the same names",
    "mean": "of the mean: by its fc_norm; a class token before that norm has the same names",
}


def has_official_keys(state: State) -> bool:
    """Whether the keys are those of the official models, which timm has too."""
    return "cls_token" in state and "blocks.0.attn.qkv.weight" in state


def in_encoder(key: str) -> bool:
    """Whether a key, known or not, is of the encoder; its last norm is not counted."""
    return _ENCODER.match(key) is not None


def describe(opened: Opened, *, stated: Stated, known: Known) -> Described:
    """Describes a state dict with official names.

    Args:
      opened: the file.
      stated: the caller's own facts.
      known: what the file's config says.

    Raises:
      WeightsError: a key is missing, the shapes make no model, or it is another architecture's.
    """
    by_itself = described_by_itself(opened, stated=stated)
    if by_itself is not None:
        return by_itself
    guessed: dict[str, str] = {}
    model = encoder_of(opened, stated=stated, known=known, guessed=guessed)
    task, outputs, pooling, left_out = _head(opened.state, source=opened.path)
    if task == "classify" and not known.pooling:
        guessed["pooling"] = _POOLING[pooling]
    labels = known.labels if len(known.labels) == outputs else ()
    notes = known.notes
    if known.labels and not labels and task == "classify":
        notes = (f"labels left out: there are {len(known.labels)} for {outputs} classes",)
    normalization = stated.normalization or known.normalization
    if not normalization:
        normalization = "half"
        guessed["normalization"] = "half: the file does not say (--normalization says otherwise)"
    return Described(
        description=Description(
            task=task,
            model=model,
            outputs=outputs,
            pooling=pooling,
            mask_token=task == "encoder" and "mask_token" in opened.state,
            normalization=normalization,
            labels=labels,
        ),
        guessed=guessed,
        left_out=left_out,
        kept=known.kept,
        notes=notes,
    )


def own_entry(description: Description, *, config: JsonObject) -> str:
    """The entry by which a file that this project writes says what it is.

    Args:
      description: of the file's tensors.
      config: saved with the checkpoint; of it, how images are made.
    """
    view = view_of(config, image_size=description.model.image_size)
    kept = {"view": dataclasses.asdict(view), "format": kept_of(config).get("format", "")}
    guessed = config.get("imported_from", {}).get("guessed", {})
    return json.dumps(
        descriptions.to_config(description) | {"kept": kept, "guessed": dict(guessed)}
    )


def check_epsilon(description: Description, *, format: str) -> None:
    """Raises WeightsError where a format whose models have epsilon 1e-6 is to hold another one."""
    found = description.model.layer_norm_epsilon
    if found != OFFICIAL_EPSILON:
        raise WeightsError(
            f"{format} have layer_norm_epsilon {OFFICIAL_EPSILON:g}, this checkpoint {found:g}, so"
            f" that other numbers would come out; --epsilon {OFFICIAL_EPSILON:g} exports it anyway"
        )


def encoder_of(
    opened: Opened, *, stated: Stated, known: Known, guessed: dict[str, str]
) -> ModelConfig:
    """The encoder's sizes, from names and shapes.

    Args:
      opened: the file.
      stated: the caller's own facts.
      known: what the file's config says.
      guessed: gets what the file does not say.

    Raises:
      WeightsError: a key is missing, the shapes make no model, or it is another architecture's.
    """
    try:
        return _model_config(opened.state, stated=stated, known=known, guessed=guessed)
    except KeyError as error:
        raise WeightsError(f"{opened.path}: not a BEiT: {error.args[0]} is missing") from None
    except IndexError:
        raise WeightsError(f"{opened.path}: not a BEiT: a tensor lacks dimensions") from None
    except ValueError as error:
        raise WeightsError(f"{opened.path}: {error}") from None


def described_by_itself(opened: Opened, *, stated: Stated) -> Described | None:
    """What a file that this project wrote says of itself; None where it has no such entry.

    Raises:
      WeightsError: the entry is damaged, or of other tensors.
    """
    own = opened.extras.get(OWN) or opened.metadata.get(OWN)
    if not own:
        return None
    try:
        config = json_object(str(own), path=OWN)
        description = descriptions.describe(config)
        _check_types(description)
        said = config.get("kept", {})
        kept = {
            "view": dataclasses.asdict(View(**said.get("view", {}))),
            "format": str(said.get("format", "")),
        }
        guessed = {str(name): str(text) for name, text in config.get("guessed", {}).items()}
    except Exception as error:  # JSON that was changed can raise anything
        text = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{opened.path}: its entry {OWN!r} is damaged: {type(error).__name__}: {text}"
        ) from None
    _check_grid(description.model, opened)
    return Described(description=stated.over(description), guessed=guessed, kept=kept)


def _check_types(description: Description) -> None:
    """Raises ValueError for what `describe` takes as it stands in a config."""
    largest = 1 << 20
    sizes = (description.outputs, *(description.model.sizes.values()), description.model.image_size)
    if not all(type(size) is int and 0 <= size <= largest for size in sizes):
        raise ValueError("a size is no whole number, or absurd")
    if not isinstance(description.mask_token, bool):
        raise ValueError(f"mask_token is {description.mask_token!r}")


def _check_grid(model: ModelConfig, opened: Opened) -> None:
    """Raises WeightsError where sizes differ so far that working out all shapes would be absurd."""
    try:
        found = (_blocks(opened.state), resize.grid_of_state(opened.state))
    except (ValueError, IndexError):
        found = (0, None)
    if found != (model.layers, model.grid):
        raise WeightsError(f"{opened.path}: its tensors do not fit its entry {OWN!r}")


def _head(state: State, *, source: str) -> tuple[str, int, str, tuple[str, ...]]:
    """Task, outputs, pooling, and what the task leaves without a use."""
    if "head.weight" in state:
        task, outputs = "classify", _outputs(state, "head.weight", source=source)
    elif "lm_head.weight" in state:
        return "pretrain", _outputs(state, "lm_head.weight", source=source), "mean", _AGGREGATION
    else:
        task, outputs = "encoder", 0
    left_out = (*_AGGREGATION, "lm_head", "mask_token") if task == "classify" else _AGGREGATION
    if "fc_norm.weight" in state:
        # A pre-trained model's last norm, which a fine-tuned one that pools the mean has not.
        return task, outputs, "mean", (*left_out, "norm")
    if "norm.weight" in state:
        return task, outputs, "cls", left_out
    if task == "classify":
        raise WeightsError(f"{source}: missing fc_norm.weight (or norm.weight)")
    return task, outputs, "none", left_out


def _outputs(state: State, key: str, *, source: str) -> int:
    if state[key].ndim != 2 or not state[key].shape[0]:
        raise WeightsError(f"{source}: {key} is {state[key].shape}, not [outputs, width]")
    return state[key].shape[0]


def _model_config(
    state: State, *, stated: Stated, known: Known, guessed: dict[str, str]
) -> ModelConfig:
    """Sizes from shapes; KeyError, IndexError or ValueError where they make no model."""
    patch = state["patch_embed.proj.weight"].shape[-1]
    width = state["cls_token"].shape[-1]
    mlp_width = state["blocks.0.mlp.fc1.weight"].shape[0]
    _check_width(state, width=width)
    positions = _positions(state)
    grid = resize.grid_of_state(state)
    if positions == "absolute" and not known.beit:
        _refuse_look_alikes(state, width=width, mlp_width=mlp_width, patch=patch)
    layers = _blocks(state)
    scale = None
    if "blocks.0.gamma_1" in state:
        # The file has gamma but not where it started; the recipes' values keep the config valid.
        scale = 0.1 if layers <= 12 else 1e-5
    epsilon = stated.layer_norm_epsilon or known.layer_norm_epsilon
    if epsilon is None:
        epsilon = OFFICIAL_EPSILON
        if not known.beit:
            guessed["layer_norm_epsilon"] = (
                "1e-06: as in the official models (--epsilon sets another)"
            )
    if not known.beit:
        guessed["activation"] = (
            "exact GELU in blocks that normalise first, as in the official models (there are no"
            " others here)"
        )
    return ModelConfig(
        layers=layers,
        width=width,
        heads=_heads(state, stated=stated, known=known, guessed=guessed),
        mlp_width=mlp_width,
        image_size=(grid or 0) * patch,
        patch_size=patch,
        positions=positions,
        layer_scale_init=scale,
        layer_norm_epsilon=epsilon,
    )


def _check_width(state: State, *, width: int) -> None:
    """ValueError where tensors disagree about the width: an absurd one must not be worked with."""
    found = {
        "patch_embed.proj.weight": state["patch_embed.proj.weight"].shape[0],
        "blocks.0.norm1.weight": state["blocks.0.norm1.weight"].shape[0],
        "blocks.0.attn.qkv.weight": state["blocks.0.attn.qkv.weight"].shape[-1],
    }
    for key, value in found.items():
        if value != width:
            raise ValueError(f"cls_token is {width} wide, {key} {value}")


def _positions(state: State) -> str:
    kinds = []
    if "pos_embed" in state:
        kinds.append("absolute")
    if SHARED_TABLE in state:
        kinds.append("relative_shared")
    if any(key.startswith("blocks.") and key.endswith(_TABLE) for key in state):
        kinds.append("relative_per_block")
    if len(kinds) != 1:
        if not kinds:
            raise ValueError("there are neither absolute nor relative positions: not a BEiT")
        raise ValueError(
            f"positions are {' and '.join(kinds)}; this project's models have one kind of them"
        )
    return kinds[0]


def _refuse_look_alikes(state: State, *, width: int, mlp_width: int, patch: int) -> None:
    """Raises ValueError for a model with a plain ViT's names whose sizes are no BEiT's.

    EVA-01 and the models that normalise after their branches (EVA-02 enormous) have the names of a
    BEiT with absolute positions. Published BEiTs have MLPs of four times the width and patches of
    16 pixels.
    """
    if mlp_width > 4 * width or patch == 14:
        raise ValueError(
            f"absolute positions, an MLP {mlp_width / width:g} times as wide as its tokens and"
            f" patches of {patch} pixels are not a BEiT's; EVA has such sizes, and computes"
            " something else under the same names"
        )


def _heads(state: State, *, stated: Stated, known: Known, guessed: dict[str, str]) -> int:
    """Attention heads: a relative-position table's columns, what is stated, or a guess."""
    tables = [array for key, array in state.items() if key.endswith(_TABLE)]
    width = state["cls_token"].shape[-1]
    if tables:
        return tables[0].shape[-1]
    if stated.heads or known.heads:
        return stated.heads or known.heads
    if width % 64 and stated.elsewhere:
        guessed["heads"] = "1: parameters have the same shapes with any number"
        return 1
    if width % 64:
        raise ValueError(f"the file does not say how many heads its {width} channels make: --heads")
    guessed["heads"] = (
        f"{width // 64}: width {width} / 64, as in all published models (--heads says otherwise)"
    )
    return width // 64


def _blocks(state: State) -> int:
    """The number of blocks; ValueError where they are not numbered 0, 1, ...."""
    matches = (re.match(r"blocks\.(\d{1,6})\.", key) for key in state)
    numbers = {int(match[1]) for match in matches if match}
    if numbers != set(range(len(numbers))):
        raise ValueError("its blocks are not numbered 0, 1, 2, ...")
    return len(numbers)
