"""Commands that inspect a model: its memory, its speed, and its attention."""

import argparse
from typing import Any

from .inputs import check_stdout, json_fields, read_prompt

PLOTS = {  # each is a function of `hf_reformer.analysis`
    "pairs": "plot_pairs",
    "buckets": "plot_buckets",
    "bucket_sizes": "plot_bucket_sizes",
    "round_agreement": "plot_round_agreement",
    "attention": "plot_attention",
    "attention_mass": "plot_attention_mass",
    "found": "plot_attention_found",
}


def config_and_class(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the config given by --model, --fields and --length, and the class named by --head, or None.

    Raises:
        ValueError: a field, class or model does not exist.
    """
    from transformers import AutoConfig

    from hf_reformer import ReformerConfig
    from hf_reformer.analysis.memory import known_class
    from hf_reformer.hub.model_folder import readable

    fields = {"max_position_embeddings": max(args.length)} if args.model is None else {}
    fields |= json_fields(args.fields) or {}
    if unknown := [name for name in fields if name not in ReformerConfig().to_dict()]:
        raise ValueError(f"--fields: ReformerConfig has no field {', '.join(unknown)}.")
    model_class = None if args.head is None else known_class(args.head)
    with readable(args.model or "--fields"):
        config = ReformerConfig(**fields) if args.model is None else AutoConfig.from_pretrained(args.model, **fields)
    if not isinstance(config, ReformerConfig):
        raise ValueError(f"`{args.model}` is of type {config.model_type}, not a Reformer of this package.")
    return config, model_class


def run_memory(args: argparse.Namespace) -> None:
    """Estimate the memory of a training step, or of a forward pass, on a CPU, without running it.

    One column per length, one row per part (`hf_reformer.estimate_memory`).
    """
    check_stdout()
    import torch

    from hf_reformer import estimate_memory
    from hf_reformer.analysis.memory import format_memory

    config, model_class = config_and_class(args)
    dtype = getattr(torch, args.dtype)
    options = {"training": not (args.inference or args.use_cache), "use_cache": args.use_cache}
    options |= {"model_class": model_class, "dtype": dtype}
    options |= {"autocast": torch.bfloat16 if args.bf16 else None, "optimizer_states": args.optimizer_states}
    print(format_memory({f"{n:,}": estimate_memory(config, args.batch_size, n, **options) for n in args.length}))


def run_bench(args: argparse.Namespace) -> None:
    """Measure training steps and forward passes of a new model on this machine, compared with exact attention.

    Prints median seconds, and the estimated memory of a training step (`hf-reformer memory`).
    """
    check_stdout()
    import copy

    from hf_reformer import estimate_memory
    from hf_reformer.analysis.speed import measure_seconds

    config, model_class = config_and_class(args)
    exact = copy.deepcopy(config)
    exact.attn_layers, exact.reversible = ("full",) * len(config.attn_layers), False
    if exact.is_encoder_decoder:
        exact.decoder_attn_layers = ("full",) * len(exact.decoder_attn_layers)
    models = {"hf-reformer": config} | ({} if args.no_baseline else {"exact attention": exact})
    print(f"{'tokens':>9}  {'':15}  {'training step':>13}  {'forward':>9}  {'memory':>11}")
    for length in args.length:
        for name, its_config in models.items():
            step, forward = (
                measure_seconds(
                    its_config, args.batch_size, length, training, model_class=model_class, repeats=args.repeats
                )
                for training in (True, False)
            )
            memory = estimate_memory(its_config, args.batch_size, length, model_class=model_class).total / 2**20
            print(f"{length:9,}  {name:15}  {step:11.3f} s  {forward:7.3f} s  {memory:7,.0f} MiB", flush=True)


def run_plot(args: argparse.Namespace) -> None:
    """Plot what a layer's attention does with a text, and save it to a file.

    Kinds: which tokens attend to which (pairs), the bucket of each token (buckets), how full buckets are
    (bucket_sizes), how many nearest neighbors share a bucket (round_agreement), the weights (attention), the attention
    that each token receives (attention_mass), how much of exact attention hashing finds (found).
    """
    text = read_prompt(args)
    import torch
    from transformers import AutoModel

    from hf_reformer import analysis
    from hf_reformer.hub.model_folder import load_model, load_tokenizer, quiet, readable

    with readable(args.model), quiet():
        model, _ = load_model(AutoModel, args.model, "auto", trust_remote_code=args.trust_remote_code)
        tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    model.eval()
    kinds = list(getattr(model.config, "attn_layers", ()))
    layer = (kinds.index("lsh") if "lsh" in kinds else 0) if args.layer is None else args.layer
    if not 0 <= layer < len(kinds):
        raise ValueError(
            f"--layer {layer}: the model has {len(kinds)} layers of attention that can be plotted, numbered from 0."
        )
    heads = model.config.num_attention_heads
    if not 0 <= args.head < heads:
        raise ValueError(f"--head {args.head}: a layer has {heads} heads, numbered from 0.")
    inputs = {"input_ids": torch.tensor([tokenizer(text)["input_ids"]])}
    draw = getattr(analysis, PLOTS[args.kind])
    if args.kind == "found":
        axes = draw(analysis.attention_found(model, inputs))
    elif args.kind in ("attention", "attention_mass"):
        with torch.no_grad():
            weights = model(**inputs, output_attentions="sparse").attentions[layer]
        axes = draw(weights, **({"head": args.head} if args.kind == "attention" else {}))
    else:
        axes = draw(
            analysis.view_layer(model, layer=layer, **inputs),
            **({"head": args.head} if args.kind in ("pairs", "buckets") else {}),
        )
    axes.figure.savefig(args.output)
