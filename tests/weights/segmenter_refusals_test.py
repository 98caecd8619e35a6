"""What a conversion of a segmentation model can't keep the function of is refused, in one line."""

import dataclasses
import json

import pytest

from beit_jax.weights import convert, foreign
from beit_jax.weights.__main__ import main
from beit_jax.weights.formats import mmseg_settings
from beit_jax.weights.formats.format import Stated
from beit_jax.weights.report import WeightsError
from tests.weights.segmenter_test import CONFIG, OUTPUTS, READABLE, same, saved

# Patches of 8 pixels: the pyramid's largest map has twice the side of the grid, not four times.
SMALL_PATCHES = dataclasses.replace(
    READABLE, model=dataclasses.replace(READABLE.model, image_size=32, patch_size=8)
)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="a .pth takes PyTorch")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint with patches of 8 pixels, and its numbers."""
    path = tmp_path_factory.mktemp("small") / "native"
    return str(path), saved(path, SMALL_PATCHES)


@pytest.fixture(scope="module")
def official(tmp_path_factory, torch):
    """A state dict as mmseg has it, without what this project's exports say beside it."""
    folder = tmp_path_factory.mktemp("official")
    saved(folder / "native", READABLE)
    convert.export_checkpoint(
        str(folder / "native"), format="mmseg", output=str(folder / "whole.pth")
    )
    return torch.load(folder / "whole.pth", weights_only=True)["state_dict"]


@pytest.mark.parametrize("format", ["hugging_face", "hugging_face_beit"])
def test_transformers_has_no_pyramid_for_patches_of_8_pixels(format, small, tmp_path, capsys):
    """It would draw the missing path at random: neither written nor read."""
    output = tmp_path / "out"
    assert main(["export", small[0], f"--format={format}", f"--output={output}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "patches of 8 pixels have another pyramid in transformers" in error
    assert not output.exists()
    saved(tmp_path / "native", READABLE)
    convert.export_checkpoint(str(tmp_path / "native"), format=format, output=str(output))
    config = json.loads((output / "config.json").read_text())
    config.get("backbone_config", config)["patch_size"] = 8
    (output / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="patches of 8 pixels have another pyramid"):
        foreign.read(str(output))


def test_mmseg_has_its_own_names_for_patches_of_8_pixels(small, torch, tmp_path):
    """Official beit.py: fpn1 is the path that doubles, and fpn2 has nothing to learn."""
    path, flat = small
    output = str(tmp_path / f"out{OUTPUTS['mmseg']}")
    convert.export_checkpoint(path, format="mmseg", output=output)
    state = torch.load(output, weights_only=True)["state_dict"]
    neck = {key for key in state if key.startswith("backbone.fpn")}
    assert neck == {"backbone.fpn1.0.weight", "backbone.fpn1.0.bias"}
    torch.save({"meta": {}, "state_dict": state}, output)
    same(foreign.read(output).params, flat)
    config = {"config": "model = dict(backbone=dict(type='BEiT', patch_size=16))"}
    torch.save({"meta": config, "state_dict": state}, output)
    with pytest.raises(WeightsError, match="patch_size is 16, the tensors' 8"):
        foreign.read(output)


def test_mmseg_has_no_pyramid_for_other_patches(tmp_path, capsys):
    model = dataclasses.replace(READABLE.model, image_size=16, patch_size=4)
    saved(tmp_path / "native", dataclasses.replace(READABLE, model=model))
    command = ["export", str(tmp_path / "native"), "--format=mmseg", "--output=x.pth"]
    assert main(command) == 2
    assert "patches of 16 or 8 pixels, not 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("decode_head.bottleneck.bn.running_var", -0.5, "holds -0.5, and no variance is below 0"),
        ("backbone.fpn1.1.running_var", float("nan"), "holds 1 numbers that are NaN"),
        ("auxiliary_head.convs.0.bn.running_var", float("inf"), "holds 1 numbers that are NaN or"),
    ],
)
def test_a_variance_that_is_none_is_refused_by_name(key, value, what, official, torch, tmp_path):
    state = {name: tensor.clone() for name, tensor in official.items()}
    state[key][3] = value
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=f"{key} {what}"):
        foreign.read(str(tmp_path / "x.pth"))


