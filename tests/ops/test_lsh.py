"""Buckets, orders and windows, each against counting by hand; and the rules that choose the number of buckets."""

import math

import pytest
import torch
from conftest import make_ids, make_model, max_abs_diff
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ReformerConfig as BuiltinConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from hf_reformer import ReformerModel
from hf_reformer.configuration_reformer import default_num_buckets
from hf_reformer.layers.attention import legacy_num_buckets
from hf_reformer.ops import dispatch
from hf_reformer.ops.layout import chunk_layout, window_layout
from hf_reformer.ops.lsh import (
    Centering,
    bucket_factors,
    centered,
    exploration_buckets,
    lsh_buckets,
    num_buckets_total,
    seeded_rotations,
    unit_rows,
    unit_sums,
    window_rotations,
)
from hf_reformer.ops.prng import make_key
from hf_reformer.ops.reference import inverse_permutation, visible_counts

BUCKET_COUNTS = [2, 4, 14, 64, (2, 2), (4, 8), (6, 10), (2, 4, 8)]
factors = st.sampled_from(BUCKET_COUNTS)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hashed(vectors, num_buckets, num_hashes=2, seed=0):
    rotations = window_rotations(make_key(seed), 0, *vectors.shape[1::2], num_hashes, num_buckets)
    return lsh_buckets(vectors, rotations, num_buckets)


# --- buckets


@given(num_buckets=factors, seed=st.integers(0, 2**40), num_hashes=st.integers(1, 4))
def test_buckets_are_in_range(num_buckets, seed, num_hashes):
    buckets = hashed(draw(2, 3, 200, 8, seed=seed % 100), num_buckets, num_hashes, seed)
    assert buckets.dtype == torch.int32
    assert buckets.shape == (2, 3, num_hashes, 200)
    assert buckets.min() >= 0
    assert buckets.max() < num_buckets_total(num_buckets)


@pytest.mark.parametrize("num_buckets", BUCKET_COUNTS, ids=str)
def test_every_bucket_is_used(num_buckets):
    assert hashed(draw(1, 1, 5000, 64), num_buckets).unique().numel() == num_buckets_total(num_buckets)


@given(num_buckets=factors, scale=st.floats(1e-3, 1e3))
def test_length_of_a_vector_does_not_matter(num_buckets, scale):
    vectors = draw(1, 2, 100, 8)
    assert torch.equal(hashed(vectors, num_buckets), hashed(vectors * scale, num_buckets))


