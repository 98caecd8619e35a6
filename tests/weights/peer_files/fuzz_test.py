"""Whatever a config or a header says, a file is refused in one line or imported right.

Hypothesis changes a few fields of a good file at a time: to another good value, to one of another
kind, or to none. A file that is accepted must have exactly the facts that its config names, and the
parameters of the good file. The fast part runs a tenth of the examples.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis draws the examples")
from hypothesis import strategies as st  # noqa: E402

import beit_jax  # noqa: E402
from beit_jax.config import ConfigError  # noqa: E402
from beit_jax.preprocessing import NORMALIZATIONS  # noqa: E402
from beit_jax.weights import containers, convert, description, foreign  # noqa: E402
from beit_jax.weights.formats import timm  # noqa: E402
from tests.weights import examples  # noqa: E402
from tests.weights.peer_files import hugging_face  # noqa: E402

# Examples of each of the tests below in the slow part; a tenth of them in the fast part.
EXAMPLES = 200

PRETRAINED = examples.PRETRAINED["beit+"]
# Heads are nowhere in the shapes of a model with absolute positions: only the config has them.
CLASSIFIER = examples.FINE_TUNED["plain"]
TIMM = examples.FINE_TUNED["mean"]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats()
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
_GONE = object()
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Good folders and files: path and parameters by name."""
    folder = tmp_path_factory.mktemp("good")
    found = {}
    for name, what, format, output in (
        ("pretrained", PRETRAINED, "hugging_face", "pretrained"),
        ("classifier", CLASSIFIER, "hugging_face", "classifier"),
        ("timm", TIMM, "timm", "timm.safetensors"),
    ):
        params = examples.saved(folder / f"{name} native", what)
        convert.export_checkpoint(
            str(folder / f"{name} native"), format=format, output=str(folder / output)
        )
        found[name] = folder / output, params
    _, reduced, _ = timm.reduce(found["timm"][1], TIMM)
    hub = folder / "hub"
    hub.mkdir()
    # Without the header by which a file of this project describes itself, whatever lies beside it.
    state, _ = containers.load_safetensors((folder / "timm.safetensors").read_bytes(), source="x")
    containers.write_safetensors(str(hub / "model.safetensors"), state, metadata={})
    (hub / "config.json").write_text(json.dumps(timm.hub_config(reduced, config={})))
    found["hub"] = hub, found["timm"][1]
    sharded = folder / "sharded"
    shutil.copytree(found["classifier"][0], sharded)
    state, _ = containers.load_safetensors((sharded / "model.safetensors").read_bytes(), source="x")
    (sharded / "model.safetensors").unlink()
    weight_map = {key: f"model-{1 + i % 2}-of-2.safetensors" for i, key in enumerate(state)}
    for shard in set(weight_map.values()):
        part = {key: state[key] for key, of in weight_map.items() if of == shard}
        containers.write_safetensors(str(sharded / shard), part, metadata={})
    (sharded / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found["sharded"] = sharded, found["classifier"][1]
    return found


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch):
    """Shapes are traced once per model: what cannot change them is left out of the key."""
    traced = description._shapes

    def shapes(it):
        model = dataclasses.replace(
            it.model,
            layer_norm_epsilon=1e-6,
            drop_path_rate=0.0,
            layer_scale_init=(None if it.model.layer_scale_init is None else 0.1),
        )
        return traced(
            description.Description(
                task=it.task,
                model=model,
                outputs=it.outputs,
                pooling=it.pooling,
                mask_token=it.mask_token,
            )
        )

    monkeypatch.setattr(description, "_shapes", shapes)


def read(path: pathlib.Path) -> foreign.Checkpoint | None:
    """A checkpoint, or None where it was refused in one line."""
    try:
        return foreign.read(str(path))
    except ConfigError as error:
        message = str(error)
        assert message.strip()
        assert "\n" not in message
        assert len(message) < 2000
        return None


def changed(fields: dict[str, st.SearchStrategy], more: st.SearchStrategy) -> st.SearchStrategy:
    """Up to three changes: name → a value of the field's own, any other, or `_GONE`."""
    one = st.sampled_from(sorted(fields)).flatmap(
        lambda name: st.tuples(st.just(name), fields[name] | json_values | st.just(_GONE))
    )
    return st.lists(one | st.tuples(more, json_values), min_size=1, max_size=3)


def apply(value: dict[str, Any], changes: list[tuple[str, Any]]) -> dict[str, Any]:
    """A config with changes."""
    result = dict(value)
    for name, new in changes:
        if new is _GONE:
            result.pop(name, None)
        else:
            result[name] = new
    return result


