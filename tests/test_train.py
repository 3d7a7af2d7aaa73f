"""Training: reproducible, resumable to the bit, data-parallel; and what a checkpoint gives back."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline import data, recipe, train
from pipeline.data import Dataset, Split
from pipeline.layers import QuantConv2d
from pipeline.recipe import Recipe

TOY: dict[str, dict[str, Any]] = {
    "model": {"name": "vgg_small", "widths": [4, 6], "pool_after": [0]},
    "quantize": {"group": 4},
    "train": {"epochs": 2, "batch": 8, "lr": 0.01, "weight_decay": 0.01, "augment": "crop_flip", "pad": 1},
    "data": {"name": "digits"},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seed() -> int:
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    return seed


@pytest.fixture
def toy(seed: int) -> Dataset:
    """Black or white images with noise; 21 of them, so that the last batch is incomplete."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (21,), generator=generator)
    noise = torch.randint(0, 100, (21, 1, 6, 6), generator=generator)
    half = Split((noise + 150 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)
    return Dataset("toy", ("black", "white"), half, half)


def toy_recipe(seed: int, **settings: Any) -> Recipe:
    return recipe.parse(TOY | {"train": TOY["train"] | {"seed": seed} | settings}, "toy")


def state(out: Path) -> dict[str, Any]:
    """A checkpoint without its clock, its tensors as bytes."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key != "seconds"}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    found: dict[str, Any] = plain(torch.load(out / "checkpoint.pt", weights_only=True))
    return found


SETTINGS = [{}, {"optimizer": "sgd", "schedule": "step", "milestones": [1]}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_reproducible(settings: dict[str, Any], tmp_path: Path, toy: Dataset, seed: int) -> None:
    for out in ("a", "b"):
        train.train(toy_recipe(seed, **settings), toy, tmp_path / out)
    assert state(tmp_path / "a") == state(tmp_path / "b")
    train.train(toy_recipe(seed + 1, **settings), toy, tmp_path / "c")
    assert state(tmp_path / "a")["model"] != state(tmp_path / "c")["model"]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("steps", [0, 3, 4])  # before the first epoch is whole, in the second, the third (2 steps each)
def test_interrupted_and_resumed(
    steps: int,
    settings: dict[str, Any],
    tmp_path: Path,
    toy: Dataset,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = toy_recipe(seed, epochs=3, **settings)
    whole = train.train(run, toy, tmp_path / "whole")
    step, left = train._Run._step, iter(range(steps))

    def interrupted(*arguments: Any) -> torch.Tensor:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(run, toy, tmp_path / "parts")
    assert "the same command with --resume" in capsys.readouterr().err
    torch.rand(5)  # what else the process draws does not matter
    parts = train.train(run, toy, tmp_path / "parts", resume=True)
    assert state(tmp_path / "parts") == state(tmp_path / "whole")
    assert parts.last == whole.last
    assert parts.best == whole.best
    assert len(parts.history) == 3
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["checkpoint.pt"]
    assert len(train.train(run, toy, tmp_path / "parts", resume=True).history) == 3


def test_a_checkpoint_gives_back_the_network(tmp_path: Path, toy: Dataset, seed: int) -> None:
    result = train.train(toy_recipe(seed), toy, tmp_path)
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        trained = train.load(path)
        assert not trained.model.training
        assert trained.recipe == toy_recipe(seed)
        assert trained.history == result.history
        assert trained.image_shape == (1, 6, 6)
        assert trained.classes == ("black", "white")
        assert train.evaluate(trained.model, toy.test.images, toy.test.labels) == result.last


def test_it_learns(tmp_path: Path, toy: Dataset, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.train(toy_recipe(seed, epochs=20), toy, tmp_path).best >= 0.9
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 20
    assert "epoch 20/20  loss " in printed.err
    assert not printed.out


def test_latent_weights_are_constrained(tmp_path: Path, toy: Dataset, seed: int) -> None:
    train.train(toy_recipe(seed), toy, tmp_path)
    latent = next(layer.weight for layer in train.load(tmp_path).model.modules() if isinstance(layer, QuantConv2d))
    torch.testing.assert_close(latent.mean(1), torch.zeros_like(latent[:, 0]), rtol=0, atol=1e-6)


def test_every_epoch_has_its_own_order(
    tmp_path: Path, toy: Dataset, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = train._Run._step, []

    def watched(run: train._Run, model: nn.Module, picked: torch.Tensor, lr: float) -> torch.Tensor:
        seen.append(picked)
        return step(run, model, picked, lr)

    monkeypatch.setattr(train._Run, "_step", watched)
    train.train(toy_recipe(seed), toy, tmp_path)
    first, second = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert len(first) == len(second) == len(first.unique()) == len(second.unique()) == 16
    assert not torch.equal(first, second)


def test_refusals(tmp_path: Path, toy: Dataset, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        train.train(toy_recipe(seed), toy, tmp_path, resume=True)
    with pytest.raises(ValueError, match="there is no such checkpoint"):
        train.load(tmp_path)
    train.train(toy_recipe(seed), toy, tmp_path)
    with pytest.raises(ValueError, match="exists: continue that run with --resume"):
        train.train(toy_recipe(seed), toy, tmp_path)
    with pytest.raises(ValueError, match="a run of another recipe"):
        train.train(toy_recipe(seed, epochs=3), toy, tmp_path, resume=True)
    with pytest.raises(FloatingPointError, match=r"lower train\.lr"):
        train.train(toy_recipe(seed, optimizer="sgd", lr=1e38), toy, tmp_path / "diverged")


def test_decay_spares_latent_weights_norms_and_biases(seed: int) -> None:
    settings = toy_recipe(seed)
    model = settings.build((1, 6, 6), 2)
    decayed, spared = train._optimizer(model, settings.train).param_groups
    assert decayed["weight_decay"] == 0.01
    assert spared["weight_decay"] == 0
    first, last = model[0].weight, model[-1].weight
    assert {id(p) for p in decayed["params"]} == {id(first), id(last)}
    latent = next(layer.weight for layer in model.modules() if isinstance(layer, QuantConv2d))
    assert id(latent) in {id(p) for p in spared["params"]}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_learned_scales_are_trained_without_decay_and_stay_positive(tmp_path: Path, toy: Dataset, seed: int) -> None:
    settings = recipe.parse(TOY | {"quantize": {"weight": "ttq"}}, "toy")
    _, spared = train._optimizer(settings.build((1, 6, 6), 2), settings.train).param_groups
    assert sum(p.numel() == 1 for p in spared["params"]) == 2
    train.train(settings, toy, tmp_path)
    scales = [p for name, p in train.load(tmp_path).model.named_parameters() if name.endswith(("positive", "negative"))]
    assert all(scale > 0 and scale != 1 for scale in scales)
    assert len(scales) == 2


def test_a_penalty_joins_the_loss(tmp_path: Path, toy: Dataset, seed: int) -> None:
    losses = []
    for strength in (0.0, 1.0):
        quantize = {"weight": "binarynet", "activation": "bnn", "weight_options": {"strength": strength}}
        run = recipe.parse(TOY | {"quantize": quantize, "train": TOY["train"] | {"epochs": 1, "lr": 1e-9}}, "toy")
        losses.append(train.train(run, toy, tmp_path / str(strength)).history[0].loss)
        latent = next(m.weight for m in train.load(tmp_path / str(strength)).model if isinstance(m, QuantConv2d))
    assert losses[1] - losses[0] == pytest.approx((1 - latent.square()).sum().item(), rel=1e-4)


def test_learning_rates(seed: int) -> None:
    cosine = toy_recipe(seed, epochs=10, lr=0.2).train
    assert [train._lr(cosine, e) for e in (0, 5, 10)] == pytest.approx([0.2, 0.1, 0])
    assert train._lr(cosine, 2.5) == pytest.approx(0.1 + 0.1 / math.sqrt(2))
    step = toy_recipe(seed, lr=0.2, schedule="step", milestones=[3, 5], gamma=0.5).train
    assert [train._lr(step, e) for e in (0, 2.9, 3, 4.9, 5, 9)] == pytest.approx([0.2, 0.2, 0.1, 0.1, 0.05, 0.05])


def test_fewer_images_than_a_batch(tmp_path: Path, toy: Dataset, seed: int) -> None:
    few = replace(toy, train=Split(toy.train.images[:5], toy.train.labels[:5]))
    assert len(train.train(toy_recipe(seed, batch=64), few, tmp_path).history) == 2


PARALLEL = """
import sys
from pathlib import Path
from pipeline import data, recipe, train
result = train.train(recipe.load(sys.argv[1]), data.load("digits"), Path(sys.argv[2]), resume=len(sys.argv) > 3)
print(len(result.history))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stacked", ["", "[quantize.stacked]\nsegments = 4\nbank_ratio = 2\nwarmup = 1\n"])
def test_two_processes(stacked: str, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(PARALLEL)
    (tmp_path / "toy.toml").write_text(
        "[model]\nname = 'vgg_small'\nwidths = [16, 32]\npool_after = [0]\n[quantize]\ngroup = 4\n"
        f"{stacked}[train]\nepochs = 2\nbatch = 64\nlr = 0.01\n[data]\nname = 'digits'\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "main.py"), str(tmp_path / "toy.toml"), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(Path(data.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    for arguments in ([], ["resume"]):
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "".join(done.stdout.split()) == "22"  # one each; the newlines may fall anywhere
        assert done.stderr.count("epoch 2/2") == (0 if arguments else 1)
    digits, trained = data.load("digits"), train.load(tmp_path / "out")
    assert trained.history[-1].test == train.evaluate(trained.model, digits.test.images, digits.test.labels) > 0.5
