"""Every container that people keep weights in gives the same tensors, one row a container."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy

from beit_jax.weights import opening
from beit_jax.weights.report import WeightsError
from tests.weights import saved_files
from tests.weights.saved_files import CONFIG, FILES, PLACES, one_line, sharded_safetensors


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch writes the files")


@pytest.fixture(scope="module")
def state():
    return saved_files.state()


def check(path, state) -> opening.Opened:
    """Opens a path, recognised before; its tensors are those of `state`, exactly."""
    assert opening.is_foreign(str(path))
    opened = opening.open_file(str(path))
    assert set(opened.state) == set(state)
    for key, array in state.items():
        assert opened.state[key].dtype == array.dtype, key
        np.testing.assert_array_equal(opened.state[key], array, err_msg=key)
    assert len(opened.sha256) == 64
    assert all("\n" not in note for note in opened.notes)
    return opened


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("row", FILES)
def test_what_torch_save_wrote(torch, state, tmp_path, row, zipped):
    name, whole = FILES[row]
    path = tmp_path / name
    torch.save(whole(torch, state), path, _use_new_zipfile_serialization=zipped)
    check(path, state)


@pytest.mark.parametrize("row", PLACES)
def test_other_files_and_folders(torch, state, tmp_path, row):
    path = PLACES[row](tmp_path, torch, state)
    opened = check(path, state)
    folder = path if path.is_dir() else path.parent
    assert opened.config == (CONFIG if (folder / "config.json").exists() else {})


@pytest.mark.parametrize("name", ["model.safetensors", "model.fp16.safetensors"])
def test_a_file_with_hugging_faces_name_is_the_same_as_its_folder(torch, state, tmp_path, name):
    folder = saved_files.save_hf(tmp_path, torch, state, names=(name,))
    assert check(folder / name, state).config == CONFIG
    (folder / name).rename(folder / "other.safetensors")
    assert check(folder / "other.safetensors", state).config == {}


@pytest.mark.slow
def test_transformers_own_shards_are_read(torch, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the peer")
    config = transformers.BeitConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model = transformers.BeitModel(config)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model.save_pretrained(tmp_path / "whole")
    expected = safetensors.numpy.load_file(tmp_path / "whole" / "model.safetensors")
    opened = check(tmp_path, expected)
    assert opened.config["model_type"] == "beit"


def test_the_checksum_of_shards_is_that_of_sha256sum(state, tmp_path):
    """`sha256sum model-*.safetensors | sha256sum`, in the folder."""
    folder = sharded_safetensors(tmp_path, state)
    lines = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.glob("model-*.safetensors"))
    )
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert opening.open_file(str(folder), sha256=expected).sha256 == expected
    with pytest.raises(WeightsError, match=f"has SHA-256 {expected}, expected 11"):
        opening.open_file(str(folder), sha256="11" * 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"head.bias": "../x.safetensors"}, r"head\.bias is in '\.\./x"),
        (lambda m: m | {"head.bias": "/etc/x.safetensors"}, r"refused: head\.bias is in '/etc"),
        (lambda m: m | {"head.bias": "a\\b.safetensors"}, "refused: head.bias is in"),
        (lambda m: m | {"head.bias": ".."}, r"refused: head\.bias is in '\.\.'"),
        (lambda m: m | {"head.bias": 3}, r"refused: head\.bias is in 3"),
        (lambda m: m | {"head.bias": "gone.safetensors"}, r"1 are not there: gone\.safetensors"),
        (lambda m: {k: v for k, v in m.items() if k != "head.bias"}, r"it holds head\.bias"),
        (lambda m: m | {"x": m["head.bias"]}, "it lacks x"),
        (lambda m: m | {"head.bias": m["cls_token"]}, "it lacks head.bias"),
        (lambda m: {}, "no weight_map"),
        (lambda m: list(m), "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(state, tmp_path, change, message):
    folder = sharded_safetensors(tmp_path / "x", state)
    safetensors.numpy.save_file(state, tmp_path / "x.safetensors")  # which nobody may reach
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    index.write_text(json.dumps(whole | {"weight_map": change(whole["weight_map"])}))
    with pytest.raises(WeightsError, match=message) as error:
        opening.open_file(str(folder))
    assert str(index.name) in one_line(error)


@pytest.mark.parametrize("config", [{"lr": 0.1}, {"architecture": None}])
def test_a_config_that_is_nobodys_is_told_and_left_aside(torch, state, tmp_path, config):
    """As huggingface_hub's `PyTorchModelHubMixin` writes it."""
    folder = saved_files.save_hf(tmp_path, torch, state)
    (folder / "config.json").write_text(json.dumps(config))
    opened = opening.open_file(str(folder))
    assert opened.config == {}
    assert opened.notes == ("left aside: config.json, which is neither transformers' nor timm's",)
    (folder / "config.json").write_text(json.dumps({**config, "model_args": {}}))
    assert opening.open_file(str(folder)).config, "a damaged one of timm's"
