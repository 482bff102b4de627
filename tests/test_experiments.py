"""The experiments: data are as promised, sweeps and training go on where they stopped, every script runs."""

import argparse
import itertools
import random

import pytest
import torch
from conftest import make_ids, max_abs_diff
from experiment_scripts import EXPERIMENTS, load_experiment
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib")

common = load_experiment("common")
listops = load_experiment("listops")
recall = load_experiment("recall")
duplication = load_experiment("duplication")
variants = load_experiment("attention_variants")
windows = load_experiment("exact_then_windows")

NAMES = sorted(path.stem for path in EXPERIMENTS.glob("*.py") if "\nSHORT = {" in path.read_text(encoding="utf-8"))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- texts whose far tokens matter


def far_text(seed, rows=3, length=1024):
    """Random capital letters, so that whatever else is there was put there."""
    plain = torch.randint(65, 91, (rows, length), generator=generator(seed))
    return plain, *common.mix_far(plain, generator(seed + 1))


@given(seed=st.integers(0, 10**6), length=st.sampled_from([256, 1024, 4096]))
def test_far_answers_stand_at_least_a_quarter_earlier(seed, length):
    _, ids, far = far_text(seed, rows=2, length=length)
    for row, marked in zip(ids.tolist(), far.tolist(), strict=True):
        text = bytes(row)
        for t in (i for i in range(length) if marked[i]):
            # the bytes before say what comes: a key and `=`, or the passage's first bytes
            start = t - 3 if text[t - 1] == ord("=") else t - 4 if text[t - 2] == ord("=") else t - common.UNKNOWN
            assert text.find(text[start : t + 1], 0, t - length // 4 + 1) >= 0


def test_far_text_is_the_plain_text_elsewhere_and_repeats_with_the_seed():
    plain, ids, far = far_text(7, rows=4, length=2048)
    again = common.mix_far(plain, generator(8))
    assert torch.equal(ids, again[0])
    assert torch.equal(far, again[1])
    assert 0.6 < (ids == plain).double().mean() < 0.95
    assert 0.02 < far.double().mean() < 0.2
    assert not far[:, : 2048 // 2].any()


def test_every_record_is_stated_once_and_asked_once_with_the_same_value():
    _, ids, far = far_text(3, rows=5, length=2048)
    for row, marked in zip(ids.tolist(), far.tolist(), strict=True):
        records = {}
        for at in (i for i in range(len(row)) if row[i] == ord("=")):
            records.setdefault(bytes(row[at - 2 : at]), []).append((at, bytes(row[at + 1 : at + 3])))
        assert len(records) == 2 * (2048 // 128)
        for (first, value), (second, asked) in records.values():
            assert value == asked
            assert not marked[first + 1]
            assert marked[second + 1]
            assert marked[second + 2]


@pytest.mark.parametrize(("kind", "shortest"), [("far", 256), ("recall", 64)])
def test_answers_are_learned_on_rows_of_every_length(kind, shortest):
    data = torch.randint(32, 127, (20_000,), dtype=torch.uint8, generator=generator(0))
    draw, source = common.answer_batches(data, kind, 2, 1024), generator(1)
    lengths = set()
    for _ in range(40):
        ids, labels = draw(source).values()
        assert ids.numel() == 2 * 1024
        asked = labels != -100
        assert torch.equal(labels[asked], ids[asked])
        assert 0 < asked.double().mean() < 0.25
        lengths.add(ids.shape[1])
    assert lengths == {length for length in (64, 128, 256, 512, 1024) if length >= shortest}


def test_bits_of_far_bytes_are_means_over_the_mask():
    class Uniform(torch.nn.Module):
        def forward(self, ids):
            logits = torch.zeros(*ids.shape, 256)
            logits[:, :, 0] = 100.0  # certain of byte 0
            return argparse.Namespace(logits=logits)

    ids = torch.zeros(2, 5, dtype=torch.long)
    ids[1, 4] = 1
    far = torch.zeros_like(ids, dtype=torch.bool)
    far[:, 4] = True
    bits = common.bits_per_byte(Uniform(), ids, far, rows=1)
    miss = 100 / torch.log(torch.tensor(2.0)).item()
    assert bits["bits"] == pytest.approx(miss / 8, rel=1e-4)
    assert bits["far_bits"] == pytest.approx(miss / 2, rel=1e-4)


def test_rows_of_held_out_text_do_not_overlap():
    data = torch.arange(100, dtype=torch.uint8)
    rows = common.even_rows(data, 8, 30)
    assert rows.shape == (3, 30)
    assert len(set(rows.flatten().tolist())) == 90
    assert common.random_rows(data, 50, 100, generator()).unique(dim=0).shape == (1, 100)


# --- learning curves


@given(st.lists(st.floats(0, 10), min_size=1, max_size=200), st.integers(1, 60))
def test_points_of_a_learning_curve_keep_its_mean_and_its_last_step(losses, every):
    points = common.loss_points(losses, every)
    ends = [0, *(point["step"] for point in points)]
    assert ends == [*range(0, len(losses), every), len(losses)]
    sizes = [end - begin for begin, end in itertools.pairwise(ends)]
    total = sum(size * point["train_loss"] for size, point in zip(sizes, points, strict=True))
    assert total == pytest.approx(sum(losses))


def test_a_learning_curve_is_kept_once_and_read_back(tmp_path):
    args = common.Options(output_dir=tmp_path)
    experiment = common.Experiment("made_up", args, ("seed", "rounds"), ("bits",), (("seed",), ("step", "train_loss")))
    points = [{"step": 50, "train_loss": 2.5}, {"step": 60, "train_loss": 2.0}]
    experiment.keep_curve({"seed": 0}, points)
    experiment.keep_curve({"seed": 0}, points[:1])
    assert experiment.curve({"seed": 0, "rounds": 4}) == [[50, 60], [2.5, 2.0]]
    assert experiment.curve({"seed": 1, "rounds": 4}) == []


# --- models


def lm(**fields):
    torch.manual_seed(0)
    small = {"lsh_window": 4, "local_window": 4, "num_buckets": 4, "initializer_range": 0.3, **fields}
    return common.make_model(64, 32, ["local", "lsh"], vocab_size=40, **small).eval()


def logits(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def test_lsh_layers_that_see_all_do_not_depend_on_hashing_and_others_do():
    model, ids = lm(), make_ids(2, 64)
    with common.see_all(model):
        one, eight = logits(model, ids, num_hashes=1), logits(model, ids, num_hashes=8)
    assert max_abs_diff(one, eight) < 1e-4
    assert max_abs_diff(logits(model, ids, num_hashes=1), logits(model, ids, num_hashes=8)) > 1e-3
    assert model.model.layers[1].attention.config is model.config


@pytest.mark.parametrize(
    ("context", "same"),
    [
        (common.hashing_of(lambda units: units - common.running_mean(units)), True),
        (common.scaled_hashing(), False),
        (common.whitened_hashing(), False),
    ],
)
def test_other_ways_to_hash_change_buckets_alone_and_end(context, same):
    model, ids = lm(lsh_centering=True), make_ids(2, 64)
    before = logits(model, ids)
    with context:
        other = logits(model, ids)
    assert (max_abs_diff(before, other) < 1e-5) == same
    assert torch.equal(before, logits(model, ids))


def test_whitened_vectors_have_the_same_spread_in_every_direction():
    hashed, units = (
        [],
        torch.nn.functional.normalize(torch.randn(1, 1, 4096, 6).double() * torch.arange(1, 7) + 2, dim=-1),
    )

    class Layer:
        def hasher(self, vectors, ctx):
            return argparse.Namespace(buckets=lambda x, centering: hashed.append(x))

    with common.whitened_hashing(ridge=1e-6):
        common.attention_module.ReformerAttention.buckets(Layer(), units, argparse.Namespace(mask=None))
    rows = hashed[0][0, 0, 100:]  # their mean so far has settled
    assert (rows.T.cov() - torch.eye(6)).abs().max() < 0.1


def test_random_hashing_changes_buckets_alone_and_ends():
    model, ids = lm(), make_ids(2, 64)
    before = logits(model, ids)
    with common.random_hashing():
        random_one, random_two = logits(model, ids), logits(model, ids)
        with common.see_all(model):
            exact = logits(model, ids)
    assert torch.equal(random_one, random_two)
    assert max_abs_diff(before, random_one) > 1e-3
    assert torch.equal(before, logits(model, ids))
    with common.see_all(model):
        assert max_abs_diff(exact, logits(model, ids)) < 1e-4


def test_random_hashing_gives_reversible_layers_the_gradients_of_plain_ones():
    grads = []
    for reversible in (True, False):
        model, ids = lm(reversible=reversible).train(), make_ids(2, 64)
        torch.manual_seed(1)
        with common.random_hashing():
            model(ids, labels=ids).loss.backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert max_abs_diff(*grads) < 1e-5 * grads[0].abs().max()


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_variants_are_causal_and_have_the_layers_they_say(variant):
    args = variants.Arguments(length=64, hidden_size=32, local_window=4, lsh_window=4)
    model, contexts = variants.build(variant, args)
    kind = {"full": "full", "local": "local"}.get(variant, "lsh")
    assert [layer.attention.kind for layer in model.model.layers] == ["local", kind] * 2
    ids = torch.randint(0, 256, (1, 64), generator=generator())
    other = ids.clone()
    other[:, 40:] = 7
    with contexts:
        assert max_abs_diff(logits(model.eval(), ids)[:, :40], logits(model, other)[:, :40]) < 1e-5


@pytest.mark.parametrize(
    "by", ["exact", "none", "lsh", "lsh-uncentered", "lsh-0.5", "lsh-unrotated", "random", "local"]
)
def test_ways_to_choose_keys_end_where_they_began_and_see_what_they_say(by):
    args, model, ids = windows.Arguments(local_window=4, lsh_window=4), lm(num_buckets=2), make_ids(2, 64)
    before = logits(model, ids)
    with windows.keys_chosen(model, by, 2, args) as inputs:
        found = logits(model, ids, **inputs)
    assert torch.equal(before, logits(model, ids))
    with common.see_all(model):
        exact = logits(model, ids)
    assert (max_abs_diff(found, exact) < 1e-4) == (by == "exact")
    scores = windows.mass_found(model, ids, by, 2, args)
    assert scores["found"] != scores["found"] or 0 <= scores["found"] <= 1


# --- recall and duplication


@given(seed=st.integers(0, 10**6), length=st.sampled_from([64, 512, 2048]))
def test_recall_asks_every_pair_once_far_away(seed, length):
    args = recall.Arguments()
    ids, labels = recall.draw(args, 2, length, generator(seed))
    pairs = min(64, length // 16)
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        places = [t for t in range(length) if wanted[t] != -100]
        assert len(places) == pairs
        assert len({row[t - 1] for t in places}) == pairs
        for t in places:
            assert row[t] == wanted[t]
            assert args.keys <= wanted[t] < args.keys + args.values
            first = row.index(row[t - 1])
            assert row[first + 1] == wanted[t]
            assert t - first >= length // 4


@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_full_attention_in_the_duplication_task_does_not_depend_on_rounds(mode):
    args = duplication.Arguments(attention_mode=mode, length=64, hidden_size=32, window=4, chunk=4)
    torch.manual_seed(0)
    model = duplication.make_model(args).eval()
    ids, _ = duplication.draw(args, 2, generator())
    with duplication.attention_of(model, duplication.FULL):
        one, four = logits(model, ids, num_hashes=1), logits(model, ids, num_hashes=4)
    assert max_abs_diff(one, four) < 1e-6
    assert max_abs_diff(one, logits(model, ids, num_hashes=1)) > 1e-6


def test_full_attention_in_the_duplication_task_is_the_same_in_both_modes():
    found = []
    for mode in ("window", "chunk"):
        args = duplication.Arguments(attention_mode=mode, length=64, hidden_size=32, window=4, chunk=4)
        torch.manual_seed(0)
        model = duplication.make_model(args).eval()
        ids, _ = duplication.draw(args, 2, generator())
        with duplication.attention_of(model, duplication.FULL):
            found.append(logits(model, ids))
    assert max_abs_diff(*found) < 1e-5


# --- ListOps


def evaluate(tokens):
    """By the text's definition, with a stack."""
    stack = []
    for token in tokens:
        if token == "]":
            values = []
            while isinstance(stack[-1], int):
                values.append(stack.pop())
            name, count, ordered = stack.pop(), len(values), sorted(values)
            middle = (ordered[(count - 1) // 2] + ordered[count // 2]) // 2
            token = {"[MIN": ordered[0], "[MAX": ordered[-1], "[MED": middle, "[SM": sum(values) % 10}[name]
        stack.append(int(token) if isinstance(token, int) or token.isdigit() else token)
    (value,) = stack
    return value


@given(name=st.integers(0, 10**9))
def test_listops_rows_keep_the_rules_and_have_the_right_answer(name):
    args = listops.Arguments()
    tokens, answer = listops.make_row(str(name), args)
    assert args.min_length < len(tokens) < args.max_length
    assert evaluate(tokens) == answer
    depth, deepest = 0, 0
    for token in tokens:
        depth += token.startswith("[") - (token == "]")
        deepest = max(deepest, depth)
    assert depth == 0
    assert deepest <= args.max_depth - 1  # lists; numbers may lie a level deeper
    assert listops.make_row(str(name), args) == (tokens, answer)


def test_listops_by_hand():
    assert listops.OPERATORS["[MED"]([1, 2, 4, 9]) == 3
    assert listops.OPERATORS["[MED"]([9, 2, 5]) == 5
    assert listops.OPERATORS["[MED"]([1, 2]) == 1
    assert listops.OPERATORS["[SM"]([7, 8, 9]) == 4
    assert evaluate(["[MAX", "2", "[SM", "7", "8", "]", "[MED", "1", "4", "]", "]"]) == 5


def test_listops_gives_up_only_on_lists_that_are_too_long():
    args = listops.Arguments()
    for seed in range(300):
        whole, some = (listops.make_list(random.Random(seed), 1, args, room) for room in (10**9, 11))
        assert some == (whole if len(whole[0]) <= 11 else None)


def test_listops_masks_tokens_but_no_padding():
    inputs = listops.collate([listops.encode(["[MAX", "1", "2", "]"]), listops.encode(["3"])])
    masked = listops.mask_tokens(inputs, 0.5, generator(1))
    hidden = masked["input_ids"] == listops.MASK
    assert (hidden == (masked["labels"] != -100)).all()
    assert (masked["labels"][hidden] == inputs["input_ids"][hidden]).all()
    assert not hidden[1, 1:].any()
    assert hidden.any(-1).all()


# --- sweeps and training


def test_results_are_appended_found_and_kept_apart(tmp_path):
    file = tmp_path / "a" / "x.csv"
    results = common.Results(file, ("name", "steps"), ("loss",))
    results.add({"name": "a, b", "steps": 3}, {"loss": 1.25})
    results.add({"name": "c", "steps": 3}, {"loss": float("nan")})
    again = common.Results(file, ("name", "steps"), ("loss",))
    assert again.find({"name": "a, b", "steps": 3}) == [{"name": "a, b", "steps": "3", "loss": "1.25"}]
    assert len(again.find({"steps": 3})) == 2
    assert again.find({"steps": 4}) == []
    with pytest.raises(SystemExit, match="Move it away"):
        common.Results(file, ("name",), ("loss",))
    assert "| 3 | 1.25 |" in common.table(again.rows(), ["steps"], "name", "loss")


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not(tmp_path):
    data = torch.randint(0, 40, (500,), generator=generator()).to(torch.uint8)
    batch = common.text_batches(data, "plain", 2, 64)

    def run(checkpoint, fail_at=None):
        def watch(step, state):
            state["seen"] = [*state.get("seen", []), step]
            if step == fail_at:
                raise KeyboardInterrupt
            return False

        model, state = lm(), {}
        torch.manual_seed(5)
        losses = common.train(
            model, batch, 6, seed=1, checkpoint=checkpoint, save_every=2, watch=watch, watch_every=1, state=state
        )
        return losses, state["seen"], torch.cat([parameter.flatten() for parameter in model.parameters()])

    expected = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run.pt", fail_at=4)
    resumed, finished = run(tmp_path / "run.pt"), run(tmp_path / "run.pt")
    for losses, seen, weights in (resumed, finished):
        assert losses == expected[0]
        assert seen == expected[1]
        assert torch.equal(weights, expected[2])


# --- the scripts

TINY = {
    "attention_variants": ["--steps", "2", "--answer_steps", "1", "--length", "256", "--variants", "lsh", "random"],
    "exact_then_windows": ["--steps", "2", "--answer_steps", "1", "--length", "256"],
    "bucket_balance": ["--steps", "2", "--length", "128", "--positions", "rotary"],
    "recall": ["--steps", "4", "--stage_steps", "2", "--watch_every", "2", "--rounds", "1"],
    "duplication": ["--steps", "4"],
    "listops": ["--steps", "3", "--pretraining_steps", "2", "--test_rows", "8"],
    "classification": ["--options", "--hidden_size 32 --num_train_epochs 1 --max_length 64 --tokenizer bytes"],
    "reversible_and_shared": ["--steps", "10", "--every", "5"],
    "step_time": ["--lengths", "128", "256", "--tokens", "256", "--repeats", "1"],
    "defaults": ["--steps", "2", "--widths", "64", "--length", "64", "--settings", ""],
}


def test_every_experiment_has_a_short_version_that_make_runs():
    makefile = (EXPERIMENTS.parent / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [line for line in makefile.splitlines() if line.startswith("EVIDENCE :=")]
    assert sorted(line.split()[2:]) == sorted(TINY) == NAMES


LONG = ("bucket_balance", "classification", "reversible_and_shared")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in sorted(TINY)]
)
def test_the_short_version_writes_rows_and_a_picture(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "demo_text", lambda: bytes(range(32, 127)) * 1000)
    script = load_experiment(name)
    script.main(["--short", "--output_dir", str(tmp_path), *TINY[name]])
    rows = common.Results.rows(argparse.Namespace(file=tmp_path / f"{name}.csv"))
    assert len(rows) >= 2 - (name == "listops")
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert str(tmp_path / f"{name}.csv") in capsys.readouterr().out
