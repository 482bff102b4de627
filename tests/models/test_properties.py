"""What every Reformer promises, in window mode: the future does not leak, padding and neighbors in a batch change
nothing, and where every pair is visible attention is exact.

All of it in float64 to 1e-10, in evaluation and in training (without dropout, with fixed rotations), at the default
windows and at small ones that bite in short inputs.
"""

import math

import pytest
import torch
from conftest import REPEATABLE, SMALL_WINDOWS, make_ids, make_model, max_abs_diff
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_reformer import ReformerConfig, ReformerForCausalLM, ReformerModel
from hf_reformer.layers import attention as attention_module

TOLERANCE = 1e-10
SHORT = (1, 2, 63, 64, 65, 127)

STACKS = {
    "local": ["local"] * 2,
    "lsh": ["lsh"] * 2,
    "full": ["full"] * 2,
    "mixed": ["local", "lsh", "full", "lsh"],
}
WINDOWS = {
    "default": {"max_position_embeddings": 5000, "local_window": 128},
    "small": {"max_position_embeddings": 5000, **SMALL_WINDOWS},
    "factorised": {"max_position_embeddings": 5000, "lsh_window": 9, "local_window": 5, "num_buckets": [2, 4]},
    "hash_only": {"max_position_embeddings": 5000, **SMALL_WINDOWS, "lsh_include_local": False},
}
# (stack, windows, rounds): rounds matter where there is hashing
ALL_CASES = [
    ("local", "default", 1),
    ("local", "small", 1),
    ("full", "default", 1),
    *[(stack, windows, rounds) for stack in ("lsh", "mixed") for windows in WINDOWS for rounds in (1, 2, 4)],
]
CASES = [
    ("local", "small", 1),
    ("full", "default", 1),
    ("lsh", "default", 2),
    ("lsh", "small", 1),
    ("mixed", "small", 4),
    ("mixed", "factorised", 2),
    ("mixed", "hash_only", 2),
]
FEW_CASES = [("mixed", "default", 2), ("lsh", "small", 4), ("local", "small", 1)]


def model_of(stack: str, windows: str, rounds: int, causal: bool, **overrides):
    overrides = {**WINDOWS[windows], **REPEATABLE, **overrides}
    return make_model(ReformerModel, attn_layers=STACKS[stack], num_hashes=rounds, is_decoder=causal, **overrides)


def run(model, ids, mask=None, training: bool = False) -> torch.Tensor:
    """Last hidden state, (B, T, 2D). In training a graph is recorded, so the streams are rounded too."""
    model.train(training)
    with torch.set_grad_enabled(training):
        return model(ids, attention_mask=mask).last_hidden_state.detach()


def cut_out(model, ids, mask, training: bool) -> list[torch.Tensor]:
    """Every row alone, without the tokens that its mask hides."""
    return [run(model, row[real][None], training=training)[0] for row, real in zip(ids, mask.bool(), strict=True)]


both_modes = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
both_directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
all_cases = pytest.mark.parametrize(
    "case", [case if case in CASES else pytest.param(case, marks=pytest.mark.slow) for case in ALL_CASES], ids=str
)
stacks_and_rounds = pytest.mark.parametrize(
    ("stack", "rounds"),
    [("local", 1), ("full", 1), ("lsh", 1), ("lsh", 2), ("lsh", 8), ("mixed", 4)],
)
few_cases = pytest.mark.parametrize("case", FEW_CASES, ids=str)


# --- what is not a number stays where it is

