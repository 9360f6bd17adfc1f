"""Views of device memory for cupy and other libraries that know ``__cuda_array_interface__``; nothing is copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import SessionError

if TYPE_CHECKING:
    from .session import Session

VIEWS = ("x", "hidden", "logits", "cache", "mtp_cache")


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A buffer of a session; ``cupy.asarray(view)`` sees it, on a simulated GPU ``numpy.asarray(view)`` does.

    It is valid while the session lives (the view keeps it alive) and holds what the last pass left there.
    """

    owner: Session
    address: int
    shape: tuple[int, ...]
    typestr: str  # "<f4"; cache rows are bytes, "|u1"

    def _interface(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": self.typestr, "data": (self.address, False), "version": 3}

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.owner.model.device != "cuda":
            raise AttributeError("not in the memory of a GPU")
        return self._interface()

    @property
    def __array_interface__(self) -> dict[str, Any]:
        if self.owner.model.device != "sim":
            raise AttributeError("not in the memory of the host")
        return self._interface()


def device_view(session: Session, name: str) -> DeviceArray:
    """The buffer ``name`` of a session on a device.

    Args:
        name: "x" residual stream and "hidden" post-norm rows [rows, at least hidden_size] f32; "logits" [rows, at
            least vocab_size] f32; "cache" [layers, ctx, row bytes], "mtp_cache" [1, ctx, row bytes] uint8.

    Raises:
        SessionError: no such buffer, or the session runs on the CPU.
    """
    if name not in VIEWS:
        raise SessionError(f"device view: {name!r}, expected one of {', '.join(VIEWS)}")
    address, n_bytes = session.core.device_view(name)
    config = session.model.config
    if name.endswith("cache"):
        layers = 1 if name == "mtp_cache" else int(config["num_hidden_layers"])
        return DeviceArray(session, address, (layers, session.ctx, n_bytes // (layers * session.ctx)), "|u1")
    columns = -(-int(config["vocab_size"]) // 16) * 16 if name == "logits" else -(-int(config["hidden_size"]) // 4) * 4
    return DeviceArray(session, address, (n_bytes // (4 * columns), columns), "<f4")
