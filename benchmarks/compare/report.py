"""What was measured, as tables, a plot, and goals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compare.contestants import TRAINED, left_out
from compare.measure import FULL, Outcome, Protocol

BEGIN, END = "<!-- compare: begin -->", "<!-- compare: end -->"
SHARES = (32, 16, 8)  # budgets of the short table, as fractions 1/n of a text
TRIMKV = "trimkv"

_STYLES = {
    TRIMKV: {"color": "#d55e00", "linewidth": 2.5, "marker": "o", "zorder": 5},
    "trimkv_beta_alone": {"color": "#d55e00", "linestyle": "--", "marker": "v"},
    "trimkv_age_alone": {"color": "#d55e00", "linestyle": ":", "marker": "^"},
    "random": {"color": "#000000", "linestyle": "--", "marker": "x"},
    "streaming_llm": {"color": "#000000", "linestyle": ":", "marker": "+"},
}


class Results:
    """Outcomes of one protocol, to be looked up.

    Args:
        protocol: how they came about.
        outcomes: in the order of the tables.
    """

    def __init__(self, protocol: Protocol, outcomes: Sequence[Outcome]) -> None:
        self.protocol, self.outcomes = protocol, list(outcomes)
        self._by_key = {(o.contestant, o.num_tokens, o.budget): o for o in outcomes}
        self.names = list(dict.fromkeys(o.contestant for o in outcomes if o.contestant != FULL))

    def full(self, num_tokens: int) -> Outcome:
        """The stock model's outcome on texts of one length."""
        return self._by_key[FULL, num_tokens, None]

    def get(self, name: str, num_tokens: int, budget: int) -> Outcome | None:
        """A contestant's outcome; None where it was not measured."""
        return self._by_key.get((name, num_tokens, budget))


@dataclass(frozen=True)
class Goal:
    """Something that was asked of TRIM-KV, and what came of it."""

    wanted: str
    num_tokens: int
    budget: int
    measured: str
    met: bool


def goals(results: Results) -> list[Goal]:
    """The goals that can be judged: none without TRIM-KV, none at budgets that were not run."""
    judged = []
    for num_tokens in results.protocol.budgets:
        for share, judge in ((8, _near_full), (16, _near_full), (16, _far_ahead), (32, _best)):
            budget = num_tokens // share
            own = results.get(TRIMKV, num_tokens, budget)
            if own is not None:
                judged.append(judge(results, own, share))
    return judged


def _near_full(results: Results, own: Outcome, share: int) -> Goal:
    least = {8: 0.97, 16: 0.9}[share]
    ratio = own.recall / results.full(own.num_tokens).recall
    return Goal(
        f"1/{share}: at least {least:.0%} of the full cache's recall",
        own.num_tokens,
        own.budget or 0,
        f"{ratio:.1%}",
        ratio >= least,
    )


def _far_ahead(results: Results, own: Outcome, share: int) -> Goal:
    best = _strongest_untrained(results, own)
    lead = own.recall - best.recall
    return Goal(
        f"1/{share}: at least 20 points above every policy that is not trained",
        own.num_tokens,
        own.budget or 0,
        f"{100 * lead:+.1f} points against {best.contestant} ({best.recall:.1%})",
        lead >= 0.2,
    )


def _best(results: Results, own: Outcome, share: int) -> Goal:
    best = _strongest_untrained(results, own)
    return Goal(
        f"1/{share}: the best of the table",
        own.num_tokens,
        own.budget or 0,
        f"{own.recall:.1%}, next {best.contestant} ({best.recall:.1%})",
        own.recall > best.recall,
    )


def _strongest_untrained(results: Results, own: Outcome) -> Outcome:
    rivals = [
        rival
        for name in results.names
        if name not in TRAINED
        and (rival := results.get(name, own.num_tokens, own.budget or 0)) is not None
    ]
    return max(rivals, key=lambda rival: rival.recall)


def document(results: Results, bare: Results, header: str) -> str:
    """All tables, as Markdown.

    Args:
        results: of the protocol that protects some slots from every policy.
        bare: of the one that protects none.
        header: stands above them.
    """
    parts = [header]
    for title, part in (("", results), (", nothing protected", bare)):
        parts += [f"### In short{title}: recall, in %", short_table(part)]
        if judged := goals(part):
            parts += [f"### What was asked of TRIM-KV{title}", _goals_table(judged)]
    for num_tokens in results.protocol.budgets:
        full = results.full(num_tokens)
        for title, cell, line in (
            ("recall, in %", _recall, _recall(full)),
            ("KL(full || bounded), in thousandths of a nat", lambda o: f"{1e3 * o.kl:.0f}", "0"),
            ("top-1 agreement with the full cache, in %", lambda o: f"{100 * o.top1:.1f}", "100.0"),
            (
                "free answers: length, the full cache's being 1",
                lambda o, full=full: f"{o.answer_tokens / full.answer_tokens:.2f}",
                "1.00",
            ),
            (
                "free continuations: repeated 4-grams, in %",
                lambda o: f"{100 * o.repetition:.0f}",
                f"{100 * full.repetition:.0f}",
            ),
        ):
            parts.append(f"### Texts of {num_tokens:,} tokens: {title}")
            parts.append(_budget_table(results, num_tokens, cell, line))
    parts += ["### Bytes of a text's cache", _bytes_table(results)]
    parts += ["### Left out", _table(("policy", "why"), left_out().items())]
    return "\n\n".join(parts)