LOOKS = {"values": {}, "weights": {"output_attentions": True}, "lists": {"output_attentions": "sparse"}}
CHUNKS = {"attention_mode": "chunk", "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "lsh_window": 8}


def with_nan(embeds, token: int, value: float = math.nan):
    embeds = embeds.clone()
    embeds[0, token, 3] = value
    return embeds


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("mode", [{}, CHUNKS], ids=["window", "chunk"])
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_not_a_number_reaches_no_token_before_it_and_no_real_token_from_padding(backend, mode, look):
    """0 times NaN is NaN: sums over tiles and matrices would spread it."""
    dropout = {"local_attention_probs_dropout_prob": 0.1, "lsh_attention_probs_dropout_prob": 0.1}
    fields = {"attention_backend": backend, **SMALL_WINDOWS, **REPEATABLE, **dropout, **mode}
    model = make_model(ReformerModel, attn_layers=STACKS["mixed"][:3], is_decoder=True, dtype=torch.float32, **fields)
    embeds = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    mask, real = torch.ones(2, 40), torch.ones(2, 40, dtype=torch.bool)
    mask[0, 30], real[0, 30] = 0, False

    def hidden(embeds, **inputs):
        torch.manual_seed(0)
        return model(inputs_embeds=embeds, **inputs, **look).last_hidden_state.detach()

    for training in (False, True):
        model.train(training)
        found, expected = hidden(with_nan(embeds, 30)), hidden(embeds)
        assert found[0, 30].isnan().all()
        assert max_abs_diff(found[1], expected[1]) < 1e-5
        if not mode:  # in chunk mode the token may be hashed elsewhere, and others with it
            assert max_abs_diff(found[0, :30], expected[0, :30]) < 1e-5
        assert found[0, :30].isfinite().all()
        found, expected = hidden(with_nan(embeds, 30), attention_mask=mask), hidden(embeds, attention_mask=mask)
        assert max_abs_diff(found[real], expected[real]) < 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_a_number_does_reach_the_tokens_that_see_it(value):
    model = make_model(ReformerModel, attn_layers=["local"], is_decoder=True, **SMALL_WINDOWS)
    hidden = model(inputs_embeds=with_nan(torch.randn(1, 40, 16).double(), 20, value)).last_hidden_state
    assert hidden.isnan().any(-1)[0].nonzero().flatten().tolist() == [*range(20, 26)]


@pytest.mark.parametrize("stack", STACKS)
def test_gradients_of_tokens_before_padding_that_is_not_a_number_are_numbers(stack):
    found = []
    for value in (0.0, math.nan):
        model = make_model(ReformerModel, attn_layers=STACKS[stack], is_decoder=True, **SMALL_WINDOWS).train()
        embeds, mask = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0)).double(), torch.ones(1, 40)
        mask[0, 30] = 0
        torch.manual_seed(0)
        hidden = model(inputs_embeds=with_nan(embeds, 30, value), attention_mask=mask).last_hidden_state
        hidden[mask.bool()].square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert max_abs_diff(*found) <= 1e-8 * found[0].abs().max().item()


@pytest.mark.parametrize("stack", STACKS)
def test_not_a_number_in_a_cache_reaches_what_sees_it_alone(stack):
    model = make_model(ReformerModel, attn_layers=STACKS[stack][:2], is_decoder=True, **SMALL_WINDOWS)
    embeds = with_nan(torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0)).double(), 10)
    whole = model(inputs_embeds=embeds).last_hidden_state
    cache, parts = None, []
    for part in embeds.split([20, 15, 1, 4], dim=1):
        out = model(inputs_embeds=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.last_hidden_state)
    stepped = torch.cat(parts, dim=1)
    assert torch.equal(stepped.isnan(), whole.isnan())
    assert max_abs_diff(stepped.nan_to_num(), whole.nan_to_num()) <= 1e-8


# --- prefix stability


def check_prefixes(case, training: bool, length: int, cuts) -> None:
    model = model_of(*case, causal=True)
    ids = make_ids(1, length, seed=length)
    whole = run(model, ids, training=training)
    for t in cuts:
        changed = ids.clone()
        changed[:, t + 1 :] = make_ids(1, length, seed=length + 1)[:, t + 1 :]
        assert max_abs_diff(run(model, changed, training=training)[:, : t + 1], whole[:, : t + 1]) <= TOLERANCE
        assert max_abs_diff(run(model, ids[:, : t + 1], training=training), whole[:, : t + 1]) <= TOLERANCE


