"""`Job`: a request on its way through processes. `Replica`: a worker process and the jobs that it has."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from tokenmill.engine.request import GenerationRequest
from tokenmill.executor.description import EngineDescription
from tokenmill.executor.dispatch import PrefixIndex, ReplicaLoad
from tokenmill.executor.supervised import SupervisedProcess
from tokenmill.outputs import FinishReason
from tokenmill.telemetry.stats import EngineStats, KvCacheStats, merge_stats


@dataclass(slots=True, eq=False)
class Job:
    """A request under way.

    Attributes:
        request: what the caller asked for.
        encoded: the same for the wire.
        rank: its place in the queue, smaller first.
        prefix: keys of its prompt's blocks.
        num_blocks: cache blocks that it may need.
        attempt: the number of the attempt under way; 0 while it waits.
        num_attempts: attempts begun.
        replica, postproc: where it runs.
        runs_alone: whether nothing else may run beside it, because workers died under it before.
        num_tokens_left: tokens still to compute, at most.
        has_output: whether the prompt is done.
        cancel_reason: set when it is being ended from outside.
        cancel_time: when that was.
    """

    request: GenerationRequest
    encoded: msgspec.Raw
    rank: tuple[float, int]
    prefix: tuple[int, ...]
    num_blocks: int
    attempt: int = 0
    num_attempts: int = 0
    replica: Replica | None = None
    postproc: SupervisedProcess | None = None
    runs_alone: bool = False
    num_tokens_left: int = 0
    has_output: bool = False
    cancel_reason: FinishReason | None = None
    cancel_time: float = 0.0

    @property
    def num_sequences(self) -> int:
        """Sequences to generate."""
        return self.request.sampling.num_sequences

    def begin(self, attempt: int, replica: Replica, postproc: SupervisedProcess | None, *, alone: bool) -> None:
        """An attempt starts."""
        sampling = self.request.sampling
        self.attempt = attempt
        self.num_attempts += 1
        self.replica = replica
        self.postproc = postproc
        self.runs_alone = alone
        self.has_output = False
        self.num_tokens_left = len(self.request.prompt_token_ids) + sampling.max_tokens * sampling.num_sequences


class Replica:
    """A worker process, its jobs, and what it said of its engine.

    Args:
        process: the process.
    """

    def __init__(self, process: SupervisedProcess) -> None:
        self.process = process
        self.jobs: dict[int, Job] = {}  # by attempt
        self.description: EngineDescription | None = None
        self.prefixes = PrefixIndex(0)
        self.last_used = 0
        self._num_sequences = 0
        self._num_queued_tokens = 0
        self._num_promised_blocks = 0
        self._stats = (EngineStats(), EngineStats())  # of dead processes and of the one that lives

    @property
    def index(self) -> int:
        """Its number."""
        return self.process.index

    def on_ready(self, description: EngineDescription) -> None:
        """A process is ready."""
        self.description = description
        self.prefixes = PrefixIndex(description.num_blocks)
        self._stats = (self._stats[0], EngineStats())

    def on_stats(self, stats: EngineStats, now: float) -> None:
        """The engine's latest numbers; a new step, or nothing to do, is progress."""
        if stats.num_steps != self._stats[1].num_steps or not self.jobs:
            self.process.progressed(now)
        self._stats = (self._stats[0], stats)

    def on_death(self) -> list[Job]:
        """The process is gone; its counters stay. Returns the jobs that it had, in order."""
        dead, last = self._stats
        cache = last.kv_cache
        totals = KvCacheStats(
            num_queried_tokens=cache.num_queried_tokens,
            num_hit_tokens=cache.num_hit_tokens,
            num_evicted_blocks=cache.num_evicted_blocks,
        )
        ended = replace(last, num_running=0, num_waiting=0, kv_cache=totals)
        self._stats = (merge_stats([dead, ended]), EngineStats())
        self.prefixes.clear()
        return sorted(self.jobs.values(), key=lambda job: job.rank)

    def stats(self) -> EngineStats:
        """All its processes together, the dead ones included."""
        return merge_stats(self._stats)

    @property
    def last_step_time(self) -> float | None:
        """Of the process that lives."""
        return self._stats[1].last_step_time

    # ---- jobs ------------------------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        """A job is sent to the process."""
        self.jobs[job.attempt] = job
        self.last_used = job.attempt
        self.prefixes.add(job.prefix)
        self._num_sequences += job.num_sequences
        self._num_promised_blocks += job.num_blocks
        self._num_queued_tokens += job.num_tokens_left

    def remove(self, job: Job) -> None:
        """The process has nothing to do with the job any more."""
        if self.jobs.pop(job.attempt, None) is not None:
            self._num_sequences -= job.num_sequences
            self._num_promised_blocks -= job.num_blocks
            self._num_queued_tokens -= job.num_tokens_left

    def count_output(self, job: Job, num_tokens: int) -> None:
        """Tokens of a job came."""
        if not job.has_output:
            job.has_output = True
            num_tokens += len(job.request.prompt_token_ids)
        job.num_tokens_left -= num_tokens
        self._num_queued_tokens -= num_tokens

    # ---- dispatch --------------------------------------------------------------------------------------------

    def has_room_for(self, job: Job, *, alone: bool) -> bool:
        """Whether the job may be sent now. A worker gets as many as it can run and as many again to go on with; the
        rest wait in the caller's process, where they can still go elsewhere."""
        if self.description is None or self.process.state != "ready":
            return False
        if not self.jobs:
            return True
        if alone or any(other.runs_alone for other in self.jobs.values()):
            return False
        window = 2 * self.description.max_batch_size
        return self._num_sequences + job.num_sequences <= window

    def load_for(self, job: Job) -> ReplicaLoad:
        """What the job would meet here."""
        assert self.description is not None
        return ReplicaLoad(
            index=self.index,
            num_queued_tokens=self._num_queued_tokens,
            num_free_blocks=self.description.num_blocks - self._num_promised_blocks,
            num_cached_tokens=self.prefixes.num_matching(job.prefix) * self.description.tokens_per_block,
            last_used=self.last_used,
        )
