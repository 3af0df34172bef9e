"""Checkpoints as classifiers: what a model needs besides its weights to be scanned, whichever library wrote it."""

from sharpscope.models.classification import LogitsModel
from sharpscope.models.classifier import ImageClassifier
from sharpscope.models.clip import ClipModel
from sharpscope.models.compatibility import check_compatible, pair
from sharpscope.models.loading import WeightsOnly, load, load_pair
from sharpscope.models.templates import read_templates

__all__ = [
    "ClipModel",
    "ImageClassifier",
    "LogitsModel",
    "WeightsOnly",
    "check_compatible",
    "load",
    "load_pair",
    "pair",
    "read_templates",
]
