"""Randomness: one key a training forward, everything else a function of that key and of the place it is used at.

Known answers come from a few lines of plain Python, so that another backend can be held against them.
"""

import math
import threading

import pytest
import torch
import transformers
from conftest import max_abs_diff
from head_cases import HEADS, inputs_of, make_head
from torch import nn

from hf_reformer import ReformerConfig, ReformerForConditionalGeneration, ReformerModel
from hf_reformer.layers import attention, feed_forward
from hf_reformer.ops import dispatch
from hf_reformer.ops.lsh import exploration_buckets, window_rotations
from hf_reformer.ops.prng import draw_key, dropout, fold, keep_threshold, make_key, mix, normal, pair_scramble
from hf_reformer.ops.reference import dropout_factors

IDS = torch.arange(2 * 50).mul_(37).remainder_(39).add_(1).view(2, 50)
KEY = make_key(42)


def make(**changes):
    fields = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 8}
    fields |= {"feed_forward_size": 48, "max_position_embeddings": 64, "attn_layers": ("local", "lsh", "full", "lsh")}
    fields |= {"num_buckets": 4, "lsh_window": 12, "local_window": 12, "hidden_dropout_prob": 0.2, "is_decoder": True}
    fields |= {"lsh_attention_probs_dropout_prob": 0.2, "local_attention_probs_dropout_prob": 0.2}
    torch.manual_seed(0)
    return ReformerModel(ReformerConfig(**{**fields, **changes})).train()


def hidden_of(model, seed=None, **inputs):
    if seed is not None:
        torch.manual_seed(seed)
    return model(IDS, **inputs).last_hidden_state


def backward(hidden):
    probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    (hidden * probe).mean().backward()


def gradients(model):
    return [p.grad for p in model.parameters()]


PATHS = {
    "reversible": {},
    "plain": {"reversible": False},
    "chunked feed-forward": {"chunk_size_feed_forward": 7},
    "chunk rule": {"attention_mode": "chunk", "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8},
    "chunk rule with a seed": {
        "attention_mode": "chunk",
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "hash_seed": 1,
    },
    "checkpointed": {},
}
every_path = pytest.mark.parametrize("path", PATHS)


def make_for(path):
    model = make(**PATHS[path])
    if path == "checkpointed":
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.fixture
def spy(monkeypatch):
    """spy(module, name): the results of that function from now on."""

    def watch(module, name):
        original, results = getattr(module, name), []

        def watched(*args, **kwargs):
            results.append(original(*args, **kwargs))
            return results[-1]

        monkeypatch.setattr(module, name, watched)
        return results

    return watch


# --- the global generator


@every_path
def test_nothing_is_reseeded(path, monkeypatch):
    model = make_for(path)

    def forbidden(*args):
        raise AssertionError("the global generator was seeded")

    for owner in (torch, torch.random, torch.cuda):
        for name in ("manual_seed", "seed", "manual_seed_all", "seed_all"):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, forbidden)
    backward(hidden_of(model))
    hidden_of(model.eval())


@every_path
def test_a_training_step_draws_one_key_and_nothing_else(path):
    model = make_for(path)
    torch.manual_seed(7)
    draw_key()
    expected = torch.get_rng_state()
    hidden = hidden_of(model, 7)
    assert torch.equal(torch.get_rng_state(), expected)
    backward(hidden)
    assert torch.equal(torch.get_rng_state(), expected)


@every_path
@pytest.mark.parametrize("record", [False, True], ids=["no_grad", "grad"])
def test_evaluation_leaves_the_generator_alone(path, record):
    model = make_for(path).eval()
    state = torch.get_rng_state()
    with torch.set_grad_enabled(record):
        hidden = hidden_of(model)
    if record:
        backward(hidden)
    assert torch.equal(torch.get_rng_state(), state)


@every_path
def test_a_seed_repeats_a_training_step(path):
    model = make_for(path)
    found = []
    for _ in range(2):
        transformers.set_seed(11)
        model.zero_grad()
        hidden = hidden_of(model)
        backward(hidden)
        found.append([hidden.detach(), *gradients(model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], hidden_of(model))  # the generator has moved on


def test_a_forward_leaves_nothing_on_the_modules():
    """State lives in the call: a second forward before backward cannot disturb the first."""
    model = make()
    before = {module: dict(vars(module)) for module in model.modules()}
    backward(hidden_of(model))
    for module, then in before.items():
        assert vars(module).keys() == then.keys()
        assert all(vars(module)[name] is value for name, value in then.items())


def test_a_forward_in_between_does_not_change_gradients():
    model = make(reversible=False)
    backward(hidden_of(model, 1))
    expected = [g.clone() for g in gradients(model)]
    model.zero_grad()
    first = hidden_of(model, 1)
    hidden_of(model, 2)
    backward(first)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected, strict=True))


