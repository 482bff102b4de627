"""ReformerConfig: the hyperparameters of a Reformer model, validated together when a config is created."""

import copy
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .configuration_checks import MAX_WINDOW, check_fields, check_limits

logger = logging.get_logger(__name__)

# Defaults of transformers' own Reformer that differ from ours; config.json files omit them.
_BUILTIN_DEFAULTS = {
    "axial_norm_std": 1.0,
    "axial_pos_embds": True,
    "axial_pos_embds_dim": (64, 192),
    "axial_pos_shape": (64, 64),
    "attn_layers": ("local", "lsh", "local", "lsh", "local", "lsh"),
    "eos_token_id": 2,
    "hidden_dropout_prob": 0.05,
    "initializer_range": 0.02,
    "local_attention_probs_dropout_prob": 0.05,
    "num_attention_heads": 12,
    "num_hashes": 1,
}
_SEQUENCES = ("attn_layers", "decoder_attn_layers", "num_buckets", "axial_pos_shape", "axial_pos_embds_dim",
              "rotary_shape", "series_mean", "series_std", "series_names", "predicted_series")  # fmt: skip


def from_builtin(config: dict[str, Any]) -> dict[str, Any]:
    """Translate a config dictionary of transformers' own Reformer (`model_type: reformer`); others pass unchanged."""
    if config.get("model_type") != "reformer":
        return config
    renamed = {"ReformerModelWithLMHead": "ReformerForCausalLM"}
    translated = {**_BUILTIN_DEFAULTS, **config, "model_type": "hf_reformer"}
    translated.update(attention_mode="chunk", classifier_pooling="first", tie_word_embeddings=False)  # never tied
    translated["type_vocab_size"] = 0
    translated["architectures"] = [renamed.get(name, name) for name in config.get("architectures") or []] or None
    return translated


