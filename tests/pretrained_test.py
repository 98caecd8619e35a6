"""The library's loaders: numbers of other libraries, pure functions, messages."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from flax import nnx

import beit_jax
from beit_jax.config import ConfigError, to_dict
from beit_jax.models.functional import flatten, unflatten
from beit_jax.tokenizers.dvae import DvaeConfig
from beit_jax.tokenizers.loading import open_tokenizer, save_params
from beit_jax.weights import convert, native
from beit_jax.weights.description import to_config
from tests.absent import run_without
from tests.weights import examples
from tests.weights.examples import relative_error
from tests.weights.hub_server import HubServer

TOLERANCE = 1e-4
LABELLED = dataclasses.replace(examples.FINE_TUNED["mean"], labels=("a", "b", "c", "d", "e"))


def uint8_images(size: int, count: int = 2) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """One checkpoint in each format: name → path."""
    folder = tmp_path_factory.mktemp("sources")
    description = examples.PRETRAINED["beit+"]
    examples.saved(folder / "run", description)
    examples.saved(folder / "classifier", LABELLED)
    examples.saved(folder / "cls", examples.FINE_TUNED["cls"])
    paths = {name: str(folder / name) for name in ("run", "classifier", "cls")}
    for format, output in (("hugging_face", "hf"), ("timm", "timm.safetensors")):
        paths[format] = str(folder / output)
        convert.export_checkpoint(paths["run"], format=format, output=paths[format])
    try:
        import torch  # noqa: F401
    except ImportError:
        return paths
    paths["unilm"] = str(folder / "unilm.pth")
    convert.export_checkpoint(paths["run"], format="unilm", output=paths["unilm"])
    return paths


@pytest.fixture(scope="module")
def peer(sources):
    """transformers' model of the Hugging Face folder and its hidden states of two images."""
    torch = pytest.importorskip("torch", reason="the peer runs on PyTorch")
    transformers = pytest.importorskip("transformers", reason="the peer is not installed")
    model = transformers.BeitForMaskedImageModeling.from_pretrained(sources["hugging_face"]).eval()
    images = uint8_images(40)
    pixels = torch.from_numpy((images / 127.5 - 1).astype(np.float32).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        output = model.beit(pixels, output_hidden_states=True)
        normed = model.layernorm(output.last_hidden_state)
    return images, [state.numpy() for state in output.hidden_states], normed.numpy()


@pytest.mark.parametrize("format", ["run", "hugging_face", "timm", "unilm"])
def test_features_are_those_of_transformers(format, sources, peer):
    images, states, normed = peer
    encoder = beit_jax.load_encoder(sources[format], heads=4 if format == "unilm" else 0)
    assert encoder.final_norm
    assert (encoder.image_size, encoder.grid, encoder.width) == (40, 5, 32)
    out = encoder(images)
    assert out.patches.shape == (2, 5, 5, 32)
    assert out.cls.dtype == out.patches.dtype == jnp.float32
    assert relative_error(out.cls, normed[:, 0]) < TOLERANCE
    assert relative_error(out.patches.reshape(2, 25, 32), normed[:, 1:]) < TOLERANCE
    embedded, first, last = encoder.blocks(images, (0, 1, -1))
    assert relative_error(embedded.cls, states[0][:, 0]) < TOLERANCE
    assert relative_error(first.cls, states[1][:, 0]) < TOLERANCE
    assert relative_error(first.patches.reshape(2, 25, 32), states[1][:, 1:]) < TOLERANCE
    assert relative_error(last.cls, states[3][:, 0]) < TOLERANCE
    (again,) = encoder.blocks(jnp.asarray(images), [3], norm=True)
    assert relative_error(again.cls, normed[:, 0]) < TOLERANCE


@pytest.fixture(scope="module")
def encoder(sources):
    return beit_jax.load_encoder(sources["run"])


@pytest.mark.slow
def test_apply_is_pure_and_has_a_gradient(encoder):
    images = encoder.normalize(uint8_images(40))
    out = jax.jit(encoder.apply)(encoder.params, images)
    assert relative_error(out.cls, encoder(uint8_images(40)).cls) < TOLERANCE

    def loss(params):
        return jnp.square(encoder.apply(params, images).patches).mean()

    gradients = jax.jit(jax.grad(loss))(encoder.params)
    assert jax.tree.structure(gradients) == jax.tree.structure(encoder.params)
    # The mask token takes no part without a mask; everything else does.
    flat = flatten(gradients)
    assert {name for name, leaf in flat.items() if not np.any(leaf)} == {"mask_token"}


def test_init_draws_parameters_of_the_same_shapes(encoder):
    fresh = jax.eval_shape(encoder.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, encoder.params)


def test_a_mask_hides_patches_from_the_encoder(encoder, sources):
    images = encoder.normalize(uint8_images(40))
    everything = jnp.ones((2, 5, 5), bool)
    hidden = encoder.apply(encoder.params, images, mask=everything)
    other = encoder.apply(encoder.params, images[::-1], mask=everything)
    np.testing.assert_array_equal(hidden.cls, other.cls)
    classifier = beit_jax.load_encoder(sources["classifier"])
    with pytest.raises(ValueError, match="no mask token"):
        classifier.apply(classifier.params, images, mask=everything)


def test_blocks_agree_with_apply_blocks_and_with_the_call(encoder):
    images = uint8_images(40)
    (pure,) = encoder.apply_blocks(encoder.params, encoder.normalize(images), (-2,))
    (called,) = encoder.blocks(images, (2,))
    assert relative_error(called.patches, pure.patches) < TOLERANCE
    for wrong in ((), (4,), (-4,)):
        with pytest.raises(ValueError, match="blocks 1 to 3, or -3 to -1"):
            encoder.blocks(images, wrong)
    numbers = encoder.blocks(images, np.array([2, 3]))
    assert relative_error(numbers[0].patches, pure.patches) < TOLERANCE
    with pytest.raises(ValueError, match="blocks 1 to 3"):
        encoder.blocks(images, np.array([], int))


def test_attention_agrees_with_the_module_and_numbers_blocks_from_either_end(encoder):
    images = uint8_images(40)
    found = encoder.attention(images, (-1, 1))
    expected = encoder.module().attention_weights(encoder.normalize(images), blocks=(3, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.shape[:2] == (2, 2)
    with pytest.raises(ValueError, match="0 stands for the embeddings"):
        encoder.attention(images, (0,))


def test_the_nnx_module_gives_the_same_tokens(encoder):
    module = encoder.module()
    assert isinstance(module, nnx.Module)
    tokens = nnx.jit(lambda module, images: module(images))(
        module, encoder.normalize(uint8_images(40))
    )
    out = encoder(uint8_images(40))
    assert relative_error(tokens[:, 0], out.cls) < TOLERANCE
    # It is a module like any other: its parameters are nnx.Param, so an optimizer finds them.
    assert (
        flatten(nnx.to_pure_dict(nnx.state(module, nnx.Param))).keys()
        == flatten(encoder.params).keys()
    )


def test_another_image_size_resizes_positions_as_the_export_does(sources, tmp_path):
    output = str(tmp_path / "larger")
    convert.export_checkpoint(sources["run"], format="hugging_face", output=output, image_size=56)
    expected = beit_jax.load_encoder(output)(uint8_images(56))
    larger = beit_jax.load_encoder(sources["run"], image_size=56)
    assert (larger.image_size, larger.grid) == (56, 7)
    assert relative_error(larger(uint8_images(56)).patches, expected.patches) < TOLERANCE
    for wrong in ("56", 56.0, True):
        with pytest.raises(ConfigError, match="image_size: must be whole pixels, got"):
            beit_jax.load_encoder(sources["run"], image_size=wrong)
    with pytest.raises(ConfigError, match="image_size: 50 is not a multiple of patch_size 8"):
        beit_jax.load_encoder(sources["run"], image_size=50)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 40, 40, 3), np.float32), "must be a uint8 array, got float32; apply"),
        (np.zeros((2, 40, 40, 3), np.int32), "must be a uint8 array, got int32"),
        ([[1]], "must be a uint8 array, got <class 'list'>"),
        (np.zeros((40, 40, 3), np.uint8), r"\[40, 40, 3\]; must be a batch: images\[None\]"),
        (np.zeros((2, 3, 40, 40), np.uint8), r"must be \[batch, 40, 40, 3\], channels last"),
        (np.zeros((2, 48, 40, 3), np.uint8), "48 × 40, but this model takes 40 × 40.*image_size="),
    ],
)
def test_unfit_images_are_refused(images, message, encoder):
    with pytest.raises(ValueError, match=message):
        encoder(images)


