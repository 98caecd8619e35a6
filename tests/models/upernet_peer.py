"""Live PyTorch peers of the segmenter: two of `transformers`' classes with random weights.

`UperNetForSemanticSegmentation` on a `BeitBackbone` is the official graph;
`BeitForSemanticSegmentation` reads other blocks (`SegmentHeadConfig.blocks`).
"""

import numpy as np

from beit_jax.config import ModelConfig, SegmentHeadConfig
from beit_jax.models.functional import flatten, unflatten
from tests.models.beit_peer import _config, _randomized, to_native, torch, transformers

# Ours → theirs; of the norms also the running statistics.
_NECK = {
    "neck/up4/conv1": "fpn.fpn1.conv_transpose1",
    "neck/up4/norm": "fpn.fpn1.normalization",
    "neck/up4/conv2": "fpn.fpn1.conv_transpose2",
    "neck/up2/conv": "fpn.fpn2",
}


def upernet(config: ModelConfig, *, head: SegmentHeadConfig, classes: int):
    """`UperNetForSemanticSegmentation` in float32 with parameters and running statistics random."""
    backbone = _config(
        config,
        out_indices=list(head.blocks),
        add_fpn=True,
        reshape_hidden_states=True,
    )
    peer_config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=head.channels or config.width,
        pool_scales=list(head.pool_scales),
        auxiliary_in_channels=config.width,
        num_labels=classes,
        **_auxiliary(head),
    )
    model = transformers.UperNetForSemanticSegmentation(peer_config).eval()
    return _with_statistics(_randomized(model, width=config.width))


def beit_segmenter(config: ModelConfig, *, head: SegmentHeadConfig, classes: int):
    """`BeitForSemanticSegmentation`, which reads the states before those that its config names."""
    peer_config = _config(
        config,
        out_indices=[block + 1 for block in head.blocks],
        pool_scales=list(head.pool_scales),
        num_labels=classes,
        use_mean_pooling=True,
        **_auxiliary(head),
    )
    model = transformers.BeitForSemanticSegmentation(peer_config).eval()
    return _with_statistics(_randomized(model, width=config.width))


def _auxiliary(head: SegmentHeadConfig) -> dict:
    return {
        "use_auxiliary_head": head.auxiliary_channels > 0,
        "auxiliary_channels": head.auxiliary_channels,
        "auxiliary_num_convs": head.auxiliary_convs,
        "auxiliary_concat_input": head.auxiliary_concat,
    }


def _with_statistics(model):
    generator = torch.Generator().manual_seed(11)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            channels = module.num_features
            module.running_mean.copy_(torch.randn(channels, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(channels, generator=generator) + 0.5)
            module.num_batches_tracked.fill_(7)
            module.weight.data.copy_(torch.randn(channels, generator=generator) * 0.2 + 1)
    return model


def head_outputs(model, images: np.ndarray) -> list:
    """Logits and, where there is an auxiliary head, its own: `[b, classes, q, q]`, not resized."""
    found: list = []
    heads = [head for head in (model.decode_head, model.auxiliary_head) if head is not None]
    hooks = [head.register_forward_hook(lambda *call: found.append(call[-1])) for head in heads]
    model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    for hook in hooks:
        hook.remove()
    return found


def both_logits(model, images: np.ndarray) -> list[np.ndarray]:
    """Logits and auxiliary logits `[b, q, q, classes]`, before any resizing to the image."""
    with torch.no_grad():
        return [each.numpy().transpose(0, 2, 3, 1) for each in head_outputs(model, images)]


def to_segmenter(tensors: dict, *, head: SegmentHeadConfig, layers: int) -> tuple[dict, dict]:
    """A peer's parameters (or gradients) and, where `tensors` has them, its buffers: two trees."""
    in_upernet = any(name.startswith("backbone.") for name in tensors)
    tensors = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    flat, variables = {}, {}
    for ours, theirs in _names(head, in_upernet=in_upernet).items():
        weight, bias = tensors[f"{theirs}.weight"], tensors.get(f"{theirs}.bias")
        if ours.endswith("norm"):
            flat[f"{ours}/scale"] = weight
            for leaf, name in (
                ("mean", "running_mean"),
                ("var", "running_var"),
                ("count", "num_batches_tracked"),
            ):
                if f"{theirs}.{name}" in tensors:
                    variables[f"{ours}/{leaf}"] = tensors[f"{theirs}.{name}"]
        else:  # a transposed convolution's weight is [in, out, h, w]
            axes = (2, 3, 0, 1) if ours.startswith("neck") else (2, 3, 1, 0)
            flat[f"{ours}/kernel"] = weight.permute(axes)
        if bias is not None:
            flat[f"{ours}/bias"] = bias
    params = unflatten({name: tensor.detach().numpy() for name, tensor in flat.items()})
    statistics = {name: np.float32(tensor.numpy()) for name, tensor in variables.items()}
    return {"encoder": _encoder(tensors, layers=layers), **params}, unflatten(statistics)


def _encoder(tensors: dict, *, layers: int) -> dict:
    unused = {"layernorm.weight": 0, "layernorm.bias": 0, "lm_head.weight": 0}
    filler = {name: tensors["beit.embeddings.cls_token"] for name in unused}
    filler["beit.embeddings.mask_token"] = tensors["beit.embeddings.cls_token"]
    encoder = to_native({**tensors, **filler}, layers=layers)["encoder"]
    del encoder["mask_token"], encoder["norm"]
    return encoder


def _names(head: SegmentHeadConfig, *, in_upernet: bool) -> dict[str, str]:
    conv, norm = ("conv", "batch_norm") if in_upernet else ("convolution", "normalization")
    pyramid = (
        "decode_head.psp_modules.{}.1" if in_upernet else "decode_head.psp_modules.blocks.{}.conv"
    )
    modules = {f"head/pyramid_{i}": pyramid.format(i) for i in range(len(head.pool_scales))}
    modules["head/bottleneck"] = f"decode_head.{'' if in_upernet else 'psp_'}bottleneck"
    modules["head/fusion"] = "decode_head.fpn_bottleneck"
    for i in range(3):
        modules[f"head/lateral_{i}"] = f"decode_head.lateral_convs.{i}"
        modules[f"head/output_{i}"] = f"decode_head.fpn_convs.{i}"
    names = dict(_NECK) | {"head/classifier": "decode_head.classifier"}
    if head.auxiliary_channels:
        for i in range(head.auxiliary_convs):
            modules[f"auxiliary/conv_{i}"] = f"auxiliary_head.convs.{i}"
        if head.auxiliary_concat:
            modules["auxiliary/concat"] = "auxiliary_head.conv_cat"
        names["auxiliary/classifier"] = "auxiliary_head.classifier"
    for ours, theirs in modules.items():
        names[f"{ours}/conv"] = f"{theirs}.{conv}"
        names[f"{ours}/norm"] = f"{theirs}.{norm}"
    return names


def same_layout(first: dict, second: dict) -> bool:
    """Whether two trees have the same names and shapes."""
    shapes = [
        {name: np.shape(leaf) for name, leaf in flatten(tree).items()} for tree in (first, second)
    ]
    return shapes[0] == shapes[1]
