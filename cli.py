"""The command line: parse, call one function, print."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from privkd.command_line import OneLineErrors, help_alone, print_version, with_settings
from privkd.options import OPTIONS
from privkd.plugins import load_siblings

load_siblings("attacks", "audits", "papers")

app = typer.Typer(
    cls=OneLineErrors,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Privacy-hardened distillation between a cloud teacher and on-device students."""
    help_alone(context)


Text = str | None
Plugin = Annotated[
    list[str] | None,
    typer.Option(help="A module or a .py file of yours that adds to privkd; repeat for more."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else.")]


def _path(text: Text) -> Path | None:
    return None if text is None else Path(text)


PARTY_TOML = """party.toml, as `privkd keys` writes it:

\b
rank = 0                      which party; the third party's is the number of aggregators
parties = 2                   aggregators
listen = "10.0.0.5:8440"      where devices and the cloud reach it
directory = "state-0"         spool and journal (paths are relative to this file)
sealing_key = "party-0.key"   X25519, PEM
noise_key = "party-0.noise"   32 bytes, secret
members = ["9f..", "07.."]    public keys by rank, the third party's last
[peers]                       the parties' own links, encrypted under their keys
host, port                    where rank 0 waits for the others
[tls]                         without it, loopback only
certificate, key              of this service
client_ca                     asks for client certificates; "cloud" opens and closes rounds;
                              loopback only without it
[limits]
minimum_devices = 2           this party releases nothing over fewer
max_rho                       most that a device pays in one round, in zCDP [no limit]
max_rho_total                 most that it pays in all rounds of which this party makes a
                              share, over restarts too [no limit]
request_seconds, start_seconds, step_seconds, hang_seconds, max_connections,
max_upload_bytes, keep_rounds, keep_results, lease_seconds, max_round_days
"""


@app.command()
@with_settings(*OPTIONS)
def train(
    *,
    settings: Mapping[str, Any],
    config: Annotated[Text, typer.Option(help="Settings as TOML.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, as a.b=value; repeat for more.")
    ] = None,
    plugin: Plugin = None,
    out: Annotated[Text, typer.Option(help="The run's folder. [runs/<time>]")] = None,
    resume: Annotated[Text, typer.Option(help="Continue the run in this folder.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print noise, steps and epsilon; train nothing.")
    ] = False,
    json_: Json = False,
) -> None:
    """Let private students teach the cloud teacher, within a stated budget."""
    from privkd.config import load_config
    from privkd.errors import ConfigError
    from privkd.plugins import load_plugins
    from privkd.secure.installed import check_channel

    if resume is not None:
        if settings or set_ or config or out or dry_run:
            words = "a run goes on with the settings it was started with; give no others"
            raise ConfigError(f"--resume {resume}: {words}")
        load_plugins(plugin or ())
        from privkd.run import resume as go_on
        from privkd.terminal import progress_on_stderr, show

        with progress_on_stderr() as progress:
            found = go_on(resume, progress=progress)
        return show(found, as_json=json_)
    # A typo is answered before the heavy libraries are loaded.
    added = {"plugins": tuple(plugin)} if plugin else {}
    wanted = load_config(_path(config), set_ or (), {**settings, **added})
    if dry_run:
        from privkd.prepared import forecast
        from privkd.terminal import show

        return show(forecast(wanted), as_json=json_)
    check_channel(wanted.channel)
    from privkd.run import train as run_training
    from privkd.terminal import announce, progress_on_stderr, show

    with progress_on_stderr() as progress:
        found = run_training(wanted, out=out, progress=progress, announce=announce)
    return show(found, as_json=json_)


@app.command()
@with_settings("data", "data_dir", "label", "drop", "devices")
def curve(
    *,
    epsilons: Annotated[
        Text, typer.Option(help="Record-level budgets, comma-separated; inf is no DP. [1,3,inf]")
    ] = None,
    channels: Annotated[
        Text, typer.Option(help="Of plain, noised, secure, comma-separated. [plain,noised,secure]")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs at each point; an interval needs two. [3]")] = None,
    audit: Annotated[
        Text, typer.Option(help="membership, reconstruction, both with a comma, or none. [membership]")
    ] = None,
    device_epsilon: Annotated[
        Text, typer.Option(help="Device-level budget of the noised channel. [8]")
    ] = None,
    shadows: Annotated[int | None, typer.Option(help="Shadow devices of each audit. [16]")] = None,
    targets: Annotated[int | None, typer.Option(help="Audited replays of each run. [8]")] = None,
    settings: Mapping[str, Any],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any setting of every run, as a.b=value; repeat for more. A curve starts from "
            "teacher.model.name=mlp, student.models=mlp and controls=false, to end within minutes.",
        ),
    ] = None,
    plugin: Plugin = None,
    jobs: Annotated[int | None, typer.Option(help="Cells at once, one thread each. [the cores]")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB for all cells together. [what is free]")] = None,
    out: Annotated[Text, typer.Option(help="The curve's folder. [runs/curve-<time>]")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the curve in --out, by default the latest; "
            "options given now widen or change it.",
        ),
    ] = False,
    json_: Json = False,
) -> None:
    """Train and audit a grid of runs, and draw leak against gain. Exit code 3 is an audit's alarm."""
    from audits.sweeps.sweep import sweep
    from privkd.terminal import show

    found = sweep(
        epsilons=epsilons,
        channels=channels,
        seeds=seeds,
        audits=audit,
        device_epsilon=device_epsilon,
        shadows=shadows,
        targets=targets,
        settings={**settings, **({"plugins": ",".join(plugin)} if plugin else {})},
        overrides=set_ or (),
        jobs=jobs,
        memory=memory,
        out=out,
        resume=resume,
        progress=True,
    )
    show(found, as_json=json_)


@app.command()
def report(
    path: Annotated[
        Text, typer.Argument(help="Folder of a run or of a curve. [the latest under runs/]")
    ] = None,
    out: Annotated[Text, typer.Option(help="Folder for the report. [the run's or curve's own]")] = None,
    plugin: Plugin = None,
    json_: Json = False,
) -> None:
    """Write what an officer reads: report.html, .md, .json, registry.yaml. Exit code 3 is an alarm in it."""
    from audits import report as write
    from privkd.plugins import load_plugins
    from privkd.terminal import show

    load_plugins(plugin or ())
    show(write(path, out), as_json=json_)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="Folder of a run or of a curve.")],
    second: Annotated[str, typer.Argument(help="Folder of another of the same kind.")],
    json_: Json = False,
) -> None:
    """Set two runs, or two curves, side by side: differences with intervals, settings, ledgers."""
    from audits import compare as beside
    from privkd.terminal import show

    show(beside(first, second), as_json=json_)


