"""What a reference to a model means: ``hf:``, ``oc:``, ``timm:``, ``py:``, a directory, a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sharpscope.errors import UsageError
from sharpscope.home import at_home
from sharpscope.models.weight_files import SUFFIXES

Kind = Literal["directory", "file", "hub", "oc", "timm", "py"]
FORMS = (
    "a directory, a hub id OWNER/NAME, oc:NAME/TAG or oc:NAME/FILE, timm:NAME or timm:NAME/FILE, "
    "a .safetensors or .pt file, py:PACKAGE.MODULE:FUNCTION"
)


@dataclass(frozen=True)
class Reference:
    """A parsed reference.

    Attributes
    ----------
    text
        As it was given.
    kind
        What reads it.
    name
        Directory, file, hub id, name of a configuration, or factory.
    weights
        Tag or file that follows a configuration's name; ``"oc"`` or ``"timm"`` of a directory that this library is to
        read; empty if there is none.
    """

    text: str
    kind: Kind
    name: str
    weights: str = ""

    @property
    def path(self) -> Path:
        """The directory or file that ``name`` is."""
        return Path(self.name)

    @property
    def file(self) -> Path | None:
        """The file that ``weights`` is, None if it is a tag."""
        return Path(self.weights) if Path(self.weights).is_file() else None


_HUB = "https://huggingface.co/"
# As clip.available_models() lists them -> open_clip's.
_OPENAI = {
    **{name: name for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")},
    **{f"ViT-{size}": f"ViT-{size.replace('/', '-')}" for size in ("B/32", "B/16", "L/14")},
    "ViT-L/14@336px": "ViT-L-14-336",
}


def parsed(ref: str | Path) -> Reference:
    """Return what a reference means.

    Raises
    ------
    UsageError
        If it looks like a path and nothing is there, or it has no known form.
    """
    if not isinstance(ref, str | Path):
        raise UsageError(
            f"a {type(ref).__name__} is no reference to a model",
            f"{FORMS}; a module whose forward gives logits goes to scan as it is",
        )
    text = str(ref)
    if text in _OPENAI:
        raise UsageError(f"{text!r} is OpenAI's name of a CLIP", f"oc:{_OPENAI[text]}/openai")
    if text.startswith(_HUB):
        raise UsageError(f"{text!r} is an address", f"hf:{'/'.join(text.removeprefix(_HUB).split('/')[:2])}")
    for kind in ("oc", "timm"):
        if text.startswith(f"{kind}:"):
            return _named(text, kind, text.removeprefix(f"{kind}:"))
    if text.startswith("py:"):
        return Reference(text, "py", text.removeprefix("py:"))
    bare = text.removeprefix("hf:")
    path = at_home(bare)
    if path.is_dir():
        return Reference(text, "directory", str(path))
    if path.is_file():
        return Reference(text, "file", str(path))
    meant_here = path.parent.is_dir() and bare == text  # runs/ft beside an existing runs is no hub id
    named = ":" in bare or path.suffix in SUFFIXES or path.is_absolute() or bare.startswith("~")
    if meant_here or named or bare.count("/") != 1:
        raise UsageError(f"there is no model at {bare!r}", FORMS)
    return Reference(text, "hub", bare)


def _named(text: str, kind: Kind, rest: str) -> Reference:
    """Return NAME/TAG or NAME/FILE, the file relative or absolute; or a directory for that library."""
    whole = at_home(rest)
    if whole.is_dir():
        return Reference(text, "directory", str(whole), kind)
    name, _, weights = rest.partition("/")
    if not name:
        raise UsageError(f"{text!r} names no configuration", FORMS)
    for place in (weights, f"/{weights}"):
        if weights and at_home(place).is_file():
            return Reference(text, kind, name, str(at_home(place)))
    if Path(weights).suffix in SUFFIXES:
        raise UsageError(f"{text!r}: there is no file {weights!r}", FORMS)
    return Reference(text, kind, name, weights)


def placed(ref: str, place: Path) -> str:
    """Return the reference to weights at another place, with the library and configuration that this one names.

    >>> placed("oc:ViT-B-32/runs/ft.pt", Path("/models/merged.pt")), placed("runs/ft", Path("/models/merged"))
    ('oc:ViT-B-32//models/merged.pt', '/models/merged')
    """
    kind, _, rest = ref.partition(":")
    if kind not in ("oc", "timm"):
        return str(place)
    whole = place.is_dir() or at_home(rest).is_dir()
    return f"{kind}:{place}" if whole else f"{kind}:{rest.partition('/')[0]}/{place}"


def absolute(ref: str) -> str:
    """Return the reference as it is meant in every working directory: with the whole path of what lies on disk.

    >>> absolute("oc:ViT-B-32/openai"), absolute("py:my.models:make")
    ('oc:ViT-B-32/openai', 'py:my.models:make')
    """
    try:
        found = parsed(ref)
    except UsageError:  # gone since it was read
        return ref
    place = found.path if found.kind in ("directory", "file") else found.file
    return ref if place is None else placed(ref, place.absolute())
