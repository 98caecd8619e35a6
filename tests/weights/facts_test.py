"""Warm starts from another function: what names and shapes do not show is compared all the same."""

import dataclasses
import importlib
import json
import logging
import pathlib
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from beit_jax import jobs
from beit_jax.config import ConfigError, ModelConfig, RunConfig
from beit_jax.config.facts import FACTS, NO_FACTS, comparable, differences
from beit_jax.models.functional import flatten, unflatten
from beit_jax.models.heads import classifier
from beit_jax.training import start
from beit_jax.weights import convert, native
from beit_jax.weights.description import Description, to_config
from beit_jax.weights.formats.format import Stated
from tests import tiny as models
from tests.tasks import tiny
from tests.weights import examples

ROOT = pathlib.Path(__file__).parents[2]
# The model of `tests.tasks.tiny`, with absolute positions: no shape depends on its heads.
PLAIN = ModelConfig(
    layers=2,
    width=32,
    heads=2,
    mlp_width=128,  # a file that says nothing of itself is no BEiT's with another ratio
    image_size=32,
    patch_size=8,
    positions="absolute",
    layer_scale_init=None,
    drop_path_rate=0.0,
)
SOURCE = Description(task="classify", model=PLAIN, outputs=6, normalization="half")
# Of each fact, a setting that makes another function of SOURCE's numbers.
OTHER = {
    "heads": ("model.heads", 4),
    "layer_norm_epsilon": ("model.layer_norm_epsilon", 1e-5),
    "normalization": ("data.normalization", "imagenet"),
    "pooling": ("pooling", "cls"),
}


def settings(source, *, others=(), **run):
    """A classifier like SOURCE on embedded images, but for some facts."""
    config = tiny.classify()
    config.model.positions, config.model.layer_scale_init = "absolute", None
    config.model.mlp_width = PLAIN.mlp_width
    config.run.steps, config.optimizer.warmup_steps = 1, 1
    config.data.holdout = 8
    config.data.augment.operations, config.data.augment.erase_probability = 0, 0.0
    config.mixing.mixup = config.mixing.cutmix = 0.0
    config.run.init_from = str(source)
    # As the recipes do: then no name shows another pooling.
    config.run.init_allow_missing = ("fc_norm", "encoder/norm")
    config.run.init_allow_unused = ("fc_norm", "encoder/norm")
    config.run.update(run)
    config.update_from_flattened_dict(dict(OTHER[name] for name in others))
    return config


def run(config, workdir):
    return jobs.run(config.to_dict(), workdir=str(workdir))


def check(config, workdir="/nowhere"):
    """What `run_job` does before anything else."""
    parsed = jobs.parse_job(config.to_dict())
    start.source_facts(parsed, run=parsed.run, workdir=str(workdir))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """SOURCE as a checkpoint of this project and in every format, by the format's name."""
    folder = tmp_path_factory.mktemp("sources")
    paths = {"native": folder / "native", "hugging_face": folder / "folder"}
    examples.saved(paths["native"], SOURCE)
    convert.export_checkpoint(
        str(paths["native"]), format="hugging_face", output=str(paths["hugging_face"])
    )
    return paths


@pytest.fixture(scope="module")
def pth(sources, tmp_path_factory):
    """SOURCE as a file that says nothing of itself."""
    torch = pytest.importorskip("torch", reason="writing .pth takes PyTorch")
    path = tmp_path_factory.mktemp("pth") / "x.pth"
    convert.export_checkpoint(str(sources["native"]), format="unilm", output=str(path))
    torch.save({"model": torch.load(path, weights_only=True)["model"]}, path)
    return path


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize("evaluate_only", [False, True])
@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("kind", ["native", "hugging_face"])
def test_a_fact_that_differs_is_refused_before_anything_is_written(
    sources, tmp_path, kind, name, evaluate_only
):
    config = settings(sources[kind], others=[name])
    config.evaluate_only = evaluate_only
    with pytest.raises(ConfigError) as caught:
        run(config, tmp_path / "run")
    text = str(caught.value)
    assert "\n" not in text
    setting, value = OTHER[name]
    there = differences({"task": "classify", **to_config(SOURCE)}, config.to_dict())[0].source
    assert text == (
        f"config.run.init_from: {sources[kind]} has {name} {there}, this run {value}"
        f" ({FACTS[name].why}): set --config.{setting}={there}, or allow what is meant:"
        f" --config.run.init_allow_different={name}"
    )
    assert not (tmp_path / "run").exists()