@given(num_buckets=factors)
def test_opposite_vectors_land_in_opposite_buckets(num_buckets):
    vectors = draw(1, 2, 100, 8)
    one, other = hashed(vectors, num_buckets), hashed(-vectors, num_buckets)
    stride = 1
    for factor in bucket_factors(num_buckets):
        a, b = one // stride % factor, other // stride % factor
        assert torch.equal((a + factor // 2) % factor, b)
        stride *= factor


def test_collisions_grow_with_cosine_similarity():
    generator = torch.Generator().manual_seed(0)
    base, noise = (torch.randn(1, 1, 4000, 16, generator=generator) for _ in range(2))
    base, noise = torch.nn.functional.normalize(base, dim=-1), torch.nn.functional.normalize(noise, dim=-1)
    shares = []
    for cosine in (-0.9, -0.5, 0.0, 0.5, 0.8, 0.95, 1.0):
        orthogonal = torch.nn.functional.normalize(noise - (noise * base).sum(-1, keepdim=True) * base, dim=-1)
        near = cosine * base + math.sqrt(1 - cosine**2) * orthogonal
        shares.append((hashed(base, 16, 4) == hashed(near, 16, 4)).double().mean().item())
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert shares[2] == pytest.approx(1 / 16, abs=0.01)  # orthogonal vectors collide as chance has it
    assert shares[-2] > 0.5


@given(num_buckets=factors, seed=st.integers(0, 50))
def test_factors_combine_as_the_definition_says(num_buckets, seed):
    """For every factor the argmax over [xR, -xR] of its own columns; the first factor varies fastest."""
    vectors = draw(1, 2, 30, 6, seed=seed)
    columns = sum(bucket_factors(num_buckets)) // 2
    rotations = draw(2, 6, 2, columns, seed=seed + 1)
    found = lsh_buckets(vectors, rotations, num_buckets)
    for head in range(2):
        for hash_round in range(2):
            projected = vectors[0, head] @ rotations[head, :, hash_round]
            expected, stride, column = torch.zeros(30, dtype=torch.int64), 1, 0
            for factor in bucket_factors(num_buckets):
                part = projected[:, column : column + factor // 2]
                expected += stride * torch.cat([part, -part], dim=-1).argmax(-1)
                stride, column = stride * factor, column + factor // 2
            assert torch.equal(found[0, head, hash_round], expected.int())


def test_float32_decides_near_ties_differently_about_once_in_a_million():
    """Sums come out in another order where the shapes differ."""
    vectors = draw(1, 2, 50000, 64, dtype=torch.float32)
    rotations = window_rotations(make_key(0), 0, 2, 64, 4, 32)
    whole = lsh_buckets(vectors, rotations, 32)
    parts = [lsh_buckets(part, rotations, 32) for part in vectors.split([1, 6, 33, 1000, 48960], dim=2)]
    exact = lsh_buckets(vectors.double(), rotations.double(), 32)
    for other in (torch.cat(parts, dim=-1), exact):
        assert (other != whole).sum() <= 3  # of 400 000


def test_half_precision_hashes_in_float32():
    vectors = draw(1, 2, 500, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hashed(vectors, 32), hashed(vectors.double(), 32))


def test_hashing_has_no_gradient():
    vectors = draw(1, 1, 10, 4).requires_grad_()
    assert not hashed(vectors, 4).requires_grad


# --- the mean that is taken off before hashing


both_directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


@both_directions
@given(
    seed=st.integers(0, 1000), length=st.integers(1, 60), padding=st.booleans(), packed=st.booleans(),
    share=st.sampled_from([1.0, 0.5]),
)  # fmt: skip
def test_each_token_is_less_the_mean_of_what_it_may_see(causal, seed, length, padding, packed, share):
    generator = torch.Generator().manual_seed(seed)
    vectors = draw(2, 3, length, 8, seed=seed) + 1
    mask = torch.rand(2, length, generator=generator) > 0.3 if padding else torch.ones(2, length, dtype=torch.bool)
    samples = (torch.rand(2, length, generator=generator) < 0.1 * packed).cumsum(-1, dtype=torch.int32)
    samples = samples - samples[:, :1]
    center = Centering(causal, mask if padding else None, samples if packed else None, share=share)
    found = centered(vectors, center)
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    for row in range(2):
        for t in range(length):
            seen = mask[row] & (samples[row] == samples[row, t])
            seen = seen & (torch.arange(length) <= t) if causal else seen
            expected = unit[row, :, t] - share * unit[row][:, seen].mean(1) if mask[row, t] else torch.zeros(3, 8)
            assert (found[row, :, t] - expected).abs().max() <= 1e-11


@given(cut=st.integers(1, 59), padding=st.booleans())
def test_the_mean_goes_on_from_the_sums_of_earlier_tokens(cut, padding):
    vectors, mask = draw(2, 3, 60, 8) + 1, torch.rand(2, 60, generator=torch.Generator().manual_seed(0)) > 0.3
    mask = mask if padding else torch.ones_like(mask)
    whole = centered(vectors, Centering(True, mask))
    sums, counts = unit_sums(vectors[:, :, :cut], mask[:, :cut]), mask[:, :cut].sum(-1)
    rest = centered(vectors[:, :, cut:], Centering(True, mask[:, cut:], None, sums, counts))
    assert (rest - whole[:, :, cut:]).abs().max() <= 1e-11


def test_the_running_mean_of_a_million_tokens_does_not_drift():
    vectors = draw(1, 1, 2**20, 8, dtype=torch.float32) + 10
    last = centered(vectors, Centering(causal=True))[0, 0, -1]
    unit = vectors.double() / vectors.double().norm(dim=-1, keepdim=True)
    assert (last - (unit[0, 0, -1] - unit[0, 0].mean(0))).abs().max() <= 1e-7


@both_directions
def test_a_common_direction_no_longer_fills_a_few_buckets(causal):
    vectors = draw(1, 2, 4096, 32) + 4 * draw(2, 1, 32, seed=1)
    rotations = window_rotations(make_key(0), 0, 2, 32, 4, 32)
    for centering, least, most in ((None, 0.0, 0.6), (Centering(causal), 0.9, 1.0)):
        buckets = lsh_buckets(vectors, rotations, 32, centering)
        share = torch.nn.functional.one_hot(buckets.long(), 32).double().mean(-2)
        entropy = torch.special.entr(share).sum(-1) / math.log(32)
        assert entropy.min() >= least
        assert entropy.max() <= most


@both_directions
@pytest.mark.parametrize("packed", [False, True])
def test_equal_tokens_share_their_buckets(causal, packed):
    """What is left of them is 0, not the noise of rounding."""
    vectors = draw(1, 2, 1, 32, dtype=torch.float32).expand(-1, -1, 500, -1)
    samples = (torch.arange(500) // 200).int()[None] if packed else None
    rotations = window_rotations(make_key(0), 0, 2, 32, 4, 32)
    assert (lsh_buckets(vectors, rotations, 32, Centering(causal, None, samples)) == 0).all()


def test_what_is_not_a_number_moves_no_other_token():
    vectors = draw(1, 1, 50, 8)
    bad = vectors.clone()
    bad[:, :, 20, 3] = torch.nan
    zero = vectors.clone()
    zero[:, :, 20] = 0
    found, expected = (centered(x, Centering(causal=True)) for x in (bad, zero))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_directions
def test_vectors_too_large_to_be_squared_are_hashed_as_smaller_ones(causal, dtype, backend):
    """The largest numbers of bfloat16 and float32; other tokens keep their buckets."""
    vectors = draw(1, 2, 300, 32, dtype=torch.float32).to(dtype)
    large = vectors.clone()
    large[:, :, 100] *= 2.0**120
    large[:, :, 7, 3] = vectors[:, :, 7, 3] = vectors[:, :, 7].abs().max() * 2
    large[:, :, 7] *= 2.0**80
    rotations = window_rotations(make_key(0), 0, 2, 32, 4, 32)
    found, expected = (
        dispatch.lsh_buckets(x, rotations, 32, Centering(causal), backend=backend) for x in (large, vectors)
    )
    assert (found != expected).float().mean() < 1e-3
    assert (found[..., 100] == expected[..., 100]).all()


def test_the_largest_numbers_make_unit_vectors():
    rows = unit_rows(torch.tensor([[[[3e38, -3e38, 1.0, 0.0], [torch.inf, 0, 0, 0], [3.0, 4.0, 0.0, 0.0]]]]))
    expected = torch.tensor([[0.5**0.5, -(0.5**0.5), 0, 0], [0, 0, 0, 0], [0.6, 0.8, 0, 0]])
    assert max_abs_diff(rows[0, 0], expected) < 1e-6
    sizes = 10.0 ** torch.tensor([-10.0, 0, 153, 160, 200, 300], dtype=torch.float64)
    rows = unit_rows(torch.ones(6, 5, dtype=torch.float64)[None, None] * sizes[:, None])
    assert max_abs_diff(rows.norm(dim=-1), torch.ones(1, 1, 6)) < 1e-12


# --- rotations


def test_rotations_are_gaussian():
    rotations = window_rotations(make_key(5), 3, 4, 64, 4, 256).double()
    count = rotations.numel()
    assert rotations.mean().abs() < 5 / math.sqrt(count)
    assert (rotations.square().mean() - 1).abs() < 5 * math.sqrt(2 / count)
    assert (rotations.pow(4).mean() - 3).abs() < 5 * math.sqrt(96 / count)
    columns = rotations.permute(0, 2, 3, 1).reshape(-1, 64)
    assert torch.corrcoef(columns[:200]).fill_diagonal_(0).abs().max() < 0.7  # 64 numbers a column, 20 000 pairs


def test_rotations_are_functions_of_key_layer_and_round():
    first = window_rotations(make_key(0), 0, 2, 8, 4, 16)
    assert torch.equal(first, window_rotations(make_key(0), 0, 2, 8, 4, 16))
    assert torch.equal(first[:, :, :2], window_rotations(make_key(0), 0, 2, 8, 2, 16))  # fewer rounds: the first ones
    assert not torch.equal(first, window_rotations(make_key(1), 0, 2, 8, 4, 16))
    assert not torch.equal(first, window_rotations(make_key(0), 1, 2, 8, 4, 16))
    assert first.flatten().unique().numel() > 0.99 * first.numel()


@pytest.mark.usefixtures("global_generator_untouched")
def test_drawing_rotations_leaves_the_global_generator_alone():
    window_rotations(make_key(0), 0, 2, 8, 4, 16)
    seeded_rotations(7, 2, 8, 4, 16, like=draw(1))
    exploration_buckets(make_key(0), 0, 2, 1, 4, torch.arange(10, dtype=torch.int32)[None])


@pytest.mark.usefixtures("global_generator_untouched")
def test_evaluation_leaves_the_global_generator_alone():
    make_model(ReformerModel)(make_ids(1, 20))
    make_model(ReformerModel, attention_mode="chunk", hash_seed=3, lsh_attn_chunk_length=4)(make_ids(1, 20))


@pytest.mark.parametrize("num_buckets", [8, (4, 8)], ids=str)
def test_seeded_rotations_are_those_of_the_builtin(num_buckets):
    torch.manual_seed(11)
    expected = torch.randn(2, 8, 3, sum(bucket_factors(num_buckets)) // 2, dtype=torch.float64)
    assert torch.equal(seeded_rotations(11, 2, 8, 3, num_buckets, like=draw(1)), expected)


# --- exploration


def test_exploration_looks_at_nothing_but_the_rank():
    ranks = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]], dtype=torch.int32)
    buckets = exploration_buckets(make_key(0), 2, 3, 2, 8, ranks)
    assert buckets.shape == (2, 3, 2, 6)
    assert torch.equal(buckets[1, ..., 2:], buckets[0, ..., :4])


def test_exploration_spreads_evenly():
    buckets = exploration_buckets(make_key(0), 0, 4, 2, 6, torch.arange(5000, dtype=torch.int32)[None])
    shares = buckets.flatten().bincount(minlength=6) / buckets.numel()
    assert shares.numel() == 6
    assert (shares - 1 / 6).abs().max() < 0.01
    assert (buckets[0, 0, 0] == buckets[0, 0, 1]).double().mean() < 0.2  # orders and heads are drawn apart
    assert (buckets[0, 0, 0] == buckets[0, 1, 0]).double().mean() < 0.2


# --- windows

windows = st.fixed_dictionaries(
    {
        "length": st.integers(1, 40),
        "count": st.integers(1, 6),
        "window": st.integers(1, 50),
        "rounds": st.integers(1, 3),
        "causal": st.booleans(),
        "hidden": st.sampled_from([None, 0.0, 0.4, 1.0]),
        "tile": st.integers(1, 40),
        "seed": st.integers(0, 10**6),
    }
)


def window_case(length, count, window, rounds, causal, hidden, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randint(0, count, (2, 2, rounds, length), generator=generator).int()
    mask = None if hidden is None else torch.rand(2, length, generator=generator) >= hidden
    position = torch.zeros(2, 2, 1, length, dtype=torch.int32)
    groups = [(position, 1, max(1, window // 2)), (buckets, count, window)]
    return groups, mask, window_layout(groups, causal, mask, tile)


@given(drawn=windows)
@settings(max_examples=60)
def test_orders_are_permutations(drawn):
    _, _, orders = window_case(**drawn)
    tokens = torch.arange(drawn["length"], dtype=torch.int32).expand_as(orders.perm)
    assert torch.equal(orders.perm.sort(-1).values, tokens)
    assert torch.equal(orders.perm.gather(-1, inverse_permutation(orders.perm)), tokens)


@given(drawn=windows)
@settings(max_examples=60)
def test_windows_are_those_of_counting_by_hand(drawn):
    """Sorted by (bucket, position), a token sees its window in its bucket; padding stands last and sees nothing."""
    groups, mask, orders = window_case(**drawn)
    length, causal = drawn["length"], drawn["causal"]
    rounds = [(buckets[:, :, i], count, window) for buckets, count, window in groups for i in range(buckets.shape[2])]
    for row in range(2):
        real = range(length) if mask is None else mask[row].nonzero().flatten().tolist()
        padding = [t for t in range(length) if t not in set(real)]
        for index, (buckets, count, window) in enumerate(rounds):
            start = index * length
            for head in range(2):
                segments = [[t for t in real if buckets[row, head, t] == bucket] for bucket in range(count)]
                expected = [token for segment in segments for token in segment] + padding
                assert orders.perm[row, head, index].tolist() == expected
                ranges = []
                for segment in segments:
                    first = len(ranges)
                    last = first + len(segment) - 1
                    back, on = (window - 1, 0) if causal else (window // 2, window // 2)
                    ranges += [(max(first, place - back), min(last, place + on)) for place in range(first, last + 1)]
                lo, hi = orders.window_start[row, head, index] - start, orders.window_end[row, head, index] - start
                found = list(zip(lo.tolist(), hi.tolist(), strict=True))
                assert found[: len(real)] == ranges
                assert all(first > last for first, last in found[len(real) :])


@given(drawn=windows)
@settings(max_examples=60)
def test_a_tile_says_how_far_its_places_see(drawn):
    _, _, orders = window_case(**drawn)
    length = drawn["length"]
    place = torch.arange(length)
    first = place // orders.block_size * orders.block_size
    start = torch.arange(orders.perm.shape[2])[:, None] * length
    sees = orders.window_start <= orders.window_end
    assert (orders.window_start - start >= torch.where(sees, first - orders.left_reach, -1)).all()
    assert (
        orders.window_end - start <= torch.where(sees, first + orders.block_size - 1 + orders.right_reach, 10**9)
    ).all()
    assert (torch.where(sees, orders.window_start, start) >= start).all()  # no window leaves its round
    assert (torch.where(sees, orders.window_end, start) < start + length).all()


@given(drawn=windows)
def test_padding_is_not_seen_and_sees_nothing(drawn):
    _, mask, orders = window_case(**drawn)
    counts = visible_counts(orders)
    assert counts.max() <= 1
    if mask is not None:
        assert (counts.transpose(-1, -2)[~mask[:, None].expand(-1, 2, -1)] == 0).all()
        assert (counts[~mask[:, None].expand(-1, 2, -1)] == 0).all()
    real = torch.ones(2, drawn["length"], dtype=torch.bool) if mask is None else mask
    assert (counts.diagonal(dim1=-2, dim2=-1)[real[:, None].expand(-1, 2, -1)] == 1).all()  # a token sees itself
    if drawn["causal"]:
        assert (counts.triu(1) == 0).all()


# --- chunks


@given(
    chunk=st.integers(1, 6),
    chunks=st.integers(1, 5),
    rounds=st.integers(1, 3),
    count=st.integers(1, 5),
    before=st.integers(0, 2),
    after=st.integers(0, 2),
    hidden=st.sampled_from([None, 0.4]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=100)
def test_chunks_are_those_of_counting_by_hand(chunk, chunks, rounds, count, before, after, hidden, seed):
    """All rounds in one line, sorted by (round, bucket, position), padding last in its round; look-back wraps."""
    generator = torch.Generator().manual_seed(seed)
    length = chunk * chunks
    buckets = torch.randint(0, count, (2, 2, rounds, length), generator=generator).int()
    mask = None if hidden is None else torch.rand(2, length, generator=generator) >= hidden
    orders = chunk_layout(buckets, count, chunk, before, after, mask)
    counts = visible_counts(orders)
    for row in range(2):
        for head in range(2):
            if chunks == 1:  # a short input: everybody sees everybody, without hashing
                assert (counts[row, head] == 1).all()
                continue
            real = [True] * length if mask is None else mask[row].tolist()
            line = []
            for order in buckets[row, head].tolist():
                line += sorted(
                    range(length), key=lambda t, order=order, real=real: (order[t] if real[t] else count, t)
                )
            assert orders.perm[row, head].flatten().tolist() == line
            expected = torch.zeros(length, length, dtype=torch.int64)
            total = rounds * chunks
            for index in range(total):
                for neighbor in range(index - before, index + after + 1):
                    at = neighbor % total * chunk
                    for query in line[index * chunk : (index + 1) * chunk]:
                        for key in line[at : at + chunk]:
                            expected[query, key] += 1
            assert torch.equal(counts[row, head], expected)


# --- how many buckets


@pytest.mark.parametrize(("chunk", "max_positions"), [(64, 4096), (64, 524288), (256, 65536), (10, 100), (16, 100000)])
def test_the_old_number_of_buckets_is_the_builtins(chunk, max_positions):
    config = BuiltinConfig(
        lsh_attn_chunk_length=chunk,
        max_position_embeddings=max_positions,
        hidden_size=4,
        num_attention_heads=1,
        attention_head_size=4,
        attn_layers=["lsh"],
    )
    layer = LSHSelfAttention(config)
    for chunks in [*range(2, 70), 127, 128, 129, 500, 1000, 2047, 2048, 2049, 8192]:
        length = chunks * chunk
        layer.num_buckets = layer.config.num_buckets = None
        layer._set_num_buckets(length)
        expected = layer.num_buckets
        found = legacy_num_buckets(length, chunk, max_positions)
        assert found == (tuple(expected) if isinstance(expected, list) else expected), length


@pytest.mark.parametrize(
    ("max_positions", "window", "expected"),
    [
        (4096, 128, 32),
        (16384, 128, 128),
        (65536, 128, (16, 32)),
        (524288, 128, (64, 64)),
        (5000, 128, 32),
        (6000, 128, 64),
        (100, 128, 2),
        (1, 128, 2),
        (4096, 1, (64, 64)),
    ],
)
def test_the_default_number_of_buckets(max_positions, window, expected):
    assert default_num_buckets(max_positions, window) == expected


@given(max_positions=st.integers(1, 2**24), window=st.integers(1, 4096))
def test_the_default_number_of_buckets_is_the_nearest_power_of_two(max_positions, window):
    found = default_num_buckets(max_positions, window)
    total = num_buckets_total(found)
    assert all(factor % 2 == 0 for factor in bucket_factors(found))
    assert (total > 128) == isinstance(found, tuple)
    wanted = max(2, max_positions / window)
    assert total / math.sqrt(2) * (1 - 1e-12) <= wanted <= total * math.sqrt(2) * (1 + 1e-12)