def test_threads_draw_the_keys_that_one_thread_would():
    model = make()
    torch.manual_seed(4)
    expected = {hidden_of(model).sum().item() for _ in range(6)}
    found = []
    torch.manual_seed(4)
    threads = [threading.Thread(target=lambda: found.append(hidden_of(model).sum().item())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == expected


# --- rotations and exploration orders


def all_equal(some, others):
    return len(some) == len(others) > 0 and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def rotations_of(model, spy, **inputs):
    results = spy(attention, "window_rotations")
    with torch.no_grad():
        hidden_of(model, **inputs)
    return list(results)


def test_evaluation_repeats_itself():
    model = make().eval()
    first = hidden_of(model)
    backward(hidden_of(model.train()))
    assert torch.equal(hidden_of(model.eval()), first)


def test_rotations_of_evaluation_are_a_function_of_seed_layer_and_round(spy):
    found = {seed: rotations_of(make(hash_seed=seed).eval(), spy) for seed in (None, 0, 1)}
    assert all_equal(found[None], found[0])
    assert not torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[0][1])  # two lsh layers
    first, second = found[0][0].unbind(2)
    assert not torch.equal(first, second)
    other = make(hash_seed=0, initializer_range=0.5, hidden_dropout_prob=0.5).eval()  # and of nothing else
    assert all_equal(rotations_of(other, spy), found[0])
    like = torch.zeros(1, 2, 4, 8)
    assert torch.equal(found[0][0], dispatch.window_rotations(make_key(0), 1, 2, 8, 2, 4, like))


def test_rotations_do_not_depend_on_the_number_of_rounds(spy):
    model = make().eval()
    two, five = (rotations_of(model, spy, num_hashes=count) for count in (2, 5))
    assert all_equal([x[:, :, :2] for x in five], two)


def test_a_saved_model_uses_the_same_rotations(tmp_path, spy):
    model = make(hash_seed=9).eval()
    rotations, hidden = rotations_of(model, spy), hidden_of(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(123)
    loaded = ReformerModel.from_pretrained(tmp_path)
    assert all_equal(rotations_of(loaded, spy), rotations)
    assert torch.equal(hidden_of(loaded), hidden)


def test_every_training_forward_has_fresh_rotations_and_exploration(spy):
    model = make()
    rotations, explored = spy(attention, "window_rotations"), spy(attention, "exploration_buckets")
    for seed in (1, 2, 1):
        hidden_of(model, seed)
    first, second, again = (rotations[i : i + 2] for i in (0, 2, 4))
    assert all_equal(first, again)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all_equal(explored[:2], explored[4:])
    assert not torch.equal(explored[0], explored[2])
    assert not torch.equal(explored[0], explored[1])


def test_recomputation_uses_the_rotations_of_its_forward(spy):
    model = make()
    rotations = spy(attention, "window_rotations")
    hidden = hidden_of(model, 1)
    hidden_of(model, 2)
    backward(hidden)
    assert all_equal(rotations[4:], rotations[1::-1])  # the last layer comes first


def test_without_resampling_training_uses_the_rotations_of_evaluation(spy):
    model = make(resample_rotations=False)
    evaluated = rotations_of(model.eval(), spy)
    rotations, explored = spy(attention, "window_rotations"), spy(attention, "exploration_buckets")
    for seed in (1, 2):
        hidden_of(model.train(), seed)
    assert all_equal(rotations, evaluated * 2)
    assert all_equal(explored[:2], explored[2:])


def test_evaluation_does_not_explore(spy):
    explored = spy(attention, "exploration_buckets")
    hidden_of(make().eval())
    assert explored == []


def test_split_batches_agree_without_resampling_and_dropout():
    dropouts = ("hidden_dropout_prob", "lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob")
    model = make(resample_rotations=False, **dict.fromkeys(dropouts, 0.0))
    whole = hidden_of(model)
    parts = torch.cat([model(ids[None]).last_hidden_state for ids in IDS])
    assert torch.allclose(whole, parts, atol=1e-5)


def test_exploration_is_free_of_content_and_padding():
    ranks = torch.arange(20, dtype=torch.int32)[None]
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.int32), ranks], dim=1)
    some, others = (exploration_buckets(KEY, 1, 2, 3, 8, x) for x in (ranks, padded))
    assert torch.equal(some, others[..., 6:])
    assert torch.equal(some[:, :, :1], exploration_buckets(KEY, 1, 2, 1, 8, ranks))  # nor of how many there are


