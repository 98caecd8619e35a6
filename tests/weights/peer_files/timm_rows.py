"""Models of timm: plain files, and folders as timm pushes them to the hub."""

import functools
import json
import os
from collections.abc import Callable
from typing import Any

from tests.weights.peer_files import files
from tests.weights.peer_files.row import Accepted, Built, Refused, Row

SIZES = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 5}
# What `resolve_data_config` gives; the others are not stored.
DATA = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def model_of(name: str, **arguments: Any) -> Any:
    """A random model of timm, tiny; arguments that are None are left out."""
    import timm

    given = {k: v for k, v in (SIZES | arguments).items() if v is not None}
    return files.randomize(timm.create_model(name, **given))


def forward_of(model: Any) -> Callable[..., Any]:
    """Logits; the tokens of a model without classes."""

    def forward(pixels: Any, mask: Any = None, *, model: Any = model) -> Any:
        return model(pixels) if model.num_classes else model.forward_features(pixels)

    return forward


def plain(folder: str, *, name: str, runs: bool, **arguments: Any) -> Built:
    """`safetensors.torch.save_file(model.state_dict())`."""
    model = model_of(name, **arguments)
    path = files.write_safetensors(f"{folder}/model.safetensors", model.state_dict())
    return _built(path, model, runs=runs)


def pushed(
    folder: str,
    *,
    name: str,
    runs: bool,
    then: Callable[[dict], dict] | None = None,
    **arguments: Any,
) -> Built:
    """`timm.models.save_for_hf`, and then perhaps another config.json."""
    from timm.models import save_for_hf

    model = model_of(name, **arguments)
    path = f"{folder}/model"
    save_for_hf(model, path, model_config={}, safe_serialization=True)
    if then is not None:
        files.change_json(f"{path}/config.json", then)
    return _built(path, model, runs=runs)


def _built(path: str, model: Any, *, runs: bool) -> Built:
    return Built(
        path=path,
        kind="classify" if model.num_classes else "encoder",
        model=model,
        forward=forward_of(model) if runs else None,
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
    )


BEIT = "beit_base_patch16_224"
V2 = "beitv2_base_patch16_224"
RELATIVE = {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}
ABSOLUTE = {"use_abs_pos_emb": True, "use_rel_pos_bias": False}
# What no plain file of timm says.
SILENT = ("layer_norm_epsilon", "activation", "normalization")


def _plain(
    name: str, outcome: Accepted | Refused, *, of: str = BEIT, fast: bool = False, **how: Any
) -> Row:
    build = functools.partial(plain, name=of, runs=isinstance(outcome, Accepted), **how)
    return Row(name=f"timm: {name}, plain file", build=build, outcome=outcome, fast=fast)


def _pushed(
    name: str, outcome: Accepted | Refused, *, of: str = BEIT, fast: bool = False, **how: Any
) -> Row:
    build = functools.partial(pushed, name=of, runs=isinstance(outcome, Accepted), **how)
    return Row(name=f"timm: {name}, folder", build=build, outcome=outcome, fast=fast)


def _file(*flags: str, guessed: tuple[str, ...] = SILENT, **more: Any) -> Accepted:
    return Accepted(format="timm", flags=flags, guessed=guessed, **more)


FOLDER = Accepted(format="timm", data=DATA)


def _other(
    of: str, line: str, *, plain_line: str = "", fast: bool = False, **how: Any
) -> tuple[Row, ...]:
    """Another architecture, as a plain file and as a folder."""
    return (
        _plain(of, Refused(line=plain_line or line), of=of, fast=fast, **how),
        _pushed(of, Refused(line=line), of=of, fast=fast, **how),
    )


def _statistics(**values: Any) -> Callable[[dict], dict]:
    return lambda config: config | {"pretrained_cfg": config["pretrained_cfg"] | values}


