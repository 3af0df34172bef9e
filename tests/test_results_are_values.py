"""A result is what was measured: no edit of what it hands out changes it."""

import numpy as np
import pytest
from planted import planted

import sharpscope as ss
from sharpscope.result import ScanResult

SMALL = {"alphas": (0.0, 0.1, 0.5, 0.8, 1.0), "measures": ("trace",), "studied": True}


@pytest.mark.parametrize("name", ["layers", "evals", "stragglers", "interventions", "recipes", "barriers"])
def test_editing_a_frame_changes_neither_the_result_nor_what_is_saved(name, tmp_path):
    result, expected = planted(**SMALL), getattr(planted(**SMALL), name)
    assert len(expected)
    frame = getattr(result, name)
    del frame[frame.columns[0]]
    assert getattr(result, name).equals(expected)
    assert result.stragglers.equals(planted(**SMALL).stragglers)
    if (table := result.save(tmp_path) / f"{name}.csv").exists():
        assert table.read_text() == expected.to_csv(index=False)


def test_answers_image_by_image_cannot_be_written_to(tmp_path):
    result = planted(**SMALL)
    for found in result.correct.values():
        with pytest.raises(ValueError, match="read-only"):
            found[:] = False
    assert ss.open(result.save(tmp_path)) == planted(**SMALL)
    assert all(np.array_equal(found, planted(**SMALL).correct[place]) for place, found in result.correct.items())


@pytest.mark.parametrize("name", ["evals", "interventions", "recipes", "barriers", "label_free"])
def test_the_words_to_a_frame_name_all_its_columns(name):
    said = getattr(ScanResult, name).__doc__.split()
    assert set(getattr(planted(**SMALL), name)) <= {word.strip("`.,") for word in said}
