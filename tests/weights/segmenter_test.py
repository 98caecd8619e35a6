"""Segmentation models: what every format holds comes back, and means the same pixels' classes.

mmseg's state dicts are made here by renaming transformers' models by the table of names that
mmsegmentation 0.11 has, not by the package's own.
"""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest

from beit_jax.config.segment import SegmentHeadConfig
from beit_jax.models.functional import flatten, unflatten
from beit_jax.models.segmenter import segmenter
from beit_jax.training.checkpoint import restore_params, restore_variables
from beit_jax.weights import convert, foreign, native
from beit_jax.weights.__main__ import main
from beit_jax.weights.description import Description, describe, to_config
from beit_jax.weights.report import WeightsError
from tests import tiny
from tests.weights import examples
from tests.weights.examples import relative_error

MODEL = dataclasses.replace(
    tiny.PER_BLOCK, layers=6, width=16, heads=2, mlp_width=32, image_size=48, patch_size=16
)
HEAD = SegmentHeadConfig(blocks=(2, 3, 4, 6), channels=16, auxiliary_channels=8)
SEGMENTER = Description(
    task="segment",
    model=MODEL,
    outputs=3,
    normalization="imagenet",
    labels=("road", "sky", "tree"),
    head=HEAD,
)
WIDER = dataclasses.replace(
    SEGMENTER,
    head=dataclasses.replace(
        HEAD, channels=12, pool_scales=(1, 2), auxiliary_convs=2, auxiliary_concat=True
    ),
)
WITHOUT_AUXILIARY = dataclasses.replace(
    SEGMENTER, head=dataclasses.replace(HEAD, auxiliary_channels=0)
)
OUTPUTS = {"hugging_face": "", "hugging_face_beit": "", "mmseg": ".pth"}
LINEAR = SegmentHeadConfig(kind="linear", blocks=(6,), auxiliary_channels=0)
# The last block, which BeitForSemanticSegmentation does not read, is not read here.
READABLE = dataclasses.replace(SEGMENTER, head=dataclasses.replace(HEAD, blocks=(1, 2, 3, 5)))


def numbers(description: Description, seed: int = 0) -> dict[str, np.ndarray]:
    """Flat parameters and running statistics, none of them trivial."""
    params = examples.random_params(description, seed)
    for name in description.variables():
        rng = np.random.default_rng([seed, len(name)])
        if name.endswith("count"):
            params[name] = np.float32(rng.integers(1, 1 << 24))
        elif name.endswith("var"):
            params[name] = (0.5 + rng.random(params[name].shape)).astype(np.float32)
    return params


def saved(path, description: Description, seed: int = 0) -> dict[str, np.ndarray]:
    """Writes a native checkpoint of both; returns them, flat."""
    flat = numbers(description, seed)
    params, variables = description.split(flat)
    native.write_params(
        str(path),
        unflatten(params),
        config=to_config(description),
        variables=unflatten(variables),
    )
    return flat


