"""`python -m beit_jax.features`: transformers' features, every image once, whole files or none."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest

from beit_jax.features import command
from beit_jax.features.images import read_image
from beit_jax.models.functional import unflatten
from beit_jax.weights import native
from beit_jax.weights.description import to_config
from tests.absent import run_without
from tests.features.images_test import picture
from tests.imports_test import TRAINING_LIBRARIES
from tests.weights import examples
from tests.weights.examples import relative_error

SIZE, GRID, WIDTH = 40, 5, 32
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """transformers' BeitModel with random weights and a final norm, saved as its users save it."""
    torch = pytest.importorskip("torch", reason="the peer runs on PyTorch")
    transformers = pytest.importorskip("transformers", reason="the peer is not installed")
    torch.manual_seed(0)
    config = transformers.BeitConfig(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=SIZE,
        patch_size=8,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=0.5,
        initializer_range=0.3,
        use_mean_pooling=False,
    )
    model = transformers.BeitModel(config, add_pooling_layer=False).eval()
    folder = str(tmp_path_factory.mktemp("peer") / "hf")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A pre-training run of this project."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    examples.saved(folder, examples.PRETRAINED["beit+"])
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    """Seven pictures of several sizes and formats, at several depths."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "a" / "b").mkdir(parents=True)
    for number, name in enumerate(
        ("z.png", "a/1.jpg", "a/2.bmp", "a/b/3.webp", "a/b/4.gif", "a/10.png", "A.jpeg")
    ):
        picture(50 + 13 * number, 90 - 7 * number, seed=number).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return str(folder)


NAMES = ["A.jpeg", "a/1.jpg", "a/10.png", "a/2.bmp", "a/b/3.webp", "a/b/4.gif", "z.png"]


def run(photos, weights, output, *options) -> int:
    arguments = [photos, f"--weights={weights}", f"--output={output}", *options]
    return command.main([str(argument) for argument in arguments])


def load(path):
    with np.load(path) as file:
        return file["features"], file["names"].tolist(), json.loads(str(file["metadata"]))


def hidden_states(model, pixels):
    """transformers' hidden states and final tokens of uint8 images."""
    import torch

    normalized = (pixels / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2).copy()
    with torch.no_grad():
        out = model(torch.from_numpy(normalized), output_hidden_states=True)
    return [state.numpy() for state in out.hidden_states], out.last_hidden_state.numpy()


def pooled(tokens, pool):
    if pool == "cls":
        return tokens[:, 0]
    if pool == "mean":
        return tokens[:, 1:].mean(axis=1)
    return tokens[:, 1:].reshape(len(tokens), GRID, GRID, WIDTH)


@pytest.mark.parametrize("pool", ["cls", "mean", "patches"])
@pytest.mark.parametrize("block", [0, 1, 3])
def test_features_are_those_of_transformers(peer, photos, tmp_path, pool, block):
    folder, model = peer
    options = ["--resize=squash", f"--pool={pool}"] + ([f"--block={block}"] if block else [])
    assert run(photos, folder, tmp_path / "f.npz", *options) == 0
    features, names, metadata = load(tmp_path / "f.npz")
    pixels = np.stack(
        [read_image(f"{photos}/{name}", size=SIZE, resize="squash") for name in NAMES]
    )
    states, final = hidden_states(model, pixels)
    assert names == NAMES
    assert features.dtype == np.float32
    expected = pooled(states[block] if block else final, pool)
    assert features.shape == expected.shape
    assert relative_error(features, expected) < TOLERANCE
    assert metadata["block"] == (block or None)
    assert metadata["final_norm"] == (block == 0)
    assert (metadata["pool"], metadata["image_size"]) == (pool, SIZE)
    assert (metadata["normalization"], metadata["resize"]) == ("half", "squash")


