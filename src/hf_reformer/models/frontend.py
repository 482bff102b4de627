"""Embeddings of signals: linear maps of the frames of a recording and of the patches of an image.

Their outputs are the `inputs_embeds` of `ReformerModel`; each module takes the place of its token embeddings.
"""

import torch
from torch import nn

from ..compat import may_look_at, values_are_known
from ..configuration_reformer import ReformerConfig
from ..layers.position_embeddings import AxialPositionEmbeddings
from ..ops.lsh import sum_dtype
from .input_checks import check_mask_values, refuse_values

GAIN_FLOOR = 1e-4  # added to the variance of the samples: silence stays silent
SPECTRUM_FLOOR = 1e-4  # added to the power spectrum; the power of a normalized waveform is about 1


class FrameEmbeddings(nn.Module):
    """Embeddings of frames of `frame_size` steps, `frame_stride` apart, of a signal (B, N, F).

    The first frame starts with the signal. The last one is zero-padded if necessary, so that no part is lost.
    """

    def __init__(self, config: ReformerConfig):
        super().__init__()
        self.size, self.stride, self.transform = config.frame_size, config.frame_stride, config.frame_transform
        self.gain_window, self.causal = config.gain_window, config.is_decoder
        width = self.size // 2 + 1 if self.transform == "spectrum" else self.size * config.num_input_features
        self.projection = nn.Linear(width, config.hidden_size)

    def forward(self, signal: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embed (B, N, F), zero at padding, with mask (B, N), ones first, as (B, frames, D)."""
        count, dtype = self.count(signal.shape[1]), self.projection.weight.dtype
        if count == 0:
            return self.projection(
                torch.zeros(len(signal), 0, self.projection.in_features, dtype=dtype).to(signal.device)
            )
        if self.gain_window:
            signal = evenly_loud(signal[..., 0], attention_mask, self.gain_window, self.causal)[..., None]
        missing = self.stride * (count - 1) + self.size - signal.shape[1]
        signal = nn.functional.pad(signal.to(dtype), (0, 0, 0, max(0, missing)))
        frames = signal.unfold(1, self.size, self.stride).transpose(-1, -2)  # (B, frames, size, F)
        if self.transform == "spectrum":
            return self.projection(log_spectrum(frames[..., 0]))
        return self.projection(frames.flatten(-2))

    def count(self, steps: int) -> int:
        """Return the number of frames of a signal of `steps` steps."""
        return count_frames(steps, self.size, self.stride)

    def mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Turn a mask of steps, (B, N), ones first, into the mask of frames that belong to the signal, (B, frames)."""
        lengths = attention_mask.long().sum(-1, keepdim=True)
        counts = (lengths - self.size + self.stride - 1).div(self.stride, rounding_mode="floor").clamp(min=0) + 1
        counts = torch.where(lengths > 0, counts, 0)
        return (torch.arange(self.count(attention_mask.shape[1]), device=counts.device) < counts).long()


def evenly_loud(x: torch.Tensor, mask: torch.Tensor | None, window: int, causal: bool) -> torch.Tensor:
    """Apply automatic gain control: subtract the mean of a window and divide by its standard deviation.

    Args:
        x: (B, N) waveforms, zero at padding.
        mask: (B, N), 1 for real samples, which come first; None if all are real.
        window: size of the window in samples, half on either side; if `causal`, it ends with the sample itself.
    """
    dtype, length = sum_dtype(x.device), x.shape[1]
    position = torch.arange(length, device=x.device)
    ends = position.new_full((len(x), 1), length) if mask is None else mask.to(x.device).long().sum(-1, keepdim=True)
    behind = torch.minimum(position + (1 if causal else window // 2 + 1), ends)
    first = (position - (window - 1 if causal else window // 2)).clamp(min=0).minimum(behind)  # excludes padding
    wide, count = x.to(dtype), (behind - first).clamp(min=1)
    sums = (nn.functional.pad(values.cumsum(-1), (1, 0)) for values in (wide, wide.square()))
    mean, power = ((total.gather(1, behind) - total.gather(1, first)) / count for total in sums)
    even = (wide - mean) / (power - mean.square() + GAIN_FLOOR).clamp(min=GAIN_FLOOR).sqrt()
    return torch.where(position < ends, even, 0).to(x.dtype)


def count_frames(steps: int, size: int, stride: int) -> int:
    """Count the frames that start within a signal and contain samples that no earlier frame does."""
    return 0 if steps == 0 else max(0, -(-(steps - size) // stride)) + 1


def log_spectrum(frames: torch.Tensor) -> torch.Tensor:
    """Compute the log10 power spectrum, (…, size // 2 + 1), of samples (…, size) in at least float32."""
    x = frames.to(torch.promote_types(frames.dtype, torch.float32))
    size = x.shape[-1]
    spectrum = torch.fft.rfft(x * torch.hann_window(size, dtype=x.dtype, device=x.device))
    power = (spectrum.real.square() + spectrum.imag.square()) / size
    return (power + SPECTRUM_FLOOR).log10().to(frames.dtype)


def checked_signal(
    config: ReformerConfig,
    input_values: torch.Tensor | None,
    input_features: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Check the inputs of an audio head and return the signal, (B, N, F), zero where masked.

    Args:
        input_values: (B, N), samples of waveforms; or
        input_features: (B, N, F), features of every step.
        attention_mask: (B, N), 1 for real steps, which come first.

    Raises:
        ValueError: invalid shapes, masks or values; the message says which and why.
    """
    if (input_values is None) == (input_features is None):
        raise ValueError("Give exactly one of `input_values` (waveforms) and `input_features`.")
    signal, name, axes = input_features, "input_features", "(batch, steps, features)"
    if input_values is not None:
        signal, name, axes = input_values, "input_values", "(batch, samples)"
    if signal.dim() != len(axes.split()):
        advice = " Average the channels of stereo recordings." if name == "input_values" else ""
        raise ValueError(f"`{name}` has shape {tuple(signal.shape)}; it must be {axes}.{advice}")
    signal = signal[..., None] if input_values is not None else signal
    if signal.shape[2] != config.num_input_features:
        raise ValueError(
            f"`{name}` has {signal.shape[2]} numbers per step, but `num_input_features={config.num_input_features}`."
        )
    if attention_mask is not None:
        if attention_mask.shape != signal.shape[:2]:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}, but `{name}` has "
                f"{tuple(signal.shape[:2])} steps. Give a 1 or 0 for each."
            )
        check_mask_values(attention_mask)
        if values_are_known() and attention_mask.shape[1]:
            refuse_values(
                attention_mask[:, 1:] <= attention_mask[:, :-1],
                "`attention_mask` has ones after zeros. Pad recordings at the end: frames are counted from the start.",
            )
        signal = signal.masked_fill(attention_mask.to(signal.device)[..., None] == 0, 0)
    check_finite(signal, name)
    return signal


def check_finite(x: torch.Tensor, name: str) -> None:
    """Raise ValueError for NaN or infinity; in eager mode only."""
    if values_are_known() and x.is_floating_point() and x.numel():
        where = ""
        if may_look_at(x) and not (right := x.isfinite()).all():
            where = f", first in row {int((~right).nonzero()[0, 0])}"
        refuse_values(x.isfinite(), f"`{name}` hold NaN or infinity{where}. Repair the data, or omit such rows.")


class PatchEmbeddings(nn.Module):
    """Embeddings of square patches of an image, `patch_size` pixels on a side, in row-major order.

    Rotary positions only encode relative positions. With `rotary_shape`, tables for rows and columns also encode
    absolute positions, as axial embeddings do.
    """

    def __init__(self, config: ReformerConfig):
        super().__init__()
        self.size, self.channels, self.grid_width = config.patch_size, config.num_channels, config.grid_width
        self.projection = nn.Linear(self.channels * self.size**2, config.hidden_size)
        self.places = None
        if config.rotary_shape is not None and len(config.rotary_shape) == 2:
            half = config.hidden_size // 2
            self.places = AxialPositionEmbeddings(config.rotary_shape, (half, config.hidden_size - half))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed (B, C, height, width) as (B, patches, D); patches that cross the edge are zero-padded."""
        height, width = (-(-side // self.size) * self.size for side in pixel_values.shape[2:])
        missing = (0, width - pixel_values.shape[3], 0, height - pixel_values.shape[2])
        x = nn.functional.pad(pixel_values.to(self.projection.weight.dtype), missing)
        x = x.unflatten(3, (-1, self.size)).unflatten(2, (-1, self.size))  # (B, C, rows, size, columns, size)
        x = self.projection(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        if self.places is None:
            return x
        positions = self.position_ids(pixel_values)
        return x + self.places(torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions)

    def position_ids(self, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """Return the positions of patches in the model's grid, (1, patches); None if they are 0, 1, 2 …"""
        rows, columns = (-(-side // self.size) for side in pixel_values.shape[2:])
        if self.grid_width in (None, columns):
            return None
        row, column = (torch.arange(count, device=pixel_values.device) for count in (rows, columns))
        return (row[:, None] * self.grid_width + column).flatten()[None]


def check_pixels(config: ReformerConfig, pixel_values: torch.Tensor | None) -> None:
    """Raise ValueError for invalid images; the message says why."""
    shape = None if pixel_values is None else tuple(pixel_values.shape)
    if shape is None or len(shape) != 4:
        raise ValueError(f"`pixel_values` has shape {shape}; it must be (batch, channels, height, width).")
    if shape[1] != config.num_channels:
        raise ValueError(
            f"`pixel_values` has {shape[1]} channels, but `num_channels={config.num_channels}`. The image processor "
            "converts grayscale and transparent images to RGB with `do_convert_rgb=True`."
        )
    rows, columns = (-(-side // config.patch_size) for side in shape[2:])
    if config.grid_width is not None and columns > config.grid_width:
        raise ValueError(
            f"Images are {columns} patches wide, but the grid of positions has {config.grid_width} columns. Make "
            "them smaller, or create the model with a wider `rotary_shape` or `axial_pos_shape`."
        )
    grid = config.rotary_shape
    if grid is not None and len(grid) == 2 and rows > grid[0]:
        raise ValueError(
            f"Images are {rows} patches high, but `rotary_shape={grid}` has {grid[0]} rows. Make them smaller, or "
            "create the model with a higher one."
        )
    check_finite(pixel_values, "pixel_values")
