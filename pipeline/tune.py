"""MetaSchedule with the XGBoost cost model: the records that make a network's kernels faster on one target.

A records folder belongs to a target and a thread count (TVM's own look-up ignores both), and to one way to measure: in
time, here or on a board, or in a model's cycles (`pipeline/counted_runner.py`). The default schedule of every kernel is
measured first and stored as a record like any other, so tuning never makes a kernel slower; a stopped run leaves its
records and the next one continues from them.

On GPUs there is nothing to search: a matrix product has at most some sixty tiles, which are all measured, and other
kernels none. Candidates are a folder (`pipeline/cuda_batch.py`), which may be carried to the GPU and back.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.runner.local_runner import default_alloc_argument

import targets
from pipeline import bench, compiler, counted_runner, cycle_model, remote, toolchain
from pipeline.builder import Builder
from pipeline.cuda_batch import SCRIPT, Batch
from pipeline.remote import Board
from targets import Target, cores
from tvm_ops import schedule_cpu, schedule_cuda

Unit = Literal["us", "model cycles"]
SHIPPED = Path(__file__).with_name("records")
"""The records that come with crossbit, which `scripts/make_records.py` makes."""

_IDENTITY, _LOG = "target.json", "tune.log"
_PER_SECOND: dict[Unit, float] = {"us": 1e6, "model cycles": counted_runner.HERTZ}  # a record holds seconds
_DRAWS = 8  # of a schedule, to see which tensor intrinsics it can lead to
_WORTH_SHIPPING = 1.02  # times as fast as the default schedule
# A candidate is called so often, with cold weights, as a network finds them that has used others in the meantime.
_COLD = ms.runner.EvaluatorConfig(number=1, repeat=15, min_repeat_ms=0, enable_cpu_cache_flush=True)
_FINALISTS, _ROUNDS, _CALLS = 3, 15, 5  # candidates of a kernel that are timed again, and how often
_SECONDS = 60  # that a candidate may take to build, and to be measured


@dataclass(frozen=True)
class Tuned:
    """One kernel: what it takes with the default schedule and with its best record, and how many were measured.

    Attributes:
        unit: of ``default`` and ``best``.
    """

    kernel: str
    unit: Unit
    default: float
    best: float
    trials: int


def records_folder(root: Path, target: Target, threads: int) -> Path:
    """Where a target's records lie below ``root``."""
    return root / f"{target.name}-{threads}t"


def shipped_records(target: Target, threads: int) -> Path | None:
    """Those of `SHIPPED` for a target; None: there are none."""
    folder = records_folder(SHIPPED, target, threads)
    return folder if folder.is_dir() else None


def check_records(folder: Path, target: Target, threads: int) -> None:
    """Refuse records of another target.

    Raises:
        ValueError: the folder holds no records, or another target's.
    """
    made_for = _identity(folder)
    if (made_for["target"], made_for["threads"]) != (target.name, threads):
        raise ValueError(
            f"{folder}: these records are for {made_for['target']} with {made_for['threads']} threads, "
            f"not for {target.name} with {threads}"
        )


def _identity(folder: Path) -> dict[str, Any]:
    path = folder / _IDENTITY
    if not path.is_file():
        raise ValueError(f"{folder}: no tuning records here; `crossbit tune` makes them")
    return dict(json.loads(path.read_text()))


def claim(folder: Path, target: Target, threads: int, unit: Unit) -> None:
    """Make a records folder for what is measured in ``unit``, or check that it is one.

    Raises:
        ValueError: its records are another target's, or were measured in another unit.
    """
    if (folder / _IDENTITY).exists():
        check_records(folder, target, threads)
        if (measured := _identity(folder).get("unit")) != unit:
            raise ValueError(
                f"{folder}: these records were measured in {measured}, and this search measures in {unit}: "
                "give it another folder with --records"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"target": target.name, "threads": threads, "unit": unit}
    (folder / _IDENTITY).write_text(json.dumps(identity) + "\n")


