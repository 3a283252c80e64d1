"""SmolVLM and SmolVLM2: the network of Idefics 3, in other sizes."""

from streamserve.models.vision.idefics3 import Vision

__all__ = ["Vision"]
