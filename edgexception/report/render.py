"""A run's record as a page of Markdown."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from edgexception.report.record import Estimate, Fidelity, Report, Share, row_name


def to_markdown(report: Report) -> str:
    """Return the report as Markdown; what was not measured says so and shows no number."""
    environment = Environment(
        loader=PackageLoader("edgexception.report"),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - Markdown, and `cell` escapes what came from files
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        share=_share, sqnr=_sqnr, estimate=_estimate, cell=_cell, mib=_mib, row_name=row_name
    )
    return environment.get_template("report.md.j2").render(report=report)


def _share(share: Share | None) -> str:
    if share is None:
        return "not measured"
    percent = f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"
    return f"{share.successes}/{share.trials} = {percent}"


def _sqnr(fidelity: Fidelity | None) -> str:
    if fidelity is None:
        return "not measured"
    return "equal" if fidelity.sqnr_db is None else f"{fidelity.sqnr_db:.1f} dB"


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.2f}x ({estimate.low:.2f} to {estimate.high:.2f})"


def _cell(text: object) -> str:
    """Keep a text from a file inside its table cell, and from being read as HTML or Markdown."""
    plain = " ".join(str(text).split())
    for character in "\\`*_[]<>|#":
        plain = plain.replace(character, f"\\{character}")
    return plain


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f} MiB"