def test_features_of_photographs_are_those_of_transformers(peer, tmp_path):
    source = os.environ.get("BEIT_JAX_IMAGES")
    if not source:
        pytest.skip("needs photographs: set BEIT_JAX_IMAGES to a folder of JPEGs")
    folder, model = peer
    chosen = tmp_path / "photographs"
    chosen.mkdir()
    for name in sorted(os.listdir(source))[::10]:
        shutil.copy(os.path.join(source, name), chosen / name)
    assert run(chosen, folder, tmp_path / "f.npz", "--batch-size=8") == 0
    features, names, _ = load(tmp_path / "f.npz")
    assert names == sorted(os.listdir(chosen))
    pixels = np.stack([read_image(str(chosen / n), size=SIZE, resize="crop") for n in names])
    _, final = hidden_states(model, pixels)
    assert relative_error(features, final[:, 0]) < TOLERANCE


def test_batch_sizes_give_the_same_features(weights, photos, tmp_path, monkeypatch):
    """The last batch is filled up: the encoder sees one size only."""
    seen = set()
    compile_function = command.feature_function

    def watched(*arguments, **settings):
        compute = compile_function(*arguments, **settings)

        def call(images):
            seen.add(len(images))
            return compute(images)

        return call

    monkeypatch.setattr(command, "feature_function", watched)
    results = {}
    for batch_size, run_size in ((1, 1), (3, 3), (8, 7)):  # there are no more than 7
        seen.clear()
        path = tmp_path / f"{batch_size}.npz"
        assert run(photos, weights, path, f"--batch-size={batch_size}") == 0
        assert seen == {run_size}
        results[batch_size], names, _ = load(path)
        assert names == NAMES
    np.testing.assert_allclose(results[1], results[3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results[1], results[8], rtol=1e-4, atol=1e-5)
    assert len(np.unique(results[1][:, 0])) == len(NAMES)


def test_a_batch_over_several_devices_gives_the_same_features(weights, photos, tmp_path):
    folder = tmp_path / "eight"
    shutil.copytree(photos, folder)
    shutil.copy(folder / "z.png", folder / "zz.png")
    assert run(folder, weights, tmp_path / "8.npz", "--batch-size=8") == 0
    assert run(folder, weights, tmp_path / "1.npz", "--batch-size=1") == 0
    np.testing.assert_allclose(
        load(tmp_path / "8.npz")[0], load(tmp_path / "1.npz")[0], rtol=1e-4, atol=1e-5
    )


def test_unreadable_files_are_reported_by_name_and_left_out(weights, photos, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff and nothing")
    (folder / "a" / "empty.png").write_bytes(b"")
    (folder / "forged\n\x1b[31m.png").write_bytes(b"")
    assert run(folder, weights, tmp_path / "f.npz", "--batch-size=2") == 0
    _, names, metadata = load(tmp_path / "f.npz")
    assert names == NAMES
    assert metadata["unreadable"] == ["a/empty.png", "broken.jpg", "forged\n\x1b[31m.png"]
    said = capsys.readouterr().err
    assert "can't read a/empty.png: " in said
    assert "can't read broken.jpg: " in said
    assert r"can't read forged\n\x1b[31m.png: " in said
    assert "3 of 10 images could not be read" in said
    assert "1 other files left out" in said


def test_nothing_is_written_where_no_image_can_be_read(weights, tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    (folder / "x.png").write_bytes(b"hello")
    assert run(folder, weights, out / "f.npz") == 2
    assert run(folder, weights, out / "f.parquet") == 2
    assert "none of 1 images could be read" in capsys.readouterr().err
    assert os.listdir(out) == []


def test_another_image_size_resizes_positions(weights, photos, tmp_path):
    assert run(photos, weights, tmp_path / "f.npz", "--image-size=64", "--pool=patches") == 0
    features, _, metadata = load(tmp_path / "f.npz")
    assert features.shape == (7, 8, 8, WIDTH)
    assert (metadata["image_size"], metadata["grid"]) == (64, 8)


def test_parquet_holds_the_same_as_npz(weights, photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    for options in (["--pool=mean"], ["--pool=patches", "--dtype=float16", "--batch-size=3"]):
        assert run(photos, weights, tmp_path / "f.npz", *options) == 0
        assert run(photos, weights, tmp_path / "f.parquet", *options) == 0
        features, names, metadata = load(tmp_path / "f.npz")
        table = parquet.read_table(tmp_path / "f.parquet")
        assert table.column_names == ["name", "features"]
        assert table["name"].to_pylist() == names
        rows = np.array(table["features"].to_pylist(), features.dtype)
        np.testing.assert_array_equal(rows, features.reshape(7, -1))
        stored = parquet.read_metadata(tmp_path / "f.parquet").metadata
        assert json.loads(stored[b"beit_jax"]) == metadata
    assert features.dtype == np.float16
    assert sorted(os.listdir(tmp_path)) == ["f.npz", "f.parquet"]


def test_parquet_without_pyarrow_names_the_extra(weights, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(command, "load_encoder", None)  # refused before anything is loaded
    assert run(photos, weights, tmp_path / "f.parquet") == 2
    assert "pip install 'beit-jax[parquet]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("f.csv", (), "--output: .*f.csv must end in .npz or .parquet"),
        ("nowhere/f.npz", (), "--output: there is no folder .*nowhere"),
        ("folder.npz", (), "--output: .*folder.npz is a folder"),
        ("f.npz", ("--block=-1",), "--block: -1; blocks are numbered from 1"),
        ("f.npz", ("--batch-size=0",), "--batch-size: must be at least 1"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    weights, photos, tmp_path, monkeypatch, capsys, output, options, message
):
    monkeypatch.setattr(command, "load_encoder", None)
    (tmp_path / "folder.npz").mkdir()
    assert run(photos, weights, tmp_path / output, *options) == 2
    assert re.match(f"error: {message}\n$", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--block=4",), "--block: 4; the encoder has 3 blocks"),
        (("--image-size=41",), ".*41 is not a multiple of patch_size 8"),
        (("--heads=3",), ".*heads"),
    ],
)
def test_options_that_do_not_fit_the_weights_are_refused(
    weights, photos, tmp_path, capsys, options, message
):
    assert run(photos, weights, tmp_path / "f.npz", *options) == 2
    assert re.match(f"error: {message}", capsys.readouterr().err)
    assert os.listdir(tmp_path) == []


def test_missing_weights_and_images_are_one_line(weights, photos, tmp_path, capsys):
    assert run(photos, tmp_path / "nowhere", tmp_path / "f.npz") == 2
    assert re.match("error: .*nowhere", capsys.readouterr().err)
    assert run(tmp_path / "nowhere", weights, tmp_path / "f.npz") == 2
    assert re.match("error: IMAGES: there is no folder .*nowhere", capsys.readouterr().err)
    assert run(tmp_path, weights, tmp_path / "f.npz") == 2
    assert re.match("error: IMAGES: no images in ", capsys.readouterr().err)


def test_features_beyond_float16_are_an_error(photos, tmp_path, capsys):
    description = examples.PRETRAINED["beit+"]
    params = examples.random_params(description)
    params["encoder/norm/scale"] = params["encoder/norm/scale"] * 1e6
    native.write_params(str(tmp_path / "run"), unflatten(params), config=to_config(description))
    out = tmp_path / "out"
    out.mkdir()
    assert run(photos, tmp_path / "run", out / "f.npz", "--dtype=float16") == 2
    assert "--dtype: features of A.jpeg are not finite in float16" in capsys.readouterr().err
    assert os.listdir(out) == []
    assert run(photos, tmp_path / "run", out / "f.npz") == 0


def test_an_interrupted_run_leaves_the_old_file(weights, photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "f.npz").write_bytes(b"old")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_embed", interrupted)
    assert run(photos, weights, tmp_path / "f.npz") == 130
    assert "nothing was written" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["f.npz"]
    assert (tmp_path / "f.npz").read_bytes() == b"old"


def test_the_command_needs_nothing_that_only_training_installs(peer, photos, tmp_path):
    folder, _ = peer
    output = run_without(
        TRAINING_LIBRARIES,
        "import sys; from beit_jax.features import main; print(main(sys.argv[1:]))",
        photos,
        f"--weights={folder}",
        f"--output={tmp_path / 'f.npz'}",
    )
    assert output == "0\n"
    assert load(tmp_path / "f.npz")[1] == NAMES
