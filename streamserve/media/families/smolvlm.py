"""SmolVLM and SmolVLM2: pictures are prepared as for Idefics 3."""

from streamserve.media.families.idefics3 import Family

__all__ = ["Family"]
