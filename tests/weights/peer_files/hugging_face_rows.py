"""Folders as transformers saves them, of every class and setting."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from tests.weights.peer_files import files
from tests.weights.peer_files import hugging_face as hf
from tests.weights.peer_files.row import Accepted, Refused, Row


def _row(name: str, outcome: Accepted | Refused, *, fast: bool = False, **how: Any) -> Row:
    runs = isinstance(outcome, Accepted)
    return Row(
        name=f"hf: {name}",
        build=functools.partial(hf.saved, **how, runs=runs),
        outcome=outcome,
        fast=fast,
    )


KEPT = Accepted(format="hugging_face")
MASKED = "BeitForMaskedImageModeling"


def _act(name: str, outcome: Accepted | Refused, **more: Any) -> Row:
    return _row(f"hidden_act {name}", outcome, config={"hidden_act": name}, **more)


def _preprocessor(
    name: str, outcome: Accepted | Refused, *, fast: bool = False, **fields: Any
) -> Row:
    changed = hf.PREPROCESSOR | fields
    return _row(f"preprocessor, {name}", outcome, preprocessor=changed, fast=fast)


CLASSES = (
    _row("classifier, mean pooling", KEPT, fast=True),
    _row("classifier, class token", KEPT, config={"use_mean_pooling": False}, fast=True),
    _row("classifier, absolute positions", KEPT, config=hf.ABSOLUTE),
    _row("classifier, shared table", KEPT, config=hf.SHARED),
    _row("classifier, no LayerScale", KEPT, config={"layer_scale_init_value": 0.0}),
    _row("classifier, one class", KEPT, config={"num_labels": 1}),
    _row("masked, shared table", KEPT, cls=MASKED, config={"use_mask_token": True, **hf.SHARED}),
    _row(
        "masked, absolute positions",
        KEPT,
        cls=MASKED,
        config={"use_mask_token": True, **hf.ABSOLUTE},
        fast=True,
    ),
    _row("masked, per-block tables", KEPT, cls=MASKED, config={"use_mask_token": True}),
    _row(
        "masked, class-token pooling",
        Refused(line="use_mean_pooling"),
        cls=MASKED,
        config={"use_mask_token": True, "use_mean_pooling": False},
        fast=True,
    ),
    _row(
        "masked, class-token pooling, class not named",
        Refused(line="use_mean_pooling"),
        cls=MASKED,
        config={"use_mask_token": True, "use_mean_pooling": False},
        then=hf.without_config("architectures"),
    ),
    _row(
        "masked, class not named",
        KEPT,
        cls=MASKED,
        config={"use_mask_token": True},
        then=hf.without_config("architectures"),
    ),
    _row(
        "classifier, class not named",
        KEPT,
        config={"use_mean_pooling": False},
        then=hf.without_config("architectures"),
    ),
    _row(
        "masked, no mask token",
        Refused(line=r"missing beit\.embeddings\.mask_token", hint=True),
        cls=MASKED,
        config={"use_mask_token": False},
    ),
    _row("bare model, pooler", KEPT, cls="BeitModel", fast=True),
    _row("bare model, no pooler", KEPT, cls="BeitModel", bare=True),
    _row(
        "bare model, class token",
        KEPT,
        cls="BeitModel",
        config={"use_mean_pooling": False},
    ),
    _row("bare model, mask token", KEPT, cls="BeitModel", config={"use_mask_token": True}),
    _row(
        "backbone",
        Accepted(format="hugging_face", renamed=True),
        cls="BeitBackbone",
        config={"out_features": ["stage2"]},
    ),
    _row(
        "backbone, class-token pooling",
        Accepted(
            format="hugging_face",
            renamed=True,
            lost=("beit.layernorm.weight", "beit.layernorm.bias"),
            changed=(("use_mean_pooling", True),),
        ),
        cls="BeitBackbone",
        config={"use_mean_pooling": False},
    ),
    _row(
        "backbone, shared table",
        Accepted(format="hugging_face", renamed=True),
        cls="BeitBackbone",
        config=hf.SHARED,
    ),
    _row(
        "data2vec, bare", Accepted(format="hugging_face", renamed=True), cls="Data2VecVisionModel"
    ),
    _row(
        "data2vec, classifier",
        Accepted(format="hugging_face", renamed=True),
        cls="Data2VecVisionForImageClassification",
        fast=True,
    ),
    _row(
        "data2vec, relu",
        Refused(line="hidden_act.*relu"),
        cls="Data2VecVisionForImageClassification",
        config={"hidden_act": "relu"},
    ),
    _row(
        "segmentation",
        Accepted(format="hugging_face_beit"),
        cls="BeitForSemanticSegmentation",
        config={"num_hidden_layers": 5, "out_indices": [2, 3, 4, 5], "auxiliary_channels": 8},
    ),
    _row(
        "segmentation, class token, no auxiliary head",
        Accepted(
            format="hugging_face_beit",
            lost=("beit.layernorm.weight", "beit.layernorm.bias"),
            changed=(("use_mean_pooling", True), ("out_indices", [2, 3, 4, 5])),
        ),
        cls="BeitForSemanticSegmentation",
        config={
            "num_hidden_layers": 5,
            "out_indices": [2, 3, -2, -1],
            "pool_scales": [1, 4],
            "use_auxiliary_head": False,
            "use_mean_pooling": False,
        },
    ),
    _row(
        "segmentation, the embedding",
        Refused(line=r"out_indices is \[1, 2, 3, 4\]; below 2"),
        cls="BeitForSemanticSegmentation",
        config={"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
        fast=True,
    ),
    _row(
        "segmentation, UperNet",
        Accepted(format="hugging_face"),
        cls="UperNetForSemanticSegmentation",
        config={"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "auxiliary_num_convs": 2},
    ),
    _row(
        "segmentation, UperNet, shared table",
        Accepted(format="hugging_face"),
        cls="UperNetForSemanticSegmentation",
        config={"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], **hf.SHARED},
    ),
    _row(
        "segmentation, UperNet without a pyramid",
        Refused(line="add_fpn false"),
        cls="UperNetForSemanticSegmentation",
        config={"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "add_fpn": False},
    ),
    _row(
        "data2vec, segmentation",
        Refused(line="segmentation"),
        cls="Data2VecVisionForSemanticSegmentation",
        config={"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]},
    ),
    _row(
        "backbone with a pyramid",
        Refused(line="segmentation"),
        cls="BeitBackbone",
        config={"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "add_fpn": True},
    ),
)

FACTS = (
    _act("gelu_python", Accepted(format="hugging_face", changed=(("hidden_act", "gelu"),))),
    _act("gelu_new", Refused(line="hidden_act.*gelu_new")),
    _act("quick_gelu", Refused(line="hidden_act.*quick_gelu"), fast=True),
    _act("relu", Refused(line="hidden_act.*relu")),
    _act("silu", Refused(line="hidden_act.*silu")),
    _act("gelu_pytorch_tanh", Refused(line="hidden_act.*gelu_pytorch_tanh")),
    _row(
        "epsilon as published",
        dataclasses.replace(KEPT, guessed=("layer_norm_epsilon",)),
        config={"layer_norm_eps": 1e-12},
    ),
    _row("epsilon 1e-5", KEPT, config={"layer_norm_eps": 1e-5}),
    _row("epsilon 1e-3", KEPT, config={"layer_norm_eps": 1e-3}, fast=True),
    _row(
        "per-block and shared tables",
        Refused(line=r"config\.json: positions are relative_shared and relative_per_block"),
        config={"use_shared_relative_position_bias": True},
        fast=True,
    ),
    _row(
        "absolute and per-block positions",
        Refused(line=r"config\.json: positions are absolute and relative_per_block"),
        config={"use_absolute_position_embeddings": True},
    ),
    _row(
        "absolute and shared positions",
        Refused(line=r"config\.json: positions are absolute and relative_shared"),
        config={"use_absolute_position_embeddings": True, **hf.SHARED},
    ),
    _row(
        "no positions",
        Refused(line="positions are none"),
        config={"use_relative_position_bias": False},
    ),
    _row("one channel", Refused(line="num_channels"), config={"num_channels": 1}),
    _row("image size as a list", KEPT, config={"image_size": [64, 64]}),
    _row("image that is no square", Refused(line="image_size"), config={"image_size": [64, 96]}),
    _row("patch size as a list", KEPT, config={"patch_size": [16, 16], **hf.ABSOLUTE}),
    _row(
        "patch that is no square",
        Refused(line="patch_size"),
        config={"patch_size": [16, 8], **hf.ABSOLUTE},
    ),
    _row("two heads of 32", KEPT, config={"num_attention_heads": 2, **hf.ABSOLUTE}),
    _row(
        "dropout",
        KEPT,
        config={"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2},
        fast=True,
    ),
    _row("drop path", KEPT, config={"drop_path_rate": 0.3}),
    _row("problem type", KEPT, config={"problem_type": "multi_label_classification"}),
    _row(
        "two classes of one name",
        KEPT,
        config={
            "id2label": {0: "crane", 1: "maillot", 2: "crane", 3: "maillot", 4: "newt"},
            "label2id": {"crane": 2, "maillot": 3, "newt": 4},
        },
        fast=True,
    ),
    _row("every field written", KEPT, then=hf.every_field),
    _row(
        "no field of transformers 5",
        KEPT,
        then=hf.without_config(
            "add_fpn",
            "stage_names",
            "out_features",
            "out_indices",
            "reshape_hidden_states",
            "dtype",
        ),
    ),
    _row(
        "a field that nobody knows",
        Refused(line="rotary_theta"),
        then=hf.with_config(rotary_theta=100.0),
        fast=True,
    ),
    _row("every general field of transformers 4", KEPT, then=hf.with_config(**hf.GENERAL)),
    _row(
        "quantised",
        Refused(line="quantization_config"),
        then=hf.with_config(
            quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
        ),
    ),
    _row(
        "code of its own",
        Refused(line="auto_map"),
        then=hf.with_config(auto_map={"AutoModel": "modeling.Mine"}),
    ),
    _row(
        "pruned heads", Refused(line="pruned_heads"), then=hf.with_config(pruned_heads={"0": [1]})
    ),
    _row("no classes", Refused(line="classifier"), config={"num_labels": 0}),
    _row(
        "the encoder of a captioning model",
        Refused(line="vision-encoder-decoder"),
        then=hf.with_config(model_type="vision-encoder-decoder"),
    ),
    _row("another model type", Refused(line="vit"), then=hf.with_config(model_type="vit")),
    _row(
        "labels as a list",
        Refused(line="id2label"),
        then=hf.with_config(id2label=["a", "b", "c", "d", "e"]),
    ),
    _row(
        "labels with odd keys", Refused(line="id2label"), then=hf.with_config(id2label={"a": "b"})
    ),
    _row(
        "config.json that is a list",
        Refused(line=r"config\.json"),
        then=lambda path, model: files.write_json(f"{path}/config.json", [1, 2]),
    ),
)

UNKNOWN = "mean and deviation that are none of half, imagenet; .* --normalization"
PIXELS = (
    _row(
        "preprocessor, none",
        Accepted(format="hugging_face", guessed=("normalization",)),
        preprocessor=None,
        fast=True,
    ),
    _preprocessor(
        "ImageNet's statistics",
        KEPT,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ),
    _preprocessor("bicubic", KEPT, resample=3),
    _preprocessor("crop", KEPT, do_center_crop=True, size={"height": 72, "width": 72}, fast=True),
    _preprocessor("shortest edge", KEPT, size={"shortest_edge": 72}, do_center_crop=True),
    _preprocessor("size as a number", KEPT, size=64, crop_size=64),
    _preprocessor("not rescaled", KEPT, do_rescale=False),
    _preprocessor(
        "rescaled to [0, 2]",
        KEPT,
        rescale_factor=1 / 127.5,
        image_mean=[1.0, 1.0, 1.0],
        image_std=[1.0, 1.0, 1.0],
    ),
    _preprocessor("rescaled to [-0.5, 1.5]", Refused(line=UNKNOWN), rescale_factor=1 / 127.5),
    _preprocessor("not normalised", Refused(line=UNKNOWN), do_normalize=False),
    _preprocessor("unknown statistics", Refused(line=UNKNOWN), image_mean=[0.4, 0.4, 0.4]),
    _preprocessor("ragged mean", Refused(line="image_mean"), image_mean=[0.5, [0.5], 0.5]),
    _preprocessor("mean in words", Refused(line="image_mean"), image_mean="half"),
)

TENSORS = (
    Row(
        name="hf: fine-tuned from a pre-trained model",
        build=functools.partial(hf.fine_tuned, leftovers=False, shared=False),
        outcome=Accepted(
            format="hugging_face",
            says=("mask_token",),
            lost=("beit.embeddings.mask_token",),
            changed=(("use_mask_token", False),),
        ),
        fast=True,
    ),
    Row(
        name="hf: fine-tuned, shared table, token head left over",
        build=functools.partial(hf.fine_tuned, leftovers=True, shared=True),
        outcome=Accepted(
            format="hugging_face",
            says=("mask_token", "lm_head"),
            lost=("beit.embeddings.mask_token",),
            changed=(("use_mask_token", False),),
        ),
    ),
    _row("bfloat16", KEPT, then=hf.in_precision("bfloat16")),
    _row("float16", KEPT, then=hf.in_precision("float16")),
    _row("float64", KEPT, then=hf.in_precision("float64")),
    _row(
        "a tensor that is not a number",
        Refused(line="output.dense.weight.*(NaN|nan|finite)"),
        then=hf.poisoned(float("nan")),
        fast=True,
    ),
    _row(
        "an infinite tensor",
        Refused(line="output.dense.weight.*(inf|finite)"),
        then=hf.poisoned(float("inf")),
    ),
    _row(
        "a tensor missing",
        Refused(line=r"missing beit\.encoder\.layer\.1\.lambda_1|missing .*lambda_1", hint=True),
        then=hf.with_state(lambda s: {k: v for k, v in s.items() if not k.endswith("1.lambda_1")}),
    ),
    _row(
        "a tensor of another shape",
        Refused(line=r"classifier\.weight is \(4, 64\)|classifier"),
        then=hf.with_state(lambda s: s | {"classifier.weight": s["classifier.weight"][:4]}),
    ),
    _row(
        "a key bias",
        Refused(line="key.bias", hint=True),
        then=hf.with_state(
            lambda s: (
                s
                | {
                    "beit.encoder.layer.0.attention.attention.key.bias": s[
                        "beit.encoder.layer.0.attention.attention.query.bias"
                    ]
                }
            )
        ),
    ),
)


def _container(
    name: str, then: Callable[[str, Any], None], *, fast: bool = False, **how: Any
) -> Row:
    return Row(
        name=f"hf: {name}",
        build=functools.partial(hf.saved, then=then, **how),
        outcome=KEPT,
        fast=fast,
        container=True,
    )


CONTAINERS = (
    _container("one safetensors file", hf.as_saved),
    _container("sharded safetensors", hf.in_shards, fast=True),
    _container("pytorch_model.bin", hf.as_bin),
    _container("sharded pytorch_model.bin", hf.in_bin_shards),
    _container("model.fp16.safetensors", hf.variant),
    _container("compiled", hf.compiled),
    _container("the file in its folder", hf.as_saved, given="model.safetensors"),
    _container(
        "a Trainer's checkpoint-500",
        hf.beside_an_optimizer,
        cls=MASKED,
        config={"use_mask_token": True, **hf.SHARED},
    ),
    _container("links to the hub's cache", hf.as_the_hub_caches),
    _container("index buffers of old versions", hf.with_index_buffers),
    _row("a shard missing", Refused(line=r"model-0000\d-of-.*safetensors"), then=hf.shard_missing),
)

ROWS = (*CLASSES, *FACTS, *PIXELS, *TENSORS, *CONTAINERS)
