"""The command line: parse, call one function, print."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from privkd.command_line import OneLineErrors, group_or_command, help_alone, print_version, with_settings
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
crl                           certificates that client_ca took back
[status]
listen = "127.0.0.1:9440"     /healthz, /readyz, /status and /metrics over HTTP; loopback only
[log]
level = "info"                JSON lines on stderr: "debug", "info", "warning" or "error"
[limits]
minimum_devices = 2           this party releases nothing over fewer
max_rho                       most that a device pays in one round, in zCDP [no limit]
max_rho_total                 most that it pays in all rounds of which this party makes a
                              share, over restarts too [no limit]
request_seconds, start_seconds, step_seconds, hang_seconds, calls_per_caller,
calls_per_second, max_upload_bytes, max_bytes_at_once, keep_rounds, keep_results,
lease_seconds, max_round_days
\b
SIGHUP: reads [tls] and [limits] anew. SIGTERM: ends within seconds, and goes on where it was.
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
def demo(
    out: Annotated[Text, typer.Option(help="Folder for the two runs. [one each under runs/]")] = None,
    json_: Json = False,
) -> None:
    """Show the point in two minutes: devices with and without protection, and what the cloud finds out."""
    from audits import demo as show_both
    from privkd.terminal import progress_on_stderr, show

    with progress_on_stderr() as progress:
        found = show_both(out, progress=progress)
    show(found, as_json=json_)


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
    sign: Annotated[Text, typer.Option(help="Your name: you sign today for what the report says.")] = None,
    plugin: Plugin = None,
    json_: Json = False,
) -> None:
    """Write what an officer reads: report.html, .md, .json, registry.yaml. Exit code 3 is an alarm in it."""
    from audits import report as write
    from privkd.plugins import load_plugins
    from privkd.terminal import show

    load_plugins(plugin or ())
    show(write(path, out, sign), as_json=json_)


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


keys = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Make keys and certificates: each member its own, or with --out a whole group's on one machine.",
)
app.add_typer(keys, name="keys")

KeysOut = Annotated[str, typer.Option("--out", help="Folder of this member alone.")]
AuthorityFolder = Annotated[str, typer.Option("--authority", help="The authority's folder.")]
Fingerprint = Annotated[
    Text, typer.Option(help="Refuse another key than that of this fingerprint; ask nothing.")
]
PartyFile = Annotated[str, typer.Option("--config", help="The party's settings, as TOML.")]
Days = Annotated[int | None, typer.Option(help="Days that the certificate holds. [365]")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="Address or name by which others reach it; repeat."),
]


@keys.callback()
def keys_here(
    context: typer.Context,
    out: Annotated[Text, typer.Option(help="Folder for keys, certificates and configurations.")] = None,
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
    tls: Annotated[bool, typer.Option("--tls/--no-tls", help="Make and use certificates.")] = True,
) -> None:
    """Make keys and certificates: each member its own, or with --out a whole group's on one machine.

    With --out, and for one machine only: the keys of all parties, an authority, and a configuration for each
    `privkd aggregator` in one folder.
    """
    if out is None or context.invoked_subcommand is not None:
        group_or_command(context, needed="--out")
        return
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


@keys.command("authority")
def keys_authority(
    out: Annotated[str, typer.Option(help="The authority's folder; its key never leaves it.")],
    days: Annotated[int | None, typer.Option(help="Days that the authority holds. [3650]")] = None,
) -> None:
    """Make the authority that approves certificates, on the machine of whoever runs it."""
    from privkd.secure.enrolment import make_authority

    typer.echo(make_authority(Path(out), days=days))


@keys.command("party")
def keys_party(
    out: KeysOut,
    rank: Annotated[int, typer.Option(help="Which party; the third party's is the number of aggregators.")],
    parties: Annotated[int, typer.Option(help="Number of aggregators.")] = 2,
    third_party: Annotated[
        bool, typer.Option("--third-party", help="The group has a third party; all parties give this alike.")
    ] = False,
    host: Hosts = None,
    port: Annotated[int, typer.Option(help="Of its service.")] = 8440,
    listen: Annotated[Text, typer.Option(help="HOST:PORT to bind. [the first --host]")] = None,
) -> None:
    """Make one party's keys, its request for a certificate, and its party.toml; print its public key."""
    from privkd.secure.enrolment import make_party

    made = make_party(
        Path(out),
        rank=rank,
        parties=parties,
        third_party=third_party,
        hosts=host or (),
        port=port,
        listen=listen,
    )
    typer.echo(made)


