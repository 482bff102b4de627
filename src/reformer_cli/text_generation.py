"""Streaming generation with causal language models, and conversations that keep their cache between turns."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TextStreamer
from transformers.utils import logging

from hf_reformer.cache.cache import CACHE_NAME
from hf_reformer.hub.model_folder import load_model, load_tokenizer, other_task, quiet, readable, saved_config
from hf_reformer.models.language_models import ReformerForCausalLM

logger = logging.get_logger(__name__)

PIECE = 2**20  # characters tokenized at once: a tokenizer takes up to 300 bytes of memory per character


def load(name: str, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load model and tokenizer from a checkpoint directory or Hub repository; supports transformers' Reformer, too.

    Raises:
        OSError, ValueError: they cannot be loaded, or the model is not a causal language model.
    """
    if Path(name).is_dir() and saved_config(Path(name)).get("is_encoder_decoder"):
        raise ValueError(f"{name} is an encoder-decoder model; `generate` and `chat` need a causal language model.")
    try:
        with readable(name):
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            model_class: Any = ReformerForCausalLM if config.model_type == "reformer" else AutoModelForCausalLM
            with quiet():
                model, report = load_model(model_class, name, dtype, trust_remote_code=trust_remote_code)
        tokenizer: Any = load_tokenizer(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise ValueError(f"{name} is neither a directory nor a model that could be read from the Hub.") from error
    if report["missing_keys"]:
        saved = ", ".join(model.config.architectures or ["another class"])
        raise ValueError(
            f"{name} lacks weights of {type(model).__name__}, such as {min(report['missing_keys'])}. It was saved by "
            f"{saved}; only causal language models generate."
        )
    if saved_by := other_task(model):
        raise ValueError(f"{name} was saved by {saved_by}; only causal language models generate.")
    if set(tokenizer.get_vocab()) <= {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}:
        raise ValueError(f"{name} has no tokenizer. Save the model's there: `tokenizer.save_pretrained(folder)`.")
    if device == "auto":
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    try:
        if torch.device(device).type == "meta":
            raise ValueError("The device 'meta' holds no numbers, so nothing can be computed there.")
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {device!r} cannot be used: {error}") from error


def special_ids(model: Any, tokenizer: Any, *more_eos: int | None) -> dict[str, Any]:
    """Return options for `model.generate`: the ids that end a text, including `more_eos`, and the padding id."""
    eos = model.generation_config.eos_token_id
    eos = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, *more_eos]
    eos = [token_id for token_id in eos if token_id is not None]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(eos), None)
    return {"eos_token_id": eos or None, "pad_token_id": pad}


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a text without special tokens. Texts longer than `PIECE` characters are split at line ends."""
    ids: list[int] = []
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE, start + 2 * PIECE) + 1 or start + 2 * PIECE
        ids += tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        start = end
    return ids


def prompt_ids(model: Any, tokenizer: Any, text: str, bos: bool = True) -> list[int]:
    """Tokenize a text and prepend BOS (if the model has it), as in training with the language-model recipe."""
    ids = token_ids(tokenizer, text)
    bos_id = tokenizer.bos_token_id
    if bos and bos_id is not None and bos_id < model.get_input_embeddings().num_embeddings and ids[:1] != [bos_id]:
        ids = [bos_id, *ids]
    if not ids:
        raise ValueError("The prompt is empty, and there is no bos token to start with.")
    return ids


def room_for_new_tokens(model: Any, length: int) -> int | None:
    """Return how many tokens can follow `length` others; None: any number.

    Raises:
        ValueError: there is no room for another token.
    """
    config = model.config.get_text_config()
    rotary = getattr(config, "position_embedding_type", None) == "rotary" or getattr(config, "rope_parameters", None)
    positions = None if rotary else getattr(config, "max_position_embeddings", None)
    if positions is not None and positions <= length:
        raise ValueError(
            f"The input has {length} tokens, and the model covers {positions} positions "
            "(`max_position_embeddings`), so none is left for new ones. Shorten the text, or start a new conversation."
        )
    return None if positions is None else positions - length


def common_length(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix of two lists of ids."""
    longest = min(len(a), len(b))
    return next((i for i in range(longest) if a[i] != b[i]), longest)


def cache_for(cache: Any, cached_ids: list[int], ids: list[int]) -> Any:
    """Crop a cache of `cached_ids` to their common prefix with `ids[:-1]`; None if a new one is needed."""
    shared = common_length(cached_ids, ids[:-1])
    try:
        if 0 < shared < len(cached_ids):
            cache.crop(shared - len(cached_ids))
    except (AttributeError, RuntimeError):  # it cannot be cropped, or a layer has evicted tokens
        return None
    return cache if shared else None


def generate(
    model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int = 256, stream: bool = True, **options: Any
) -> Any:
    """Run `model.generate` on a list of ids; print the new text to stdout while it is generated, or when complete.

    Raises:
        ValueError: the model has no position left for a new token.
    """
    room = room_for_new_tokens(model, len(ids))
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    options |= {
        "max_new_tokens": max_new_tokens if room is None else min(room, max_new_tokens),
        "streamer": streamer,
        "return_dict_in_generate": True,
    }
    input_ids = torch.tensor([ids], device=model.device)
    try:
        out = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **options)
    except BaseException:
        if streamer is not None and streamer.token_cache:  # an incomplete word
            streamer.end()
        raise
    new = out.sequences[:, len(ids) :]
    if not stream:
        print("\n---\n".join(tokenizer.batch_decode(new, skip_special_tokens=True)), flush=True)
    if room is not None and new.shape[1] == room < max_new_tokens:
        positions = len(ids) + room
        logger.warning(f"The text ends here, as the model covers {positions} positions (`max_position_embeddings`).")
    return out


class Conversation:
    """A chat: its turns, and the cache of the tokens that the model has processed.

    Args:
        system: the system message.
        options: options for `generate`.

    Raises:
        ValueError: the tokenizer has no chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None, **options: Any):
        if tokenizer.chat_template is None:
            raise ValueError(
                "The tokenizer has no chat template. Set `tokenizer.chat_template = …` to the one that the model was "
                "trained with and save it with the model; or continue texts with `hf-reformer generate`."
            )
        self.model, self.tokenizer, self.system, self.options = model, tokenizer, system, options
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.cache: Any = None
        self.cached_ids: list[int] = []

    def answer(self, text: str) -> str:
        """Generate an answer to the user's next turn. Both are added to the conversation, unless there is an error."""
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is third-party code
            raise ValueError(f"The chat template raises an error: {type(error).__name__}: {error}") from error
        ids = token_ids(self.tokenizer, text)
        cache = cache_for(self.cache, self.cached_ids, ids)
        self.cache, self.cached_ids = None, []  # until it holds this turn, too
        out = generate(self.model, self.tokenizer, ids, **{CACHE_NAME: cache}, **self.options)
        self.cache = getattr(out, CACHE_NAME)
        if self.cache is not None:
            self.cached_ids = out.sequences[0, : self.cache.get_seq_length()].tolist()
        answer = self.tokenizer.decode(out.sequences[0, len(ids) :], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def save(self, path: str) -> None:
        """Write the turns as JSON lines."""
        lines = [json.dumps(message, ensure_ascii=False) + "\n" for message in self.messages]
        Path(path).write_text("".join(lines), encoding="utf-8")
