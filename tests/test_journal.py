"""Cells on disk survive exactly, torn lines are dropped, other plans are refused."""

import math

import numpy as np
import pytest

from sharpscope.errors import MeasurementError, UsageError
from sharpscope.journal import Journal, decode, encode, read
from sharpscope.table import Cell, Row, cell_key

ROW = Row(0.1, "block.0", "id", "trace", 1 / 3, math.inf, 1, False)
CELL = Cell(
    cell_key(0.1, "id", "trace"), (ROW,), {"block.0": np.array([1 / 3, 1e-300]), "c": np.array([True, False] * 5)}
)


def test_a_cell_comes_back_bit_for_bit():
    back = decode(encode(CELL))
    assert back == CELL
    assert back.rows[0].stderr == math.inf
    assert back.arrays["c"].dtype == bool


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_cannot_hold_a_number_that_is_none(value):
    with pytest.raises(MeasurementError, match=r"trace of layer 'block\.0' on 'id' at alpha 0\.1 is"):
        Row(0.1, "block.0", "id", "trace", value, 0.0, 1, True)


def test_a_torn_last_line_is_dropped_at_every_length(tmp_path):
    path = tmp_path / "cells.jsonl"
    journal = Journal(path, {"seed": 0})
    journal.append(CELL)
    whole = path.read_bytes()
    journal.append(Cell("0.2|id|trace", (ROW,)))
    extra = path.read_bytes()[len(whole) :]
    for cut in range(len(extra)):
        path.write_bytes(whole + extra[:cut])
        resumed = Journal(path, {"seed": 0})
        assert list(resumed) == [CELL]
        assert path.read_bytes() == whole


def test_a_file_torn_in_its_header_starts_anew(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_bytes(b'{"format": 1, "pl')
    assert len(Journal(path, {"seed": 0})) == 0
    assert read(path)[0]["plan"] == {"seed": 0}


def test_another_plan_is_refused_naming_what_differs_and_fresh_discards_it(tmp_path):
    path = tmp_path / "cells.jsonl"
    Journal(path, {"seed": 0, "limit": 5}).append(CELL)
    with pytest.raises(UsageError, match=r"seed differ \(seed: 0 there, 1 now\)"):
        Journal(path, {"seed": 1, "limit": 5})
    assert len(Journal(path, {"seed": 1, "limit": 5}, fresh=True)) == 0


def test_damage_before_the_last_line_is_an_error_not_a_loss(tmp_path):
    path = tmp_path / "cells.jsonl"
    Journal(path, {"seed": 0}).append(CELL)
    path.write_bytes(path.read_bytes().replace(b'"rows"', b'"r0ws"') + b"{}\n")
    with pytest.raises(UsageError, match="not a readable list of cells"):
        Journal(path, {"seed": 0})
