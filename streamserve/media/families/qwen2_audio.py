"""Qwen2-Audio's sounds (arXiv 2407.10759): a log-mel spectrogram as Whisper computes it, of at most 30 seconds.

Owns that arithmetic and how many places a sound has. The encoder is models/vision/qwen2_audio.py.

Whisper fills every sound up to its window with silence. What the encoder makes of the silence nobody reads, so that frames of it
are neither computed nor kept, but for the few that the last of the sound's own are mixed with.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamserve.errors import CheckpointError, InvalidRequest
from streamserve.media.families._images import read_processor, read_settings
from streamserve.media.family import Prepared, encoder_cost, key_of
from streamserve.media.sound import Sound
from streamserve.messages import AUDIO, Layout, Run

BEGIN, TOKEN, END = "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"
# What preprocessor_config.json, and audio_config and text_config, mean where they are silent.
SETTINGS = {"feature_size": 80, "sampling_rate": 16_000, "hop_length": 160, "chunk_length": 30, "n_fft": 400}
AUDIO_DEFAULTS = {
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
    "max_source_positions": 1500,
}
TEXT_DEFAULTS = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 22016}
FLOOR, RANGE = 1e-10, 8.0  # of power, before its logarithm; powers of ten below the loudest that are told apart


class Family:
    """Implements media.family.SoundFamily."""

    marker: str | None = BEGIN + TOKEN + END
    token: str | None = TOKEN

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        said = read_settings(folder) or read_processor(folder).get("feature_extractor") or {}
        settings = {**SETTINGS, **said}
        audio = {**AUDIO_DEFAULTS, **(config.get("audio_config") or {})}
        text = {**TEXT_DEFAULTS, **(config.get("text_config") or {})}
        if not said:  # a folder without the file can only mean what its encoder takes
            settings["feature_size"] = audio["num_mel_bins"]
        for key in SETTINGS:
            if not isinstance(settings[key], int) or settings[key] <= 0:
                raise CheckpointError(
                    f"{folder}: preprocessor_config.json: {key} is {settings[key]!r}; a positive number is needed"
                )
        self.rate: int = settings["sampling_rate"]
        self.max_seconds: float = settings["chunk_length"]
        self._hop, self._width = settings["hop_length"], settings["n_fft"]
        self._max_frames = settings["chunk_length"] * self.rate // self._hop
        for key, value, allowed in (
            ("feature_size", settings["feature_size"], audio["num_mel_bins"]),
            ("chunk_length * sampling_rate / hop_length", self._max_frames, 2 * audio["max_source_positions"]),
            ("dither", settings.get("dither", 0.0), 0.0),
            ("do_normalize", bool(settings.get("do_normalize")), False),
        ):
            if value != allowed:
                raise CheckpointError(f"{folder}: preprocessor_config.json has {key} {value!r}; supported is {allowed!r}")
        # Where mel filters end, transformers holds to 8 kHz, whatever the rate.
        self._filters_BM = mel_filters(self._width // 2 + 1, settings["feature_size"], self.rate, 8_000.0)
        self._window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self._width) / self._width)).astype(np.float64)
        self._settings = f"{config.get('model_type')} {json.dumps({key: settings[key] for key in SETTINGS})}"
        encoder = {"num_hidden_layers": "encoder_layers", "hidden_size": "d_model", "intermediate_size": "encoder_ffn_dim"}
        self._audio_size = {key: int(audio[name]) for key, name in encoder.items()}
        self._text_size = {key: int(text[key]) for key in TEXT_DEFAULTS}

    def prepare_sound(self, sound: Sound) -> Prepared:
        """See SoundFamily. The encoder's second convolution halves the frames, and pairs of what it gives become a place."""
        assert sound.rate == self.rate and len(sound.samples) <= self._max_frames * self._hop
        num_steps = (-(-len(sound.samples) // self._hop) - 1) // 2 + 1
        num_places = num_steps // 2
        if num_places == 0:
            least = 2 * self._hop + 1
            raise InvalidRequest(
                f"a sound has {len(sound.samples) / self.rate:.3f} s; this model hears none under {least / self.rate:.3f} s"
            )
        mel_FM = self.log_mel(sound.samples, min(2 * num_steps + 1, self._max_frames))
        return Prepared(
            key=key_of(sound, self._settings),
            inputs={"mel_FM": mel_FM},
            layout=Layout(BEGIN + TOKEN * num_places + END, (Run(num_places),)),
            cost=encoder_cost(num_steps, self._audio_size, self._text_size),
            kind=AUDIO,
        )

    def log_mel(self, samples: NDArray[np.float32], num_frames: int) -> NDArray[np.float32]:
        """The first frames of the spectrogram of the sound, filled up with silence: [F, M]."""
        half = self._width // 2
        filled = np.zeros(min(self._max_frames * self._hop, len(samples) + self._width + 2 * self._hop))
        filled[: len(samples)] = samples
        around = np.pad(filled, half, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(around, self._width)[:: self._hop][:num_frames]
        power_FB = np.abs(np.fft.rfft(windows * self._window)) ** 2
        logs_FM = np.log10(np.maximum(power_FB @ self._filters_BM, FLOOR))
        levels: NDArray[np.float32] = ((np.maximum(logs_FM, logs_FM.max() - RANGE) + 4) / 4).astype(np.float32)
        return levels


def mel_filters(num_bins: int, num_filters: int, rate: int, highest: float) -> NDArray[np.float64]:
    """Triangles over the frequencies of a Fourier transform, evenly spaced on Slaney's scale, each of area 1: [B, M]."""
    corners = _hertz(np.linspace(0.0, _mel(highest), num_filters + 2))
    bins = np.linspace(0, rate / 2, num_bins)[:, None]
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    triangles: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling)) * 2 / (corners[2:] - corners[:-2])
    return triangles


LINEAR_HZ, LINEAR_MEL = 1_000.0, 15.0  # up to there Slaney's scale is linear
STEP = np.log(6.4) / 27  # beyond, a mel is this much in the logarithm of a frequency


def _mel(hertz: float) -> float:
    return LINEAR_MEL + float(np.log(hertz / LINEAR_HZ) / STEP) if hertz > LINEAR_HZ else hertz * LINEAR_MEL / LINEAR_HZ


def _hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.where(
        mel > LINEAR_MEL, LINEAR_HZ * np.exp(STEP * (mel - LINEAR_MEL)), mel * LINEAR_HZ / LINEAR_MEL
    )
    return found