# --- dropout


def mask_of(key=KEY, shape=(2, 40, 33), p=0.3, first=0):
    return dropout(torch.ones(shape), p, key, first) != 0


@pytest.mark.parametrize("changes", [{}, {"is_decoder": False}, PATHS["chunk rule"]], ids=["causal", "both", "chunk"])
def test_backends_drop_the_same(changes):
    changes = {"attn_layers": ("local", "lsh"), **changes}
    fast, reference = (make(attention_backend=name, **changes) for name in ("torch", "reference"))
    assert torch.allclose(hidden_of(fast, 1), hidden_of(reference, 1), atol=1e-5)
    assert not torch.allclose(hidden_of(fast, 1), hidden_of(fast, 2), atol=1e-2)


@pytest.mark.parametrize("path", ["reversible", "chunked feed-forward", "checkpointed"])
def test_recomputation_drops_the_same(path, spy):
    model = make_for(path)
    found = spy(feed_forward, "dropout")
    hidden = hidden_of(model, 1)
    forward = {x.detach().numpy().tobytes() for x in found[1:-1]}  # without those around the layers
    hidden_of(model, 2)
    found.clear()
    backward(hidden)
    again = {x.detach().numpy().tobytes() for x in found}
    assert again == forward or (path == "checkpointed" and again < forward)  # torch stops once it has what it needs


MANY_DROPOUTS = {
    "hidden_dropout_prob": 0.2,
    "lsh_attention_probs_dropout_prob": 0.2,
    "local_attention_probs_dropout_prob": 0.2,
    "attn_layers": ["local", "lsh", "full"],
    "resample_rotations": False,
    "lsh_exploration_orders": 0,
}
DROPPING = {cls: inputs_of(cls) for cls in HEADS}
DROPPING[ReformerForConditionalGeneration] = {"input_ids": IDS, "decoder_input_ids": IDS}
with_every_head = pytest.mark.parametrize("cls", DROPPING, ids=lambda cls: cls.__name__)


def dropouts_of(model):
    return [module for module in model.modules() if isinstance(module, nn.Dropout)]


def first_output(model, cls, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(**DROPPING[cls])[0]


@with_every_head
def test_p_of_every_dropout_module_is_all_there_is_to_dropout(cls):
    """What trl's `disable_dropout` sets; and nothing else: a config that is changed later changes nothing."""
    model = make_head(cls, **MANY_DROPOUTS)
    plain = first_output(model, cls, 1)
    model.train()
    before = first_output(model, cls, 1)
    assert not torch.allclose(before, plain)
    for name in ("hidden_dropout_prob", "lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob"):
        setattr(model.config, name, 0.0)
    assert torch.equal(first_output(model, cls, 1), before)
    for module in dropouts_of(model):
        module.p = 0.0
    assert torch.equal(first_output(model, cls, 1), first_output(model, cls, 2))


@with_every_head
def test_dropout_modules_alone_may_be_in_training(cls):
    """Monte Carlo dropout: the rest of the model is in evaluation. And the other way round nothing drops."""
    model = make_head(cls, **MANY_DROPOUTS)
    plain = first_output(model, cls, 1)
    for module in dropouts_of(model):
        module.train()
    one, two = first_output(model, cls, 1), first_output(model, cls, 2)
    assert not torch.allclose(one, two)
    assert torch.equal(one, first_output(model, cls, 1))
    assert torch.equal(one, first_output(make_head(cls, **MANY_DROPOUTS).train(), cls, 1)), "as in training"
    model.train()
    for module in dropouts_of(model):
        module.eval()
    assert max_abs_diff(first_output(model, cls, 1), plain) <= 1e-10


def test_rotations_of_monte_carlo_dropout_are_those_of_evaluation():
    model = make(hidden_dropout_prob=1e-9).eval()
    plain = hidden_of(model, 1)
    for module in dropouts_of(model):
        module.train()
        module.p = 1e-9  # rounds to zero
    assert torch.allclose(hidden_of(model, 2), plain, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"reversible": False}], ids=["reversible", "plain"])
