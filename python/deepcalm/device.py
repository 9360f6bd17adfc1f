"""Views of device memory for cupy and whoever knows ``__cuda_array_interface__`` or DLPack; nothing is copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _core

if TYPE_CHECKING:
    from .session import Session


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A buffer of a session, for ``cupy.asarray(view)`` and ``torch.from_dlpack(view)``.

    A simulated GPU has the host's memory: ``numpy.asarray(view)``, ``numpy.from_dlpack(view)``. The view
    is valid while the session lives, which it keeps alive, and holds what the last pass left there. Passes have ended
    when they return: no stream has to wait.
    """

    owner: Session
    address: int
    shape: tuple[int, ...]
    typestr: str  # "<f4", "<i4"; cache rows are bytes, "|u1"

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

    def __dlpack_device__(self) -> tuple[int, int]:
        """(kDLCUDA = 2 or, simulated, kDLCPU = 1; the first device)."""
        return (2 if self.owner.model.device == "cuda" else 1), 0

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None
    ) -> Any:
        """A capsule that keeps this view alive; a copy or another device is refused with BufferError."""
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("a view of device memory: no copy, no other device")
        return _core.dlpack(self, self.address, self.shape, self.typestr, *self.__dlpack_device__())


def device_view(session: Session, name: str) -> DeviceArray:
    """The buffer ``name`` of a session on a device.

    Args:
        name: "x" residual stream and "hidden" post-norm rows [rows, at least hidden_size] f32; "logits" [rows, at
            least vocab_size] f32; "cache" [layers, ctx, row bytes], "mtp_cache" [1, ctx, row bytes] uint8; or a tap
            ("layers.3.c_kv", "mtp.embed", "final_norm") that ``session.trace`` recorded, f32 or int32, shaped as there:
            of the last pass with taps (main and "mtp." each), and gone with the next one.

    Raises:
        SessionError: no such buffer, or the session runs on the CPU.
    """
    address, shape, typestr = session.core.device_view(name)
    return DeviceArray(session, address, shape, typestr)
