"""MiMo: Qwen2, and behind it layers that predict a token further ahead (mtp.py), which answers do not need."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamserve.models import qwen2
from streamserve.models.mtp import mtp_weights
from streamserve.models.spec import ModelSpec, Traits


class Model(qwen2.Model):
    """Qwen2's decoder; only the names of more weights differ."""

    @staticmethod
    def traits(config: Mapping[str, Any]) -> Traits:
        return replace(qwen2.Model.traits(config), num_mtp_layers=int(config.get("num_nextn_predict_layers") or 0))

    @classmethod
    def optional_weights(cls, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        return {name: shape for i in range(spec.num_mtp_layers) for name, shape in mtp_weights(spec, i).items()}
