"""Colours of maps."""

import numpy as np

from beit_jax.drawing.heat import heat, marked, over, shaded


def test_colours_get_lighter_with_the_value_and_nothing_is_dark():
    colours = heat(np.linspace(0, 2, 64)[None])[0].astype(float)
    lightness = colours @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(lightness) > 0).all()
    assert (heat(np.zeros((2, 2))) == colours[0]).all()
    assert (heat(np.array([[1.0, 9.0]]), largest=1.0) == colours[-1]).all()


def test_a_frame_and_a_shade_touch_only_what_they_are_for():
    image = np.full((12, 12, 3), (200, 100, 0), np.uint8)
    framed = marked(image, box=(4, 4, 8, 8))
    changed = (framed != image).any(axis=-1)
    assert changed[4:8, 4:8].all()
    changed[4:8, 4:8] = False
    assert not changed.any()
    mask = np.zeros((12, 12), bool)
    mask[:4] = True
    dark = shaded(image, mask)
    assert (dark[:4] == image[:4]).all()
    assert (dark[4:] == 25).all()
    assert (over(image, np.zeros_like(image), alpha=0.5) == 50).all()