def short_budgets(num_tokens: int) -> list[int]:
    """1/32, 1/16 and 1/8 of a text."""
    return [num_tokens // share for share in SHARES]


def short_table(results: Results) -> str:
    """Recall at 1/32, 1/16 and 1/8 of each text."""
    columns = [
        (num_tokens, budget)
        for num_tokens in results.protocol.budgets
        for budget in short_budgets(num_tokens)
        if budget in results.protocol.bounding(num_tokens)
    ]
    header = ("policy", *(f"{budget} of {num_tokens:,}" for num_tokens, budget in columns))
    full = (FULL, *(_recall(results.full(num_tokens)) for num_tokens, _ in columns))
    rows = [
        (name, *(_cell(results.get(name, *column), _recall) for column in columns))
        for name in results.names
    ]
    return _table(header, [full, *rows])


def _budget_table(
    results: Results, num_tokens: int, cell: Callable[[Outcome], str], full: str
) -> str:
    budgets = results.protocol.budgets[num_tokens]
    rows = [
        (name, *(_cell(results.get(name, num_tokens, budget), cell) for budget in budgets))
        for name in results.names
    ]
    return _table(("budget", *map(str, budgets)), [(FULL, *[full] * len(budgets)), *rows])


def _bytes_table(results: Results) -> str:
    num_tokens = max(results.protocol.budgets)
    budget = max(b for b in results.protocol.bounding(num_tokens) if b * SHARES[1] <= num_tokens)
    full = results.full(num_tokens)
    rows = [
        (
            outcome.contestant,
            f"{outcome.kv_bytes:,}",
            f"{outcome.state_bytes:,}",
            f"{outcome.state_bytes / full.state_bytes:.1%}",
        )
        for outcome in [full, *(results.get(name, num_tokens, budget) for name in results.names)]
        if outcome is not None
    ]
    columns = (f"budget {budget} of {num_tokens:,}", "keys and values", "all state", "of full")
    return _table(columns, rows)


def _goals_table(judged: Sequence[Goal]) -> str:
    rows = [
        (g.wanted, f"{g.num_tokens:,}", str(g.budget), g.measured, "yes" if g.met else "**no**")
        for g in judged
    ]
    return _table(("wanted at this share of the text", "text", "budget", "measured", "met"), rows)


def _recall(outcome: Outcome) -> str:
    return f"{100 * outcome.recall:.1f}"


def _cell(outcome: Outcome | None, cell: Callable[[Outcome], str]) -> str:
    return "refused" if outcome is None else cell(outcome)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def insert(page: str, tables: str) -> str:
    """Put tables into a page, between its markers.

    Raises:
        ValueError: the page does not have both markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"page: expected the markers {BEGIN} and {END}, got a page without them")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def plot(results: Results, path: Path) -> None:
    """Recall against budget, a panel per length of text, the full cache as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = list(results.protocol.budgets)
    figure, panels = pyplot.subplots(
        1, len(lengths), figsize=(5.2 * len(lengths) + 1.6, 4.6), sharey=True, squeeze=False
    )
    others = [name for name in results.names if name not in _STYLES]
    colors = dict(zip(others, pyplot.get_cmap("tab20").colors, strict=False))
    for panel, num_tokens in zip(panels[0], lengths, strict=True):
        panel.axhline(100 * results.full(num_tokens).recall, color="#888888", label="full cache")
        for name in results.names:
            measured = [
                outcome
                for budget in results.protocol.budgets[num_tokens]
                if (outcome := results.get(name, num_tokens, budget)) is not None
            ]
            style = _STYLES.get(name, {"color": colors.get(name), "linewidth": 1.2, "marker": "."})
            panel.plot(
                [outcome.budget for outcome in measured],
                [100 * outcome.recall for outcome in measured],
                label=name,
                **style,
            )
        budgets = results.protocol.bounding(num_tokens)
        panel.set_xscale("log", base=2)
        panel.set_xticks(budgets, map(str, budgets))
        panel.minorticks_off()
        panel.set_title(f"texts of {num_tokens:,} tokens")
        panel.set_xlabel("budget: pairs kept per head")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("recall, % of all facts")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1 - 1.6 / figure.get_figwidth(), 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