def same(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert np.shape(actual[name]) == np.shape(array), name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def logits_of(description: Description, flat, images):
    """Both heads' logits, for normalised images."""
    params, variables = description.split(flat)
    training = {"drop_path_rate": MODEL.drop_path_rate, "dtype": MODEL.dtype}
    training["layer_scale_init"] = MODEL.layer_scale_init
    assert dataclasses.replace(description.model, **training) == MODEL
    run = compiled(dataclasses.replace(description.head, dropout=0.0, auxiliary_weight=0.0))
    return run(unflatten(params), unflatten(variables), images)


@functools.cache
def compiled(head):
    """Settings of training left aside, two of the tests compile the same function."""
    whole = segmenter(MODEL, head=head, classes=3)
    return jax.jit(lambda p, v, x: whole.apply(p, x, variables=v, method="with_auxiliary"))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the peer runs on PyTorch")


@pytest.fixture(scope="module")
def peers(torch):
    """Models of transformers with random parameters and running statistics, by class."""
    pytest.importorskip("transformers", reason="the transformers peer is not installed")
    from tests.models import upernet_peer

    made = {
        "hugging_face": upernet_peer.upernet(MODEL, head=HEAD, classes=3),
        "hugging_face_beit": upernet_peer.beit_segmenter(MODEL, head=READABLE.head, classes=3),
    }
    for model in made.values():
        for number, buffer in enumerate(
            b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")
        ):
            buffer.fill_(1000 + number)
    return made


def peer_logits(torch, model, images):
    """Both heads' logits of a model of transformers, channels last, before they are enlarged."""
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        if hasattr(model, "backbone"):
            features = model.backbone(pixels).feature_maps
        else:
            hidden = model.beit(pixels, output_hidden_states=True).hidden_states
            grid = MODEL.grid
            features = model.fpn(
                tuple(
                    hidden[i - 1][:, 1:].transpose(1, 2).reshape(len(pixels), -1, grid, grid)
                    for i in model.config.out_indices
                )
            )
        both = model.decode_head(features), model.auxiliary_head(features)
    return tuple(logits.numpy().transpose(0, 2, 3, 1) for logits in both)


def mmseg_state(torch, model) -> dict:
    """The state dict of mmseg's model with the numbers of transformers' `BeitForSemantic…`."""
    state, renamed = model.state_dict(), {}
    names = [
        (r"^beit\.layers\.(\d+)\.lambda_", r"backbone.blocks.\1.gamma_"),
        (r"^beit\.layers\.(\d+)\.layernorm_before\.", r"backbone.blocks.\1.norm1."),
        (r"^beit\.layers\.(\d+)\.layernorm_after\.", r"backbone.blocks.\1.norm2."),
        (r"^beit\.layers\.(\d+)\.attention\.o_proj\.", r"backbone.blocks.\1.attn.proj."),
        (r"^beit\.layers\.(\d+)\.mlp\.", r"backbone.blocks.\1.mlp."),
        (r"^beit\.layers\.(\d+)\.relative_position_bias\.", r"backbone.blocks.\1.attn."),
        (r"^beit\.embeddings\.patch_embeddings\.projection\.", "backbone.patch_embed.proj."),
        (r"^beit\.embeddings\.cls_token$", "backbone.cls_token"),
        (r"^fpn\.fpn1\.conv_transpose1\.", "backbone.fpn1.0."),
        (r"^fpn\.fpn1\.normalization\.", "backbone.fpn1.1."),
        (r"^fpn\.fpn1\.conv_transpose2\.", "backbone.fpn1.3."),
        (r"^fpn\.fpn2\.", "backbone.fpn2.0."),
        (r"psp_modules\.blocks\.(\d)\.conv\.", r"psp_modules.\1.1."),
        (r"psp_bottleneck\.", "bottleneck."),
        (r"\.convolution\.", ".conv."),
        (r"_head(.*)\.normalization\.", r"_head\1.bn."),
        (r"_head\.classifier\.", "_head.conv_seg."),
    ]
    for key, tensor in state.items():
        if re.search(r"attention\.[qkv]_proj", key):
            continue
        new = key
        for pattern, name in names:
            new = re.sub(pattern, name, new)
        renamed[new] = tensor
    for i in range(MODEL.layers):
        attention = f"beit.layers.{i}.attention."
        renamed[f"backbone.blocks.{i}.attn.qkv.weight"] = torch.cat(
            [state[f"{attention}{part}_proj.weight"] for part in "qkv"]
        )
        for part in "qv":
            renamed[f"backbone.blocks.{i}.attn.{part}_bias"] = state[f"{attention}{part}_proj.bias"]
    return renamed


CONFIG = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    pretrained=None,
    backbone=dict(type='BEiT', patch_size=16, embed_dim=16, num_heads=2, out_indices=[0, 1, 2, 4]),
    decode_head=dict(
        type='UPerHead', in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6), dropout_ratio=0.2,
        align_corners=False, loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0)),
    auxiliary_head=dict(type='FCNHead', in_index=2, loss_decode=dict(loss_weight=0.3)))
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
work_dir = '/'.join(['runs', 'x'])
"""


def mmseg_file(torch, path, state, *, meta=None) -> str:
    """What mmcv saves: the whole state, an optimizer, and who wrote it."""
    content = {"meta": {"epoch": 3, "iter": 9, **(meta or {})}, "state_dict": state}
    torch.save(content | {"optimizer": {"state": {}, "param_groups": []}}, str(path))
    return str(path)


@pytest.mark.parametrize("format", OUTPUTS)
@pytest.mark.parametrize(
    "description",
    [
        READABLE,
        pytest.param(WIDER, marks=pytest.mark.slow),
        pytest.param(WITHOUT_AUXILIARY, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_comes_back_from_a_format_bit_by_bit(format, description, tmp_path, torch):
    """Parameters and running statistics, the count of batches among them."""
    if format == "hugging_face_beit" and description is not READABLE:
        head = dataclasses.replace(description.head, blocks=(1, 2, 3, 5), channels=0)
        description = dataclasses.replace(description, head=head)
    flat = saved(tmp_path / "native", description)
    output = str(tmp_path / f"out{OUTPUTS[format]}")
    done = convert.export_checkpoint(str(tmp_path / "native"), format=format, output=output)
    assert set(done.report.used) == set(flat)
    report, imported, _ = convert.import_checkpoint(output, output=str(tmp_path / "again"))
    assert report.missing == report.unused == report.reshaped == report.cast == ()
    again = convert.read_any(str(tmp_path / "again"))
    same(again.params, flat)
    head = imported.head
    if not description.head.channels:  # files have the width itself
        head = dataclasses.replace(head, channels=0)
    assert head.blocks == description.head.blocks
    assert head == dataclasses.replace(description.head, auxiliary_convs=head.auxiliary_convs)
    assert imported.labels == description.labels
    assert imported.normalization == "imagenet"


@pytest.mark.parametrize("format", ["hugging_face", "hugging_face_beit"])
def test_transformers_models_give_their_logits_and_come_back(
    format, peers, torch, tmp_path, capsys
):
    """Of a saved folder, whichever blocks its class reads; then export and a strict load."""
    import transformers

    peer = peers[format]
    peer.save_pretrained(tmp_path / "model")
    images = examples.images(SEGMENTER)
    checkpoint = foreign.read(str(tmp_path / "model"))
    assert checkpoint.format == format
    blocks = {"hugging_face": HEAD.blocks, "hugging_face_beit": READABLE.head.blocks}[format]
    assert checkpoint.description.head.blocks == blocks
    ours = logits_of(checkpoint.description, checkpoint.params, images)
    for actual, expected in zip(ours, peer_logits(torch, peer, images), strict=True):
        assert relative_error(actual, expected) < 1e-4
    again = str(tmp_path / "again")
    command = ["export", str(tmp_path / "model"), f"--format={format}", f"--output={again}"]
    assert main(command) == 0
    [line] = re.findall(r"load it with\n  (.+)", capsys.readouterr().out)
    loaded = eval(line, {"transformers": transformers})
    _, info = type(loaded).from_pretrained(again, output_loading_info=True)
    assert not any(info.values()), info
    state = peer.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype == state[key].dtype
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("format", ["hugging_face", "hugging_face_beit"])
def test_names_of_a_live_model_are_read(format, peers, torch, tmp_path):
    """`torch.save(model.state_dict())` has transformers 5's names, files have 4's."""
    peer = peers[format]
    peer.save_pretrained(tmp_path / "saved")
    (tmp_path / "live").mkdir()
    torch.save(peer.state_dict(), tmp_path / "live" / "pytorch_model.bin")
    config = (tmp_path / "saved" / "config.json").read_text()
    (tmp_path / "live" / "config.json").write_text(config)
    same(foreign.read(str(tmp_path / "live")).params, foreign.read(str(tmp_path / "saved")).params)


def test_an_official_file_is_the_function_that_its_config_says(peers, torch, tmp_path):
    """And comes back with its state dict as it was, the int64 counts and indices too."""
    peer = peers["hugging_face_beit"]
    state = mmseg_state(torch, peer)
    meta = {
        "CLASSES": ("road", "sky", "tree"),
        "PALETTE": [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
        "config": CONFIG,
    }
    path = mmseg_file(torch, tmp_path / "official.pth", state, meta=meta)
    checkpoint = foreign.read(path)
    found = checkpoint.description
    assert checkpoint.format == "mmseg"
    assert not checkpoint.guessed
    assert found.head.blocks == (1, 2, 3, 5)
    assert (found.head.dropout, found.head.auxiliary_weight) == (0.2, 0.3)
    assert (found.labels, found.normalization) == (("road", "sky", "tree"), "imagenet")
    images = examples.images(found)
    ours = logits_of(found, checkpoint.params, images)
    for actual, expected in zip(ours, peer_logits(torch, peer, images), strict=True):
        assert relative_error(actual, expected) < 1e-4

    convert.import_checkpoint(path, output=str(tmp_path / "native"))
    again = str(tmp_path / "again.pth")
    convert.export_checkpoint(str(tmp_path / "native"), format="mmseg", output=again)
    content = torch.load(again, weights_only=True)
    index = "relative_position_index"
    assert {key for key in content["state_dict"] if not key.endswith(index)} == set(state)
    for key, tensor in state.items():
        assert content["state_dict"][key].dtype == tensor.dtype, key
        assert torch.equal(content["state_dict"][key], tensor), key
    assert content["meta"] == {"CLASSES": meta["CLASSES"], "PALETTE": meta["PALETTE"]}


def test_what_an_official_file_does_not_say_is_guessed_and_named(peers, torch, tmp_path):
    state = mmseg_state(torch, peers["hugging_face_beit"])
    path = mmseg_file(torch, tmp_path / "official.pth", state)
    checkpoint = foreign.read(path)
    assert checkpoint.description.head.blocks == (2, 3, 4, 6)
    assert checkpoint.description.normalization == "imagenet"
    assert {"blocks", "pool_scales", "normalization"} <= set(checkpoint.guessed)
    # DataParallel and half precision: the same numbers, rounded.
    half = {f"module.{k}": v.half() if v.is_floating_point() else v for k, v in state.items()}
    path = mmseg_file(torch, tmp_path / "half.pth", half)
    rounded = foreign.read(path)
    for name, array in checkpoint.params.items():
        np.testing.assert_allclose(rounded.params[name], array, rtol=1e-3, atol=1e-6, err_msg=name)


def test_conversions_are_strict(peers, torch, tmp_path):
    state = mmseg_state(torch, peers["hugging_face_beit"])

    def read(change, **meta):
        changed = dict(state)
        change(changed)
        return foreign.read(mmseg_file(torch, tmp_path / "changed.pth", changed, meta=meta))

    with pytest.raises(WeightsError, match=r"missing decode_head\.fpn_convs\.1\.bn\.running_var"):
        read(lambda s: s.pop("decode_head.fpn_convs.1.bn.running_var"))
    with pytest.raises(WeightsError, match=r"unused decode_head\.extra"):
        read(lambda s: s.update({"decode_head.extra": s["backbone.cls_token"]}))
    count = "backbone.fpn1.1.num_batches_tracked"
    with pytest.raises(
        WeightsError, match=r"fpn1\.1\.num_batches_tracked is int64 16777217, no count"
    ):
        read(lambda s: s.update({count: torch.tensor((1 << 24) + 1)}))
    with pytest.raises(WeightsError, match="'align_corners' is True"):
        read(lambda s: None, config=CONFIG.replace("align_corners=False", "align_corners=True"))


def test_beit_for_semantic_segmentation_says_where_it_is_another_function(tmp_path, capsys):
    """It does not read the last block; the line says what it reads instead."""
    saved(tmp_path / "native", SEGMENTER)
    command = ["export", str(tmp_path / "native"), "--format=hugging_face_beit"]
    assert main([*command, f"--output={tmp_path / 'beit'}"]) == 0
    assert "reads block 5 in its place" in capsys.readouterr().out
    card = (tmp_path / "beit" / "README.md").read_text()
    assert "BeitForSemanticSegmentation.from_pretrained" in card
    assert "pipeline_tag: image-segmentation" in card
    assert "upernet on the outputs of blocks 2, 3, 4, 6, with the auxiliary head" in card
    assert foreign.read(str(tmp_path / "beit")).description.head.blocks == (2, 3, 4, 5)
    saved(tmp_path / "wide", WIDER)
    command = ["export", str(tmp_path / "wide"), "--format=hugging_face_beit"]
    assert main([*command, f"--output={tmp_path / 'wide_beit'}"]) == 2
    assert "a head as wide as its encoder, 16, this one 12" in capsys.readouterr().err


def test_a_format_without_segmentation_says_which_have_it(tmp_path, capsys):
    saved(tmp_path / "native", SEGMENTER)
    command = ["export", str(tmp_path / "native"), "--format=unilm", "--output=x.pth"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "which unilm does not hold" in error
    assert "mmseg" in error
    other = dataclasses.replace(SEGMENTER, head=LINEAR)
    saved(tmp_path / "linear", other)
    command = ["export", str(tmp_path / "linear"), "--format=mmseg", "--output=x.pth"]
    assert main(command) == 2
    assert "no segmentation head of the kind 'linear'" in capsys.readouterr().err


def test_timm_takes_the_encoder_of_a_segmenter(tmp_path):
    flat = saved(tmp_path / "native", SEGMENTER)
    output = str(tmp_path / "encoder.safetensors")
    convert.export_checkpoint(str(tmp_path / "native"), format="timm", output=output)
    encoder = {name: array for name, array in flat.items() if name.startswith("encoder/")}
    same(foreign.read(output).params, encoder)


@pytest.mark.parametrize(
    "format", ["native", "mmseg", pytest.param("hugging_face", marks=pytest.mark.slow)]
)
def test_a_run_starts_with_parameters_and_running_statistics(format, tmp_path, torch):
    """Of a segmenter in any form; another number of classes keeps the statistics."""
    source = tmp_path / "native"
    flat = saved(source, SEGMENTER)
    if format != "native":
        source = tmp_path / f"x{OUTPUTS[format]}"
        convert.export_checkpoint(str(tmp_path / "native"), format=format, output=str(source))
    params, variables = SEGMENTER.split(flat)
    for description in (SEGMENTER, dataclasses.replace(SEGMENTER, outputs=5, labels=())):
        model = segmenter(MODEL, head=HEAD, classes=description.outputs)
        found = restore_variables(
            str(source), shapes=model.variables_shapes(), fresh=lambda: pytest.fail("fresh")
        )
        same({name: np.asarray(leaf) for name, leaf in flatten(found).items()}, variables)
    shapes = segmenter(MODEL, head=HEAD, classes=3).shapes()
    found = restore_params(str(source), shapes=shapes)
    same({name: np.asarray(leaf) for name, leaf in flatten(found).items()}, params)


@pytest.mark.parametrize("format", ["native", "mmseg"])
def test_each_layer_keeps_its_statistics_whatever_other_layers_lack(format, tmp_path, torch):
    """With and without an auxiliary head, there and here."""
    for there, here in ((SEGMENTER, WITHOUT_AUXILIARY), (WITHOUT_AUXILIARY, SEGMENTER)):
        source = tmp_path / f"{there.head.auxiliary_channels}"
        _, variables = there.split(saved(source, there))
        if format != "native":
            whole, source = source, tmp_path / f"{there.head.auxiliary_channels}{OUTPUTS[format]}"
            convert.export_checkpoint(str(whole), format=format, output=str(source))
        shapes = segmenter(MODEL, head=here.head, classes=3).variables_shapes()

        def fresh(shapes=shapes):
            return jax.tree.map(lambda each: np.full(each.shape, 0.25, each.dtype), shapes)

        found = flatten(restore_variables(str(source), shapes=shapes, fresh=fresh))
        for name, leaf in found.items():
            wanted = variables.get(name, np.full(leaf.shape, 0.25, np.float32))
            np.testing.assert_array_equal(leaf, wanted, err_msg=name)
        assert any(name.startswith("head/") for name in found)


@pytest.mark.parametrize("of", ["pretrain", "classify"])
def test_a_segmenter_starts_from_an_encoder_trained_otherwise(of, tmp_path):
    """Neck and heads are new, the shared table becomes each block's, positions are resized."""
    small = dataclasses.replace(MODEL, image_size=80)
    shared = dataclasses.replace(small, positions="relative_shared")
    source = {
        "pretrain": Description(task="pretrain", model=shared, outputs=7),
        "classify": Description(task="classify", model=small, outputs=4),
    }[of]
    before = examples.saved(tmp_path / "source", source)
    model = segmenter(MODEL, head=HEAD, classes=3)
    shapes = model.shapes()

    def fresh():
        return jax.tree.map(lambda each: np.full(each.shape, 0.25, each.dtype), shapes)

    found = flatten(
        restore_params(
            str(tmp_path / "source"),
            shapes=shapes,
            fresh=fresh,
            allow_missing=("neck", "head", "auxiliary"),
            allow_unused=("encoder/mask_token", "encoder/norm", "lm_head", "fc_norm", "head"),
        )
    )
    for name, leaf in found.items():
        if not name.startswith("encoder/"):
            assert (np.asarray(leaf) == 0.25).all(), name
        elif "table" not in name:
            np.testing.assert_array_equal(leaf, before[name], err_msg=name)
    variables = restore_variables(
        str(tmp_path / "source"), shapes=model.variables_shapes(), fresh=lambda: {"fresh": 1}
    )
    assert variables == {"fresh": 1}


def test_the_description_survives_its_config():
    for description in (SEGMENTER, WIDER, WITHOUT_AUXILIARY):
        config = json.loads(json.dumps(to_config(description)))
        assert describe(config) == description
        assert hash(describe(config)) == hash(description)
    with pytest.raises(ValueError, match="head: missing"):
        describe({key: value for key, value in config.items() if key != "head"})
