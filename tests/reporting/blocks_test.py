import numpy as np
import pytest

from olmoe_jax import reporting

AXES = {"layer": ("0", "4"), "expert": ("0", "1", "2"), "domain": ("a", "b", "c", "d", "e")}
VALUES = np.arange(30.0).reshape(2, 3, 5)


def test_a_part_of_a_cube_has_the_axes_in_the_order_asked_for():
    cube = reporting.Cube(axes=AXES, values=VALUES, low=VALUES - 1)
    values, low, high = cube.at({"layer": "4"}, ["domain", "expert"])
    np.testing.assert_array_equal(values, VALUES[1].T)
    np.testing.assert_array_equal(low, VALUES[1].T - 1)
    assert high is None
    values, *_ = cube.at({"layer": "4", "domain": "b"}, ["expert"])
    np.testing.assert_array_equal(values, VALUES[1, :, 1])


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"low are \[3, 5\], its labels \[2, 3, 5\]"):
        reporting.Cube(axes=AXES, values=VALUES, low=VALUES[0])
    cube = reporting.Cube(axes=AXES, values=VALUES)
    wrong = [
        ({"kind": "pie", "x": "expert"}, "kind 'pie'"),
        ({"kind": "bars", "x": "nothing"}, "no axis 'nothing'"),
        ({"kind": "heat", "x": "expert"}, "no axis ''"),
        ({"kind": "bars", "x": "expert", "start": {"layer": "7"}}, "layer has no '7'"),
        ({"kind": "bars", "x": "expert", "figures": ({"domain": "z"},)}, "domain has no 'z'"),
        ({"kind": "lines", "x": "layer", "scales": {"depth": (1, 2, 3)}}, "depth are 3, not 2"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            reporting.Explorer(title="t", cube=cube, **options)


def test_choices_are_the_axes_that_are_not_drawn():
    cube = reporting.Cube(axes=AXES, values=VALUES)
    one = reporting.Explorer(
        title="t", cube=cube, kind="lines", x="layer", series="domain", start={"expert": "2"}
    )
    assert one.choices == {"expert": ("0", "1", "2")}
    assert one.selection() == {"expert": "2"} and one.selection({"expert": "1"}) == {"expert": "1"}