def test_dropout_switched_off_before_backward_is_repeated(changes):
    model = make(**changes)
    backward(hidden_of(model, 1))
    expected = [grad.clone() for grad in gradients(model)]
    model.zero_grad()
    hidden = hidden_of(model, 1)
    for module in dropouts_of(model):
        module.p = 0.0
    backward(hidden)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(model), expected, strict=True))


def test_evaluation_and_zero_drop_nothing():
    x = torch.randn(2, 3, 4)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, KEY) is x
    assert dropout(x, 2.0**-18, KEY) is x  # rounds to zero
    assert not dropout(x, 1.0, KEY).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_is_divided_by_the_share_that_is_kept(dtype):
    x = torch.randn(2, 5, 7).to(dtype).requires_grad_()
    y = dropout(x, 0.25, KEY)
    assert y.dtype == dtype
    kept = mask_of(shape=x.shape, p=0.25)
    assert torch.allclose(y, torch.where(kept, x / 0.75, 0), rtol=1e-2)
    y.sum().backward()
    assert torch.allclose(x.grad, (kept / 0.75).to(dtype))


def test_a_mask_is_a_function_of_row_position_and_feature():
    """So slices of any of them drop what the whole drops."""
    whole = mask_of()
    assert torch.equal(mask_of(shape=(1, 40, 33)), whole[:1])
    assert torch.equal(mask_of(shape=(2, 9, 33)), whole[:, :9])
    assert torch.equal(mask_of(shape=(2, 40, 8)), whole[..., :8])
    assert torch.equal(mask_of(shape=(2, 11, 33), first=23), whole[:, 23:34])
    transposed = torch.ones(2, 33, 40).transpose(1, 2)
    assert torch.equal(dropout(transposed, 0.3, KEY) != 0, whole)


def test_an_attention_mask_is_a_function_of_row_head_query_and_key():
    whole = dropout_factors(KEY, 0.3, 3, 4, 20)
    assert torch.equal(dropout_factors(KEY, 0.3, 2, 4, 20), whole[:2])
    assert torch.equal(dropout_factors(KEY, 0.3, 3, 2, 20), whole[:, :2])
    assert torch.equal(dropout_factors(KEY, 0.3, 3, 4, 9), whole[..., :9, :9])


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_dropout_drops_the_same(backend):
    compiled = torch.compile(dropout, backend=backend, fullgraph=True)
    x = torch.randn(2, 8, 5)
    assert torch.equal(compiled(x, 0.3, KEY, 3), dropout(x, 0.3, KEY, 3))


# --- statistics: everything is fixed by its key, so none of these can fail by chance


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(p):
    for dropped in (~mask_of(shape=(4, 256, 256), p=p), dropout_factors(KEY, p, 4, 4, 128) == 0):
        deviation = math.sqrt(p * (1 - p) / dropped.numel())
        assert abs(dropped.double().mean() - p) < 4 * deviation
        for dim in range(dropped.dim()):  # and in every row, head, position and feature
            others = [d for d in range(dropped.dim()) if d != dim]
            share = dropped.double().mean(others)
            assert (share - p).abs().max() < 5 * deviation * math.sqrt(len(share))


def correlation(a, b):
    """In units of what chance gives."""
    a, b = (x.double() - x.double().mean() for x in (a, b))
    return float((a * b).mean() / (a.std() * b.std()) * math.sqrt(a.numel()))


@pytest.mark.parametrize("shift", [1, 2, 3, 32])
def test_masks_of_different_places_are_independent(shift):
    for mask in (mask_of(shape=(64, 96, 96)), dropout_factors(KEY, 0.3, 36, 36, 36) > 0):
        for dim in range(mask.dim()):
            length = mask.shape[dim] - shift
            assert abs(correlation(mask.narrow(dim, 0, length), mask.narrow(dim, shift, length))) < 4.5


def test_masks_of_rectangles_are_independent():
    """Two rows and two columns: the fourth corner must not follow from the other three."""
    for mask in (mask_of(shape=(1, 1024, 1024), p=0.5)[0], dropout_factors(KEY, 0.5, 1, 1, 1024)[0, 0] > 0):
        sign = mask.double() * 2 - 1
        for rows, columns in ((1, 1), (1, 2), (2, 1), (5, 7)):
            products = sign * sign.roll(rows, 0) * sign.roll(columns, 1) * sign.roll((rows, columns), (0, 1))
            assert abs(float(products.mean())) * 1024 < 4.5