BEITS = (
    _plain("per-block tables", _file(), fast=True),
    _plain(
        "per-block tables, normalisation given",
        _file("--normalization", "half", guessed=SILENT[:2]),
    ),
    _plain(
        "version 2, normalisation given",
        _file("--normalization", "imagenet", guessed=SILENT[:2], data=("mean", "std")),
        of=V2,
        fast=True,
    ),
    _plain(
        "shared table", _file(copies=True), use_rel_pos_bias=False, use_shared_rel_pos_bias=True
    ),
    _plain("no LayerScale", _file(), init_values=0.0),
    _plain("class token", _file(), global_pool="token"),
    _plain("three heads", _file(), embed_dim=48, num_heads=3),
    _plain("no head", _file(), num_classes=0),
    _plain("no head, final norm", _file(), num_classes=0, global_pool=""),
    _plain("absolute positions, heads given", _file("--heads", "4"), **ABSOLUTE),
    _plain(
        "absolute positions, heads guessed",
        _file(guessed=("heads", *SILENT), wrong=True, right_flags=("--heads", "4")),
        fast=True,
        **ABSOLUTE,
    ),
    _pushed("per-block tables", FOLDER, fast=True),
    _pushed(
        "shared table",
        Accepted(format="timm", data=DATA, copies=True),
        use_rel_pos_bias=False,
        use_shared_rel_pos_bias=True,
    ),
    _pushed("version 2", FOLDER, of=V2, fast=True),
    _pushed("class token", FOLDER, global_pool="token"),
    _pushed("three heads, absolute positions", FOLDER, embed_dim=48, num_heads=3, **ABSOLUTE),
    _pushed("no head", FOLDER, num_classes=0),
    _pushed("no head, final norm", FOLDER, num_classes=0, global_pool=""),
    _pushed("drop path", FOLDER, drop_path_rate=0.2),
    _pushed(
        "crop and interpolation",
        FOLDER,
        pretrained_cfg_overlay={"crop_pct": 0.8, "interpolation": "bilinear"},
    ),
    _pushed(
        "names of the classes",
        FOLDER,
        pretrained_cfg_overlay={"label_names": ["a", "b", "c", "b", "e"]},
    ),
    _pushed(
        "ImageNet's statistics",
        FOLDER,
        pretrained_cfg_overlay={"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    ),
)

REFUSED = (
    # The mean is of normalised tokens: neither of this project's poolings.
    _pushed(
        "mean of normalised tokens",
        Refused(line="use_fc_norm|global_pool|fc_norm"),
        use_fc_norm=False,
    ),
    # A plain file cannot say that: it looks like the class token's.
    _plain(
        "mean of normalised tokens",
        _file(wrong=True),
        use_fc_norm=False,
    ),
    _pushed("logits of every token", Refused(line="global_pool"), global_pool=""),
    _plain("patch that is no square", Refused(line="square"), patch_size=(16, 8)),
    _plain("image that is no square", Refused(line="table|grid|square"), img_size=(64, 96)),
    _plain(
        "class token before its norm",
        _file(wrong=True),
        global_pool="token",
        use_fc_norm=True,
    ),
    _pushed(
        "class token before its norm",
        Refused(line="global_pool"),
        global_pool="token",
        use_fc_norm=True,
    ),
    _plain("gated MLP", Refused(line=r"mlp\.fc1"), swiglu_mlp=True),
    _pushed("gated MLP", Refused(line="swiglu"), swiglu_mlp=True),
    _plain("normalised MLP", Refused(line=r"mlp\.norm"), scale_mlp=True),
    _pushed("normalised MLP", Refused(line="scale_mlp"), scale_mlp=True),
    _plain("one channel", Refused(line="channel"), in_chans=1),
    _pushed("one channel", Refused(line="channel|in_chans"), in_chans=1),
    _plain("no query bias", Refused(line="q_bias"), qkv_bias=False),
    _plain(
        "per-block and shared tables",
        Refused(line="shared|rel_pos_bias"),
        use_shared_rel_pos_bias=True,
    ),
    _plain(
        "absolute and relative positions", Refused(line="pos_embed|absolute"), use_abs_pos_emb=True
    ),
    _pushed(
        "unknown statistics",
        Refused(line="normalization"),
        pretrained_cfg_overlay={"mean": (0.4, 0.4, 0.4)},
    ),
    _pushed("statistics in words", Refused(line="mean|std"), then=_statistics(mean="half")),
    _pushed(
        "an unknown model argument",
        Refused(line="rope_theta"),
        then=lambda config: (
            config | {"model_args": config.get("model_args", {}) | {"rope_theta": 100.0}}
        ),
    ),
    _pushed(
        "model_args that are a list",
        Refused(line="model_args"),
        then=lambda config: config | {"model_args": [1]},
    ),
    _pushed(
        "pretrained_cfg that is a number",
        Refused(line="pretrained_cfg"),
        then=lambda config: config | {"pretrained_cfg": 3},
    ),
)

# A plain file has no name of its architecture; what shows that it is no BEiT is in `plain_line`.
OTHERS = (
    *_other(
        "eva_giant_patch14_224",
        "eva_giant_patch14_224",
        plain_line="EVA",
        img_size=56,
        fast=True,
    ),
    *_other(
        "eva02_enormous_patch14_clip_224",
        "eva02_enormous",
        plain_line="EVA",
        img_size=56,
    ),
    *_other(
        "eva02_base_patch14_224",
        "eva02_base",
        plain_line="not a BEiT",
        img_size=56,
    ),
    *_other(
        "vit_base_patch16_rope_224", "vit_base_patch16_rope_224", plain_line="positions: not a BEiT"
    ),
    *_other(
        "vit_base_patch16_rope_ape_224",
        "vit_base_patch16_rope_ape_224",
        plain_line=r"unused .*attn\.qkv\.bias",
    ),
    *_other(
        "vit_base_patch16_rope_mixed_224",
        "vit_base_patch16_rope_mixed_224",
        plain_line="positions: not a BEiT",
        fast=True,
    ),
    *_other(
        "vit_base_patch16_rope_mixed_ape_224",
        "vit_base_patch16_rope_mixed_ape_224",
        plain_line=r"unused .*rope\.freqs",
    ),
    *_other(
        "vit_base_patch16_rope_reg1_gap_256",
        "not a BEiT",
        plain_line="not a BEiT",
    ),
    *_other(
        "vit_base_patch16_224",
        "vit_base_patch16_224",
        plain_line=r"unused .*attn\.qkv\.bias",
        fast=True,
    ),
    *_other(
        "vit_small_patch16_dinov3", "vit_small_patch16_dinov3", plain_line="positions: not a BEiT"
    ),
    *_other(
        "vit_small_patch16_dinov3_qkvb",
        "vit_small_patch16_dinov3_qkvb",
        plain_line="positions: not a BEiT",
    ),
    *_other("deit3_base_patch16_224", "deit3_base_patch16_224", plain_line=r"unused .*ls1\.gamma"),
    *_other(
        "beit3_base_patch16_224",
        "beit3_base_patch16_224",
        plain_line=r"unused .*attn\.norm",
        num_classes=5,
    ),
)


def _metadata(folder: str, *, metadata: dict[str, str]) -> Built:
    """A plain file whose header says something under "timm" that this project did not write."""
    model = model_of(BEIT)
    path = files.write_safetensors(f"{folder}/model.safetensors", model.state_dict(), metadata)
    return _built(path, model, runs=True)


METADATA = tuple(
    Row(
        name=f"timm: metadata, {name}",
        build=functools.partial(_metadata, metadata={"format": "pt", **metadata}),
        outcome=outcome,
    )
    for name, metadata, outcome in (
        ("another program's", {"timm": "1.0.31"}, _file()),
        ("a list", {"timm": json.dumps([1])}, _file()),
        ("without arguments", {"timm": json.dumps({"name": BEIT})}, _file()),
        (
            "odd arguments",
            {"timm": json.dumps({"name": BEIT, "arguments": {"num_heads": "x"}})},
            Refused(line="timm: num_heads is"),
        ),
        ("unknown normalisation", {"normalization": "mine"}, _file()),
    )
)


def _bin(folder: str) -> Built:
    """As timm pushed before safetensors."""
    built = pushed(folder, name=BEIT, runs=True)
    state = files.read_safetensors(f"{built.path}/model.safetensors")
    files.write_pth(f"{built.path}/pytorch_model.bin", state)
    os.remove(f"{built.path}/model.safetensors")
    return built


def _flat_config(config: dict) -> dict:
    """As timm wrote it before 0.9: one level, no arguments of the model."""
    kept = {k: v for k, v in config.items() if k not in ("pretrained_cfg", "model_args")}
    return kept | config["pretrained_cfg"]


OLD = (
    _pushed(
        "config of one level",
        Accepted(format="timm", data=("mean", "std", "crop_pct", "interpolation")),
        of=V2,
        then=_flat_config,
    ),
    _pushed(
        "architecture with a tag",
        FOLDER,
        then=lambda config: config | {"architecture": f"{BEIT}.in22k_ft_in22k_in1k"},
    ),
)

CONTAINERS = (
    Row(
        name="timm: a safetensors file",
        build=functools.partial(plain, name=BEIT, runs=True),
        outcome=_file(),
        container=True,
    ),
    Row(
        name="timm: a folder",
        build=functools.partial(pushed, name=BEIT, runs=True),
        outcome=FOLDER,
        container=True,
    ),
    Row(name="timm: a folder with pytorch_model.bin", build=_bin, outcome=FOLDER, container=True),
)

ROWS = (*BEITS, *REFUSED, *OTHERS, *METADATA, *OLD, *CONTAINERS)
