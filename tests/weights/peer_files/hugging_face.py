"""Models of transformers, and the ways in which folders of them are saved and changed."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from tests.weights.peer_files import files
from tests.weights.peer_files.row import Built

CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 64,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "use_relative_position_bias": True,
    "num_labels": 5,
    "vocab_size": 40,
}
SHARED = {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}
ABSOLUTE = {"use_relative_position_bias": False, "use_absolute_position_embeddings": True}
# What transformers 4 writes into every config where it writes all of it; none concerns this model.
GENERAL = {
    "_commit_hash": None,
    "add_cross_attention": False,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "bos_token_id": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "pad_token_id": None,
    "prefix": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": "float32",
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}
# As published beside the 22k models.
PREPROCESSOR = {
    "crop_size": {"height": 64, "width": 64},
    "do_center_crop": False,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "BeitImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 64, "width": 64},
}
KINDS = {
    "BeitForImageClassification": "classify",
    "Data2VecVisionForImageClassification": "classify",
    "BeitForMaskedImageModeling": "pretrain",
    "BeitForSemanticSegmentation": "segment",
    "UperNetForSemanticSegmentation": "segment",
    "Data2VecVisionForSemanticSegmentation": "",
}

State = dict[str, Any]


def model_of(cls: str, *, bare: bool = False, **config: Any) -> Any:
    """A random model of transformers, with eager attention in float32."""
    import transformers

    if cls == "UperNetForSemanticSegmentation":
        return _upernet(**config)
    is_data2vec = cls.startswith("Data2Vec")
    of = transformers.Data2VecVisionConfig if is_data2vec else transformers.BeitConfig
    settings = of(**{**CONFIG, **config}, attn_implementation="eager")
    arguments = {"add_pooling_layer": not bare} if cls.endswith("Model") else {}
    return files.randomize(getattr(transformers, cls)(settings, **arguments))


def _upernet(**config: Any) -> Any:
    """A random UperNet; settings of `UPERNET_FIELDS` are its own, others the encoder's."""
    import transformers

    own = {"hidden_size": 24, "auxiliary_channels": 8, "auxiliary_in_channels": 64, "num_labels": 5}
    own |= {name: config.pop(name) for name in UPERNET_FIELDS if name in config}
    backbone = transformers.BeitConfig(
        **{**CONFIG, "add_fpn": True, **config}, attn_implementation="eager"
    )
    settings = transformers.UperNetConfig(backbone_config=backbone, **own)
    return files.randomize(transformers.UperNetForSemanticSegmentation(settings))


UPERNET_FIELDS = (
    *("pool_scales", "use_auxiliary_head", "auxiliary_num_convs", "auxiliary_concat_input"),
    "auxiliary_loss_weight",
)


def forward_of(model: Any) -> Callable[..., Any]:
    """Logits, or the tokens of a model without a head."""

    def forward(pixels: Any, mask: Any = None, *, model: Any = model) -> Any:
        if hasattr(model, "decode_head"):  # channels last, and before UperNet enlarges them
            if hasattr(model, "backbone"):
                logits = model.decode_head(model.backbone(pixels).feature_maps)
            else:
                logits = model(pixels, output_hidden_states=True).logits
            return logits.permute(0, 2, 3, 1)
        given = {} if mask is None else {"bool_masked_pos": mask}
        output = model(pixels, **given, output_hidden_states=True)
        if hasattr(output, "logits"):
            return output.logits
        return getattr(output, "last_hidden_state", output.hidden_states[-1])

    return forward


def saved(
    folder: str,
    *,
    cls: str = "BeitForImageClassification",
    bare: bool = False,
    config: Mapping[str, Any] | None = None,
    preprocessor: Mapping[str, Any] | None = PREPROCESSOR,
    then: Callable[[str, Any], None] | None = None,
    runs: bool = True,
    given: str = "",
) -> Built:
    """Saves a model of class `cls`; `then` changes the folder, and perhaps the live model.

    Commands get the folder, or the file `given` in it.
    """
    model = model_of(cls, bare=bare, **(config or {}))
    path = f"{folder}/model"
    model.save_pretrained(path)
    if preprocessor is not None:
        files.write_json(f"{path}/preprocessor_config.json", dict(preprocessor))
    if then is not None:
        then(path, model)
    encoder = getattr(model.config, "backbone_config", model.config)
    size, patch = encoder.image_size, encoder.patch_size
    return Built(
        path=f"{path}/{given}" if given else path,
        kind=KINDS.get(cls, "encoder"),
        model=model,
        forward=forward_of(model) if runs and KINDS.get(cls, "encoder") else None,
        image_size=size if isinstance(size, int) else size[0],
        patch_size=patch if isinstance(patch, int) else patch[0],
    )


def _state(path: str, change: Callable[[State], State]) -> None:
    file = f"{path}/model.safetensors"
    files.write_safetensors(file, change(files.read_safetensors(file)))