@keys.command("device")
def keys_device(
    name: Annotated[str, typer.Argument(help="The device's name.")],
    out: KeysOut,
) -> None:
    """Make a device's TLS key on the device, and its request for a certificate."""
    from privkd.secure.enrolment import make_device

    typer.echo(make_device(name, Path(out)))


@keys.command("cloud")
def keys_cloud(
    out: KeysOut,
    host: Hosts = None,
) -> None:
    """Make the cloud's TLS key on its host, and its request for a certificate."""
    from privkd.secure.enrolment import make_cloud

    typer.echo(make_cloud(Path(out), hosts=host or ()))


@keys.command("approve")
def keys_approve(
    request: Annotated[str, typer.Argument(help="The request, NAME.csr.")],
    authority: AuthorityFolder,
    role: Annotated[str, typer.Option(help="What to let it be: device, cloud or party.")] = "device",
    days: Days = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="It may have a certificate already, for the same key.")
    ] = False,
    fingerprint: Fingerprint = None,
) -> None:
    """Show who asks for what, and give it its certificate."""
    from privkd.secure.enrolment import approve_shown

    ask = typer.confirm if sys.stdin.isatty() and fingerprint is None else None
    made = approve_shown(
        Path(request), Path(authority), role=role, days=days, renew=renew, expected=fingerprint, ask=ask
    )
    typer.echo(made)


@keys.command("add-device")
def keys_add_device(
    name: Annotated[str, typer.Argument(help="The device's name.")],
    out: KeysOut,
    authority: AuthorityFolder,
    days: Days = None,
) -> None:
    """Make a device's key and approve it at once, on the authority's machine; no party is touched."""
    from privkd.secure.enrolment import add_device

    typer.echo(add_device(name, Path(out), Path(authority), days=days))


@keys.command("group")
def keys_group(
    members: Annotated[list[str] | None, typer.Argument(help="Files member-N.toml of the parties.")] = None,
    config: Annotated[
        Text, typer.Option(help="The party.toml to fill. [print the table for the cloud and devices]")
    ] = None,
    member: Annotated[
        list[str] | None, typer.Option("--member", help="RANK=KEY in hexadecimal; repeat for more.")
    ] = None,
) -> None:
    """Fill a party's members list from the public keys that the parties published."""
    from privkd.secure.enrolment import aggregators_table, group

    files = [Path(name) for name in members or ()]
    typer.echo(
        aggregators_table(files) if config is None else group(files, config=Path(config), keys=member or ())
    )


@keys.command("renew")
def keys_renew(
    certificate: Annotated[str, typer.Argument(help="The certificate, NAME.pem, which may have expired.")],
    key: Annotated[Text, typer.Option(help="Its private key. [NAME.key beside it]")] = None,
    host: Annotated[list[str] | None, typer.Option(help="Where it serves from now on. [as before]")] = None,
) -> None:
    """Ask for a certificate anew, for the same name and key."""
    from privkd.secure.enrolment import renew

    typer.echo(renew(Path(certificate), key=_path(key), hosts=host or ()))


@keys.command("revoke")
def keys_revoke(
    name: Annotated[str, typer.Argument(help="Whose certificates are taken back.")],
    authority: AuthorityFolder,
) -> None:
    """Take back a member's certificates, and write crl.pem for the parties."""
    from privkd.secure.enrolment import revoke

    typer.echo(revoke(name, Path(authority)))


