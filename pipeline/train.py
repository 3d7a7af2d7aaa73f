"""Training: the loop, its checkpoint and the accuracy. A run is a function of its recipe and its data.

What is random in an epoch is seeded by (seed, epoch, process) alone, so a resumed run needs no generator state and ends
in the same bits as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import recipe as recipes
from pipeline import stacked
from pipeline.data import Dataset, crop_flip, to_float
from pipeline.layers import QuantConv2d, QuantLinear, constrain_, penalty
from pipeline.models import ImageShape
from pipeline.recipe import Recipe, Train

_CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Epoch:
    """Mean loss, accuracy (0 to 1) of the training batches as they came and of the test half after them, wall time.

    Data-parallel, only process 0 tests; the others have NaN.
    """

    loss: float
    train: float
    test: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    history: tuple[Epoch, ...]

    @property
    def best(self) -> float:
        """The highest test accuracy of any epoch."""
        return max(epoch.test for epoch in self.history)

    @property
    def last(self) -> float:
        """The test accuracy of the network in the checkpoint."""
        return self.history[-1].test

    @property
    def seconds(self) -> float:
        return sum(epoch.seconds for epoch in self.history)


class Trained(NamedTuple):
    """A checkpoint, read: the network in eval mode and what it comes from."""

    model: nn.Module
    recipe: Recipe
    history: tuple[Epoch, ...]
    image_shape: ImageShape
    classes: tuple[str, ...]


def load(path: Path) -> Trained:
    """Read a checkpoint, or the one in a run's folder.

    Raises:
        ValueError: there is none.
    """
    state = _read(_file(path))
    recipe, image_shape = recipes.parse(state["recipe"], str(path)), tuple(state["image_shape"])
    model = recipe.build(image_shape, len(state["classes"]))
    model.load_state_dict(state["model"])
    history = tuple(Epoch(**epoch) for epoch in state["history"])
    return Trained(model.eval(), recipe, history, image_shape, tuple(state["classes"]))


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of uint8 ``images`` [N, C, H, W] whose largest logit is their label; leaves the model in eval mode."""
    device = next(model.parameters()).device
    model.eval()
    guesses = [model(to_float(batch.to(device))).argmax(1).cpu() for batch in images.split(256)]
    return (torch.cat(guesses) == labels).double().mean().item()


def start_recipe(recipe: Recipe, start: Path) -> Recipe:
    """``recipe`` for fine-tuning the checkpoint ``start``, whose network and quantisation it takes."""
    own = load(start).recipe
    return recipe.model_copy(update={name: getattr(own, name) for name in ("model", "quantize", "groups")})


def write(trained: Trained, out: Path) -> None:
    """Write ``out/checkpoint.pt`` for `load` and ``start``: weights, and no state of an optimiser to resume with.

    Raises:
        ValueError: there is one.
    """
    file = Path(out) / _CHECKPOINT
    if file.exists():
        raise ValueError(f"{file} exists: give another folder")
    _write(file, trained)


def train(recipe: Recipe, dataset: Dataset, out: Path, resume: bool = False, start: Path | None = None) -> Result:
    """Train the recipe's network and write ``out/checkpoint.pt`` after every epoch.

    With ``start``, begin from that checkpoint's weights, with epochs and optimiser afresh: fine-tuning.

    Under ``torchrun`` each process takes its share of every batch and normalises over that; process 0 tests, writes and
    prints. On a machine with CUDA that is where it runs.

    Raises:
        ValueError: ``out`` holds a run and ``resume`` is off, holds none or another recipe's or start's and it is on,
            the weights of ``start`` do not fit, or the batch cannot be split over the processes.
        FloatingPointError: the loss is no longer finite.
    """
    file = Path(out) / _CHECKPOINT
    if file.exists() and not resume:
        raise ValueError(f"{file} exists: continue that run with --resume, or give another folder")
    state = _read(file) if resume else None
    if state is not None and state["recipe"] != recipe.model_dump(mode="json"):
        raise ValueError(f"{file} is a run of another recipe: give the one that it was started with")
    if state is not None and state["optimizer"] is None:
        raise ValueError(f"{file} holds weights and no run to go on with: give it to --start")
    weights = None if start is None else _read(_file(start))["model"]
    origin = None if weights is None else _digest(weights)
    if state is not None and state["start"] != origin:
        raise ValueError(f"{file} is a run of other first weights: give --start as when it was started")
    with _processes() as (rank, world):
        run = _Run(recipe, dataset, rank, world, origin)
        if start is not None and weights is not None:
            run.begin_from(weights, start)
        if state is not None:
            run.restore(state)
        console = Console(stderr=True, quiet=rank > 0, highlight=False, soft_wrap=True)
        try:
            with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
                task = progress.add_task("", total=recipe.train.epochs * run.steps)
                run.save(file)
                while len(run.history) < recipe.train.epochs:
                    done = len(run.history)
                    progress.update(task, description=f"epoch {done + 1}", completed=done * run.steps)
                    epoch = run.epoch(lambda: progress.advance(task))
                    run.save(file)
                    console.print(
                        f"epoch {done + 1}/{recipe.train.epochs}  loss {epoch.loss:.4f}  train {epoch.train:.4f}  "
                        f"test {epoch.test:.4f}  {epoch.seconds:.1f} s"
                    )
        except KeyboardInterrupt:
            console.print(f"stopped: {file} holds the last whole epoch, the same command with --resume goes on from it")
            raise
        return Result(tuple(run.history))


