"""The peer's own library gives the same logits for the same pixels, both directions (float32).

transformers 5 is installed with the other peers. The same tests with transformers 4:

    pip install --no-deps --target /tmp/t4 'transformers<5' 'tokenizers<0.23' 'huggingface_hub<1'
    PYTHONPATH=/tmp/t4 python -m pytest tests/weights/parity_test.py
"""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from beit_jax.models.functional import unflatten
from beit_jax.models.heads import classifier, functional, masked_image_model
from beit_jax.models.vit import Encoder
from beit_jax.weights import convert, foreign
from beit_jax.weights.formats import timm, timm_config
from tests.weights import examples
from tests.weights.examples import relative_error

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the peer runs on PyTorch")


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers", reason="the transformers peer is not installed")


def random_mask(description, count: int = 2) -> np.ndarray:
    return np.random.default_rng(5).random((count, description.model.tokens)) < 0.4


def native_logits(params, description, images, mask=None) -> np.ndarray:
    params = unflatten(params)
    if description.task == "pretrain":
        model = masked_image_model(description.model, vocabulary=description.outputs)
        return jax.jit(model.apply)(params, images, mask=mask)
    model = classifier(description.model, classes=description.outputs, pooling=description.pooling)
    return jax.jit(model.apply)(params, images)