def run(
    check: Callable[[Any], None], strategy: st.SearchStrategy, *, examples: int, seed: int
) -> None:
    """Runs `check` on drawn values, always the same ones."""
    test = hypothesis.given(strategy)(check)
    test = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )(test)
    hypothesis.seed(seed)(test)()


both_parts = pytest.mark.parametrize(
    ("count", "seed"),
    [
        pytest.param(EXAMPLES // 10, 1, id="fast"),
        pytest.param(EXAMPLES, 2, id="slow", marks=pytest.mark.slow),
    ],
)

CONFIG = {
    "hidden_act": st.sampled_from(["gelu", "gelu_python", "relu", "gelu_new", "GELU"]),
    "num_attention_heads": st.sampled_from([1, 2, 4, 8, 3, 0, -4]),
    "hidden_size": st.sampled_from([32, 64, 31]),
    "num_hidden_layers": st.sampled_from([3, 2, 0]),
    "intermediate_size": st.sampled_from([64, 32]),
    "image_size": st.sampled_from([40, [40, 40], [40, 48], 48, 41, [40]]),
    "patch_size": st.sampled_from([8, [8, 8], [8, 4], 16]),
    "num_channels": st.sampled_from([3, 1, 4]),
    "layer_norm_eps": st.sampled_from([1e-6, 1e-12, 1e-5, 0.0, -1e-6, 1.0]),
    "layer_scale_init_value": st.sampled_from([0.1, 1e-5, 0.0, -0.1]),
    "drop_path_rate": st.sampled_from([0.0, 0.1, 1.0, 2.0]),
    "hidden_dropout_prob": st.sampled_from([0.0, 0.1]),
    "attention_probs_dropout_prob": st.sampled_from([0.0, 0.1]),
    "use_absolute_position_embeddings": st.booleans(),
    "use_relative_position_bias": st.booleans(),
    "use_shared_relative_position_bias": st.booleans(),
    "use_mean_pooling": st.booleans(),
    "use_mask_token": st.booleans(),
    "vocab_size": st.sampled_from([40, 41]),
    "model_type": st.sampled_from(["beit", "data2vec-vision", "vit"]),
    "architectures": st.sampled_from([["BeitForSemanticSegmentation"], ["BeitModel"], []]),
    "problem_type": st.sampled_from(["multi_label_classification", "regression", "x"]),
    "id2label": st.sampled_from(
        [{"0": "a"}, {str(i): "same" for i in range(5)}, ["a"] * 5, {"a": "b"}, {"0": 1}]
    ),
    "label2id": st.sampled_from([{"a": 0}, {"a": "x"}]),
    "num_labels": st.sampled_from([5, 2]),
}
# Names that no config of BEiT has, and some that other models' have.
OTHER_FIELDS = st.text(min_size=1, max_size=8) | st.sampled_from(
    ["rope_theta", "qkv_bias", "head_dim", "num_key_value_heads", "activation_dropout", "gated_mlp"]
)
# What transformers takes where a field is not there.
DEFAULTS = {
    "hidden_act": "gelu",
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "use_mean_pooling": True,
}


def square(value: Any) -> Any:
    """A size: n or [n, n]."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def check_facts(checkpoint: foreign.Checkpoint, config: dict[str, Any]) -> None:
    """The description is the one that the config names, written down here a second time."""
    said = {name: config.get(name, default) for name, default in DEFAULTS.items()}
    model = checkpoint.description.model
    assert said["hidden_act"] in ("gelu", "gelu_python")
    assert said["num_channels"] == 3
    for value, ours in (
        (said["num_attention_heads"], model.heads),
        (square(said["image_size"]), model.image_size),
        (square(said["patch_size"]), model.patch_size),
    ):
        assert type(ours) is int
        assert value == ours
        assert not isinstance(value, bool)
    epsilon = 1e-6 if said["layer_norm_eps"] == 1e-12 else said["layer_norm_eps"]
    assert model.layer_norm_epsilon == epsilon >= 0
    positions = {
        "absolute": said["use_absolute_position_embeddings"],
        "relative_per_block": said["use_relative_position_bias"],
        "relative_shared": said["use_shared_relative_position_bias"],
    }
    assert [kind for kind, used in positions.items() if used] == [model.positions]
    task = checkpoint.description.task
    if task == "pretrain":
        assert said["use_mean_pooling"] is True
    else:
        # A bare model that pools may come without its pooler.
        pooled = ("mean", "none") if said["use_mean_pooling"] else ("cls",)
        assert checkpoint.description.pooling in pooled[: 2 if task == "encoder" else 1]
    assert config.get("head_dim") in (None, model.width // model.heads)
    assert config["model_type"] in ("beit", "data2vec-vision")


def check_params(checkpoint: foreign.Checkpoint, params: dict[str, np.ndarray]) -> None:
    """Nothing but what the config leaves out is missing, and nothing is another number."""
    for name, array in checkpoint.params.items():
        np.testing.assert_array_equal(array, params[name], err_msg=name)


@both_parts
@pytest.mark.parametrize("which", ["pretrained", "classifier"])
def test_config_of_hugging_face(which, count, seed, good, tmp_path):
    source, params = good[which]
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    original = json.loads((source / "config.json").read_text())
    known = set(original) | set(CONFIG)
    accepted = []

    def check(changes):
        config = apply(original, changes)
        (folder / "config.json").write_text(json.dumps(config))
        checkpoint = read(folder)
        if checkpoint is None:
            return
        accepted.append(config)
        # Names of no model: they begin the names of what transformers adds to every config.
        unknown = [
            name
            for name, value in config.items()
            if name not in known and name not in GENERAL and value is not None
        ]
        assert not unknown, f"fields that nobody knows were accepted: {unknown}"
        check_facts(checkpoint, config)
        check_params(checkpoint, params)

    run(check, changed(CONFIG, OTHER_FIELDS), examples=count // 2, seed=seed)
    assert len(accepted) > count // 40, "hardly anything was accepted, so little was tried"
    for config in accepted[:3]:
        (folder / "config.json").write_text(json.dumps(config))
        assert finite_output(folder, which)


def finite_output(folder: pathlib.Path, which: str) -> bool:
    """Runs an accepted model."""
    images = np.zeros((1, 40, 40, 3), np.uint8)
    if which == "pretrained":
        return bool(np.isfinite(beit_jax.load_encoder(folder)(images).cls).all())
    return bool(np.isfinite(beit_jax.load_classifier(folder)(images)).all())


# Fields of any config of transformers that say nothing about the function.
GENERAL = frozenset({"dtype", "transformers_version", "head_dim", *hugging_face.GENERAL})

PROCESSOR = {
    "image_mean": st.sampled_from(
        [[0.5] * 3, [0.485, 0.456, 0.406], [0.4] * 3, 0.5, [0.5], ["a"] * 3, [0.5, [0.5], 0.5]]
    ),
    "image_std": st.sampled_from([[0.5] * 3, [0.229, 0.224, 0.225], [0.0] * 3, 0.5, "half"]),
    "do_normalize": st.booleans(),
    "do_rescale": st.booleans(),
    "do_resize": st.booleans(),
    "do_center_crop": st.booleans(),
    "rescale_factor": st.sampled_from([1 / 255, 0.00392156862745098, 1 / 127.5, 0, 1]),
    "resample": st.sampled_from([0, 2, 3, 7, "bicubic"]),
    "size": st.sampled_from([40, {"height": 40, "width": 40}, {"shortest_edge": 48}, {}, "x"]),
    "crop_size": st.sampled_from([40, {"height": 40, "width": 40}, [40, 40]]),
    "image_processor_type": st.sampled_from(["BeitImageProcessor", "ViTImageProcessor"]),
}


def normalizations(processor: dict[str, Any]) -> list[str]:
    """Names of what the settings amount to for pixels in [0, 1], written down a second time.

    Pixels that are not rescaled may come in [0, 1] or in [0, 255].
    """
    mean, std = (
        np.broadcast_to(np.asarray(processor.get(name, 0.5), float), 3)
        for name in ("image_mean", "image_std")
    )
    flags = {name: processor.get(name) is not False for name in ("do_normalize", "do_rescale")}
    if not flags["do_normalize"]:
        mean, std = np.zeros(3), np.ones(3)
    factor = processor.get("rescale_factor")
    factors = [1 / 255 if factor is None else factor]
    if not flags["do_rescale"]:
        factors = [1.0, 1 / 255]
    pixels = np.array([[0.0], [0.3], [1.0]]) * 255
    return [
        name
        for name, (center, scale) in NORMALIZATIONS.items()
        for factor in factors
        if np.allclose((pixels * factor - mean) / std, (pixels / 255 - center) / scale, atol=1e-4)
    ]


@both_parts
def test_preprocessor_of_hugging_face(count, seed, good, tmp_path):
    source, params = good["classifier"]
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    file = folder / "preprocessor_config.json"
    original = json.loads(file.read_text())
    accepted = []

    def check(changes):
        processor = apply(original, changes)
        file.write_text(json.dumps(processor))
        checkpoint = read(folder)
        if checkpoint is None:
            return
        accepted.append(processor)
        check_params(checkpoint, params)
        assert checkpoint.description.normalization in normalizations(processor)

    run(check, changed(PROCESSOR, st.text(max_size=8)), examples=count, seed=seed)
    assert len(accepted) > count // 20


ARCHITECTURES = [
    "beit_base_patch16_224",
    "beitv2_base_patch16_224.in1k_ft_in1k",
    "beit3_base_patch16_224",
    "eva_giant_patch14_224",
    "vit_base_patch16_224",
    "beit",
]
ARGUMENTS = {
    "num_heads": st.sampled_from([4, 2, 0, "4"]),
    "embed_dim": st.sampled_from([32, 64]),
    "depth": st.sampled_from([3, 2]),
    "img_size": st.sampled_from([40, [40, 40], 48]),
    "patch_size": st.sampled_from([8, [8, 8], 16]),
    "mlp_ratio": st.sampled_from([2.0, 4]),
    "in_chans": st.sampled_from([3, 1]),
    "global_pool": st.sampled_from(["avg", "token", ""]),
    "use_fc_norm": st.booleans() | st.none(),
    "swiglu_mlp": st.booleans(),
    "scale_mlp": st.booleans(),
    "init_values": st.sampled_from([0.1, 0.0, None]),
    "use_abs_pos_emb": st.booleans(),
    "use_rel_pos_bias": st.booleans(),
    "use_shared_rel_pos_bias": st.booleans(),
    "qkv_bias": st.booleans(),
    "drop_path_rate": st.sampled_from([0.0, 0.1]),
}
PRETRAINED_CFG = {
    "mean": PROCESSOR["image_mean"],
    "std": PROCESSOR["image_std"],
    "input_size": st.sampled_from([[3, 40, 40], [1, 40, 40], [3, 40, 48], 40]),
    "crop_pct": st.sampled_from([0.9, 1.0, 0, "x"]),
    "interpolation": st.sampled_from(["bicubic", "bilinear", "x"]),
    "num_classes": st.sampled_from([5, 1000]),
    "label_names": st.sampled_from([["a"] * 5, ["a"], {"a": 1}]),
}


@both_parts
def test_config_of_timm(count, seed, good, tmp_path):
    source, params = good["hub"]
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    original = json.loads((source / "config.json").read_text())
    accepted = []

    def check(drawn):
        name, arguments, settings, others = drawn
        config = original | {"architecture": name}
        config["model_args"] = apply(original["model_args"], arguments)
        config["pretrained_cfg"] = apply(original["pretrained_cfg"], settings)
        config = apply(config, others)
        (folder / "config.json").write_text(json.dumps(config))
        checkpoint = read(folder)
        if checkpoint is None:
            return
        accepted.append(config)
        check_params(checkpoint, params)
        model = checkpoint.description.model
        name = str(config.get("architecture"))
        assert "beit" in name
        assert "beit3" not in name
        given = config.get("model_args") or {}
        given = {name: value for name, value in given.items() if value is not None}
        assert not set(given) - set(ARGUMENTS) - set(original["model_args"])
        # What the tensors show must not be contradicted.
        for name, ours in (
            ("num_heads", 4),
            ("embed_dim", 32),
            ("depth", 3),
            ("img_size", 40),
            ("patch_size", 8),
            ("mlp_ratio", 2),
            ("use_rel_pos_bias", True),
            ("use_abs_pos_emb", False),
            ("use_shared_rel_pos_bias", False),
        ):
            assert square(given.get(name)) in (ours, None), name
        assert bool(given.get("init_values", 0.1))
        assert model.heads == 4
        assert not given.get("swiglu_mlp")
        assert not given.get("scale_mlp")
        assert given.get("in_chans", 3) == 3
        assert given.get("global_pool", "avg") in ("avg", None)
        assert given.get("use_fc_norm") in (True, None)
        stated = (config.get("pretrained_cfg") or {}).get("mean")
        if stated is not None:
            mean, _ = NORMALIZATIONS[checkpoint.description.normalization]
            np.testing.assert_allclose(np.broadcast_to(stated, 3), mean)

    strategy = st.tuples(
        st.just(ARCHITECTURES[0]) | st.sampled_from(ARCHITECTURES) | st.text(max_size=6),
        st.just([]) | changed(ARGUMENTS, st.text(min_size=1, max_size=6)),
        st.just([]) | changed(PRETRAINED_CFG, st.text(max_size=6)),
        st.just([]) | changed({key: json_values for key in original}, st.text(max_size=6)),
    )
    run(check, strategy, examples=count, seed=seed)
    assert len(accepted) > count // 20


@both_parts
def test_metadata_of_safetensors(count, seed, good, tmp_path):
    """The header's metadata: any strings, what this project writes under "timm", or any JSON."""
    source, params = good["timm"]
    content = source.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    file = tmp_path / "model.safetensors"
    accepted = []

    def check(metadata):
        text = json.dumps(header | {"__metadata__": metadata}).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(len(text).to_bytes(8, "little") + text + data)
        checkpoint = read(file)
        if checkpoint is None:
            return
        accepted.append(metadata)
        check_params(checkpoint, params)
        assert checkpoint.description.model.heads == 4
        assert checkpoint.params.keys() == params.keys()

    strategy = (
        st.fixed_dictionaries(
            {},
            optional={
                "timm": entry(
                    header,
                    "timm",
                    {"name": st.sampled_from(ARCHITECTURES), "arguments": json_values},
                ),
                "beit_jax": entry(header, "beit_jax", OWN),
                "normalization": st.text(max_size=8) | st.sampled_from(["half", "imagenet"]),
                "format": st.sampled_from(["pt", "np"]) | st.text(max_size=5),
                "other": st.text(max_size=5),
            },
        )
        | json_values
    )
    run(check, strategy, examples=count, seed=seed)
    assert len(accepted) > count // 20


OWN = {
    "task": st.sampled_from(["classify", "encoder", "pretrain", "x"]),
    "model": st.dictionaries(
        st.sampled_from(["layers", "width", "heads", "image_size", "positions", "mlp_width"]),
        json_values,
    ),
    "classes": st.sampled_from([5, 6]),
    "pooling": st.sampled_from(["mean", "cls", "none"]),
    "data": st.sampled_from([{"normalization": "imagenet"}, {"normalization": "x"}, {}]),
    "labels": st.sampled_from([["a"] * 5, ["a"], "abcde"]),
    "kept": json_values,
}


def entry(header: dict[str, Any], name: str, fields: dict[str, Any]) -> st.SearchStrategy:
    """A JSON entry of a header as it was, with changes, or any other text."""
    ours = json.loads(header["__metadata__"][name])
    return (
        st.text(max_size=8)
        | json_values.map(json.dumps)
        | changed(fields, st.text(max_size=4)).map(lambda new: json.dumps(apply(ours, new)))
    )


# Files of JSON, and the folders they are in.
FILES = (
    ("classifier", "config.json"),
    ("classifier", "preprocessor_config.json"),
    ("sharded", INDEX),
    ("hub", "config.json"),
)
# By name, since hypothesis prints what it draws.
HOSTILE = {
    "lists too deep": b"[" * 100_000,
    "dicts too deep": b'{"a":' * 100_000,
    "nothing": b"",
    "a byte-order mark": b"\xef\xbb\xbf{}",
    "a number of 5000 digits": b'{"hidden_size": ' + b"1" * 5000 + b"}",
    "the same key twice": b'{"hidden_size": 1, "hidden_size": 2}',
    "a shard outside": b'{"weight_map": {"a": "../classifier/model.safetensors"}}',
    "a shard that is no name": b'{"weight_map": {"a": ["model-1-of-2.safetensors"]}}',
    "a shard that is a folder": b'{"weight_map": {"a": "."}}',
}


@both_parts
def test_json_that_is_not_what_it_should_be(count, seed, good, tmp_path):
    """Any JSON, any text and any bytes in place of a config or an index of shards."""
    folders, originals = {}, {}
    for which, name in FILES:
        folders[which] = tmp_path / which
        shutil.copytree(good[which][0], folders[which], dirs_exist_ok=True)
        originals[which, name] = (folders[which] / name).read_bytes()

    def check(drawn):
        (which, name), content = drawn
        file = folders[which] / name
        file.write_bytes(HOSTILE[content] if isinstance(content, str) else content)
        try:
            checkpoint = read(folders[which])
        finally:
            file.write_bytes(originals[which, name])
        if checkpoint is not None:
            check_params(checkpoint, good[which][1])

    contents = (
        json_values.map(lambda value: json.dumps(value).encode())
        | st.dictionaries(st.sampled_from(["weight_map", "metadata"]), json_values).map(
            lambda value: json.dumps(value).encode()
        )
        | st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))
        | st.binary()
        | st.sampled_from(sorted(HOSTILE))
    )
    run(check, st.tuples(st.sampled_from(FILES), contents), examples=count, seed=seed)