def tune(
    mod: tvm.IRModule,
    target: Target,
    threads: int,
    records: Path,
    trials: int,
    seed: int,
    on_trial: Callable[[str, int, int], None] = lambda kernel, done, total: None,
    warn: Callable[[str], None] = lambda sentence: None,
    board: tuple[str, str] | None = None,
) -> list[Tuned]:
    """Tune every reduction of a lowered module on this machine or on a board, or by counting where neither runs it.

    Args:
        records: the folder of this target; created, or continued.
        trials: candidates per kernel, those already in ``records`` included.
        on_trial: called with the kernel's name, candidates measured so far, and in all.
        warn: called with a sentence about a candidate that could not be measured, or what is doubtful of a board.
        board: the address of its tracker, and its key.

    Raises:
        ValueError: the folder's records are another target's or measured otherwise; the CPU cannot run the target, and
            it cannot be counted either.
        ValueError, OSError: the board went away, or the GPU failed; what was found is in ``records``.
    """
    if target.gpu is not None:
        _check_gpu(target, board)
        return tune_gpu(mod, target, threads, records, trials, seed, on_trial, warn)[0]
    unit = _unit(target, threads, board, warn)
    claim(records, target, threads, unit)
    with closing(_Run(target, threads, records, seed, board, unit, warn)) as run:
        tasks = [
            t for t in ms.relax_integration.extract_tasks(mod, run.tvm_target) if schedule_cpu.has_reduction(t.mod)
        ]
        counts = [len(run.stored(task)) for task in tasks]
        done = sum(min(trials, stored) for stored in counts)
        for task, stored in zip(tasks, counts, strict=True):
            before = done

            def progress(count: int, task: Any = task) -> None:
                nonlocal done
                done += count
                on_trial(task.task_name, done, trials * len(tasks))

            if not stored:
                run.measure_default(task)
                progress(1)
            if trials > max(1, stored):
                run.search(task, trials - max(1, stored), progress)
            progress(before + max(0, trials - stored) - done)  # a small space may have run out
        return [run.summary(task) for task in tasks]


def tune_gpu(
    mod: tvm.IRModule,
    target: Target,
    threads: int,
    records: Path,
    trials: int,
    seed: int,
    on_trial: Callable[[str, int, int], None] = lambda kernel, done, total: None,
    warn: Callable[[str], None] = lambda sentence: None,
    carried: Path | None = None,
) -> tuple[list[Tuned], int]:
    """Tune the kernels of a GPU that is here, or elsewhere: take what was measured there, build what is to be measured.

    Args:
        on_trial: called with the kernel's name, candidates measured (or built, to be carried) so far, and in all.
        carried: a folder of candidates, whose script measures them; None: measure here.

    Returns:
        What is known of kernels that were measured; how many candidates wait.

    Raises:
        ValueError: the target is no GPU; the records or the candidates are another target's; the GPU failed.
    """
    if target.gpu is None:
        raise ValueError(f"target {target.name} is no GPU, and only candidates for GPUs are carried: leave --carry out")
    compiler.check_threads(target, threads)
    claim(records, target, threads, "us")
    known = _Known(target, threads, records, "us")
    tasks = ms.relax_integration.extract_tasks(mod, known.tvm_target)
    tilings = [(task, found) for task in tasks if (found := schedule_cuda.tilings(task.dispatched[0], target))]
    totals = [min(trials, len(found)) for _, found in tilings]
    with tempfile.TemporaryDirectory() as temporary:
        batch = Batch(carried or Path(temporary), target)
        for i, (task, found) in enumerate(tilings):
            stored = known.stored(task)
            done = itertools.count(sum(totals[:i]) + min(totals[i], len(stored)) + 1)

            def progress(task: Any = task, done: Iterator[int] = done) -> None:
                on_trial(task.task_name, next(done), sum(totals))

            default = compiler.default_schedule(task.dispatched[0], target, threads)
            wanted = _wanted(stored, default, found, trials, seed)
            functions = [sch.mod["main"] for sch in wanted]
            digests = batch.add(task.task_name, default.mod["main"], functions, progress if carried else lambda: None)
            try:
                if carried is None and wanted:
                    batch.write()
                    batch.run(progress)
            finally:
                results = batch.results()
                for sch, digest in zip(wanted, digests, strict=True):
                    if digest in results:
                        _take(known, task, sch, results[digest], warn)
            on_trial(task.task_name, sum(totals[: i + 1]), sum(totals))
        batch.write()
        return [known.summary(task) for task, _ in tilings if known.stored(task)], batch.waiting


