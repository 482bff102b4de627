"""hf_reformer in the Time-Series-Library (github.com/thuml/Time-Series-Library), on its data and by its protocol.

Copy this file over the library's `models/Reformer.py`. All its scripts that say `--model Reformer` then run this one:

    python run.py --task_name long_term_forecast --is_training 1 --model Reformer --model_id ECL_96_96 --data custom \\
        --root_path ./dataset/electricity/ --data_path electricity.csv --features M --seq_len 96 --pred_len 96 \\
        --enc_in 321 --dec_in 321 --c_out 321 --e_layers 2 --d_model 128 --d_ff 256 --n_heads 4 --des Exp

Every series is forecast by itself from its last `seq_len` steps, which each window scales by its mean and deviation
(`--use_norm 0`: not). A token holds as many steps as divide both `seq_len` and `--patch_len`. Long-term forecasts use
the calendar features of `--embed timeF`.
"""

import math
from typing import Any

import torch
from torch import nn

from hf_reformer import ReformerConfig, ReformerForTimeSeriesPrediction

TASKS = ("long_term_forecast", "short_term_forecast")
CALENDAR = {"s": 6, "t": 5, "h": 4, "b": 3, "d": 3, "w": 2, "m": 1, "a": 1}  # features of --embed timeF, by --freq


class Model(nn.Module):
    """What the library expects of a model: made of its arguments, `configs`, and called with windows.

    Raises:
        ValueError: `configs.task_name` is no forecast.
    """

    def __init__(self, configs: Any):
        super().__init__()
        if configs.task_name not in TASKS:
            raise ValueError(f"This model forecasts: --task_name {' or '.join(TASKS)}, not {configs.task_name}.")
        with_calendar = configs.task_name == "long_term_forecast" and configs.embed == "timeF"
        config = ReformerConfig(
            input_size=configs.enc_in,
            context_length=configs.seq_len,
            prediction_length=configs.pred_len,
            patch_length=math.gcd(configs.seq_len, getattr(configs, "patch_len", 16)),
            num_time_features=CALENDAR.get(configs.freq, 0) if with_calendar else 0,
            scaling="std" if getattr(configs, "use_norm", 1) else None,
            linear_skip=True,
            loss="mse",
            hidden_size=configs.d_model,
            num_attention_heads=configs.n_heads,
            attention_head_size=configs.d_model // configs.n_heads,
            feed_forward_size=configs.d_ff,
            attn_layers=[("local", "lsh")[number % 2] for number in range(configs.e_layers)],
            hidden_act=configs.activation,
            hidden_dropout_prob=configs.dropout,
        )
        self.model = ReformerForTimeSeriesPrediction(config)

    def forward(
        self,
        x_enc: torch.Tensor,
        x_mark_enc: torch.Tensor | None,
        x_dec: torch.Tensor,
        x_mark_dec: torch.Tensor | None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, seq_len, series) → (batch, pred_len, series); `x_mark_…` are calendar features of the steps."""
        calendar = {}
        if self.model.config.num_time_features:
            future = x_mark_dec[:, -self.model.config.prediction_length :]
            calendar = {"past_time_features": x_mark_enc, "future_time_features": future}
        return self.model(past_values=x_enc, **calendar).prediction_outputs