def test_masks_of_different_keys_layers_and_sites_are_independent():
    keys = [make_key(seed) for seed in range(3)]
    keys += [fold(key, layer, site) for key in keys for layer in range(-1, 3) for site in range(1, 9)]
    masks = torch.stack([mask_of(key, (2, 64, 64)).flatten() for key in keys]).double()
    masks = (masks - masks.mean(1, keepdim=True)) / masks.std(1, keepdim=True)
    products = (masks @ masks.T / math.sqrt(masks.shape[1])).fill_diagonal_(0)
    assert products.abs().max() < 5.5  # of about 5000 pairs
    assert abs(float(products.std()) - 1) < 0.1


def test_folds_collide_no_more_than_chance():
    counters = [torch.arange(n, dtype=torch.int32) for n in (16, 8, 32, 64)]
    grid = torch.meshgrid(*counters, indexing="ij")
    drawn = fold(KEY, *grid).flatten()
    assert drawn.numel() - drawn.unique().numel() < 24  # 2^18 of 2^32: 8 expected


def test_every_bit_of_mix_depends_on_every_bit():
    x = torch.arange(4096, dtype=torch.int32) * 1048583
    for bit in range(32):
        flipped = mix(x) ^ mix(x ^ make_key(1 << bit))
        shares = torch.stack([(flipped >> out & 1).double().mean() for out in range(32)])
        assert (shares - 0.5).abs().max() < 0.05


def test_normal_numbers_are_normal():
    x = normal(fold(KEY, torch.arange(2**18, dtype=torch.int32))).double()
    chance = 1 / math.sqrt(x.numel())
    assert torch.isfinite(x).all()
    assert abs(x.mean()) < 4 * chance
    assert abs(x.var() - 1) < 4 * math.sqrt(2) * chance
    assert abs((x**3).mean()) < 4 * math.sqrt(15) * chance
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96) * chance
    below = (torch.special.ndtr(x.sort().values) - (torch.arange(x.numel()) + 0.5) / x.numel()).abs().max()
    assert below < 1.95 * chance  # Kolmogorov and Smirnov, one in a thousand
    for shift in (1, 2, 7):
        assert abs(correlation(x[shift:], x[:-shift])) < 4
        assert abs(correlation(x[shift:] ** 2, x[:-shift] ** 2)) < 4


@pytest.mark.parametrize("count", [2, 6, 128, 1000])
def test_exploration_buckets_are_uniform(count):
    drawn = exploration_buckets(KEY, 0, 2, 2, count, torch.arange(2**15, dtype=torch.int32)[None])
    seen = torch.bincount(drawn.flatten(), minlength=count).double()
    assert len(seen) == count
    expected = drawn.numel() / count
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert abs(chi_square - (count - 1)) < 4 * math.sqrt(2 * count)


# --- known answers


WORD = 2**32