def _write(file: Path, trained: Trained, optimizer: dict[str, Any] | None = None, start: str | None = None) -> None:
    """Write the checkpoint whole or not at all; ``start`` is the digest of the weights that it began with."""
    state = {
        "recipe": trained.recipe.model_dump(mode="json"),
        "image_shape": list(trained.image_shape),
        "classes": list(trained.classes),
        "history": [asdict(epoch) for epoch in trained.history],
        "model": trained.model.state_dict(),
        "optimizer": optimizer,
        "start": start,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _file(path: Path) -> Path:
    return Path(path) / _CHECKPOINT if Path(path).is_dir() else Path(path)


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file}: there is no such checkpoint, make one with `crossbit train`")
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """(rank, world) of this process, joined to the others where torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def _seed(*key: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _optimizer(model: nn.Module, settings: Train) -> torch.optim.Optimizer:
    """Weight decay acts on float convolution and dense weights alone.

    Batch norm, biases and learned scales are spared as usual. So are latent weights: decay never changes sign(W), it
    only shrinks |W|, the distance to the next flip, until bits flip at random (Helwegen et al., 2019: latent weights
    are inertia; Liu et al., ReActNet, 2020, trains binary weights without decay), and the next BN undoes the smaller
    scale mean |W|.
    """
    latent = {id(layer.weight) for layer in model.modules() if isinstance(layer, QuantConv2d | QuantLinear)}
    latent |= {
        id(p) for layer in model.modules() if isinstance(layer, stacked.StackedConv2d) for p in layer.parameters()
    }
    decayed = [p for p in model.parameters() if p.dim() > 1 and id(p) not in latent]
    chosen = {id(p) for p in decayed}
    spared = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, settings.lr, settings.momentum)
    return torch.optim.AdamW(groups, settings.lr)


def _lr(settings: Train, epochs: float) -> float:
    """The learning rate after so many epochs, a fraction inside one."""
    if settings.schedule == "cosine":
        return settings.lr * (1 + math.cos(math.pi * epochs / settings.epochs)) / 2
    return settings.lr * settings.gamma ** sum(epochs >= milestone for milestone in settings.milestones)


class _Run:
    """The state of a run in one process: what a checkpoint holds, and an epoch of it."""

    def __init__(self, recipe: Recipe, dataset: Dataset, rank: int, world: int, start: str | None = None) -> None:
        if recipe.train.batch % world:
            raise ValueError(f"batch = {recipe.train.batch} cannot be split over {world} processes: give a multiple")
        self.recipe, self.dataset, self.rank, self.world, self.start = recipe, dataset, rank, world, start
        # an incomplete last batch is left to another epoch's order: one image alone has no batch statistics
        self.steps = max(1, len(dataset.train.labels) // recipe.train.batch)
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
        _seed(recipe.train.seed)
        self.model = recipe.build(dataset.image_shape, len(dataset.classes)).to(self.device)
        self.optimizer = _optimizer(self.model, recipe.train)
        self.history: list[Epoch] = []

    def save(self, file: Path) -> None:
        """Write the checkpoint."""
        if self.rank == 0:
            shape, classes = self.dataset.image_shape, self.dataset.classes
            trained = Trained(self.model, self.recipe, tuple(self.history), shape, classes)
            _write(file, trained, self.optimizer.state_dict(), self.start)

    def begin_from(self, weights: dict[str, Tensor], where: Path) -> None:
        """Take the weights of another network of the same tensors."""
        own = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        given = {name: tensor.shape for name, tensor in weights.items()}
        if different := sorted(name for name in own | given if own.get(name) != given.get(name)):
            raise ValueError(
                f"{where}: {len(different)} of its tensors do not fit the recipe's network, the first is "
                f"'{different[0]}': start from a network of the same layers, or make one with `crossbit convert`"
            )
        self.model.load_state_dict(weights)

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [Epoch(**epoch) for epoch in state["history"]]

    def epoch(self, advance: Callable[[], None]) -> Epoch:
        """Train for one epoch and test; ``advance`` is called after every step."""
        began, number, settings = time.perf_counter(), len(self.history), self.recipe.train
        if self.recipe.quantize.stacked is not None:
            stacked.begin_epoch(self.model, number, self.recipe.quantize.stacked.warmup)
        # made anew, as it asks then which parameters are trained; and local, as it must not outlive the process group
        shared: nn.Module = DistributedDataParallel(self.model) if self.world > 1 else self.model
        _seed(settings.seed, number)  # the order is common to the processes, the augmentation is not
        order = torch.randperm(len(self.dataset.train.labels))
        _seed(settings.seed, number, self.rank)
        self.model.train()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, hits
        for step in range(self.steps):
            picked = order[step * settings.batch : (step + 1) * settings.batch][self.rank :: self.world]
            sums += self._step(shared, picked, _lr(settings, number + step / self.steps))
            advance()
        if self.world > 1:
            dist.all_reduce(sums)
        loss, accuracy = (sums / min(len(order), self.steps * settings.batch)).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of epoch {number + 1} is {loss}: lower train.lr = {settings.lr}")
        test = evaluate(self.model, self.dataset.test.images, self.dataset.test.labels) if self.rank == 0 else math.nan
        self.history.append(Epoch(loss, accuracy, test, time.perf_counter() - began))
        return self.history[-1]

    def _step(self, shared: nn.Module, picked: Tensor, lr: float) -> Tensor:
        images, labels = self.dataset.train.images[picked], self.dataset.train.labels[picked].to(self.device)
        if self.recipe.train.augment == "crop_flip":
            images = crop_flip(images, self.recipe.train.pad)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        logits = shared(to_float(images.to(self.device)))
        loss = F.cross_entropy(logits, labels) + penalty(self.model)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        constrain_(self.model)
        stacked.constrain_(self.model)
        return torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()]).double()
