"""Which of a file's sets of weights is taken, what is taken off their names, and what is told."""

import argparse
import importlib.util
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from beit_jax.weights import opening
from beit_jax.weights.report import WeightsError
from tests.weights import saved_files
from tests.weights.saved_files import (
    deepspeed_folder,
    lightning,
    one_line,
    other,
    save_hf,
    sharded_safetensors,
    tensors,
)  # fmt: skip

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch writes the files")


@pytest.fixture(scope="module")
def state():
    return saved_files.state()


# Moving averages: what is saved; then which set each choice takes, None where it is an error.
AVERAGES: dict[str, tuple[Callable, str | None, str | None, str | None]] = {
    "official": (lambda a, b: {"model": a, "model_ema": b}, "ema", "model", "ema"),
    "timm": (lambda a, b: {"state_dict": a, "state_dict_ema": b}, "ema", "model", "ema"),
    "None": (lambda a, b: {"model": a, "model_ema": None}, "model", "model", None),
    "empty": (lambda a, b: {"model": a, "model_ema": {}}, "model", "model", None),
    "a number": (lambda a, b: {"model": a, "model_ema": 0.999}, "model", "model", None),
    "none": (lambda a, b: {"model": a}, "model", "model", None),
    "bare": (lambda a, b: a, "model", "model", None),
    "alone": (lambda a, b: {"model_ema": b, "epoch": 1}, "ema", None, "ema"),
    "nested": (lambda a, b: {"model": a, "model_ema": {"state_dict": b}}, "ema", "model", "ema"),
    "module": (lambda a, b: {"model": a, "model_ema": {"module": b}}, "ema", "model", "ema"),
    "DeepSpeed": (lambda a, b: {"module": a, "model_ema": b}, "ema", "model", "ema"),
    "both of timm's": (
        lambda a, b: {"state_dict": a, "model_ema": a, "state_dict_ema": b},
        "ema",
        "model",
        "ema",
    ),
    "lucidrains": (
        lambda a, b: {"model": a, "model_ema": {"ema_model": b, "decay": 0.999}},
        "ema",
        "model",
        "ema",
    ),
    "in the model's names": (
        lambda a, b: (
            {f"model.{k}": v for k, v in a.items()}
            | {f"model_ema.module.{k}": v for k, v in b.items()}
        ),
        "ema",
        "model",
        "ema",
    ),
    "in Lightning's state dict": (
        lambda a, b: {
            "state_dict": {f"net.{k}": v for k, v in a.items()}
            | {f"net_ema.module.{k}": v for k, v in b.items()}
        },
        "ema",
        "model",
        "ema",
    ),
    "a callback's": (
        lambda a, b: {
            "state_dict": {f"model.{k}": v for k, v in a.items()},
            "callbacks": {"EMA": {"weights": {f"model.{k}": v for k, v in b.items()}}},
        },
        "model",
        "model",
        "ema",
    ),
    "without names": (
        lambda a, b: {"model": a, "ema": {"decay": 0.9, "shadow_params": list(b.values())}},
        "model",
        "model",
        None,
    ),
    "a list": (lambda a, b: {"model": a, "model_ema": list(b.values())}, "model", "model", None),
    # timm does not know this name: the model is taken, and the line says what was left.
    "another name": (lambda a, b: {"model": a, "ema_state_dict": b}, "model", "model", "ema"),
}


def test_settings_of_ten_to_the_hundred_values_are_read_at_once(torch, state, tmp_path):
    """A list of ten times the same list of ten times the same ... is small in a file."""
    values: list = [1]
    for _ in range(100):
        values = [values] * 10
    torch.save({"model": tensors(torch, state), "args": {"lr": 1, "x": values}}, tmp_path / "x.pth")
    assert opening.open_file(str(tmp_path / "x.pth")).extras["args"]["lr"] == 1


