"""What a layer's call does to the slots: a decode step, a longer call, an eviction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimkv_kernels.cache.call import Call, Inputs, NewTokens, Pool, states
from trimkv_kernels.cache.contract import Contract
from trimkv_kernels.cache.drafts import Waiting
from trimkv_kernels.cache.observation import Observation
from trimkv_kernels.cache.state import State
from trimkv_kernels.cache.ties import Ties
from trimkv_kernels.kernels.prologue import Rope


@dataclass(frozen=True)
class Routes:
    """Runs calls: passes tensors between the policy and the storages.

    Args:
        contract: The policy.
        state: The cache's state, which is changed.
        ties: Which scores count as equal.
    """

    contract: Contract
    state: State
    ties: Ties

    @property
    def _observation(self) -> Observation | None:
        return self.contract.observation

    def decode(self, layer: int, call: Call, inputs: Inputs, rope: Rope | None) -> Tensor:
        """A decode step: store the token, attend, observe. ``rope`` is left to the storage."""
        storage, t = self.state.storage(layer), self.state.t(layer)
        query, _, _ = states(inputs)
        storage.remember(layer, call, query, inputs["query_nope"], t)
        output = storage.append(
            layer,
            call,
            query,
            self._step_tokens(layer, call, inputs, rope),
            t,
            # before the first eviction the output has the bits of transformers' full cache
            packed=not torch.compiler.is_compiling() and self.state.counts.has_evicted,
        )
        mass = storage.mass(layer)
        if self._observation is not None and mass is not None:
            pool, valid = storage.stored(layer, (), t)
            held = storage.num_valid(layer, t)
            attention = self._observation.of_step(mass, valid, held, call.real)
            count = self._observation.num_queries(call.real)
            self.contract.observe(layer, t, pool, valid, attention, count)
        return output

    def read(
        self,
        layer: int,
        call: Call,
        inputs: Inputs,
        self_attention: Callable[[], Tensor] | None,
    ) -> Tensor:
        """A call of several tokens: attend, then choose what stays of slots and new tokens."""
        attention = None
        if call.is_first and self_attention is not None and self._observation is None:
            output = self_attention()
        else:
            output, attention = self._extend(layer, call, inputs)
        self._insert(layer, call, inputs, attention)
        return output

    def draft(self, layer: int, waiting: Waiting, new: int) -> Tensor:
        """Attend the last ``new`` tokens to the slots, to the waiting tokens and to themselves."""
        query, key, value = states(waiting.inputs[0])
        output = self.state.storage(layer).extend(
            layer, waiting.call, query, key, value, self.state.t(layer), self.state.extent(layer)
        )
        return output[:, :, -new:]

    def confirm(self, waiting: Waiting) -> None:
        """Put tokens that waited into the slots of all layers."""
        call = waiting.call
        for layer, inputs in enumerate(waiting.inputs):
            call = call.to(self.state.storage(layer).device)
            attention = None
            if self._observation is not None:
                _, attention = self._extend(layer, call, inputs)
            self._insert(layer, call, inputs, attention)
        self.state.counts.is_empty = False
        self.state.counts.add(call.added, call.undoable, chosen=True)

    def evict(self) -> None:
        """Cut every full head to its budget, one launch for each storage."""
        recorded, counts = self.state.is_recorded, self.state.counts
        counts.awaits_evict = False
        for number, storage in enumerate(self.state.storages):
            if not (recorded or counts.is_due(number)):
                continue
            scores, t = None, self.state.t(storage.layers[0])
            if not self.contract.is_affine:
                needed = self.contract.needs.score
                scores = [
                    self._score(layer, *storage.stored(layer, needed, t))
                    for layer in storage.layers
                ]
            storage.evict(t, scores=scores)
            if recorded:
                counts.undoable = 0
            else:
                counts.cut(number)
        self.state.refresh_counts()

    def _step_tokens(self, layer: int, call: Call, inputs: Inputs, rope: Rope | None) -> NewTokens:
        """As :meth:`_new_tokens`, with what a storage that fuses it can finish itself."""
        if self.state.storage(layer).fuses:
            tokens = self.contract.tokens(layer, self.state.t(layer), call, inputs)
            decay = self.contract.decay(tokens, self.state.pins)
            if decay is not None:
                _, key, value = states(inputs)
                fields = self.contract.new_fields(tokens)
                return NewTokens(key, value, None, None, fields, decay, rope)
        return replace(self._new_tokens(layer, call, inputs), rope=rope)

    def _new_tokens(self, layer: int, call: Call, inputs: Inputs) -> NewTokens:
        """A layer's new tokens, with the policy's fields, slopes and offsets."""
        tokens = self.contract.tokens(layer, self.state.t(layer), call, inputs)
        fields = self.contract.new_fields(tokens)
        slope, offset = self.contract.affine(tokens, self.state.pins)
        _, key, value = states(inputs)
        return NewTokens(key, value, slope, offset, fields)

    def _extend(self, layer: int, call: Call, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """The output of a call, and what its attention reports about slots and new tokens."""
        storage, extent = self.state.storage(layer), self.state.extent(layer)
        observation = self._observation
        query, key, value = states(inputs)
        lse = None
        if observation is not None:
            lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        output = storage.extend(
            layer, call, query, key, value, self.state.t(layer), extent, lse=lse
        )
        if observation is None or lse is None:
            return output, None
        attention = storage.column_mass(
            layer,
            call,
            query,
            key,
            lse,
            extent,
            queries=observation.last_queries(query.shape[2]),
            reduce=observation.reduce,
            count_below=observation.counts_below,
        )
        return output, observation.over_heads(attention)

    def _insert(
        self,
        layer: int,
        call: Call,
        inputs: Inputs,
        attention: Tensor | None,
    ) -> None:
        """Store the best of the slots and of a call's tokens."""
        storage, t, extent = (
            self.state.storage(layer),
            self.state.t(layer),
            self.state.extent(layer),
        )
        query, key, value = states(inputs)
        storage.remember(layer, call, query, inputs["query_nope"], t)
        tokens = self._new_tokens(layer, call, inputs)
        must_score = not self.contract.is_affine and self.state.is_due(layer, call.added)
        scores = None
        if must_score or attention is not None:
            new = {"key": key, "value": value, **tokens.fields}
            needed = self.contract.needs.score
            pool, valid = storage.candidates(layer, call, new, needed, t, extent)
            if attention is not None:
                self._observe(layer, call, pool, valid, attention)
                tokens = replace(tokens, fields=storage.write_fields(layer, pool, extent))
            if must_score:
                scores = self._score(layer, pool, valid)
        if scores is None and not self.contract.is_affine:
            # nothing is dropped, so the scores do not matter
            shape = (*key.shape[:2], extent.max_valid + key.shape[2])
            scores = torch.zeros(shape, dtype=torch.float32, device=key.device)
        storage.fill(layer, call, tokens, t, extent, scores=scores)

    def _observe(
        self, layer: int, call: Call, pool: Pool, valid: Tensor, attention: Tensor
    ) -> None:
        """Bring the fields in ``pool`` up to date with what a longer call's attention reported."""
        observation = self._observation
        if observation is None:
            return
        into = observation.stat.into
        if into is None:
            for name in self.contract.fields:  # on_insert may have returned views of its input
                pool[name] = pool[name].clone()
            count = observation.num_queries(call.real)
            self.contract.observe(layer, self.state.t(layer), pool, valid, attention, count)
        else:
            pool[into] = pool[into] + attention if observation.accumulates else attention

    def _score(self, layer: int, pool: Pool, valid: Tensor) -> Tensor:
        """The policy's scores of one layer's candidates."""
        storage, t = self.state.storage(layer), self.state.t(layer)
        return self.contract.score(
            layer,
            t,
            pool,
            valid,
            budget=storage.budget,
            queries=storage.remembered(layer, t),
            pins=self.state.pins,
            ties=self.ties,
        )
