"""From a reference to a model: which library reads it, and what to do with weights alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharpscope.errors import MismatchError, ModelError, UsageError
from sharpscope.models import checkpoint, factory, hf, openclip, timm_model
from sharpscope.models.classification import LogitsModel
from sharpscope.models.clip import ClipModel
from sharpscope.models.library import ClipLibrary, module_facts, plain
from sharpscope.models.openclip import OpenClip
from sharpscope.models.reference import FORMS, Reference, parsed
from sharpscope.models.templates import DEFAULT, checked_templates
from sharpscope.models.tensors import Tensors, read_tensors, stored_head
from sharpscope.models.transfer import lacking

Model = ClipModel | LogitsModel
_NEEDS_MODEL = "give the architecture: sharpscope.load(FILE, like=MODEL), or oc:NAME/FILE, timm:NAME/FILE"


@dataclass(frozen=True)
class WeightsOnly:
    """Weights without an architecture: a file, or one tower. Beside a whole model they are one end of a path."""

    name: str
    tensors: Tensors
    facts: Mapping[str, Any] = field(default_factory=dict)  # of its function, as its configuration says

    @property
    def where(self) -> Path:
        """The directory or file."""
        return self.tensors.where

    def like(self, model: Model, *, convert: bool = False) -> Model:
        """Return a copy of the model with these weights; ``MismatchError`` if they do not belong in it."""
        known = module_facts(model.network)
        for fact, value in self.facts.items():
            if known.get(fact, value) != value:
                raise MismatchError(
                    f"{fact} is {known[fact]!r} in {model.name} but {value!r} in {self.name}",
                    "a checkpoint and its fine-tuned self, saved with the same configuration",
                )
        tensors = self.tensors.fitting(lacking(model.network, ()))
        found = model.with_tensors(self.name, tensors, where=self.where.resolve(), convert=convert)
        found.notes = (*found.notes, *self.tensors.notes)
        return found

    @property
    def network(self) -> Any:
        """No module can be made of weights alone."""
        raise self._alone()

    def preprocess(self, image: Any) -> Any:  # noqa: ARG002
        """No preprocessing is known for weights alone."""
        raise self._alone()

    def _alone(self) -> ModelError:
        return ModelError(
            f"{self.name} holds weights only, not the architecture, tokenizer and preprocessing of a model",
            _NEEDS_MODEL,
        )


def load(
    ref: str | Path,
    *,
    templates: Iterable[str] | None = None,
    like: Model | None = None,
    convert: bool = False,
) -> Any:
    """Return the model that a reference means, ready for :func:`sharpscope.scan` and :func:`sharpscope.folder`.

    Parameters
    ----------
    ref
        ``DIR`` or ``hf:OWNER/NAME``
            as ``save_pretrained`` of transformers, or ``save_for_hf`` of open_clip and timm, writes it, or on the hub:
            CLIP, SigLIP, or any model for image classification.
        ``oc:NAME/TAG``, ``oc:NAME/FILE``
            open_clip's configuration NAME with pretrained weights or with those of a file.
        ``timm:NAME``, ``timm:NAME/FILE``
            a classifier of timm, likewise.
        ``FILE``
            ``.safetensors``, ``.pt``, ``.bin``: weights, put into the architecture of ``like``, or of the other model
            of a scan. Wrappers (``state_dict``, ``module.``, compile, FSDP, SWA, WiSE-FT) are seen through; the model's
            ``notes`` say if a moving average beside the weights was left aside.
        ``py:PACKAGE.MODULE:FUNCTION``
            a function that returns a module whose forward gives logits, or a module and a preprocessing.
    templates
        Sentences with ``{}`` for the class name; default ``"a photo of a {}."``.
    like
        A loaded model whose architecture, tokenizer and preprocessing are taken where the reference has none.
    convert
        Convert the weights of a ViT CLIP from transformers to open_clip or back to match ``like``; exact.

    Returns
    -------
    ClipModel
        A CLIP: class names make its head.
    LogitsModel
        A classifier.
    WeightsOnly
        If the reference is a file or one tower, and ``like`` is not given.

    Raises
    ------
    ModelError
        If the checkpoint is damaged, incomplete, not finite, of an unknown kind, or pickled code; nothing of it is
        executed.
    MismatchError
        If it does not fit ``like``.
    UsageError
        If nothing is there, a template has no place for the class name, or a library is not installed.
    """
    sentences = checked_templates(DEFAULT if templates is None else templates)
    found = _READERS[(reference := parsed(ref)).kind](reference, sentences)
    if like is None:
        return found
    if isinstance(found, WeightsOnly):
        return found.like(like, convert=convert)
    return converted(found, like) if convert else found


def converted(model: Model, like: Model) -> Model:
    """Return the model in the library of the other; itself if it is one already."""
    if not (isinstance(model, ClipModel) and isinstance(like, ClipModel)) or model.library.name == like.library.name:
        return model
    from sharpscope.models.compatibility import check_same_function

    check_same_function(like, model)
    made = like.with_tensors(model.name, model.network.state_dict(), where=model.where, convert=True)
    made.templates, made.stored_head, made.notes = model.templates, model.stored_head, model.notes
    return made


def load_pair(
    zero_shot: str | Path, fine_tuned: str | Path, *, templates: Iterable[str] | None = None, convert: bool = False
) -> tuple[Any, Any]:
    """Return both ends of a path; a file of weights takes the architecture of the other end.

    See :func:`load` for the parameters and errors.
    """
    sentences = None if templates is None else tuple(templates)
    first, second = load(zero_shot, templates=sentences), load(fine_tuned, templates=sentences)
    if isinstance(first, WeightsOnly) and isinstance(second, WeightsOnly):
        raise UsageError(f"{first.name} and {second.name} both hold weights only", _NEEDS_MODEL)
    if isinstance(first, WeightsOnly):
        return first.like(second, convert=convert), second
    if isinstance(second, WeightsOnly):
        return first, second.like(first, convert=convert)
    _share_preprocessing(first, second)
    return first, converted(second, first) if convert else second


def _share_preprocessing(*ends: Model) -> None:
    """Give an end whose preprocessing was assumed that of the other one, if it is known."""
    pair = [model.library for model in ends if isinstance(model, ClipModel) and isinstance(model.library, OpenClip)]
    known, assumed = ([end for end in pair if (end.assumed is None) == sure] for sure in (True, False))
    if known and assumed:
        assumed[0].preprocess_as(known[0])


def _clip(
    reference: Reference, library: ClipLibrary, templates: tuple[str, ...], tensors: Tensors | None = None
) -> ClipModel:
    head = None if tensors is None else stored_head(tensors)
    where = tensors.where if tensors is not None else reference.path
    place, notes = where.resolve() if where.exists() else None, () if tensors is None else tensors.notes
    return ClipModel(reference.text, library, templates, where=place, stored_head=head, notes=notes)


def _directory(reference: Reference, templates: tuple[str, ...]) -> Any:
    place, config = reference.path, _json(reference.path / "config.json")
    # LAION's repositories hold one model for both libraries; a hub id means transformers there, so a directory does.
    if (place / openclip.CONFIG).is_file() and (reference.weights == "oc" or "model_type" not in config):
        tensors = read_tensors(place, first="open_clip_")
        return _clip(reference, openclip.read_directory(place, tensors), templates, tensors)
    if timm_model.is_timm(config):
        network, classes = timm_model.read_directory(place, read_tensors(place))
        return _timm(reference, network, place, classes)
    return _transformers(reference, templates)


def _json(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # what is wrong with it is said by who needs it
    return found if isinstance(found, dict) else {}


def _transformers(reference: Reference, templates: tuple[str, ...]) -> Any:
    where = reference.name
    if reference.path.is_dir() and (reference.path / "adapter_config.json").is_file():
        read_tensors(reference.path)  # says that adapters must be merged first
    config = checkpoint.read_config(where)
    if hf.is_classifier(config):
        network, classes = hf.read_classifier(where)
        if timm_model.is_wrapped(network):
            return _timm(reference, network, _place(reference), classes)
        return _classifier(reference, network, classes)
    if hf.is_bare_tower(config):
        if not reference.path.is_dir():
            raise ModelError(f"{where} is one tower of a CLIP", "download it and pass its directory")
        return WeightsOnly(reference.text, read_tensors(reference.path), hf.tower_facts(config))
    if timm_model.is_timm(config):
        raise ModelError(f"{where} is a model of timm", f"timm:{where.partition('/')[2]}")
    if config.get("model_type") not in ("clip", "siglip"):
        raise ModelError(
            f"{where} is a {config.get('model_type')!r} model ({', '.join(config.get('architectures') or ['?'])})",
            "a CLIP, SigLIP or ...ForImageClassification; any other network can be passed to scan as a module whose "
            "forward gives logits, or as py:PACKAGE.MODULE:FUNCTION",
        )
    return _clip(reference, hf.read_clip(where, config), templates)


def _classifier(reference: Reference, network: Any, classes: list[str] | None) -> LogitsModel:
    try:
        processor = checkpoint.read_image_processor(reference.name)
    except ModelError:  # a fine-tuned end may lack it
        return LogitsModel(reference.text, network, classes=classes, where=_place(reference))
    return LogitsModel(
        reference.text,
        network,
        preprocess=lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0],
        preprocessing={name: plain(value) for name, value in processor.to_dict().items()},
        classes=classes,
        where=_place(reference),
    )


def _place(reference: Reference) -> Path | None:
    return reference.path.resolve() if reference.path.exists() else None


def _timm(reference: Reference, network: Any, where: Path | None, classes: list[str] | None = None) -> LogitsModel:
    return LogitsModel(
        reference.text,
        network,
        preprocess=timm_model.transform(network),
        preprocessing=timm_model.data_config(network),
        classes=classes,
        where=where and where.resolve(),
    )


def _open_clip(reference: Reference, templates: tuple[str, ...]) -> ClipModel:
    if not reference.weights:
        raise UsageError(f"{reference.text!r} names no weights", f"oc:{reference.name}/TAG or oc:{reference.name}/FILE")
    if reference.file is None:
        return _clip(reference, openclip.read_tag(reference.name, reference.weights), templates)
    tensors = read_tensors(reference.file)
    library, lone = openclip.read_file(reference.name, tensors, reference.file)
    found = _clip(reference, library, templates, tensors)
    if lone and found.stored_head is None:
        raise ModelError(
            f"{reference.file} holds one tower only, and no head",
            "sharpscope.load(FILE, like=MODEL), or both towers",
        )
    return found


def _timm_name(reference: Reference, templates: tuple[str, ...]) -> LogitsModel:  # noqa: ARG001
    if reference.file is not None:
        tensors = read_tensors(reference.file)
        found = _timm(reference, timm_model.read_file(reference.name, tensors), reference.file)
        found.notes = tensors.notes
        return found
    if reference.weights:
        raise UsageError(f"{reference.text!r}: there is no file {reference.weights!r}", FORMS)
    return _timm(reference, timm_model.read_pretrained(reference.name), None)


def _factory(reference: Reference, templates: tuple[str, ...]) -> LogitsModel:  # noqa: ARG001
    network, preprocess = factory.made(reference.name)
    return LogitsModel(reference.text, network, preprocess=preprocess)


def _file(reference: Reference, templates: tuple[str, ...]) -> WeightsOnly:  # noqa: ARG001
    return WeightsOnly(reference.text, read_tensors(reference.path))


_READERS = {
    "directory": _directory,
    "hub": _transformers,
    "file": _file,
    "oc": _open_clip,
    "timm": _timm_name,
    "py": _factory,
}