def channels_first(torch, images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def loaded(cls, folder, **more):
    """`from_pretrained`, with nothing missing and nothing unexpected."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **more)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("kind", examples.PRETRAINED)
def test_masked_image_modelling_in_transformers(kind, torch, transformers, tmp_path):
    description = examples.PRETRAINED[kind]
    params = examples.saved(tmp_path / "native", description)
    folder = str(tmp_path / "exported")
    convert.export_checkpoint(str(tmp_path / "native"), format="hugging_face", output=folder)
    model = loaded(transformers.BeitForMaskedImageModeling, folder)
    assert model.config.layer_norm_eps == 1e-6
    images, mask = examples.images(description), random_mask(description)
    with torch.no_grad():
        expected = model(channels_first(torch, images), bool_masked_pos=torch.from_numpy(mask))
        seen = model(channels_first(torch, images))
    actual = native_logits(params, description, images, mask)
    assert relative_error(actual, expected.logits) < TOLERANCE
    assert relative_error(seen.logits, expected.logits) > 1e-2, "the mask must matter"


@pytest.mark.parametrize("kind", examples.FINE_TUNED)
def test_classification_in_transformers(kind, torch, transformers, tmp_path):
    description = examples.FINE_TUNED[kind]
    params = examples.saved(tmp_path / "native", description)
    folder = str(tmp_path / "exported")
    convert.export_checkpoint(str(tmp_path / "native"), format="hugging_face", output=folder)
    model = loaded(transformers.BeitForImageClassification, folder)
    images = examples.images(description)
    with torch.no_grad():
        expected = model(channels_first(torch, images)).logits
    assert relative_error(native_logits(params, description, images), expected) < TOLERANCE


def test_bare_model_in_transformers(torch, transformers, tmp_path):
    """`BeitModel` from a pre-training export gives the tokens before the final norm."""
    description = examples.PRETRAINED["beit+"]
    params = unflatten(examples.saved(tmp_path / "native", description))
    folder = str(tmp_path / "exported")
    convert.export_checkpoint(str(tmp_path / "native"), format="hugging_face", output=folder)
    model, info = transformers.BeitModel.from_pretrained(
        folder, add_pooling_layer=False, output_loading_info=True
    )
    assert not info["missing_keys"]
    images = examples.images(description)
    with torch.no_grad():
        expected = model.eval()(channels_first(torch, images)).last_hidden_state
    encoder = functional(
        lambda rngs: Encoder(description.model, mask_token=True, final_norm=True, rngs=rngs)
    )
    actual = encoder.apply(params["encoder"], images, method="hidden_states")[-1]
    assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("kind", examples.EVERY)
def test_import_of_a_random_transformers_model(kind, torch, transformers, tmp_path):
    from tests.models import beit_peer

    description = examples.EVERY[kind]
    images = examples.images(description)
    pixels = channels_first(torch, images)
    mask = None
    with torch.no_grad():
        if description.task == "pretrain":
            mask = random_mask(description)
            peer = beit_peer.masked_image_model(description.model, vocabulary=description.outputs)
            expected = peer(pixels, bool_masked_pos=torch.from_numpy(mask)).logits
        else:
            peer = beit_peer.classifier(
                description.model, classes=description.outputs, pooling=description.pooling
            )
            expected = peer(pixels).logits
    peer.save_pretrained(tmp_path / "peer")
    checkpoint = foreign.read(str(tmp_path / "peer"))
    found = checkpoint.description
    assert (found.task, found.outputs, found.pooling) == (
        description.task,
        description.outputs,
        description.pooling,
    )
    assert (
        relative_error(native_logits(checkpoint.params, found, images, mask), expected) < TOLERANCE
    )


@pytest.mark.parametrize("kind", examples.PRETRAINED)
def test_image_processor_normalises_as_the_model_does(kind, transformers, tmp_path):
    from PIL import Image

    from beit_jax.preprocessing import normalize

    description = examples.PRETRAINED[kind]
    examples.saved(tmp_path / "native", description)
    folder = str(tmp_path / "exported")
    convert.export_checkpoint(str(tmp_path / "native"), format="hugging_face", output=folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    expected = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    actual = normalize(pixels[None], kind=description.normalization)[0]
    np.testing.assert_allclose(actual, np.asarray(expected).transpose(1, 2, 0), atol=1e-5)


TIMM_JOBS = {
    **{f"fine-tuned {kind}": description for kind, description in examples.FINE_TUNED.items()},
    **{f"pretrained {kind}": description for kind, description in examples.PRETRAINED.items()},
    "random": examples.FINE_TUNED["mean"],
}


@pytest.fixture(scope="module")
def timm_logits(torch, tmp_path_factory):
    """timm's results by job name: (parameters, path of the weights, logits)."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("the timm peer is not installed")
    folder = tmp_path_factory.mktemp("timm")
    jobs, params = [], {}
    for kind, description in TIMM_JOBS.items():
        weights = str(folder / f"{kind}.safetensors")
        reduced = description
        if kind != "random":
            params[kind] = examples.saved(folder / f"{kind} native", description)
            convert.export_checkpoint(str(folder / f"{kind} native"), format="timm", output=weights)
            _, reduced, _ = timm.reduce(params[kind], description)
            hub = folder / f"{kind} hub"
            hub.mkdir()
            (hub / "config.json").write_text(json.dumps(timm.hub_config(reduced, config={})))
            shutil.copy(weights, hub / "model.safetensors")
        name, arguments = timm_config.create_model_arguments(reduced)
        np.save(folder / f"{kind} images.npy", examples.images(description))
        jobs.append(
            {
                "command": "random" if kind == "random" else "load",
                "weights": weights,
                "name": name,
                "arguments": arguments,
                "images": str(folder / f"{kind} images.npy"),
                "output": str(folder / f"{kind} logits.npy"),
                "hub": str(folder / f"{kind} hub"),
            }
        )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = pathlib.Path(__file__).parent / "timm_peer.py"
    result = subprocess.run(
        [sys.executable, script, folder / "jobs.json"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return {
        kind: (params.get(kind), job["weights"], np.load(job["output"]))
        for kind, job in zip(TIMM_JOBS, jobs, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", examples.FINE_TUNED)
def test_classification_in_timm(kind, timm_logits):
    description = examples.FINE_TUNED[kind]
    params, _, expected = timm_logits[f"fine-tuned {kind}"]
    actual = native_logits(params, description, examples.images(description))
    assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("kind", examples.PRETRAINED)
def test_pre_trained_encoder_in_timm(kind, timm_logits):
    """Every token after the final norm, the shared table copied to the blocks."""
    description = examples.PRETRAINED[kind]
    params, _, expected = timm_logits[f"pretrained {kind}"]
    encoder = functional(
        lambda rngs: Encoder(description.model, mask_token=True, final_norm=True, rngs=rngs)
    )
    actual = encoder.apply(unflatten(params)["encoder"], examples.images(description))
    assert relative_error(actual, expected) < TOLERANCE


def test_import_of_a_random_timm_model(timm_logits):
    _, weights, expected = timm_logits["random"]
    # The file has timm's own keys only: no metadata of this project gives the number of heads.
    checkpoint = foreign.read(weights)
    images = examples.images(examples.FINE_TUNED["mean"])
    actual = native_logits(checkpoint.params, checkpoint.description, images)
    assert relative_error(actual, expected) < TOLERANCE


def test_published_sizes_have_timms_names():
    import dataclasses

    from beit_jax.config import ModelConfig
    from beit_jax.weights.description import Description

    model = ModelConfig(
        layers=12, width=768, heads=12, mlp_width=3072, positions="relative_per_block"
    )
    large = dataclasses.replace(model, layers=24, width=1024, heads=16, mlp_width=4096)
    for config, expected in (
        (model, "beit_base_patch16_224"),
        (dataclasses.replace(model, image_size=384), "beit_base_patch16_384"),
        (large, "beit_large_patch16_224"),
        (dataclasses.replace(large, image_size=512), "beit_large_patch16_512"),
    ):
        description = Description(task="classify", model=config, outputs=1000)
        assert timm_config.create_model_arguments(description) == (expected, {})
