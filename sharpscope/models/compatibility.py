"""Whether two models belong to one path, beyond the shapes of their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sharpscope.errors import DataError, MismatchError, UsageError
from sharpscope.losses import Towers
from sharpscope.models.classification import LogitsModel
from sharpscope.models.classifier import ImageClassifier
from sharpscope.models.clip import ClipModel
from sharpscope.models.library import module_facts
from sharpscope.models.loading import Model, WeightsOnly
from sharpscope.models.transfer import check_same_library
from sharpscope.models.two_towers import TwoTowers

_FIX = "a checkpoint and its fine-tuned self, saved with the same configuration"
Difference = tuple[str, Any, Any]


def _unequal(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> Iterator[Difference]:
    if first is None or second is None:  # a fine-tuned model may lack tokenizer and preprocessing files
        return
    yield from ((name, value, second[name]) for name, value in first.items() if value != second.get(name, value))


def _differences(a: Model, b: Model) -> Iterator[Difference]:
    """Yield name and both values of what differs."""
    if not isinstance(a, ClipModel) or not isinstance(b, ClipModel):
        assert isinstance(a, LogitsModel)
        assert isinstance(b, LogitsModel)
        yield from _unequal(a.architecture(), b.architecture())
        yield from _unequal(a.preprocessing(), b.preprocessing())
        if a.classes and b.classes and a.classes != b.classes:
            yield "the list of classes", f"{len(a.classes)} names", f"{len(b.classes)} others"
        return
    yield from _unequal(a.library.architecture(), b.library.architecture())
    yield from _unequal(a.library.preprocessing(), b.library.preprocessing())
    words, others = a.library.vocabulary(), b.library.vocabulary()
    if words is not None and others is not None and words != others:
        yield "the tokenizer's vocabulary", f"{len(words)} tokens", f"{len(others)} tokens"
    if a.templates != b.templates:
        yield "templates", list(a.templates), list(b.templates)


def _raise_first(found: list[Difference], names: tuple[str, str], fix: str = _FIX) -> None:
    if found:
        name, first, second = found[0]
        others = f" ({len(found)} settings differ)" if len(found) > 1 else ""
        raise MismatchError(f"{name} is {first!r} in {names[0]} but {second!r} in {names[1]}{others}", fix)


def check_compatible(zero_shot: Model, fine_tuned: Model) -> None:
    """Raise if the two differ in anything that decides what their weights mean.

    Activation, heads, image size, preprocessing and vocabulary are compared: they change the function, not the
    shapes, so that weights of one load silently into the other.

    Raises
    ------
    MismatchError
        Naming the first setting that differs and both values, or both libraries if they name tensors differently.
    """
    if isinstance(zero_shot, ClipModel) != isinstance(fine_tuned, ClipModel):
        kinds = ("a CLIP", "a classifier with its own head")
        a, b = kinds if isinstance(zero_shot, ClipModel) else kinds[::-1]
        raise MismatchError(f"{zero_shot.name} is {a}, {fine_tuned.name} is {b}", _FIX)
    check_same_library(zero_shot.network.state_dict(), fine_tuned.network.state_dict(), ("zero-shot", "fine-tuned"))
    found, fix = list(_differences(zero_shot, fine_tuned)), _FIX
    if found and found[0][0].startswith("image_") and (_assumed(zero_shot) is None) != (_assumed(fine_tuned) is None):
        fix = "sharpscope.models.load_pair(ZERO_SHOT, FINE_TUNED): a file, which does not say it, takes the other end's"
    _raise_first(found, (zero_shot.name, fine_tuned.name), fix)


def _assumed(model: Model) -> tuple[str, ...] | None:
    """Return what a file did not say and was assumed, None if everything is known."""
    return getattr(model.library, "assumed", None) if isinstance(model, ClipModel) else None


def _assumptions(start: ClipModel, end: ClipModel) -> list[str]:
    """Return what was assumed of both ends; what one of them knows was compared."""
    a, b = _assumed(start), _assumed(end)
    return [] if a is None or b is None else [*dict.fromkeys((*a, *b))]


def check_same_function(zero_shot: ClipModel, fine_tuned: ClipModel) -> None:
    """Raise if two CLIPs of different libraries differ in activation, heads, epsilons or image size.

    Raises
    ------
    MismatchError
        Naming the first setting that differs and both values.
    """
    a, b = ({**module_facts(m.network), "image size": m.library.size} for m in (zero_shot, fine_tuned))
    assumed = _assumed(fine_tuned) is not None  # it gets the zero-shot model's preprocessing
    means = [None if assumed else _normalisation(model) for model in (zero_shot, fine_tuned)]
    found = [*_unequal(a, b), *_unequal(*means)]
    _raise_first(found, (zero_shot.name, fine_tuned.name))


def _normalisation(model: ClipModel) -> Mapping[str, Any] | None:
    stored = model.library.preprocessing()
    if stored is None:
        return None
    return {name: [round(x, 4) for x in stored[name]] for name in ("image_mean", "image_std") if stored.get(name)}


def _resolved(zero_shot: Any, fine_tuned: Any) -> tuple[Model, Model]:
    """Return two whole models: weights alone take the architecture of the other end."""
    if isinstance(zero_shot, WeightsOnly):
        return zero_shot.like(fine_tuned), fine_tuned
    return zero_shot, fine_tuned.like(zero_shot) if isinstance(fine_tuned, WeightsOnly) else fine_tuned


def pair(
    zero_shot: Any, fine_tuned: Any, classes: Sequence[str] | None, objective: Towers = "image"
) -> tuple[nn.Module, nn.Module, list[str]]:
    """Return both ends of a path as classifiers with one frozen logit scale, and what a result must say about it.

    The scale is the zero-shot model's, as are tokenizer and templates. With ``objective="image"`` each head comes from
    its own text tower or from its own file, and between the ends the heads themselves are interpolated, not the text
    towers. Else the text towers are, and heads are made of them at every point
    (:class:`sharpscope.models.two_towers.TwoTowers`).

    Raises
    ------
    MismatchError
        See :func:`check_compatible`.
    DataError
        If a CLIP has no class names to make its head from, or a head has other classes than the data.
    UsageError
        If both towers are asked of models that are no CLIPs, or that bring a head along.
    """
    start, end = _resolved(zero_shot, fine_tuned)
    check_compatible(start, end)
    notes = [*start.notes, *end.notes]
    if isinstance(start, LogitsModel) and isinstance(end, LogitsModel):
        if objective != "image":
            raise UsageError(f"objective={objective!r}: {start.name} has no text tower", "objective='image', or CLIPs")
        return start.classifier(classes), end.classifier(classes), notes
    assert isinstance(start, ClipModel)
    assert isinstance(end, ClipModel)
    if classes is None:
        raise DataError(
            f"{start.name} is a CLIP and needs class names for its head, the ID data has none",
            "sharpscope.folder(...), or Split(loader, 'id', classes=[...])",
        )
    notes += [*_assumptions(start, end), *_scale_notes(start, end)]
    if objective == "image":
        return (*_classifiers(start, end, classes), [*notes, *_head_notes(start, end)])
    return (*_two_towers(start, end, classes, objective), [*notes, *_tower_notes(start, end, classes)])


def _classifiers(start: ClipModel, end: ClipModel, classes: Sequence[str]) -> tuple[ImageClassifier, ImageClassifier]:
    heads = [model.head(classes, start) for model in (start, end)]
    if any(head.bias is not None for head in heads):
        heads = [head.with_bias() for head in heads]
    first, second = start.classifier(classes, head=heads[0]), end.classifier(classes, like=start, head=heads[1])
    if first.logit_bias is None or second.logit_bias is None:
        first.logit_bias = second.logit_bias = None  # one number for all classes: no probability changes
    return first, second


def _two_towers(
    start: ClipModel, end: ClipModel, classes: Sequence[str], objective: Towers
) -> tuple[TwoTowers, TwoTowers]:
    if headed := next((model.name for model in (start, end) if model.stored_head), None):
        raise UsageError(
            f"objective={objective!r}: {headed} brings a head along, which no text tower makes",
            "objective='image', or a checkpoint with both towers and without a head",
        )
    if not classes or isinstance(classes, str):
        raise UsageError(f"classes={classes!r}: needs a list of class names", "e.g. ['cat', 'dog']")
    scale, bias = start.network.logit_scale, getattr(start.network, "logit_bias", None)
    first, second = (
        TwoTowers(model.library, start.library, classes, start.templates, scale, logit_bias=bias)
        for model in (start, end)
    )
    return first, second


def _text_tower_moves(start: ClipModel, end: ClipModel) -> bool:
    """Return whether the text towers differ."""
    image_side = start.library.towers
    ends = (model.network.state_dict() for model in (start, end))
    first, second = ({n: t for n, t in end.items() if n.partition(".")[0] not in image_side} for end in ends)
    return any(not n.startswith("logit_") and not torch.equal(t, second[n]) for n, t in first.items())


def _head_notes(start: ClipModel, end: ClipModel) -> list[str]:
    if start.stored_head or end.stored_head or not _text_tower_moves(start, end):
        return []
    return [
        "the text towers differ: between the ends this scan mixes the two heads that they make (layer 'head'), while a "
        "merge mixes the towers themselves; --objective both (objective='both') scans what a merge writes"
    ]


def _tower_notes(start: ClipModel, end: ClipModel, classes: Sequence[str]) -> list[str]:
    notes = [
        f"both towers move: the head is made by the text tower at every alpha, of {len(classes)} classes x "
        f"{len(start.templates)} templates"
    ]
    if not _text_tower_moves(start, end):
        notes.append("the text tower is the same in both models: its layers have sharpness, but do not move")
    return notes


def _scale_notes(start: ClipModel, end: ClipModel) -> list[str]:
    own, taken = (float(model.network.logit_scale.detach().exp()) for model in (end, start))
    if own == taken:
        return []
    return [
        f"the logit scale is {taken:.4g} in the zero-shot and {own:.4g} in the fine-tuned model; "
        f"{taken:.4g} is used along the whole path, as curvature grows with its square"
    ]