@app.command()
def keys(
    out: Annotated[str, typer.Option(help="Folder for keys, certificates and configurations.")],
    parties: Annotated[int, typer.Option(help="Number of aggregators.")] = 2,
    third_party: Annotated[
        bool, typer.Option("--third-party", help="Also a third party, which votes and norm checks need.")
    ] = False,
    host: Annotated[
        list[str] | None, typer.Option(help="Host of the services; repeat it for one each. [127.0.0.1]")
    ] = None,
    port: Annotated[int, typer.Option(help="Of the first service; the others' follow. 0 takes any.")] = 8440,
    device: Annotated[
        list[str] | None, typer.Option(help="Name of a device to make a client certificate for; repeat.")
    ] = None,
    tls: Annotated[bool, typer.Option("--tls/--no-tls", help="Make and use test certificates.")] = True,
) -> None:
    """Make the parties' keys, test certificates, and a configuration for each `privkd aggregator`."""
    from privkd.secure.keys import make_keys

    made = make_keys(
        Path(out),
        parties=parties,
        third_party=third_party,
        hosts=host or ["127.0.0.1"],
        port=port,
        devices=device or (),
        tls=tls,
    )
    typer.echo(made)


@app.command(help=f"Run one party of the secure channel as a service.\n\n\b\n{PARTY_TOML}")
def aggregator(
    config: Annotated[str, typer.Option(help="The party's settings, as TOML.")],
) -> None:
    """Run one party of the secure channel as a service."""
    from privkd.secure.service import serve

    serve(Path(config))


@app.command()
def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Install CrypTen where it is missing, without its dependencies.")
    ] = False,
) -> None:
    """Say what is missing on this machine, and the exact command that mends it."""
    from privkd.doctor import doctor_command

    sys.exit(doctor_command(fix=fix))


@app.command()
def settings(
    name: Annotated[
        Text, typer.Argument(help="A setting, or a group such as privacy or student.dp. [all]")
    ] = None,
    json_: Json = False,
) -> None:
    """List the settings of a run: what each takes, its default, and what it means."""
    from privkd.config.reference import settings_reference
    from privkd.terminal import show

    show(settings_reference(name), as_json=json_)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="The folder of a finished run.")],
    format_: Annotated[
        str, typer.Option("--format", help="torch (.pt2), onnx, executorch (.pte), or a plug-in's.")
    ] = "torch",
    device_index: Annotated[int, typer.Option(help="Number of the device whose student leaves.")] = 0,
    out: Annotated[Text, typer.Option(help="The file. [export/DEVICE in the run's folder]")] = None,
    plugin: Plugin = None,
    json_: Json = False,
) -> None:
    """Write a device's student with its preprocessing as one file that answers as the original does."""
    from privkd.runs.plugged import load_plugins_for

    load_plugins_for(Path(run), plugin or ())
    from privkd.export.formats import check_asked

    check_asked(format_, device_index, _path(out))
    from privkd.export.export import export as write
    from privkd.terminal import show

    show(write(Path(run), format_, device_index, _path(out)), as_json=json_)


audit = typer.Typer(
    callback=help_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Attack a run, or the mechanisms.",
)
app.add_typer(audit, name="audit")

AuditedRun = Annotated[Text, typer.Argument(help="The run's folder. [the latest under runs/]")]
AuditedView = Annotated[
    str,
    typer.Option(
        help="per_client_logits, secure_sum, secure_sum_colluding, teacher, student, gradient; all is "
        "what the run has but teacher, which takes long."
    ),
]
AuditedDevice = Annotated[int, typer.Option(help="Number of the audited device.")]


