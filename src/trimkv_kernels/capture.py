"""Decode steps, one after the other; on a GPU as a CUDA graph, which is recorded and replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trimkv_kernels.cache import BoundedKVCache
from trimkv_kernels.integrations.hf_cache import BoundedCache
from trimkv_kernels.kernels.launch import device_guard

logger = logging.getLogger("trimkv_kernels")

WARM_UP = 3  # steps before the capture: libraries make their workspaces, kernels are compiled
_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
}
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}

Step = Callable[[], None]
_KNOWN = ("torch.nn.", "transformers.", "trimkv_kernels.")  # no choice of theirs changes


@dataclass(frozen=True)
class RecordedStep:
    """A graph that the next text on the same cache can run without recording it again.

    Attributes:
        made_for: Everything that the graph took from its surroundings when it was recorded.
        tensors: What the step works on beside the model and the cache.
        replay: Runs the graph.
    """

    made_for: tuple[object, ...]
    tensors: Any
    replay: Step


class Recordings:
    """The latest recorded step of each cache, dropped with its cache."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[BoundedKVCache, RecordedStep] = WeakKeyDictionary()

    def take(self, slots: BoundedKVCache, made_for: tuple[object, ...]) -> RecordedStep | None:
        """The recorded step of a cache, if it fits. Until it is put back, the cache has none."""
        recorded = self._of.pop(slots, None)
        return recorded if recorded is not None and recorded.made_for == made_for else None

    def put(self, slots: BoundedKVCache, recorded: RecordedStep) -> None:
        """Keep a step for the next text."""
        self._of[slots] = recorded


def surroundings(modules: Iterable[nn.Module], slots: BoundedKVCache) -> tuple[object, ...] | None:
    """What a graph of a model's step takes from outside: addresses of tensors, and autocast.

    Returns:
        None if there will be no graph, or if a later one could differ all the same: a module or
        hook of another library may choose in Python what it computes. PEFT's layers choose the
        adapter there.
    """
    if not can_capture(slots):
        return None
    tensors = slots.tensors()
    for module in modules:
        for part in module.modules():
            hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
            if not all(_is_known(x) for x in (type(part), *hooks)):
                return None
        tensors += [*module.parameters(), *module.buffers()]
    kind = slots.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return (autocast, *((x.data_ptr(), x.shape, x.dtype) for x in tensors))


def _is_known(code: Any) -> bool:
    return str(getattr(code, "__module__", None)).startswith(_KNOWN)


class Steps:
    """Runs a decode step again and again: captured on a GPU, elsewhere as it is.

    Where an eviction reads the device, it runs between the captured steps.

    Args:
        step: Calls the model on ``cache``, and works on tensors that keep their addresses.
        cache: It must have slots.
        device: Where they are.
        generator: Where the randomness of ``step`` comes from; None is torch's own.
        replay: Runs a graph of this step, if there is one.
    """

    def __init__(
        self,
        step: Step,
        cache: BoundedCache,
        device: torch.device,
        generator: torch.Generator | None = None,
        replay: Step | None = None,
    ) -> None:
        if cache.slots is None:
            raise RuntimeError("the cache must have slots")
        self._cache, self._slots = cache, cache.slots
        self._device, self._generator = device, generator
        # layers with a sliding window keep transformers' caches, which are new tensors at each step
        self._is_captured = can_capture(self._slots) and not cache.sliding
        if self._is_captured:
            self._slots.forget_counts()  # the host does not count in a replay
        self._evicts = self._slots.is_compileable
        self._step = step if self._evicts else self._without_eviction(step)
        self._renew(replay)

    @property
    def replay(self) -> Step | None:
        """Runs the graph, if one was recorded."""
        return self._run.replay if isinstance(self._run, CapturedStep) else None

    def _renew(self, replay: Step | None = None) -> None:
        self._pinned = self._slots.pinned
        self._run = self._step
        if self._is_captured:
            self._run = CapturedStep(
                self._step, self._device, self._generator, self._cache.abandon_call, replay
            )

    def __call__(self, added: Sequence[int] | None = None) -> None:
        """Run one step.

        Args:
            added: For each row, 1 if it takes a token, else 0; None: all of them do, or may.
        """
        if self._is_captured and self._slots.pinned is not self._pinned:
            self._renew()  # the graph reads the table that was there when it was recorded
        if self._evicts:
            self._run()
            return
        with self._slots.counting_a_step(added):
            self._run()
        self._slots.evict()

    def _without_eviction(self, step: Step) -> Step:
        def run() -> None:
            self._cache.evicts = False
            try:
                step()
            finally:
                self._cache.evicts = True

        return run