@keys.command("rotate")
def keys_rotate(
    config: PartyFile,
) -> None:
    """Give a party a new sealing key beside the old one."""
    from privkd.secure.enrolment import rotate

    typer.echo(rotate(Path(config)))


@keys.command("show")
def keys_show(
    path: Annotated[str, typer.Argument(help="A key, request, certificate or party.toml, or a folder.")],
    json_: Json = False,
) -> None:
    """Say whose a file is, its public key, and how long it holds. Exit code 2 if it is of no use any more."""
    from privkd.secure.inventory import show_keys

    show_keys(Path(path), as_json=json_)


@app.command(help=f"Run one party of the secure channel as a service.\n\n\b\n{PARTY_TOML}")
def aggregator(
    config: Annotated[str, typer.Option(help="The party's settings, as TOML.")],
    status: Annotated[
        bool, typer.Option("--status", help="Say how the running service is, in place of running one.")
    ] = False,
    json_: Json = False,
) -> None:
    """Run one party of the secure channel as a service."""
    if status:
        from privkd.secure.party_state import party_state
        from privkd.terminal import show

        show(party_state(Path(config)), as_json=json_)
        return
    from privkd.errors import ConfigError
    from privkd.secure.service import serve

    if json_:
        raise ConfigError("--json is for --status: a service logs JSON lines on stderr by itself")
    serve(Path(config))


@app.command()
def doctor(
    fix: Annotated[
        bool, typer.Option("--fix", help="Install CrypTen where it is missing, without its dependencies.")
    ] = False,
    role: Annotated[
        Text, typer.Option(help="aggregator, device or cloud: a preflight over its group instead.")
    ] = None,
    config: Annotated[Text, typer.Option(help="The role's settings, as TOML.")] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="https://HOST:PORT of an aggregator's other parties; repeat.")
    ] = None,
    json_: Json = False,
) -> None:
    """Say what is missing on this machine, or what would stop a role's round, and what mends it."""
    if role is not None:
        from privkd.preflight import preflight_command

        sys.exit(preflight_command(role, _path(config), peers=peer or (), as_json=json_))
    from privkd.doctor import doctor_command

    sys.exit(doctor_command(fix=fix, as_json=json_))


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


cloud = typer.Typer(
    callback=help_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Run the cloud of devices that are elsewhere.",
)
app.add_typer(cloud, name="cloud")

CloudConfig = Annotated[str, typer.Option("--config", help="The cloud's settings, as TOML.")]


@cloud.command("init")
def cloud_init(config: CloudConfig = "cloud.toml") -> None:
    """Write a commented cloud.toml."""
    from privkd.deployment.cloud import init

    typer.echo(init(Path(config)))


@cloud.command("enrol")
def cloud_enrol(
    name: Annotated[str, typer.Argument(help="The device's: the common name of its certificate.")],
    certificate: Annotated[
        Text, typer.Option(help="A copy of that certificate, so that status says when it ends.")
    ] = None,
    request: Annotated[
        Text,
        typer.Option(help="Its request, NAME.csr, to be approved as by `privkd keys approve`."),
    ] = None,
    authority: Annotated[str, typer.Option(help="With --request: the authority's folder.")] = "authority",
    fingerprint: Fingerprint = None,
    config: CloudConfig = "cloud.toml",
) -> None:
    """Put a device on the roster, before the plan is published."""
    from privkd.deployment.cloud import Approval, enrol

    ask = typer.confirm if sys.stdin.isatty() and fingerprint is None else None
    approval = Approval(Path(request), Path(authority), fingerprint, ask) if request is not None else None
    typer.echo(enrol(Path(config), name, _path(certificate), approval))


@cloud.command("publish")
def cloud_publish(config: CloudConfig = "cloud.toml") -> None:
    """Write the plan that devices' owners agree to, and print the run's name."""
    from privkd.deployment.cloud import publish

    typer.echo(publish(Path(config)))