def keep_best(measured: Path, kept: Path, target: Target, networks: Iterable[tvm.IRModule]) -> int:
    """Write to the folder ``kept`` the best record of each kernel that beats its default schedule; says how many.

    What was timed on a CPU is timed here again: the default schedule and the best others, in turns.

    Args:
        networks: lowered; records of kernels that are in none of them, as after a change of crossbit, are left out.
    """
    today = ms.database.MemoryDatabase()
    for network in networks:
        for task in ms.relax_integration.extract_tasks(network, target.tvm_target(1)):
            today.commit_workload(task.dispatched[0])
    kernels: dict[Any, list[Any]] = {}
    for record in compiler.open_records(measured, target).get_all_tuning_records():
        if today.has_workload(record.workload.mod):
            kernels.setdefault(record.workload, []).append(record)
    if _identity(measured)["unit"] == "us" and target.gpu is None:
        kernels = {workload: _again(records, target) for workload, records in kernels.items()}
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    shutil.copy(measured / _IDENTITY, kept)
    database = compiler.open_records(kept, target)
    best = [_best(r) for r in kernels.values() if _seconds(_best(r)) * _WORTH_SHIPPING < _seconds(_default(r))]
    for record in best:
        database.commit_workload(record.workload.mod)
        database.commit_tuning_record(record)
    return len(best)


def _again(records: list[Any], target: Target) -> list[Any]:
    """The default schedule of a kernel and its fastest candidates, with new times.

    The search takes its times minutes apart, and the speed of a machine wanders by more than candidates differ.
    """
    candidates = sorted((r for r in records if r.trace.decisions and math.isfinite(_seconds(r))), key=_seconds)
    finalists = [_default(records), *candidates[:_FINALISTS]]
    arguments = default_alloc_argument(tvm.cpu(), [info.as_json() for info in finalists[0].args_info], 1)

    def timer(record: Any) -> Callable[[int], float]:
        sch = Schedule(record.workload.mod)
        record.trace.apply_to_schedule(sch, remove_postproc=False)
        kernel = _compiled(sch.mod, target, record.target)
        return lambda _: _time(kernel, tvm.cpu(), _COLD._replace(repeat=_CALLS), arguments)[0]

    times = bench.in_turns([timer(record) for record in finalists], threads=1, rounds=_ROUNDS)
    return [
        ms.database.TuningRecord(r.trace, r.workload, [float(np.median(seconds))], r.target, r.args_info)
        for r, seconds in zip(finalists, times, strict=True)
    ]


def _check_gpu(target: Target, board: tuple[str, str] | None) -> None:
    """Refuse to measure what is not this machine's GPU."""
    assert target.gpu is not None
    advice = f"give --carry FOLDER, whose {SCRIPT} needs no more than the driver and NumPy there"
    if board is not None:
        raise ValueError(f"target {target.name}: kernels for GPUs are not measured over RPC: {advice}")
    found = targets.capability()
    if found is None or target.gpu.arch != "sm_{}{}".format(*found):
        here = "no NVIDIA GPU" if found is None else "one of compute capability {}.{}".format(*found)
        raise ValueError(f"target {target.name} is measured on its own GPU, and this machine has {here}: {advice}")


def _wanted(stored: list[Any], default: Any, tilings: list[Any], trials: int, seed: int) -> list[Any]:
    """The schedules to measure until there are ``trials`` records: the default one first, then tiles by chance."""
    drawn = {schedule_cuda.drawn_tile(record.trace) for record in stored}
    order = random.Random(seed).sample(tilings[1:], len(tilings) - 1)  # the same, however many are stored
    new = [sch for sch in order if schedule_cuda.drawn_tile(sch.trace) not in drawn]
    return [*([] if stored else [default]), *new][: max(0, trials - len(stored))]


