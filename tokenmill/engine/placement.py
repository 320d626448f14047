"""`Placement`: where every sequence is: pending, in the waiting queue, or running with a slot and cache blocks.

The scheduler and the ledger move sequences only through these methods, so that status, queue, slot and blocks always
change together.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from tokenmill.engine.sequence import Rank, Request, Sequence, SequenceStatus
from tokenmill.engine.waiting_queue import WaitingQueue
from tokenmill.kv_cache.manager import KvCacheManager, PrefixGrant


class Placement:
    """The waiting queue, the running sequences, the free slots, and who holds a sibling's prompt.

    Args:
        kv: block tables, by sequence id.
        num_slots: sequences that can run at the same time.
    """

    def __init__(self, kv: KvCacheManager, num_slots: int) -> None:
        self.kv = kv
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # best rank first
        self.free_slots = list(range(num_slots - 1, -1, -1))
        # Waiting sequences that hold the prompt's blocks of their sibling, in the order in which they got them.
        self.prompt_holders: dict[int, Sequence] = {}

    def enqueue(self, sequence: Sequence) -> None:
        """A pending sequence may now be admitted."""
        sequence.status = SequenceStatus.WAITING
        self.waiting.push(sequence)

    def enqueue_siblings(self, request: Request) -> None:
        """Sequence 0 is about to leave, or has computed the prompt: its siblings need not wait for it any more.

        If the prompt's blocks are there, the siblings hold them until they start; else they compute it themselves.
        """
        first, *siblings = request.sequences
        request.siblings_are_pending = False
        computed = first.status is SequenceStatus.RUNNING and first.num_computed_tokens >= request.num_prompt_tokens
        for sibling in siblings:
            if sibling.status is SequenceStatus.PENDING:
                if computed:
                    self.kv.share(first.id, sibling.id, request.num_prompt_tokens - 1)
                    self.prompt_holders[sibling.id] = sibling
                self.enqueue(sibling)

    def run(self, sequence: Sequence, grant: PrefixGrant) -> None:
        """A waiting sequence got blocks; it takes a slot."""
        self.waiting.remove(sequence)
        self.prompt_holders.pop(sequence.id, None)
        insort(self.running, sequence, key=_rank)
        sequence.status = SequenceStatus.RUNNING
        sequence.slot = self.free_slots.pop()
        sequence.num_scheduled_tokens = sequence.num_computed_tokens = grant.num_cached_tokens
        sequence.num_block_tokens = len(grant.block_ids) * self.kv.tokens_per_block

    def preempt(self, sequence: Sequence, step: int, *, discard: bool = False) -> None:
        """A running sequence without a row in plan `step` gives back its slot and blocks, and waits to resume.

        With `discard`, what only it has computed is not kept in the cache.
        """
        self._stop_running(sequence, discard)
        sequence.num_preemptions += 1
        sequence.last_lost_step = step - 1
        sequence.num_scheduled_tokens = sequence.num_computed_tokens = 0
        self.enqueue(sequence)

    def leave(self, sequence: Sequence, *, discard: bool = False) -> None:
        """A sequence ends, wherever it is. With `discard`, what only it has computed is not kept in the cache."""
        if sequence.status is SequenceStatus.RUNNING:
            self._stop_running(sequence, discard)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
            if self.prompt_holders.pop(sequence.id, None) is not None:
                self.kv.release(sequence.id)
        sequence.status = SequenceStatus.FINISHED

    def drop_held_prompt(self) -> bool:
        """The last of the `prompt_holders` lets go; it will compute its prompt itself. False if there is none."""
        if not self.prompt_holders:
            return False
        sequence_id, _ = self.prompt_holders.popitem()
        self.kv.release(sequence_id)
        return True

    def check_integrity(self) -> None:
        """Every slot is free or held by one running sequence; statuses fit the lists.

        Raises:
            AssertionError: they do not.
        """
        tables = {sequence.id for sequence in self.running} | set(self.prompt_holders)
        assert tables == self.kv.sequence_ids(), f"block tables {self.kv.sequence_ids()}, expected {tables}"
        held = [sequence.slot for sequence in self.running]
        num_slots = len(held) + len(self.free_slots)
        assert sorted(held + self.free_slots) == list(range(num_slots)), f"slots {held} held, {self.free_slots} free"
        assert self.running == sorted(self.running, key=_rank), "running sequences are not in the order of their ranks"
        for sequence in self.running:
            assert sequence.status is SequenceStatus.RUNNING, f"sequence {sequence.id} runs as {sequence.status}"
            room = self.kv.num_blocks_of(sequence.id) * self.kv.tokens_per_block
            assert sequence.num_block_tokens == room, f"sequence {sequence.id} has room for {room} tokens"
            counts = (sequence.num_computed_tokens, sequence.num_scheduled_tokens, sequence.length)
            assert counts[1] <= room and counts == tuple(sorted(counts)), f"sequence {sequence.id} counts {counts}"
            lengths = (len(sequence.token_ids), sequence.length, sequence.max_length)
            assert lengths == tuple(sorted(lengths)), f"sequence {sequence.id} has lengths {lengths}"
        for sequence in self.waiting:
            assert sequence.status is SequenceStatus.WAITING, f"sequence {sequence.id} waits as {sequence.status}"

    def _stop_running(self, sequence: Sequence, discard: bool) -> None:
        del self.running[bisect_left(self.running, sequence.rank, key=_rank)]
        self.kv.release(sequence.id, sequence.token_ids, sequence.num_computed_tokens, discard=discard)
        self.free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.num_block_tokens = 0


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank
