"""Adapters of peft, and trl's supervised fine-tuning: both on the reversible path, as on any other model."""

import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import REPEATABLE, SMALL_WINDOWS, make_ids, make_model, max_abs_diff, tiny_config
from memory_census import census_of, make, size_of_gradients
from transformers import AutoModelForCausalLM

import hf_reformer
from hf_reformer import (
    ReformerByteTokenizer,
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)
from hf_reformer.reversible.reversible import ReversibleFunction

peft = pytest.importorskip("peft")
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model  # noqa: E402

LM = TaskType.CAUSAL_LM
IDS = make_ids(2, 41)
LAYERS = ["local", "lsh", "full"]
LABELS = {
    ReformerForCausalLM: {"labels": IDS},
    ReformerForSequenceClassification: {"labels": torch.tensor([1, 0])},
    ReformerForTokenClassification: {"labels": IDS % 3},
    ReformerForQuestionAnswering: {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([5, 40])},
    ReformerForMaskedLM: {"labels": IDS},
}
TASKS = {
    ReformerForCausalLM: LM,
    ReformerForSequenceClassification: TaskType.SEQ_CLS,
    ReformerForTokenClassification: TaskType.TOKEN_CLS,
    ReformerForQuestionAnswering: TaskType.QUESTION_ANS,
    ReformerForMaskedLM: None,
}
DROPOUT = 0.3
KINDS = {
    "LoRA": lambda: LoraConfig(task_type=LM, lora_dropout=DROPOUT),
    "LoRA everywhere": lambda: LoraConfig(task_type=LM, lora_dropout=DROPOUT, target_modules="all-linear"),
    "LoRA on the head": lambda: LoraConfig(task_type=LM, lora_dropout=DROPOUT, target_modules=["v_proj", "lm_head"]),
    "LoRA on embeddings": lambda: LoraConfig(task_type=LM, target_modules=["embed_tokens"]),
    "LoRA in one layer": lambda: LoraConfig(task_type=LM, lora_dropout=DROPOUT, layers_to_transform=[1]),
    "LoRA and biases": lambda: LoraConfig(task_type=LM, lora_dropout=DROPOUT, bias="all"),
    "LoRA and tokens": lambda: LoraConfig(task_type=LM, trainable_token_indices=[1, 2, 3]),
    "LoRA and whole modules": lambda: LoraConfig(task_type=LM, modules_to_save=["lm_head", "norm"]),
    "DoRA": lambda: LoraConfig(task_type=LM, lora_dropout=DROPOUT, use_dora=True),
    "AdaLoRA": lambda: peft.AdaLoraConfig(task_type=LM, lora_dropout=DROPOUT, total_step=10),
    "IA3": lambda: peft.IA3Config(task_type=LM),
    "LoHa": lambda: peft.LoHaConfig(task_type=LM, rank_dropout=DROPOUT),
    "LoKr": lambda: peft.LoKrConfig(task_type=LM, rank_dropout=DROPOUT),
    "OFT": lambda: peft.OFTConfig(task_type=LM, oft_block_size=8, module_dropout=DROPOUT),
    "VeRA": lambda: peft.VeraConfig(task_type=LM, vera_dropout=DROPOUT),
    "layer norms": lambda: peft.LNTuningConfig(task_type=LM),
}