def test_one_message_names_every_difference_and_both_ways_on_work(sources):
    config = settings(sources["native"], others=OTHER)
    with pytest.raises(ConfigError) as caught:
        check(config)
    told = dict(re.findall(r"--config\.([\w.]+)=([\w.-]+)", str(caught.value)))
    told.pop("run.init_allow_different")
    assert set(told) == {setting for setting, _ in OTHER.values()}
    allowed = re.findall(r"--config\.run\.init_allow_different=(\w+)", str(caught.value))
    assert allowed == list(OTHER)
    check(settings(sources["native"], others=OTHER, init_allow_different=tuple(allowed)))
    for setting, value in told.items():
        section, _, key = setting.rpartition(".")
        node = config[section] if section else config
        node[key] = type(node[key])(value)
    check(config)
    with pytest.raises(ConfigError, match="has heads 2, this run 4") as caught:
        check(settings(sources["native"], others=OTHER, init_allow_different=tuple(allowed[1:])))
    assert "normalization" not in str(caught.value)


def test_the_tokenizer_of_a_head_is_a_fact(tmp_path):
    config = tiny.pretrain()
    model = ModelConfig(**{**config.model.to_dict(), "dtype": "auto"})
    description = Description(task="pretrain", model=model, outputs=64, normalization="imagenet")
    saved = to_config(description)
    for kind in ("dalle", "dvae"):
        saved["tokenizer"]["kind"] = kind
        native.write_params(
            str(tmp_path / kind), unflatten(examples.random_params(description)), config=saved
        )
        config.run.init_from = str(tmp_path / kind)
        if kind == "dvae":
            check(config)
            continue
        with pytest.raises(ConfigError, match=r"has tokenizer dalle, this run dvae .*=dalle"):
            run(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_classes_in_another_order_are_refused(sources, tmp_path):
    """Known once the images are open; names of which none is common say nothing."""
    ours = ("stripes", "waves", "checks", "dots", "rings", "gradient")
    moved = (*ours[1:], ours[0])
    target = to_config(dataclasses.replace(SOURCE, labels=ours))
    for labels, refused in (
        (ours, False),
        (moved, True),
        (tuple("abcdef"), False),
        ((*ours[:5], "other"), False),
        (("rings", *ours[1:]), False),  # a name twice, once at its place
        ((), False),
        (moved[:5], False),  # a head for five classes
    ):
        source = to_config(dataclasses.replace(SOURCE, labels=labels))
        assert bool(differences(source, target)) == refused, labels
    saved = to_config(dataclasses.replace(SOURCE, labels=moved))
    params = native.read_params(str(sources["native"]))
    native.write_params(str(tmp_path / "moved"), params, config=saved)
    config = settings(tmp_path / "moved")
    config.evaluate_only = True
    with pytest.raises(ConfigError) as caught:
        run(config, tmp_path / "run")
    assert str(caught.value) == (
        f"config.run.init_from: {tmp_path}/moved has labels waves, checks, dots, ..., this run"
        " stripes, waves, checks, ... (the head's outputs are other classes): allow what is meant:"
        " --config.run.init_allow_different=labels"
    )
    assert not (tmp_path / "run").exists()
    config.run.init_allow_different = ("labels",)
    assert "top1" in run(config, tmp_path / "run")


@pytest.mark.slow
def test_heads_with_relative_positions_are_refused_by_their_shapes(tmp_path):
    """No hint to allow what could not be done."""
    description = dataclasses.replace(
        SOURCE, model=dataclasses.replace(PLAIN, positions="relative_per_block", heads=4)
    )
    examples.saved(tmp_path / "source", description)
    config = settings(tmp_path / "source")
    config.model.positions = "relative_per_block"
    check(config)
    config.evaluate_only = True
    with pytest.raises(ConfigError, match="another architecture: heads 4 instead of 2"):
        run(config, tmp_path / "run")


def test_the_quickstart_compares_its_jobs_when_it_is_parsed():
    for name, setting, value in (
        ("classify", "data.normalization", "imagenet"),
        ("probe", "data.normalization", "imagenet"),
        ("classify", "model.layer_norm_epsilon", 1e-5),
    ):
        config = tiny.story()
        config.update_from_flattened_dict({f"{name}.{setting}": value})
        with pytest.raises(ConfigError, match=rf"^config\.{name}\.{setting}: {value}, but pre-tr"):
            jobs.parse_job(config.to_dict())


# Recipes whose weights start others, as the files and docs/finetuning.md say.
CHAINS = [
    ("beit_base_22k", "beit_base_ft1k"),
    ("beit_base_22k", "beit_base_ft22k"),
    ("beit_base_22k", "probe_base"),
    ("beit_base_ft22k", "beit_base_ft22k_ft1k"),
    ("beit_base_ft22k", "beit_base_ft22k_ft1k_384"),
    ("beit_large_22k", "beit_large_ft1k"),
    ("beit_large_22k", "beit_large_ft22k"),
    ("beit_large_22k", "probe_large"),
    ("beit_large_ft22k", "beit_large_ft22k_ft1k"),
    ("beit_large_ft22k", "beit_large_ft22k_ft1k_384"),
    ("beit_large_ft22k", "beit_large_ft22k_ft1k_512"),
    ("beit_base_plain", "beit_base_plain_ft1k"),
    ("beit_base_plain", "beit_base_cifar100"),
    ("beit_base_plain_ft1k", "beit_base_plain_ft1k_384"),
    ("beit_large_plain", "beit_large_plain_ft1k"),
    ("beit_base_ft22k", "ade20k_base_512"),
    ("beit_base_ft22k", "ade20k_base_640"),
    ("beit_base_ft22k", "ade20k_base_linear"),
    ("beit_base_22k", "ade20k_base_512_pt"),
    ("beit_base_22k", "ade20k_base_512_v2"),  # weights of v2, whose encoder is the same
    ("beit_base_22k", "ade20k_base_setr_pup"),
    ("ade20k_base_640", "ade20k_base_640_ms"),
    ("beit_large_ft22k", "ade20k_large_512"),
    ("beit_large_ft22k", "ade20k_large_640"),
    ("beit_large_22k", "ade20k_large_512_v2"),
    ("ade20k_large_640", "ade20k_large_640_ms"),
    ("camvid_pretrain", "camvid_segment"),
]


@pytest.mark.parametrize(("first", "then"), CHAINS)
def test_published_recipes_agree_with_the_weights_that_they_start_from(first, then):
    source, target = (
        importlib.import_module(f"configs.{name}").get_config().to_dict() for name in (first, then)
    )
    assert comparable(target, target)
    # Segmentation takes ImageNet's mean whatever the weights were trained with.
    allowed = (
        {"normalization"} if then.startswith("ade20k") and source["task"] != "segment" else set()
    )
    assert {it.name for it in differences(source, target)} == allowed
    assert set(target["run"]["init_allow_different"]) == allowed


def test_every_recipe_that_starts_from_weights_is_in_a_chain():
    starts = {
        path.stem
        for path in (ROOT / "configs").glob("*.py")
        if "init_from=" in path.read_text() and not path.stem.startswith("quickstart_")
    }
    assert starts <= {then for _, then in CHAINS}
    quickstart = importlib.import_module("configs.quickstart").get_config().pretrain.to_dict()
    for name in ("quickstart_classify", "quickstart_segment"):
        alone = importlib.import_module(f"configs.{name}").get_config().to_dict()
        assert not differences(quickstart, alone)


# ---------------------------------------------------------------------------- taken


@pytest.mark.slow
def test_what_is_allowed_or_not_said_starts_as_the_run_says(sources, pth, tmp_path, caplog):
    """The evaluation is the run's function of the source's numbers, whatever the file."""
    names = ("heads", "layer_norm_epsilon", "normalization")

    def evaluate(source, *, others=names, allowed=()):
        config = settings(source, others=others, init_allow_different=allowed)
        config.evaluate_only = True
        return run(config, tmp_path / "run")

    # The same numbers in a checkpoint that says what the run says.
    params = native.read_params(str(sources["native"]))
    model = dataclasses.replace(PLAIN, heads=4, layer_norm_epsilon=1e-5)
    saved = to_config(dataclasses.replace(SOURCE, model=model, normalization="imagenet"))
    native.write_params(str(tmp_path / "same"), params, config=saved)
    expected = evaluate(tmp_path / "same")
    for source in sources.values():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert evaluate(source, allowed=names) == expected
        assert f"{source} has heads 2, this run 4; it is allowed to differ" in caplog.text
    assert evaluate(pth) == expected
    assert evaluate(sources["native"], others=())["loss"] != expected["loss"]


def test_a_silent_file_has_the_facts_of_the_run_and_the_log_says_so(pth, caplog):
    names = ("heads", "layer_norm_epsilon", "normalization")
    with caplog.at_level(logging.INFO):
        check(settings(pth, others=names))
    assert (
        f"{pth} does not say everything; this run's settings are taken: heads 4,"
        " layer_norm_epsilon 1e-05, normalization imagenet" in caplog.text
    )
    with pytest.raises(ConfigError, match="has pooling mean, this run cls"):
        check(settings(pth, others=["pooling"]))


def test_an_import_remembers_what_was_guessed(pth, tmp_path):
    convert.import_checkpoint(
        str(pth), output=str(tmp_path / "imported"), stated=Stated(heads=2, layer_norm_epsilon=1e-6)
    )
    check(settings(tmp_path / "imported", others=["normalization"]))
    with pytest.raises(ConfigError) as caught:
        check(settings(tmp_path / "imported", others=OTHER))
    assert "heads 2, this run 4 " in str(caught.value)
    assert "layer_norm_epsilon 1e-06, this run 1e-05" in str(caught.value)
    assert "normalization" not in str(caught.value)


def test_what_a_folder_of_transformers_says_and_what_not(sources, tmp_path):
    """1e-12 stands for the official 1e-6; without a preprocessor the pixels are not said."""
    folder = tmp_path / "folder"
    shutil.copytree(sources["hugging_face"], folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"layer_norm_eps": 1e-12}))
    check(settings(folder))
    with pytest.raises(ConfigError, match="layer_norm_epsilon 1e-06, this run 1e-05"):
        check(settings(folder, others=["layer_norm_epsilon"]))
    with pytest.raises(ConfigError, match="normalization half, this run imagenet"):
        check(settings(folder, others=["normalization"]))
    (folder / "preprocessor_config.json").unlink()
    check(settings(folder, others=["normalization"]))