def with_state(change: Callable[[State], State]) -> Callable[[str, Any], None]:
    return lambda path, model: _state(path, change)


def with_config(**fields: Any) -> Callable[[str, Any], None]:
    def then(path: str, model: Any) -> None:
        files.change_json(f"{path}/config.json", lambda config: config | fields)

    return then


def without_config(*fields: str) -> Callable[[str, Any], None]:
    def then(path: str, model: Any) -> None:
        files.change_json(
            f"{path}/config.json",
            lambda config: {k: v for k, v in config.items() if k not in fields},
        )

    return then


def every_field(path: str, model: Any) -> None:
    files.write_json(f"{path}/config.json", json.loads(model.config.to_json_string(use_diff=False)))


def in_precision(name: str) -> Callable[[str, Any], None]:
    def then(path: str, model: Any) -> None:
        import torch

        dtype = getattr(torch, name)
        _state(path, lambda state: {key: tensor.to(dtype) for key, tensor in state.items()})
        model.to(dtype).float()  # the peer computes with what was stored

    return then


def poisoned(value: float) -> Callable[[str, Any], None]:
    def change(state: State) -> State:
        state["beit.encoder.layer.1.output.dense.weight"][3, 5] = value
        return state

    return with_state(change)


def fine_tuned(folder: str, *, leftovers: bool, shared: bool) -> Built:
    """A classifier that was started from a pre-trained model, as users do it."""
    import transformers

    positions = SHARED if shared else {}
    start = model_of("BeitForMaskedImageModeling", use_mask_token=True, **positions)
    start.save_pretrained(f"{folder}/pretrained")
    model = transformers.BeitForImageClassification.from_pretrained(
        f"{folder}/pretrained", num_labels=5, attn_implementation="eager"
    )
    files.randomize(model, seed=8)
    path = f"{folder}/model"
    model.save_pretrained(path)
    files.write_json(f"{path}/preprocessor_config.json", PREPROCESSOR)
    if leftovers:  # as converters and trainers that only add a head save them
        old = files.read_safetensors(f"{folder}/pretrained/model.safetensors")
        kept = ("lm_head.weight", "lm_head.bias", "layernorm.weight", "layernorm.bias")
        _state(path, lambda state: state | {key: old[key] for key in kept})
    return Built(path=path, kind="classify", model=model, forward=forward_of(model))


def in_shards(path: str, model: Any) -> None:
    os.remove(f"{path}/model.safetensors")
    model.save_pretrained(path, max_shard_size="60KB")
    assert os.path.exists(f"{path}/model.safetensors.index.json")


def as_bin(path: str, model: Any) -> None:
    files.write_pth(
        f"{path}/pytorch_model.bin", files.read_safetensors(f"{path}/model.safetensors")
    )
    os.remove(f"{path}/model.safetensors")


def in_bin_shards(path: str, model: Any) -> None:
    """As transformers 4 saved large models."""
    state = files.read_safetensors(f"{path}/model.safetensors")
    os.remove(f"{path}/model.safetensors")
    names = list(state)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"pytorch_model-{number:05}-of-00002.bin"
        files.write_pth(f"{path}/{shard}", {key: state[key] for key in part})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(tensor.numel() * 4 for tensor in state.values())
    files.write_json(
        f"{path}/pytorch_model.bin.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def variant(path: str, model: Any) -> None:
    os.remove(f"{path}/model.safetensors")
    model.half().save_pretrained(path, variant="fp16")
    model.float()
    assert os.path.exists(f"{path}/model.fp16.safetensors")


def beside_an_optimizer(path: str, model: Any) -> None:
    files.write_pth(f"{path}/optimizer.pt", {"state": {}, "param_groups": []})
    files.write_json(f"{path}/trainer_state.json", {"global_step": 500})


def as_saved(path: str, model: Any) -> None:
    pass


def compiled(path: str, model: Any) -> None:
    """As a Trainer saved a model that torch.compile had wrapped."""
    _state(path, lambda state: files.prefixed(state, "_orig_mod."))


def as_the_hub_caches(path: str, model: Any) -> None:
    """Links to files whose names are hashes."""
    blobs = f"{os.path.dirname(path)}/blobs"
    os.makedirs(blobs)
    for number, name in enumerate(sorted(os.listdir(path))):
        os.rename(f"{path}/{name}", f"{blobs}/{number:040x}")
        os.symlink(f"../blobs/{number:040x}", f"{path}/{name}")


def with_index_buffers(path: str, model: Any) -> None:
    """As transformers before 4.32 saved them."""
    table = "relative_position_bias.relative_position_bias_table"

    def change(state: State) -> State:
        from timm.models import beit

        index = beit.gen_relative_position_index((4, 4))
        found = [key for key in state if key.endswith(table)]
        return state | {key.replace("bias_table", "index"): index.clone() for key in found}

    _state(path, change)


def shard_missing(path: str, model: Any) -> None:
    in_shards(path, model)
    os.remove(f"{path}/{min(name for name in os.listdir(path) if '-of-' in name)}")