@pytest.mark.parametrize("row", AVERAGES)
def test_averages(torch, state, tmp_path, row):
    whole, *expected = AVERAGES[row]
    sets = {"model": state, "ema": other(state)}
    content = whole(tensors(torch, state), tensors(torch, sets["ema"]))
    path = tmp_path / "x.pth"
    torch.save(content, path)
    has_both = expected[2] is not None and expected[1] is not None
    is_told = expected[2] is not None or row in ("without names", "a list")
    for choice, taken in zip(("", "model", "ema"), expected, strict=True):
        if taken is None:
            with pytest.raises(WeightsError, match=r"holds (no|only a|a) moving average") as error:
                opening.open_file(str(path), weights=choice)
            one_line(error)
            continue
        opened = opening.open_file(str(path), weights=choice)
        np.testing.assert_array_equal(opened.state["cls_token"], sets[taken]["cls_token"])
        text = "\n".join(opened.notes)
        if has_both:
            assert f"--weights {'model' if taken == 'ema' else 'ema'} takes" in text
        assert ("weights:" in text) == is_told


# timm needs torchvision for its import only; see `timm_peer`, whose substitute this is.
_TIMM = """
import json, sys
from tests.weights import timm_peer
sys.meta_path.insert(0, timm_peer.HollowTorchvision())
from timm.models import load_state_dict
print(json.dumps([load_state_dict(path)["cls_token"].tolist() for path in sys.argv[1:]]))
"""


