"""Tables into pages: results/*/tables, docs/evidence.md and REPRODUCING.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lrpet.config import PROFILES
from lrpet.experiments import GRADIENT, MAIN, OBJECTS
from lrpet.files import write_file
from lrpet.paths import has_own_results, project_file, results_root
from lrpet.registry import metric_of
from lrpet.tables.accuracy import accuracy_table, imagenet_table, related_table
from lrpet.tables.choice import repeats_table, selection_table
from lrpet.tables.claims import HIGHER, ablation_table, claims_table, differences
from lrpet.tables.costs import NO_RANKS, NOT_HERE, cost_table
from lrpet.tables.gradient_projection import gradient_tables
from lrpet.tables.objects import object_tables
from lrpet.tables.rows import NOT_RUN, profile_runs, published
from lrpet.tables.time_spent import replication_cost

__all__ = ["headline", "summary_of", "write_pages", "write_tables"]


def headline(profile: str) -> str:
    """Return the numbers of a profile that matter most: accuracy and cost of main rows, claims' verdicts."""
    if profile in GRADIENT:
        name, table = next(iter(gradient_tables(profile).items()))
        return f"{name} of profile {profile}:\n{_markdown(table)}"
    if profile in OBJECTS:
        texts = [
            f"{name} of profile {profile}:\n{_markdown(t)}" for name, t in object_tables(profile).items()
        ]
        return "\n".join(texts)
    runs = profile_runs(profile)
    table = accuracy_table(runs[runs.feeds.isin(MAIN)], published())
    metric = metric_of(runs)
    unit = f", {metric.unit}" if metric.unit else ""
    lines = [
        f"  {r.network:10s} {r.method:32s} {r.macs_m:>8s} M MACs  {r[metric.column]}"
        for _, r in table.iterrows()
    ]
    claims = claims_table(runs)
    counts = ", ".join(f"{n} {verdict}" for verdict, n in claims.verdict.value_counts().items())
    return "\n".join(
        [f"{metric.title} of profile {profile}, last epoch{unit}:", *lines, f"claims of the paper: {counts}"]
    )


def summary_of(tables: dict[str, pd.DataFrame]) -> str:
    """Return in words what the tables of a profile show, computed from them."""
    accuracy, decided = tables["accuracy"], tables["differences"]
    metric = metric_of(accuracy)
    points = "points" if metric.unit == "%" else metric.title
    done = (accuracy[metric.column] != NOT_RUN).sum()
    rest = f"; the others say “{NOT_RUN}”" if done < len(accuracy) else ""
    lines = [f"- {done} of {len(accuracy)} experiments have at least one finished run{rest}."]
    tested = decided[decided.verdict.isin(HIGHER.tested)] if len(decided) else decided
    if tested.empty:
        lines.append("- No pair of methods has the three seeds that a verdict needs.")
    for row in tested.itertuples():
        pair = f"{row.network}, {row.pair}, ratio {row.prune_ratio}"
        found = f"{row.difference} {points} (n={row.n}, 95 % interval {row.ci95})"
        lines.append(f"- {pair}: {found}: {row.verdict}.")
    cost = tables["cost"]
    known = cost[(cost.paper_macs_m != "") & ~cost.macs_m.isin((NOT_HERE, NO_RANKS))]
    off = [(float(r.macs_m) / float(r.paper_macs_m) - 1) * 100 for r in known.itertuples()]
    lines.append(
        f"- Multiply-adds of {len(known)} published networks are within {max(map(abs, off)):.2f} % of ours."
    )
    return "\n".join(lines)


def write_tables(profile: str, results: Path | None = None) -> dict[str, pd.DataFrame]:
    """Write every table of a profile to ``results/<profile>/tables``, .md and .csv; return them by name."""
    if profile in GRADIENT:
        tables = gradient_tables(profile, results)
    else:
        tables = {"cost": cost_table()} if profile in OBJECTS else _tables(profile, results)
    tables |= object_tables(profile, results)
    folder = (results or results_root()) / profile / "tables"
    for name, table in tables.items():
        write_file(folder / f"{name}.csv", table.to_csv(index=False))
        write_file(folder / f"{name}.md", _markdown(table))
    return tables


def _tables(profile: str, results: Path | None) -> dict[str, pd.DataFrame]:
    runs, reported = profile_runs(profile, results), published()
    tables = {
        "accuracy": accuracy_table(runs, reported),
        "claims": claims_table(runs),
        "differences": differences(runs),
        "ablations": ablation_table(runs),
        "replication": replication_cost(runs),
        "cost": cost_table(),
    }
    if profile == "short":
        tables["related"] = related_table()
    if profile == "selection":
        tables |= {"selection": selection_table(runs), "repeats": repeats_table(results)}
    if profile in ("imagenet", "imagenette"):
        tables["imagenet"] = imagenet_table(runs, reported, results)
    return tables


def _markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, disable_numparse=True) + "\n"


PAGES = ("docs/evidence.md", "REPRODUCING.md")  # whose tables come from the store


def write_pages(pages: Sequence[Path] | None = None) -> list[str]:
    """Put the tables of the store where the pages have a marker; return the new texts.

    A marker is ``<!-- table: short accuracy -->``, closed by ``<!-- end -->``; with columns,
    ``<!-- table: short accuracy: method top1_pct -->``, it shows these alone.

    Args:
        pages: the files to write; None is those two, which stay as they are where the store is not the
            project's own (``LRPET_RESULTS``).
    """
    asked = pages is not None
    pages = pages or [project_file(page) for page in PAGES]
    tables: dict[str, dict[str, pd.DataFrame]] = {}

    def fill(match: re.Match) -> str:
        marker, profile, name, columns = match.groups()
        if profile not in tables:
            tables[profile] = write_tables(profile)
        table = tables[profile][name]
        return f"{marker}\n{_markdown(table[columns.split()] if columns else table)}<!-- end -->"

    marked = re.compile(r"(<!-- table: ([\w-]+) (\w+)(?:: ([\w ]+))? -->).*?<!-- end -->", re.DOTALL)
    texts = [marked.sub(fill, path.read_text(encoding="utf-8")) for path in pages]
    for path, text in zip(pages, texts, strict=True) if asked or has_own_results() else ():
        write_file(path, text)
    # those of smoke are in no repository, and voc's networks need the extra "segmentation"
    for profile in set(PROFILES) - {"smoke", "voc", *tables}:
        write_tables(profile)
    return texts