def test_a_tensor_of_pytorch_is_refused_by_name(encoder):
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"must be a uint8 array, got torch\.uint8"):
        encoder(torch.zeros((2, 40, 40, 3), dtype=torch.uint8))


def test_classifier_gives_logits_features_and_class_names(sources):
    classifier = beit_jax.load_classifier(sources["classifier"])
    assert classifier.classes == LABELLED.labels
    images = uint8_images(40)
    logits, features = classifier(images), classifier.features(images)
    assert logits.shape == (2, 5)
    assert features.shape == (2, 32)
    head = classifier.params["head"]
    assert relative_error(features @ head["kernel"] + head["bias"], logits) < TOLERANCE
    pure = classifier.apply(classifier.params, classifier.normalize(images))
    assert relative_error(pure, logits) < TOLERANCE
    assert relative_error(classifier.module()(classifier.normalize(images)), logits) < TOLERANCE
    # Pooled and normalised by hand, from the encoder's tokens.
    encoder = classifier.encoder
    mean = encoder(images).patches.mean((1, 2))
    centred = mean - mean.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
    norm = classifier.params["fc_norm"]
    assert relative_error(scaled * norm["scale"] + norm["bias"], features) < TOLERANCE


def test_class_names_come_from_a_hugging_face_folder_too(sources, tmp_path):
    output = str(tmp_path / "hf")
    convert.export_checkpoint(sources["classifier"], format="hugging_face", output=output)
    assert beit_jax.load_classifier(output).classes == LABELLED.labels


