"""Curves of alignment against distance."""

import pytest

from imagen_jax.errors import UserError
from imagen_jax.evaluation import tradeoff


def result(score, distance, guidance, level=None, **more):
    figures = {"FID": distance, "KID": 0.1, "CLIP score (mean cosine)": score} | more
    return {"figures": figures, "guidance": guidance, "aug_level": [None, level]}


def test_a_curve_of_each_level_in_the_order_of_the_weights():
    results = [
        result(0.25, 9.0, [10.0, 1.0], 0.1),
        result(0.22, 12.0, [1.0, 1.0], 0.1),
        result(0.24, 7.5, [2.0, 1.0], 0.1),
        result(0.23, 8.0, [[5.0, 1.0], 1.0], 0.2),
    ]
    axes, found = tradeoff.curves(results)
    assert axes == ("CLIP score (mean cosine)", "FID")
    assert found == {
        "0.1": [(0.22, 12.0, "1/1"), (0.24, 7.5, "2/1"), (0.25, 9.0, "10/1")],
        "0.2": [(0.23, 8.0, "[5.0, 1.0]/1")],
    }


@pytest.mark.parametrize(
    "figures", [{"FID": 1.0}, {"judged right": 0.5}, {"KID": 0.1, "judged right": 1.0}]
)
def test_one_figure_makes_no_curve(figures):
    with pytest.raises(UserError, match="score of alignment"):
        tradeoff.curves([{"figures": figures}])


def test_results_of_different_figures_are_not_mixed():
    other = {"figures": {"FD (x)": 1.0, "judged right": 0.5}}
    with pytest.raises(UserError, match="of all samples"):
        tradeoff.curves([result(0.2, 3.0, [1.0]), other])


def test_a_plot_holds_every_point(tmp_path):
    pytest.importorskip("matplotlib", reason="of the extra eval")
    path = tmp_path / "plot.svg"
    models = {"ours": [result(0.2, 3.0, [1.5])], "theirs": [result(0.3, 4.0, [2.5])]}
    tradeoff.draw(str(path), models)
    # Text is drawn as glyphs: what it says stands in comments.
    for word in ("ours", "theirs", "<!-- 1.5 -->", "<!-- 2.5 -->", "<!-- FID -->"):
        assert word in path.read_text()
    mixed = {"figures": {"FD (x)": 1.0, "judged right": 0.5}, "guidance": [1.0]}
    with pytest.raises(UserError, match="measured differently"):
        tradeoff.draw(str(path), models | {"mixed": [mixed]})