def with_adapter(model, config):
    """The model with that adapter, its weights moved away from where it changes nothing; the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapted = get_peft_model(model, config).to(next(model.parameters()).dtype)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted.eval()


def make_adapted(cls=ReformerForCausalLM, config=None, **overrides):
    model = make_model(cls, **{"attn_layers": LAYERS, "num_labels": 3, **SMALL_WINDOWS, **overrides})
    return with_adapter(model, config or LoraConfig(task_type=TASKS[cls], lora_dropout=DROPOUT))


def trained(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model, before_backward=lambda: None, half=False, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model.train()(**{"input_ids": IDS, "labels": IDS, **inputs}).loss
    before_backward()
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    return {name: parameter.grad.clone() for name, parameter in trained(model).items()}


def assert_equal_gradients(found: dict, expected: dict, tolerance: float = 1e-10):
    assert found.keys() == expected.keys()
    scale = max(grad.abs().max().item() for grad in expected.values())
    for name in expected:
        no_gradient = "qa_outputs" in name and name.endswith("bias")  # a softmax over positions does not see it
        assert no_gradient or expected[name].any(), f"{name} gets no gradient"
        assert max_abs_diff(found[name], expected[name]) <= tolerance * scale, name


@pytest.fixture
def reversible_layers(monkeypatch):
    """The numbers of layers that were run reversibly."""
    seen = []
    apply = ReversibleFunction.apply
    monkeypatch.setattr(ReversibleFunction, "apply", lambda *args: seen.append(args[3]) or apply(*args))
    return seen


# --- where adapters go


@pytest.mark.slow
def test_peft_is_told_when_it_is_imported():
    """And never imported for it."""
    program = """
        import sys
        import hf_reformer
        assert "peft" not in sys.modules
        from peft import IA3Config, LoraConfig, get_peft_model
        for config in (LoraConfig(), IA3Config()):
            get_peft_model(hf_reformer.ReformerModel(hf_reformer.ReformerConfig(num_hidden_layers=2)), config)
        assert not any("hf_reformer" in type(finder).__module__ for finder in sys.meta_path)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_peft_that_is_there_already_is_told_by_register(monkeypatch):
    from peft.utils import constants

    tables = {name: table for name, table in vars(constants).items() if name.endswith("TARGET_MODULES_MAPPING")}
    assert len(tables) > 20
    for table in tables.values():
        monkeypatch.delitem(table, "hf_reformer")
    theirs = tables["TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING"]
    monkeypatch.setitem(theirs, "hf_reformer", ["o_proj"])
    hf_reformer.register()
    assert theirs["hf_reformer"] == ["o_proj"], "what somebody else has entered stays"
    modules = {name for name, _ in make_model(ReformerForCausalLM, attn_layers=LAYERS).named_modules()}
    for table in tables.values():
        for target in table["hf_reformer"]:
            assert any(name.endswith(f".{target}") for name in modules), target


def test_lora_goes_to_queries_and_values():
    names = {name.split(".lora_")[0].rsplit(".layers.")[1] for name in trained(make_adapted())}
    queries = {"0.attention.q_proj", "1.attention.qk_proj", "2.attention.q_proj"}
    assert names == queries | {f"{layer}.attention.v_proj" for layer in range(3)}


# --- training


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_trains_on_the_reversible_path(kind, reversible_layers):
    """Without `enable_input_require_grads`, with dropout of the adapter's own; gradients are the plain path's."""
    found = gradients(make_adapted(config=KINDS[kind]()))
    assert reversible_layers == [0, 1, 2]
    assert_equal_gradients(found, gradients(make_adapted(config=KINDS[kind](), reversible=False)))


@pytest.mark.parametrize("cls", TASKS, ids=lambda cls: cls.__name__)
def test_every_head_trains_with_an_adapter(cls, reversible_layers):
    found = gradients(make_adapted(cls), **LABELS[cls])
    assert reversible_layers == [0, 1, 2]
    assert_equal_gradients(found, gradients(make_adapted(cls, reversible=False), **LABELS[cls]))
    heads = {name for name in found if "modules_to_save" in name}
    assert bool(heads) == (cls not in (ReformerForCausalLM, ReformerForMaskedLM)), "a fresh head is trained whole"


def test_slices_draw_their_own_dropout():
    found = gradients(make_adapted(chunk_size_feed_forward=7))
    assert_equal_gradients(found, gradients(make_adapted(chunk_size_feed_forward=7, reversible=False)))


