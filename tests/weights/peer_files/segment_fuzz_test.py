"""Whatever a segmentation model's config or meta says, it is refused in one line or read right."""

import contextlib
import dataclasses
import json
import shutil

import numpy as np
import pytest

st = pytest.importorskip("hypothesis.strategies", reason="hypothesis draws the examples")
from beit_jax.weights import convert, description  # noqa: E402
from beit_jax.weights.formats import mmseg_settings  # noqa: E402
from beit_jax.weights.report import WeightsError  # noqa: E402
from tests.weights import segmenter_test  # noqa: E402
from tests.weights.peer_files import fuzz_test as fuzz  # noqa: E402

indices = st.lists(st.integers(-8, 8), min_size=3, max_size=5)
HEAD = {
    "out_indices": indices | st.sampled_from([[2, 3, 4, 5], [2, 3, 4, 6], [-5, -4, -3, -2]]),
    "out_features": st.just(["stage2", "stage3", "stage4", "stage5"]) | st.just(["stem"] * 4),
    "pool_scales": st.sampled_from([[1, 2, 3, 6], [1, 2, 3], [1, 2, 4, 8], [0, 1, 2, 3], 6]),
    "use_auxiliary_head": st.booleans(),
    "auxiliary_channels": st.sampled_from([8, 9, 0]),
    "auxiliary_num_convs": st.sampled_from([1, 2, 0, 100]),
    "auxiliary_concat_input": st.booleans(),
    "auxiliary_loss_weight": st.sampled_from([0.4, 0, -1, 1e9]),
    "id2label": st.sampled_from([{"0": "a"}, {"a": "b"}, ["a"] * 3]),
}
WHOLE = HEAD | {
    "hidden_size": st.sampled_from([16, 17, 0]),
    "auxiliary_in_channels": st.sampled_from([16, 17]),
    "model_type": st.sampled_from(["upernet", "beit"]),
    "use_timm_backbone": st.booleans(),
    "backbone": st.sampled_from(["resnet50", ""]),
}
INNER = fuzz.CONFIG | {
    "out_indices": HEAD["out_indices"],
    "out_features": HEAD["out_features"],
    "add_fpn": st.booleans(),
    "reshape_hidden_states": st.booleans(),
    "architectures": st.sampled_from([["BeitBackbone"], ["BeitModel"], []]),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of each class, and its parameters."""
    folder = tmp_path_factory.mktemp("good")
    flat = segmenter_test.saved(folder / "native", segmenter_test.READABLE)
    for format in ("hugging_face", "hugging_face_beit"):
        convert.export_checkpoint(
            str(folder / "native"), format=format, output=str(folder / format)
        )
    return folder, flat


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch):
    """Shapes are traced once per model: what cannot change them is left out of the key."""
    traced = description._shapes
    training = {"drop_path_rate": 0.0, "layer_norm_epsilon": 1e-6}

    def shapes(it):
        head = it.head
        if head is not None:
            head = dataclasses.replace(head, auxiliary_weight=0.0, dropout=0.0)
        model = dataclasses.replace(it.model, **training)
        return traced(
            description.Description(task=it.task, model=model, outputs=it.outputs, head=head)
        )

    monkeypatch.setattr(description, "_shapes", shapes)


def is_read_right(folder, config, flat, *, of_beit: bool) -> bool:
    """Whether a folder is accepted; then its head is the one that the config names."""
    checkpoint = fuzz.read(folder)
    if checkpoint is None:
        return False
    inner = config if of_beit else config["backbone_config"]
    head = checkpoint.description.head
    found = inner.get("out_indices")
    if found is None:
        found = [int(name.removeprefix("stage")) for name in inner["out_features"]]
    layers = checkpoint.description.model.layers
    blocks = [i + layers + 1 if i < 0 else i for i in found]
    assert list(head.blocks) == [i - 1 if of_beit else i for i in blocks]
    assert list(head.pool_scales) == config.get("pool_scales", [1, 2, 3, 6])
    weight = config.get("auxiliary_loss_weight")
    assert head.auxiliary_weight == (0.4 if weight is None else weight)  # null is not set
    for name, array in checkpoint.params.items():
        np.testing.assert_array_equal(array, flat[name], err_msg=name)
    return True


@fuzz.both_parts
@pytest.mark.parametrize("which", ["whole", "backbone", "beit"])
def test_config_of_hugging_face(which, count, seed, good, tmp_path):
    folder, flat = good
    format = "hugging_face_beit" if which == "beit" else "hugging_face"
    shutil.copytree(folder / format, tmp_path / "model")
    original = json.loads((folder / format / "config.json").read_text())
    accepted = []

    def check(changes):
        if which == "backbone":
            inner = fuzz.apply(original["backbone_config"], changes)
            config = original | {"backbone_config": inner}
        else:
            config = fuzz.apply(original, changes)
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        if is_read_right(tmp_path / "model", config, flat, of_beit=which == "beit"):
            accepted.append(config)

    fields = {"whole": WHOLE, "backbone": INNER, "beit": fuzz.CONFIG | HEAD}[which]
    fuzz.run(check, fuzz.changed(fields, fuzz.OTHER_FIELDS), examples=count // 2, seed=seed)
    assert accepted


@fuzz.both_parts
def test_meta_of_mmseg(count, seed):
    """Any value, and any text in the place of a value of the config."""
    lines = segmenter_test.CONFIG.splitlines()

    def check(drawn):
        meta, number, text = drawn
        config = "\n".join([*lines[:number], *text, *lines[number + 1 :]])
        for value in (meta, {"config": config, "CLASSES": meta, "PALETTE": meta}, meta):
            with contextlib.suppress(WeightsError):  # whose message is one line
                said = mmseg_settings.read_meta(value, source="x")
                assert said.blocks is None or all(block >= 1 for block in said.blocks)

    texts = st.lists(
        st.text(max_size=20)
        | st.sampled_from(["x = dict(a=[1, (2,), {'b': -3}], **y)", "model = 3", "model = dict("]),
        max_size=2,
    )
    numbers = st.integers(0, len(lines) - 1)
    fuzz.run(check, st.tuples(fuzz.json_values, numbers, texts), examples=count, seed=seed)
