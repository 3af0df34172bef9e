"""A model that gives logits itself: transformers' and timm's classifiers, modules of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sharpscope.errors import DataError, UsageError
from sharpscope.models.checkpoint import own_tensors
from sharpscope.models.library import module_facts
from sharpscope.models.transfer import check_same_library, load_into

if TYPE_CHECKING:
    from PIL.Image import Image


class LogitsModel:
    """An image classifier as :func:`load` read it.

    Attributes
    ----------
    name
        The reference it was loaded by.
    network
        The module, float32, in evaluation mode.
    classes
        The words of its outputs in their order, None if they are not known.
    where
        The directory or file that the weights were read from, None if that is a name.
    """

    templates: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        network: nn.Module,
        *,
        preprocess: Callable[[Image], Any] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        classes: Sequence[str] | None = None,
        where: Path | None = None,
    ) -> None:
        self.name = name
        self.network = network
        self.classes = None if classes is None else tuple(classes)
        self.where = where
        self._preprocess = preprocess
        self._preprocessing = preprocessing

    def preprocess(self, image: Image) -> Tensor:
        """Return the image as the model takes it; ``UsageError`` if its preprocessing is not known."""
        if self._preprocess is None:
            raise UsageError(
                f"the preprocessing of {self.name} is not known",
                "folder(path, FUNCTION) with a function from a PIL image to a tensor, or a factory that returns both",
            )
        return torch.as_tensor(self._preprocess(image))

    def architecture(self) -> Mapping[str, Any]:
        """Return the settings that decide what the weights mean."""
        return module_facts(self.network)

    def preprocessing(self) -> Mapping[str, Any] | None:
        """Return the settings of the preprocessing, None if they are not known."""
        return self._preprocessing

    def classifier(self, classes: Sequence[str] | None) -> nn.Module:
        """Return the network, after comparing its classes with those of the data.

        Raises
        ------
        DataError
            If the data's classes are not the outputs, in their order.
        """
        if classes is None or self.classes is None or tuple(classes) == self.classes:
            return self.network
        wrong = next(((i, a, b) for i, (a, b) in enumerate(zip(self.classes, classes, strict=False)) if a != b), None)
        found = (
            f"output {wrong[0]} of {self.name} is {wrong[1]!r}, class {wrong[0]} of the data {wrong[2]!r}"
            if wrong
            else f"{self.name} has {len(self.classes)} outputs, the data {len(classes)} classes"
        )
        raise DataError(found, "sharpscope.folder(path, model, classes=model.classes): folders are matched by name")

    def with_tensors(
        self, name: str, tensors: Mapping[str, Tensor], *, where: Path | None = None, convert: bool = False
    ) -> LogitsModel:
        """Return a copy of this model with the weights of a file; see :func:`sharpscope.models.transfer.load_into`."""
        if convert:
            raise UsageError("convert is for CLIPs of open_clip and transformers", "leave it out")
        network = deepcopy(self.network)
        check_same_library(network.state_dict(), tensors, (self.name, name))
        load_into(network, own_tensors(network, tensors, where or name), where or name)
        return LogitsModel(
            name,
            network,
            preprocess=self._preprocess,
            preprocessing=self._preprocessing,
            classes=self.classes,
            where=where,
        )

    def __repr__(self) -> str:
        size = sum(tensor.numel() for tensor in self.network.parameters())
        return f"classifier {self.name} ({type(self.network).__name__}): {size:,} weights"
