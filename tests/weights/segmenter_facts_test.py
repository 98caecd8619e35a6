"""What no shape of a segmentation model shows is compared before it starts another one."""

import dataclasses

import pytest

from beit_jax.config import ConfigError
from beit_jax.config.facts import FACTS, NO_HEAD_FACTS
from beit_jax.config.segment import SegmentHeadConfig
from beit_jax.weights import facts
from beit_jax.weights.description import to_config
from tests.weights.segmenter_test import SEGMENTER, saved


def test_every_setting_of_a_head_is_a_fact_or_says_why_not():
    fields = {field.name for field in dataclasses.fields(SegmentHeadConfig)}
    settings = {fact.setting for fact in FACTS.values()}
    of_heads = {name.removeprefix("head.") for name in settings if name.startswith("head.")}
    assert of_heads.isdisjoint(NO_HEAD_FACTS)
    assert of_heads | set(NO_HEAD_FACTS) == fields, "classify a new setting in config/facts.py"


def test_the_blocks_of_a_segmenter_are_compared_and_its_pooling_where_it_pools(tmp_path):
    """No shape shows them, and the message's flag can be pasted into a shell."""
    source = SEGMENTER
    saved(tmp_path / "native", source)
    found = facts.stated(str(tmp_path / "native"))
    config = to_config(source)
    facts.check(found, config, source="x")
    head = config["head"] | {"blocks": [1, 2, 3, 5], "pool_scales": [1, 2, 4, 6]}
    with pytest.raises(ConfigError) as caught:
        facts.check(found, config | {"head": head}, source="x")
    text = str(caught.value)
    assert "blocks '(2,3,4,6)', this run '(1,2,3,5)'" in text
    assert "--config.head.blocks='(2,3,4,6)' --config.head.pool_scales='(1,2,3,6)'" in text
    facts.check(
        found, config | {"head": head}, source="x", allow_different=("blocks", "pool_scales")
    )
    classifier_config = config | {"task": "classify", "head": head}
    facts.check(found, classifier_config, source="x")
    linear = facts.SourceFacts(config=config | {"head": head | {"kind": "linear"}})
    with pytest.raises(ConfigError) as caught:
        facts.check(linear, config, source="x")
    assert "pool_scales" not in str(caught.value)


def test_classes_that_moved_are_another_function(tmp_path):
    saved(tmp_path / "native", SEGMENTER)
    found = facts.stated(str(tmp_path / "native"))
    config = to_config(SEGMENTER) | {"labels": ["sky", "road", "tree"]}
    with pytest.raises(ConfigError, match="labels road, sky, tree, this run sky, road, tree"):
        facts.check(found, config, source="x", from_data=True)
    renamed = config | {"labels": ["Street", "sky", "Plant"]}
    facts.check(found, renamed, source="x", from_data=True)
