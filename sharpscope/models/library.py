"""What a library's CLIP must be able to do to be scanned: one adapter per library has these verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image

    from sharpscope.models.classifier import ImageFeatures, TextFeatures


class ClipLibrary(Protocol):
    """A CLIP of one library.

    Attributes
    ----------
    name
        ``"transformers"`` or ``"open_clip"``.
    network
        Both towers, float32, in evaluation mode, with ``logit_scale`` and, for SigLIP, ``logit_bias``.
    towers
        Names of the children of the network that make the image side.
    size
        Height and width of the images.
    """

    name: str
    network: Any
    towers: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        ...

    @property
    def image_features(self) -> ImageFeatures:
        """A function of a module that holds the towers, and images (n, 3, height, width): features (n, width)."""
        ...

    def tokens(self, texts: Sequence[str], *, cut: bool = False) -> Mapping[str, Tensor]:
        """Return what the text tower takes; ``UsageError`` if a text is too long and not to be cut, or not readable."""
        ...

    @property
    def text_features(self) -> TextFeatures:
        """A function of a CLIP of this library and tokens: text features (n, width), not normalised."""
        ...

    def preprocess(self, image: Image) -> Tensor:
        """Return the image as the model takes it, (3, height, width) float32."""
        ...

    def architecture(self) -> Mapping[str, Any]:
        """Return the settings that decide what the weights mean."""
        ...

    def preprocessing(self) -> Mapping[str, Any] | None:
        """Return the settings of the preprocessing, None if the checkpoint has none."""
        ...

    def vocabulary(self) -> Mapping[str, int] | None:
        """Return the tokens with their numbers, None if the checkpoint has no tokenizer."""
        ...


# Names of one function in several libraries.
_ACTIVATIONS = {
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
}
_VISUAL = ("visual", "vision_model", "vit")
_TEXT = ("text", "text_model", "transformer")


def module_facts(network: nn.Module) -> dict[str, Any]:
    """Return what changes the function without changing a shape: activations, heads and epsilons of each tower."""
    found: dict[str, set[Any]] = {}
    for name, module in network.named_modules():
        root = name.partition(".")[0]
        tower = "image tower" if root in _VISUAL else "text tower" if root in _TEXT else "model"
        kind = type(module).__name__
        if kind in _ACTIVATIONS:
            tanh = kind == "GELU" and getattr(module, "approximate", "none") == "tanh"
            found.setdefault(f"activation of the {tower}", set()).add("gelu_tanh" if tanh else _ACTIVATIONS[kind])
        heads = getattr(module, "num_heads", getattr(module, "num_attention_heads", None))
        if isinstance(heads, int):
            found.setdefault(f"attention heads of the {tower}", set()).add(heads)
        if isinstance(module, nn.LayerNorm):
            found.setdefault(f"layer norm epsilon of the {tower}", set()).add(module.eps)
    return {name: sorted(values)[0] if len(values) == 1 else sorted(values) for name, values in sorted(found.items())}


def plain(value: Any) -> Any:
    """Return a setting in a form that compares across versions: lists for tuples, sides without those that are None."""
    if isinstance(value, Mapping):
        return {key: side for key, side in sorted(value.items()) if side is not None}
    return list(value) if isinstance(value, tuple) else value
