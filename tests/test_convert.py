"""Sharing the scales of trained networks: its price, its choice, and that stored and float parents give the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from networks import compiled
from onnx import numpy_helper

from pipeline import convert, data, recipe, train
from pipeline.data import Dataset, Split
from pipeline.export import export
from pipeline.packaging import oracle
from pipeline.quantizers.bwn import encode
from pipeline.similarity import LayerScales, pick

TABLES: dict[str, dict[str, Any]] = {
    "model": {"name": "vgg_small", "widths": [8, 12, 20], "pool_after": [0]},
    "quantize": {"weight": "bwn", "activation": "xnor", "group": 1},
    "train": {"epochs": 1, "batch": 32, "lr": 0.003},
    "data": {"name": "digits"},
}
GROUPS = {"3": 4, "5": 16}  # M of the 12 and the 20 filters


@pytest.fixture(scope="module")
def digits() -> Dataset:
    whole = data.load("digits", None)
    return Dataset(
        whole.name, whole.classes, *(Split(half.images[:320], half.labels[:320]) for half in (whole.train, whole.test))
    )


def trained(digits: Dataset, out: Path, **model: Any) -> Path:
    train.train(recipe.parse(TABLES | {"model": TABLES["model"] | model}, "tiny"), digits, out)
    return out


@pytest.fixture(scope="module")
def run(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filter-wise run and its ONNX file. Read it, do not write to it."""
    out = trained(digits, tmp_path_factory.mktemp("filterwise") / "run")
    export(train.load(out).model, digits.image_shape, out / "model.onnx")
    return out


