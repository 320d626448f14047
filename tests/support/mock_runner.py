"""`MockRunner`: a runner without a model that behaves like the device, and notices every scheduling mistake.

It keeps token buffers and block tables by slot, and a cache that remembers, for each position of each block, a hash of
the whole text up to the token that was written there. A row may only attend to positions that hold exactly the hash of
its own text. So a wrong reuse, an overwritten shared block, an evicted copy source, a stale block table or a skipped
position is found in the step in which a row would read wrong keys and values. It raises `AssertionError`, and keeps it
in `mistakes` as well, since an engine takes any exception for a failure of the device and goes on.

The next token is a function of the whole text, the request's seed and the sequence index, so it is the same in any
batch; `expected_tokens` computes it from the prompt alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from tokenmill.engine.plan import BatchPlan, NewSlot, Row, RowOutput, StepOutput
from tokenmill.engine.request import GenerationRequest
from tokenmill.errors import InvalidLogitsError
from tokenmill.outputs import Logprob, TokenLogprobs

_MASK = (1 << 61) - 1
_EMPTY = 0
_GARBAGE = -1


def next_hash(text_hash: int, token_id: int) -> int:
    """Hash of a text from the hash of all but its last token."""
    return ((text_hash * 1_000_003) ^ (token_id + 12_345)) * 2_654_435_761 & _MASK


def hash_chain(token_ids: Iterable[int]) -> list[int]:
    """For each position the hash of the text that ends there."""
    chain: list[int] = []
    for token_id in token_ids:
        chain.append(next_hash(chain[-1] if chain else 1, token_id))
    return chain


def sample(text_hash: int, *, seed: int, sequence_index: int, vocab_size: int, banned: Iterable[int] = ()) -> int:
    """The token after a text."""
    value = next_hash(next_hash(text_hash, seed), sequence_index) >> 7
    allowed = [token_id for token_id in range(vocab_size) if token_id not in set(banned)]
    return allowed[value % len(allowed)]


@dataclass
class Slot:
    """What the device knows of one sequence."""

    init: NewSlot
    token_ids: list[int]
    chain: list[int]
    block_ids: list[int]
    is_lost: bool = False  # a step that wrote for it failed; what it computes from now on is nobody's business

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.chain.append(next_hash(self.chain[-1], token_id))


@dataclass
class Pending:
    """A launched step."""

    step: int
    output: StepOutput
    error: Exception | None = None


@dataclass
class MockRunner:
    """See the module.

    Args:
        num_blocks: blocks of the cache, the scratch block included.
        tokens_per_block: tokens in one block.
        num_slots: slots of the device.
        vocab_size: tokens are 0 to vocab_size - 1.
        row_error: gives an error text for a row whose logits shall be bad.
        launch_error: gives an exception that the launch of a plan shall raise.
        collect_error: gives an exception that the collection of a plan shall raise.
        gives_logprobs: of sampled tokens; those of steps that are repeated have none.
    """

    num_blocks: int
    tokens_per_block: int
    num_slots: int
    vocab_size: int = 50
    row_error: Callable[[BatchPlan, Row], str | None] = lambda plan, row: None
    launch_error: Callable[[BatchPlan], Exception | None] = lambda plan: None
    collect_error: Callable[[BatchPlan], Exception | None] = lambda plan: None
    gives_logprobs: bool = True
    plans: list[BatchPlan] = field(default_factory=list)
    slots: dict[int, Slot] = field(default_factory=dict)
    mistakes: list[AssertionError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = [[_EMPTY] * self.tokens_per_block for _ in range(self.num_blocks)]
        self._uncollected: list[Pending] = []

    def launch(self, plan: BatchPlan) -> Pending:
        """The device's side of the step, in order of launch."""
        try:
            return self._launch(plan)
        except AssertionError as mistake:
            self.mistakes.append(mistake)
            raise

    def _launch(self, plan: BatchPlan) -> Pending:
        assert not self.plans or plan.step > self.plans[-1].step, "plans are launched out of order"
        self.plans.append(plan)
        self._apply_changes(plan)
        error = self.launch_error(plan)
        if error is not None:
            self._spoil(plan)
            raise error
        pending = Pending(plan.step, self._compute(plan), self.collect_error(plan))
        if pending.error is not None:
            self._spoil(plan)
        self._uncollected.append(pending)
        return pending

    def collect(self, pending: Pending) -> StepOutput:
        """The host's side: steps are read in order of launch."""
        assert self._uncollected.pop(0) is pending, f"step {pending.step} is collected out of order"
        if pending.error is not None:
            raise pending.error
        return pending.output

    def run(self, plan: BatchPlan) -> StepOutput:
        """Launch and collect."""
        return self.collect(self.launch(plan))

    def _apply_changes(self, plan: BatchPlan) -> None:
        sources = {copy.source for copy in plan.block_copies}
        assert not sources & {copy.destination for copy in plan.block_copies}, "a block is copied from and copied to"
        for copy in plan.block_copies:
            assert 0 < copy.source < self.num_blocks and 0 < copy.destination < self.num_blocks
            assert copy.source != copy.destination
            self.cache[copy.destination] = list(self.cache[copy.source])
        for init in plan.new_slots:
            assert 0 <= init.slot < self.num_slots
            assert 0 < init.num_prompt_tokens <= len(init.token_ids)
            self.slots[init.slot] = Slot(init, list(init.token_ids), hash_chain(init.token_ids), list(init.block_ids))
        for new in plan.new_blocks:
            assert new.block_ids, "an empty change"
            slot = self.slots[new.slot]
            assert new.start == len(slot.block_ids), f"slot {new.slot}: blocks appended at a wrong place"
            slot.block_ids += new.block_ids

    def _compute(self, plan: BatchPlan) -> StepOutput:
        self._check_rows(plan)
        for row in plan.rows:
            self._check_prefix(plan, row, row.start)
        self._check_writes(plan)
        for row in plan.rows:
            slot = self.slots[row.slot]
            for position in range(row.start, row.start + row.num_tokens):
                block, offset = self._place(slot, position)
                self.cache[block][offset] = slot.chain[position]
        for row in plan.rows:
            self._check_prefix(plan, row, row.start + row.num_tokens)
        outputs = [self._row_output(plan, row) for row in plan.rows]
        if plan.max_repeats > 1 and not any(output.error for output in outputs):
            outputs = self._repeat(plan, outputs)
        return StepOutput(tuple(outputs))

    def _repeat(self, plan: BatchPlan, outputs: list[RowOutput]) -> list[RowOutput]:
        """What the rows give that are computed again, as often as a hash of the plan's number says."""
        assert all(row.num_tokens == 1 and row.sample and not row.prompt_logprobs for row in plan.rows)
        more: list[list[int]] = [[] for _ in plan.rows]
        for repeat in range(1, 1 + next_hash(plan.step, 5) % plan.max_repeats):
            again = BatchPlan(plan.step, tuple(replace(row, start=row.start + repeat) for row in plan.rows))
            if any(self.row_error(again, row) for row in again.rows):
                break  # told when the row comes first
            for found, output in zip(more, self._compute(again).rows, strict=True):
                assert output.token_id is not None
                found.append(output.token_id)
        return [replace(output, more_token_ids=tuple(found)) for output, found in zip(outputs, more, strict=True)]

    def _check_rows(self, plan: BatchPlan) -> None:
        assert plan.rows, "an empty plan is launched"
        lengths = [row.num_tokens for row in plan.rows]
        assert min(lengths) >= 1
        num_decode_rows = sum(length == 1 for length in lengths)
        assert all(length == 1 for length in lengths[:num_decode_rows]), "rows of one token do not come first"
        assert len({row.slot for row in plan.rows}) == len(plan.rows), "a slot has two rows"
        assert {init.slot for init in plan.new_slots} <= {row.slot for row in plan.rows}, "a new slot without a row"
        for row in plan.rows:
            slot = self.slots[row.slot]
            assert 0 not in slot.block_ids, "the scratch block is in a block table"
            assert len(set(slot.block_ids)) == len(slot.block_ids), f"slot {row.slot} has a block twice"
            end = row.start + row.num_tokens
            assert end <= len(slot.token_ids), f"step {plan.step}, slot {row.slot}: input tokens are not known"
            assert row.sample == (end == len(slot.token_ids)), (
                f"step {plan.step}, slot {row.slot}: wrong place to sample"
            )

    def _check_writes(self, plan: BatchPlan) -> None:
        """A block that a row writes to is used by no other row."""
        users: dict[int, int] = {}
        for row in plan.rows:
            slot = self.slots[row.slot]
            for block in slot.block_ids[: -(-(row.start + row.num_tokens) // self.tokens_per_block)]:
                users[block] = users.get(block, 0) + 1
        for row in plan.rows:
            slot = self.slots[row.slot]
            for block in {self._place(slot, row.start + i)[0] for i in range(row.num_tokens)}:
                assert users[block] == 1, (
                    f"step {plan.step}, slot {row.slot}: writes to block {block}, which others use"
                )

    def _check_prefix(self, plan: BatchPlan, row: Row, end: int) -> None:
        slot = self.slots[row.slot]
        for position in range(end if not slot.is_lost else 0):
            block, offset = self._place(slot, position)
            assert self.cache[block][offset] == slot.chain[position], (
                f"step {plan.step}, slot {row.slot}, position {position}: block {block} holds another text"
            )

    def _place(self, slot: Slot, position: int) -> tuple[int, int]:
        return slot.block_ids[position // self.tokens_per_block], position % self.tokens_per_block

    def _row_output(self, plan: BatchPlan, row: Row) -> RowOutput:
        slot = self.slots[row.slot]
        error = self.row_error(plan, row)
        if error is not None:
            slot.is_lost = True
            if row.sample:
                slot.append(0)
            return RowOutput(error=InvalidLogitsError(error))
        end = row.start + row.num_tokens
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if row.prompt_logprobs:
            positions = range(row.start + 1, min(end, slot.init.num_prompt_tokens - 1) + 1)
            prompt_logprobs = tuple({slot.token_ids[p]: Logprob(-float(p), p)} for p in positions)
        if not row.sample:
            return RowOutput(prompt_logprobs=prompt_logprobs)
        token_id = sample(
            slot.chain[-1],
            seed=slot.init.seed,
            sequence_index=slot.init.sequence_index,
            vocab_size=self.vocab_size,
            banned=self._banned(slot),
        )
        slot.append(token_id)
        logprobs: TokenLogprobs | None = {token_id: Logprob(-1.0, 1)} if self.gives_logprobs else None
        return RowOutput(token_id, logprobs, prompt_logprobs)

    @staticmethod
    def _banned(slot: Slot) -> tuple[int, ...]:
        num_generated = len(slot.token_ids) - slot.init.num_prompt_tokens
        return slot.init.end_ids if num_generated < (slot.init.sampling.min_tokens or 0) else ()

    def _spoil(self, plan: BatchPlan) -> None:
        """A step that fails may leave anything where it was to write."""
        for row in plan.rows:
            slot = self.slots[row.slot]
            slot.is_lost = True
            for position in range(row.start, row.start + row.num_tokens):
                block, offset = self._place(slot, position)
                self.cache[block][offset] = _GARBAGE


@dataclass(frozen=True)
class ExpectedAnswer:
    """What a sequence must give if nothing stops it from outside."""

    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | None


def expected_answer(
    inputs: GenerationRequest, sequence_index: int, *, max_seq_len: int, vocab_size: int = 50
) -> ExpectedAnswer:
    """The oracle: the answer from the prompt alone, one token at a time, by the definition of the parameters."""
    sampling = inputs.sampling
    num_prompt_tokens = len(inputs.prompt_token_ids)
    text_hash = hash_chain(inputs.prompt_token_ids)[-1]
    answer: list[int] = []
    while True:
        ending = (*inputs.end_ids, *inputs.stop_token_ids)
        banned = ending if len(answer) < (sampling.min_tokens or 0) else ()
        token_id = sample(
            text_hash, seed=inputs.seed, sequence_index=sequence_index, vocab_size=vocab_size, banned=banned
        )
        if token_id in ending:
            is_stop_token = token_id in inputs.stop_token_ids
            if is_stop_token and sampling.include_stop_str_in_output:
                answer.append(token_id)
            return ExpectedAnswer(tuple(answer), "stop", token_id if is_stop_token else None)
        answer.append(token_id)
        text_hash = next_hash(text_hash, token_id)
        if len(answer) == sampling.max_tokens or num_prompt_tokens + len(answer) == max_seq_len:
            return ExpectedAnswer(tuple(answer), "length", None)
