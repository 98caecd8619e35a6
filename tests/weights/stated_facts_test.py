"""What files and callers say: read wherever it stands, and kept through round trips."""

import argparse
import json

import numpy as np
import pytest

import beit_jax
from beit_jax.preprocessing import NORMALIZATIONS
from beit_jax.weights import containers, convert
from beit_jax.weights.__main__ import main
from beit_jax.weights.foreign import read
from beit_jax.weights.formats import Stated
from beit_jax.weights.report import WeightsError
from tests.weights import examples

CLASSIFIER = examples.FINE_TUNED["mean"]
PRETRAINED = examples.PRETRAINED["beit+"]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch writes the files")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier as a Hugging Face folder and as timm's and the official keys' tensors."""
    place = tmp_path_factory.mktemp("stated")
    examples.saved(place / "native", CLASSIFIER)
    examples.saved(place / "pretrained", PRETRAINED)
    for source, format, name in (
        ("native", "hugging_face", "hf"),
        ("native", "timm", "timm.safetensors"),
        ("pretrained", "hugging_face", "pretrained_hf"),
    ):
        convert.export_checkpoint(str(place / source), format=format, output=str(place / name))
    return place


def official_state(folder) -> dict[str, np.ndarray]:
    content = (folder / "timm.safetensors").read_bytes()
    return containers.load_safetensors(content, source="x")[0]


def preprocessor(path) -> dict:
    return json.loads((path / "preprocessor_config.json").read_text())


@pytest.fixture
def changed(folder, tmp_path):
    """The Hugging Face folder with other fields in its two JSON files."""

    def write(*, config=None, **fields) -> str:
        target = tmp_path / "changed"
        target.mkdir(exist_ok=True)
        for name, extra in (("config.json", config or {}), ("preprocessor_config.json", fields)):
            whole = json.loads((folder / "hf" / name).read_text()) | extra
            (target / name).write_text(json.dumps(whole))
        weights = (folder / "hf" / "model.safetensors").read_bytes()
        (target / "model.safetensors").write_bytes(weights)
        return str(target)

    return write


def test_a_stated_normalisation_is_exported(changed, tmp_path):
    """Of an import that was told, of an export that is told, and never of another one."""
    source = changed()
    for flags, name in (([], "half"), (["--normalization=imagenet"], "imagenet")):
        ours, direct = str(tmp_path / f"ours_{name}"), str(tmp_path / f"direct_{name}")
        assert main(["import", source, f"--output={ours}", *flags]) == 0
        again = str(tmp_path / f"again_{name}")
        assert main(["export", ours, "--format=hugging_face", f"--output={again}"]) == 0
        written = ["--format=hugging_face", f"--output={direct}"]
        assert main(["export", source, *written, *flags]) == 0
        for path in (again, direct):
            found = preprocessor(tmp_path / path)
            mean, std = NORMALIZATIONS[name]
            assert (found["image_mean"], found["image_std"]) == (list(mean), list(std))


def test_the_view_survives_every_format(changed, tmp_path):
    source = changed(
        size={"height": 50, "width": 50},
        crop_size={"height": 40, "width": 40},
        do_center_crop=True,
        resample=2,
    )
    timm, again = str(tmp_path / "x.safetensors"), str(tmp_path / "again")
    done = convert.export_checkpoint(source, format="timm", output=timm)
    assert "'interpolation': 'bilinear'" in done.load
    assert "'crop_pct': 0.8" in done.load
    assert "'crop_mode': 'squash'" in done.load
    convert.export_checkpoint(timm, format="hugging_face", output=again)
    found = preprocessor(tmp_path / "again")
    assert (found["size"], found["crop_size"]) == (
        {"height": 50, "width": 50},
        {"height": 40, "width": 40},
    )
    assert (found["do_center_crop"], found["resample"]) == (True, 2)


def test_another_image_size_scales_the_view_in_its_own_form(changed, tmp_path):
    source = changed(size={"shortest_edge": 50}, crop_size=40, do_center_crop=True)
    convert.export_checkpoint(
        source, format="hugging_face", output=str(tmp_path / "again"), image_size=80
    )
    found = preprocessor(tmp_path / "again")
    assert (found["size"], found["crop_size"]) == ({"shortest_edge": 100}, 80)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_flip_channel_order": True}, "do_flip_channel_order is true"),
        ({"resample": 17}, "resample is 17"),
        ({"size": []}, "size is empty"),
        ({"image_mean": [0.5, [0.5], 0.5]}, "image_mean is .* not 3 numbers"),
    ],
)
def test_an_image_processor_that_is_another(changed, fields, message):
    with pytest.raises(WeightsError, match=f"preprocessor_config.json: {message}"):
        read(changed(**fields))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"nobody_knows": 1}, "'nobody_knows' is not known here"),
        ({"hidden_act": "quick_gelu"}, "'hidden_act' is 'quick_gelu'"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"num_channels": 4}, "'num_channels' is 4"),
        ({"image_size": [40, 48]}, "image_size is .* squares"),
        ({"use_absolute_position_embeddings": True}, "positions are absolute and relative_per"),
        ({"id2label": {"a": "b"}}, "id2label has the key 'a'"),
        ({"architectures": ["BeitForSemanticSegmentation"]}, "is a segmentation model"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, not a whole number"),
    ],
)
def test_a_config_of_another_function(changed, config, message):
    with pytest.raises(WeightsError, match=message) as error:
        read(changed(config=config))
    assert "--allow" not in str(error.value)


