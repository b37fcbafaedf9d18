"""Which combinations are compared, and which picture gets which values."""

import numpy as np
import pytest

from imagen_jax.api.cascade import all_cells, settings, with_sampler
from imagen_jax.errors import UserError
from imagen_jax.training.weights import Weights
from tests import tiny

BASE = tiny.stage(sampler={"guidance": 3.0})
SR = tiny.sr_stage(sampler={"guidance": 1.5, "aug_level": 0.2, "steps": 2})


def _guidance(cells):
    return [tuple(cfg.sampler.guidance for cfg in cell.configs) for cell in cells]


def _aug_level(cells):
    return [tuple(cfg.sampler.aug_level for cfg in cell.configs) for cell in cells]


def test_nothing_to_compare_is_the_stages_own():
    (cell,) = all_cells([BASE, SR])
    assert cell.configs == (BASE, SR) and cell.label == ""


def test_one_list_is_for_all_stages_and_guidance_changes_fastest():
    cells = all_cells([BASE, SR], [(1.0, 4.0)], [(0.0, 0.3)])
    assert _guidance(cells) == [(1.0, 1.0), (4.0, 4.0)] * 2
    own = BASE.sampler.aug_level
    assert _aug_level(cells) == [(own, 0.0)] * 2 + [(own, 0.3)] * 2
    assert cells[-1].label == "w 4, aug 0.3"


def test_lists_of_each_stage_are_combined():
    cells = all_cells([BASE, SR], [(1.0, 2.0), (5.0, 6.0)])
    assert _guidance(cells) == [(1.0, 5.0), (1.0, 6.0), (2.0, 5.0), (2.0, 6.0)]
    assert [cell.label for cell in cells][:2] == ["w 1/5", "w 1/6"]


def _settings(cells, stage):
    return settings([cell.configs[stage] for cell in cells])


def test_settings_keep_a_schedule_unless_it_is_compared():
    cfg = tiny.stage(sampler={"guidance_schedule": (1.0, 8.0), "steps": 2})
    kept = _settings(all_cells([cfg]), 0)
    np.testing.assert_array_equal(kept.guidance, [[1, 8]])
    compared = _settings(all_cells([cfg], [(2.0, 3.0)]), 0)
    np.testing.assert_array_equal(compared.guidance, [[2, 2], [3, 3]])


def test_other_steps_go_with_weights_for_all_of_them():
    cfg = tiny.stage(sampler={"guidance_schedule": (1.0, 8.0), "steps": 2})
    trained = [Weights("workdir", cfg, 1, {}, {})]
    with pytest.raises(UserError, match="guidance_schedule"):
        with_sampler(trained, steps=[4])
    (changed,) = with_sampler(trained, steps=[4], guidance_schedule=[()])
    assert changed.cfg.sampler.steps == 4
    with pytest.raises(UserError, match="sampler is given 2 times for 1 stages"):
        with_sampler(trained, sampler=["ddpm", "ddim"])


def test_settings_of_each_cell():
    cells = all_cells([BASE, SR], [(1.0, 4.0)], [(0.0, 0.3)])
    own = _settings(cells, 1)
    np.testing.assert_array_equal(own.guidance[:, 0], [1, 4, 1, 4])
    np.testing.assert_allclose(own.aug_level, [0, 0, 0.3, 0.3], rtol=1e-6)


@pytest.mark.parametrize(
    ("configs", "guidance", "aug_level", "message"),
    [
        ([BASE, SR], [(1.0,)] * 3, [], "--guidance is given 3 times for 2 stages"),
        ([BASE, SR], [], [(1.5,)], "aug_level is 1.5; it must be in .0, 1."),
        ([BASE], [], [(0.5,)], "--aug_level is given 1 times for 0 stages"),
        ([BASE, SR], [], [(0.5,), (0.5,)], "--aug_level is given 2 times for 1 stages"),
    ],
)
def test_what_cannot_be_compared(configs, guidance, aug_level, message):
    with pytest.raises(UserError, match=message):
        all_cells(configs, guidance, aug_level)
