"""Reading what transformers saved, and saying in a sentence why it cannot be read. No code from a checkpoint runs."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError

from sharpscope.errors import ModelError, UsageError

SHARED_FILES = "model.save_pretrained(DIR) and processor.save_pretrained(DIR) write everything that is needed"
_UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    KeyError,
    TypeError,
    SafetensorError,
    pickle.UnpicklingError,
)


def transformers() -> ModuleType:
    """Return the library; ``UsageError`` if it is not installed."""
    try:
        import transformers as found
    except ImportError as error:
        raise UsageError(
            "reading a CLIP needs the package transformers, which is not installed",
            'pip install "sharpscope[clip]"',
        ) from error
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back progress bars and notices of transformers: what matters in them is raised here as an error."""
    logging = transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def source(ref: str | Path) -> str:
    """Return the directory or hub id that a reference means; ``hf:`` before it tells it from a missing directory.

    Raises
    ------
    UsageError
        If it looks like a path and nothing is there, or is of a kind that is not read.
    ModelError
        If it is a single file of weights.
    """
    text = str(ref).removeprefix("hf:")
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise _single_file(path)
    if text.startswith(("oc:", "py:", "wds:")):
        raise UsageError(
            f"{text!r}: open_clip models and factories are not read by name", "pass the module itself to scan"
        )
    meant_here = path.parent.is_dir() and text == str(ref)  # runs/ft beside an existing runs is no hub id
    if meant_here or path.is_absolute() or text.startswith("~") or text.count("/") != 1:
        raise UsageError(f"there is no model at {text!r}", "a directory with config.json, or a hub id OWNER/NAME")
    return text


def is_pickled_code(path: Path) -> bool:
    """Return whether loading the file would run code from it, without running any."""
    import torch

    try:
        torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError:
        return True
    except _UNREADABLE:
        return False
    return False


def _pickled(path: Path) -> ModelError:
    return ModelError(
        f"{path} is a pickled module, not tensors; loading it would run code from the file",
        "save it where it was trained: model.save_pretrained(DIR), or torch.save(model.state_dict(), FILE)",
    )


def _single_file(path: Path) -> ModelError:
    if path.suffix != ".safetensors" and is_pickled_code(path):
        return _pickled(path)
    return ModelError(
        f"{path} holds weights only, not the architecture, tokenizer and preprocessing of a CLIP", SHARED_FILES
    )


def read_config(where: str) -> dict[str, Any]:
    """Return the configuration as stored.

    Raises
    ------
    ModelError
        If there is none, it is unreadable, or it is not a CLIP's.
    """
    with quiet():
        try:
            found: dict[str, Any] = transformers().CLIPConfig.get_config_dict(where)[0]
        except _UNREADABLE as error:
            raise _unreachable(where, error) from error
    if not found:
        raise ModelError(f"{where} has no config.json", SHARED_FILES)
    if found.get("model_type") != "clip":
        raise ModelError(
            f"{where} is a {found.get('model_type')!r} model ({', '.join(found.get('architectures') or ['?'])})",
            "a CLIPModel; any other network can be passed to scan as a module whose forward gives logits",
        )
    return found


def _unreachable(where: str, error: BaseException) -> ModelError:
    if Path(where).is_dir():
        return ModelError(f"{where} cannot be read: {_first_line(error)}", SHARED_FILES)
    return ModelError(
        f"{where!r} is no directory here and could not be fetched from the Hugging Face hub: {_first_line(error)}",
        "check the spelling and the network, or download the model and pass its directory",
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def read_model(where: str) -> Any:
    """Return the ``CLIPModel`` in float32 and evaluation mode.

    Raises
    ------
    ModelError
        If files are missing, damaged, pickled code, or do not hold every weight of a CLIP.
    """
    pickled = Path(where) / "pytorch_model.bin"
    if pickled.is_file() and not list(Path(where).glob("*.safetensors*")) and is_pickled_code(pickled):
        raise _pickled(pickled)
    with quiet():
        try:
            model, info = transformers().CLIPModel.from_pretrained(where, output_loading_info=True)
        except _UNREADABLE as error:
            raise _unreachable(where, error) from error
    _check_complete(where, info)
    return model.float().eval()


def _check_complete(where: str, info: dict[str, Any]) -> None:
    """Raise if a weight was made up: transformers fills what it does not find with random numbers."""
    # A set of names in transformers 5, a list before; a mismatch is a tuple that starts with the name.
    absent = sorted(info["missing_keys"]) + sorted(str(item) for item in info["mismatched_keys"])
    if absent:
        raise ModelError(
            f"{where} lacks {len(absent)} weights of a CLIPModel ({absent[0]}, ...)",
            "save the whole CLIPModel, both towers: model.save_pretrained(DIR)",
        )
    besides = [name for name in sorted(info["unexpected_keys"]) if not name.endswith("position_ids")]
    if besides:
        raise ModelError(
            f"{where} holds {len(besides)} weights that a CLIPModel does not have ({besides[0]}, ...)",
            "merge adapters and remove wrappers before saving: model.save_pretrained(DIR) of a plain CLIPModel",
        )


def read_tokenizer(where: str) -> Any:
    """Return the tokenizer; ``ModelError`` if its files are missing or damaged."""
    with quiet():
        try:
            found = transformers().AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        except _UNREADABLE as error:
            raise ModelError(f"the tokenizer of {where} cannot be read: {_first_line(error)}", SHARED_FILES) from error
    # Without any file transformers 5 returns a tokenizer that knows its special tokens only.
    if len(found.get_vocab()) <= len(found.all_special_tokens):
        raise ModelError(f"{where} has no tokenizer (tokenizer.json, or vocab.json and merges.txt)", SHARED_FILES)
    return found


def read_image_processor(where: str) -> Any:
    """Return the image preprocessing that works on PIL images and numpy, not on torchvision.

    Raises
    ------
    ModelError
        If ``preprocessor_config.json`` is missing or damaged.
    """
    library = transformers()
    # transformers 5 gave the name of the PIL processor to one that needs torchvision.
    kind = getattr(library, "CLIPImageProcessorPil", None) or library.CLIPImageProcessor
    with quiet():
        try:
            return kind.from_pretrained(where)
        except _UNREADABLE as error:
            raise ModelError(
                f"the preprocessing of {where} cannot be read (preprocessor_config.json)", SHARED_FILES
            ) from error
