"""What was measured: a record per case and contestant, and how to ask for figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .measure import Timing

OK, ABSENT, FAILED, NOT_RUN = "ok", "absent", "failed", "not run"
APPEND, DECODE = "append_attention", "decode_attention"
MASS, NOTHING = "append_attention_mass", "append_attention_nothing"
FINISH = "append_attention_finish"  # which also norms, rotates and ends a gate
RAGGED = "ragged_append_attention"  # of heads that share a budget
RETENTION, SUM = "retention_attention", "retention_sum"
STEP = "generate"  # a whole decode step, see `decode`
FLEX = "flex"  # the part of the rivals that are compiled anew for each shape, beside ours again
REQUESTS = "serving"  # many requests at once, see `requests`
OUR_STEPS = ("trimkv_eager", "trimkv_compiled", "trimkv_loop")
SLOT_OPS = (
    APPEND,
    MASS,
    NOTHING,
    FINISH,
    DECODE,
    RAGGED,
    "evict",
    "fill_slots",
    "extend_attention",
)
OURS = (*SLOT_OPS, RETENTION, SUM, *OUR_STEPS)
# The ops that share a picture.
PICTURES = {
    "decode": ("decode", STEP),
    "evict": ("evict", "fill_slots"),
    "extend": ("extend", RAGGED),
    "retention": (RETENTION,),
    "sum": (SUM,),
}


@dataclass
class Record:
    """One contestant in one case. What was not measured is None.

    ``status`` is ``ok`` (computed, checked and, on a GPU, timed), ``absent`` (cannot run here),
    ``failed`` or ``not run`` (its part's time was up); ``note`` says why. Of a decode step,
    ``bytes`` are what it must read; ``compile`` counts graphs, breaks, skips and recompiles.
    ``part`` is the process that measured it: figures of one process are compared with each other.
    """

    op: str
    contestant: str
    shape: dict[str, Any]
    dtype: str
    status: str
    note: str | None = None
    launches: int | None = None
    replays: int | None = None
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    drift: float | None = None
    wall_us: float | None = None
    bytes: int | None = None
    gb_per_s: float | None = None
    copy_share: float | None = None
    flops: int | None = None
    tflop_per_s: float | None = None
    max_error: float | None = None
    relative_error: float | None = None
    peak_bytes: int | None = None
    tokens_per_s: float | None = None
    compile: dict[str, int] = field(default_factory=dict)
    clocks: dict[str, str] = field(default_factory=dict)
    part: str = ""

    def set_timing(
        self, timing: Timing, clocks: dict[str, str], copy_gb_per_s: float | None
    ) -> None:
        """Fill in a measurement and what follows from it; 1 GB is 10^9 bytes."""
        for name, value in asdict(timing).items():
            setattr(self, name, value)
        self.clocks = clocks
        if self.bytes is not None:
            self.gb_per_s = self.bytes / timing.median_us / 1e3
            self.copy_share = self.gb_per_s / copy_gb_per_s if copy_gb_per_s else None
        if self.flops is not None:
            self.tflop_per_s = self.flops / timing.median_us / 1e6

    @property
    def shape_text(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.shape.items())


class DeviceError(Exception):
    """The device is lost to this process; ``records`` are those of the case it was lost to."""

    def __init__(self, records: list[Record]) -> None:
        super().__init__("the device does not answer any more")
        self.records = records


def is_lost(error: Exception) -> bool:
    """Whether the device will fail whatever comes next: CUDA's errors stay with the process."""
    return "CUDA error" in str(error) and "out of memory" not in str(error)


def describe(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".strip().split("\n")[0][:200]


class NotMeasuredError(Exception):
    """A goal's figures are not among the results; the message says which."""


class Results:
    """Everything measured so far, and how to ask for it."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.records = list(records)

    def find(self, op: str, contestant: str, **shape: Any) -> list[Record]:
        """Timed records whose shape agrees with ``shape``; a tuple means any of its values."""
        wanted = {name: x if isinstance(x, tuple) else (x,) for name, x in shape.items()}
        return [
            record
            for record in self.records
            if record.op == op
            and record.contestant == contestant
            and record.median_us is not None
            and all(record.shape[name] in values for name, values in wanted.items())
        ]

    def one(self, op: str, contestant: str, **shape: Any) -> Record:
        """The only such record, but for what the part of FlexAttention repeats."""
        found = self.find(op, contestant, **shape)
        found = [record for record in found if record.part != FLEX] or found
        if len(found) != 1:
            where = " ".join(f"{name}={value}" for name, value in shape.items())
            raise NotMeasuredError(f"{contestant} at {where or op}: {self._reason(op, contestant)}")
        return found[0]

    def us(self, op: str, contestant: str, **shape: Any) -> float:
        """Median microseconds per launch."""
        return self.figure(self.one(op, contestant, **shape), "median_us")

    def ratio(self, op: str, rivals: Sequence[str], ours: str, **shape: Any) -> float:
        """The best rival's time over ours in its part, geometric mean over cases that have both."""
        ratios = []
        for record in self.find(op, ours, **shape):
            times = [
                self.figure(rival, "median_us")
                for name in rivals
                for rival in self.find(op, name, **record.shape)
                if rival.part == record.part
            ]
            if times:
                ratios.append(min(times) / self.figure(record, "median_us"))
        if not ratios:
            reasons = {name: self._reason(op, name) for name in (ours, *rivals)}
            raise NotMeasuredError("; ".join(f"{name}: {why}" for name, why in reasons.items()))
        return statistics.geometric_mean(ratios)

    def wall_ratio(self, op: str, rival: str, ours: str, **shape: Any) -> float:
        """As `ratio` for one case, in the time that Python sees."""
        times = [self.figure(self.one(op, x, **shape), "wall_us") for x in (rival, ours)]
        return times[0] / times[1]

    def figure(self, record: Record, name: str) -> float:
        """A number of a record that has to be there."""
        value = getattr(record, name)
        if value is None:
            raise NotMeasuredError(f"{record.contestant} has no {name}")
        return float(value)

    def _reason(self, op: str, contestant: str) -> str:
        notes = [
            record.note or "not timed"
            for record in self.records
            if record.op == op and record.contestant == contestant
        ]
        return notes[0] if notes else "its part was not run"