def test_adapters_train_in_half_precision():
    found, expected = (gradients(make_adapted(dtype=torch.float32, reversible=r), half=True) for r in (True, False))
    assert_equal_gradients(found, expected, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    expected = gradients(make_adapted())
    model = make_adapted()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equal_gradients(gradients(model), expected)


def test_the_adapter_may_be_off_for_a_while_before_backward():
    """As where the model without its adapter is the reference."""
    model = make_adapted()

    def ask_the_reference():
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=IDS)

    assert_equal_gradients(gradients(model, ask_the_reference), gradients(model))


def lora_gradients(scenario, reversible: bool, **config) -> dict[str, torch.Tensor]:
    """Gradients of a loss that `scenario(model)` gives, of every parameter that gets one."""
    options = {"task_type": LM, "lora_dropout": 0.0, "r": 4, **config}
    model = make_adapted(config=LoraConfig(**options), reversible=reversible, **REPEATABLE).train()
    torch.manual_seed(5)
    scenario(model).backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def forward_while_disabled(model):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with model.disable_adapter():
        return model(input_ids=IDS, labels=IDS).loss


def another_adapter(model):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model.add_adapter("other", LoraConfig(task_type=LM, r=4, init_lora_weights=False))
    return model.double()


def adapter_set_before_backward(model):
    another_adapter(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    model.set_adapter("other")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return loss


def two_adapters_in_one_backward(model):
    another_adapter(model)
    one = model(input_ids=IDS, labels=IDS).loss
    model.set_adapter("other")
    two = model(input_ids=IDS.flip(1), labels=IDS).loss
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return one + two


def scale_set_before_backward(model):
    loss = model(input_ids=IDS, labels=IDS).loss
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    return loss


def scale_set_around_forward(model):
    with peft.helpers.rescale_adapter_scale(model, 0.3):
        return model(input_ids=IDS, labels=IDS).loss


SCENARIOS = {
    "a forward while the adapter is disabled": forward_while_disabled,
    "another adapter set before backward": adapter_set_before_backward,
    "two adapters in one backward": two_adapters_in_one_backward,
    "scale set before backward": scale_set_before_backward,
    "scale set around the forward": scale_set_around_forward,
}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_an_adapter_is_in_backward_what_it_was_in_forward(scenario, reversible_layers):
    found = lora_gradients(scenario, True)
    assert reversible_layers
    expected = lora_gradients(scenario, False)
    assert found.keys() == expected.keys()
    assert any(grad.any() for grad in expected.values())
    for name in expected:
        assert max_abs_diff(found[name], expected[name]) <= 1e-10, name


def test_activated_lora_gets_its_gradients():
    """peft puts hooks on its layers while it forwards, and they are gone in backward."""
    first = int(IDS[0, 20])
    found, expected = (
        lora_gradients(lambda m: m(input_ids=IDS, labels=IDS).loss, r, alora_invocation_tokens=[first])
        for r in (True, False)
    )
    assert all(expected[name].any() for name in expected)
    assert_equal_gradients(found, expected)


def test_a_step_moves_the_adapter_alone():
    model = make_adapted(config=LoraConfig(task_type=LM, modules_to_save=["lm_head"]))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    gradients(model)
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(trained(model))
    assert all("lora_" in name or "lm_head.modules_to_save" in name for name in moved)


def test_memory_does_not_grow_with_depth():
    def peak(depth, path):
        config = LoraConfig(task_type=LM, lora_dropout=DROPOUT, target_modules="all-linear")
        model = get_peft_model(make(depth, path), config)
        _, most = census_of(model, 2048)
        return most - size_of_gradients(torch.nn.ParameterList(trained(model).values()))

    assert peak(6, "reversible") <= 1.1 * peak(2, "reversible")
    assert peak(6, "plain") > 2 * peak(2, "plain")


# --- merging, saving, generating


@pytest.mark.parametrize("kind", ["LoRA", "LoRA on the head", "LoRA and whole modules", "DoRA", "IA3", "LoKr"])
def test_merged_equals_unmerged(kind):
    model = make_adapted(config=KINDS[kind]())
    expected = model(input_ids=IDS).logits
    with model.disable_adapter():
        assert max_abs_diff(model(input_ids=IDS).logits, expected) > 0.01
    assert max_abs_diff(model.merge_and_unload()(input_ids=IDS).logits, expected) <= 1e-5


@pytest.mark.parametrize("kind", ["LoRA", "LoRA and whole modules", "DoRA", "IA3"])
def test_a_saved_adapter_loads(kind, tmp_path):
    make_model(ReformerForCausalLM, dtype=torch.float32).save_pretrained(tmp_path / "base")

    def base():
        return ReformerForCausalLM.from_pretrained(tmp_path / "base")

    model = with_adapter(base(), KINDS[kind]())
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    loaders = [
        lambda folder: peft.PeftModel.from_pretrained(base(), folder),
        peft.AutoPeftModelForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
    ]
    if kind == "DoRA":
        loaders.pop()  # transformers 5.23 knows the saved magnitudes by another name, and reports them missing
    for load in loaders:
        loaded = load(tmp_path / "adapter").eval()
        assert max_abs_diff(loaded(input_ids=IDS).logits, expected) <= 1e-6
    assert max_abs_diff(base()(input_ids=IDS).logits, expected) > 0.01


def test_an_adapter_added_by_transformers_loads(tmp_path):
    make_model(ReformerForCausalLM, dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = ReformerForCausalLM.from_pretrained(tmp_path / "base")
    expected = model(input_ids=IDS).logits
    model.add_adapter(LoraConfig(init_lora_weights=False))
    adapted = model.eval()(input_ids=IDS).logits
    assert max_abs_diff(adapted, expected) > 0.01
    model.save_pretrained(tmp_path / "adapter")
    assert (
        max_abs_diff(ReformerForCausalLM.from_pretrained(tmp_path / "adapter")(input_ids=IDS).logits, adapted) <= 1e-6
    )


def test_generation_with_an_adapter_is_that_of_the_merged_model():
    model = make_adapted()
    generated = model.generate(input_ids=IDS[:, :9], max_new_tokens=5)
    assert torch.equal(generated, model.merge_and_unload().generate(input_ids=IDS[:, :9], max_new_tokens=5))


# --- prompt tuning


def with_prompt(cls=ReformerForCausalLM, tokens=5, **overrides):
    return make_adapted(cls, PromptTuningConfig(task_type=TASKS[cls], num_virtual_tokens=tokens), **overrides)


@pytest.mark.parametrize("length", [1, 2, 17, 40])
@pytest.mark.parametrize("tokens", [1, 5, 24])
def test_a_prompt_stands_before_the_tokens(length, tokens):
    model, ids = with_prompt(tokens=tokens), IDS[:, :length]
    prompt = model.get_prompt(batch_size=2)
    embeds = torch.cat([prompt, model.get_base_model().get_input_embeddings()(ids)], dim=1)
    logits = model(input_ids=ids).logits
    assert logits.shape[:2] == (2, tokens + length)
    assert torch.equal(logits, model.get_base_model()(inputs_embeds=embeds).logits)
    padded = torch.nn.functional.pad(ids, (0, 3))
    found = model(input_ids=padded, attention_mask=(torch.arange(length + 3) < length).long().expand(2, -1)).logits
    assert max_abs_diff(found[:, : tokens + length], logits) <= 1e-10


@pytest.mark.parametrize("cls", [ReformerForCausalLM, ReformerForSequenceClassification, ReformerForQuestionAnswering])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_prompt_trains_on_the_reversible_path(cls, tokens, reversible_layers):
    found = gradients(with_prompt(cls, tokens), **LABELS[cls])
    assert reversible_layers == [0, 1, 2]
    assert any("prompt_encoder" in name for name in found)
    assert_equal_gradients(found, gradients(with_prompt(cls, tokens, reversible=False), **LABELS[cls]))


def test_labels_of_tokens_must_count_the_prompt_too():
    """peft lengthens the labels of language models only; the message says what is missing."""
    model = with_prompt(ReformerForTokenClassification, 7)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 41\).*\(2, 48\)"):
        model(input_ids=IDS, labels=IDS % 3)
    longer = torch.nn.functional.pad(IDS % 3, (7, 0), value=-100)
    assert model(input_ids=IDS, labels=longer).loss > 0


def test_a_prompt_generates():
    model = with_prompt()
    found = model.generate(input_ids=IDS[:, :9], max_new_tokens=3, do_sample=False)
    for place in range(9, 12):
        assert torch.equal(found[:, place], model(input_ids=found[:, :place]).logits[:, -1].argmax(-1))


@pytest.mark.parametrize("cls", [ReformerForCausalLM, ReformerForSequenceClassification])
def test_prefix_tuning_is_refused(cls):
    model = make_adapted(cls, peft.PrefixTuningConfig(task_type=TASKS[cls], num_virtual_tokens=5))
    with pytest.raises(ValueError, match="prefix tuning"):
        model(input_ids=IDS)
    if cls is ReformerForCausalLM:
        with pytest.raises(ValueError, match="prompt tuning, or LoRA"):
            model.generate(input_ids=IDS, max_new_tokens=1)


# --- trl


TEXTS = [("the cat sat on the mat. " * 4)[: 17 + 9 * number % 70] for number in range(12)]


def make_trainer(tmp_path, packing: bool, adapter=None, **arguments):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = ReformerByteTokenizer()
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), **SMALL_WINDOWS, **REPEATABLE)
    arguments = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "max_length": 128,
    } | arguments
    args = trl.SFTConfig(
        tmp_path,
        packing=packing,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    return trl.SFTTrainer(
        ReformerForCausalLM(config),
        args,
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        peft_config=adapter,
    )


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "adapter", [None, LoraConfig(task_type=LM, target_modules="all-linear")], ids=["whole", "LoRA"]
)
def test_the_loss_of_fine_tuning_falls(checkpointing, packing, adapter, tmp_path, reversible_layers):
    """trl checkpoints activations unless told not to; then layers are reversible."""
    trainer = make_trainer(tmp_path, packing, adapter, activation_checkpointing=checkpointing)
    trainer.train()
    assert reversible_layers == ([] if checkpointing else 3 * [0, 1])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.001