def test_a_model_is_loaded_by_its_name_on_the_hub(sources, tmp_path):
    pytest.importorskip("huggingface_hub", reason="the extra [hub] is not installed")
    files = {path.name: path.read_bytes() for path in Path(sources["hugging_face"]).iterdir()}
    program = """
import numpy as np
import beit_jax
print(beit_jax.load_encoder("hf:owner/name@main")(np.zeros((1, 40, 40, 3), np.uint8)).cls.shape)
"""
    with HubServer() as server:
        server.add("owner/name", files)
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_XET": "1",  # the server has no Xet storage
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        assert run_without(("tensorflow", "torch"), program, environment=settings) == "(1, 32)\n"


def test_a_mean_pooled_encoder_has_no_final_norm(sources):
    encoder = beit_jax.load_encoder(sources["classifier"])
    assert not encoder.final_norm
    images = uint8_images(40)
    (last,) = encoder.blocks(images, (-1,))
    np.testing.assert_array_equal(encoder(images).cls, last.cls)
    with pytest.raises(ValueError, match="no final norm"):
        encoder.blocks(images, (-1,), norm=True)
    assert beit_jax.load_encoder(sources["cls"]).final_norm


def test_masked_image_model_predicts_tokens(sources):
    model = beit_jax.load_masked_image_model(sources["hugging_face"])
    assert model.vocabulary == 40
    images, mask = uint8_images(40), np.random.default_rng(0).random((2, 5, 5)) < 0.4
    logits = model(images, mask)
    assert logits.shape == (2, 25, 40)
    positions = jnp.asarray([[3, 7], [0, 24]])
    some = model.apply(
        model.params, model.normalize(images), mask=jnp.asarray(mask), positions=positions
    )
    expected = jnp.take_along_axis(logits, positions[:, :, None], axis=1)
    assert relative_error(some, expected) < TOLERANCE
    assert model.encoder(images).cls.shape == (2, 32)
    with pytest.raises(ValueError, match=r"mask: \[2, 4, 4\]; must be \[2, 5, 5\]"):
        model(images, mask[:, :4, :4])
    for wrong in (mask.astype(np.float32), mask.astype(np.int32), mask.tolist()):
        with pytest.raises(ValueError, match="mask: must be a bool array, got"):
            model(images, wrong)


