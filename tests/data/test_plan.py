"""The plan: which samples make a step, how they are packed, and the tensors that come of it."""

from __future__ import annotations

import itertools
import json
import math
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from chat_fixtures import byte_bpe
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.config.schema import SourceSection
from engine.data import readers
from engine.data.batch import collate_packed, collate_padded, empty_micro_batch
from engine.data.plan import (
    Assignment,
    Plan,
    assign,
    assign_padded,
    bin_costs,
    cost,
    imbalance,
    pack,
    pad,
    permute,
)
from engine.data.samples import trained_positions
from engine.data.template import Template
from engine.types import Sample

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"
SIZES = [1, 2, 3, 4, 5, 7, 10, 16, 17, 64, 97, 255, 256, 257, 1000, 1024, 1025, 4097, 10_007]


def order(plan: Plan, epoch: int) -> list[int]:
    """Return the samples of an epoch, step by step."""
    first = epoch * plan.steps_per_epoch
    return np.concatenate([plan.members(first + s) for s in range(plan.steps_per_epoch)]).tolist()


# --- membership ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_an_epoch_holds_every_sample_once(size: int, batch_size: int) -> None:
    batch_size = max(batch_size, size // 100)  # a call a step
    plan = Plan(sizes=[size], batch_size=batch_size, seed=3, drop_last=False)
    for epoch in (0, 1, 5):
        assert sorted(order(plan, epoch)) == list(range(size))


@pytest.mark.parametrize("size", SIZES)
def test_permute_is_a_permutation_whatever_its_key(size: int) -> None:
    positions = np.arange(size, dtype=np.uint64)
    for key in ("0/0", "0/1", "12345/7", ""):
        assert sorted(permute(positions, size, key).tolist()) == list(range(size))


def test_permute_sends_a_position_to_the_same_place_whoever_asks() -> None:
    whole = permute(np.arange(1000, dtype=np.uint64), 1000, "1/2")
    for some in ([0], [999], [5, 3, 999, 0], list(range(100, 200))):
        assert permute(np.array(some, np.uint64), 1000, "1/2").tolist() == whole[some].tolist()


def test_epochs_and_seeds_differ() -> None:
    plan = Plan(sizes=[1000], batch_size=10)
    orders = [order(plan, epoch) for epoch in range(3)]
    orders += [order(Plan(sizes=[1000], batch_size=10, seed=seed), 0) for seed in (1, 2, 10)]
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 12  # 1 is expected of two random orders


def test_an_order_looks_random() -> None:
    """Neighbours are no neighbours, and each tenth of an epoch draws on all of the data."""
    drawn = np.array(order(Plan(sizes=[10_000], batch_size=100), 0))
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(drawn, np.arange(10_000))[0, 1]) < 0.05
    counts = np.histogram2d(np.arange(10_000) // 1000, drawn // 1000, bins=10)[0]
    assert counts.min() > 60 and counts.max() < 145  # 100 expected, standard deviation 9.5


def test_the_same_seed_gives_the_same_order() -> None:
    one, other = (Plan(sizes=[97], batch_size=8, seed=11) for _ in range(2))
    assert [one.members(s).tolist() for s in range(30)] == [other.members(s).tolist() for s in reversed(range(30))][
        ::-1
    ]


GOLDEN: dict[tuple[int, int, int, int], list[int]] = {
    # number of samples, batch size, seed, step: computed once and frozen; a run resumed with another order trains on
    # some samples twice and on others never
    (10, 10, 0, 0): [7, 0, 4, 2, 8, 9, 3, 5, 6, 1],
    (10, 10, 0, 1): [6, 0, 1, 2, 3, 7, 5, 8, 4, 9],
    (10, 10, 1, 0): [7, 2, 8, 4, 3, 0, 9, 6, 1, 5],
    (1000, 8, 0, 0): [84, 763, 235, 448, 532, 385, 535, 820],
    (1000, 8, 0, 124): [429, 376, 353, 362, 481, 123, 915, 605],
    (1000, 8, 0, 125): [533, 720, 682, 250, 617, 509, 556, 109],
    (1000, 8, 42, 3): [556, 206, 353, 572, 712, 553, 718, 703],
    (97, 5, 7, 60): [74, 20, 72, 2, 45],
    (939343, 6, 0, 0): [92210, 227139, 529502, 20915, 698801, 699745],
    (10000000, 4, 123, 2500000): [2026061, 2519509, 9910247, 6278527],
    (2, 2, 0, 0): [1, 0],
    (1, 1, 5, 9): [0],
}


@pytest.mark.parametrize("case", GOLDEN)
def test_orders_never_change(case: tuple[int, int, int, int]) -> None:
    num_samples, batch_size, seed, step = case
    assert Plan(sizes=[num_samples], batch_size=batch_size, seed=seed).members(step).tolist() == GOLDEN[case]


def test_without_shuffle_the_order_is_the_file_s() -> None:
    plan = Plan(sizes=[7], batch_size=3, shuffle=False)
    assert [plan.members(s).tolist() for s in range(4)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    plan = Plan(sizes=[7], batch_size=3, shuffle=False, drop_last=False)
    assert [plan.members(s).tolist() for s in range(4)] == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]


@pytest.mark.parametrize(
    ("size", "batch", "dropped", "kept"),
    [(10, 3, 3, 4), (9, 3, 3, 3), (2, 3, 0, 1), (1, 1, 1, 1), (3, 3, 1, 1), (4, 3, 1, 2)],
)
def test_steps_of_an_epoch(size: int, batch: int, dropped: int, kept: int) -> None:
    assert Plan(sizes=[size], batch_size=batch).steps_per_epoch == dropped
    assert Plan(sizes=[size], batch_size=batch, drop_last=False).steps_per_epoch == kept


@pytest.mark.parametrize("shuffle", [True, False])
def test_drop_last(shuffle: bool) -> None:
    """Dropped: every batch is full, nothing twice in an epoch, and what is left out changes from epoch to epoch."""
    plan = Plan(sizes=[10], batch_size=4, seed=1, shuffle=shuffle)
    assert [len(plan.members(s)) for s in range(6)] == [4] * 6
    left_out = [frozenset(range(10)) - set(order(plan, epoch)) for epoch in range(8)]
    assert all(len(left) == 2 for left in left_out)
    assert len(set(left_out)) > 3 if shuffle else set(left_out) == {frozenset({8, 9})}
    plan = Plan(sizes=[10], batch_size=4, seed=1, shuffle=shuffle, drop_last=False)
    assert [len(plan.members(s)) for s in range(6)] == [4, 4, 2] * 2


def test_a_step_in_ten_million_samples_costs_little() -> None:
    plan = Plan(sizes=[10_000_000], batch_size=512)
    plan.members(0)
    for step in (0, 12_345, plan.steps_per_epoch - 1, 7 * plan.steps_per_epoch + 3):
        tracemalloc.start()
        try:
            members = plan.members(step)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2_000_000
        assert len(set(members.tolist())) == 512
        assert 0 <= members.min() and members.max() < 10_000_000


# --- packing ---------------------------------------------------------------------------------------------------------


def check_packing(lengths: NDArray[np.int64], capacity: int) -> list[int]:
    """Check that every index is in one bin and no bin is too full; returns how full each is."""
    bins = pack(lengths, capacity)
    assert sorted(i for group in bins for i in group) == list(range(len(lengths)))
    fill = [int(lengths[group].sum()) for group in bins]
    assert all(group for group in bins)
    assert max(fill, default=0) <= capacity
    return fill


def test_packing_by_hand() -> None:
    assert pack([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert pack([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert pack([10], 10) == [[0]]
    assert pack([], 10) == []
    assert pack(np.array([6, 5, 5, 4], np.int32), 10) == [[0, 3], [1, 2]]


def test_packing_refuses_what_fits_nowhere() -> None:
    with pytest.raises(ValueError, match="a sample of 11 tokens fits no micro-batch of 10"):
        pack([3, 11], 10)


def best_possible(lengths: list[int], capacity: int) -> int:
    """Return the fewest bins, by trying all ways to put each sample into an open bin or a new one."""
    best = len(lengths)

    def place(i: int, room: list[int]) -> None:
        nonlocal best
        if len(room) >= best:
            return
        if i == len(lengths):
            best = len(room)
            return
        for b in range(len(room)):
            if room[b] >= lengths[i] and room[b] not in room[:b]:
                place(i + 1, [r - lengths[i] * (k == b) for k, r in enumerate(room)])
        place(i + 1, [*room, capacity - lengths[i]])

    place(0, [])
    return best


def test_packing_is_within_its_bound_of_the_best() -> None:
    """First-fit decreasing needs at most 11/9 of the fewest bins, plus 6/9 (Dósa, 2007)."""
    rng = np.random.default_rng(0)
    worse = 0
    for _ in range(300):
        capacity = int(rng.integers(10, 60))
        lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 10)))
        best = best_possible(sorted(lengths.tolist(), reverse=True), capacity)
        bins = len(check_packing(lengths, capacity))
        assert best <= bins <= 11 / 9 * best + 6 / 9
        worse += bins > best
    assert worse < 30


@pytest.mark.parametrize("seed", range(4))
def test_packing_is_within_its_bound_of_the_sum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for capacity, high in [(4096, 4096), (4096, 1000), (512, 40), (100, 33)]:
        lengths = rng.integers(1, high + 1, 500)
        fill = check_packing(lengths, capacity)
        assert len(fill) <= 11 / 9 * -(-int(lengths.sum()) // capacity) + 6 / 9


def alpaca_like(rng: np.random.Generator) -> NDArray[np.int64]:
    """Lengths of 512 conversations as Alpaca's, in tokens: log-normal, 200 at the median, 250 on average, 4,096 at most."""
    return np.clip(rng.lognormal(np.log(200), 0.67, 512), 20, 4096).astype(np.int64)


def test_packing_fills_micro_batches() -> None:
    rng = np.random.default_rng(0)
    fills = [fill for _ in range(20) for fill in check_packing(alpaca_like(rng), 4096)]
    assert np.mean(fills) / 4096 >= 0.97


@pytest.fixture(scope="module")
def real_lengths() -> NDArray[np.int64]:
    """Tokens of real Alpaca conversations."""
    file = SHARED_DATA / "alpaca_en_demo.json"
    if not file.is_file():
        pytest.skip("no Alpaca rows beside this checkout")
    tokenizer = byte_bpe()
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    source = SourceSection(name="alpaca", path=str(file))
    texts = [
        Template(tokenizer, chatml).render(readers.alpaca(row, source)) for row in json.loads(file.read_text("utf-8"))
    ]
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    lengths = np.minimum([len(encoding.ids) for encoding in encodings], 4096)
    assert len(lengths) >= 900
    return lengths


def test_packing_fills_micro_batches_of_real_conversations(real_lengths: NDArray[np.int64]) -> None:
    plan = Plan(sizes=[len(real_lengths)], batch_size=512, seed=0)
    fills = [fill for step in range(6) for fill in check_packing(real_lengths[plan.members(step)], 4096)]
    assert np.mean(fills) / 4096 >= 0.97


def test_padding_groups_like_lengths() -> None:
    assert pad([3, 9, 1, 9, 5], 2) == [[1, 3], [4, 0], [2]]
    assert pad([3, 9, 1], 8) == [[1, 0, 2]]
    assert pad([], 2) == []


# --- assignment ------------------------------------------------------------------------------------------------------

LENGTHS = st.integers(1, 200).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)
RANKS = st.integers(1, 9)
ATTENTION_LENGTHS = st.sampled_from([math.inf, 50.0, 2000.0, 49152.0])


def check_assignment(assignment: Assignment, num_samples: int, ranks: int) -> int:
    """Check that each sample is in one bin and ranks have equally many of them; returns the number of micro-steps."""
    assert len(assignment) == ranks
    num_steps = {len(steps) for steps in assignment}
    assert len(num_steps) == 1
    assert sorted(i for steps in assignment for group in steps for i in group) == list(range(num_samples))
    for groups in zip(*assignment, strict=True):
        assert any(groups)  # no micro-step in which nobody works
    return num_steps.pop()


@given(LENGTHS, RANKS, ATTENTION_LENGTHS)
def test_assignment_holds_every_sample_once_within_capacity(
    drawn: tuple[list[int], int], ranks: int, attention_length: float
) -> None:
    lengths, capacity = drawn
    assignment = assign(lengths, capacity=capacity, ranks=ranks, attention_length=attention_length)
    num_steps = check_assignment(assignment, len(lengths), ranks)
    assert num_steps <= -(-len(pack(lengths, capacity)) // ranks)
    for steps in assignment:
        assert all(sum(lengths[i] for i in group) <= capacity for group in steps)
    costs = bin_costs(lengths, assignment, attention_length)
    assert costs.sum() == pytest.approx(cost(lengths, attention_length).sum())
    assert 0 <= imbalance(costs) + 1e-12 and imbalance(costs) < 1


@given(LENGTHS, ATTENTION_LENGTHS)
def test_one_rank_has_the_bins_of_first_fit_decreasing(drawn: tuple[list[int], int], attention_length: float) -> None:
    lengths, capacity = drawn
    assert assign(lengths, capacity=capacity, ranks=1, attention_length=attention_length) == [pack(lengths, capacity)]
    assert assign_padded(lengths, 3, 1, attention_length) == [pad(lengths, 3)]


@given(LENGTHS, RANKS, st.integers(1, 5), ATTENTION_LENGTHS)
def test_padded_assignment_leaves_no_rank_idle_that_could_work(
    drawn: tuple[list[int], int], ranks: int, micro_batch_size: int, attention_length: float
) -> None:
    lengths, _ = drawn
    assignment = assign_padded(lengths, micro_batch_size, ranks, attention_length)
    num_steps = check_assignment(assignment, len(lengths), ranks)
    assert num_steps == -(-len(lengths) // (micro_batch_size * ranks))
    sizes = [len(group) for steps in assignment for group in steps]
    assert max(sizes, default=0) <= micro_batch_size
    if ranks > 1 and len(lengths) >= len(sizes) > 0:
        assert all(sizes) and max(sizes) - min(sizes) <= 1


@given(LENGTHS, RANKS, st.randoms(use_true_random=False))
def test_assignment_is_the_same_whichever_rank_evaluates_it(
    drawn: tuple[list[int], int], ranks: int, random: object
) -> None:
    """Each rank evaluates the whole and takes its own, in whatever order and from whatever kind of array."""
    lengths, capacity = drawn
    kinds = [lengths, tuple(lengths), np.array(lengths, np.int32), np.array(lengths, np.int64)]
    order = random.sample(range(ranks), ranks)  # type: ignore[attr-defined]
    taken = {
        r: assign(random.choice(kinds), capacity=capacity, ranks=ranks, attention_length=500.0)[r]  # type: ignore[attr-defined]
        for r in order
    }
    whole = assign(lengths, capacity=capacity, ranks=ranks, attention_length=500.0)
    assert [taken[r] for r in range(ranks)] == whole
    check_assignment([taken[r] for r in range(ranks)], len(lengths), ranks)
    assert all(type(i) is int for steps in whole for group in steps for i in group)


def test_assignment_by_hand() -> None:
    assert assign([4, 4, 4, 4], capacity=16, ranks=2, attention_length=math.inf) == [[[0, 2]], [[1, 3]]]
    assert assign([9, 1], capacity=10, ranks=4, attention_length=math.inf) == [[[0]], [[1]], [[]], [[]]]
    assert assign([], capacity=10, ranks=2, attention_length=math.inf) == [[], []]
    # where longest first finds no room for the last, the bins of first-fit decreasing stay
    assert assign([3, 3, 2, 2, 2], capacity=6, ranks=2, attention_length=math.inf) == [[[0, 1]], [[2, 3, 4]]]
    with pytest.raises(ValueError, match="a sample of 11 tokens fits no micro-batch of 10"):
        assign([3, 11], capacity=10, ranks=2, attention_length=math.inf)


def test_padded_assignment_by_hand() -> None:
    assert assign_padded([3, 9, 1, 9, 5, 2], 2, 3, math.inf) == [[[1, 3]], [[4, 0]], [[5, 2]]]
    # neighbours meet in a micro-step, dealt out forwards and backwards in turn
    assert assign_padded([8, 7, 6, 5, 4, 3, 2, 1], 2, 2, math.inf) == [[[0, 1], [6, 7]], [[2, 3], [4, 5]]]
    # smaller groups rather than an idle rank
    assert assign_padded([8, 7, 6, 5], 3, 2, math.inf) == [[[0, 1]], [[2, 3]]]
    assert assign_padded([8, 7], 2, 3, math.inf) == [[[0]], [[1]], [[]]]
    assert assign_padded([], 2, 3, math.inf) == [[], [], []]


def test_a_giant_has_its_micro_step_filled_up() -> None:
    """A sample far above the average bin sets its micro-step's time: the other rank then takes as much as fits into it."""
    lengths = [100, *[10] * 31]
    assignment = assign(lengths, capacity=100, ranks=2, attention_length=math.inf)
    assert bin_costs(lengths, assignment, math.inf).tolist() == [[100, 50, 50], [100, 60, 50]]


def test_cost_by_hand() -> None:
    assert cost([0, 10, 100], 100.0).tolist() == [0, 11, 200]
    assert cost([7], math.inf).tolist() == [7]
    assert bin_costs([10, 100, 5], [[[0, 1]], [[]]], 100.0).tolist() == [[211.0], [0.0]]
    assert bin_costs([10, 100, 5], [[[0, 1]], [[2]]], 100.0, padded=True).tolist() == [[400.0], [5.25]]


def test_attention_counts_towards_a_bin() -> None:
    """Where attention costs as much as the rest at 100 tokens, such a document weighs as much as 2.7 of half its length."""
    lengths = [100, 50, 50, 50]
    assert assign(lengths, capacity=200, ranks=2, attention_length=math.inf) == [[[0, 3]], [[1, 2]]]
    assert assign(lengths, capacity=200, ranks=2, attention_length=100.0) == [[[1, 2, 3]], [[0]]]


def test_imbalance_by_hand() -> None:
    assert imbalance([[1.0, 2.0], [1.0, 2.0]]) == 0
    assert imbalance([[4.0], [0.0]]) == 0.5
    assert imbalance([[4.0, 1.0], [2.0, 1.0]]) == pytest.approx(1 - 4 / 5)
    assert imbalance([[], []]) == 0 and imbalance([[0.0], [0.0]]) == 0


def lost(lengths: NDArray[np.int64], ranks: int) -> float:
    attention_length = 12 * 4096
    assignment = assign(lengths, capacity=4096, ranks=ranks, attention_length=attention_length)
    check_assignment(assignment, len(lengths), ranks)
    return imbalance(bin_costs(lengths, assignment, attention_length))


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_ranks_lose_little_to_the_slowest(ranks: int) -> None:
    rng = np.random.default_rng(0)
    shares = [lost(alpaca_like(rng), ranks) for _ in range(20)]
    assert np.mean(shares) < 0.03 and max(shares) < 0.05


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_ranks_lose_little_to_the_slowest_on_real_conversations(real_lengths: NDArray[np.int64], ranks: int) -> None:
    plan = Plan(sizes=[len(real_lengths)], batch_size=512, seed=0, drop_last=False)
    shares = [lost(real_lengths[plan.members(2 * step)], ranks) for step in range(20)]
    assert np.mean(shares) < 0.05


def test_documents_as_long_as_a_bin_do_not_unbalance_the_others() -> None:
    """Ranks without one in its micro-step fill theirs up, and the other micro-steps get shorter.

    What is left is that a full bin of short documents costs 8 % less than one of a long document.
    """
    short = np.random.default_rng(0).integers(50, 400, 400)
    for num_long in (1, 5, 16, 20, 40):
        assert lost(np.concatenate([[4096] * num_long, short]), 16) < 0.06


def test_an_assignment_costs_little() -> None:
    rng = np.random.default_rng(0)
    batches = [alpaca_like(rng) for _ in range(20)]
    taken = []
    for lengths in batches:
        started = time.perf_counter()
        assign(lengths, capacity=4096, ranks=64, attention_length=49152.0)
        taken.append(time.perf_counter() - started)
    assert min(taken) < 0.005


# --- tensors ---------------------------------------------------------------------------------------------------------


def sample(ids: list[int], *trained: tuple[int, int]) -> Sample:
    return Sample(np.array(ids, np.int32), np.array(trained, np.int32).reshape(-1, 2))


ONE = sample([10, 11, 12, 13, 14], (1, 3), (4, 5))
TWO = sample([20, 21, 22], (0, 3))
THREE = sample([30, 31, 32, 33], (3, 4))


def test_the_first_token_is_never_predicted() -> None:
    assert trained_positions(ONE).tolist() == [1, 2, 4]
    assert trained_positions(TWO).tolist() == [1, 2]
    assert trained_positions(sample([1, 2], (0, 1))).tolist() == []
    assert trained_positions(sample([1, 2])).tolist() == []


def test_collate_packed_by_hand() -> None:
    batch = collate_packed([ONE, TWO, THREE])
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14, 20, 21, 22, 30, 31, 32, 33]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]
    assert list(batch.cu_seqlens or []) == [0, 5, 8, 12]
    assert batch.attention_mask is None
    assert batch.labels_N.tolist() == [11, 12, 14, 21, 22, 33]
    assert batch.index_N.tolist() == [0, 1, 3, 5, 6, 10]
    assert list(batch.targets.bounds) == [0, 3, 5, 6]
    assert batch.targets.num_tokens == 6
    assert batch.num_tokens == 12


def test_a_shared_prompt_stands_in_a_row_once() -> None:
    chosen, rejected = sample([7, 8, 9, 1, 2], (3, 5)), sample([7, 8, 9, 4], (3, 4))._replace(shared=3)
    batch = collate_packed([ONE, chosen, rejected, TWO])
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14, 7, 8, 9, 1, 2, 4, 20, 21, 22]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert list(batch.cu_seqlens or []) == [0, 5, 10, 11, 14] and list(batch.shared or []) == [0, 0, 3, 0]
    assert batch.labels_N.tolist() == [11, 12, 14, 1, 2, 4, 21, 22]
    assert batch.index_N.tolist() == [0, 1, 3, 7, 8, 7, 11, 12]  # 1 and 4 are both predicted from the prompt's 9
    assert list(batch.targets.bounds) == [0, 3, 5, 6, 8] and batch.num_tokens == 14
    assert batch.squared_lengths() == 5**2 + 5**2 + (4**2 - 3**2) + 3**2
    assert collate_packed([chosen]).shared is None
    padded = collate_padded([chosen, rejected])
    assert padded.input_ids.tolist() == [[7, 8, 9, 1, 2], [7, 8, 9, 4, 0]] and padded.shared is None
    assert padded.squared_lengths() == 5**2 + 4**2 and padded.num_tokens == 9


def test_a_shared_prompt_is_that_of_the_document_before() -> None:
    chosen, rejected = sample([7, 8, 1], (2, 3)), sample([7, 8, 4], (2, 3))._replace(shared=2)
    for wrong in ([rejected], [ONE, rejected], [chosen, ONE, rejected], [chosen, rejected, rejected]):
        with pytest.raises(ValueError, match="must stand behind the one that it shares it with"):
            collate_packed(wrong)


def test_collate_padded_by_hand() -> None:
    batch = collate_padded([ONE, TWO, THREE])
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, 0, 0], [30, 31, 32, 33, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert batch.cu_seqlens is None
    assert batch.labels_N.tolist() == [11, 12, 14, 21, 22, 33]
    assert batch.index_N.tolist() == [0, 1, 3, 5, 6, 12]
    assert list(batch.targets.bounds) == [0, 3, 5, 6]
    assert batch.num_tokens == 12


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_a_sample_with_nothing_to_train_keeps_its_place(collate: object) -> None:
    batch = collate([sample([1, 2], (0, 1)), TWO])  # type: ignore[operator]
    assert list(batch.targets.bounds) == [0, 0, 2]
    assert batch.labels_N.tolist() == [21, 22]
    assert all(
        str(t.dtype) == "torch.int64" for t in (batch.input_ids, batch.position_ids, batch.index_N, batch.labels_N)
    )


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_each_label_is_predicted_from_the_token_before_it(collate: object) -> None:
    batch = collate([ONE, TWO, THREE])  # type: ignore[operator]
    flat = batch.input_ids.flatten()
    assert flat[batch.index_N + 1].tolist() == batch.labels_N.tolist()


@pytest.mark.parametrize("padded", [False, True])
def test_an_empty_bin_is_one_token_that_counts_for_nothing(padded: bool) -> None:
    for batch in (empty_micro_batch(padded=padded), (collate_padded if padded else collate_packed)([])):
        assert batch.input_ids.tolist() == [[0]] and batch.position_ids.tolist() == [[0]]
        assert (batch.cu_seqlens is None) == padded and (batch.attention_mask is not None) == padded
        assert batch.cu_seqlens is None or list(batch.cu_seqlens) == [0, 1]
        assert batch.attention_mask is None or batch.attention_mask.tolist() == [[1]]
        assert batch.index_N.tolist() == [] and batch.labels_N.tolist() == []
        assert list(batch.targets.bounds) == [0] and batch.targets.num_tokens == 0
        assert batch.num_tokens == 0
        tensors = [batch.input_ids, batch.position_ids, batch.index_N, batch.labels_N]
        assert all(str(t.dtype) == "torch.int64" for t in tensors)