@audit.command()
def membership(
    run: AuditedRun = None,
    view: AuditedView = "all",
    attack: Annotated[
        str, typer.Option(help="One attack of the view, such as lira-online or label-distribution, or all.")
    ] = "all",
    shadows: Annotated[int, typer.Option(help="Shadow devices that the attacks learn from.")] = 64,
    targets: Annotated[int, typer.Option(help="Audited replays, each with its own coins.")] = 16,
    canaries: Annotated[str, typer.Option(help="natural, mislabelled or crafted.")] = "natural",
    device: AuditedDevice = 0,
    seed: Annotated[int, typer.Option(help="Decides the coins and the replays.")] = 0,
    plugin: Plugin = None,
    json_: Json = False,
) -> None:
    """Guess who is in a device's records, from what each view of a run shows. Exit code 3 is an alarm."""
    from audits.requests import MembershipRequest, load_plugins_of

    load_plugins_of(_path(run), plugin or ())
    request = MembershipRequest(
        view=view,
        attack=attack,
        shadows=shadows,
        targets=targets,
        canaries=canaries,
        device=device,
        seed=seed,
    )
    from audits import membership as attack_run
    from privkd.terminal import progress_on_stderr, show

    with progress_on_stderr() as progress:
        found = attack_run(run, request, progress=progress)
    show(found, as_json=json_)


@audit.command()
def reconstruction(
    run: AuditedRun = None,
    view: AuditedView = "all",
    attack: Annotated[
        str,
        typer.Option(
            help="paired-logits, training-based, class-prototype, prior-matching, informed-adversary, or all."
        ),
    ] = "all",
    trials: Annotated[int, typer.Option(help="Audited replays of each game, each with its own secret.")] = 50,
    shadows: Annotated[int, typer.Option(help="Replays of each candidate that the attacks learn from.")] = 4,
    candidates: Annotated[int, typer.Option(help="Records among which the secret one is drawn.")] = 10,
    device: AuditedDevice = 0,
    seed: Annotated[int, typer.Option(help="Decides the secrets and the replays.")] = 0,
    plugin: Plugin = None,
    json_: Json = False,
) -> None:
    """Rebuild what a device held, from what each view of a run shows. Exit code 3 is an alarm."""
    from audits.requests import ReconstructionRequest, load_plugins_of

    load_plugins_of(_path(run), plugin or ())
    request = ReconstructionRequest(
        view=view,
        attack=attack,
        trials=trials,
        shadows=shadows,
        candidates=candidates,
        device=device,
        seed=seed,
    )
    from audits import reconstruction as attack_run
    from privkd.terminal import progress_on_stderr, show

    with progress_on_stderr() as progress:
        found = attack_run(run, request, progress=progress)
    show(found, as_json=json_)


@audit.command()
def mechanism(
    seed: Annotated[int, typer.Option(help="Decides the trials.")] = 0,
    json_: Json = False,
) -> None:
    """Put worst-case inputs through the channels and the DP-SGD step. Exit code 3 is an alarm."""
    from audits import mechanism as attack_mechanisms
    from privkd.terminal import progress_on_stderr, show

    with progress_on_stderr() as progress:
        found = attack_mechanisms(seed=seed, progress=progress)
    show(found, as_json=json_)


papers = typer.Typer(
    callback=help_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Reproduce the papers' claims: published beside ours.",
)
app.add_typer(papers, name="papers")


@papers.command("list")
def papers_list(
    json_: Json = False,
) -> None:
    """Say which papers there are, and at which scales each can be run."""
    from papers.catalogue import studies_table, studies_tree
    from privkd.terminal import print_json

    if json_:
        print_json(studies_tree())
    else:
        from rich.console import Console

        Console().print(studies_table())


@papers.command("show")
def papers_show(
    name: Annotated[str, typer.Argument(help="As `privkd papers list` calls it.")],
) -> None:
    """Print a paper's page: claims, symbols, files, commands and figures, as Markdown."""
    from papers.catalogue import study_named

    sys.stdout.write(study_named(name).page)


@papers.command("run")
def papers_run(
    name: Annotated[str, typer.Argument(help="As `privkd papers list` calls it.")],
    scale: Annotated[Text, typer.Option(help="Data and sizes. [the paper's first]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The scale `quick`: about a minute.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Runs of each case. [the scale's]")] = None,
    data_dir: Annotated[Text, typer.Option(help="Folder of mnist or cifar10.")] = None,
    out: Annotated[
        str, typer.Option(help="Where runs are kept; those that are there are resumed or reused.")
    ] = "runs/papers",
    json_: Json = False,
) -> None:
    """Run a paper's claims, or what is left of them, and print published beside ours."""
    from papers.reproduce import reproduce
    from privkd.terminal import show

    found = reproduce(name, scale=scale, quick=quick, seeds=seeds, data_dir=data_dir, out=out, progress=True)
    show(found, as_json=json_)


if __name__ == "__main__":
    app()