def test_numbers_are_no_mask_for_the_pure_functions_either(sources):
    """0.5 and token ids would hide every patch: they are true."""
    model = beit_jax.load_masked_image_model(sources["run"])
    images = model.normalize(np.zeros((2, model.image_size, model.image_size, 3), np.uint8))
    mask = np.full((2, model.grid, model.grid), 0.5, np.float32)
    for loaded in (model, model.encoder):
        with pytest.raises(ValueError, match="mask: must be a bool array, got float32"):
            jax.jit(loaded.apply)(loaded.params, images, mask=mask)


def test_a_tokenizers_run_is_refused_by_its_path(sources, tmp_path):
    native.write_params(str(tmp_path / "run"), {"a": np.zeros(1)}, config={"task": "tokenizer"})
    with pytest.raises(ConfigError, match=r"run: task: must be one of pretrain, classify"):
        beit_jax.load_encoder(tmp_path / "run")


def test_a_checkpoint_without_the_head_asked_for_is_refused(sources):
    with pytest.raises(ConfigError, match="holds no classifier; it is a masked image model"):
        beit_jax.load_classifier(sources["run"])
    with pytest.raises(ConfigError, match="holds no masked image model; it is a classifier"):
        beit_jax.load_masked_image_model(sources["classifier"])
    with pytest.raises(ConfigError, match=r"heads: 8, but .* says 4"):
        beit_jax.load_encoder(sources["run"], heads=8)
    with pytest.raises(ConfigError, match="must be one of auto, float32, bfloat16"):
        beit_jax.load_encoder(sources["run"], dtype="float16")


def test_loading_a_run_warns_of_nothing(sources, caplog):
    beit_jax.load_encoder(sources["run"])
    assert not caplog.records


def test_loading_a_run_hides_no_other_warning(sources, caplog, monkeypatch):
    """Another thread's, for instance: of an image in the first batch that cannot be read."""
    orbax = native._orbax()

    def warn(*arguments, **settings):
        logging.warning("an image cannot be read")
        return original(*arguments, **settings)

    original = orbax.PyTreeCheckpointer.restore
    monkeypatch.setattr(orbax.PyTreeCheckpointer, "restore", warn)
    beit_jax.load_encoder(sources["run"])
    assert caplog.messages == ["an image cannot be read"]


def test_what_is_no_checkpoint_is_refused_with_what_would_be_one(tmp_path):
    for source in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"is not a checkpoint: give a run's directory, "):
            beit_jax.load_encoder(source)


def test_normalisation_and_precision_are_the_callers_to_override(sources):
    encoder = beit_jax.load_encoder(
        sources["unilm"] if "unilm" in sources else sources["run"],
        normalization="imagenet",
        heads=4,
        dtype="bfloat16",
    )
    assert encoder.normalization == "imagenet"
    assert encoder.config.dtype == "bfloat16"
    exact = beit_jax.load_encoder(sources["run"], normalization="imagenet", dtype="float32")
    images = uint8_images(40)
    # bfloat16 keeps eight bits; three blocks add up to a few of their last ones.
    assert 1e-6 < relative_error(encoder(images).cls, exact(images).cls) < 5e-2


TOKENIZER = DvaeConfig(vocabulary=16, image_size=16, width=8, levels=2, codebook_width=8)


@pytest.fixture(scope="module")
def tokenizer_params():
    return jax.jit(open_tokenizer(TOKENIZER).init)(jax.random.key(3))


def test_tokenizer_is_read_from_its_own_file(tokenizer_params, tmp_path):
    path = str(tmp_path / "tokenizer.safetensors")
    save_params(path, tokenizer_params, config=TOKENIZER)
    images = uint8_images(16)
    expected = open_tokenizer(TOKENIZER).encode(tokenizer_params, images)
    for source in (path, tmp_path):  # the file, and the directory of the run that trained it
        tokenizer = beit_jax.load_tokenizer(source)
        assert (tokenizer.vocabulary, tokenizer.grid, tokenizer.image_size) == (16, 4, 16)
        ids = tokenizer.encode(images)
        np.testing.assert_array_equal(ids, expected)
        assert tokenizer.paints
        pixels = tokenizer.decode(ids)
        assert pixels.shape == (2, 16, 16, 3)
        assert 0 <= pixels.min() <= pixels.max() <= 1
    larger = beit_jax.load_tokenizer(path, image_size=24)
    assert larger.encode(uint8_images(24)).shape == (2, 6, 6)
    with pytest.raises(ConfigError, match="multiple of the stride 4"):
        beit_jax.load_tokenizer(path, image_size=18)