def signed(x):
    return (x + WORD // 2) % WORD - WORD // 2


def python_mix(x):
    x = (x ^ x >> 16) * 0x85EBCA6B % WORD
    x = (x ^ x >> 13) * 0xC2B2AE35 % WORD
    return x ^ x >> 16


def python_fold(key, *counters):
    key %= WORD
    for counter in counters:
        key = python_mix(((key ^ counter * 0x9E3779B9 % WORD) + 1) % WORD)
    return key


def python_pair_scramble(a, b):
    x = (a % WORD ^ b % WORD) * 0x85EBCA6B % WORD
    return (x ^ x >> 15) * 0xC2B2AE35 % WORD


EDGES = [0, 1, -1, 2, 65535, 65536, 2**31 - 1, -(2**31), -(2**31) + 1, 123456789, -987654321]
MIXES = {0: 0, 1: 1364076727, -1: -2114883783, 2**31 - 1: -104067416, -(2**31): 1832674720, 123456789: -1168058214}
FOLDS = [
    (0, (0,), 1364076727),
    (0, (1,), -1767835285),
    (1, (0,), 821347078),
    (42, (3, 1, 0), -2009980051),
    (-1, (-1, 7), -1151340355),
    (-(2**31), (2**31 - 1, -(2**31)), 403982735),
    (123456789, (5, 6, 7, 8), -704771208),
]
PAIRS = [(0, 0, 0), (1, 2, -294578381), (-1, 1, -1563876286), (123456789, -987654321, -1028490509)]


@pytest.mark.parametrize(("x", "expected"), MIXES.items())
def test_known_mixes(x, expected):
    assert int(mix(make_key(x))) == expected == signed(python_mix(x % WORD))


@pytest.mark.parametrize(("key", "counters", "expected"), FOLDS)
def test_known_folds(key, counters, expected):
    assert int(fold(make_key(key), *counters)) == expected == signed(python_fold(key, *counters))
    assert int(fold(make_key(key), *(make_key(c) for c in counters))) == expected


@pytest.mark.parametrize(("a", "b", "expected"), PAIRS)
def test_known_pairs(a, b, expected):
    assert int(pair_scramble(make_key(a), make_key(b))) == expected == signed(python_pair_scramble(a, b))


def test_integer_arithmetic_wraps_around_like_plain_python():
    """At the edges and elsewhere, for vectors long enough to take every vectorised path."""
    drawn = torch.randint(-(2**31), 2**31, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    numbers = EDGES + drawn
    x = torch.tensor(numbers, dtype=torch.int32)
    assert mix(x).tolist() == [signed(python_mix(n % WORD)) for n in numbers]
    assert fold(x, 7, x.flip(0)).tolist() == [
        signed(python_fold(a, 7, b)) for a, b in zip(numbers, numbers[::-1], strict=True)
    ]
    assert pair_scramble(x, x.flip(0)).tolist() == [
        signed(python_pair_scramble(a, b)) for a, b in zip(numbers, numbers[::-1], strict=True)
    ]


def test_known_draws():
    """What is built on them: a dropout mask, exploration buckets, rotations, an attention mask."""
    kept = mask_of(shape=(2, 3, 5), p=0.5).int().flatten().tolist()
    assert "".join(map(str, kept)) == "100110010001101" + "010011010101010"
    explored = exploration_buckets(KEY, 3, 2, 1, 6, torch.arange(8, dtype=torch.int32)[None])
    assert "".join(map(str, explored.flatten().tolist())) == "40304033" + "14024114"
    rotations = window_rotations(KEY, 1, 1, 2, 2, 4).flatten().tolist()
    expected = [0.11233487, -1.0223999, 0.37667078, -1.0812402, 0.95584887, -2.2500236, 0.37701142, 0.90458351]
    assert rotations == pytest.approx(expected, abs=1e-6)
    pairs = (dropout_factors(KEY, 0.5, 1, 2, 4) > 0).int().flatten().tolist()
    assert "".join(map(str, pairs)) == "0111100110100101" + "0001101010000110"


def test_a_dropout_mask_in_plain_python():
    """For backends to come: two features share a word, its low half first."""
    dropped = round(0.3 * 2**16)
    for row, place, feature in [(0, 0, 0), (1, 39, 32), (1, 7, 31), (0, 23, 8)]:
        word = python_pair_scramble(python_fold(42, row, place), python_fold(42, feature // 2))
        word ^= word >> 16
        half = word >> 16 if feature % 2 else word & 0xFFFF
        kept = (half + 2**15) % 2**16 >= dropped  # read as a signed number
        assert bool(mask_of()[row, place, feature]) == kept


def test_folds_tell_the_order_and_number_of_counters():
    assert len({int(fold(KEY, *c)) for c in [(), (0,), (0, 0), (1, 2), (2, 1), (1,), (2,)]}) == 7
    rows, columns = torch.arange(3, dtype=torch.int32)[:, None], torch.arange(4, dtype=torch.int32)
    table = fold(KEY, rows, columns)
    assert table.shape == (3, 4)
    assert table[2, 3] == fold(KEY, 2, 3)


def test_keys_are_32_bits_of_any_seed():
    for seed in (0, 1, -1, 2**31, 2**32 + 5, -(2**40) + 3, 2**63):
        assert int(make_key(seed)) % WORD == seed % WORD
        assert make_key(seed).dtype == torch.int32
    torch.manual_seed(0)
    drawn = torch.stack([draw_key() for _ in range(2000)])
    assert drawn.dtype == torch.int32
    assert drawn.unique().numel() == 2000
    assert abs((drawn < 0).double().mean() - 0.5) < 0.05
    assert drawn.min() < -(2**30) * 1.9
    assert drawn.max() > 2**30 * 1.9


def test_thresholds_cover_every_probability():
    assert keep_threshold(0.0) == -(2**31)
    assert keep_threshold(0.5) == 0
    assert keep_threshold(1.0) == 2**31