def timm_folder(folder, path, **config) -> str:
    """A repository of timm: tensors without this project's header, and its config.json."""
    path.mkdir()
    state = official_state(folder)
    containers.write_safetensors(str(path / "model.safetensors"), state, metadata={"format": "pt"})
    arguments = {"img_size": 40, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    whole = {
        "architecture": "beit_base_patch16_224",
        "model_args": arguments | config.pop("model_args", {}),
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (path / "config.json").write_text(json.dumps(whole | config))
    return str(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_args": {"img_size": [32, 50]}}, "img_size is .* squares"),
        ({"model_args": {"img_size": 48}}, "img_size is 48, but by the tensors it is 40"),
        ({"model_args": {"depth": 4}}, "depth is 4, but by the tensors it is 3"),
        ({"model_args": {"num_heads": 8}}, "num_heads is 8, but by the tensors it is 4"),
        ({"global_pool": ""}, "global_pool is '': its classifier"),
        ({"global_pool": "token"}, "global_pool 'token' with the norm 'fc_norm'"),
        ({"model_args": {"global_pool": "avg"}, "global_pool": ""}, ""),
        ({"architecture": "eva_giant_patch14_224"}, "'eva_giant_patch14_224', not a BEiT"),
        ({"architecture": "beit3_base_patch16_224"}, "not a BEiT"),
        ({"model_args": {"rope": True}}, "model_args: 'rope' is not known here"),
    ],
)
def test_what_a_folder_of_timm_says_is_compared(folder, tmp_path, config, message):
    path = timm_folder(folder, tmp_path / "timm", **config)
    if not message:  # a field that the tensors agree with
        assert read(path).description.pooling == "mean"
        return
    with pytest.raises(WeightsError, match=message) as error:
        read(path)
    assert "--allow" not in str(error.value)


def saved(torch, folder, path, **beside) -> str:
    state = {key: torch.from_numpy(array.copy()) for key, array in official_state(folder).items()}
    torch.save({"state_dict": state, **beside}, path)
    return str(path)


def test_what_a_training_script_saved_is_read(torch, folder, tmp_path):
    """timm's `arch` and `args`; the official `args`."""

    def facts(**beside):
        checkpoint = read(saved(torch, folder, tmp_path / "x.pth", **beside))
        return checkpoint.description.normalization, set(checkpoint.guessed)

    unsaid = {"activation", "layer_norm_epsilon", "normalization", "pooling"}
    assert facts() == ("half", unsaid)
    assert facts(arch="base") == ("half", unsaid)  # of a script of one's own
    mean, std = NORMALIZATIONS["imagenet"]
    timm = argparse.Namespace(mean=list(mean), std=list(std), gp=None, model_kwargs={})
    arch = "beit_base_patch16_224"
    assert facts(arch=arch, args=timm) == ("imagenet", set())
    assert facts(arch="beitv2_base_patch16_224") == ("imagenet", set())
    official = argparse.Namespace(model=arch, imagenet_default_mean_and_std=True)
    assert facts(args=official) == ("imagenet", set())
    for wrong, message in (
        ({"arch": "eva02_base_patch14_224"}, "'eva02_base_patch14_224', not a BEiT"),
        (
            {"arch": arch, "args": argparse.Namespace(model_kwargs={"swiglu_mlp": True})},
            "'swiglu_mlp' is True",
        ),
        (
            {"arch": arch, "args": argparse.Namespace(model_kwargs={}, gp="token")},
            "global_pool 'token' with the norm 'fc_norm'",
        ),
    ):
        with pytest.raises(WeightsError, match=message):
            facts(**wrong)


def test_version_2s_pre_training_is_read_without_its_aggregation(torch, tmp_path):
    description = PRETRAINED
    examples.saved(tmp_path / "native", description)
    output = str(tmp_path / "x.pth")
    convert.export_checkpoint(str(tmp_path / "native"), format="unilm", output=output)
    state = torch.load(output, weights_only=True)["model"]
    extra = {
        key.replace("blocks.0.", "cls_pt_layers.0."): tensor
        for key, tensor in state.items()
        if key.startswith("blocks.0.")
    }
    torch.save({"model": state | extra}, output)
    checkpoint = read(output)
    assert checkpoint.description.task == "pretrain"
    assert set(checkpoint.report.left_out) == set(extra)
    assert "cls_pt_layers.*." in str(checkpoint.report)
    assert "cls_pt_layers.0." not in str(checkpoint.report)


def test_live_names_of_transformers_5_are_read(torch, tmp_path):
    """`state_dict()` has other names than `save_pretrained` writes."""
    transformers = pytest.importorskip("transformers", minversion="5", reason="the peer")
    small = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 40,
        "intermediate_size": 64, "patch_size": 8, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    for name, positions in (
        ("BeitForImageClassification", {"use_relative_position_bias": True}),
        (
            "BeitForMaskedImageModeling",
            {"use_shared_relative_position_bias": True, "use_mask_token": True},
        ),
    ):
        model = getattr(transformers, name)(transformers.BeitConfig(**small, **positions))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / name)
        expected = read(str(tmp_path / name)).params
        (tmp_path / name / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
        found = read(str(tmp_path / name)).params
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array, err_msg=key)