@cloud.command("run")
def cloud_run(
    config: CloudConfig = "cloud.toml",
    rounds: Annotated[
        int | None, typer.Option(help="At most so many, then stop. [all that are left]")
    ] = None,
    json_: Json = False,
) -> None:
    """Play the published run, or go on with it."""
    from privkd.deployment.cloud import run
    from privkd.deployment.cloud_status import status
    from privkd.terminal import announce, progress_on_stderr, show

    with progress_on_stderr() as progress:
        found = run(Path(config), progress, rounds=rounds, announce=announce)
    show(found or status(Path(config)), as_json=json_)


@cloud.command("status")
def cloud_status(config: CloudConfig = "cloud.toml", json_: Json = False) -> None:
    """Say who is enrolled, who answered last, who refused and why, and which certificates end soon."""
    from privkd.deployment.cloud_status import status
    from privkd.terminal import show

    show(status(Path(config)), as_json=json_)


@cloud.command("stop")
def cloud_stop(config: CloudConfig = "cloud.toml") -> None:
    """Have a running cloud end after the round at hand."""
    from privkd.deployment.cloud import stop

    typer.echo(stop(Path(config)))


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
AuditOut = Annotated[
    Text,
    typer.Option(help="Folder for report, raw scores, tables (.md, .tex) and figures. [none are written]"),
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
    out: AuditOut = None,
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
        found = attack_run(run, request, out=out, progress=progress)
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


ClaimedEpsilon = Annotated[
    float | None, typer.Option(help="Upper bound that is claimed, per record. [nothing is claimed]")
]
ClaimedDelta = Annotated[float | None, typer.Option(help="Of the claim. [1e-5 where nothing is claimed]")]
Gaussian = Annotated[
    bool,
    typer.Option(
        "--gaussian",
        help="The mechanism is claimed to be exactly Gaussian, such as full-batch DP-SGD: bounds under its "
        "curve count too.",
    ),
]


Independent = Annotated[
    bool,
    typer.Option(
        "--independent",
        help="Each score has nothing to do with the others, such as from a run of its own: bounds that "
        "assume it count too.",
    ),
]


@audit.command()
def scores(
    file: Annotated[
        str,
        typer.Argument(
            help=".csv or .parquet with columns score and member; or .npz with arrays scores and member, "
            "[model, sample], whose first model (the first `targets`) is audited and whose others are its "
            "shadows, and perhaps population, [model, other], of samples that no model was trained on."
        ),
    ],
    epsilon: ClaimedEpsilon = None,
    delta: ClaimedDelta = None,
    independent: Independent = False,
    gaussian: Gaussian = False,
    out: AuditOut = None,
    plugin: Plugin = None,
    json_: Json = False,
) -> None:
    """Audit scores of members and non-members of any training. Exit code 3: they beat the claim."""
    from audits.bounding import claimed
    from privkd.plugins import load_plugins

    claim = claimed(epsilon, delta, independent=independent, gaussian=gaussian)
    load_plugins(plugin or ())
    from audits.scores_audit import scores_of_file
    from privkd.terminal import show

    show(scores_of_file(Path(file), claim, out=_path(out)), as_json=json_)


@audit.command()
@with_settings("data", "data_dir", "label", "drop")
def model(
    train: Annotated[
        str,
        typer.Argument(
            help="package.module:train of yours: train(inputs, labels, seed) returns predict(inputs), which "
            "gives probabilities, logits or scores, or an object with membership(inputs, labels), which "
            "gives scores."
        ),
    ],
    *,
    settings: Mapping[str, Any],
    epsilon: ClaimedEpsilon = None,
    delta: ClaimedDelta = None,
    seconds: Annotated[
        float | None, typer.Option(help="Begin no model that would end later. [60, without --models]")
    ] = None,
    models: Annotated[int | None, typer.Option(help="At most so many models. [as time allows]")] = None,
    canaries: Annotated[
        int | None,
        typer.Option(help="Mislabelled records; 1: each model is a trial. [a third, at most 1,000]"),
    ] = None,
    independent: Independent = False,
    gaussian: Gaussian = False,
    seed: Annotated[int, typer.Option(help="Decides the coins and the trainings' seeds.")] = 0,
    out: AuditOut = None,
    json_: Json = False,
) -> None:
    """Audit a training function of yours by canaries of its data. Exit code 3: they beat the claim."""
    from audits.bounding import claimed
    from privkd.config import load_config

    claimed(epsilon, delta)
    data = load_config(None, (), settings).data
    from audits import model as attack_model
    from privkd.terminal import progress_on_stderr, show

    with progress_on_stderr() as progress:
        found = attack_model(
            train,
            data,
            epsilon=epsilon,
            delta=delta,
            seconds=seconds,
            models=models,
            canaries=canaries,
            independent=independent,
            gaussian=gaussian,
            seed=seed,
            out=out,
            progress=progress,
        )
    show(found, as_json=json_)


device = typer.Typer(
    callback=help_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="One real device: what its owner decides, and the process that answers.",
)
app.add_typer(device, name="device")

OwnersFile = Annotated[str, typer.Option("--config", help="The owner's settings.")]
PlanFolder = Annotated[str, typer.Argument(help="Folder with plan.json and proxy.safetensors of a cloud.")]


@device.command("init")
def device_init(
    name: Annotated[str, typer.Option(help="The device's name, as on a plan's roster; for good.")],
    source: Annotated[str, typer.Option(help="Its private records: a file, a folder, or module:function.")],
    out: Annotated[str, typer.Option(help="Folder for device.toml.")] = ".",
) -> None:
    """Write a commented device.toml for the owner to go through."""
    from privkd.deployment.owner import write_owner

    typer.echo(f"written: {write_owner(Path(out), name, source)}; go through it, then `privkd device show`")


@device.command("show")
def device_show(plan: PlanFolder, config: OwnersFile = "device.toml", json_: Json = False) -> None:
    """Say in words what a cloud's plan asks of this device and what it costs; nothing is agreed."""
    from privkd.deployment.agreement import show as proposal
    from privkd.deployment.owner import load_owner
    from privkd.terminal import show

    show(proposal(load_owner(Path(config)), Path(plan)), as_json=json_)


@device.command("agree")
def device_agree(
    plan: PlanFolder,
    digest: Annotated[str, typer.Option(help="The run's name, as `privkd device show` prints it.")],
    config: OwnersFile = "device.toml",
    json_: Json = False,
) -> None:
    """Agree to a plan: recompute it, prove its models, keep a copy. A running device takes it up at once."""
    from privkd.deployment.agreement import agree
    from privkd.deployment.owner import load_owner
    from privkd.terminal import show

    show(agree(load_owner(Path(config)), Path(plan), digest), as_json=json_)


@device.command("run")
def device_run(config: OwnersFile = "device.toml") -> None:
    """Answer questions that a courier brings to the socket, until told to end. The log is on stderr."""
    from privkd.deployment.device_service import run as serve

    serve(Path(config))


@device.command("status")
def device_status(config: OwnersFile = "device.toml", json_: Json = False) -> None:
    """Say how the device fares. Exit code 3: a cloud knows of charges that the ledger lacks."""
    from privkd.deployment.device_views import status
    from privkd.deployment.owner import load_owner
    from privkd.terminal import show

    show(status(load_owner(Path(config))), as_json=json_)


@device.command("ledger")
def device_ledger(config: OwnersFile = "device.toml", json_: Json = False) -> None:
    """Print what was spent over all runs and clouds, charge by charge."""
    from privkd.deployment.device_views import ledger
    from privkd.deployment.owner import load_owner
    from privkd.terminal import show

    show(ledger(load_owner(Path(config))), as_json=json_)


@device.command("budget")
def device_budget(
    reason: Annotated[str, typer.Option(help="Why, for the ledger's journal.")],
    config: OwnersFile = "device.toml",
    json_: Json = False,
) -> None:
    """Make [budget] of device.toml the one for good; what was spent stays spent. The device must not run."""
    from privkd.deployment.device_views import change_budget
    from privkd.deployment.owner import load_owner
    from privkd.terminal import show

    show(change_budget(load_owner(Path(config)), reason), as_json=json_)


@device.command("export")
def device_export(
    run: Annotated[Text, typer.Option(help="The run's name, or how it begins. [the last]")] = None,
    format_: Annotated[
        str, typer.Option("--format", help="torch (.pt2), onnx, executorch (.pte), or a plug-in's.")
    ] = "torch",
    out: Annotated[Text, typer.Option(help="The file. [the device's name]")] = None,
    config: OwnersFile = "device.toml",
    json_: Json = False,
) -> None:
    """Write the student that the device is left with as one file that answers as it does."""
    from privkd.deployment.device_views import export as write
    from privkd.deployment.owner import load_owner
    from privkd.terminal import show

    show(write(load_owner(Path(config)), run, format_, _path(out)), as_json=json_)


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


courier = typer.Typer(
    callback=help_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Carry messages between the cloud and devices elsewhere, by NVFlare.",
)
app.add_typer(courier, name="courier")


@courier.command("init")
def courier_init(
    out: Annotated[str, typer.Option(help="Folder for the authority, the server's kit and the operator's.")],
    host: Annotated[str, typer.Option(help="The server's name, by which devices reach this machine.")],
    port: Annotated[int, typer.Option(help="Where the server listens.")] = 8443,
) -> None:
    """At the cloud: make the authority, and the kits of the server and of whoever submits."""
    from privkd.deployment.kits import make_authority

    made = make_authority(Path(out), host, port)
    typer.echo(f"{made.folder}: authority, server, operator")
    typer.echo(f"tell the devices' owners, on another way than by file: {made.fingerprint}")


@courier.command("request")
def courier_request(
    name: Annotated[str, typer.Argument(help="The device's name, as it will be on the roster.")],
    out: Annotated[str, typer.Option(help="Folder for its key, which stays there.")],
) -> None:
    """At a device: make its key, and the request that goes to the cloud."""
    from privkd.deployment.kits import request

    typer.echo(f"send {request(name, Path(out))} to the cloud; the key stays in {out}")


@courier.command("approve")
def courier_approve(
    request: Annotated[str, typer.Argument(help="A device's request.")],
    authority: Annotated[str, typer.Option(help="The folder of `privkd courier init`.")],
    out: Annotated[Text, typer.Option(help="The file that goes back. [beside the request]")] = None,
) -> None:
    """At the cloud: sign a device's request."""
    from privkd.deployment.kits import approve

    typer.echo(f"send {approve(Path(request), Path(authority), _path(out))} back to the device")


@courier.command("package")
def courier_package(
    signed: Annotated[str, typer.Argument(help="What came back from the cloud.")],
    request: Annotated[str, typer.Option(help="The folder of `privkd courier request`.")],
    fingerprint: Annotated[str, typer.Option(help="The authority's, as the cloud's operator said it.")],
    out: Annotated[str, typer.Option(help="The kit's folder, which does not exist yet.")],
) -> None:
    """At a device: make its courier's kit, with the policy that forbids the cloud all but messages."""
    from privkd.deployment.kits import package

    typer.echo(f"run it: privkd courier run {package(Path(signed), Path(request), fingerprint, Path(out))}")


@courier.command("run")
def courier_run(
    kit: Annotated[str, typer.Argument(help="A device's kit, or the server's.")],
    socket: Annotated[str, typer.Option(help="Where `privkd device run` or `privkd cloud run` listens.")],
) -> None:
    """Carry messages for a device, or for the cloud, in the foreground, as another user than it."""
    from privkd.deployment.flare import run_courier

    run_courier(Path(kit), Path(socket))


if __name__ == "__main__":
    app()
