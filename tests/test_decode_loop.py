"""`decode_loop` against `generate`, run as it is and as a graph that replays what was recorded."""

import gc
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3ForCausalLM

import trimkv_kernels as tk
from conftest import make_qwen3
from test_patch import BUDGET, batch, policy, trimkv
from trimkv_kernels import capture as graphs
from trimkv_kernels import decoding
from trimkv_kernels.cache import state as cache_state
from trimkv_kernels.cache.dense import DenseSlots
from trimkv_kernels.integrations import BoundedCache
from trimkv_kernels.kernels._torch import decode_attention as torch_decode
from trimkv_kernels.kernels._torch import evict as torch_evict
from trimkv_kernels.token_choice import TokenChoice

HOST_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
}
GREEDY = {"do_sample": False, "max_new_tokens": 40}


class Tape(TorchDispatchMode):
    """Stands in for a CUDA graph: runs a step's operations again, on the tensors of the first time.

    No Python of the step runs in a replay, and what the step was told on the host stays as it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: list[tuple[Tensor, Tensor]] = []
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.replays = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in HOST_READS:
            raise RuntimeError(f"{func} waits for the device")
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(x, x.clone()) for x in tree_leaves(value)]
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    def undo(self) -> None:
        """What a recording that failed has done: nothing."""
        for tensor, content in reversed(self.before):
            tensor.copy_(content)

    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:  # recording has run it; a graph's capture runs nothing
            return
        for func, args, kwargs, output in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture(params=["as it is", "captured"])
def tapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Tape] | None:
    """The graphs that were made; None where the step runs as it is."""
    return fake_graphs(monkeypatch) if request.param == "captured" else None


def choose_as_on_a_gpu(device: pytest.MonkeyPatch) -> None:
    """Let a step read nothing that costs nothing on a CPU."""
    for module in (torch_decode, torch_evict):
        device.setattr(module, "host_reads_are_free", lambda tensor: False)
    device.setattr(BoundedCache, "_call_mask", lambda self, mask, *_: mask)
    device.setattr(cache_state, "real_counts", lambda valid: None)


def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    tapes: list[Tape] = []

    def capture(step: Callable[[], None], *_: object) -> Callable[[], None]:
        tapes.append(Tape())
        eager = torch.compiler.set_stance("force_eager")  # a tape takes no compiled step
        with monkeypatch.context() as device, eager, tapes[-1]:
            choose_as_on_a_gpu(device)
            device.setattr(cache_state, "is_recorded", lambda device: True)
            try:
                step()
            except RuntimeError:
                with torch.utils._python_dispatch._disable_current_modes():
                    tapes[-1].undo()
                raise
        return tapes[-1].replay

    class HostReads(graphs.HostReads):
        def __enter__(self) -> Any:
            self.device = pytest.MonkeyPatch()
            choose_as_on_a_gpu(self.device)
            return super().__enter__()

        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            self.device.undo()

    monkeypatch.setattr(graphs, "HostReads", HostReads)
    monkeypatch.setattr(graphs, "can_capture", lambda slots: True)
    monkeypatch.setattr(graphs, "capture", capture)
    return tapes


def run(model: Qwen3ForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    """All tokens, ``[batch, new]``."""
    return torch.stack(list(tk.decode_loop(model, ids, **options)), dim=1)


def end(row: Tensor, eos: list[int]) -> int:
    """Where a row meets an eos."""
    return next((i for i, token in enumerate(row.tolist()) if token in eos), 99)


def kept(cache: BoundedCache) -> list[Tensor]:
    return [cache.positions(layer).sort(-1).values for layer in range(3)]


def same(ours: BoundedCache, theirs: BoundedCache) -> bool:
    """Whether two caches have seen and kept the same."""
    return (
        all(torch.equal(a, b) for a, b in zip(kept(ours), kept(theirs), strict=True))
        and torch.equal(ours.slots.t, theirs.slots.t)
        and torch.equal(ours.slots.seen, theirs.slots.seen)
    )


@pytest.mark.parametrize(
    "name", ["trimkv", "streaming_llm", "random", "key_norm", "h2o", "snap_kv", "full"]
)
def test_tokens_and_kept_sets_are_those_of_generate(
    name: str,
    tapes: list[Tape] | None,
    qwen3: Qwen3ForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = {"budget": 96, "buffer": 8} if name == "full" else BUDGET
    handle = tk.patch(qwen3, policy(name, qwen3), **budget)
    ids, mask = batch((17, 0, 4), 40)
    theirs, ours = handle.new_cache(), handle.new_cache()
    call = {"attention_mask": mask, "past_key_values": theirs, "eos_token_id": None}
    expected = qwen3.generate(ids, **GREEDY, **call)[:, 40:]
    evictions = []
    evict = DenseSlots.evict
    monkeypatch.setattr(
        DenseSlots, "evict", lambda self, t, **k: (evictions.append(1), evict(self, t, **k))
    )
    options = {"attention_mask": mask, "past_key_values": ours, "eos_token_id": ()}
    assert torch.equal(run(qwen3, ids, max_new_tokens=40, **options), expected)
    assert same(ours, theirs)
    if not handle.policy.is_compileable:
        # every 6 steps; row 0 has a slot to spare after the prompt and is due a step later
        assert len(evictions) == (0 if name == "full" else 2 * (39 // 6))
    if tapes is not None:
        assert [tape.replays for tape in tapes] == [39 - 3]  # three steps warm up


@pytest.mark.parametrize(("name", "check_every"), [("trimkv", 1), ("trimkv", 5), ("key_norm", 64)])
def test_rows_stop_at_eos(
    name: str, check_every: int, tapes: list[Tape] | None, qwen3: Qwen3ForCausalLM
) -> None:
    handle = tk.patch(qwen3, policy(name, qwen3), **BUDGET)
    ids, mask = batch((6, 0), 30)
    free = run(qwen3, ids, attention_mask=mask, max_new_tokens=40, eos_token_id=())
    pairs = ([a, b] for a in free[0].tolist() for b in free[1].tolist())
    eos = next(x for x in pairs if 6 < end(free[0], x) < end(free[1], x) - 8 < 30)
    call = {"attention_mask": mask, "eos_token_id": eos, "pad_token_id": 1}
    expected = qwen3.generate(ids, **GREEDY, **call)[:, 30:]
    length = expected.shape[1]
    assert length < 40
    assert (expected[0] == 1).sum() >= 8
    cache = handle.new_cache()
    options = {"max_new_tokens": 40, "check_every": check_every, "past_key_values": cache}
    assert torch.equal(run(qwen3, ids, **options, **call), expected)
    # no row's last token is in its cache, and no padding
    ends = [int((row != 1).sum()) for row in expected]
    assert cache.stats().tokens_seen == [24 + ends[0] - 1, 30 + ends[1] - 1]
    assert int(cache.get_seq_length()) == 30 + length - 1
    alone = handle.new_cache()
    run(qwen3, ids[:1, 6:], max_new_tokens=40, eos_token_id=eos, past_key_values=alone)
    for layer in range(3):  # what row 0 kept when it ended is there still
        assert torch.equal(kept(alone)[layer][0], kept(cache)[layer][0])


def test_a_finished_row_gets_no_attention_mass(
    tapes: list[Tape] | None, qwen3: Qwen3ForCausalLM
) -> None:
    handle = tk.patch(qwen3, policy("h2o", qwen3), **BUDGET)
    ids, _ = batch((0, 0), 20)
    free = run(qwen3, ids, max_new_tokens=12, eos_token_id=())
    eos = next(int(a) for a in free[0] if a not in free[1])
    steps = free[0].tolist().index(eos)
    together, alone = handle.new_cache(), handle.new_cache()
    options = {"max_new_tokens": 12, "eos_token_id": eos}
    run(qwen3, ids, past_key_values=together, **options)
    run(qwen3, ids[:1], past_key_values=alone, **options)
    assert together.stats().tokens_seen == [20 + steps, 20 + 11]
    for ours, theirs in zip(together.slots.storages, alone.slots.storages, strict=True):
        filled = theirs.slots.num_valid[0, 0, 0]
        torch.testing.assert_close(
            ours.fields["mass"][:, :1, :, :filled],
            theirs.fields["mass"][:, :, :, :filled],
            atol=1e-5,
            rtol=1e-5,
        )


def test_the_first_token_may_end_it(tapes: list[Tape] | None, qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    ids, _ = batch((0,), 20)
    eos = int(run(qwen3, ids, max_new_tokens=1)[0, 0])
    cache = handle.new_cache()
    tokens = run(qwen3, ids, max_new_tokens=9, eos_token_id=eos, past_key_values=cache)
    assert tokens.tolist() == [[eos]]
    assert cache.stats().tokens_seen == [20]
    assert int(cache.get_seq_length()) == 20


def test_eos_comes_from_the_generation_config(qwen3: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    ids, _ = batch((0, 0), 20)
    free = run(qwen3, ids, max_new_tokens=12, eos_token_id=())
    qwen3.generation_config.eos_token_id = int(free[0, 3])
    assert torch.equal(run(qwen3, ids, max_new_tokens=12), qwen3.generate(ids, **GREEDY)[:, 20:32])
    qwen3.generation_config.pad_token_id = None
    ended = run(qwen3, ids, max_new_tokens=12)
    assert ended[0, 4:].eq(free[0, 3]).all()  # no padding token is known


@pytest.mark.parametrize("name", ["trimkv", "key_norm"])
def test_several_turns(name: str, tapes: list[Tape] | None, qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, policy(name, qwen3), **BUDGET)
    ids, mask = batch((5, 0), 20)
    theirs, ours = handle.new_cache(), handle.new_cache()
    text, real = ids, mask
    for turn in range(2):
        if turn:
            more, _ = batch((0, 0), 8, seed=7 + turn)
            text = torch.cat((text, more), 1)
            real = torch.cat((real, torch.ones_like(more)), 1)
        call = {"attention_mask": real, "max_new_tokens": 15}
        after = qwen3.generate(
            text, past_key_values=theirs, do_sample=False, eos_token_id=None, **call
        )
        got = run(qwen3, text, past_key_values=ours, eos_token_id=(), **call)
        assert torch.equal(got, after[:, text.shape[1] :])
        assert same(ours, theirs)
        text, real = after, torch.cat((real, torch.ones(2, 15, dtype=torch.long)), 1)
    # and a call by hand goes on from there
    with torch.no_grad():
        a, b = (qwen3(text[:, -9:], past_key_values=cache).logits for cache in (ours, theirs))
    torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)


def test_the_next_turn_replays_the_graph_of_the_last(
    qwen3: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a reset. Where anything else has changed that it contains, there is another."""
    tapes = fake_graphs(monkeypatch)
    handle = tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    ours, theirs = handle.new_cache(), handle.new_cache()

    def go_on(text: Tensor, **options: Any) -> Tensor:
        """A turn of 12 tokens, the same as without a graph."""
        options = {"max_new_tokens": 12, "eos_token_id": ()} | options
        torch.manual_seed(0)
        got = run(qwen3, text, past_key_values=ours, **options)
        torch.manual_seed(0)
        with monkeypatch.context() as plain:
            plain.setattr(graphs, "can_capture", lambda slots: False)
            expected = run(qwen3, text, past_key_values=theirs, **options)
        assert torch.equal(got, expected)
        assert same(ours, theirs)
        return torch.cat((text, got, batch((0, 0), 4, seed=text.shape[1])[0]), 1)

    start = batch((0, 0), 20)[0]
    text = go_on(go_on(start))
    assert [tape.replays for tape in tapes] == [11 - 3 + 11]
    ours.reset()
    theirs.reset()
    text = go_on(start)
    assert len(tapes) == 1
    for number, options in enumerate(
        ({"do_sample": True, "temperature": 0.5}, {"eos_token_id": 95}, {"eos_token_id": 94}), 2
    ):
        text = go_on(text, **options)
        assert len(tapes) == number
    go_on(text, eos_token_id=94)
    assert len(tapes) == 4
    head, hooks = qwen3.lm_head, []
    changes = (
        (5, lambda: setattr(head, "weight", torch.nn.Parameter(2 * head.weight.detach()))),
        (6, lambda: hooks.append(head.register_forward_hook(lambda *call: -call[-1]))),
        (7, lambda: None),  # what a hook computes may change, so such a graph is not kept
        (7, lambda: hooks.pop().remove()),  # that of before
        (8, lambda: [cache.pin([[(3, 4)], [(3, 4)]]) for cache in (ours, theirs)]),
    )
    for number, change in changes:
        ours.reset()
        theirs.reset()
        change()
        go_on(start)
        assert len(tapes) == number