def _take(known: _Known, task: Any, sch: Any, result: dict[str, Any], warn: Callable[[str], None]) -> None:
    """Make a record of a GPU's result."""
    if error := result.get("error"):
        if sch.trace.decisions:
            warn(f"a candidate for {task.task_name} failed: {error}")
        else:
            raise ValueError(f"the default schedule of {task.task_name} failed: {error}")
    identity = _identity(known.records)  # says which GPUs measured
    identity["gpus"] = sorted({*identity.get("gpus", []), *filter(None, [result.get("gpu")])})
    (known.records / _IDENTITY).write_text(json.dumps(identity) + "\n")
    known.commit(task, sch, _plausible(result["seconds"]) if "seconds" in result else None)


def _unit(target: Target, threads: int, board: tuple[str, str] | None, warn: Callable[[str], None]) -> Unit:
    """What candidates are measured in. Refuses a target that nothing at hand can measure."""
    if board is not None:
        with closing(Board(*board)) as there, there.errors():
            if reason := there.mismatch(target.machine, target.features):
                raise ValueError(f"target {target.name} cannot be measured there: {reason}")
            try:
                there.function("tvm.contrib.random.random_fill_for_measure")
            except AttributeError:
                raise ValueError(
                    f"{there} cannot make inputs to measure with: start its server without TVM_USE_RUNTIME_LIB, or "
                    f"with --load-library and the path of tvm/lib/libtvm_runtime_extra.so"
                ) from None
            if there.unknown is not None:
                warn(there.unknown)
            if there.emulated:
                warn(f"{there} is emulated: the records will not say what is fast on a {target.name}")
        return "us"
    missing = target.missing_features()
    if missing and target.name in cycle_model.MODELS:
        counted_runner.check(target, threads)
        return "model cycles"
    if missing:
        raise ValueError(f"target {target.name} cannot be measured here: this machine lacks {', '.join(missing)}")
    return "us"


class _Known:
    """The records of a target's kernels."""

    def __init__(self, target: Target, threads: int, records: Path, unit: Unit) -> None:
        self.target, self.threads, self.records, self.unit = target, threads, records, unit
        self.tvm_target = target.tvm_target(threads)
        self.database = compiler.open_records(records, target)

    def stored(self, task: Any) -> list[Any]:
        """The records of a task."""
        workload = self.database.commit_workload(task.dispatched[0])
        return [r for r in self.database.get_all_tuning_records() if r.workload.same_as(workload)]

    def commit(self, task: Any, sch: Any, seconds: Any) -> None:
        """Store a record of a task; without seconds, that a candidate failed."""
        mod = task.dispatched[0]
        arguments = ms.arg_info.ArgInfo.from_prim_func(mod["main"])
        workload = self.database.commit_workload(mod)
        self.database.commit_tuning_record(
            ms.database.TuningRecord(sch.trace, workload, seconds, self.tvm_target, arguments)
        )

    def summary(self, task: Any) -> Tuned:
        """What is known of a task."""
        records = self.stored(task)
        default, best = (_seconds(record) * _PER_SECOND[self.unit] for record in (_default(records), _best(records)))
        return Tuned(task.task_name, self.unit, default, best, len(records))