def test_packing_changes_no_loss(tmp_path):
    """trl numbers the tokens of every packed sample from 0, with any attention; so none sees another."""
    trainer = make_trainer(tmp_path, packing=True)
    batch = next(iter(trainer.get_train_dataloader()))
    ids, positions = batch["input_ids"], batch["position_ids"]
    assert ids.shape[0] == 1
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    samples = ids.tensor_split(starts[1:], dim=1)
    assert len(samples) > 3
    model = trainer.model.train()
    packed = trainer.compute_loss(model, batch)
    alone = sum(model(sample, labels=sample).loss * (sample.shape[1] - 1) for sample in samples)
    alone = alone / sum(sample.shape[1] - 1 for sample in samples)
    assert max_abs_diff(packed, alone) <= 1e-6
    assert max_abs_diff(packed, model(ids, labels=ids).loss) > 1e-4, "mixed samples give another loss"
    grads = [torch.autograd.grad(loss, tuple(model.parameters())) for loss in (packed, alone)]
    for found, expected in zip(*grads, strict=True):
        assert max_abs_diff(found, expected) <= 1e-5


def test_packed_samples_are_never_mixed_for_want_of_positions(tmp_path):
    trainer = make_trainer(tmp_path, True, PromptTuningConfig(task_type=LM, num_virtual_tokens=4))
    with pytest.warns(UserWarning, match="Ignoring position ids"), pytest.raises(ValueError, match="drops them"):
        trainer.train()
