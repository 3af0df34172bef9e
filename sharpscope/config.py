"""Settings of the report command: one schema for flags and for the configuration file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from sharpscope.errors import UsageError, nearest
from sharpscope.home import at_home
from sharpscope.journal import replace_text
from sharpscope.losses import Towers
from sharpscope.measures import DEFAULT
from sharpscope.models.reference import absolute as absolute_model
from sharpscope.partition import Granularity
from sharpscope.sources import absolute
from sharpscope.toml import read_toml, toml, underscored

FILE = "config.resolved.toml"


class Settings(BaseModel):
    """What a report is made of. Keys of the file and flags are these names, written with - or _."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    zero_shot: str = Field(description="the zero-shot model: a directory, hub id, oc:NAME/TAG, timm:NAME, file")
    fine_tuned: str = Field(description="its fine-tuned self")
    convert: Literal["no", "auto"] = Field(default="no", description="convert weights of another library's CLIP")
    id: str = Field(description="in-distribution images: a folder per class, wds:DIR, py:module:name")
    ood: dict[str, str] = Field(default={}, description="name -> images of each out-of-distribution set")
    sharpness_on: str | None = Field(default=None, description="images that sharpness is measured on")
    objective: Towers = Field(default="image", description="what the loss is a function of")
    captions: bool = Field(default=False, description="pair images with their captions, not prompts of their classes")
    classnames: str | None = Field(default=None, description="words of each class folder or label")
    templates: str | None = Field(default=None, description="sentences that class names are put into")
    subset: bool = Field(default=False, description="leave out folders that are no ID class, or no output")
    measures: tuple[str, ...] = Field(default=DEFAULT, description="what is measured")
    tolerance: float = Field(default=1.0, gt=0, description="times the usual target errors: 2 is coarser and quicker")
    m: int | None = Field(default=None, ge=1, description="images per group of m-sharpness; default 32")
    alphas: int | tuple[float, ...] = Field(default=11, description="number of points, or the points")
    limit: int | None = Field(default=256, description="most images that sharpness is measured on")
    images: int | None = Field(default=None, ge=1, description="most images of each set, drawn by class; default all")
    batch_size: int = Field(default=64, description="images whose gradient graph is built at once")
    granularity: Granularity = Field(default="block", description="what a layer is")
    interventions: bool | None = Field(default=None, description="whether layers are moved one at a time")
    intervention_limit: int | None = Field(
        default=512, ge=2, description="most images per set that moves are judged on"
    )
    recipes: bool = Field(default=False, description="whether recipes with an alpha per layer are tried")
    recipe_limit: int = Field(default=60, ge=1, description="most recipes that are tried")
    chains: int = Field(default=1, ge=1, description="runs of alphas that are measured independently of each other")
    parallel: Literal["data", "alphas", "weights"] | None = Field(
        default=None, description="what processes of torchrun share"
    )
    memory: ByteSize | None = Field(default=None, gt=0, description="what a process may take of its device, e.g. 40GiB")
    device: str | None = Field(default=None, description="where to compute")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of torch; default its own choice")
    seed: int = Field(default=0, ge=0, description="number that all draws follow from, 0 or more")
    deterministic: bool = Field(default=False, description="only algorithms that repeat bit by bit; slower on a GPU")
    out: str = Field(default="sharpscope-report", description="folder that everything is written to")

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false as 1 and 0, which is how pydantic reads them where a number is wanted."""
        listed = value if isinstance(value, list | tuple) else [value]
        wanted = str(cls.model_fields[info.field_name or ""].annotation)
        if any(isinstance(item, bool) for item in listed) and "bool" not in wanted:
            raise ValueError("input should be no truth value")
        return value

    @field_validator("out")
    @classmethod
    def _at_home(cls, value: str) -> str:
        """A shell leaves the ~ of ``--out=~/report`` to the command."""
        return str(at_home(value))

    @field_validator("captions")
    @classmethod
    def _paired(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("objective") != "contrastive":
            raise ValueError("captions are read for --objective contrastive only")
        return value

    @field_validator("ood", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Take ``["NAME=DIR", ...]`` as a mapping."""
        return _by_name(value) if isinstance(value, list | tuple) else value

    @field_validator("measures", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("alphas", mode="before")
    @classmethod
    def _points(cls, value: Any) -> Any:
        """Take ``"11"`` as a number of points and ``"0,0.5,1"`` as the points."""
        if not isinstance(value, str):
            return value
        return int(value) if value.strip().isdigit() else [float(part) for part in value.split(",") if part.strip()]

    @field_validator("limit", "intervention_limit", mode="before")
    @classmethod
    def _all(cls, value: Any) -> Any:
        return None if value == "all" else value


def _by_name(items: Iterable[Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in items:
        name, equals, place = str(item).partition("=")
        if not (name and equals and place):
            raise ValueError(f"{item!r} is not NAME=DIR")
        if name in found:
            raise ValueError(f"the name {name!r} is given twice")
        found[name] = place
    return found


def named_places(items: Iterable[str]) -> dict[str, str]:
    """Return name -> place of ``["NAME=DIR", ...]``; ``UsageError`` if one is no such pair.

    >>> named_places(["sketch=data/sketch"])
    {'sketch': 'data/sketch'}
    """
    try:
        return _by_name(items)
    except ValueError as error:
        raise UsageError(f"--ood: {error}", "--ood NAME=DIR, each name once") from error


def flag(name: str) -> str:
    """Return a key as it is written on the command line.

    >>> flag("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def settings(flags: Mapping[str, Any], config: str | Path | None = None) -> Settings:
    """Return the settings of a file and of flags; flags win, a flag that is None was not given.

    Raises
    ------
    UsageError
        For the first key that is unknown (with the nearest known one), missing or of a wrong kind.
    """
    stored = {} if config is None else read_config(at_home(config))
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**{**stored, **given})
    except ValidationError as error:
        raise _usage(error.errors()[0]) from error


def read_config(path: Path) -> dict[str, Any]:
    """Return the keys of a TOML file, with _ for -; ``UsageError`` if there is none or it is no TOML."""
    return underscored(read_toml(path, "configuration file"), path)


def _usage(fault: Mapping[str, Any]) -> UsageError:
    name = str(fault["loc"][0])
    if fault["type"] == "extra_forbidden":
        return UsageError(f"{name!r} is no setting", nearest(name, Settings.model_fields))
    what = Settings.model_fields[name].description
    if fault["type"] == "missing":
        return UsageError(f"{flag(name)} is missing: {what}", f"{flag(name)} ..., or {name!r} in the --config file")
    found = fault["msg"].removeprefix("Value error, ")
    return UsageError(f"{flag(name)}: {found[:1].lower()}{found[1:]}, found {fault['input']!r}", what)


def write_config(chosen: Settings, folder: str | Path) -> Path:
    """Write the settings as a file that ``--config`` reads back from every working directory; return its path.

    What was measured is named by its whole path; ``out`` stays as it is, so that no copy writes over the original.
    """
    plain = {name: value for name, value in _anywhere(chosen).model_dump().items() if value is not None}
    tables = {name: value for name, value in plain.items() if isinstance(value, dict)}
    lines = [f"{name} = {toml(value)}" for name, value in plain.items() if name not in tables]
    lines += [f'{name} = "all"' for name in ("limit", "intervention_limit") if getattr(chosen, name) is None]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{toml(key)} = {toml(value)}" for key, value in table.items())]
    path = at_home(folder) / FILE
    replace_text(path, "\n".join(lines) + "\n")
    return path


def _anywhere(chosen: Settings) -> Settings:
    """Return the settings with whole paths in the place of those that depend on the working directory."""
    files = {name: place for name in ("classnames", "templates") if (place := getattr(chosen, name)) is not None}
    return chosen.model_copy(
        update={
            "zero_shot": absolute_model(chosen.zero_shot),
            "fine_tuned": absolute_model(chosen.fine_tuned),
            "id": absolute(chosen.id),
            "ood": {name: absolute(place) for name, place in chosen.ood.items()},
            "sharpness_on": chosen.sharpness_on and absolute(chosen.sharpness_on),
            **{name: str(at_home(place).absolute()) for name, place in files.items()},
        }
    )