class _Run(_Known):
    """MetaSchedule's parts, made once for all kernels."""

    def __init__(
        self,
        target: Target,
        threads: int,
        records: Path,
        seed: int,
        board: tuple[str, str] | None,
        unit: Unit,
        warn: Callable[[str], None],
    ) -> None:
        super().__init__(target, threads, records, unit)
        self.seed, self.board, self.warn = seed, board, warn
        self.logger = _log_to(records / _LOG)
        if unit == "model cycles":
            build = counted_runner.build
            self.runner: Any = counted_runner.CountedRunner(target, _SECONDS)
        else:
            build, self.runner = _build, _runner(board)
        self.builder = Builder(build, target, _SECONDS)
        self.cost_model = ms.cost_model.XGBModel(
            num_warmup_samples=16, extractor=ms.feature_extractor.PerStoreFeature(), num_tuning_cores=cores()
        )

    def close(self) -> None:
        """End the processes that it started and that MetaSchedule does not end."""
        self.builder.close()

    def measure_default(self, task: Any) -> None:
        """Store the default schedule as the first record of a task."""
        mod = task.dispatched[0]
        sch = compiler.default_schedule(mod, self.target, self.threads)
        (built,) = self.builder.build([ms.builder.BuilderInput(sch.mod, self.tvm_target)])
        what = f"the default schedule of {task.task_name}"
        if built.error_msg is not None:
            raise RuntimeError(f"{what} does not build: {built.error_msg}")
        arguments = ms.arg_info.ArgInfo.from_prim_func(mod["main"])
        (future,) = self.runner.run([ms.runner.RunnerInput(built.artifact_path, "cpu", arguments)])
        result = future.result()
        ms.utils.remove_build_dir(built.artifact_path)
        if result.error_msg is not None:
            raise ConnectionError(f"{_place(self.board)} did not measure {what}: {_last_line(result.error_msg)}")
        self.commit(task, sch, result.run_secs)

    def designs(self, sch: Any) -> list[Any]:
        """Schedules to vary: one for each tensor intrinsic that draws led to, for its tile is no decision."""
        found: dict[str, Any] = {}
        for _ in range(_DRAWS):
            drawn = sch.copy()
            schedule_cpu.schedule(drawn, self.target, self.threads, sample=True)
            used = [str(i.attrs[0]) for i in drawn.trace.insts if i.kind.name == "Tensorize"]
            found.setdefault(" ".join(used), drawn)
        return list(found.values())

    def search(self, task: Any, trials: int, progress: Callable[[int], None]) -> None:
        """Measure ``trials`` more candidates of a task."""
        with _no_tensor_intrinsics():
            context = ms.TuneContext(
                mod=task.dispatched[0],
                target=self.tvm_target,
                space_generator=ms.space_generator.ScheduleFn(
                    self.designs,
                    sch_rules=[],
                    postprocs=[],
                    mutator_probs={ms.mutator.MutateTileSize(): 1.0},
                ),
                search_strategy=ms.search_strategy.EvolutionarySearch(
                    population_size=32, init_min_unmeasured=16, genetic_num_iters=2
                ),
                task_name=task.task_name,
                logger=self.logger,
                rand_state=self.seed,
                num_threads=cores(),
            ).clone()
        ms.tune.tune_tasks(
            tasks=[context],
            task_weights=[task.weight],
            work_dir=str(self.records),
            max_trials_global=trials,
            num_trials_per_iter=min(16, trials),
            builder=self.builder,
            runner=self.runner,
            database=self.database,
            cost_model=self.cost_model,
            measure_callbacks=[
                _Failures(task.task_name, self.board, self.warn),  # first: a board that is gone leaves no records
                ms.measure_callback.AddToDatabase(),
                ms.measure_callback.UpdateCostModel(),
                ms.measure_callback.RemoveBuildArtifact(),
                _Progress(progress),
            ],
        )


@contextmanager
def _no_tensor_intrinsics() -> Iterator[None]:
    """Make MetaSchedule's import of every tensor intrinsic of every GPU, none of which our space uses, an empty one.

    It parses 496 functions: 16 s on a Zen 5 core, 2 minutes on a Cascade Lake one, before the first candidate.
    """
    name = "tvm.s_tir.tensor_intrin"
    known = sys.modules.get(name)
    sys.modules.setdefault(name, ModuleType(name))
    try:
        yield
    finally:
        if known is None:
            del sys.modules[name]


def _seconds(record: Any) -> float:
    seconds = [float(s) for s in record.run_secs or []]
    return sum(seconds) / len(seconds) if seconds else float("inf")


def _default(records: list[Any]) -> Any:
    """The fastest of those for which nothing was drawn."""
    return _best([record for record in records if not record.trace.decisions])


def _best(records: list[Any]) -> Any:
    return min(records, key=_seconds)


