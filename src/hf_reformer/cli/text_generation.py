"""Text from causal language models, streamed; and conversations that keep their cache from turn to turn."""

import json
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

from ..cache.cache import CACHE_NAME
from ..hub.model_folder import check_sizes, quiet, readable, saved_config
from ..models.language_models import ReformerForCausalLM

logger = logging.get_logger(__name__)


def load(name: str, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, or of a repository of the Hub; our model for transformers' own Reformer.

    Raises:
        OSError, ValueError: they cannot be had, or they are of another kind; the message says why.
    """
    if Path(name).is_dir() and saved_config(Path(name)).get("is_encoder_decoder"):
        raise ValueError(
            f"{name} holds an encoder-decoder, which writes texts that belong to others; "
            "`generate` and `chat` continue texts, for which they need a causal language model."
        )
    try:
        with readable(name):
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            model_class: Any = ReformerForCausalLM if config.model_type == "reformer" else AutoModelForCausalLM
            tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            with quiet():
                model, report = model_class.from_pretrained(
                    name,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
            check_sizes(report)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise ValueError(f"{name} is neither a folder nor a model that could be read from the Hub.") from error
    if report["missing_keys"]:
        saved = ", ".join(model.config.architectures or ["another class"])
        raise ValueError(
            f"{name} lacks weights of {type(model).__name__}, such as {min(report['missing_keys'])}. It was saved by "
            f"{saved}; only causal language models generate."
        )
    if set(tokenizer.get_vocab()) <= {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}:
        raise ValueError(
            f"{name} has no tokenizer. Save the one that the model was trained with into it: "
            "`tokenizer.save_pretrained(folder)`."
        )
    if device == "auto":
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {device!r} cannot be used: {error}") from error


def special_ids(model: Any, tokenizer: Any, *ends: int | None) -> dict[str, Any]:
    """The ids that end a text, `ends` among them, and one to pad with, for `model.generate`."""
    own = model.generation_config.eos_token_id
    ends = (*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *ends)
    known = [end for end in ends if end is not None]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(known), None)
    return {"eos_token_id": known or None, "pad_token_id": pad}


def prompt_ids(model: Any, tokenizer: Any, text: str, bos: bool = True) -> list[int]:
    """The ids of a text as `scripts/train_lm.py` trains on them: behind the bos token, where the model knows one."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = tokenizer.bos_token_id
    if bos and first is not None and first < model.get_input_embeddings().num_embeddings and ids[:1] != [first]:
        ids = [first, *ids]
    if not ids:
        raise ValueError("The prompt is empty, and no token stands before it.")
    return ids


def generate(
    model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int = 256, stream: bool = True, **options: Any
) -> Any:
    """`model.generate` from a list of ids, which prints the new text to stdout: as it comes, or when it is finished.

    Raises:
        ValueError: the model has no position left for a new token.
    """
    config = model.config.get_text_config()
    rotary = getattr(config, "position_embedding_type", None) == "rotary" or getattr(config, "rope_parameters", None)
    covered = None if rotary else getattr(config, "max_position_embeddings", None)
    room = max_new_tokens if covered is None else covered - len(ids)
    if room < 1:
        raise ValueError(
            f"{len(ids)} tokens are given, and the model covers {covered} positions (`max_position_embeddings`): no "
            "room for new ones. Shorten the text, or begin a new conversation."
        )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    input_ids = torch.tensor([ids], device=model.device)
    out = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=min(room, max_new_tokens),
        streamer=streamer,
        return_dict_in_generate=True,
        **options,
    )
    new = out.sequences[:, len(ids) :]
    if not stream:
        print("\n---\n".join(tokenizer.batch_decode(new, skip_special_tokens=True)), flush=True)
    if new.shape[1] == room < max_new_tokens:
        logger.warning(f"The text ends here, as the model covers {covered} positions (`max_position_embeddings`).")
    return out


class Conversation:
    """The turns of a chat, and the cache of the tokens that the model has run.

    Args:
        system: what the model is told first.
        options: for `generate`.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None, **options: Any):
        if tokenizer.chat_template is None:
            raise ValueError(
                "The tokenizer has no chat template. Set `tokenizer.chat_template = …` to the form that the model was "
                "trained with and save it with the model; or continue texts, with `hf-reformer generate`."
            )
        self.model, self.tokenizer, self.system, self.options = model, tokenizer, system, options
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.cache: Any = None
        self.cached_ids: list[int] = []

    def answer(self, text: str) -> str:
        """The model's answer to the user's next turn. Both are kept, unless it fails."""
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except jinja2.TemplateError as error:
            raise ValueError(f"The chat template refuses: {error}") from error
        cache = self._cache_for(ids)
        self.cache, self.cached_ids = None, []  # until it holds this turn, too
        out = generate(self.model, self.tokenizer, ids, **{CACHE_NAME: cache}, **self.options)
        self.cache = getattr(out, CACHE_NAME)
        if self.cache is not None:
            self.cached_ids = out.sequences[0, : self.cache.get_seq_length()].tolist()
        answer = self.tokenizer.decode(out.sequences[0, len(ids) :], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _cache_for(self, ids: list[int]) -> Any:
        """The cache, cut to what it shares with `ids`, whose last is always run; None: begin anew."""
        most = min(len(self.cached_ids), len(ids) - 1)
        shared = next((i for i in range(most) if self.cached_ids[i] != ids[i]), most)
        try:
            if 0 < shared < len(self.cached_ids):
                self.cache.crop(shared - len(self.cached_ids))
        except (AttributeError, RuntimeError):  # it cannot be cut, or a layer no longer has the tokens before the cut
            return None
        return self.cache if shared else None

    def save(self, path: str) -> None:
        """Write the turns as lines of JSON."""
        lines = [json.dumps(message, ensure_ascii=False) + "\n" for message in self.messages]
        Path(path).write_text("".join(lines), encoding="utf-8")
