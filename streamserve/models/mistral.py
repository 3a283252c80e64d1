"""Mistral: Llama with, in its first version, attention within a sliding window."""

from collections.abc import Mapping
from typing import Any

from streamserve.models.decoder import Decoder
from streamserve.models.spec import Traits


class Model(Decoder):
    """No biases; the window comes from config.json, which means 4,096 when it is silent."""

    @staticmethod
    def traits(config: Mapping[str, Any]) -> Traits:
        return Traits(sliding_window=config.get("sliding_window", 4096))
