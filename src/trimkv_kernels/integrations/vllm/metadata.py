"""Which rows a step of the engine runs, told once for all layers."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.mamba_attn import (
    BaseMambaAttentionMetadata,
    BaseMambaAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from trimkv_kernels.integrations.vllm.grid import Grid
from trimkv_kernels.integrations.vllm.rows import Step

logger = init_logger("vllm.trimkv")

_LOG_SECONDS = 10


class Reading(NamedTuple):
    """A row that reads a piece of its prompt: columns ``[begin, end)`` of the step's tokens."""

    row: int
    seen: int
    begin: int
    end: int


@dataclass
class BoundedMetadata(BaseMambaAttentionMetadata):
    """What the layers need to know.

    Attributes:
        step: The rows that take one token each, at the front of the tokens; None if there are none.
        readings: The rows that take more.
    """

    step: Step | None = None
    readings: tuple[Reading, ...] = ()


class BoundedMetadataBuilder(BaseMambaAttentionMetadataBuilder[BoundedMetadata]):
    """Makes the metadata of each step from what vLLM knows of its requests."""

    metadata_cls = BoundedMetadata
    needs_causal_conv1d_metadata = False
    supports_update_block_table = False

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.supports_update_block_table = False
        self._grid: Grid = layer.rows.grid
        # on a GPU the kernel looks which heads are full: nothing depends on the host
        self._device_decides = layer.rows.is_affine and device.type != "cpu"
        self._log = _EvictionLog(self._grid, layer.rows.nbytes * len(layer_names))

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Whole decode steps can be captured where no Python scores slots."""
        layers = vllm_config.compilation_config.static_forward_context.values()
        rows = [layer.rows for layer in layers if hasattr(layer, "rows")]
        can = all(x.is_affine for x in rows)
        return AttentionCGSupport.UNIFORM_BATCH if can else AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> BoundedMetadata:
        """See vLLM's method."""
        common = common_attn_metadata
        found = super().build(common_prefix_len, common, fast_build, **kwargs)
        seen = common.seq_lens_cpu_upper_bound[: common.num_reqs].tolist()
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        step, decodes = None, found.num_decodes
        if decodes:
            rows = found.state_indices_tensor_d[:, 0]
            due = [row for row, t in enumerate(seen[:decodes]) if self._grid.is_cut(t)]
            step = Step(rows, found.seq_lens[: len(rows)], None if self._device_decides else due)
        readings = []
        if found.num_prefills:
            blocks = found.state_indices_tensor_p.tolist()
            for number, row in enumerate(blocks, decodes):
                begin, end = starts[number], starts[number + 1]
                readings.append(Reading(row, seen[number] - (end - begin), begin, end))
        self._log.note(seen, starts)
        return replace(found, step=step, readings=tuple(readings))


class BoundedBackend(AttentionBackend):
    """vLLM's name for a kind of layers with a state."""

    @staticmethod
    def get_name() -> str:
        """Its name."""
        return "TRIMKV_BOUNDED"

    @staticmethod
    def get_builder_cls() -> type[BoundedMetadataBuilder]:
        """What makes its metadata."""
        return BoundedMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """It has a state of fixed size instead of pages that grow."""
        return True


class _EvictionLog:
    """A line every few seconds: rows, their tokens, and what was evicted."""

    def __init__(self, grid: Grid, row_bytes: int) -> None:
        self._grid, self._row_bytes = grid, row_bytes
        self._tokens = self._evictions = 0
        self._logged = time.monotonic()

    def note(self, seen: list[int], starts: list[int]) -> None:
        """Count a step's tokens, of rows that have then seen ``seen``."""
        for index, t in enumerate(seen):
            new = starts[index + 1] - starts[index]
            self._tokens += new
            self._evictions += self._grid.evicted(t) - self._grid.evicted(t - new)
        now = time.monotonic()
        if now - self._logged < _LOG_SECONDS:
            return
        self._logged = now
        held = [self._grid.held(t) for t in seen]
        logger.info(
            "trimkv: %d rows of %.1f MB, %d of %d slots of a head filled, longest text %d; "
            "since the start %d tokens and %d evictions of %d pairs per head",
            len(seen), self._row_bytes / 1e6, sum(held), len(seen) * self._grid.capacity,
            max(seen, default=0), self._tokens, self._evictions, self._grid.buffer,
        )  # fmt: skip
