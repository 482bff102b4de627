"""transformers' own OpenAI-compatible server (`transformers serve`) for one of our models, with persistent caches."""

from typing import Any, NamedTuple

import torch
import uvicorn
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState

from hf_reformer.cache.cache import CACHE_NAME

from .text_generation import cache_for, common_length, load, room_for_new_tokens, special_ids


class OneModel(ModelManager):
    """A model manager with a single model, loaded as by `hf-reformer generate`.

    transformers would look up the class by name among its own, where ours is missing or another has the same name.
    """

    def __init__(self, name: str, device: str, dtype: str, trust_remote_code: bool):
        self.options = device, dtype, trust_remote_code
        self.tokenizer: Any = None
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "hf-reformer"}]
        self.get_gen_models: Any = lambda: listed  # what `/v1/models` lists
        super().__init__(force_model=name, trust_remote_code=trust_remote_code)

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
        model, tokenizer = load(self.force_model, *self.options)
        for field, value in special_ids(model, tokenizer).items():
            setattr(model.generation_config, field, value)
        self.model, self.tokenizer = model, tokenizer
        return tokenizer

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        return self.model


class Turn(NamedTuple):
    """A cache and the ids of its tokens."""

    cache: Any
    ids: list[int]


class Remembering:
    """A model whose `generate` continues the cache of an earlier call that began with the same tokens.

    Args:
        turns: caches of earlier calls, newest last; at most `most` are kept. A call removes the cache that it
            continues and puts it back when it is complete.
    """

    def __init__(self, model: Any, turns: list[Turn], most: int):
        self.model, self.turns, self.most = model, turns, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, input_ids: torch.Tensor, generation_config: Any, **options: Any) -> torch.Tensor:
        """Generate an answer to the ids of a prompt, (1, T), and return the ids of both.

        Raises:
            HTTPException: the prompt leaves no room for an answer.
        """
        try:
            room = room_for_new_tokens(self.model, input_ids.shape[1])
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        if room is not None:
            generation_config.max_new_tokens = min(room, generation_config.max_new_tokens or room)
        beams, uncached = generation_config.num_beams or 1, generation_config.use_cache is False
        if beams > 1 or uncached or input_ids.shape[0] > 1 or not self.most:
            return self.model.generate(input_ids, generation_config=generation_config, **options)
        cache = self._take(input_ids[0].tolist())
        options |= {CACHE_NAME: cache, "return_dict_in_generate": True}
        out = self.model.generate(input_ids, generation_config=generation_config, **options)
        cache = getattr(out, CACHE_NAME)
        if cache is not None:
            self.turns.append(Turn(cache, out.sequences[0, : cache.get_seq_length()].tolist()))
            del self.turns[: -self.most]
        return out.sequences

    def _take(self, ids: list[int]) -> Any:
        """Take the cache sharing most tokens with `ids` and crop it to them; None if that is under half of its own."""
        shared = [common_length(ids, turn.ids) for turn in self.turns]
        best = max(range(len(shared)), key=shared.__getitem__, default=None)
        if best is None or 2 * shared[best] < len(self.turns[best].ids):
            return None
        return cache_for(*self.turns.pop(best), ids)


class RememberingManager(GenerateManager):
    """A generation manager with caches; like transformers', it runs one request at a time, in a separate thread."""

    def __init__(self, most: int):
        super().__init__()
        self.turns: list[Turn] = []
        self.most = most

    def _remembering(self, model: Any) -> Any:
        return Remembering(model, self.turns, self.most)

    def generate_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return super().generate_streaming(self._remembering(model), *args, **kwargs)

    async def generate_non_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return await super().generate_non_streaming(self._remembering(model), *args, **kwargs)


class Checked:
    """Mixin for transformers' handlers that rejects requests which they would answer wrongly or fail on."""

    model_manager: Any
    needs_template = True

    async def handle_request(self, body: dict, request_id: str) -> Any:
        logprobs = body.get("logprobs")  # 0 requests those of the generated tokens
        if body.get("n") not in (None, 1) or not (logprobs is None or logprobs is False):
            raise HTTPException(400, "A request gets one answer, without log-probabilities. Leave out n and logprobs.")
        if self.needs_template and self.model_manager.tokenizer.chat_template is None:
            raise HTTPException(
                400,
                "The model's tokenizer has no chat template. Send texts to /v1/completions, or save a template.",
            )
        return await super().handle_request(body, request_id)  # type: ignore[misc]


class Chat(Checked, ChatCompletionHandler):
    pass


class Responses(Checked, ResponseHandler):
    pass


class Completions(Checked, CompletionHandler):
    needs_template = False


async def _tell(request: Request, error: Any) -> JSONResponse:
    """Return an error in the format that OpenAI clients expect."""
    body = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": body}, status_code=error.status_code)


def make_server(
    name: str, host: str, port: int, *, device: str, dtype: str, trust_remote_code: bool, conversations: int,
    enable_cors: bool = False, log_level: str = "info",
) -> uvicorn.Server:  # fmt: skip
    """Make a server for one model, ready to run.

    Args:
        conversations: number of caches to keep between requests, each as large as its conversation; 0: none.

    Raises:
        OSError, ValueError: the model cannot be loaded or is not a causal language model, or a number is invalid.
    """
    if conversations < 0:
        raise ValueError(f"--conversations {conversations}: it must be at least 0.")
    manager, state = OneModel(name, device, dtype, trust_remote_code), GenerationState()
    generate = RememberingManager(conversations)
    state.get_manager = lambda model_id, use_cb=False: generate  # type: ignore[method-assign]
    shared: Any = {"model_manager": manager, "generation_state": state}
    app = build_server(
        manager, Chat(**shared), Completions(**shared), Responses(**shared),
        TranscriptionHandler(manager, state), SystemOneHandler(**shared, decision_config=None), state, enable_cors,
    )  # fmt: skip
    app.add_exception_handler(HTTPException, _tell)
    return uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level=log_level))
