"""A training run as a TOML file: the network, how it is quantised and trained, and on what."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    model_validator,
)
from torch import nn

from pipeline import data, models
from pipeline.models import ImageShape, Quantize, Stacked

_PACKAGED = Path(__file__).with_name("recipes")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(_Section):
    """``[model]``: the network's name, whether it is quantised, and the options of its ``build``."""

    name: str
    quantize: bool = True


class Train(_Section):
    """``[train]``. Milestones are epochs after which the learning rate is multiplied by gamma; pad is in pixels."""

    epochs: PositiveInt
    batch: PositiveInt = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    momentum: NonNegativeFloat = 0.9
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: tuple[PositiveInt, ...] = ()
    gamma: PositiveFloat = 0.1
    seed: NonNegativeInt = 0
    augment: Literal["none", "crop_flip"] = "none"
    pad: NonNegativeInt = 4

    @model_validator(mode="after")
    def _milestones(self) -> Train:
        if bool(self.milestones) != (self.schedule == "step"):
            raise ValueError("milestones belong to schedule = 'step': give both or neither")
        return self


class Data(_Section):
    """``[data]``: which reader of `pipeline.data`; where the files lie is no part of the recipe."""

    name: data.Name


def _with_options(name: str) -> type[Model]:
    parameters = signature(models.load(name), eval_str=True).parameters.values()
    fields: Any = {p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
    return create_model(name, __base__=Model, **{"name": (Literal[name], ...), **fields})


_MODELS = {name: _with_options(name) for name in models.names()}
if TYPE_CHECKING:  # mypy reads no union that is made at run time
    _AnyModel = Model
else:
    _AnyModel = Annotated[Union[tuple(_MODELS.values())], Field(discriminator="name")]  # noqa: UP007


class Recipe(_Section):
    """A recipe; `parse` and `load` make one.

    ``[groups]`` is M of single layers by their name in the network, instead of ``quantize.group``; `crossbit convert`
    writes it.
    """

    model: _AnyModel
    quantize: Quantize = Quantize()
    groups: dict[str, PositiveInt] = {}
    train: Train
    data: Data

    @property
    def label(self) -> str:
        """Bits of weights and activations, and M: '1w1a/16', or '1w1a/mixed' where layers differ; 'float'."""
        if not self.model.quantize:
            return "float"
        return replace(self.quantize, group=1).label + "/mixed" if self.groups else self.quantize.label

    def build(self, image_shape: ImageShape, classes: int) -> nn.Module:
        """The network, newly initialised.

        Raises:
            ValueError: ``groups`` names what is no layer whose filters may share a scale.
        """
        options = self.model.model_dump(exclude={"name", "quantize"})
        network = models.build(
            self.model.name, image_shape, classes, self.quantize if self.model.quantize else None, **options
        )
        layers = dict(network.named_modules())
        for name, group in self.groups.items():
            quantizer: Any = getattr(layers.get(name), "weight_quantizer", None)
            if not hasattr(quantizer, "group"):
                raise ValueError(f"groups.{name}: the network has no such layer with scales to share, leave it out")
            quantizer.group = group
        return network


def names() -> list[str]:
    """The packaged recipes."""
    return sorted(file.stem for file in _PACKAGED.glob("*.toml"))


def parse(tables: dict[str, Any], where: str) -> Recipe:
    """The recipe that ``tables`` spell.

    Raises:
        ValueError: a sentence with ``where``, the first wrong field and what is wrong.
    """
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        raise ValueError(f"{where}: {_sentence(error)}") from None


def load(source: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        source: a ``.toml`` file, or the name of a packaged recipe.

    Raises:
        ValueError: no such recipe, or a wrong one.
    """
    file = Path(source)
    if file.suffix != ".toml":
        if str(source) not in names():
            raise ValueError(f"there is no recipe '{source}': give a .toml file or one of {', '.join(names())}")
        file = _PACKAGED / f"{source}.toml"
    try:
        return parse(tomllib.loads(file.read_text()), str(file))
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such file; packaged recipes are {', '.join(names())}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file}: not TOML: {error}") from None


def _sentence(error: ValidationError) -> str:
    """The first of pydantic's findings."""
    first = error.errors()[0]
    section, *rest = (str(part) for part in first["loc"])
    kind: Any = Recipe.model_fields[section].annotation if rest and section != "model" else Recipe
    if section == "model" and rest:  # pydantic puts the network's name behind the section
        kind = _MODELS[rest.pop(0)]
    kind = Stacked if rest[:-1] == ["stacked"] else kind
    field = ".".join([section, *rest])
    match first["type"]:
        case "missing":
            return f"{field} is missing"
        case "union_tag_not_found":
            return f"model.name is missing: give one of {', '.join(_MODELS)}"
        case "union_tag_invalid":
            return f"model.name = '{first['ctx']['tag']}': choose one of {', '.join(_MODELS)}"
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{field} does not exist: choose from {', '.join(signature(kind).parameters)}"
        case "value_error":
            return f"{field}: {first['ctx']['error']}"
    return f"{field} = {first['input']!r}: {first['msg'].removeprefix('Input ')}"