@strict
class ReformerConfig(PreTrainedConfig):
    r"""
    Configuration of a Reformer. Names follow transformers' own Reformer; only fields that are new or have a different
    meaning are listed.

    Args:
        attn_layers (`list[str]`, *optional*):
            Kind of each layer: `"local"` (a window over the sequence), `"lsh"` (windows inside hash buckets, shared
            query and key) or `"full"` (exact attention). Default: `num_hidden_layers` (6) alternating local and lsh.
        attention_mode (`str`, defaults to `"window"`):
            `"window"`: every token attends to the union of its windows in several sort orders; each pair counts
            once. `"chunk"`: the legacy chunk rule of Trax and transformers, for old checkpoints.
        lsh_window, local_window (`int`, defaults to 128):
            Window mode: number of positions that a token attends to in a hash order or in the sequence. Causal:
            itself and the `window - 1` before it; bidirectional: itself and `window // 2` on either side. Values
            above 2^30 are reduced to 2^30.
        lsh_include_local (`bool`, defaults to `True`): Window mode: lsh layers also attend to their `local_window`.
        lsh_centering (`bool` or `float`, *optional*):
            Window mode: hash the vectors used in scores (with rotary positions, at unit length) minus their mean over
            the sample, in causal models over the tokens so far; or minus this share of it. False: vectors are hashed
            as projected, and nearly all tokens fall into a few buckets. Default: True, except in models saved by
            version 0.1.
        lsh_rotary (`float`, defaults to 1.0):
            Share of the heads of lsh layers that use rotary positions: the first ones, and at least one if above 0.
            The others compare content only, regardless of distance.
        lsh_exploration_orders (`int`, defaults to 1):
            Window mode, training only: additional orders with random buckets, so that every pair can learn to attend.
        resample_rotations (`bool`, defaults to `True`):
            Draw new hash rotations in every training forward pass; if False, use those of evaluation.
        hash_seed (`int`, *optional*):
            Seed of the rotations in evaluation (`None`: 0); in chunk mode, if set, also in training.
        num_buckets (`int` or `list[int]`, *optional*):
            Number of hash buckets (even), or a list of even factors. Default: the power of two nearest to
            `max_position_embeddings / lsh_window`, as two factors above 128; in chunk mode it depends on the input
            length.
        initializer_range (`float`, *optional*):
            Standard deviation of new weights. Default: 0.6 / sqrt(hidden_size), which is 0.053 for a width of 128.
        type_vocab_size (`int`, defaults to 0):
            Number of token types, 2 for pairs of texts: embeddings of the `token_type_ids` distinguish the texts. The
            embedding of type 0 is always zero; the others are initialized to zero. 0: `token_type_ids` are ignored,
            as in causal language models.
        position_embedding_type (`str`, *optional*):
            `"rotary"` (default), `"axial"` (default in chunk mode, whose old checkpoints have no rotary positions, for
            odd head sizes, and if `axial_pos_shape` or `axial_pos_embds_dim` is given) or `"learned"`. The older
            flag `axial_pos_embds` means `"axial"` if true and `"learned"` if false.
        axial_pos_shape, axial_pos_embds_dim (`list[int]`, *optional*):
            Sizes and widths of any number of axes. Default: two powers of two that cover `max_position_embeddings`,
            the first with a quarter of the hidden size.
        axial_norm_std (`float`, defaults to 0.02):
            Standard deviation of new axial tables. With 1.0, the built-in default, new models learn far more slowly.
        rope_theta (`float`, defaults to 10000.0): Base of the rotary frequencies.
        rotary_shape (`list[int]`, *optional*):
            Positions traverse a grid of this shape in row-major order, such as (28, 28) for the pixels of an image,
            and rotary positions rotate an equal share of each head along every axis. The first axis is unbounded.
        classifier_pooling (`str`, *optional*):
            Pooling for sequence classification: `"mean"` over the real tokens (default when bidirectional), the
            `"last"` real token (default when causal) or the `"first"` one (converted checkpoints).
        reversible (`bool`, defaults to `True`):
            Recompute activations from layer outputs in the backward pass, so that memory does not grow with depth.
        residual_precision (`str`, defaults to `"float64"`):
            Precision of the residual streams: `"float64"` on a grid of 2^-32 (range 2^21), or `"float32"` on a grid of
            2^-16 (exact while |stream| <= 256; less memory, for very long sequences and devices without float64).
        hidden_dropout_prob (`float`, defaults to 0.0):
            Dropout on embeddings, on branch outputs, inside feed-forward layers and on the last hidden states. Use it
            if texts are seen several times; it slows learning on texts that are seen once.
        attention_backend (`str`, defaults to `"auto"`):
            `"auto"` uses the compiled kernel of a CPU or CUDA device if it is available, else pure PyTorch; `"cpu"`,
            `"torch"`, `"triton"` and `"reference"` raise an error if they cannot run. The environment variable
            `HF_REFORMER_BACKEND` overrides this field.
        tie_word_embeddings (`bool`, defaults to `False`):
            Share the embedding weights with the language-model head, after a projection that merges the streams.
        chunk_size_feed_forward, chunk_size_lm_head (`int`, defaults to 0):
            Number of tokens processed at a time in the token-wise parts of a layer and in the language-model loss; it
            need not divide the sequence length. 0: automatic. Otherwise, the feed-forward is recomputed in the
            backward pass even with `reversible=False`.
        coverage_loss_weight (`float`, defaults to 0.0):
            Weight of the coverage loss in a head's loss: a KL penalty that is low if every token receives attention.
            Outputs contain it unweighted as `coverage_loss` (layers).
        is_decoder (`bool`, defaults to `False`): Causal attention. `ReformerForCausalLM` always sets it.
        is_encoder_decoder (`bool`, defaults to `False`):
            Use a bidirectional encoder and a causal decoder, as `ReformerForConditionalGeneration` does. Other classes
            use only the encoder.
        decoder_attn_layers (`list[str]`, *optional*): Kind of each decoder layer. Defaults to `attn_layers`.
        tie_encoder_decoder (`bool`, defaults to `False`):
            Share all weights of encoder and decoder except cross-attention and the final norms. Token embeddings are
            always shared.
        decoder_start_token_id (`int`, *optional*): Defaults to `pad_token_id`, or else `bos_token_id`.
        frame_size, frame_stride (`int`, defaults to 320 and 160):
            Speech and audio: length of a frame and distance between frames, in samples (or steps of
            `input_features`); 20 and 10 ms at 16 kHz. Each frame is a token.
        frame_transform (`str`, defaults to `"linear"`):
            Input of the linear map that embeds a frame: its samples (`"linear"`) or its log power spectrum with a
            Hann window (`"spectrum"`).
        gain_window (`int`, defaults to 0):
            Automatic gain control: subtract from every sample of a waveform the mean of a window of this many samples,
            and divide by its standard deviation. The window is centered on the sample; in causal models it ends
            there. 0: off.
        num_input_features (`int`, defaults to 1): Size of each step of `input_features`; 1 for waveforms.
        ctc_loss_reduction (`str`, defaults to `"mean"`), ctc_zero_infinity (`bool`, defaults to `False`):
            As in `torch.nn.CTCLoss`. The blank is `pad_token_id`.
        num_channels (`int`, defaults to 3), patch_size (`int`, defaults to 1):
            Images: number of channels, and side length of the square patches that are tokens; 1 for pixels.
        prediction_length, context_length (`int`, defaults to 24 and 96):
            Time series: number of steps to predict, and number of past steps used: the last ones of a longer past, or
            all of a shorter one.
        patch_length (`int`, defaults to 8): Number of time steps in one token.
        input_size (`int`, defaults to 1):
            Number of series. If 1, any number of series can be predicted, each independently; otherwise, each series
            also has its own embedding.
        mix_series (`bool`, defaults to `False`): Tokens are patches of all `input_size` series, not of one.
        num_time_features (`int`, defaults to 0):
            Number of features that are known for every step, past and future, such as the hour.
        scaling (`str`, *optional*, defaults to `"std"`):
            How each series' window is shifted and scaled: by its mean and standard deviation (`"std"`), by its last
            value and standard deviation (`"last"`), only scaled, by its mean absolute value (`"mean"`), or neither
            (`None`).
        series_mean, series_std (`list[float]`, *optional*):
            Statistics of every series in the training data. The model standardizes its inputs with them and computes
            its loss on standardized values; predictions are in the units of the data.
        series_names, predicted_series (`list[str]`, *optional*):
            Names of the series, in the model's order, and those that the model was trained to predict; the others are
            only known in the past. The recipe uses the names to find the columns of a table.
        relative_positions (`bool`, defaults to `False`):
            Series whose names share a prefix and end in x and y are positions relative to the last position of the
            first such pair, rotated into its direction of travel. The caller transforms inputs, and forecasts back.
        loss (`str`, defaults to `"nll"`):
            Negative log-likelihood under `distribution_output` (`"nll"`), or the error of a point forecast (`"mse"`,
            `"mae"`).
        distribution_output (`str`, defaults to `"student_t"`):
            `"student_t"`, `"normal"` or `"negative_binomial"` (for counts).
        linear_skip (`bool`, defaults to `False`):
            Add a linear map of the context, initialized to zero, to the forecasts: one map shared by all series, or
            with `mix_series` one from all series to all.
        individual_skip (`bool`, defaults to `False`): Use a separate linear map for each series (`linear_skip`).
        num_parallel_samples (`int`, defaults to 100): Number of samples that `generate` draws for every time series.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type, or fields contradict each other.

    ```python
    >>> from hf_reformer import ReformerConfig, ReformerModel
    >>> model = ReformerModel(ReformerConfig(max_position_embeddings=16384))
    ```
    """

    model_type = "hf_reformer"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "coverage_loss"]

    vocab_size: int = 320
    type_vocab_size: int = 0
    hidden_size: int = 256
    num_hidden_layers: int | None = None
    attn_layers: list[str] | tuple[str, ...] | None = None
    num_attention_heads: int = 4
    attention_head_size: int = 64
    feed_forward_size: int = 512
    hidden_act: str = "relu"
    max_position_embeddings: int = 4096

    attention_mode: str = "window"
    lsh_window: int = 128
    local_window: int = 128
    lsh_include_local: bool = True
    lsh_centering: bool | float | int | None = None
    lsh_rotary: float | int = 1.0
    lsh_exploration_orders: int = 1
    resample_rotations: bool = True
    num_hashes: int = 2
    num_buckets: int | list[int] | tuple[int, ...] | None = None
    hash_seed: int | None = None

    lsh_attn_chunk_length: int | None = 64
    lsh_num_chunks_before: int | None = 1
    lsh_num_chunks_after: int | None = 0
    local_attn_chunk_length: int | None = 64
    local_num_chunks_before: int | None = 1
    local_num_chunks_after: int | None = 0

    position_embedding_type: str | None = None
    axial_pos_embds: bool | None = None
    axial_pos_shape: list[int] | tuple[int, ...] | None = None
    axial_pos_embds_dim: list[int] | tuple[int, ...] | None = None
    axial_norm_std: float | int = 0.02
    rope_theta: float | int = 10000.0
    rotary_shape: list[int] | tuple[int, ...] | None = None

    hidden_dropout_prob: float | int = 0.0
    lsh_attention_probs_dropout_prob: float | int | None = 0.0
    local_attention_probs_dropout_prob: float | int | None = 0.0
    classifier_dropout: float | int | None = None
    classifier_pooling: str | None = None

    reversible: bool = True
    residual_precision: str = "float64"
    attention_backend: str = "auto"
    chunk_size_lm_head: int = 0
    coverage_loss_weight: float | int = 0.0

    initializer_range: float | int | None = None
    layer_norm_eps: float | int = 1e-12
    is_decoder: bool = False
    decoder_attn_layers: list[str] | tuple[str, ...] | None = None
    tie_encoder_decoder: bool = False
    decoder_start_token_id: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1

    frame_size: int = 320
    frame_stride: int = 160
    frame_transform: str = "linear"
    gain_window: int = 0
    num_input_features: int = 1
    ctc_loss_reduction: str = "mean"
    ctc_zero_infinity: bool = False

    num_channels: int = 3
    patch_size: int = 1

    prediction_length: int = 24
    context_length: int = 96
    patch_length: int = 8
    input_size: int = 1
    mix_series: bool = False
    num_time_features: int = 0
    scaling: str | None = "std"
    series_mean: list[float | int] | tuple[float | int, ...] | None = None
    series_std: list[float | int] | tuple[float | int, ...] | None = None
    series_names: list[str] | tuple[str, ...] | None = None
    predicted_series: list[str] | tuple[str, ...] | None = None
    relative_positions: bool = False
    loss: str = "nll"
    distribution_output: str = "student_t"
    linear_skip: bool = False
    individual_skip: bool = False
    num_parallel_samples: int = 100

    def __post_init__(self, **kwargs: Any) -> None:
        try:
            check_limits(self, **kwargs)
        except ValueError as error:
            raise StrictDataclassClassValidationError("limits", error) from error
        self.lsh_window, self.local_window = (min(x, MAX_WINDOW) for x in (self.lsh_window, self.local_window))
        for name in _SEQUENCES:
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        if self.attn_layers is None:
            count = 6 if self.num_hidden_layers is None else self.num_hidden_layers
            self.attn_layers = tuple(("local", "lsh")[i % 2] for i in range(count))
        if self.num_hidden_layers is None:
            self.num_hidden_layers = len(self.attn_layers)
        if self.initializer_range is None:
            self.initializer_range = round(0.6 / math.sqrt(max(1, self.hidden_size)), 4)
        self._resolve_positions()
        self._resolve_decoder()
        if self.lsh_centering is None:  # saved configs without this field are of version 0.1
            self.lsh_centering = self.transformers_version is None
        if self.num_buckets is None and self.attention_mode == "window":
            self.num_buckets = default_num_buckets(self.max_position_embeddings, self.lsh_window)
        super().__post_init__(**kwargs)

    def validate_fields(self) -> None:
        """Check the fields. Called by `validate`, which the `strict` decorator adds and calls."""
        check_fields(self)

    def _resolve_positions(self) -> None:
        """Fill in position fields that were not given; `validate_fields` checks the result."""
        if self.position_embedding_type is None:
            named = self.axial_pos_shape is not None or self.axial_pos_embds_dim is not None
            cannot_rotate = self.attention_mode == "chunk" or self.attention_head_size % 2 == 1
            default = "axial" if named or cannot_rotate else "rotary"
            flag = self.axial_pos_embds
            self.position_embedding_type = default if flag is None else "axial" if flag else "learned"
        if self.axial_pos_embds is None:
            self.axial_pos_embds = self.position_embedding_type == "axial"
        if self.axial_pos_shape is None:
            bits = max(2, math.ceil(math.log2(max(1, self.max_position_embeddings))))
            self.axial_pos_shape = (2 ** (bits // 2), 2 ** (bits - bits // 2))
        if self.axial_pos_embds_dim is None:
            dims: list[int] = []
            for axis in range(len(self.axial_pos_shape), 1, -1):
                dims.append(max(1, (self.hidden_size - sum(dims)) // (2 * axis)))
            self.axial_pos_embds_dim = (*dims, self.hidden_size - sum(dims))

    def _resolve_decoder(self) -> None:
        if self.is_encoder_decoder and self.decoder_attn_layers is None:
            self.decoder_attn_layers = self.attn_layers
        if self.is_encoder_decoder and self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.bos_token_id if self.pad_token_id is None else self.pad_token_id

    def to_encoder_decoder(self) -> "ReformerConfig":
        """Return this config if it is an encoder-decoder's, otherwise a copy with `is_encoder_decoder` set."""
        if self.is_encoder_decoder:
            return self
        config = copy.deepcopy(self)
        config.is_encoder_decoder = True
        config._resolve_decoder()
        config.validate()
        return config

    def decoder_config(self) -> "ReformerConfig":
        """Return the config of the decoder: a causal model whose `attn_layers` are `decoder_attn_layers`."""
        config = copy.deepcopy(self)
        config.attn_layers, config.num_hidden_layers = self.decoder_attn_layers, len(self.decoder_attn_layers)
        config.is_decoder, config.is_encoder_decoder = True, False
        config.lsh_num_chunks_after = config.local_num_chunks_after = config.type_vocab_size = 0
        config.validate()
        return config

    as_encoder_decoder, of_decoder = to_encoder_decoder, decoder_config  # their names in version 0.1

    @property
    def pooling(self) -> str:
        """The pooling of sequence classification: `classifier_pooling`, or its default."""
        return self.classifier_pooling or ("last" if self.is_decoder else "mean")

    @property
    def covered_positions(self) -> float:
        """Number of positions that the position embeddings cover; infinite for rotary ones."""
        if self.position_embedding_type == "rotary":
            return math.inf
        axial = self.position_embedding_type == "axial"
        return math.prod(self.axial_pos_shape) if axial else self.max_position_embeddings

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Number of samples of a recording per logit of `ReformerForCTC`; transformers uses this name."""
        return self.frame_stride

    @property
    def grid_width(self) -> int | None:
        """Number of columns of the position grid, from `rotary_shape` or axial positions; None without a grid."""
        shape = {"rotary": self.rotary_shape, "axial": self.axial_pos_shape}.get(self.position_embedding_type)
        return None if shape is None or len(shape) < 2 else shape[-1]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, unused = super().get_config_dict(*args, **kwargs)
        return from_builtin(config), unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a config. Overrides in `kwargs` are validated too, and saved fields derived from them are replaced."""
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in ReformerConfig.__annotations__}
        derived = {"attn_layers": "num_hidden_layers", "num_hidden_layers": "attn_layers"}
        derived |= {"position_embedding_type": "axial_pos_embds", "axial_pos_embds": "position_embedding_type"}
        outdated = {derived[name] for name in overrides if name in derived}
        saved = {name: value for name, value in from_builtin(config_dict).items() if name not in outdated}
        made = super().from_dict({**saved, **overrides}, **kwargs)
        if {"max_position_embeddings", "lsh_window"} & overrides.keys() and "num_buckets" in saved.keys() - overrides:
            _tell_kept_num_buckets(made[0] if isinstance(made, tuple) else made)
        return made


def default_num_buckets(max_positions: int, window: int) -> int | tuple[int, int]:
    """Return the power of two nearest to `max_positions / window`, from 2 to 2^20.

    Above 128, it is returned as two factors (paper, section 2).
    """
    bits = max(1, min(20, round(math.log2(max(2, max_positions / max(1, window))))))
    return 2**bits if bits <= 7 else (2 ** (bits // 2), 2 ** (bits - bits // 2))


def _tell_kept_num_buckets(config: ReformerConfig) -> None:
    fresh = default_num_buckets(config.max_position_embeddings, config.lsh_window)
    if config.attention_mode == "window" and "lsh" in config.attn_layers and config.num_buckets != fresh:
        logger.warning_once(
            f"`num_buckets={config.num_buckets}` stays as saved. A new config of `max_position_embeddings="
            f"{config.max_position_embeddings}` and `lsh_window={config.lsh_window}` would have {fresh}: also give "
            "`num_buckets` to change it."
        )


def padded_length(config: ReformerConfig, length: int) -> int:
    """Return the length that inputs are padded to: in chunk mode, if longer than a chunk, a multiple of all chunks."""
    kinds = {kind for kind in config.attn_layers if kind != "full"}
    chunks = [getattr(config, f"{kind}_attn_chunk_length") for kind in kinds]
    if config.attention_mode == "window" or not chunks or length <= min(chunks):
        return length
    multiple = math.lcm(*chunks)
    return -(-length // multiple) * multiple
