"""The base class of all models: initialization and loading of weights, also of transformers' own Reformer."""

import inspect
import json
import os
import pickletools
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel, load_state_dict

from ..compat import forget_weight_conversions, has_forward_pre_hook, load_pretrained_weights, mark_initialized
from ..configuration_reformer import ReformerConfig
from ..layers.reformer_layer import ReformerLayer
from ..ops.sequence_parallel import check_group, check_same_inputs
from .losses import add_coverage_loss

# Parameter names of transformers' own Reformer, and ours. Names that match no pattern stay unchanged.
BUILTIN_NAMES = {
    r"^(reformer\.)?embeddings\.word_embeddings\.": "model.embed_tokens.",
    r"^(reformer\.)?embeddings\.position_embeddings\.embedding\.": "model.position_embeddings.",
    r"^(reformer\.)?embeddings\.position_embeddings\.weights\.": "model.position_embeddings.weights.",
    r"^(reformer\.)?encoder\.layer_norm\.": "model.norm.",
    r"^(reformer\.)?encoder\.layers\.": "model.layers.",
    r"\.attention\.layer_norm\.": ".attention_norm.",
    r"\.attention\.self_attention\.query_key\.": ".attention.qk_proj.",
    r"\.attention\.self_attention\.query\.": ".attention.q_proj.",
    r"\.attention\.self_attention\.key\.": ".attention.k_proj.",
    r"\.attention\.self_attention\.value\.": ".attention.v_proj.",
    r"\.attention\.output\.dense\.": ".attention.o_proj.",
    r"\.feed_forward\.layer_norm\.": ".feed_forward_norm.",
    r"\.feed_forward\.dense\.dense\.": ".feed_forward.up_proj.",
    r"\.feed_forward\.output\.dense\.": ".feed_forward.down_proj.",
    r"^lm_head\.decoder\.weight$": "lm_head.weight",
}

# Files of transformers 4, and since 5.24, also hold the head's bias under this name, which takes precedence.
LEGACY_LM_HEAD_BIAS = "lm_head.decoder.bias"

MOST_PARTS = 2**20  # of a tuple in a torch file; the tuples of tensors have about a dozen
MOST_PARAMETERS = 2**28  # larger models are only loaded from files of a plausible size

# Weights of an encoder-decoder besides the encoder; other models load only the encoder.
DECODER_KEY_PATTERN = r"^(decoder|lm_head|merge_streams)\."


class ZeroLinear(nn.Linear):
    """A linear layer initialized to zero, so that adding its output initially changes nothing."""


class ZeroEmbedding(nn.Embedding):
    """An embedding initialized to zero, likewise; the row of `padding_idx` stays zero."""


class ReformerPreTrainedModel(PreTrainedModel):
    """Base class for initialization and loading of weights, also from folders of transformers' own Reformer."""

    config_class = ReformerConfig
    config: ReformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReformerLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_context_parallel = False
    _keys_to_ignore_on_load_unexpected = [r"\.(self_)?mask_value_float(16|32)$", r"^lm_head\.decoder\.bias$"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as in transformers; also reads folders of transformers' own Reformer, renaming the weights.

        Raises:
            ValueError: an index in the folder names files outside it, or its config describes a model far larger than
                its files.
        """
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        folder = Path(name, kwargs.get("subfolder") or "") if isinstance(name, (str, Path)) else None
        for file in named_files(folder) if folder is not None and folder.is_dir() else ():
            if not os.path.abspath(file).startswith(os.path.join(os.path.abspath(name), "")):
                raise ValueError(f"{folder} names the file {file}, which lies elsewhere. It is not read.")
        kwargs.setdefault("key_mapping", BUILTIN_NAMES)
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        forget_weight_conversions(model)  # from now on, weights are saved under our own names
        return loaded

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        if model.config.is_encoder_decoder and not hasattr(model, "decoder"):
            model._keys_to_ignore_on_load_unexpected |= {DECODER_KEY_PATTERN}
        files = [file for file in checkpoint_files or () if state_dict is None]
        for file in files:
            if not str(file).endswith(".safetensors"):
                check_torch_file(file)
        size = sum(map(os.path.getsize, files))
        if state_dict is None and checkpoint_files and model.num_parameters() > MOST_PARAMETERS + 64 * size:
            raise ValueError(
                f"config.json asks for {model.num_parameters():,} parameters, and the files of the weights have "
                f"{size:,} bytes. They cannot belong together: look at the sizes in config.json."
            )
        loaded = load_pretrained_weights(model, state_dict, checkpoint_files, *args, **kwargs)
        if LEGACY_LM_HEAD_BIAS in loaded[0].unexpected_keys and hasattr(model, "lm_head"):
            for state in [state_dict] if state_dict is not None else map(load_state_dict, checkpoint_files):
                if LEGACY_LM_HEAD_BIAS in state:
                    head = model.lm_head
                    head.bias = nn.Parameter(
                        state[LEGACY_LM_HEAD_BIAS].to(head.weight.device, head.bias.dtype, copy=True)
                    )
                    mark_initialized(head.bias)
            loaded[0].missing_keys.discard("lm_head.bias")
        return loaded

    def enable_sequence_parallel(self, group: Any) -> None:
        """Split every sequence among the processes of a `torch.distributed` group (sequence parallelism).

        Afterwards, all processes must receive the same inputs. Each computes its share of the tokens outside attention
        and its share of the heads inside. Results are exact, and memory is divided among the processes. Losses and
        logits of the heads are complete on every process; hidden states are those of its own tokens. Gradients equal
        those of a single process after averaging over the group, as DistributedDataParallel does. `None` disables
        sequence parallelism.

        Raises:
            ValueError: not a group of this process; in `forward`, inputs that differ between processes, a number of
                heads that is not divisible by the group's size, or fewer tokens than processes.
        """
        if group is not None:
            check_group(group)
            if not has_forward_pre_hook(self, check_inputs_match_across_ranks):
                self.register_forward_pre_hook(check_inputs_match_across_ranks, with_kwargs=True)
        self.base_model.sequence_group = group

    def share_sequences(self, group: Any) -> None:
        """Deprecated name of `enable_sequence_parallel` from version 0.1."""
        warnings.warn("share_sequences is deprecated. Use enable_sequence_parallel.", FutureWarning, stacklevel=2)
        self.enable_sequence_parallel(group)

    def compile_layers(self, **options: Any) -> None:
        """Compile the token-wise parts of every layer in place: projections, feed-forward, and the norms around them.

        Recommended for deep models, since compilation takes only as long as for one layer. With torch 2.13 or later,
        `torch.compile` of the whole model also works. Its training memory does not grow with depth either, except
        with hooks or adapters in the layers or under DDP, where it is that of gradient checkpointing.

        Args:
            options: options of `torch.compile`.
        """
        for layer in self.modules():
            if isinstance(layer, ReformerLayer):
                layer.compile_parts(**options)

    def _head_output(
        self, output_class: type, outputs: Any, loss: torch.Tensor | None, targets: Any = None, num_items: Any = None,
        **fields: Any,
    ) -> Any:  # fmt: skip
        """Make a head's output: its loss plus the coverage loss (`add_coverage_loss`), and all other fields."""
        weight, coverage = self.config.coverage_loss_weight, outputs.coverage_loss
        loss = add_coverage_loss(loss, coverage, weight, targets, num_items, training=self.training)
        states = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return output_class(loss=loss, **fields, **states, coverage_loss=coverage)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ZeroEmbedding):
            init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.ParameterList):  # of axial positions; their owner has no parameters of its
            for weight in module:  # own and never gets here: the library skips it in classes that it does not ship
                init.normal_(weight, std=self.config.axial_norm_std)