def test_pixels_of_another_normalization_are_refused_unless_it_is_said(official, torch, tmp_path):
    path = str(tmp_path / "x.pth")
    config = CONFIG.replace("123.675", "120")
    torch.save({"meta": {"config": config}, "state_dict": official}, path)
    with pytest.raises(WeightsError, match=r"img_norm_cfg is .*120.*none of .*: --normalization"):
        foreign.read(path)
    checkpoint = foreign.read(path, stated=Stated(normalization="half"))
    assert checkpoint.description.normalization == "half"
    assert not checkpoint.guessed


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("align_corners", "act_cfg=dict(type='LeakyReLU'), align_corners", "'LeakyReLU'.*'ReLU'"),
        ("align_corners", "act_cfg=None, align_corners", "decode_head: act_cfg is None"),
        ("align_corners", "norm_cfg=dict(type='SyncBN', eps=1e-2), align_corners", "'eps' is 0.01"),
        ("align_corners", "norm_cfg=dict(type='GN'), align_corners", "'type' is 'GN'"),
        ("align_corners", "norm_cfg=norm_cfg, align_corners", "'norm_cfg', not an object"),
        ("align_corners", "conv_cfg=dict(type='DCN'), align_corners", "'type' is 'DCN'"),
        ("align_corners", "fusion='sum', align_corners", "'fusion' is not known here"),
        ("align_corners", "**more, align_corners", r"'\*\*' is not known here"),
        ("in_index=2", "in_index=2, dilation=2", "auxiliary_head: 'dilation' is 2"),
        ("in_index=2", "in_index=2, kernel_size=1", "'kernel_size' is 1"),
        ("in_index=2", "in_index=2, input_transform='resize_concat'", "'input_transform' is"),
        ("UPerHead", "PSPHead", "decode_head: 'type' is 'PSPHead'"),
        ("in_index=2", "in_index=3", "'in_index' is 3"),
        ("to_rgb=True", "to_rgb=False", "to_rgb is False"),
        ("in_index=2,", "", "auxiliary_head has no in_index"),
        ("in_index=[0, 1, 2, 3]", "in_index=[3, 2, 1, 0]", "'in_index' is"),
        ("pretrained=None", "neck=dict(type='FPN')", "model: 'neck' is"),
        ("'EncoderDecoder'", "'CascadeEncoderDecoder'", "'type' is"),
        ("num_heads=2", "num_heads=2, qk_scale=0.5", "backbone: 'qk_scale' is 0.5"),
        ("num_heads=2", "num_heads=2, norm_layer=partial(f)", "'norm_layer' is 'partial"),
        ("std=[58.395, 57.12, 57.375]", "std=[1, 2]", "img_norm_cfg is .*: --normalization"),
    ],
)
def test_a_setting_of_another_function_is_refused(old, new, what):
    """mmseg's own name of the setting, and where it stands."""
    assert CONFIG.count(old) >= 1
    with pytest.raises(WeightsError, match=what) as caught:
        mmseg_settings.read_meta({"config": CONFIG.replace(old, new, 1)}, source="x")
    assert "\n" not in str(caught.value)


def test_settings_that_change_nothing_are_read_over():
    """Those of the official configs, as mmcv prints them, among them."""
    layers = (
        "norm_cfg=dict(type='SyncBN', requires_grad=True, eps=1e-05), act_cfg=dict(type='ReLU')"
    )
    config = CONFIG.replace(
        "align_corners", f"{layers}, conv_cfg=None, num_classes=3, align_corners"
    )
    config = config.replace("patch_size=16", "patch_size=16, qkv_bias=True, init_values=0.1")
    config = config.replace("in_index=2", "in_index=2, channels=8, num_convs=1, concat_input=False")
    expected = mmseg_settings.read_meta({"config": CONFIG}, source="x")
    assert mmseg_settings.read_meta({"config": config}, source="x") == expected
    assert expected.normalization == "imagenet"


def test_the_pipeline_of_tests_says_how_pixels_are_normalized():
    half = "[127.5, 127.5, 127.5]"
    step = f"dict(type='Normalize', mean={half}, std={half}, to_rgb=True)"
    flips = f"dict(type='MultiScaleFlipAug', transforms=[dict(type='Resize'), {step}])"
    config = f"{CONFIG}\ndata = dict(test=dict(pipeline=[dict(type='Load'), {flips}]))"
    said = mmseg_settings.read_meta({"config": config}, source="x")
    assert said.normalization == "half"