class CompiledStep:
    """Runs ``step`` compiled by Inductor; as it is, with a warning, if it does not compile.

    Inductor makes no CUDA graph of it: :class:`CapturedStep` records the compiled step.
    """

    def __init__(self, step: Callable[[], Any]) -> None:
        self._step = step
        self._run = torch.compile(step, fullgraph=True, dynamic=False)

    def __call__(self) -> Any:
        try:
            return self._run()
        except torch._dynamo.exc.TorchDynamoException as error:  # before anything has run
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            logger.warning("this model's decode step runs without being compiled: %s", reason)
            self._run = self._step
            return self._step()


def can_capture(slots: BoundedKVCache) -> bool:
    """Whether a step on these slots can be a CUDA graph: one GPU, and nothing is read back."""
    is_local = slots.device.type == "cuda" and len(set(slots.devices)) == 1
    return is_local and all(storage.is_compileable for storage in slots.storages)


class CapturedStep:
    """Runs ``step``, from the fourth call on as a graph.

    A step that reads something back to the host cannot be recorded. The last call before the
    recording checks this, because a failed recording leaves torch's allocator and generators in
    the middle of it. If the recording fails anyway, the step runs without a graph. Both are logged.

    Args:
        step: Works on tensors that keep their addresses.
        device: Where they are.
        generator: Its source of randomness; None is torch's own.
        abandon: Called after a failed recording, which has run nothing on the device. It makes the
            host forget the call under way.
        replay: Runs a graph of this step, if there is one.

    Attributes:
        replay: Runs the graph, if there is one by now.
    """

    def __init__(
        self,
        step: Step,
        device: torch.device,
        generator: torch.Generator | None,
        abandon: Callable[[], None],
        replay: Step | None = None,
    ) -> None:
        self._step, self._device, self._generator = step, device, generator
        self._abandon = abandon
        self._calls = 0
        self.replay = replay

    def __call__(self) -> None:
        if self.replay is not None:
            self.replay()
            return
        self._calls += 1
        if self._calls == WARM_UP:
            self._look()
            return
        if self._calls == WARM_UP + 1 and self._reads is None:
            self._record()
        run = self.replay or self._step
        run()

    def _look(self) -> None:
        # a compiled step cannot run under a dispatch mode
        with torch.compiler.set_stance("force_eager"), HostReads(self._device) as reads:
            self._step()
        self._reads = reads.seen
        if self._reads is not None:
            self._warn(f"it waits for the device ({self._reads})")

    def _record(self) -> None:
        try:
            self.replay = capture(self._step, self._device, self._generator)
        except RuntimeError as error:
            self._abandon()
            self._warn(f"{type(error).__name__}: {str(error).splitlines()[0]}")

    def _warn(self, reason: str) -> None:
        logger.warning("this model's decode step cannot be captured, it runs as it is: %s", reason)


def capture(step: Step, device: torch.device, generator: torch.Generator | None) -> Step:
    """Record a step without running it, and return a function that runs the graph.

    Raises:
        RuntimeError: the step does something that a graph cannot.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with device_guard(device):
        drawing = [torch.cuda.default_generators[torch.cuda.current_device()]]
        drawing += [] if generator is None else [generator]
        states = [each.clone_state() for each in drawing]
        try:
            with torch.compiler.set_stance("fail_on_recompile"), torch.cuda.graph(graph):
                step()
        except RuntimeError:
            # after a failed recording they would refuse to draw outside a graph
            for each, state in zip(drawing, states, strict=True):
                each.graphsafe_set_state(state)
            raise
    return graph.replay


class HostReads(TorchDispatchMode):
    """Notices whether the host waits for ``device``, to read a value or to copy from or to it.

    Attributes:
        seen: The first operation that waited, by name.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.seen: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.seen is None and (func in _READS or func in _COPIES):
            tensors = [x for x in tree_leaves((args, output)) if isinstance(x, Tensor)]
            kinds = {x.device.type for x in tensors}
            if self._device.type in kinds and (func in _READS or len(kinds) > 1):
                self.seen = str(func)
        return output
