"""Names of weights in folders of the LLaVA layout: a tower, a projector and a language model side by side.

Owns the two ways in which they are written: with "model." before every part and the head outside, as transformers 5 has them in
memory, and as nearly all folders have them, a language model with its head below "language_model.".
"""

PARTS = ("vision_tower.", "multi_modal_projector.", "image_newline")


def text_name(name: str) -> str | None:
    """What the language model by itself calls it; None: it is not the language model's."""
    if name.startswith("language_model."):
        own = name.removeprefix("language_model.")
        return own if own.startswith(("model.", "lm_head.")) else f"model.{own}"
    if name.startswith("model.language_model."):
        return f"model.{name.removeprefix('model.language_model.')}"
    return name if name.startswith("lm_head.") else None


def encoder_name(name: str) -> str | None:
    """Its canonical name: that in memory, without "model."; None: it is the language model's, or no weight."""
    own = name.removeprefix("model.")
    if not own.startswith(PARTS) or own.endswith(".position_ids"):
        return None
    return own.replace("vision_tower.vision_model.", "vision_tower.", 1)
