"""What is computed with a cache equals one forward over all tokens; and the cache's own operations."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

from hf_reformer import ReformerConfig, ReformerForCausalLM, ReformerModel
from hf_reformer.cache import cache
from hf_reformer.cache.cache import ReformerCache
from hf_reformer.layers import cached_attention
from hf_reformer.ops import dispatch
from hf_reformer.ops.bucket_tables import BucketChains

LENGTH = 70
KINDS = {
    "local": ["local"],
    "lsh": ["lsh"],
    "full": ["full"],
    "mixed": ["local", "lsh", "full", "lsh"],
}
PIECES = {"one by one": [1] * LENGTH, "sevens": [7] * 10, "prompt": [20] + [1] * 50, "halves": [33, 37],
          "any": [5, 9, 21, 35]}  # fmt: skip
IDS = make_ids(4, LENGTH)
MASK = torch.ones(4, LENGTH, dtype=torch.long)
MASK[0, :9], MASK[1, 30:33], MASK[3, 40:] = 0, 0, 0  # padded left, with a hole, not at all, and right


def make(kinds=KINDS["mixed"], **changes):
    return make_model(ReformerForCausalLM, **{**SMALL_WINDOWS, "attn_layers": kinds, **changes}).eval()


@torch.no_grad()
def run(model, pieces, ids=IDS, mask=None, kept=None):
    """Logits of the pieces one after the other, and the cache."""
    found, at = [], 0 if kept is None else kept.get_seq_length()
    for length in pieces:
        part = None if mask is None else mask[:, : at + length]
        out = model(ids[:, at : at + length], attention_mask=part, past_key_values=kept, use_cache=True)
        kept, at = out.past_key_values, at + length
        found.append(out.logits)
    return torch.cat(found, dim=1), kept


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("kinds", KINDS)
def test_pieces_equal_the_whole(kinds, pieces, masked):
    model, mask = make(KINDS[kinds]), MASK if masked else None
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits
    found, kept = run(model, PIECES[pieces], mask=mask)
    real = MASK.bool() if masked else slice(None)
    assert max_abs_diff(found[real], expected[real]) <= 1e-10
    assert kept.get_seq_length() == LENGTH


@pytest.mark.parametrize(
    "changes",
    [
        {"position_embedding_type": "axial"},
        {"position_embedding_type": "rotary", "lsh_rotary": 0.0},
        {"position_embedding_type": "rotary", "lsh_rotary": 0.5},
        {"position_embedding_type": "rotary", "lsh_rotary": 1.0},
        {"lsh_include_local": False},
        {"lsh_centering": 0.5},
        {"num_hashes": 3, "num_buckets": [2, 4]},
        {"dtype": torch.float32},
        pytest.param({"dtype": torch.float32, "attention_backend": "torch"}, marks=pytest.mark.slow),
        pytest.param({"residual_precision": "float32"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_pieces_equal_the_whole_in_any_configuration(changes):
    model = make(["local", "lsh", "lsh"], **changes)
    with torch.no_grad():
        expected = model(IDS, attention_mask=MASK).logits
    found, _ = run(model, [20, *[1] * 15, 9, 26], mask=MASK)
    assert max_abs_diff(found[MASK == 1], expected[MASK == 1]) <= 1e-5


@pytest.mark.slow
def test_the_default_configuration_over_long_texts():
    config = ReformerConfig(is_decoder=True, max_position_embeddings=8192)
    torch.manual_seed(0)
    model = ReformerForCausalLM(config).eval()
    ids, mask = torch.randint(5, 250, (4, 2200)), torch.ones(4, 2200, dtype=torch.long)
    mask[0, :300], mask[1, 1900:], mask[2, 700:750] = 0, 0, 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    for pieces in ([1000, 1000, 64, 64, *[7] * 10, 2], [2000, *[1] * 200]):
        found, _ = run(model, pieces, ids, mask)
        assert max_abs_diff(found[mask == 1], expected[mask == 1]) <= 1e-5


def test_in_training_mode_a_cache_computes_as_in_evaluation():
    model = make(hidden_dropout_prob=0.5)
    expected, _ = run(model, PIECES["any"])
    assert torch.equal(run(model.train(), PIECES["any"])[0], expected)


def test_a_step_reads_so_many_keys_whatever_the_context(monkeypatch):
    read = []

    def counting(query, keys, values, tokens, *more, **options):
        read.append(tokens.shape[-1])
        return attend(query, keys, values, tokens, *more, **options)

    attend = cached_attention.gather_attention
    monkeypatch.setattr(cached_attention, "gather_attention", counting)
    model = make(["local", "lsh"])
    run(model, PIECES["prompt"])
    config = model.config
    assert set(read) == {config.local_window, config.num_hashes * config.lsh_window + config.local_window}


def test_what_is_kept_holds_no_graph():
    model = make()
    kept = model(IDS, use_cache=True).past_key_values
    assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in kept.layers)


def test_a_cache_goes_by_both_names():
    """Since transformers 5.24 caches are called `cache`, before `past_key_values`."""
    model, found = make(["local", "lsh"]), []
    for name in ("cache", "past_key_values"):
        kept = ReformerCache(model.config)
        for begin, end in ((0, 60), (60, LENGTH)):
            out = model(IDS[:, begin:end], **{name: kept})
        found.append(out.logits)
    assert torch.equal(*found)
    assert getattr(out, cache.CACHE_NAME) is kept
    with pytest.raises(ValueError, match="two names"):
        model(IDS, cache=ReformerCache(model.config), past_key_values=ReformerCache(model.config))


def test_a_cache_goes_with_its_last_reference():
    """At once, without the garbage collector: it may be gigabytes."""
    kept = make()(IDS, use_cache=True).past_key_values
    layers = [weakref.ref(layer) for layer in kept.layers]
    gc.disable()
    try:
        del kept
        assert [layer() for layer in layers] == [None] * len(layers)
    finally:
        gc.enable()


# --- the cache's operations


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("removed", [1, 5])
def test_tokens_taken_back_leave_no_trace(kinds, removed, masked):
    model, mask = make(KINDS[kinds]), MASK if masked else None
    other = make_ids(4, LENGTH, seed=1)
    expected, _ = run(model, [50, *[1] * 8], mask=mask)
    _, kept = run(model, [50], mask=mask)
    for _ in range(3):
        at = kept.get_seq_length()
        part = None if mask is None else torch.cat([mask[:, :at], torch.ones(4, removed, dtype=torch.long)], dim=-1)
        with torch.no_grad():
            model(other[:, :removed], attention_mask=part, past_key_values=kept)
        kept.crop(-removed)
    found, _ = run(model, [1] * 8, mask=mask, kept=kept)
    real = MASK[:, 50:58].bool() if masked else slice(None)
    assert max_abs_diff(found[real], expected[:, 50:][real]) <= 1e-10


@pytest.mark.parametrize("kinds", ["lsh", "full", "mixed"])
def test_any_number_may_be_taken_back_once_the_past_is_recorded(kinds):
    model = make(KINDS[kinds])
    expected, _ = run(model, [10, *[1] * 25])
    _, kept = run(model, [10])
    kept.activate_past_recording()
    run(model, [50], kept=kept)
    kept.crop(-45)
    found, _ = run(model, [5, *[1] * 15], kept=kept)
    assert max_abs_diff(found, expected[:, 15:]) <= 1e-10


@pytest.mark.parametrize("late", [False, True])
def test_what_a_local_layer_has_lost_does_not_come_back_by_recording(late):
    model = make(["local"])
    expected, kept = run(model, [60, *[1] * 10])
    _, kept = run(model, [60])
    if late:
        kept.crop(-2)
    kept.activate_past_recording()
    with pytest.raises(RuntimeError, match="has evicted"):
        kept.crop(-30)
    run(model, [5], kept=kept)
    kept.crop(-5)
    found, _ = run(model, [1] * 10, kept=kept)
    at = 58 if late else 60
    assert max_abs_diff(found, expected[:, at : at + 10]) <= 1e-10


def test_a_first_piece_of_padding_alone():
    model, mask = make(), MASK.clone()
    mask[0, :20] = 0
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits
    found, _ = run(model, [16, 54], mask=mask)
    assert max_abs_diff(found[mask == 1], expected[mask == 1]) <= 1e-10
    found, _ = run(model, [9, 61], ids=IDS[:1], mask=mask[:1])
    assert max_abs_diff(found[:, 20:], expected[:1, 20:]) <= 1e-10


def test_autocast_may_change_between_calls():
    model = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, kept = run(model, [30], mask=MASK)
    found, _ = run(model, [20, *[1] * 20], mask=MASK, kept=kept)
    assert found.isfinite().all()


def test_a_local_layer_tells_when_too_much_is_taken_back():
    model = make(["local"])
    _, kept = run(model, [60])
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        kept.crop(-30)
    with pytest.raises(ValueError, match="crop"):
        kept.crop(3)


def test_rows_are_chosen_repeated_and_reordered():
    model = make()
    expected, _ = run(model, [40, *[1] * 30], mask=MASK)
    for change, rows in (
        (lambda kept: kept.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda kept: kept.reorder_cache(torch.tensor([1, 1, 3, 0])), [1, 1, 3, 0]),
        (lambda kept: kept.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
    ):
        _, kept = run(model, [40], mask=MASK)
        change(kept)
        found, _ = run(model, [1] * 30, IDS[rows], MASK[rows], kept)
        real = MASK[rows, 40:] == 1
        assert max_abs_diff(found[real], expected[rows, 40:][real]) <= 1e-10
        assert kept.batch_size == len(rows)


def test_reset_offload_and_copy():
    model = make()
    expected, kept = run(model, [40])
    copied = copy.deepcopy(kept)
    for layer in kept.layers:
        layer.offload()
        layer.prefetch()
    rest, _ = run(model, [30], kept=kept)
    assert torch.equal(run(model, [30], kept=copied)[0], rest)
    kept.reset()
    assert kept.get_seq_length() == 0
    assert torch.equal(run(model, [40], kept=kept)[0], expected)


def test_empty_caches_of_the_library_are_adopted():
    model = make()
    expected, _ = run(model, PIECES["any"])
    config = model.config
    for empty in (DynamicCache(), DynamicCache(config=config), StaticCache(config=config, max_cache_len=LENGTH)):
        assert torch.equal(run(model, PIECES["any"], kept=empty)[0], expected)


def bytes_of(layer):
    held = [x for part in (layer, layer.chains) if part is not None for x in vars(part).values()]
    return sum(x.untyped_storage().nbytes() for x in held if isinstance(x, torch.Tensor))


def test_memory_of_a_cache():
    """Local layers keep two windows; lsh layers at most 30 % more than keys and values, even of a short text."""
    config = ReformerConfig(is_decoder=True, attn_layers=["local", "lsh"], max_position_embeddings=65536)
    model = ReformerForCausalLM(config).eval()
    token = 2 * config.num_attention_heads * config.attention_head_size * 4  # bytes of its key and value
    _, kept = run(model, [1000, *[1] * 24], make_ids(1, 1024))
    local, hashed = kept.layers
    assert bytes_of(local) <= 1.01 * 2 * config.local_window * token
    assert bytes_of(hashed) - hashed.hasher.rotations.untyped_storage().nbytes() <= 1.3 * 1024 * token


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))

        def tensors(tree):
            return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]

        given = {x.untyped_storage().data_ptr() for x in tensors(args)}
        made = [x.numel() for x in tensors(out) if x.untyped_storage().data_ptr() not in given]
        self.numel = max([self.numel, *made])
        return out


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_piece_on_a_long_context_makes_nothing_as_large_as_the_context(backend):
    length, new = 8192, 1024
    model = make(
        ["local", "lsh"],
        num_attention_heads=8,
        attention_head_size=16,
        attention_backend=backend,
        position_embedding_type="rotary",
    ).float()
    ids = make_ids(1, length + new)
    kept = StaticCache(config=model.config, max_cache_len=length + new)
    run(model, [length], ids, kept=kept)
    with Largest() as largest:
        run(model, [new], ids, kept=kept)
    assert largest.numel <= (length + new) * 8 * 16 / 2  # half of one layer's keys


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables_know_the_newest_members(data):
    """Against lists, over any sequence of putting in and taking back."""
    window, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    tables = BucketChains((1, 1, 1), count, 200, torch.device("cpu"))
    lists: list[list[int]] = [[] for _ in range(count)]
    history: list[int] = []
    for _ in range(data.draw(st.integers(1, 8))):
        gone = data.draw(st.integers(0, len(history)))
        if gone:
            removed = history[-gone:][::-1]
            numbers = torch.arange(len(history) - 1, len(history) - 1 - gone, -1)[None]
            tables.remove(torch.tensor([[[removed]]]), numbers)
            for bucket in removed:
                lists[bucket].pop()
            history = history[:-gone]
        new = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=12))
        tokens = torch.arange(len(history), len(history) + len(new), dtype=torch.int32)[None]
        tables.add(torch.tensor([[[new]]], dtype=torch.int32), tokens)
        for bucket in new:
            lists[bucket].append(len(history))
            history.append(bucket)
        for bucket in range(count):
            found = tables.last(torch.tensor([[[bucket]]]), window)[0, 0].tolist()
            assert [token for token in found if token >= 0] == lists[bucket][::-1][:window]


# --- what cannot be


@pytest.mark.parametrize("kinds", [["local", "lsh"], ["lsh", "full", "local"]], ids=" ".join)
def test_what_is_refused_leaves_the_cache_as_it_was(kinds):
    model = make(kinds)
    expected, _ = run(model, [40, *[1] * 30])
    _, kept = run(model, [40])
    for options, message in (
        ({"num_hashes": 5}, "hashed with"),
        ({"num_buckets": 8}, "hashed with"),
        ({"attention_mask": torch.zeros(4, 50, dtype=torch.long)}, "masks other tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            model(IDS[:, 40:50], past_key_values=kept, **options)
    with pytest.raises(RuntimeError, match="cannot be removed"):
        kept.crop(-36)
    assert max_abs_diff(run(model, [1] * 30, kept=kept)[0], expected[:, 40:]) <= 1e-10


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("new", [1, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_rows_than_those_of_the_cache_are_refused(rows, new, dtype):
    model = make().to(dtype)
    _, kept = run(model, [20])
    with pytest.raises(ValueError, match=f"has {rows} sequences, but the cache has 4"):
        model(make_ids(rows, new), past_key_values=kept)


@pytest.mark.parametrize(
    "other", [{"num_attention_heads": 1}, {"attention_head_size": 16}, {"lsh_include_local": False}], ids=str
)
def test_the_cache_of_another_model_is_refused(other):
    _, kept = run(make(**other).float(), [20])
    with pytest.raises(ValueError, match="did not fill"):
        make().float()(IDS[:, 20:21], past_key_values=kept)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("window", [10**9, 2**31, 2**32 + 1, 2**40])
def test_windows_so_wide_that_they_have_no_limit(window, backend):
    """No window is too wide to be right, in one forward and in pieces."""
    options = {"attention_backend": backend, "position_embedding_type": "rotary"}
    expected, _ = run(make(["local", "lsh"], **options, local_window=200, lsh_window=200).float(), [40])
    wide = {"local_window": window, "lsh_window": window}
    config = make(["local", "lsh"], **options, **wide).config
    for is_decoder in (True, False):
        groups = [(torch.zeros(1, 1, 1, 40, dtype=torch.int32), 1, size) for size in (200, window)]
        layouts = [dispatch.window_layout([group], is_decoder, None, backend=backend) for group in groups]
        for a, b in zip(*layouts, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    for pieces in ([40], [20] + [1] * 20, [7] * 5 + [5]):
        found, _ = run(make(["local", "lsh"], **options, **wide).float(), pieces)
        assert max_abs_diff(found, expected) < 1e-5
    assert config.local_window == min(window, 2**30)


def test_a_call_that_broke_off_is_told_afterwards(monkeypatch):
    model = make(["local", "lsh"])
    _, kept = run(model, [20])
    with monkeypatch.context() as broken:
        broken.setattr(model.model.layers[1], "forward", None)
        with pytest.raises(TypeError):
            model(IDS[:, 20:25], past_key_values=kept)
    with pytest.raises(ValueError, match=r"hold \[20, 25\] tokens: an earlier call was interrupted"):
        model(IDS[:, 20:25], past_key_values=kept)


@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_a_cache_cropped_to_nothing_is_a_new_one(mode):
    model = make(["local", "lsh"], attention_mode=mode, num_buckets=None, num_hashes=2)
    expected, _ = run(model, [60])
    _, kept = run(model, [10])
    kept.crop(-10)
    assert torch.equal(run(model, [60], kept=kept)[0], expected)


@pytest.mark.parametrize("position", ["learned", "axial", "rotary"])
def test_padding_of_a_row_that_fills_all_positions(position):
    options = {"max_position_embeddings": 36, "axial_pos_shape": [6, 6], "position_embedding_type": position}
    model = make(["local", "lsh"], **options)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 36:], mask[1, :4] = 0, 0
    ids = make_ids(2, 40)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    found, _ = run(model, [36, 2, 1, 1], ids, mask)
    assert max_abs_diff(found[mask == 1], expected[mask == 1]) <= 1e-10


def test_windows_far_wider_than_the_text_cost_nothing():
    model = make(["local", "lsh"], local_window=10**6, lsh_window=10**6, attention_backend="torch")
    with Largest() as largest:
        run(model, [20, *[1] * 10])
    assert largest.numel < 10**5


def test_what_a_cache_cannot_serve_is_refused():
    model = make()
    _, kept = run(model, [20], mask=MASK)
    new = IDS[:, 20:25]
    with pytest.raises(ValueError, match=r"must be \(4, 25\)"):
        model(new, attention_mask=torch.ones(4, 5, dtype=torch.long), past_key_values=kept)
    with pytest.raises(ValueError, match="masks other tokens"):
        model(new, attention_mask=torch.ones(4, 25, dtype=torch.long), past_key_values=kept)
    other = MASK[:, :20].clone()
    other[0, :9] = torch.tensor([1, *[0] * 8])
    other[0, 9] = 0  # as many as before, but others
    with pytest.raises(ValueError, match="masks other tokens"):
        model(new, attention_mask=torch.cat([other, MASK[:, 20:25]], dim=-1), past_key_values=kept)
    with pytest.raises(ValueError, match="one sample per sequence"):
        model(IDS, position_ids=torch.cat([torch.arange(30), torch.arange(40)])[None], use_cache=True)
    with pytest.raises(ValueError, match="did not fill"):
        make(["local"])(new, past_key_values=kept)
    with pytest.raises(ValueError, match="hashed with"):
        model(new, past_key_values=kept, num_hashes=5)
    filled = DynamicCache()
    filled.update(torch.zeros(4, 2, 3, 8), torch.zeros(4, 2, 3, 8), 0)
    with pytest.raises(ValueError, match="did not fill"):
        model(new, past_key_values=filled)
    both = make_model(ReformerModel, **{**SMALL_WINDOWS, "is_decoder": False}).eval()
    with pytest.raises(ValueError, match="bidirectional"):
        both(IDS, past_key_values=DynamicCache())
    assert both(IDS, use_cache=True).past_key_values is None


def test_update_from_outside_is_refused():
    kept = ReformerCache(make().config)
    with pytest.raises(RuntimeError, match="past_key_values"):
        kept.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    assert isinstance(kept, cache.Cache)
