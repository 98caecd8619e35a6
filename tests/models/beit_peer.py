"""A live PyTorch peer: `transformers`' BEiT with random weights, and its tensors in our tree."""

import numpy as np
import pytest

from beit_jax.config import ModelConfig

torch = pytest.importorskip("torch", reason="the PyTorch peer is not installed")
transformers = pytest.importorskip("transformers", reason="the transformers peer is not installed")


def masked_image_model(config: ModelConfig, *, vocabulary: int):
    """`BeitForMaskedImageModeling` in float32 with every parameter random, zeros included."""
    # Without mean pooling BeitModel would add a second final LayerNorm.
    peer_config = _config(config, vocab_size=vocabulary, use_mask_token=True, use_mean_pooling=True)
    model = transformers.BeitForMaskedImageModeling(peer_config).eval()
    return _randomized(model, width=config.width)


def classifier(config: ModelConfig, *, classes: int, pooling: str):
    """`BeitForImageClassification` in float32 with every parameter random."""
    peer_config = _config(config, num_labels=classes, use_mean_pooling=pooling == "mean")
    model = transformers.BeitForImageClassification(peer_config).eval()
    return _randomized(model, width=config.width)


def _config(config: ModelConfig, **more):
    return transformers.BeitConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_width,
        image_size=config.image_size,
        patch_size=config.patch_size,
        use_absolute_position_embeddings=config.positions == "absolute",
        use_shared_relative_position_bias=config.positions == "relative_shared",
        use_relative_position_bias=config.positions == "relative_per_block",
        layer_scale_init_value=config.layer_scale_init or 0.0,
        layer_norm_eps=config.layer_norm_epsilon,
        drop_path_rate=0.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
        **more,
    )


def _randomized(model, *, width: int):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith(("layernorm.weight", "before.weight", "after.weight"))
            if is_scale or "lambda" in name:
                parameter.copy_(1.0 + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.5 if parameter.ndim > 1 else 0.2) / width**0.5)
                if "table" in name or "embed" in name or "token" in name:
                    parameter.copy_(0.5 * noise)
    return model


def to_native(tensors: dict, *, layers: int) -> dict:
    """Parameters (or their gradients) by transformers-5 names → our nested dict."""
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}

    def linear(prefix):
        result = {"kernel": arrays[f"{prefix}.weight"].T}
        if f"{prefix}.bias" in arrays:
            result["bias"] = arrays[f"{prefix}.bias"]
        return result

    def norm(prefix):
        return {"scale": arrays[f"{prefix}.weight"], "bias": arrays[f"{prefix}.bias"]}

    def block(prefix):
        attention = {
            native: linear(f"{prefix}.attention.{foreign}")
            for native, foreign in (
                ("query", "q_proj"),
                ("key", "k_proj"),
                ("value", "v_proj"),
                ("proj", "o_proj"),
            )
        }
        table = [n for n in arrays if n.startswith(f"{prefix}.") and n.endswith("_table")]
        if table:
            attention["relative_position_bias"] = {"table": arrays[table[0]]}
        result = {
            "attention": attention,
            "mlp": {"fc1": linear(f"{prefix}.mlp.fc1"), "fc2": linear(f"{prefix}.mlp.fc2")},
            "norm1": norm(f"{prefix}.layernorm_before"),
            "norm2": norm(f"{prefix}.layernorm_after"),
        }
        for i in (1, 2):
            if f"{prefix}.lambda_{i}" in arrays:
                result[f"gamma_{i}"] = arrays[f"{prefix}.lambda_{i}"]
        return result

    def stack(trees):
        if isinstance(trees[0], dict):
            return {key: stack([tree[key] for tree in trees]) for key in trees[0]}
        return np.stack(trees)

    projection = "beit.embeddings.patch_embeddings.projection"
    encoder = {
        "patch_embed": {
            "kernel": arrays[f"{projection}.weight"].transpose(2, 3, 1, 0),
            "bias": arrays[f"{projection}.bias"],
        },
        "cls_token": arrays["beit.embeddings.cls_token"],
        "mask_token": arrays["beit.embeddings.mask_token"],
        "blocks": stack([block(f"beit.layers.{i}") for i in range(layers)]),
        "norm": norm("layernorm"),
    }
    if "beit.embeddings.position_embeddings" in arrays:
        encoder["pos_embed"] = arrays["beit.embeddings.position_embeddings"]
    shared = "beit.shared_position_bias.relative_position_bias_table"
    if shared in arrays:
        encoder["relative_position_bias"] = {"table": arrays[shared]}
    return {"encoder": encoder, "lm_head": linear("lm_head")}


def classifier_to_native(tensors: dict, *, layers: int) -> dict:
    """`BeitForImageClassification`'s parameters, or their gradients, → our nested dict."""
    # The converter of the pre-training model, given this one's norm and head under its names.
    moved = {
        "beit.pooler.layernorm": "layernorm",  # mean pooling
        "beit.layernorm": "layernorm",  # class token
        "classifier": "lm_head",
    }
    renamed = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        renamed[f"{moved.get(module, module)}.{leaf}"] = tensor
    renamed["beit.embeddings.mask_token"] = tensors["beit.embeddings.cls_token"]
    params = to_native(renamed, layers=layers)
    encoder = params["encoder"]
    del encoder["mask_token"]
    result = {"encoder": encoder, "head": params["lm_head"]}
    if "beit.pooler.layernorm.weight" in tensors:
        result["fc_norm"] = encoder.pop("norm")
    return result
