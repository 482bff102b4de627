"""Runs where the package is not imported: loads models by their own code, twice each, and records what they compute.

    python without_package.py RESULTS AUTO_CLASS=NAME … SNIPPET.py …

The tests use `observe` as well, so that both sides do the same.
"""

import importlib.util
import io
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
import transformers

TEXTS = (["Zürich <|mask|>", "é"], ["a", "b"])


def load(auto_class: str, name: str, **options):
    """The model; weights that are missing in the checkpoint are drawn from a seed."""
    torch.manual_seed(0)
    return getattr(transformers, auto_class).from_pretrained(name, **options)


def observe(model) -> dict:
    """Outputs, a text generated with a cache, and the outputs after one training step."""
    ids = (torch.arange(60).view(2, 30) * 7) % 37 + 2
    ids = ids[None] if "MultipleChoice" in type(model).__name__ else ids
    name = type(model).__name__
    for weight in model.parameters():  # where weights lie in a file decides the last bit of a product
        weight.data = weight.data.clone()
    if model.main_input_name != "input_ids":
        ids = ids / 10 - 2
        ids = ids.view(2, 3, 5, 2) if "Image" in name else ids.view(2, 15, 2) if "TimeSeries" in name else ids
    found = {"class": type(model).__name__, "outputs": outputs(model.eval(), ids)}
    if model.can_generate():
        found["text"] = model.generate(ids, max_new_tokens=12, do_sample=False)
    labels = {"labels": ids} if "LM" in found["class"] or "Conditional" in found["class"] else {}
    torch.manual_seed(1)
    model.train()(ids, **labels)[0].square().mean().backward()  # the loss, or else the first of the outputs
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return found | {"trained": outputs(model.eval(), ids)}


@torch.no_grad()
def outputs(model, ids) -> list[torch.Tensor]:
    target = {"decoder_input_ids": ids} if "Conditional" in type(model).__name__ else {}
    return [x for x in model(ids, **target, use_cache=False).to_tuple() if isinstance(x, torch.Tensor)]


def observe_tokenizer(tokenizer) -> dict:
    ids = tokenizer(*TEXTS, padding=True)["input_ids"]
    return {"ids": ids, "texts": tokenizer.batch_decode(ids), "special": tokenizer.special_tokens_map}


def main(results: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    packages = "hf_reformer", "reformer_kernels"
    found = {"installed": [name for name in packages if importlib.util.find_spec(name) is not None]}
    for argument in arguments:
        if argument.endswith(".py"):
            with redirect_stdout(io.StringIO()) as printed:
                runpy.run_path(argument)
            found[Path(argument).name] = printed.getvalue()
            continue
        auto_class, name = argument.split("=")
        if auto_class == "AutoTokenizer":
            found[argument] = observe_tokenizer(
                transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=True)
            )
            continue
        model = load(auto_class, name, trust_remote_code=True)
        assert type(load(auto_class, name, trust_remote_code=True)) is type(model), f"{argument}: two classes"
        found[argument] = observe(model) | {"module": type(model).__module__}
    found["imported"] = [name for name in packages if name in sys.modules]
    torch.save(found, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
