"""The chapters of a curve's report."""

from audits.estimators.rates import Interval
from audits.evidence import RunRecord
from audits.reports import run as chapters
from audits.reports.page import Figure, Section, Table, columns
from audits.reports.trust import trust_of
from audits.sweeps.figures import FIGURES, draw_figures
from audits.sweeps.grid import spelt
from audits.sweeps.points import Outcome, Point, cloud_view, rebuilt_views, seeds_note
from audits.sweeps.sweep import Sweep
from audits.wording import epsilon_text, percent, points
from privkd.privacy.events import Unit

_NONE = "not measured"


def curve_sections(curve: Sweep) -> tuple[Section, ...]:
    """In the order of a run's report, with the figures where their numbers are."""
    figures = {
        name: Figure(f"figures/{name}.svg", "svg", kinds["svg"], FIGURES[name])
        for name, kinds in draw_figures(curve.grid, curve.outcomes).items()
    }
    done = [row.facts for row in curve.outcomes if row.facts]
    if not done:
        return (_cells(curve),)
    return (
        _trust(curve, done),
        _leak(curve, figures.get("leak")),
        _ledger(curve, figures.get("theory")),
        _rebuilt(curve),
        _gain(curve, figures.get("utility")),
        _unprotected(done),
        _cells(curve),
        _provenance(curve, done),
    )


def _trust(curve: Sweep, done: list[RunRecord]) -> Section:
    """One drawing a channel."""
    firsts = [next((f for f in done if f.config.channel.kind == c), None) for c in curve.grid.channels]
    drawings = tuple(trust_of(facts.config, facts.elsewhere) for facts in firsts if facts)
    words = tuple(f"{drawn.channel}: {' '.join(drawn.words)}" for drawn in drawings)
    return Section("trust", "Who trusts whom", words, drawings)


def _leak(curve: Sweep, figure: Figure | None) -> Section:
    title = "What is leaked for what is gained"
    if figure is None:
        words = ("The runs were not audited, so nothing is known of leaks but the ledger's upper bounds.",)
        command = f"privkd curve --resume --audit membership --out {curve.path}"
        return Section("leak", title, words, commands=(command,))
    found = curve.points
    table = Table(
        f"The cloud's view, by channel and budget; {seeds_note(found, 'brackets')}",
        columns(
            "channel",
            "view",
            ">budget, epsilon per record",
            ">lower bound on epsilon, highest of all seeds",
            ">TPR at 1 % FPR",
            ">teacher gained over zero devices",
            ">seeds",
        ),
        tuple(_leak_row(point) for point in found),
    )
    words = ("Lower bounds hold with 95 % confidence in each run. A true-positive rate of 1 % is chance.",)
    return Section("leak", title, words, tables=(table,), figures=(figure,))


def _leak_row(point: Point) -> tuple[str, ...]:
    view = cloud_view(point.channel)
    lowers = [finding.epsilon_lower for row in point.outcomes if (finding := row.lower(view))]
    return (
        point.channel,
        view,
        epsilon_text(point.epsilon),
        f"≥ {max(lowers):.2f} per record" if lowers else _NONE,
        _or_none(point.leak_rate(view)),
        points(point.gain) if point.gain else _NONE,
        f"{point.seeds}",
    )


def _or_none(interval: Interval | None) -> str:
    return percent(interval) if interval else _NONE


def _ledger(curve: Sweep, figure: Figure | None) -> Section:
    table = Table(
        "Upper bounds by unit, over all rounds of a run; the largest of all seeds",
        columns(
            "channel",
            ">budget, epsilon per record",
            "unit",
            ">epsilon, upper bound",
            ">delta",
            "neighbouring relation",
            "composition",
        ),
        tuple(line for point in curve.points for line in _ledger_rows(point)),
    )
    words = (
        "DP-SGD protects a record, channel noise a device: the two are never added. Each run has a budget "
        "of its own; who releases several runs on the same records spends up to the sum of their budgets.",
    )
    shown = (figure,) if figure else ()
    return Section("ledger", "Privacy spent, and what attacks found", words, tables=(table,), figures=shown)


