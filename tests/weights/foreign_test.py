"""Foreign files: which are read, and one clear error for every kind that is not."""

import json
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest

from beit_jax.models.functional import flatten
from beit_jax.models.relative_positions import relative_position_index
from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.weights import containers, convert
from beit_jax.weights.foreign import read
from beit_jax.weights.formats import Stated
from beit_jax.weights.report import WeightsError, allowed, compact
from tests.weights import examples

PRETRAINED = examples.PRETRAINED["beit+"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One checkpoint as Hugging Face folder and as timm file; and its parameters."""
    folder = tmp_path_factory.mktemp("exported")
    params = examples.saved(folder / "native", PRETRAINED)
    for format, name in (("hugging_face", "hf"), ("timm", "timm.safetensors")):
        convert.export_checkpoint(str(folder / "native"), format=format, output=str(folder / name))
    return folder, params


@pytest.fixture
def changed(exported, tmp_path):
    """Writes the Hugging Face folder with other tensors or another config; returns its path."""

    def write(change=lambda state: state, **config) -> str:
        folder, _ = exported
        target = tmp_path / "changed"
        target.mkdir(exist_ok=True)
        content = (folder / "hf" / "model.safetensors").read_bytes()
        state, _ = containers.load_safetensors(content, source="x")
        state = change(dict(state))
        write_any(target / "model.safetensors", state)
        whole = json.loads((folder / "hf" / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps(whole))
        return str(target)

    return write


def write_any(path: pathlib.Path, state: dict[str, np.ndarray]) -> None:
    """A safetensors file of any dtypes, by the format's own rules."""
    kinds = {np.dtype(v): k for k, v in containers._SAFETENSORS_DTYPES.items()}
    header, data = {}, b""
    for name, array in state.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": kinds[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_are_cast_and_reported(changed, exported, dtype):
    folder = changed(lambda state: {key: array.astype(dtype) for key, array in state.items()})
    checkpoint = read(folder)
    assert len(checkpoint.report.cast) == len(checkpoint.report.used)
    for name, value in exported[1].items():
        assert checkpoint.params[name].dtype == np.float32
        np.testing.assert_array_equal(checkpoint.params[name], value.astype(dtype), err_msg=name)


def test_half_precision_pth(tmp_path, exported):
    torch = pytest.importorskip("torch", reason="PyTorch writes the file")
    folder, params = exported
    convert.export_checkpoint(
        str(folder / "native"), format="unilm", output=str(tmp_path / "full.pth")
    )
    state = torch.load(tmp_path / "full.pth", weights_only=True)["model"]
    halved = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    for container in (True, False):
        torch.save(
            {"module": halved, "epoch": 3},
            tmp_path / "half.pth",
            _use_new_zipfile_serialization=container,
        )
        checkpoint = read(str(tmp_path / "half.pth"))
        assert checkpoint.report.rebuilt == ("rel_pos_bias.relative_position_index",)
        for name, value in params.items():
            np.testing.assert_array_equal(checkpoint.params[name], value.astype(np.float16))


def test_missing_and_unused_keys_are_all_named_at_once(changed):
    def change(state):
        state["extra.bias"] = np.zeros(2, np.float32)
        state["extra"] = np.zeros(2, np.float32)
        del state["layernorm.bias"]
        state["lm_head.weight"] = state["lm_head.weight"].T.copy()
        return state

    folder = changed(change)
    with pytest.raises(WeightsError, match="does not fit: missing") as error:
        read(folder)
    text = one_line(error)
    assert "missing layernorm.bias" in text
    assert "unused extra, extra.bias" in text
    assert "lm_head.weight is (32, 40), needed (40, 32)" in text
    assert "--allow-missing" in text


def test_no_part_of_the_encoder_can_be_allowed(changed):
    """A model whose blocks have other parameters is another architecture."""

    def change(state):
        state["beit.encoder.layer.1.attention.attention.key.bias"] = np.zeros(32, np.float32)
        state["extra"] = np.zeros(2, np.float32)
        del state["beit.encoder.layer.2.lambda_1"]
        return state

    folder = changed(change)
    for allow in ((), ("*",)):
        with pytest.raises(WeightsError, match="does not fit: missing") as error:
            read(folder, allow_missing=allow, allow_unused=allow)
        text = one_line(error)
        assert "missing beit.encoder.layer.*.lambda_1" in text
        assert "unused beit.encoder.layer.*.attention.attention.key.bias" in text
        assert "--allow" not in text
        assert ("extra" in text) == (not allow)


def test_keys_allowed_by_name_pass_and_are_reported(changed, exported):
    def change(state):
        state["extra.weight"] = np.zeros(2, np.float32)
        del state["layernorm.bias"]
        return state

    folder = changed(change)
    checkpoint = read(folder, allow_missing=["layernorm.*"], allow_unused=["extra"])
    assert checkpoint.report.missing == ("layernorm.bias",)
    assert checkpoint.report.unused == ("extra.weight",)
    assert set(exported[1]) - set(checkpoint.params) == {"encoder/norm/bias"}
    assert set(checkpoint.params) <= set(exported[1])
    text = str(checkpoint.report)
    assert "missing (1): layernorm.bias" in text
    assert "unused (1): extra.weight" in text
    assert "reshaped (0): none" in text
    with pytest.raises(WeightsError, match=r"missing layernorm\.bias"):
        read(folder, allow_unused=["extra"])


def test_index_buffers_are_compared_and_not_counted_as_unused(changed):
    """Another order of the patches is another function under the same names and shapes."""
    key = "beit.encoder.relative_position_bias.relative_position_index"
    index = relative_position_index(5).astype(np.int64)
    report = read(changed(lambda state: state | {key: index})).report
    assert len(report.rebuilt) == 1
    assert report.unused == ()
    for wrong in (np.zeros((26, 26), np.int64), index[:-1], index[::-1].copy()):
        with pytest.raises(WeightsError, match="is not the index of 5 × 5 patches"):
            read(changed(lambda state, wrong=wrong: state | {key: wrong}))


def test_a_config_that_does_not_fit_its_tensors(changed):
    with pytest.raises(WeightsError, match="intermediate_size is 128, the tensors' 64"):
        read(changed(intermediate_size=128))
    with pytest.raises(WeightsError, match="num_hidden_layers is 2, the tensors' 3"):
        read(changed(num_hidden_layers=2))
    with pytest.raises(WeightsError, match="image_size is 80, the tensors' 40"):
        read(changed(image_size=80))
    with pytest.raises(WeightsError, match="describes a 'vit', not a BEiT"):
        read(changed(model_type="vit"))
    with pytest.raises(WeightsError, match="width: 30 is not a multiple of heads 4"):
        read(changed(hidden_size=30))


def test_published_layer_norm_epsilon_is_corrected(changed):
    """The hub's configs say 1e-12, the official models have 1e-6."""
    assert read(changed(layer_norm_eps=1e-12)).description.model.layer_norm_epsilon == 1e-6
    assert read(changed(layer_norm_eps=1e-5)).description.model.layer_norm_epsilon == 1e-5


def test_an_unknown_normalisation_must_be_named_by_the_caller(changed):
    folder = changed()
    preprocessor = {"image_mean": [0.4, 0.4, 0.4], "image_std": [0.5, 0.5, 0.5]}
    (pathlib.Path(folder) / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    with pytest.raises(WeightsError, match="--normalization"):
        read(folder)
    assert (
        read(folder, stated=Stated(normalization="imagenet")).description.normalization
        == "imagenet"
    )


def test_a_bare_model_of_transformers(exported, tmp_path):
    torch = pytest.importorskip("torch", reason="the transformers peer needs it")
    transformers = pytest.importorskip("transformers", reason="the peer")
    del torch
    config = transformers.BeitConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=40, patch_size=8, use_relative_position_bias=True, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = transformers.BeitModel(config)
    model.save_pretrained(tmp_path / "bare")
    checkpoint = read(str(tmp_path / "bare"))
    assert checkpoint.description.task == "encoder"
    assert checkpoint.description.pooling == "mean"
    assert "fc_norm/scale" in checkpoint.params
    # An export after the import gives the same tensors.
    convert.import_checkpoint(str(tmp_path / "bare"), output=str(tmp_path / "native"))
    convert.export_checkpoint(
        str(tmp_path / "native"), format="hugging_face", output=str(tmp_path / "again")
    )
    again, info = transformers.BeitModel.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert (again.state_dict()[name] == tensor).all(), name


def test_other_files_are_refused(exported, tmp_path):
    folder, _ = exported
    path = tmp_path / "x.safetensors"
    write_any(path, {"layer1.weight": np.zeros(2, np.float32)})
    with pytest.raises(WeightsError, match=r"the keys are not a BEiT's \(layer1.weight"):
        read(str(path))
    state = {"backbone.cls_token": np.zeros((1, 1, 8), np.float32)}
    write_any(path, state)
    with pytest.raises(WeightsError, match=r"OpenMMLab's \(mmpretrain\)"):
        read(str(path))
    write_any(path, state | {"decode_head.conv_seg.weight": np.zeros((2, 8), np.float32)})
    with pytest.raises(WeightsError, match="a segmentation model's"):
        read(str(path))
    path.write_text("404: Not Found\n")
    with pytest.raises(WeightsError, match="is a text file"):
        read(str(path))
    path.write_bytes((folder / "timm.safetensors").read_bytes()[:5000])
    with pytest.raises(WeightsError, match="is not a whole safetensors file"):
        read(str(path))
    of_folder = read(str(folder / "hf")).description
    assert read(str(folder / "hf" / "model.safetensors")).description == of_folder
    path.write_bytes((folder / "hf" / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match="has Hugging Face's keys; give the folder"):
        read(str(path))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(WeightsError, match=r"holds no weights: no model\.safetensors"):
        read(str(tmp_path / "nothing"))
    with pytest.raises(WeightsError, match="does not exist"):
        read(str(tmp_path / "nothing.pth"))


def test_a_repository_of_timm(exported, tmp_path):
    """A folder as timm pushes it: its keys without metadata, and its own config.json."""
    folder, params = exported
    content = (folder / "timm.safetensors").read_bytes()
    state, _ = containers.load_safetensors(content, source="x")
    write_any(tmp_path / "model.safetensors", state)

    def read_with(**pretrained_cfg):
        config = {"architecture": "beit_base_patch16_224", "pretrained_cfg": pretrained_cfg}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read(str(tmp_path))

    mean, std = NORMALIZATIONS["imagenet"]
    checkpoint = read_with(mean=mean, std=std, num_classes=0)
    assert checkpoint.format == "timm"
    assert checkpoint.description.task == "encoder"
    assert checkpoint.description.normalization == "imagenet"
    np.testing.assert_array_equal(
        checkpoint.params["encoder/cls_token"], params["encoder/cls_token"]
    )
    assert read_with().description.normalization == "half"
    with pytest.raises(WeightsError, match=r"config.json has a mean .* --normalization"):
        read_with(mean=[0.4, 0.4, 0.4], std=std)


def test_an_ordinary_vit_is_not_taken_for_a_beit(exported, tmp_path):
    """Its keys differ only in the biases, and none of them is dropped silently."""
    folder, _ = exported
    state, _ = containers.load_safetensors((folder / "timm.safetensors").read_bytes(), source="x")
    state = {k: v for k, v in state.items() if not k.endswith(("q_bias", "v_bias"))}
    for i in range(3):
        state[f"blocks.{i}.attn.qkv.bias"] = np.zeros(96, np.float32)
    write_any(tmp_path / "x.safetensors", state)
    with pytest.raises(WeightsError) as error:
        read(str(tmp_path / "x.safetensors"), stated=Stated(heads=4))
    assert "missing blocks.*.attn.q_bias (×3), blocks.*.attn.v_bias (×3)" in one_line(error)
    assert "unused blocks.*.attn.qkv.bias (×3)" in one_line(error)


def test_checksum(exported):
    folder, _ = exported
    path = str(folder / "timm.safetensors")
    right = read(path).sha256
    assert re.fullmatch("[0-9a-f]{64}", right)
    read(path, sha256=right)
    with pytest.raises(WeightsError, match=f"has SHA-256 {right}, expected 11"):
        read(path, sha256="11" * 32)


def test_a_foreign_checkpoint_can_be_exported_directly(exported, tmp_path):
    """A foreign checkpoint is a source like a run; no import is needed in between."""
    folder, params = exported
    done = convert.export_checkpoint(
        str(folder / "hf"), format="timm", output=str(tmp_path / "x.safetensors"), image_size=64
    )
    assert any("→" in change for change in done.report.reshaped)
    again = read(str(tmp_path / "x.safetensors"))
    assert again.description.model.image_size == 64
    np.testing.assert_array_equal(again.params["encoder/cls_token"], params["encoder/cls_token"])


def test_names_and_patterns():
    assert allowed("lm_head/kernel", ["lm_head"])
    assert allowed("blocks.3.attn.k", ["blocks.*.k"])
    assert not allowed("lm_head2/kernel", ["lm_head"])
    assert compact(["blocks.0.a", "blocks.1.a", "b"]) == "blocks.*.a (×2), b"


def test_every_parameter_is_in_the_tables(exported):
    """Every parameter of the tree comes back under its own name."""
    folder, params = exported
    assert read(str(folder / "hf")).params.keys() == params.keys()
    assert flatten(params).keys() == params.keys()
