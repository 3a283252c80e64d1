"""Pictures for `serve --fake` and tests: whatever is in one, it has the same number of places. Knows no model, no encoder."""

import numpy as np

from streamserve.media.family import Prepared, key_of
from streamserve.media.picture import Picture
from streamserve.messages import Layout, Run

NUM_PLACES = 16


class FixedFamily:
    """A Family whose pictures have `num_places` each. With a `token` it stands once for each in their text, as in most models;
    without, places stand alone."""

    def __init__(self, *, num_places: int = NUM_PLACES, marker: str | None = None, token: str | None = None) -> None:
        self.marker = marker
        self.token = token
        self._layout = Layout((token or "") * num_places, (Run(num_places),))

    def prepare(self, picture: Picture) -> Prepared:
        """See Family. The encoder's input is the mean colour."""
        mean_C = picture.pixels.reshape(-1, 3).mean(axis=0, dtype=np.float32)
        return Prepared(key_of(picture, "fixed"), {"mean_C": mean_C}, self._layout, cost=1)
