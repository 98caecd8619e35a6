"""DALL-E's weights as its own package writes them, and as other projects publish them."""

import hashlib
import os
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from beit_jax.models.functional import flatten
from beit_jax.tokenizers.dalle import DalleConfig
from beit_jax.tokenizers.loading import TokenizerFileError, load_params, open_tokenizer
from beit_jax.weights import dalle
from beit_jax.weights.report import WeightsError

# The package's smallest sizes.
WIDTH, VOCABULARY, SIZE = 64, 512, 112
SETTINGS = dict(width=WIDTH, vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch runs the original")


def photographs(count: int) -> np.ndarray:
    """Real photographs where there are some; else images with edges, shades and texture."""
    folder = os.environ.get("BEIT_JAX_IMAGES")
    if folder:
        from PIL import Image

        paths = sorted(
            path
            for path in pathlib.Path(folder).rglob("*")
            if path.suffix.lower() in (".jpg", ".jpeg", ".png")
        )[:count]
        images = [
            np.asarray(Image.open(path).convert("RGB").resize((SIZE, SIZE))) for path in paths
        ]
        return np.stack(images)
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
    images = []
    for _ in range(count):
        shade = rng.random(3) * rows[..., None] + rng.random(3) * columns[..., None]
        centre, radius = rng.random(2), 0.1 + 0.3 * rng.random()
        disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
        image = np.where(disc[..., None], rng.random(3), shade / 2)
        images.append(255 * np.clip(image + 0.03 * rng.normal(size=image.shape), 0, 1))
    return np.stack(images).astype(np.uint8)


@pytest.fixture(scope="module")
def modules(torch):
    """The package's own encoder and decoder, small, with random weights and biases."""
    package = pytest.importorskip("dall_e", reason="the DALL-E package is the original")
    torch.manual_seed(0)
    made = {
        "encoder": package.Encoder(n_hid=WIDTH, vocab_size=VOCABULARY),
        "decoder": package.Decoder(n_init=WIDTH // 2, n_hid=WIDTH, vocab_size=VOCABULARY),
    }
    for module in made.values():
        for name, parameter in module.named_parameters():
            if name.endswith(".b"):
                parameter.data.normal_(std=0.1)
    # A random encoder gives nearly every patch the same token; subtracting the mean logits helps.
    from dall_e.utils import map_pixels

    with torch.no_grad():
        pixels = torch.from_numpy(photographs(4).transpose(0, 3, 1, 2).copy()).float() / 255
        mean = made["encoder"](map_pixels(pixels)).mean((0, 2, 3))
        made["encoder"].blocks.output.conv.b -= mean
    return made


@pytest.fixture
def files(torch, modules, tmp_path):
    """`files("zip")`: paths of encoder.pkl and decoder.pkl, whole modules in that container."""

    def write(container="zip"):
        paths = {}
        for part, module in modules.items():
            paths[part] = str(tmp_path / f"{part}.pkl")
            new = container == "zip"
            torch.save(module, paths[part], _use_new_zipfile_serialization=new)
        return paths

    return write


@pytest.mark.slow
def test_both_containers_give_the_same_file(files, tmp_path):
    digests = {
        container: dalle.convert_tokenizer(
            output=str(tmp_path / f"{container}.safetensors"), **files(container), **SETTINGS
        ).sha256
        for container in ("zip", "legacy")
    }
    assert digests["zip"] == digests["legacy"]


@pytest.mark.slow
def test_converted_modules_give_the_packages_tokens(torch, modules, files, tmp_path):
    """At least 99.9 % of the token ids agree in float32, and the decoder's pictures agree."""
    from dall_e.utils import map_pixels, unmap_pixels

    output = str(tmp_path / "dalle.safetensors")
    done = dalle.convert_tokenizer(output=output, **files("legacy"), **SETTINGS)
    config = DalleConfig(path=output, image_size=SIZE, sha256=done.sha256, **SETTINGS)
    tokenizer, params = open_tokenizer(config), load_params(config)
    images = photographs(16)
    ids = np.asarray(jax.jit(tokenizer.encode)(params, images))
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255
        expected = modules["encoder"](map_pixels(pixels)).argmax(1)
        assert (ids == expected.numpy()).mean() >= 0.999
        assert len(np.unique(ids)) > 50, "tokens must differ for this to mean anything"
        one_hot = torch.nn.functional.one_hot(expected[:1], VOCABULARY).permute(0, 3, 1, 2)
        decoded = modules["decoder"].blocks(one_hot.float())[:, :3]
        decoded = unmap_pixels(torch.sigmoid(decoded)).permute(0, 2, 3, 1)
    actual = jax.jit(tokenizer.decode)(params, expected[:1].numpy())
    np.testing.assert_allclose(actual, decoded.numpy(), atol=1e-4)
    assert set(done.reports) == {"encoder", "decoder"}
    assert len(done.reports["encoder"].used) == 74
    assert len(done.reports["decoder"].used) == 76


def test_both_directions_are_exact(torch, modules):
    for part, module in modules.items():
        config = DalleConfig(**SETTINGS)
        state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
        params, _ = dalle.to_params(state, part=part, config=config, source="x")
        back = dalle.to_state(params)
        assert back.keys() == state.keys()
        for name in state:
            np.testing.assert_array_equal(back[name], state[name])
        module.load_state_dict({k: torch.from_numpy(a.copy()) for k, a in back.items()})


def flava_names(state: dict) -> dict:
    """As transformers' `convert_dalle_to_flava_codebook.py` renames."""
    renamed = {}
    for key, value in state.items():
        for group in range(1, 5):
            key = key.replace(f"group_{group}.block", f"group_{group}.group.block")
        key = key.replace("res_path.", "res_path.path.")
        if key.endswith(".w"):
            key = key[:-1] + "weight"
        elif key.endswith(".b"):
            key = key[:-1] + "bias"
        renamed[key] = value
    return renamed


@pytest.mark.slow
@pytest.mark.parametrize("source", ["flava", "flava safetensors", "openmmlab", "wrapped"])
def test_the_encoder_as_other_projects_publish_it(torch, modules, source, tmp_path):
    state = dict(modules["encoder"].state_dict())
    path = str(tmp_path / "encoder.bin")
    if source == "flava safetensors":
        path = str(tmp_path / "model.safetensors")
        arrays = {k: v.numpy().copy() for k, v in flava_names(state).items()}
        safetensors.numpy.save_file(arrays, path)
    elif source == "flava":
        torch.save({f"image_codebook.{k}": v for k, v in flava_names(state).items()}, path)
    else:
        # mmselfsup's DALLEEncoder has the original's names.
        torch.save(state if source == "openmmlab" else {"state_dict": state}, path)
    done = dalle.convert_tokenizer(
        output=str(tmp_path / "out.safetensors"), encoder=path, **SETTINGS
    )
    params = load_params(DalleConfig(path=done.output, **SETTINGS))
    assert set(params) == {"encoder"}
    np.testing.assert_array_equal(
        flatten(params)["encoder/group_2/block_1/identity/kernel"],
        state["blocks.group_2.block_1.id_path.w"].numpy().transpose(2, 3, 1, 0),
    )


def test_flavas_own_class_has_the_expected_keys(torch):
    """The keys are exactly those of transformers' class at full size."""
    transformers = pytest.importorskip("transformers", reason="FLAVA is in transformers")
    with torch.device("meta"):
        flava = transformers.FlavaImageCodebook(transformers.FlavaImageCodebookConfig())
    shapes = {key: tuple(tensor.shape) for key, tensor in flava.state_dict().items()}
    arrays = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    _, report = dalle.to_params(arrays, part="encoder", config=DalleConfig(), source="flava")
    assert len(report.used) == len(shapes) == 74


def test_checksums_are_reported_and_checked(files, tmp_path):
    paths = files()
    output = str(tmp_path / "out.safetensors")
    right = hashlib.sha256(pathlib.Path(paths["encoder"]).read_bytes()).hexdigest()
    done = dalle.convert_tokenizer(
        output=output, encoder=paths["encoder"], encoder_sha256=right.upper(), **SETTINGS
    )
    assert done.sources == {"encoder": right}
    assert done.sha256 == hashlib.sha256(pathlib.Path(output).read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match=f"has SHA-256 {right}, expected 00"):
        dalle.convert_tokenizer(
            output=output, encoder=paths["encoder"], encoder_sha256="00" * 32, **SETTINGS
        )
    config = DalleConfig(path=output, sha256="00" * 32, **SETTINGS)
    with pytest.raises(TokenizerFileError, match="sha256"):
        load_params(config)


def test_files_of_other_models_are_refused(torch, files, tmp_path):
    paths = files()
    output = str(tmp_path / "out.safetensors")

    def convert(**more):
        return dalle.convert_tokenizer(**({"output": output, **SETTINGS} | more))

    with pytest.raises(WeightsError, match="is DALL-E's decoder, needed here: the encoder"):
        convert(encoder=paths["decoder"])
    with pytest.raises(WeightsError, match="is DALL-E's encoder, needed here: the decoder"):
        convert(encoder=paths["encoder"], decoder=paths["encoder"])
    with pytest.raises(WeightsError, match="vocabulary of 512 tokens, expected 8192"):
        convert(encoder=paths["encoder"], vocabulary=8192)
    with pytest.raises(WeightsError, match=r"blocks.input.w is \(64, 3, 7, 7\), needed \(256,"):
        convert(encoder=paths["encoder"], width=256)
    torch.save({"model": {"layer.weight": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="is not DALL-E's encoder: its keys are layer"):
        convert(encoder=str(tmp_path / "other.pth"))
    with pytest.raises(WeightsError, match=r"must end in \.safetensors"):
        convert(encoder=paths["encoder"], output="out.pth")
    assert not pathlib.Path(output).exists()


def test_half_precision_is_cast_and_reported(torch, modules, tmp_path):
    state = {name: tensor.half() for name, tensor in modules["encoder"].state_dict().items()}
    torch.save(state, tmp_path / "half.pth")
    done = dalle.convert_tokenizer(
        output=str(tmp_path / "out.safetensors"), encoder=str(tmp_path / "half.pth"), **SETTINGS
    )
    assert len(done.reports["encoder"].cast) == 74
    params = load_params(DalleConfig(path=done.output, **SETTINGS))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_full_size_encoder_from_its_pickle(torch, tmp_path):
    """The published sizes, 215 MB: defaults of the package, defaults of the command."""
    package = pytest.importorskip("dall_e", reason="the DALL-E package is the original")
    torch.manual_seed(1)
    module = package.Encoder()
    pixels = torch.from_numpy(photographs(4).transpose(0, 3, 1, 2).copy()).float() / 255
    with torch.no_grad():
        logits = module(package.map_pixels(pixels))
        module.blocks.output.conv.b -= logits.mean((0, 2, 3))
        expected = module(package.map_pixels(pixels)).argmax(1).numpy()
    torch.save(module, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=False)
    output = str(tmp_path / "dalle.safetensors")
    dalle.convert_tokenizer(output=output, encoder=str(tmp_path / "encoder.pkl"))
    config = DalleConfig(path=output)
    ids = jax.jit(open_tokenizer(config).encode)(load_params(config), photographs(4))
    assert (np.asarray(ids) == expected).mean() >= 0.999
    assert len(np.unique(expected)) > 50
