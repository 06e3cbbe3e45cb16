"""The figures of a report, drawn from layers made up for the purpose."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from normdrop.report import plots
from normdrop.runs.read import NormLayer


@pytest.mark.parametrize("spread", [1e-7, 1e-4, 0.1, 1e4])
@pytest.mark.parametrize(("part", "start"), [("gamma", 1.0), ("alpha", 0.0)])
def test_ticks_are_the_values_themselves(part, start, spread):
    values = start + spread * np.array([-1, -0.5, 0.5, 1])
    layer = NormLayer("bn", 4, *4 * [np.ones(4)])
    layer = dataclasses.replace(layer, **{part: values})
    with plots.style():
        figure = plots._ranges(SimpleNamespace(norm_layers=[layer]), part, start)
        figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    ticks = [t for t in axes.yaxis.get_major_ticks() if low <= t.get_loc() <= high]
    shown = [float(t.label1.get_text().replace("−", "-")) for t in ticks]
    assert len(shown) >= 3
    np.testing.assert_allclose(shown, [t.get_loc() for t in ticks], rtol=0, atol=1e-3 * spread)