@derived_object
class _Progress(ms.measure_callback.PyMeasureCallback):
    """Tells ``report`` how many candidates were measured."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__()
        self.report = report

    def apply(
        self, task_scheduler: Any, task_id: int, measure_candidates: Any, builder_results: Any, runner_results: Any
    ) -> None:
        self.report(len(measure_candidates))


@derived_object
class _Failures(ms.measure_callback.PyMeasureCallback):
    """Tells ``report`` which candidates failed, and ends the search where the board is gone."""

    def __init__(self, kernel: str, board: tuple[str, str] | None, report: Callable[[str], None]) -> None:
        super().__init__()
        self.kernel, self.board, self.report = kernel, board, report

    def apply(
        self, task_scheduler: Any, task_id: int, measure_candidates: Any, builder_results: Any, runner_results: Any
    ) -> None:
        where = _place(self.board)
        errors = [_last_line(r.error_msg) for r in [*builder_results, *runner_results] if r.error_msg is not None]
        for error in errors:
            self.report(f"a candidate for {self.kernel} failed on {where}: {error}")
        if self.board is not None and len(errors) >= len(measure_candidates) and not remote.is_there(*self.board):
            # A ValueError, because TVM, which called this, makes another type of an OSError.
            raise ValueError(f"{where} went away: {errors[-1]}; what was found before is kept")


def _place(board: tuple[str, str] | None) -> str:
    return remote.board_name(*board) if board else "this machine"


def _last_line(message: Any) -> str:
    """What went wrong, without the traceback above it and the type before it."""
    line = (str(message).strip() or "it says nothing").splitlines()[-1]
    return line.partition("Error: ")[2] or line


def _runner(board: tuple[str, str] | None) -> Any:
    """What measures candidates."""
    if board is None:
        return ms.runner.LocalRunner(timeout_sec=_SECONDS, evaluator_config=_COLD, f_run_evaluator=_time)
    tracker, key = board
    host, _, port = tracker.rpartition(":")
    return ms.runner.RPCRunner(
        ms.runner.RPCConfig(host, int(port), key, session_timeout_sec=_SECONDS),
        _COLD,
        f_create_session=_session,
        f_run_evaluator=lambda _, *kernel: _time(*kernel),
        max_workers=1,  # a board measures one candidate at a time
    )


def _session(config: Any) -> Any:
    """As MetaSchedule's own, which waits for ever for a board that is not there."""
    host, port, match_key = remote.request(
        f"{config.tracker_host}:{config.tracker_port}", config.tracker_key, config.session_timeout_sec / 2
    )
    return tvm.rpc.connect(host, port, match_key, session_timeout=config.session_timeout_sec)


def _time(library: Any, device: Any, evaluator: Any, arguments: Any) -> list[float]:
    """As MetaSchedule's, which believes every number, and whose database ranks by the mean: one bad call decides."""
    from tvm.s_tir.meta_schedule.runner.utils import run_evaluator_common

    return [statistics.median(_plausible(run_evaluator_common(library, device, evaluator, arguments)))]


def _plausible(seconds: list[float]) -> list[float]:
    if not all(0 < s < _SECONDS and math.isfinite(s) for s in seconds):
        raise ValueError(f"it says that a call took {seconds} seconds")
    return seconds


def _build(given: tuple[str, tvm.IRModule, Any]) -> str:
    """A candidate's shared library; MetaSchedule makes an archive, which a board's compiler would have to link."""
    name, mod, llvm = given
    target = targets.load(name)
    path = Path(tempfile.mkdtemp()) / "kernel.so"
    _compiled(mod, target, llvm).export_library(str(path), fcompile=toolchain.find_linker(target).link_shared)
    return str(path)


def _compiled(mod: tvm.IRModule, target: Target, llvm: Any) -> Any:
    """As MetaSchedule's own builder, less its import of every tensor intrinsic: 16 s in each worker of each batch."""
    from tvm.driver import build
    from tvm.s_tir.transform import RemoveWeightLayoutRewriteBlock

    finished = tvm.IRModule({"main": compiler.finish(mod["main"], target)})
    return build(RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(finished), target=llvm)


def _log_to(file: Path) -> logging.Logger:
    """MetaSchedule's tables go to a file beside the records, not to the terminal."""
    logger = logging.getLogger("tvm.s_tir.meta_schedule")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.addHandler(logging.FileHandler(file))
    return logger.getChild("crossbit")
