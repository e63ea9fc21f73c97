"""Trials in actors of a Ray cluster."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from peft_autoqra.errors import ExecutorError
from peft_autoqra.executors.lost_trials import MAX_LOSSES, LostTrials
from peft_autoqra.executors.ray_worker import RayTrialWorker, import_ray
from peft_autoqra.executors.worker_files import WorkerFilesNotSeenError
from peft_autoqra.executors.worker_source import WorkerSource
from peft_autoqra.trial import Trial, TrialResult, TrialStatus

logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 1800.0  # machines may have to be hired, and the model read
GRACE_SECONDS = 60.0
POLL_SECONDS = 1.0  # how soon a node that joins is seen
MEMORY_COPIES = 2  # of the weights, that a worker on a CPU reserves: its own, and those of the plan that it evaluates


class RayExecutor:
    """Evaluates in actors that each hold the model and its calibration; a :class:`TrialExecutor`.

    A trial whose worker is lost, with its node or alone, goes to another one; after three losses it has failed. New
    workers take the place of lost ones. Without ``num_workers`` there are as many as the cluster has room for, also
    when nodes join later: each takes its CPUs and its share of a GPU, or else memory for twice the weights.

    Files of the search are read where they lie when the nodes see its folders; else they are sent through Ray's object
    store once for each node.

    Args:
        address: of a running cluster, such as ``"auto"``; None takes the one that this process is connected to, or
            starts one on this machine for as long as the search takes.
        num_workers: actors at most; None for as many as there is room for, now and later.
        cpus_per_worker: CPUs and threads of each.
        gpus_per_worker: GPUs of each; less than 1 to share one. None takes 1 where the search computes on a GPU.
        start_timeout_seconds: so long the search waits for a worker when it has none.
        grace_seconds: a worker that does not end a trial by itself so long after ``max_trial_seconds`` is killed, and
            the trial has failed.

    Raises:
        MissingDependencyError: Ray is not installed.
        ExecutorError: a number below its least, or no cluster at the address.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        num_workers: int | None = None,
        cpus_per_worker: int = 1,
        gpus_per_worker: float | None = None,
        start_timeout_seconds: float = START_TIMEOUT_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        """Connect; no worker is started yet."""
        self._ray = import_ray()
        if (num_workers is not None and num_workers < 1) or cpus_per_worker < 1 or (gpus_per_worker or 0) < 0:
            raise ExecutorError(
                f"num_workers={num_workers} and cpus_per_worker={cpus_per_worker} must be at least 1, and "
                f"gpus_per_worker={gpus_per_worker} not negative."
            )
        self._num_workers, self._cpus, self._gpus = num_workers, cpus_per_worker, gpus_per_worker
        self._start_timeout_seconds, self._grace_seconds = start_timeout_seconds, grace_seconds
        self._is_own_cluster = _connect(self._ray, address)
        self._source: WorkerSource | None = None
        self._workers: list[_Worker] = []
        self._queue: deque[Trial] = deque()
        self._lost = LostTrials()
        self._shipped: dict[str, Any] = {}
        self._num_failed_starts = 0
        self._last_error = "nothing was heard of one"
        self._alone_since: float | None = None

    @property
    def num_slots(self) -> int:
        """Workers that are ready; 1 while none is."""
        return max(1, sum(worker.is_ready for worker in self._workers))

    def open(self, source: WorkerSource) -> None:
        """Start as many workers as there is room for.

        Raises:
            ExecutorError: the cluster is gone, with an earlier search of this executor for instance.
        """
        if not self._ray.is_initialized():
            raise ExecutorError(
                "This executor's Ray cluster is gone, as it is after a search; make a new RayExecutor."
            )
        self._source = source
        gpus = float(source.needs_gpu) if self._gpus is None else self._gpus
        weights = {"GPU": gpus} if gpus else {"memory": float(MEMORY_COPIES * source.weight_bytes)}
        self._resources = {"CPU": float(self._cpus), **weights}
        self._start_workers()

    def submit(self, trial: Trial) -> None:
        """Give it to a worker that is free, or keep it until one is."""
        self._queue.append(trial)
        self._assign()

    def wait(self) -> list[tuple[int, TrialResult]]:
        """What ended; workers are started, watched and replaced meanwhile.

        Raises:
            ExecutorError: there is no worker, and none came for a while; or none can load the model.
        """
        num_before = self.num_slots
        while True:
            self._start_workers()
            self._assign()
            results = self._collect()
            if results or self.num_slots > num_before:
                return results
            self._check_that_there_are_workers()

    def close(self) -> None:
        """End the workers; and the cluster, if it was started for this search."""
        if self._ray.is_initialized():  # else they are gone with their cluster
            for worker in self._workers:
                self._ray.kill(worker.actor)
        self._workers.clear()
        self._queue.clear()
        self._shipped.clear()
        if self._is_own_cluster:
            self._ray.shutdown()
            self._is_own_cluster = False

    def _start_workers(self) -> None:
        for _ in range(self._num_to_start()):
            self._start_worker()

    def _num_to_start(self) -> int:
        if self._num_failed_starts >= MAX_LOSSES:
            return 0
        if self._num_workers is not None:
            return self._num_workers - len(self._workers)
        if any(not worker.is_ready for worker in self._workers):  # what they take is not yet known to be taken
            return 0
        free = self._ray.available_resources()
        room = min(int(free.get(name, 0.0) / amount + 1e-6) for name, amount in self._resources.items())
        return max(room, 0 if self._workers else 1)  # one that waits tells an autoscaler what is wanted

    def _start_worker(self) -> None:
        options = {
            "num_cpus": self._resources["CPU"],
            "num_gpus": self._resources.get("GPU", 0.0),
            "memory": self._resources.get("memory"),
            "max_restarts": 0,  # a lost worker's trial may go to another one before it is replaced
        }
        actor = self._ray.remote(RayTrialWorker).options(**options).remote()
        self._workers.append(_Worker(actor, self._prepared(actor), time.perf_counter()))

    def _prepared(self, actor: Any) -> Any:
        """A reference to the worker's answer to being given its files."""
        if self._source is None:
            raise ExecutorError("The executor is not opened; give it to AutoQRASearcher.run.")
        share = self._resources.get("GPU", 0.0)
        return actor.prepare.remote(self._source.files, self._shipped, self._cpus, min(share, 1.0))

    def _assign(self) -> None:
        for worker in self._workers:
            if self._queue and worker.is_ready and worker.trial is None:
                worker.trial, worker.since = self._queue.popleft(), time.perf_counter()
                worker.answer = worker.actor.evaluate.remote(worker.trial.to_dict())

    def _collect(self) -> list[tuple[int, TrialResult]]:
        """Results that are there within a poll; workers that are lost or ready are noted."""
        answers = {worker.answer: worker for worker in self._workers if worker.answer is not None}
        if not answers:
            time.sleep(POLL_SECONDS)
            return []
        self._ray.wait(list(answers), num_returns=1, timeout=POLL_SECONDS)
        there, _ = self._ray.wait(list(answers), num_returns=len(answers), timeout=0)
        found = [self._heard(answers[answer]) for answer in there]
        found += [self._hung(answers[answer]) for answer in answers if answer not in there]
        return [result for result in found if result is not None]

    def _heard(self, worker: _Worker) -> tuple[int, TrialResult] | None:
        trial, answer, worker.answer = worker.trial, worker.answer, None
        try:
            value = self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            return self._raised(worker, error.cause)
        except self._ray.exceptions.RayError as error:
            return self._dropped(worker, _first_line(error))
        if trial is None:
            worker.is_ready, self._num_failed_starts = True, 0
            return None
        worker.trial = None
        return trial.number, TrialResult.from_dict(value)

    def _raised(self, worker: _Worker, error: BaseException) -> tuple[int, TrialResult] | None:
        """The worker lives, but cannot go on."""
        if worker.trial is not None:
            return self._dropped(worker, f"{type(error).__name__}: {error}")
        if isinstance(error, WorkerFilesNotSeenError) and not self._shipped:
            self._ship()
        if isinstance(error, WorkerFilesNotSeenError) and not worker.was_shipped:
            worker.was_shipped, worker.answer = True, self._prepared(worker.actor)
            return None
        if any(other.is_ready for other in self._workers):
            logger.warning("A worker could not begin, and is left out: %s", error)
            return self._dropped(worker, str(error))
        raise ExecutorError(f"A worker could not begin: {error}") from error

    def _dropped(self, worker: _Worker, reason: str) -> tuple[int, TrialResult] | None:
        """The worker is lost, and with it what it was doing."""
        self._workers.remove(worker)
        self._ray.kill(worker.actor)
        self._last_error = reason
        trial = worker.trial
        if trial is None:
            self._num_failed_starts += 1
            return None
        failure = self._lost.failure(trial, reason, time.perf_counter() - worker.since)
        if failure is None:
            self._queue.appendleft(trial)
            return None
        return trial.number, failure

    def _hung(self, worker: _Worker) -> tuple[int, TrialResult] | None:
        """A trial that should have ended itself long ago; None where that is not so."""
        limit = self._source.max_trial_seconds if self._source is not None else None
        seconds = time.perf_counter() - worker.since
        if worker.trial is None or limit is None or seconds < limit + self._grace_seconds:
            return None
        number, worker.trial = worker.trial.number, None
        self._workers.remove(worker)
        self._ray.kill(worker.actor)
        error = f"It took longer than {limit:g} seconds (max_trial_seconds) and could not be stopped; its worker was."
        return number, TrialResult(status=TrialStatus.FAILED, seconds=seconds, error=error)

    def _check_that_there_are_workers(self) -> None:
        if any(worker.is_ready for worker in self._workers):
            self._alone_since = None
            return
        self._alone_since = self._alone_since or time.perf_counter()
        is_late = time.perf_counter() - self._alone_since > self._start_timeout_seconds
        if is_late or (not self._workers and self._num_failed_starts >= MAX_LOSSES):
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in self._resources.items())
            raise ExecutorError(
                f"No worker is left, and none could be started (the last one: {self._last_error}). Each needs "
                f"{wanted}; the cluster has {self._ray.available_resources()} free. What has ended is on disk: the "
                "same search goes on when there are workers."
            )

    def _ship(self) -> None:
        """Put the files where every node can get them."""
        if self._source is not None:
            files = self._source.files.all()
            self._shipped = {name: self._ray.put(np.fromfile(path, np.uint8)) for name, path in files.items()}


@dataclass(eq=False)
class _Worker:
    """An actor, and what it was asked."""

    actor: Any
    answer: Any
    since: float
    trial: Trial | None = None
    is_ready: bool = False
    was_shipped: bool = False


def _connect(ray: Any, address: str | None) -> bool:
    """Whether a cluster or a connection was made, which is ours to end."""
    if ray.is_initialized():
        return False
    try:
        ray.init(
            address=address,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,  # what it says of starting is of no use to a search
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ExecutorError(
            f"There is no Ray cluster at {address!r} ({_first_line(error)}); start one with `ray start --head`, or "
            "leave ray_address out for one on this machine."
        ) from error
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
