"""How a server behaves towards its clients. What answers is the engine's own business."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from cache2cache.serve.keys import Keys


class ServeSettings(BaseModel):
    """Limits, keys and patience of a server."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)

    fusers: tuple[str, ...] = ()
    """Names of the fusers, as `/v1/models` shows them."""
    keys: Keys | None = Field(default=None, repr=False)
    """One of them must come with every request but those for `/health` and `/ready`; None lets everybody in."""
    max_body_bytes: int = Field(default=4 << 20, ge=1)
    max_choices: int = Field(default=16, ge=1)
    """Most answers that one request may ask for: its prompts times `n`. Never more than may wait, see `Engine`."""
    timeout: float = Field(default=600, gt=0)
    """Seconds after which a request that is not answered completely is given up."""
    notice: float = Field(default=0, ge=0)
    """Seconds between telling `/ready` that the server is about to stop, and taking no further request: what a load
    balancer needs to send them elsewhere."""
    grace: float = Field(default=30, ge=0)
    """Seconds that running requests then have to end."""