@both_modes
@all_cases
def test_the_future_changes_nothing(case, training):
    for length in SHORT[1:]:
        check_prefixes(case, training, length, cuts={length // 2, length - 2})


@pytest.mark.parametrize(
    ("case", "length"),
    [(("mixed", "default", 2), 1000), (("lsh", "small", 4), 1000), (("lsh", "default", 2), 4097)],
    ids=str,
)
def test_the_future_changes_nothing_in_long_inputs(case, length):
    check_prefixes(case, False, length, cuts=[length // 3, length - 2])


@pytest.mark.slow
@all_cases
@pytest.mark.parametrize(("length", "training"), [(1000, False), (1000, True), (4097, False)])
def test_the_future_changes_nothing_in_long_inputs_everywhere(case, training, length):
    check_prefixes(case, training, length, cuts=[128, length // 3])


def test_the_future_changes_no_logits_of_a_causal_language_model():
    model = make_model(ReformerForCausalLM, **SMALL_WINDOWS)
    ids = make_ids(2, 50)
    with torch.no_grad():
        whole, part = model(ids).logits, model(ids[:, :31]).logits
    assert max_abs_diff(whole[:, :31], part) <= TOLERANCE


@both_directions
def test_a_bidirectional_model_does_look_ahead(causal):
    """The property above is no accident of a model that sees nothing."""
    model = model_of("mixed", "small", 2, causal)
    ids = make_ids(1, 40)
    changed = ids.clone()
    changed[:, 39] = ids[:, 39] % 39 + 1
    gap = max_abs_diff(run(model, ids)[:, :39], run(model, changed)[:, :39])
    assert gap <= TOLERANCE if causal else gap > 1e-3


# --- padding


@both_directions
@both_modes
@all_cases
def test_padding_on_either_side_changes_nothing(case, training, causal):
    model = model_of(*case, causal)
    for length, paddings in ((1, [(0, 3), (130, 1)]), (2, [(1, 0)]), (65, [(0, 1), (67, 0), (5, 64)])):
        ids = make_ids(1, length, seed=length)
        alone = run(model, ids, training=training)
        for left, right in paddings:
            padded = F.pad(ids, (left, right))
            mask = F.pad(torch.ones_like(ids), (left, right))
            found = run(model, padded, mask, training)[:, left : left + length]
            assert max_abs_diff(found, alone) <= TOLERANCE, (length, left, right)


@pytest.mark.parametrize("length", [1000, pytest.param(4097, marks=pytest.mark.slow)])
@both_directions
@few_cases
def test_padding_changes_nothing_in_long_inputs(case, causal, length):
    model = model_of(*case, causal)
    ids = make_ids(1, length)
    mask = F.pad(torch.ones_like(ids), (21, 3))
    assert max_abs_diff(run(model, F.pad(ids, (21, 3)), mask)[:, 21:-3], run(model, ids)) <= TOLERANCE


@both_directions
def test_what_padding_holds_does_not_matter(causal):
    model = model_of("mixed", "small", 2, causal)
    ids, mask = make_ids(1, 60), (torch.arange(60)[None] % 3 > 0).long()
    other = torch.where(mask.bool(), ids, make_ids(1, 60, seed=1))
    real = mask[0].bool()
    assert max_abs_diff(run(model, ids, mask)[:, real], run(model, other, mask)[:, real]) <= TOLERANCE


def test_a_mask_of_ones_is_no_mask():
    for case in FEW_CASES:
        model = model_of(*case, causal=True)
        ids = make_ids(2, 65)
        assert max_abs_diff(run(model, ids, torch.ones_like(ids)), run(model, ids)) <= TOLERANCE


@given(
    length=st.integers(1, 140),
    hidden=st.floats(0.0, 0.95),
    seed=st.integers(0, 10**6),
    case=st.sampled_from(ALL_CASES),
    causal=st.booleans(),
    training=st.booleans(),
)
@settings(max_examples=30)
def test_a_row_with_holes_equals_the_row_without_those_tokens(length, hidden, seed, case, causal, training):
    model = model_of(*case, causal)
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(2, length, generator=generator) >= hidden).long()
    mask[torch.arange(2), torch.randint(0, length, (2,), generator=generator)] = 1  # at least one real token a row
    ids = make_ids(2, length, seed=seed)
    together = run(model, ids, mask, training)
    for row, real, alone in zip(together, mask.bool(), cut_out(model, ids, mask, training), strict=True):
        assert max_abs_diff(row[real], alone) <= TOLERANCE


# --- batch


@both_directions
@both_modes
@all_cases
def test_a_row_does_not_depend_on_the_others(case, training, causal):
    model = model_of(*case, causal)
    ids = make_ids(4, 127)
    mask = torch.ones_like(ids)
    mask[1, 100:], mask[2, :64], mask[3, ::2] = 0, 0, 0
    together = run(model, ids, mask, training)
    for row, real, alone in zip(together, mask.bool(), cut_out(model, ids, mask, training), strict=True):
        assert max_abs_diff(row[real], alone) <= TOLERANCE
    order = torch.tensor([2, 0, 3, 1])
    permuted = run(model, ids[order], mask[order], training)
    assert max_abs_diff(permuted[mask[order].bool()], together[order][mask[order].bool()]) <= TOLERANCE


# --- exactness: an independent model with dense attention, sharing nothing but the weights


POSITIONS = {
    "axial": {"position_embedding_type": "axial"},
    "half of lsh layers rotary": {"position_embedding_type": "rotary", "lsh_rotary": 0.5},
    "rotary but in lsh": {"position_embedding_type": "rotary", "lsh_rotary": 0.0},
    "rotary": {"position_embedding_type": "rotary", "lsh_rotary": 1.0},
}
all_positions = pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)


some_in_training = pytest.mark.parametrize(  # whatever the positions are, training changes nothing but the streams
    ("positions", "training"),
    [*((positions, False) for positions in POSITIONS.values()), (POSITIONS["half of lsh layers rotary"], True)],
    ids=[*POSITIONS, "half of lsh layers rotary, in training"],
)


def exact_model(model, ids: torch.Tensor) -> torch.Tensor:
    config, length = model.config, ids.shape[1]
    x2 = model.embed_tokens.weight[ids]
    if config.position_embedding_type == "axial":
        grid = [weight.expand(*config.axial_pos_shape, -1) for weight in model.position_embeddings.weights]
        x2 = x2 + torch.cat(grid, dim=-1).reshape(-1, config.hidden_size)[:length]
    x1 = x2
    for kind, layer in zip(config.attn_layers, model.layers, strict=True):
        x1 = x1 + exact_attention(kind, layer.attention, norm(layer.attention_norm, x2), config)
        inner = linear(layer.feed_forward.up_proj, norm(layer.feed_forward_norm, x1)).relu()
        x2 = x2 + linear(layer.feed_forward.down_proj, inner)
    return norm(model.norm, torch.cat([x1, x2], dim=-1))


def norm(module, x):
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


def linear(module, x):
    return F.linear(x, module.weight, module.bias)


def turned(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Pairs half a head apart as complex numbers, the first ones turned by the token's place times theta^(-2i / D)."""
    half = x.shape[-1] // 2
    frequencies = theta ** -(torch.arange(half) / half)  # float32, as in models
    angles = torch.arange(x.shape[-2]).float()[:, None] * frequencies
    pairs = torch.complex(x[..., :half], x[..., half:])
    pairs = pairs * torch.complex(angles.cos(), angles.sin())
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def exact_attention(kind: str, module, x: torch.Tensor, config) -> torch.Tensor:
    def heads(projection):
        return linear(projection, x).unflatten(-1, (module.heads, module.head_size)).transpose(1, 2)

    value, length, size = heads(module.v_proj), x.shape[1], module.head_size
    query, key = (heads(module.qk_proj),) * 2 if kind == "lsh" else (heads(module.q_proj), heads(module.k_proj))
    if config.position_embedding_type == "rotary":
        heads_turned = math.ceil(module.heads * config.lsh_rotary) if kind == "lsh" else module.heads
        is_turned = torch.arange(module.heads)[:, None, None] < heads_turned
        query, key = (torch.where(is_turned, turned(x, config.rope_theta), x) for x in (query, key))
    if kind == "lsh":
        key = key / (key.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    scores = query @ key.transpose(-1, -2) / size**0.5
    if config.is_decoder:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    if kind == "lsh":  # a token attends to itself only where there is nothing else
        scores = scores.masked_fill(torch.eye(length).bool(), -1e5)
    return linear(module.o_proj, (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


@some_in_training
@stacks_and_rounds
def test_a_causal_model_is_exact_up_to_its_window(stack, rounds, positions, training):
    model = model_of(stack, "default", rounds, causal=True, **positions)
    for length in (1, 2, 63, 64, 127, 128):
        ids = make_ids(2, length, seed=length)
        assert max_abs_diff(run(model, ids, training=training), exact_model(model, ids)) <= TOLERANCE


@some_in_training
@stacks_and_rounds
def test_a_bidirectional_model_is_exact_up_to_half_its_window(stack, rounds, positions, training):
    model = model_of(stack, "default", rounds, causal=False, **positions)
    for length in (1, 2, 63, 64, 65):
        ids = make_ids(2, length, seed=length)
        assert max_abs_diff(run(model, ids, training=training), exact_model(model, ids)) <= TOLERANCE


@all_positions
@pytest.mark.parametrize("stack", STACKS)
def test_the_beginning_of_a_long_input_is_exact(stack, positions):
    model = model_of(stack, "default", 2, causal=True, **positions)
    ids = make_ids(1, 1000)
    assert max_abs_diff(run(model, ids)[:, :128], exact_model(model, ids[:, :128])) <= TOLERANCE


@all_positions
@both_directions
def test_beyond_the_window_hashing_is_not_exact(causal, positions):
    model = model_of("lsh", "small", 1, causal, **positions)
    ids = make_ids(1, 100)
    assert max_abs_diff(run(model, ids), exact_model(model, ids)) > 1e-3


@pytest.mark.parametrize("positions", ["axial", "rotary"])
def test_full_layers_are_exact_at_any_length(positions):
    for causal in (True, False):
        model = model_of("full", "default", 1, causal, position_embedding_type=positions)
        ids = make_ids(1, 1000)
        assert max_abs_diff(run(model, ids), exact_model(model, ids)) <= TOLERANCE


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rounds", [1, 2, 8])
@both_directions
def test_where_the_window_shows_all_rounds_change_nothing_and_are_left_out(causal, rounds, training, monkeypatch):
    model, hashed = model_of("lsh", "default", rounds, causal), []
    longest = 128 if causal else 65
    buckets = attention_module.ReformerAttention.buckets

    def counted(self, vectors, ctx):
        hashed.append(vectors.shape[2])
        return buckets(self, vectors, ctx)

    monkeypatch.setattr(attention_module.ReformerAttention, "buckets", counted)
    ids = make_ids(2, longest + 1)
    run(model, ids, training=training)
    assert hashed == [longest + 1] * 2
    without = run(model, ids[:, :longest], training=training)
    assert len(hashed) == 2
    monkeypatch.setattr(attention_module.ReformerAttention, "_sees_all_unhashed", lambda self, ctx: False)
    assert max_abs_diff(run(model, ids[:, :longest], training=training), without) <= TOLERANCE
    assert hashed[2:] == [longest] * 2


# --- any length


@both_directions
@few_cases
def test_any_length_trains(case, causal):
    model = model_of(*case, causal, hidden_dropout_prob=0.1, resample_rotations=True).train()
    for length in (1, 2, 3, 7, 63, 64, 65, 127, 128, 129):
        model.zero_grad()
        model(make_ids(2, length)).last_hidden_state.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), length


@pytest.mark.parametrize("length", [1000, 4097])
def test_any_length_trains_long(length):
    model = model_of("mixed", "default", 2, causal=True, resample_rotations=True).train()
    model(make_ids(1, length)).last_hidden_state.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# --- float32: two computations may hash a near-tie differently, about once in a million decisions


class Replay:
    """Stands in for `lsh_buckets`: the first pass records; later ones count disagreements and use what was recorded.

    `places`: of a later pass's tokens within the recorded pass, and `real` where those stand in the later pass.
    """

    def __init__(self, compute):
        self.compute, self.recorded, self.real = compute, [], None
        self.next = self.decisions = self.disagreements = 0

    def replay(self, real: torch.Tensor) -> None:
        self.real, self.next = real, 0

    def __call__(self, *args):
        buckets = self.compute(*args)
        if self.real is None:
            self.recorded.append(buckets)
            return buckets
        wanted = self.recorded[self.next]
        self.next += 1
        self.decisions += wanted.numel()
        self.disagreements += int((buckets[..., self.real] != wanted).sum())
        buckets[..., self.real] = wanted
        return buckets


@both_directions
@few_cases
def test_padding_changes_nothing_in_float32_where_buckets_agree(case, causal, monkeypatch):
    replay = Replay(attention_module.lsh_buckets)
    monkeypatch.setattr(attention_module, "lsh_buckets", replay)
    model = model_of(*case, causal, initializer_range=0.1).float()
    ids = make_ids(1, 1000)
    alone = run(model, ids)
    mask = (torch.rand(1, 1600, generator=torch.Generator().manual_seed(0)) < 0.5).long()
    mask[0, mask[0].nonzero()[1000:]] = 0  # at most 1000 real tokens
    short = int(1000 - mask.sum())
    mask = F.pad(mask, (0, short), value=1)
    padded = torch.zeros_like(mask).masked_scatter_(mask.bool(), ids)
    replay.replay(mask[0].bool())
    found = run(model, padded, mask)[:, mask[0].bool()]
    assert replay.disagreements <= 2 + 2e-6 * replay.decisions
    assert max_abs_diff(found, alone) <= 1e-5


# --- positions of lsh layers


@both_directions
def test_without_rotary_positions_an_lsh_layer_sees_content_alone(causal):
    ids, shifted = make_ids(1, 60), torch.arange(60)[None] * 3 + 7
    for lsh_rotary in (0.0, 0.5):
        model = model_of("lsh", "small", 2, causal, lsh_rotary=lsh_rotary, position_embedding_type="rotary")
        with torch.no_grad():
            found = model(ids, position_ids=shifted).last_hidden_state
        difference = max_abs_diff(run(model, ids), found)
        assert difference > 1e-3 if lsh_rotary else difference == 0


@pytest.mark.parametrize(("share", "heads", "turned"), [(15 / 29, 29, 15), (0.28, 25, 7), (0.1, 2, 1), (1.0, 3, 3)])
def test_the_share_of_turned_heads_is_rounded_up_but_for_rounding(share, heads, turned):
    config = ReformerConfig(attn_layers=["lsh"], num_attention_heads=heads, attention_head_size=2, lsh_rotary=share)
    assert ReformerModel(config).layers[0].attention.turned_heads == turned


# --- repeated tokens


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("repeats", [1, 2, 50])
def test_repeated_tokens_at_the_start_are_hashed_alike_however_they_are_computed(backend, repeats):
    """Less their mean, nothing but rounding is left of them, in float32, and that must choose no bucket."""
    model = model_of("mixed", "small", 4, True, initializer_range=0.2, attention_backend=backend).float()
    repeated = torch.full((1, repeats), 5)
    ids = torch.cat([repeated, make_ids(1, 40), repeated, make_ids(1, 20, seed=1)], dim=1)
    whole, cut = run(model, ids), repeats + 17
    assert max_abs_diff(run(model, ids[:, :cut]), whole[:, :cut]) <= 1e-4
    padded, mask = torch.cat([make_ids(1, 7), ids], dim=1), torch.ones(1, 7 + ids.shape[1], dtype=torch.long)
    mask[:, :7] = 0
    assert max_abs_diff(run(model, padded, mask)[:, 7:], whole) <= 1e-4
    cache, outputs = None, []
    with torch.no_grad():
        for piece in ids.split([1] * repeats + [3] * 7 + [ids.shape[1] - repeats - 21], dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            outputs.append(out.last_hidden_state)
    assert max_abs_diff(torch.cat(outputs, dim=1), whole) <= 1e-4
