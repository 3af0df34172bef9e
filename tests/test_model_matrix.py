"""Every kind of model that transformers saves is read back as itself, cut into layers, and scanned."""

from __future__ import annotations

import matrix
import pytest
from saved import KINDS, Saved


@pytest.fixture(scope="module", params=list(KINDS))
def saved(request, tmp_path_factory) -> Saved:
    return KINDS[request.param](tmp_path_factory.mktemp("saved"))


def test_logits_are_those_of_the_library(saved):
    matrix.check_logits(saved)


def test_every_tensor_lies_in_exactly_one_known_layer(saved):
    matrix.check_layers(saved)


def test_a_scan_of_one_alpha_runs(saved):
    matrix.check_scan(saved)


def test_with_both_towers_the_text_layers_are_measured_too(saved):
    matrix.check_two_towers(saved)


def test_a_merge_loads_again_in_the_library_without_a_key_too_many_or_too_few(saved, tmp_path):
    matrix.check_merge(saved, tmp_path / "merged")


@pytest.mark.filterwarnings("ignore:the text towers are mixed")
def test_a_merge_of_a_scan_gives_each_tensor_the_alpha_of_its_layer(saved, tmp_path):
    matrix.check_scanned_merge(saved, tmp_path)