def test_a_checkpoint_without_a_readable_config_is_silent(sources, tmp_path, caplog):
    """Of an unknown kind of run: what its config says counts, what it does not say is the run's."""
    params = native.read_params(str(sources["native"]))
    for name, config in (("empty", {}), ("other", {"task": "mine", "model": {"heads": 2}})):
        native.write_params(str(tmp_path / name), params, config=config)
    with caplog.at_level(logging.INFO):
        check(settings(tmp_path / "empty", others=["heads", "normalization"]))
    assert "taken: heads 4, layer_norm_epsilon 1e-06, normalization imagenet" in caplog.text
    with pytest.raises(ConfigError, match="has heads 2, this run 4"):
        check(settings(tmp_path / "other", others=["heads", "normalization"]))


def test_settings_that_a_checkpoint_is_too_old_to_have_are_their_defaults(sources, tmp_path):
    saved = to_config(SOURCE)
    del saved["model"]["layer_norm_epsilon"]
    params = native.read_params(str(sources["native"]))
    native.write_params(str(tmp_path / "old"), params, config=saved)
    with pytest.raises(ConfigError, match="has layer_norm_epsilon 1e-06, this run 1e-05"):
        check(settings(tmp_path / "old", others=["layer_norm_epsilon"]))


def test_a_job_without_facts_opens_nothing():
    parsed = RunConfig(steps=1, batch_size=1, init_from="/nowhere")
    job = {"task": "mine", "width": 3}
    assert start.source_facts(job, run=parsed, workdir="/nowhere") is None
    with pytest.raises(ConfigError, match=r"^config\.run\.init_from: no checkpoint in /nowhere"):
        check(settings("/nowhere"))