def test_tokenizer_of_a_pre_training_run_is_the_one_its_config_names(tokenizer_params, tmp_path):
    path = str(tmp_path / "tokens" / "dvae.safetensors")
    save_params(path, tokenizer_params, config=TOKENIZER)
    description = examples.PRETRAINED["beit+"]
    config = to_config(description)
    config["tokenizer"] = to_dict(dataclasses.replace(TOKENIZER, path=path))
    native.write_params(
        str(tmp_path / "run"), unflatten(examples.random_params(description)), config=config
    )
    ids = beit_jax.load_tokenizer(tmp_path / "run").encode(uint8_images(16))
    assert ids.shape == (2, 4, 4)


def test_what_holds_no_tokenizer_is_refused(sources):
    with pytest.raises(ValueError, match="does not say which tokenizer"):
        beit_jax.load_tokenizer(sources["timm"])
    with pytest.raises(ConfigError, match="names no tokenizer"):
        beit_jax.load_tokenizer(sources["classifier"])
    with pytest.raises(ConfigError, match=r"missing.safetensors does not exist"):
        beit_jax.load_tokenizer("missing.safetensors")


def test_models_of_the_same_sizes_share_what_was_compiled(encoder, tmp_path):
    examples.saved(tmp_path / "other", examples.PRETRAINED["beit+"], seed=1)
    other = beit_jax.load_encoder(tmp_path / "other")
    assert other.functions is encoder.functions
    assert relative_error(other(uint8_images(40)).cls, encoder(uint8_images(40)).cls) > 0.1


def test_every_public_name_is_found_and_listed():
    for name in beit_jax.__all__:
        assert getattr(beit_jax, name).__name__ == name
    assert set(beit_jax.__all__) <= set(dir(beit_jax))
    assert beit_jax._HOME.keys() <= set(beit_jax.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'load_decoder'"):
        beit_jax.load_decoder  # noqa: B018


@pytest.mark.slow
def test_a_type_checker_sees_the_public_names(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text("""
import numpy as np
import beit_jax

encoder = beit_jax.load_encoder("runs/base")
reveal_type(encoder(np.zeros((1, 224, 224, 3), np.uint8)).cls)
reveal_type(beit_jax.load_classifier("x").classes)
reveal_type(beit_jax.ModelConfig)
beit_jax.load_encoder("runs/base", image_size="224")
""")
    command = [sys.executable, "-m", "mypy", "--config-file=", "--strict"]
    command += ["--follow-imports=silent", f"--cache-dir={tmp_path}", str(tmp_path / "user.py")]
    root = Path(beit_jax.__file__).parent.parent
    done = subprocess.run(
        command, check=False, timeout=300, capture_output=True, text=True, cwd=root
    )
    lines = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    cls, classes, config, wrong, _ = lines
    assert cls.endswith('.Array"')
    assert classes == 'note: Revealed type is "tuple[str, ...]"'
    assert config.endswith('beit_jax.config.model.ModelConfig"')
    assert wrong.startswith('error: Argument "image_size" to "load_encoder"')


def test_importing_the_package_imports_nothing_else():
    program = """
import sys
before = set(sys.modules)
import beit_jax
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"jax", "numpy", "flax", "tensorflow", "etils", "absl"}, new
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_loading_other_formats_needs_no_training_library(sources):
    program = """
import sys
import numpy as np
import beit_jax
encoder = beit_jax.load_encoder(sys.argv[1])
print(encoder(np.zeros((1, 40, 40, 3), np.uint8)).cls.shape)
try:
    beit_jax.load_encoder(sys.argv[2])
except beit_jax.ConfigError as error:
    print(error)
"""
    absent = ("tensorflow", "tensorflow_datasets", "clu", "torch", "orbax", "ml_collections")
    absent += ("tensorboard", "transformers", "PIL")
    shape, error = run_without(
        absent, program, sources["hugging_face"], sources["run"]
    ).splitlines()
    assert shape == "(1, 32)"
    assert "pip install beit-jax[train]" in error
