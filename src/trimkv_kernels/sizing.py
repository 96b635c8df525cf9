"""What fits: bytes and times of bounded decoding, from a model's sizes and a GPU's data sheet.

``python -m trimkv_kernels.sizing`` prints the tables of ``docs/scale.md``. A decode step reads each
weight that it uses and each slot once, so it takes at least their bytes over the memory bandwidth.
Bytes are exact counts. Times are lower bounds that no kernel reaches. A GB is 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH = 2  # bytes of a bf16 number
METADATA = 12  # bytes of a slot beside key and value: int32 position, fp32 slope and offset
BUFFER = 128
BUDGETS = (512, 1024, 2048, 4096)
FULL_CONTEXT = 32768


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a decoder, named as in transformers' configs.

    Args:
        intermediate_size: Width of the MLP, or of each expert.
        num_experts: Experts of each layer; 0 for a dense MLP.
        num_experts_per_tok: Experts that each token uses.
        tied: The output matrix is the embedding.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    tied: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    head_dim: int = 128
    vocab_size: int = 151936

    @property
    def attention_parameters(self) -> int:
        """Of one layer: four projections, two norms of heads, two of the layer."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        return heads * self.head_dim * self.hidden_size + 2 * self.head_dim + 2 * self.hidden_size

    @property
    def expert_parameters(self) -> int:
        """Of one MLP."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def parameters(self) -> int:
        """Of the whole model; tied matrices count once."""
        mlp = self.expert_parameters * max(self.num_experts, 1)
        router = self.num_experts * self.hidden_size
        layers = self.num_layers * (self.attention_parameters + mlp + router)
        vocab = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return layers + vocab + self.hidden_size

    def experts_read(self, batch: int) -> float:
        """Expected experts of a layer that a step of ``batch`` tokens reads, evenly routed."""
        share = self.num_experts_per_tok / self.num_experts
        return self.num_experts * (1 - (1 - share) ** batch)

    def parameters_read(self, batch: int) -> float:
        """Parameters that a decode step of ``batch`` tokens reads.

        An embedding that is not also the output matrix does not count: only few rows are read.
        """
        embedding = 0 if self.tied else self.vocab_size * self.hidden_size
        unused = 0.0
        if self.num_experts:
            unused = (
                self.num_layers
                * self.expert_parameters
                * (self.num_experts - self.experts_read(batch))
            )
        return self.parameters - embedding - unused


@dataclass(frozen=True)
class Accelerator:
    """A GPU and its links.

    Args:
        memory: Bytes.
        usable: Share of the memory for weights and slots; the rest is for activations, graphs and
            the allocator.
        bandwidth: Bytes per second that memory gives.
        link: Bytes per second that the GPU sends to its neighbours.
        latency: Seconds that the smallest all-reduce takes.
    """

    name: str
    memory: float
    usable: float
    bandwidth: float
    link: float
    latency: float


MODELS = (
    ModelSize("Qwen3-4B", 36, 2560, 32, 8, 9728, tied=True),
    ModelSize("Qwen3-8B", 36, 4096, 32, 8, 12288),
    ModelSize("Qwen3-14B", 40, 5120, 40, 8, 17408),
    ModelSize("Qwen3-32B", 64, 5120, 64, 8, 25600),
    ModelSize("Qwen3-30B-A3B", 48, 2048, 32, 4, 768, num_experts=128, num_experts_per_tok=8),
    ModelSize("Qwen3-235B-A22B", 94, 4096, 64, 4, 1536, num_experts=128, num_experts_per_tok=8),
)
H200 = Accelerator("H200", memory=141e9, usable=0.9, bandwidth=4.3e12, link=450e9, latency=10e-6)


def weight_bytes(model: ModelSize, world: int = 1) -> float:
    """bf16 weights of each of ``world`` tensor-parallel GPUs, evenly shared."""
    return model.parameters * WIDTH / world


def rank_kv_heads(model: ModelSize, world: int = 1) -> int:
    """KV heads of each tensor-parallel GPU. A head that several GPUs share is on each of them.

    Raises:
        ValueError: neither of ``world`` and the number of KV heads divides the other.
    """
    heads = model.num_kv_heads
    if heads % world and world % heads:
        raise ValueError(f"world must divide {heads} KV heads or be a multiple of it, got {world}")
    return max(heads // world, 1)


def pair_bytes(model: ModelSize) -> int:
    """Key and value of one token in one head."""
    return 2 * model.head_dim * WIDTH


def full_bytes(model: ModelSize, tokens: int, world: int = 1) -> int:
    """Full cache of one sequence of ``tokens``, on each GPU."""
    return model.num_layers * rank_kv_heads(model, world) * tokens * pair_bytes(model)


def sequence_bytes(model: ModelSize, budget: int, buffer: int = BUFFER, world: int = 1) -> int:
    """Slots of one sequence on each GPU, metadata of an affine policy included.

    Each head has ``budget + buffer`` slots, a count and a capacity (8 bytes); the sequence has a
    clock (4).
    """
    slot = pair_bytes(model) + METADATA
    heads = model.num_layers * rank_kv_heads(model, world)
    return heads * ((budget + buffer) * slot + 8) + 4


def sequences(model: ModelSize, bytes_each: float, gpu: Accelerator = H200, world: int = 1) -> int:
    """Sequences in flight that ``world`` GPUs hold together; 0 if the weights do not fit.

    Args:
        bytes_each: Cache of one sequence on each GPU.
    """
    free = gpu.memory * gpu.usable - weight_bytes(model, world)
    return max(int(free // bytes_each), 0)


def smallest_world(model: ModelSize, gpu: Accelerator = H200) -> int:
    """The fewest GPUs, a power of two, that hold the weights and a sequence of budget 4,096."""
    world = 1
    while not sequences(model, sequence_bytes(model, BUDGETS[-1], world=world), gpu, world):
        world *= 2
    return world


def step_seconds(
    model: ModelSize, batch: int, slots: int, gpu: Accelerator = H200, world: int = 1
) -> float:
    """Floor of a decode step: weights and pairs, read once from memory.

    Args:
        slots: Pairs that each head attends to; at most ``budget + buffer``.
    """
    weights = model.parameters_read(batch) * WIDTH / world
    return (weights + batch * full_bytes(model, slots, world)) / gpu.bandwidth


def reduced_bytes(model: ModelSize, batch: int) -> int:
    """Bytes that one all-reduce of a decode step sums: the hidden states."""
    return batch * model.hidden_size * WIDTH


def communication_seconds(
    model: ModelSize, batch: int, gpu: Accelerator = H200, world: int = 1
) -> float:
    """The all-reduces of a tensor-parallel step: two per layer, after attention and after the MLP.

    A ring sends ``2 (world - 1) / world`` times the data over each link, after a latency.
    """
    if world == 1:
        return 0.0
    sent = 2 * (world - 1) / world * reduced_bytes(model, batch)
    return 2 * model.num_layers * (gpu.latency + sent / gpu.link)


def turning_batch(model: ModelSize, gpu: Accelerator = H200, world: int = 8) -> int:
    """The batch from which an all-reduce takes longer for its data than for its latency."""
    sent = 2 * (world - 1) / world * reduced_bytes(model, 1)
    return int(-(-gpu.latency * gpu.link // sent))


def pages(slots: int, page: int) -> int:
    """Pages of ``page`` slots that one head needs."""
    return -(-slots // page)


NODE, RACK = 8, 32
WORLDS = (1, 2, 4, 8)
BATCHES = (1, 8, 64, 256)
TABLE_BUDGET = 1024  # of the tables of times
PAGES = (16, 64, 256)
NOT_HELD = "-"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_held(model: ModelSize, batch: int, world: int) -> bool:
    each = sequence_bytes(model, TABLE_BUDGET, world=world)
    return sequences(model, each, world=world) >= batch


def _time(part: float, whole: float, shown: float) -> str:
    return f"{shown * 1e3:.2f} ({part / whole:.0%})"


def bytes_table() -> str:
    """Weights, and a sequence at each budget and with a full cache."""

    def row(model: ModelSize) -> list[str]:
        slots = [f"{sequence_bytes(model, budget) / 1e6:,.1f}" for budget in BUDGETS]
        full = f"{full_bytes(model, FULL_CONTEXT) / 1e6:,.0f}"
        return [model.name, f"{weight_bytes(model) / 1e9:.2f}", *slots, full]

    budgets = [f"{budget:,}, MB" for budget in BUDGETS]
    head = ["model", "weights, GB", *budgets, f"full, {FULL_CONTEXT:,} tokens, MB"]
    return _table(head, map(row, MODELS))


def sequences_table() -> str:
    """Sequences in flight per GPU, by tensor-parallel world size."""

    def row(model: ModelSize, world: int) -> list[str]:
        caches = [sequence_bytes(model, budget, world=world) for budget in BUDGETS]
        caches.append(full_bytes(model, FULL_CONTEXT, world))
        held = (sequences(model, each, world=world) // world for each in caches)
        return [model.name, str(world), *(f"{number:,}" if number else NOT_HELD for number in held)]

    head = ["model", "TP", *(f"{budget:,}" for budget in BUDGETS), f"full, {FULL_CONTEXT:,}"]
    return _table(head, (row(model, world) for model in MODELS for world in WORLDS))


def node_table() -> str:
    """Sequences that a node and a rack hold, each copy on the fewest GPUs that hold the model."""
    places = [(gpus, budget) for gpus in (NODE, RACK) for budget in (BUDGETS[0], BUDGETS[-1])]

    def row(model: ModelSize) -> list[str]:
        world = smallest_world(model)
        caches = {budget: sequence_bytes(model, budget, world=world) for _, budget in places}
        held = {b: sequences(model, each, world=world) for b, each in caches.items()}
        numbers = [f"{gpus // world * held[budget]:,}" for gpus, budget in places]
        return [model.name, str(world), *numbers]

    head = ["model", "GPUs per copy", *(f"{gpus} GPUs, {budget:,}" for gpus, budget in places)]
    return _table(head, map(row, MODELS))


def floor_table() -> str:
    """Milliseconds of a decode step on the fewest GPUs, and the share of them that slots take."""

    def row(model: ModelSize) -> list[str]:
        world = smallest_world(model)
        return [model.name, str(world), *(cell(model, batch, world) for batch in BATCHES)]

    def cell(model: ModelSize, batch: int, world: int) -> str:
        if not _is_held(model, batch, world):
            return NOT_HELD
        total = step_seconds(model, batch, TABLE_BUDGET + BUFFER, world=world)
        return _time(total - step_seconds(model, batch, 0, world=world), total, total)

    return _table(["model", "TP", *(f"batch {b}" for b in BATCHES)], map(row, MODELS))


def communication_table() -> str:
    """Milliseconds of a step's all-reduces, and their share of the step."""

    def row(model: ModelSize, batch: int) -> list[str]:
        cells = (cell(model, batch, world) for world in WORLDS[1:])
        return [model.name, str(batch), *cells, f"{turning_batch(model):,}"]

    def cell(model: ModelSize, batch: int, world: int) -> str:
        if not _is_held(model, batch, world):
            return NOT_HELD
        talk = communication_seconds(model, batch, world=world)
        step = step_seconds(model, batch, TABLE_BUDGET + BUFFER, world=world)
        return _time(talk, talk + step, talk)

    head = ["model", "batch", *(f"TP {world}" for world in WORLDS[1:]), "turning batch, TP 8"]
    return _table(head, (row(model, batch) for model in MODELS for batch in (8, 256)))


def page_table() -> str:
    """Pages of one head, and the slots of them that stay unused."""

    def cell(slots: int, page: int) -> str:
        count = pages(slots, page)
        return f"{count} ({count * page - slots})"

    sizes = [budget + BUFFER for budget in BUDGETS]
    rows = ([f"{slots:,}", *(cell(slots, page) for page in PAGES)] for slots in sizes)
    return _table(["budget + buffer", *(f"pages of {page}" for page in PAGES)], rows)


TABLES = {
    "bytes": bytes_table,
    "sequences": sequences_table,
    "node": node_table,
    "floor": floor_table,
    "communication": communication_table,
    "pages": page_table,
}

if __name__ == "__main__":
    for title, make in TABLES.items():
        print(f"<!-- table: {title} -->\n{make()}\n")
