"""Every field of a BEiT's and a UperNet's `config.json` in transformers, and what becomes of it.

`USED` are read. `ONLY` must have a value under which transformers computes what this project does.
`KEPT` change nothing in evaluation; of these, `WRITTEN_BACK` are written again by an export. A
field in none of the tables is refused, since it may change the function.
"""

from beit_jax.types import Json

# fmt: off
USED = frozenset((
    "architectures", "hidden_size", "id2label", "image_size", "intermediate_size",
    "layer_norm_eps", "layer_scale_init_value", "model_type", "num_attention_heads",
    "num_hidden_layers", "patch_size", "use_absolute_position_embeddings", "use_mean_pooling",
    "use_relative_position_bias", "use_shared_relative_position_bias", "vocab_size",
    "head_dim",
))
# fmt: on
ONLY: dict[str, tuple[Json, ...]] = {
    "hidden_act": ("gelu", "gelu_python"),
    "num_channels": (3,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
    "rope_parameters": (None,),
    "rope_scaling": (None,),
    "auto_map": (None,),  # code of its own
}
# Of a UperNet, whose `backbone_config` is a BEiT's.
# fmt: off
UPERNET_USED = frozenset((
    "architectures", "auxiliary_channels", "auxiliary_concat_input", "auxiliary_in_channels",
    "auxiliary_loss_weight", "auxiliary_num_convs", "backbone_config", "hidden_size", "id2label",
    "model_type", "pool_scales", "use_auxiliary_head",
))
# fmt: on
UPERNET_ONLY: dict[str, tuple[Json, ...]] = {
    **{name: ONLY[name] for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder")},
    **{name: ONLY[name] for name in ("pruned_heads", "quantization_config", "auto_map")},
    "backbone": (None,),  # the name of one to download
    "backbone_kwargs": ({}, None),
    "use_pretrained_backbone": (False, None),
    "use_timm_backbone": (False, None),
}
# Dropout and drop path act in training alone. The rest is of losses, segmentation heads, text
# generation, how transformers returns its results, and which version wrote the file.
# fmt: off
KEPT = frozenset((
    "add_fpn", "attention_probs_dropout_prob", "auxiliary_channels", "auxiliary_concat_input",
    "auxiliary_loss_weight", "auxiliary_num_convs", "drop_path_rate", "hidden_dropout_prob",
    "initializer_range", "label2id", "num_labels", "_num_labels", "padding",
    "truncation", "out_features", "out_indices",
    "_out_features", "_out_indices", "loss_ignore_index", "pool_scales", "problem_type",
    "reshape_hidden_states",
    "segmentation_indices", "semantic_loss_ignore_index", "stage_names", "use_auxiliary_head",
    "use_mask_token", "_attn_implementation", "_attn_implementation_autoset",
    "_attn_implementation_internal", "_commit_hash", "_experts_implementation",
    "_name_or_path", "attn_implementation", "dtype", "gradient_checkpointing", "name_or_path",
    "output_attentions", "output_hidden_states", "return_dict", "tf_legacy_loss",
    "torch_dtype", "torchscript", "transformers_version", "transformers_weights",
    "use_bfloat16", "use_cache", "use_return_dict", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "finetuning_task", "task_specific_params",
    "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "prefix",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "eos_token_id", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_scores", "pad_token_id", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "temperature", "top_k",
    "top_p", "typical_p",
))
# fmt: on
# Those that a user set, rather than transformers.
# fmt: off
WRITTEN_BACK = frozenset((
    "attention_probs_dropout_prob", "drop_path_rate", "hidden_dropout_prob",
    "initializer_range", "problem_type", "semantic_loss_ignore_index", "finetuning_task",
    "task_specific_params", "auxiliary_channels", "auxiliary_concat_input",
    "auxiliary_loss_weight", "auxiliary_num_convs",
    "pool_scales", "use_auxiliary_head",
))
# fmt: on
