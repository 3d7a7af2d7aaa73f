"""Recipes: the packaged ones, the round trip, and one readable sentence for every mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline import recipe
from pipeline.layers import QuantConv2d

GOOD = """
[model]
name = "vgg_small"
widths = [8, 16]
pool_after = []
[quantize]
group = 4
[train]
epochs = 3
[data]
name = "digits"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.toml"


@pytest.mark.parametrize("name", recipe.names())
def test_packaged_recipes_build_and_survive_a_round_trip(name: str) -> None:
    read = recipe.load(name)
    assert recipe.parse(read.model_dump(mode="json"), "checkpoint") == read
    image_shape = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "folder": (3, 32, 32)}[read.data.name]
    assert any(isinstance(layer, QuantConv2d) for layer in read.build(image_shape, 10).modules())


def test_a_file(file: Path) -> None:
    file.write_text(GOOD)
    read = recipe.load(file)
    assert read.train.epochs == 3
    assert read.quantize.group == 4
    assert read.model.model_dump() == {"name": "vgg_small", "quantize": True, "widths": (8, 16), "pool_after": ()}
    layer = next(layer for layer in read.build((1, 8, 8), 10).modules() if isinstance(layer, QuantConv2d))
    assert layer.weight_quantizer.group == 4


def test_options_of_quantisers(file: Path) -> None:
    options = "weight = 'dorefa'\nactivation = 'dorefa'\nweight_options = {bits = 2}\nactivation_options = {bits = 3}"
    file.write_text(GOOD.replace("group = 4", options))
    read = recipe.load(file)
    assert read.quantize.label == "2w3a"
    assert recipe.parse(read.model_dump(mode="json"), "checkpoint") == read
    layer = next(layer for layer in read.build((1, 8, 8), 10).modules() if isinstance(layer, QuantConv2d))
    assert (layer.weight_quantizer.bits, layer.activation_quantizer.bits) == (2, 3)


def test_the_float_twin(file: Path) -> None:
    file.write_text(GOOD.replace("widths", "quantize = false\nwidths"))
    assert not any(isinstance(layer, QuantConv2d) for layer in recipe.load(file).build((1, 8, 8), 10).modules())


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("epochs = 3", "epochs = 0", "train.epochs = 0: should be greater than 0"),
        ("epochs = 3", "epochs = 'three'", "train.epochs = 'three': should be a valid integer"),
        ("epochs = 3", "", "train.epochs is missing"),
        ("epochs = 3", "epochs = 3\nlrr = 1", "train.lrr does not exist: choose from epochs, batch"),
        ("epochs = 3", "epochs = 3\noptimizer = 'adam'", "train.optimizer = 'adam': should be 'adamw' or 'sgd'"),
        ("epochs = 3", "epochs = 3\nschedule = 'step'", "train: milestones belong to schedule = 'step'"),
        ("group = 4", "group = 0", "quantize: group = 0: a scale is shared"),
        ("group = 4", "groups = 4", "quantize.groups does not exist: choose from weight, activation, group"),
        ("group = 4", "weight = 'xnor'", "quantize: there is no weight quantiser 'xnor': choose one of bc, binarynet"),
        ("group = 4", "weight_options = {gradient = 'none'}", "quantize: gradient = 'none': choose 'published' or"),
        (
            "group = 4",
            "weight_options = {bits = 2}",
            "quantize: weight 'bwn' has no option 'bits': choose from gradient",
        ),
        (
            "group = 4",
            "activation_options = {bits = 2}",
            "quantize: activation 'xnor' has no option 'bits': it has none",
        ),
        ("group = 4", "weight_options = 2", "quantize.weight_options = 2: should be a valid dictionary"),
        (
            "group = 4",
            "weight = 'ttq'\ngroup = 4",
            "quantize: group = 4: weight 'ttq' has no scale per filter to share",
        ),
        ("vgg_small", "lenet", "model.name = 'lenet': choose one of alexnet, nin, resnet18"),
        ('name = "vgg_small"', "", "model.name is missing: give one of alexnet"),
        ("widths", "width", "model.width does not exist: choose from name, quantize, widths, pool_after"),
        ("[8, 16]", "[8, 'x']", "model.widths.1 = 'x': should be a valid integer"),
        ('name = "digits"', 'name = "mnist"', "data.name = 'mnist': should be 'digits', 'cifar10' or 'folder'"),
        ("[data]", "[dataset]", "data is missing"),
        ("[quantize]", "[quantise]", "quantise does not exist: choose from model, quantize, train, data"),
        ("[model]", "[model", "not TOML"),
    ],
)
def test_mistakes(file: Path, old: str, new: str, sentence: str) -> None:
    assert old in GOOD
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(f"{file}: {sentence}")) as error:
        recipe.load(file)
    assert "\n" not in str(error.value)


def test_unknown_names_list_the_packaged_ones(file: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe 'mnist': give a \.toml file or one of cifar10, digits"):
        recipe.load("mnist")
    with pytest.raises(ValueError, match=r"no such file; packaged recipes are cifar10, digits"):
        recipe.load(file)