def test_an_absurd_width_is_refused_before_it_is_worked_with(torch, folder, tmp_path):
    """A tensor that is expanded takes no room in its file."""
    state = {key: torch.from_numpy(array.copy()) for key, array in official_state(folder).items()}
    state["cls_token"] = torch.zeros(1).expand(1, 1, 1 << 19)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"cls_token is 524288 wide, .* 32"):
        read(str(tmp_path / "x.pth"))


def test_a_published_epsilon_is_told_and_can_be_kept(changed, tmp_path):
    source = changed(config={"layer_norm_eps": 1e-12})
    assert "in place of config.json's 1e-12" in read(source).guessed["layer_norm_epsilon"]
    kept = read(source, stated=Stated(layer_norm_epsilon=1e-12))
    assert kept.description.model.layer_norm_epsilon == 1e-12
    assert not kept.guessed
    convert.export_checkpoint(source, format="hugging_face", output=str(tmp_path / "again"))
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["layer_norm_eps"] == 1e-12


def test_an_entry_of_this_project_that_was_changed_is_refused_in_one_line(folder, tmp_path):
    content = (folder / "timm.safetensors").read_bytes()
    state, metadata = containers.load_safetensors(content, source="x")
    whole = json.loads(metadata["beit_jax"])
    model = whole["model"]
    for wrong in (
        {"classes": None}, {"classes": 2.5}, {"classes": 1 << 60}, {"labels": "abcde"},
        {"labels": [1, 2]}, {"pooling": ["mean"]}, {"task": {}}, {"model": model | {"layers": 1e9}},
        {"model": model | {"width": 1 << 40}}, {"kept": {"view": {"crop": "x"}}}, {"guessed": 3},
        {"data": []}, {"model": None},
    ):  # fmt: skip
        path = str(tmp_path / "x.safetensors")
        entry = json.dumps(whole | wrong)
        containers.write_safetensors(path, state, metadata=metadata | {"beit_jax": entry})
        with pytest.raises(WeightsError) as error:
            read(path)
        assert "entry 'beit_jax'" in str(error.value), wrong
        assert "\n" not in str(error.value)


def test_what_was_guessed_stays_a_guess(torch, folder, tmp_path, caplog):
    """Through an import, and an export of it."""
    plain = saved(torch, folder, tmp_path / "x.pth")
    guessed = set(read(plain).guessed)
    convert.import_checkpoint(plain, output=str(tmp_path / "ours"))
    output = str(tmp_path / "x.safetensors")
    done = convert.export_checkpoint(str(tmp_path / "ours"), format="timm", output=output)
    assert {text.split()[0] for text in done.report.guessed} == guessed
    assert set(read(output).guessed) == guessed
    beit_jax.load_encoder(str(tmp_path / "ours"))
    assert "guessed normalization half" in caplog.text


def test_what_is_missing_can_be_imported_and_not_exported(torch, folder, tmp_path):
    state = {key: torch.from_numpy(array.copy()) for key, array in official_state(folder).items()}
    del state["head.bias"]
    torch.save(state, tmp_path / "x.pth")
    path, allow = str(tmp_path / "x.pth"), ["head.bias"]
    convert.import_checkpoint(path, output=str(tmp_path / "ours"), allow_missing=allow)
    with pytest.raises(WeightsError, match=r"lacks head\.bias, without which nothing can be"):
        convert.export_checkpoint(
            path, format="timm", output=str(tmp_path / "x.safetensors"), allow_missing=allow
        )


def test_names_of_classes_that_are_none_are_said_to_be_left_out(folder, tmp_path):
    for i, (names, labels) in enumerate(
        (
            ({str(n): f"class {n}" for n in range(5)}, tuple(f"class {n}" for n in range(5))),
            ({str(n + 1): f"class {n}" for n in range(5)}, ()),
            (["a", "b"], ()),
        )
    ):
        path = timm_folder(folder, tmp_path / str(i), label_names=names)
        checkpoint = read(path)
        assert checkpoint.description.labels == labels
        assert any("labels left out" in note for note in checkpoint.report.notes) == (not labels)
