"""Clocks, temperature and power of a GPU, read through NVML's own library: microseconds a reading.

Function names and constants are those of NVIDIA's nvml.h.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

_SM_CLOCK, _MEMORY_CLOCK, _GPU_TEMPERATURE = 1, 2, 0


class Nvml:
    """One device.

    Args:
        library: NVML; None loads it.
        uuid: Of the device, as ``GPU-...``.

    Raises:
        OSError: NVML is not here, or does not know the device.
    """

    def __init__(self, uuid: str, library: Any = None) -> None:
        self._library = ctypes.CDLL("libnvidia-ml.so.1") if library is None else library
        self._device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._device))

    def clocks(self) -> dict[str, str]:
        """Clocks in MHz, degrees, watts, and why the clock is held back (NVML's bits)."""
        return {
            "sm_mhz": str(self._read("nvmlDeviceGetClockInfo", _SM_CLOCK)),
            "memory_mhz": str(self._read("nvmlDeviceGetClockInfo", _MEMORY_CLOCK)),
            "celsius": str(self._read("nvmlDeviceGetTemperature", _GPU_TEMPERATURE)),
            "watts": f"{self._read('nvmlDeviceGetPowerUsage') / 1e3:.1f}",
            "throttle": hex(
                self._read("nvmlDeviceGetCurrentClocksThrottleReasons", value=ctypes.c_ulonglong())
            ),
        }

    def driver(self) -> str:
        """Version of the driver."""
        text = ctypes.create_string_buffer(96)
        self._call("nvmlSystemGetDriverVersion", text, ctypes.c_uint(len(text)))
        return text.value.decode()

    def _read(self, name: str, *which: int, value: Any = None) -> int:
        value = ctypes.c_uint() if value is None else value
        self._call(name, self._device, *which, ctypes.byref(value))
        return int(value.value)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise OSError(f"{name} returned {code}")


@functools.cache
def of_current_device() -> Nvml | None:
    """The GPU that torch uses; None if there is none, or NVML does not answer."""
    if not torch.cuda.is_available():
        return None
    try:
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return Nvml(f"GPU-{uuid}")
    except (OSError, AttributeError, RuntimeError):
        return None