def _ledger_rows(point: Point) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for unit in Unit:
        rows = [row.facts.statement(unit) for row in point.outcomes if row.facts]
        known = [row for row in rows if row]
        if known:
            worst = max(known, key=lambda row: row.epsilon.high)
            low, high = epsilon_text(worst.epsilon.low), epsilon_text(worst.epsilon.high)
            found.append(
                (
                    point.channel,
                    epsilon_text(point.epsilon),
                    f"{unit}",
                    f"{high} [{low}, {high}] per {unit}",
                    f"{worst.delta:g}",
                    worst.neighbouring_relation,
                    worst.method,
                )
            )
    return found


def _rebuilt(curve: Sweep) -> Section:
    title = "Can anyone rebuild what was on a device?"
    rows = [
        (
            row.trial.channel,
            one.view,
            epsilon_text(row.trial.epsilon),
            f"{row.trial.seed}",
            f"{percent(one.success)} at {100 * one.success.confidence:g} %",
            f"{100 * one.success.chance:.1f} %",
            "none claimed" if one.ceiling is None else f"{100 * one.ceiling:.1f} % per {one.unit}",
            f"{one.success.trials:,}",
            one.verdict,
        )
        for row in curve.done
        for view in rebuilt_views(curve.outcomes)
        if (one := row.rebuilt(view))
    ]
    if not rows:
        command = f"privkd curve --resume --audit membership,reconstruction --out {curve.path}"
        return Section("rebuilt", title, ("Not audited: no reconstruction was tried.",), commands=(command,))
    table = Table(
        "Prior-aware matching: how often the secret record was picked among the candidates",
        columns(
            "channel",
            "view",
            ">budget, epsilon per record",
            ">seed",
            ">picked right [interval]",
            ">chance",
            ">ceiling from the ledger",
            ">trials",
            "verdict",
        ),
        tuple(rows),
    )
    return Section("rebuilt", title, tables=(table,))


def _gain(curve: Sweep, figure: Figure | None) -> Section:
    found = curve.points
    table = Table(
        f"Accuracy on the global test set; {seeds_note(found, 'brackets')}" if found else "Accuracy",
        columns(
            "channel",
            ">budget, epsilon per record",
            ">teacher",
            ">control: zero devices",
            ">students, mean",
            ">students, public distillation only",
        ),
        tuple(
            (
                point.channel,
                epsilon_text(point.epsilon),
                _or_none(point.accuracy(lambda a: a.teacher)),
                _or_none(point.accuracy(lambda a: a.control)),
                _or_none(point.accuracy(lambda a: a.students)),
                _or_none(point.accuracy(lambda a: a.public_only)),
            )
            for point in found
        ),
    )
    return Section("gain", "What it was good for", tables=(table,), figures=(figure,) if figure else ())


def _unprotected(done: list[RunRecord]) -> Section:
    """What is unprotected in any of the runs, said once."""
    said = dict.fromkeys(point for facts in done for point in chapters.unprotected(facts).points)
    return Section("unprotected", "What is not protected, in some run or in all", points=tuple(said))


def _cells(curve: Sweep) -> Section:
    table = Table(
        "Runs",
        columns("run", "channel", ">budget, epsilon per record", ">seed", "verdict", "why not done"),
        tuple(_cell(row) for row in curve.outcomes),
    )
    return Section("cells", "The runs", tables=(table,))


def _cell(row: Outcome) -> tuple[str, ...]:
    trial, standing = row.trial, row.facts.standing if row.facts else "failed"
    return (trial.folder, trial.channel, spelt(trial.epsilon), f"{trial.seed}", standing, row.reason)


def _provenance(curve: Sweep, done: list[RunRecord]) -> Section:
    digests = Table(
        "SHA-256 of each run's ledger and result",
        columns("run", "ledger.jsonl", "result.json"),
        tuple((facts.path.name, *_digests(facts)) for facts in done),
    )
    versions = Table("Versions that computed the first run", columns("library", "version"), done[0].versions)
    words = ("The command that makes an equal curve:",)
    return Section(
        "provenance", "Where it comes from", words, tables=(digests, versions), commands=(curve.grid.command,)
    )


def _digests(facts: RunRecord) -> tuple[str, str]:
    known = {file.name: file.digest for file in facts.files}
    return known.get("ledger.jsonl", "missing"), known.get("result.json", "missing")