@pytest.mark.slow
def test_the_default_is_the_one_of_timm(torch, state, tmp_path):
    """Compared with `timm.models.load_state_dict` itself, which knows no nested averages."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("the peer")
    ours = {}
    for row in ("official", "timm", "None", "none", "bare", "both of timm's", "another name"):
        path = tmp_path / f"{row}.pth"
        torch.save(AVERAGES[row][0](tensors(torch, state), tensors(torch, other(state))), path)
        ours[str(path)] = opening.open_file(str(path)).state["cls_token"]
    command = [sys.executable, "-c", _TIMM, *ours]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    theirs = json.loads(result.stdout.splitlines()[-1])
    for (path, array), expected in zip(ours.items(), theirs, strict=True):
        np.testing.assert_array_equal(array, np.array(expected, np.float32), err_msg=path)


def test_an_average_asked_of_a_file_without_one(torch, state, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(state, path)
    with pytest.raises(WeightsError, match="holds no moving average"):
        opening.open_file(str(path), weights="ema")
    with pytest.raises(WeightsError, match="holds no moving average"):
        opening.open_file(str(sharded_safetensors(tmp_path / "y", state)), weights="ema")
    opening.open_file(str(path), weights="model")
    with pytest.raises(WeightsError, match="weights: 'both' is neither 'ema' nor 'model'"):
        opening.open_file(str(path), weights="both")


def test_what_was_chosen_or_removed_is_noted(torch, state, tmp_path):
    whole = lightning(torch, state, "model._orig_mod.", **{"criterion.weight": torch.ones(5)})
    torch.save(whole, tmp_path / "last.ckpt")
    notes = opening.open_file(str(tmp_path / "last.ckpt")).notes
    assert "names: model._orig_mod. is left off all 5 of them" in notes
    assert "left aside, beside the model: criterion.weight" in notes
    folder = save_hf(tmp_path / "x", torch, state, names=("model.fp16.safetensors",))
    assert "variant model.fp16.safetensors" in opening.open_file(str(folder)).notes[0]
    folder = deepspeed_folder(tmp_path / "ds", torch, state, optimizer=True)
    assert "zero_to_fp32.py" not in str(opening.open_file(str(folder)).notes)
    half = {key: array.astype(np.float16) for key, array in state.items()}
    folder = deepspeed_folder(tmp_path / "half", torch, half, optimizer=True)
    assert "zero_to_fp32.py" in opening.open_file(str(folder)).notes[1]
    safetensors.numpy.save_file(state, tmp_path / "x.safetensors")
    assert opening.open_file(str(tmp_path / "x.safetensors")).notes == ()


def test_other_sets_of_the_same_weights_are_told(torch, state, tmp_path):
    one, two = tensors(torch, state), tensors(torch, other(state))
    rest = {
        "optimizer": {"state": {0: {"exp_avg": one["cls_token"]}}},
        "rng": {"cpu": two["head.bias"]},
    }
    for whole, notes in (
        ({"model": one, "teacher": two}, ("weights: model taken, beside teacher",)),
        ({"model": two, "state_dict": one}, ("weights: state_dict taken, beside model",)),
        (
            {"model": one, "best": {"state_dict": two}},
            ("weights: model taken, beside best.state_dict",),
        ),
        ({"model": one}, ()),
    ):
        torch.save(whole | rest, tmp_path / "x.pth")
        opened = opening.open_file(str(tmp_path / "x.pth"))
        np.testing.assert_array_equal(opened.state["cls_token"], state["cls_token"])
        assert opened.notes == notes


def test_an_average_within_safetensors(state, tmp_path):
    both = {f"model.{k}": v for k, v in state.items()}
    both |= {f"model_ema.module.{k}": v for k, v in other(state).items()}
    safetensors.numpy.save_file(both, tmp_path / "x.safetensors")
    for weights, expected in (("", other(state)), ("ema", other(state)), ("model", state)):
        opened = opening.open_file(str(tmp_path / "x.safetensors"), weights=weights)
        np.testing.assert_array_equal(opened.state["cls_token"], expected["cls_token"])


def test_an_average_of_a_part_of_the_model_is_said(torch, state, tmp_path):
    part = dict(list(tensors(torch, other(state)).items())[:2])
    torch.save({"model": tensors(torch, state), "model_ema": part}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"model_ema holds 2 .* --weights model takes model"):
        opening.open_file(str(tmp_path / "x.pth"))
    opened = opening.open_file(str(tmp_path / "x.pth"), weights="model")
    np.testing.assert_array_equal(opened.state["cls_token"], state["cls_token"])


@pytest.mark.parametrize("prefix", ["backbone.", "student.", "visual.trunk.", "_orig_mod.vit."])
def test_any_prefix_before_the_names_of_a_beit_goes(torch, state, tmp_path, prefix):
    torch.save({"state_dict": tensors(torch, state, prefix)}, tmp_path / "x.pth")
    opened = opening.open_file(str(tmp_path / "x.pth"))
    assert set(opened.state) == set(state)
    assert opened.notes == (f"names: {prefix} is left off all 5 of them",)


@pytest.mark.parametrize(
    "names",
    [
        ("beit.embeddings.cls_token", "beit.encoder.layer.0.lambda_1"),  # a whole model of its own
        ("embeddings.cls_token", "encoder.layer.0.lambda_1"),
        ("backbone.cls_token", "backbone.layers.0.ln1.weight"),  # OpenMMLab's
        ("blocks.input.w", "blocks.group_1.block_1.id_path.w"),  # DALL-E's
    ],
)
def test_prefixes_that_belong_to_the_names_stay(torch, tmp_path, names):
    torch.save({name: torch.ones(2) for name in names}, tmp_path / "x.pth")
    assert set(opening.open_file(str(tmp_path / "x.pth")).state) == set(names)


def test_a_head_beside_the_model_is_told(torch, state, tmp_path):
    head = torch.nn.Linear(8, 5).state_dict()
    rng = {"cpu": torch.get_rng_state()}
    one = tensors(torch, state)
    for whole, name in (
        ({"backbone": one, "head": head, "rng": rng}, "head"),
        ({"model": one, "classifier": head, "rng_state": rng}, "classifier"),
        ({"model": {"encoder": one, "head": head}, "epoch": 3}, "head"),
    ):
        torch.save(whole, tmp_path / "x.pth")
        opened = opening.open_file(str(tmp_path / "x.pth"))
        assert set(opened.state) == set(state)
        assert opened.notes[-1] == f"left aside: the tensors of {name}"


def test_tensors_beside_a_beit_keep_their_names(torch, state, tmp_path):
    """Its prefix goes, so that the others are what is left over, and are named as that."""
    beside = {"class_weights": torch.ones(5), "val_auc.preds": torch.ones(3)}
    torch.save({"state_dict": tensors(torch, state, "model.") | beside}, tmp_path / "x.ckpt")
    opened = opening.open_file(str(tmp_path / "x.ckpt"))
    assert set(opened.state) == set(state) | set(beside)
    assert opened.notes == ("names: model. is left off 5 of the 7 of them",)
    beside = {"head.weight": torch.ones(5, 8)}  # it could be anybody's
    torch.save({"state_dict": tensors(torch, state, "backbone.") | beside}, tmp_path / "x.ckpt")
    opened = opening.open_file(str(tmp_path / "x.ckpt"))
    assert "backbone.cls_token" in opened.state


@pytest.mark.parametrize("counters", [("ema.decay", "ema.n"), ("ema_model.initted",)])
def test_counters_of_an_average_are_no_average(torch, state, tmp_path, counters):
    whole = tensors(torch, state, "model.") | {name: torch.ones(()) for name in counters}
    torch.save({"state_dict": whole}, tmp_path / "x.ckpt")
    opened = opening.open_file(str(tmp_path / "x.ckpt"))
    np.testing.assert_array_equal(opened.state["cls_token"], state["cls_token"])
    whole |= tensors(torch, other(state), "ema_model.ma_model.")
    torch.save({"state_dict": whole}, tmp_path / "x.ckpt")
    for weights, expected in (("", other(state)), ("model", state)):
        opened = opening.open_file(str(tmp_path / "x.ckpt"), weights=weights)
        assert set(opened.state) == set(state)
        np.testing.assert_array_equal(opened.state["cls_token"], expected["cls_token"])


def test_a_doubled_prefix_of_transformers_goes(torch, tmp_path):
    names = ("beit.embeddings.cls_token", "beit.encoder.layer.0.lambda_1", "classifier.weight")
    torch.save({f"beit.{name}": torch.ones(2) for name in names}, tmp_path / "x.pth")
    assert set(opening.open_file(str(tmp_path / "x.pth")).state) == set(names)


def test_prefixes_that_only_some_keys_have_are_kept(torch, state, tmp_path):
    """A part of another model is not turned into a whole one."""
    for prefix in ("module.", "model.", "_orig_mod."):
        mixed = tensors(torch, state)
        mixed[f"{prefix}cls_token"] = mixed.pop("cls_token")
        torch.save(mixed, tmp_path / "x.pth")
        opened = opening.open_file(str(tmp_path / "x.pth"))
        assert set(opened.state) == set(mixed), prefix
        assert opened.notes == ()


def test_names_that_fall_together_are_refused(torch, state, tmp_path):
    twice = tensors(torch, state)
    twice["blocks.1._orig_mod.attn.qkv.weight"] = twice["blocks.1.attn.qkv.weight"] + 1
    torch.save(twice, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"holds blocks\.1\.attn\.qkv\.weight twice"):
        opening.open_file(str(tmp_path / "x.pth"))


def test_what_a_file_says_beside_its_tensors(torch, state, tmp_path):
    arguments = argparse.Namespace(model="beit_base", lr=np.float32(0.5), mean=[0.5, 1], flag=True)
    arguments.more, arguments.device, arguments.nothing = {"a": 1}, torch.device("cpu"), None
    whole = {
        "state_dict": tensors(torch, state),
        "arch": "beit_base_patch16_224",
        "epoch": 7,
        "metric": np.float64(77.5),
        "scheduler": {"last": 3},
        "args": arguments,
        "beit_jax": {"heads": 3, "labels": ["a", "b"], "nested": {"mean": (0.5, 0.25)}},
    }
    torch.save(whole, tmp_path / "x.pth")
    assert opening.open_file(str(tmp_path / "x.pth")).extras == {
        "arch": "beit_base_patch16_224",
        "epoch": 7,
        "metric": 77.5,
        "args": {"model": "beit_base", "lr": 0.5, "mean": [0.5, 1], "flag": True, "more": {"a": 1}},
        "beit_jax": {"heads": 3, "labels": ["a", "b"], "nested": {"mean": [0.5, 0.25]}},
    }
    torch.save(lightning(torch, state), tmp_path / "x.ckpt")
    extras = opening.open_file(str(tmp_path / "x.ckpt")).extras
    assert extras["hyper_parameters"] == {"arch": "beit_base_patch16_224", "lr": 1e-3}
    assert extras["pytorch-lightning_version"] == "2.4.0"