@pytest.fixture(scope="module")
def float_run(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(digits, tmp_path_factory.mktemp("float") / "run", quantize=False)


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def assert_same_network(a: Path, b: Path) -> None:
    """The same nodes and tensors, but for the float32 rounding of shared scales: one was the mean of rounded ones."""
    nodes = [[(n.op_type, list(n.input), list(n.attribute)) for n in onnx.load(path).graph.node] for path in (a, b)]
    assert nodes[0] == nodes[1]
    of_a, of_b = tensors(a), tensors(b)
    assert list(of_a) == list(of_b)
    for name, tensor in of_a.items():
        assert (tensor.shape, tensor.dtype) == (of_b[name].shape, of_b[name].dtype)
        np.testing.assert_allclose(tensor, of_b[name], rtol=2**-22 if name.endswith(".weight.scale") else 0)


def scales_of(weight: np.ndarray) -> LayerScales:
    return LayerScales("layer", weight[0].size, np.abs(weight).mean((1, 2, 3)))


# The price -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("filters", "group"), [(16, 1), (16, 4), (16, 16), (10, 4), (3, 8), (1, 1)])
def test_price_is_the_growth_of_the_error(filters: int, group: int, rng: np.random.Generator) -> None:
    weight = rng.normal(size=(filters, 5, 3, 3)) * rng.uniform(0.1, 2, (filters, 1, 1, 1))

    def error(alpha: np.ndarray) -> float:
        return float(((weight - alpha.reshape(-1, 1, 1, 1) * np.sign(weight)) ** 2).sum())

    layer = scales_of(weight)
    slices = [weight[i : i + group] for i in range(0, filters, group)]
    shared = np.array([np.abs(s).mean() for s in slices])  # eq 8, of the slice; eq 16 says it is the mean of scales
    np.testing.assert_allclose(layer.shared(group), shared, rtol=1e-12)
    growth = error(shared.repeat(group)[:filters]) - error(layer.scales)
    assert layer.price(group) == pytest.approx(growth, rel=1e-9, abs=1e-9 * error(layer.scales))
    kept = float((weight**2).sum()) - error(layer.scales)
    assert layer.relative_price(group) == pytest.approx(layer.price(group) / kept, rel=1e-9)


def test_prices_never_fall_as_groups_grow(rng: np.random.Generator) -> None:
    for filters in (1, 2, 7, 64, 96):
        layer = LayerScales("layer", 9, rng.uniform(0.1, 1, filters))
        prices = [layer.relative_price(m) for m in layer.groups()]
        assert layer.groups()[-1] == filters and len(set(layer.groups())) == len(layer.groups())
        assert prices == sorted(prices) and prices[0] == 0 and prices[-1] <= 1


def test_budget_picks_the_largest_group_within_it(rng: np.random.Generator) -> None:
    layer = LayerScales("layer", 9, rng.uniform(0.1, 1, 40))
    for group in layer.groups():
        price = layer.relative_price(group)
        picked = layer.largest_group(price)
        assert picked >= group and layer.relative_price(picked) <= price
    assert layer.largest_group(0) == 1
    assert layer.largest_group(1) == 40
    # float32 scales as stored: the mean of equal ones is exact in float64
    equal = LayerScales("equal", 9, np.full(40, np.float32(0.1), np.float64))
    pairs = LayerScales("pairs", 9, rng.uniform(0.1, 1, 20).astype(np.float32).repeat(2).astype(np.float64))
    dead = LayerScales("dead", 9, np.zeros(8))
    assert pick([layer, equal, pairs, dead], None, 0) == {"layer": 1, "equal": 40, "pairs": 2, "dead": 8}
    assert pick([layer, equal], 16, None) == {"layer": 16, "equal": 16}


def test_the_stored_network_needs_no_float_parent(seed: int) -> None:
    weight = torch.randn(20, 6, 3, 3)
    stored = encode(weight, 1)
    for group in (2, 7, 16, 32):
        parent = encode(weight, group)
        shared = LayerScales("layer", 54, stored.scale.double().numpy()).shared(group)
        torch.testing.assert_close(parent.codes, stored.codes, rtol=0, atol=0)
        # the filter-wise scales were rounded to float32 before their mean
        np.testing.assert_allclose(shared, parent.scale.numpy(), rtol=2**-22)
        again = encode(stored.dequantize(), group)
        torch.testing.assert_close(again.codes, parent.codes, rtol=0, atol=0)
        torch.testing.assert_close(again.scale, parent.scale, rtol=2**-22, atol=0)


# Files and checkpoints -------------------------------------------------------------------------------------------


def test_a_file_and_its_checkpoint_have_the_same_scales(run: Path) -> None:
    of_run, of_file = convert.layers(run), convert.layers(run / "model.onnx")
    assert [(a.name, a.weights) for a in of_run] == [(b.name, b.weights) for b in of_file] == [("3", 72), ("5", 108)]
    for a, b in zip(of_run, of_file, strict=True):
        np.testing.assert_array_equal(a.scales, b.scales)


@pytest.mark.parametrize("groups", [{"3": 16, "5": 16}, GROUPS, {"3": 1, "5": 1}])
def test_converting_the_file_is_exporting_the_converted_checkpoint(
    groups: dict[str, int], run: Path, digits: Dataset, tmp_path: Path, seed: int
) -> None:
    convert.convert(run / "model.onnx", tmp_path / "file.onnx", groups)
    convert.convert(run, tmp_path / "run", groups)
    converted = train.load(tmp_path / "run")
    export(converted.model, digits.image_shape, tmp_path / "run.onnx")
    assert_same_network(tmp_path / "file.onnx", tmp_path / "run.onnx")
    before = tensors(run / "model.onnx")
    for name, tensor in tensors(tmp_path / "file.onnx").items():
        if name.endswith(".weight.scale"):
            assert len(tensor) == -(-len(before[name]) // groups[name.split(".")[0]])
        else:  # bits, batch norms and float layers are those of the filter-wise file
            np.testing.assert_array_equal(before[name], tensor)
    x = data.to_float(digits.test.images).numpy()
    logits, expected = (oracle(tmp_path / f).run(None, {"x": x})[0] for f in ("file.onnx", "run.onnx"))
    # a scale that is rounded otherwise may carry a sum over its threshold, in few of 320 images
    assert (logits.argmax(1) == expected.argmax(1)).mean() > 0.99
    (by_library,) = compiled(tmp_path / "file.onnx", [x])
    assert (by_library.argmax(1) == logits.argmax(1)).mean() > 0.99
    accuracy = train.evaluate(converted.model, digits.test.images, digits.test.labels)
    labels = digits.test.labels.numpy()
    assert (logits.argmax(1) == labels).mean() == pytest.approx(accuracy, abs=0.02)


@pytest.mark.parametrize("activation", ["binarynet", "real"])
def test_a_scale_that_several_nodes_read_and_real_activations(activation: str, tmp_path: Path, seed: int) -> None:
    tables = TABLES | {"quantize": {"activation": activation, "group": 1}}
    model = recipe.parse(tables, "tiny").build((1, 8, 8), 10).eval()
    export(model, (1, 8, 8), tmp_path / "model.onnx")
    layers = convert.layers(tmp_path / "model.onnx")
    assert [len(layer.scales) for layer in layers] == [12, 20]
    convert.convert(tmp_path / "model.onnx", tmp_path / "shared.onnx", pick(layers, 4, None))
    shared = recipe.parse(tables | {"groups": {layer.name: 4 for layer in layers}}, "tiny").build((1, 8, 8), 10)
    shared.load_state_dict(model.state_dict())
    export(shared, (1, 8, 8), tmp_path / "expected.onnx")
    assert_same_network(tmp_path / "shared.onnx", tmp_path / "expected.onnx")


def test_m_of_every_layer_is_in_the_recipe(run: Path, tmp_path: Path) -> None:
    convert.convert(run, tmp_path / "all", {"3": 16, "5": 16})
    convert.convert(run, tmp_path / "some", GROUPS)
    everywhere, some = train.load(tmp_path / "all"), train.load(tmp_path / "some")
    assert (everywhere.recipe.quantize.group, everywhere.recipe.groups) == (16, {})
    assert (some.recipe.groups, some.recipe.label, everywhere.recipe.label) == (GROUPS, "1w1a/mixed", "1w1a/16")
    assert some.history == ()
    before = train.load(run).model.state_dict()
    for name, tensor in some.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    scales = {
        name: m.weight_quantizer.encode(m.weight).scale for name, m in some.model.named_children() if name in GROUPS
    }
    assert {name: len(scale) for name, scale in scales.items()} == {"3": 3, "5": 2}
    again = convert.layers(tmp_path / "some")  # latent weights keep the filter-wise scales
    np.testing.assert_array_equal(again[0].scales, convert.layers(run)[0].scales)


def test_a_float_network_becomes_the_binary_one_of_its_weights(float_run: Path, tmp_path: Path) -> None:
    layers = convert.layers(float_run)
    assert [(layer.name, len(layer.scales)) for layer in layers] == [("3", 12), ("5", 20)]
    convert.convert(float_run, tmp_path / "cf", {"3": 4, "5": 4}, activation="bnn")
    converted = train.load(tmp_path / "cf")
    assert converted.recipe.model.quantize
    assert (converted.recipe.quantize.activation, converted.recipe.quantize.group) == ("bnn", 4)
    parent = train.load(float_run).model.state_dict()
    torch.testing.assert_close(converted.model.state_dict()["3.weight"], parent["3.1.weight"], rtol=0, atol=0)
    assert list(converted.model.state_dict()) != list(parent)


def test_fine_tuning_keeps_the_groups(run: Path, float_run: Path, digits: Dataset, tmp_path: Path) -> None:
    convert.convert(run, tmp_path / "cf", GROUPS)
    asked = recipe.parse(TABLES | {"quantize": {"group": 2}, "train": TABLES["train"] | {"epochs": 2}}, "tiny")
    chosen = train.start_recipe(asked, tmp_path / "cf")
    result = train.train(chosen, digits, tmp_path / "tuned", start=tmp_path / "cf")
    tuned = train.load(tmp_path / "tuned")
    assert len(result.history) == 2
    assert tuned.recipe.groups == GROUPS
    assert tuned.recipe.train.epochs == 2
    # the same command with --resume, of a finished run: nothing is left to do
    resumed = train.train(chosen, digits, tmp_path / "tuned", resume=True, start=tmp_path / "cf")
    assert resumed.history == result.history
    with pytest.raises(ValueError, match="a run of other first weights: give --start as when it was started"):
        train.train(chosen, digits, tmp_path / "tuned", resume=True, start=float_run)
    with pytest.raises(ValueError, match="a run of other first weights"):
        train.train(chosen, digits, tmp_path / "tuned", resume=True)


def test_start_begins_with_the_weights_it_is_given(run: Path, digits: Dataset, tmp_path: Path) -> None:
    begun = train._Run(train.load(run).recipe, digits, 0, 1)
    begun.begin_from(train.load(run).model.state_dict(), run)
    assert train.evaluate(begun.model, digits.test.images, digits.test.labels) == train.load(run).history[-1].test


# Refusals --------------------------------------------------------------------------------------------------------


def test_refusals_of_sources(run: Path, float_run: Path, digits: Dataset, tmp_path: Path) -> None:
    convert.convert(run / "model.onnx", tmp_path / "cf.onnx", GROUPS)
    with pytest.raises(ValueError, match=r"cf\.onnx: layer '3' has one scale for 4 filters"):
        convert.layers(tmp_path / "cf.onnx")
    with pytest.raises(ValueError, match="exists: give another place"):
        convert.convert(run / "model.onnx", tmp_path / "cf.onnx", GROUPS)
    with pytest.raises(ValueError, match="exists: give another place"):
        convert.convert(run, float_run, GROUPS)
    with pytest.raises(ValueError, match="there is no such file"):
        convert.layers(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        convert.layers(tmp_path / "none")
    for source in (run, run / "model.onnx"):
        with pytest.raises(ValueError, match=r"--activation bnn: .* is quantised already, leave it out"):
            convert.layers(source, "bnn")
    export(train.load(float_run).model, digits.image_shape, tmp_path / "float.onnx")
    with pytest.raises(ValueError, match=r"float\.onnx: has no layer of \+-1 weights with one scale per filter"):
        convert.layers(tmp_path / "float.onnx")


@pytest.mark.parametrize("weight", ["bc", "twn", "dorefa"])
def test_refusal_of_weights_without_a_scale_per_filter(weight: str, digits: Dataset, tmp_path: Path) -> None:
    other = recipe.parse(TABLES | {"quantize": {"weight": weight, "activation": "bnn"}}, "tiny")
    model = other.build(digits.image_shape, len(digits.classes)).eval()
    train.write(train.Trained(model, other, (), digits.image_shape, digits.classes), tmp_path)
    with pytest.raises(ValueError, match=r"has no layer of \+-1 weights with one scale per filter"):
        convert.layers(tmp_path)


def test_refusal_of_a_float_network_of_other_layers(digits: Dataset, tmp_path: Path) -> None:
    nin = recipe.parse(TABLES | {"model": {"name": "nin", "quantize": False}}, "nin")
    model = nin.build(digits.image_shape, len(digits.classes)).eval()
    train.write(train.Trained(model, nin, (), digits.image_shape, digits.classes), tmp_path)
    with pytest.raises(ValueError, match="are not, one by one, those of its quantised twin: train the quantised"):
        convert.layers(tmp_path)


def test_refusals_of_start(run: Path, float_run: Path, digits: Dataset, tmp_path: Path) -> None:
    chosen = train.load(run).recipe
    with pytest.raises(
        ValueError, match=r"of its tensors do not fit the recipe's network, the first is '3\.1\.weight'"
    ):
        train.train(chosen, digits, tmp_path / "a", start=float_run)
    wider = recipe.parse(TABLES | {"model": TABLES["model"] | {"widths": [8, 12, 24]}}, "wider")
    with pytest.raises(ValueError, match=r"6 of its tensors do not fit .* the first is '5\.weight'"):
        train.train(wider, digits, tmp_path / "b", start=run)
    convert.convert(run, tmp_path / "c", GROUPS)
    with pytest.raises(ValueError, match="holds weights and no run to go on with: give it to --start"):
        train.train(train.load(tmp_path / "c").recipe, digits, tmp_path / "c", resume=True)


def test_refusals_of_choices(digits: Dataset) -> None:
    layer = LayerScales("layer", 9, np.ones(4))
    for group, budget in ((None, None), (2, 0.1)):
        with pytest.raises(ValueError, match=r"give --group, .* or --budget"):
            pick([layer], group, budget)
    for budget in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="give 0 to 1"):
            pick([layer], None, budget)
    with pytest.raises(ValueError, match="give 1 or more"):
        layer.shared(0)
    with pytest.raises(ValueError, match=r"groups\.4: the network has no such layer with scales to share"):
        recipe.parse(TABLES | {"groups": {"4": 2}}, "tiny").build(digits.image_shape, 10)