def test_a_graph_is_dropped_with_its_cache(
    qwen3: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: no reference cycle waits for the garbage collector."""
    tapes = fake_graphs(monkeypatch)
    handle = tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    cache = handle.new_cache()
    run(qwen3, batch((0,), 20)[0], max_new_tokens=12, past_key_values=cache, eos_token_id=())
    slots, tape = weakref.ref(cache.slots), weakref.ref(tapes.pop())
    gc.collect()
    assert slots() is not None
    assert tape() is not None
    handle.follow(handle.new_cache())  # the handle keeps the latest cache
    gc.disable()
    try:
        del cache
        assert slots() is None
        assert tape() is None
    finally:
        gc.enable()


def test_prompts_in_chunks(qwen3: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, trimkv(qwen3), prefill_chunk=8, **BUDGET)
    ids, mask = batch((33, 0), 60)
    expected = qwen3.generate(ids, attention_mask=mask, eos_token_id=None, **GREEDY)[:, 60:]
    got = run(qwen3, ids, attention_mask=mask, max_new_tokens=40, eos_token_id=())
    assert torch.equal(got, expected)


def test_no_buffer_moves(qwen3: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = []
    take = decoding._Loop._take

    def spy(self: decoding._Loop, token: Tensor) -> None:
        take(self, token)
        buffers = vars(self.buffers).values()
        slots = self._slots
        state = [slots.t, slots.seen, *(x for g in slots.storages for x in g.tensors())]
        addresses.append([x.data_ptr() for x in (*buffers, *state)])

    monkeypatch.setattr(decoding._Loop, "_take", spy)
    tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    run(qwen3, batch((0, 0), 40)[0], max_new_tokens=20, eos_token_id=95)
    assert len(addresses) == 20
    assert all(step == addresses[0] for step in addresses)


def test_a_tape_notices_host_reads() -> None:
    with pytest.raises(RuntimeError, match="waits for the device"), Tape():
        torch.ones(()).item()


def test_tokens_come_as_they_are_made(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, "key_norm", **BUDGET)
    calls = []
    qwen3.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    cache = handle.new_cache()
    ids, _ = batch((0,), 40)
    stream = tk.decode_loop(qwen3, ids, max_new_tokens=9, eos_token_id=(), past_key_values=cache)
    assert not calls
    for steps in (1, 2, 3):
        token = next(stream)
        assert (token.shape, token.dtype, len(calls)) == ((1,), torch.int64, steps)
        assert torch.is_grad_enabled()
    stream.close()
    assert cache.stats().tokens_seen == [42]
    with torch.no_grad():  # evicts by itself again
        for _ in range(20):
            qwen3(token[None], past_key_values=cache)
    assert cache.stats().slots_used.max() < 30


def test_tokens_come_in_groups_between_checks(qwen3: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    calls = []
    qwen3.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    ids, _ = batch((0,), 40)
    stream = tk.decode_loop(qwen3, ids, max_new_tokens=12, eos_token_id=95, check_every=4)
    made = [len(calls) for _ in stream]
    assert made == [1, *[5] * 4, *[9] * 4, *[12] * 3]


def test_strict_is_checked_at_the_end(qwen3: Qwen3ForCausalLM) -> None:
    handle = tk.patch(qwen3, "random", strict=True, **BUDGET)
    stream = tk.decode_loop(qwen3, batch((0,), 10)[0], max_new_tokens=2, eos_token_id=())
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(RuntimeError, match="'random' never had to evict"):
        next(stream)
    assert handle._latest is not None


def test_the_page_runs(qwen3: Qwen3ForCausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "decode-loop.md").read_text()
    loop, compiling = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    qwen3.generation_config.eos_token_id = None
    names = {"model": qwen3}
    exec(loop, names)
    assert capsys.readouterr().out.startswith("139 tokens seen")
    exec(compiling, names)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}],
    ids=["plain", "all"],
)
def test_sampling_draws_what_generate_draws(
    options: dict, tapes: list[Tape] | None, qwen3: Qwen3ForCausalLM
) -> None:
    tk.patch(qwen3, trimkv(qwen3), **BUDGET)
    ids, mask = batch((6, 0), 30)
    call = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": True}
    torch.manual_seed(3)
    stock = {"top_k": 0, "top_p": 1.0, **options}  # its own default is 50
    expected = qwen3.generate(ids, eos_token_id=None, **call, **stock)[:, 30:]
    torch.manual_seed(3)
    assert torch.equal(run(qwen3, ids, eos_token_id=(), **call, **options), expected)
    generator = torch.Generator().manual_seed(3)
    got = run(qwen3, ids, eos_token_id=(), generator=generator, **call, **options)
    assert torch.equal(got, expected)
    assert not torch.equal(
        run(qwen3, ids, eos_token_id=(), generator=generator, **call, **options), expected
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.06, 0.04]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.6}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        ({"top_p": 0.1}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [0.16 / 0.2952, 0.09 / 0.2952, 0.04 / 0.2952, 0.0036 / 0.2952,
                                0.0016 / 0.2952]),
        ({"top_k": 3, "top_p": 0.4}, [1, 0, 0, 0, 0]),  # 4/9 of the three is enough
    ],
)  # fmt: skip
def test_the_distribution_is_right(options: dict, expected: list[float]) -> None:
    order, draws = torch.tensor([3, 0, 4, 1, 2]), 20_000
    chances = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    generator = torch.Generator().manual_seed(0)
    choice = TokenChoice(
        **{"do_sample": True, "temperature": 1.0, "top_k": None, "top_p": None, **options},
        generator=generator,
    )
    logits = torch.empty(5).index_copy_(0, order, chances.log() + 3.0).expand(draws, 5)
    counts = choice(logits).bincount(minlength=5)[order].double()
    wanted = torch.tensor(expected, dtype=torch.float64) * draws
    assert counts[wanted == 0].eq(0).all()
    some = wanted > 0
    chi_square = ((counts - wanted)[some] ** 2 / wanted[some]).sum()
    assert chi_square < 18.5  # four degrees of freedom: one in a thousand


def test_top_p_after_top_k_sorts_only_those() -> None:
    """Counted by hand in float64; the vocabulary is larger than anything that may be sorted."""

    class Sorted(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func.overloadpacket in (torch.ops.aten.sort, torch.ops.aten.argsort):
                self.most = max(self.most, args[0].shape[-1])
            return func(*args, **(kwargs or {}))

    logits = torch.randn(16, 500, generator=torch.Generator().manual_seed(5))
    choice = TokenChoice(True, 1.0, 12, 0.8, torch.Generator().manual_seed(6))
    drawn = [set() for _ in logits]
    with Sorted() as counter:
        for _ in range(200):
            for row, token in zip(drawn, choice(logits).tolist(), strict=True):
                row.add(token)
    assert counter.most <= 12
    for row, scores in zip(drawn, logits.double(), strict=True):
        best = scores.topk(12)
        before = best.values.softmax(0).cumsum(0) - best.values.softmax(0)
        assert row <= set(best.indices[before < 0.8].tolist())
        assert best.indices[0].item() in row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an int of at least 1, got 0"),
        ({"check_every": 0}, "check_every must be an int of at least 1, got 0"),
        ({"top_k": 3}, "do_sample must be True if temperature, top_k, top_p or generator"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"do_sample": True, "top_k": 0}, "top_k must be an int of at least 1, got 0"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        (
            {"attention_mask": torch.ones(1, 9)},
            r"attention_mask must have shape \[1, 10\], got \[1, 9\]",
        ),
        ({"attention_mask": torch.zeros(1, 10)}, r"only padding in rows \[0\]"),
    ],
)
def test_bad_options(options: dict, message: str, qwen3: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, "random", **BUDGET)
    with pytest.raises(ValueError, match=message):
        tk.decode_loop(qwen3, batch((0,), 10)[0], **{"max_new_tokens": 4, **options})


def test_bad_models_prompts_and_caches(qwen3: Qwen3ForCausalLM, stock: Qwen3ForCausalLM) -> None:
    ids, _ = batch((0,), 10)
    with pytest.raises(ValueError, match=r"model must be patched.*call patch\(model\) first"):
        tk.decode_loop(qwen3, ids, max_new_tokens=4)
    with pytest.raises(TypeError, match="model must be a transformers model, got str"):
        tk.decode_loop("Qwen/Qwen3-4B", ids, max_new_tokens=4)
    handle = tk.patch(qwen3, "random", **BUDGET)
    for bad in (ids[0], ids[:, :0], ids.float()):
        with pytest.raises(ValueError, match=r"input_ids must be int64 \[batch, length >= 1\]"):
            tk.decode_loop(qwen3, bad, max_new_tokens=4)
    with pytest.raises(ValueError, match="input_ids must be on cpu, got meta"):
        tk.decode_loop(qwen3, ids.to("meta"), max_new_tokens=4)
    foreign = tk.patch(stock, "random", **BUDGET).new_cache()
    with pytest.raises(TypeError, match="past_key_values must be a cache from this model's"):
        tk.decode_loop(qwen3, ids, max_new_tokens=4, past_key_values=foreign)
    cache = handle.new_cache()
    run(qwen3, ids, max_new_tokens=4, past_key_values=cache, eos_token_id=())
    with pytest.raises(ValueError, match="more than the 13 tokens that the cache has seen, got 10"):
        tk.decode_loop(qwen3, ids, max_new_tokens=4, past_key_values=cache)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="must not hold tokens back.*stop_past_recording"):
        tk.decode_loop(qwen3, ids.repeat(1, 2), max_new_tokens=4, past_key_values=cache)
    qwen3.train()
    with pytest.raises(ValueError, match=r"must be in eval mode.*model.eval\(\)"):
        tk.decode_loop(qwen3, ids, max_new_tokens=4)


def test_full_refuses_what_does_not_fit(qwen3: Qwen3ForCausalLM) -> None:
    tk.patch(qwen3, "full", budget=32)
    ids, _ = batch((0,), 30)
    assert run(qwen3, ids, max_new_tokens=3, eos_token_id=()).shape == (1, 3)
    message = "it holds budget=32 tokens, got 4, which needs 33"
    with pytest.raises(ValueError, match=message):
        next(tk.decode_loop(qwen3, ids, max_new_tokens=4))


@pytest.fixture
def cuda_model() -> Qwen3ForCausalLM:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return make_qwen3().to("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["trimkv", "random", "key_norm", "h2o", "snap_kv"])
def test_a_cuda_graph_decodes_what_generate_does(
    name: str, cuda_model: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    capture = graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda *args: (made.append(1), capture(*args))[1])
    handle = tk.patch(cuda_model, policy(name, cuda_model), **BUDGET)
    ids, mask = (x.to("cuda") for x in batch((17, 0, 4), 40))
    theirs, ours = handle.new_cache(), handle.new_cache()
    call = {"attention_mask": mask, "disable_compile": True, "eos_token_id": None}
    expected = cuda_model.generate(ids, past_key_values=theirs, **GREEDY, **call)[:, 40:]
    options = {"attention_mask": mask, "past_key_values": ours, "eos_token_id": ()}
    assert torch.equal(run(cuda_model, ids, max_new_tokens=40, **options), expected)
    assert same(ours, theirs)
    assert len(made) == 1


@pytest.mark.gpu
def test_a_cuda_graph_stops_at_eos_and_samples(cuda_model: Qwen3ForCausalLM) -> None:
    tk.patch(cuda_model, trimkv(cuda_model), **BUDGET)
    ids, _ = batch((0, 0), 30)
    ids = ids.to("cuda")
    free = run(cuda_model, ids, max_new_tokens=40, eos_token_id=())
    eos = [int(free[0, 9]), int(free[1, 20])]
    call = {"eos_token_id": eos, "pad_token_id": 1, **GREEDY}
    expected = cuda_model.generate(ids, disable_compile=True, **call)[:, 30:]
    assert torch.equal(run(cuda_model, ids, **call), expected)
    draws = []
    for seed in (1, 1, 2):
        generator = torch.Generator("cuda").manual_seed(seed)
        options = {"do_sample": True, "top_k": 20, "top_p": 0.95, "generator": generator}
        draws.append(run(cuda_model, ids, max_new_tokens=40, eos_token_id=(), **options))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