def named_files(folder: Path) -> list[Path]:
    """List the files named by the JSON files of a checkpoint folder: weight shards and tokenizer versions."""
    found: list[Any] = []
    for pattern, field in (
        ("*.index.json", "weight_map"),
        ("config.json", "transformers_weights"),
        ("tokenizer_config.json", "fast_tokenizer_files"),
    ):
        for file in folder.glob(pattern):
            try:
                named = json.loads(file.read_text(encoding="utf-8")).get(field)
            except (OSError, ValueError, AttributeError, RecursionError):
                continue  # whatever reads the file reports it
            found += named.values() if isinstance(named, dict) else named if isinstance(named, list) else [named]
    return [folder / name for name in dict.fromkeys(name for name in found if isinstance(name, str) and name)]


def check_torch_file(path: Any) -> None:
    """Raise UnpicklingError for a `torch.save` file that is damaged or would take endless time or memory to read.

    Tuples in a pickle may share parts, so a few bytes can describe one with 2^60 parts; as a key, all get hashed.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic != b"PK\3\4":  # the format before torch 1.6: five pickles, then the values
                for _ in range(5):
                    _check_tuples(file)
                return
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
                if unpacked > os.path.getsize(path):  # torch.save does not compress
                    raise ValueError(f"it unpacks to {unpacked:,} bytes, more than it has")
                for entry in archive.infolist():
                    if entry.filename.endswith("data.pkl"):
                        with archive.open(entry) as pickled:
                            _check_tuples(pickled)
    except (ValueError, LookupError, zipfile.BadZipFile) as error:
        raise UnpicklingError(f"{path} is no file of `torch.save` that can be read: {error}.") from error


def _check_tuples(file: IO[bytes]) -> None:
    """Raise ValueError for a pickle with a tuple of more than `MOST_PARTS` parts, counted recursively."""
    stack: list[int] = []  # number of parts of each object that its hash depends on
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for instruction, argument, _ in pickletools.genops(file):
        name, before = instruction.name, instruction.stack_before
        if name == "MARK":
            marks.append(len(stack))
        elif name.endswith("PUT") or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name.endswith("GET") or name == "DUP":
            stack.append(stack[-1] if name == "DUP" else memo[argument])
        else:
            below = before.index(pickletools.markobject) if pickletools.markobject in before else None
            start = len(stack) - len(before) if below is None else marks.pop() - below
            if start < 0:
                raise ValueError("its pickle is damaged")
            parts = 1 + sum(stack[start:]) if name.startswith(("TUPLE", "REDUCE", "NEWOBJ", "FROZENSET")) else 1
            if parts > MOST_PARTS:
                raise ValueError("a tuple in it has more parts than weights need")
            stack[start:] = [parts] * len(instruction.stack_after)


def check_inputs_match_across_ranks(model: Any, args: tuple, kwargs: dict) -> None:
    """Check that inputs match, before a forward pass can fail in one process and leave the others waiting."""
    group = model.base_model.sequence_group
    if group is None or torch.compiler.is_compiling():
        return
    signature = inspect.signature(model.forward)
    arguments = signature.bind(*args, **kwargs).arguments
    inputs = {name: arguments.get(name) for name in signature.parameters}
    inputs["num_hashes, num_buckets or another keyword"] = inputs.pop("kwargs")
    inputs |= {"train() or eval()": model.training, "no_grad()": torch.is_grad_enabled()}
    check_same_inputs(group, model.device, inputs)
