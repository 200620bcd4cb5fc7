"""The figures of a measurement by domain, as a table with their mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bitmill.report import formatting
from bitmill.report.metrics import Measurement, MetricColumn, metric_columns

MEAN = "mean"
INTERVAL = "95 % interval"


@dataclass(frozen=True)
class DomainTable:
    """Rows of domains, the last one their mean.

    columns: headers, the first one of the domains.
    rows: one text per column.
    """

    columns: list[str]
    rows: list[list[str]]


def domains_of(measurement: Measurement) -> dict[str, Measurement]:
    """Return the figures of each domain of a measurement; empty where it has none."""
    found = measurement.get("domains")
    return found if isinstance(found, dict) and all(isinstance(of, dict) for of in found.values()) else {}


def latest_with_domains(measured: Iterable[Measurement]) -> Measurement | None:
    """Return the last measurement that has domains, one through an ordinary cache before all others."""
    found = sorted((m for m in measured if domains_of(m)), key=lambda m: m.get("kv_method") is None)
    return found[-1] if found else None


def worst_domain(measurement: Measurement) -> str | None:
    """Return the domain of the largest KL divergence; None where none was compared with the float model."""
    domains = domains_of(measurement)
    compared = [name for name, of in domains.items() if of.get("kl_divergence") is not None]
    return max(compared, key=lambda name: float(domains[name]["kl_divergence"]), default=None)


def compared_columns(domains: Mapping[str, Measurement]) -> list[MetricColumn]:
    """Return the columns that every domain has a value for; none without domains."""
    if not domains:
        return []
    columns = metric_columns(domains.values())
    return [column for column in columns if all(of.get(column.key) is not None for of in domains.values())]


def domain_table(measurement: Measurement) -> DomainTable | None:
    """Return the figures of every domain and their mean; None where the measurement has no domains."""
    domains = domains_of(measurement)
    if not domains:
        return None
    columns = compared_columns(domains)
    intervals = {c.key for c in columns if c.interval and measurement.get(c.interval)}
    headers = ["domain", "windows"]
    for column in columns:
        headers += [column.column, *([INTERVAL] if column.key in intervals else [])]
    whole = {**measurement, "windows": sum(of["windows"] for of in domains.values())}
    rows = []
    for name, of in [*domains.items(), (MEAN, whole)]:
        row = [name, str(of["windows"])]
        for column in columns:
            row += [column.display(of), *([column.display_interval(of)] if column.key in intervals else [])]
        rows.append([cell.replace(formatting.GAP, " ") for cell in row])
    return DomainTable(headers, rows)