@pytest.mark.slow
def test_a_run_that_continues_is_no_warm_start_but_keeps_its_normalization(sources, tmp_path):
    """Old runs may have started from other pixels; their own cannot change, nor be evaluated."""
    config = settings(
        sources["native"], others=["normalization"], init_allow_different=("normalization",)
    )
    run(config, tmp_path / "run")
    config.run.init_allow_different = ()
    with pytest.raises(ConfigError, match="normalization half, this run imagenet"):
        check(config, tmp_path / "new")
    check(config, tmp_path / "run")
    config.data.normalization = "half"
    for evaluate_only in (False, True):
        config.evaluate_only = evaluate_only
        with pytest.raises(
            ConfigError, match=r"^config\.data\.normalization: was 'imagenet', now 'half': differs"
        ):
            run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "evaluation.json").exists()


# ---------------------------------------------------------------------------- the table


def test_every_setting_of_a_model_is_a_fact_or_says_why_not():
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    of_models = {
        fact.setting.removeprefix("model.")
        for fact in FACTS.values()
        if fact.setting.startswith("model.")
    }
    assert of_models.isdisjoint(NO_FACTS)
    assert of_models | set(NO_FACTS) == fields, "classify a new setting in config/facts.py"


# Of each setting of a model, another value.
CHANGES = {
    "layers": 4,
    "width": 64,
    "heads": 2,
    "mlp_width": 96,
    "image_size": 32,
    "patch_size": 4,
    "positions": "relative_per_block",
    "layer_scale_init": 0.1,
    "drop_path_rate": 0.9,
    "layer_norm_epsilon": 1e-2,
    "dtype": "bfloat16",
    "residual_dtype": "bfloat16",
    "attention": "xla",
    "scan_unroll": 0,
    "remat": "full",
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", CHANGES)
def test_what_the_table_says_of_a_setting_is_true(setting):
    """With another value: other shapes or names, another function, or the same function."""
    assert set(CHANGES) == {field.name for field in dataclasses.fields(ModelConfig)}
    before = models.PLAIN
    after = dataclasses.replace(before, **{setting: CHANGES[setting]})
    assert after != before or setting == "attention"
    shapes = [
        {name: leaf.shape for name, leaf in flatten(classifier(it, classes=3).shapes()).items()}
        for it in (before, after)
    ]
    why = NO_FACTS.get(setting, "")
    if why.startswith(("shapes show it", "names show")):
        assert shapes[0] != shapes[1]
        assert (shapes[0].keys() != shapes[1].keys()) == why.startswith("names show")
        return
    assert shapes[0] == shapes[1]
    source = Description(task="classify", model=before, outputs=3)
    params = unflatten(examples.random_params(source))
    images = jnp.asarray(examples.images(source))
    first, second = (
        np.asarray(classifier(it, classes=3).apply(params, images), np.float32)
        for it in (before, after)
    )
    error = examples.relative_error(second, first)
    if setting in NO_FACTS:
        assert error < (0.03 if setting.endswith("dtype") else 1e-5)
    else:
        assert error > 5e-3
