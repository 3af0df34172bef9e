"""Checkpoints as classifiers: what a CLIP needs besides its weights to be scanned."""

from sharpscope.models.classifier import ImageClassifier
from sharpscope.models.clip import ClipModel, load
from sharpscope.models.compatibility import check_compatible, pair
from sharpscope.models.templates import read_templates

__all__ = ["ClipModel", "ImageClassifier", "check_compatible", "load", "pair", "read_templates"]
