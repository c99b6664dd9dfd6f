"""A cloud whose devices are elsewhere: one path from a task to a release, whoever carries it."""

import json
import multiprocessing
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from double import Double, channel_of, draws_of
from running import StopAt, charges, weights
from sites import CHANNELS, NAMES, Picky, Site, impatient, same_releases, site

from audits import report
from privkd.channels.channel import contributions
from privkd.data.scenario import Device
from privkd.deployment import cloud
from privkd.deployment.carriers import InProcessCarrier, SocketCarrier
from privkd.deployment.cloud_settings import CloudSettings
from privkd.deployment.cloud_status import status
from privkd.deployment.sockets import Door
from privkd.deployment.wire import Reason, unpack_question
from privkd.engines.simulation import Draws, Simulation
from privkd.errors import ChannelError, ConfigError, InputError, InterruptError, RunError
from privkd.prepared import reopen
from privkd.privacy.events import Unit
from privkd.privacy.ledger import Ledger
from privkd.run import resume
from privkd.runs.folder import RunFolder


class TestOnePath:
    @pytest.mark.parametrize("channel", CHANNELS)
    def test_it_releases_what_a_simulation_of_the_same_roots_does(self, tmp_path: Path, channel: str) -> None:
        """By hand: the task of each round, the simulated devices, and each one's own half of the channel."""
        found = site(tmp_path, channel)
        done = found.run()
        plan = found.plan
        with RunFolder.resume(found.folder) as folder:
            prepared = reopen(folder)
        owners = [Device(name, double.records, double.records) for name, double in found.doubles.items()]
        simulation = Simulation(tuple(owners), prepared.config.student)
        teacher, students = prepared.cloud.trained_teacher(), list[torch.nn.Module]()
        for round, release in enumerate(found.releases()):
            task = prepared.cloud.publish(teacher, round)
            drawn = Draws(lambda name, round=round: draws_of(name, plan.digest, round).private, 0)
            students = simulation.train(task, task.dealt(range(3), students), drawn, lambda done: None)
            blocks = contributions(simulation.respond(students, task.question), NAMES, round)
            uploads = [
                channel_of(plan, name).encode(task.question, block, name)
                for name, block in zip(NAMES, blocks, strict=True)
            ]
            expected = channel_of(plan, "cloud").collect(task.question, uploads)
            assert torch.equal(release.answers, expected.answers)
            assert (release.devices, release.noise_std) == (expected.devices, expected.noise_std)
            targets = prepared.cloud.targets(teacher, found.releases()[: round + 1])
            teacher = prepared.cloud.update(teacher, targets, round).teacher
        assert all(
            torch.equal(one, other)
            for one, other in zip(done.teacher.parameters(), teacher.parameters(), strict=True)
        )

    def test_devices_in_process_and_over_sockets_give_the_same(self, tmp_path: Path) -> None:
        one, other = site(tmp_path / "one", "noised"), site(tmp_path / "two", "noised")
        one.run()
        with processes(other):
            other.run(SocketCarrier({name: tmp_path / "two" / f"{name}.sock" for name in NAMES}))
        assert same_releases(one, other)
        assert charges(one.folder) == charges(other.folder)
        assert weights(one.folder) == weights(other.folder)

    def test_the_ledger_books_the_plans_price_for_everybody_before_anybody_is_asked(
        self, tmp_path: Path
    ) -> None:
        found = site(tmp_path, "noised")
        seen: list[tuple[str, ...]] = []

        class Looking(InProcessCarrier):
            def ask(self, questions: Mapping[str, bytes], seconds: float) -> Mapping[str, bytes]:
                seen.append(Ledger.load(found.folder / "ledger.jsonl").parties(Unit.DEVICE))
                return super().ask(questions, seconds)

        result = found.run(Looking(found.doubles)).result
        assert seen == [NAMES, NAMES, NAMES], "two rounds, and what is delivered after them"
        assert result.statement(Unit.RECORD).high == found.plan.epsilon_record
        assert result.statement(Unit.DEVICE).high == found.plan.epsilon_device

    def test_students_have_no_figures(self, tmp_path: Path) -> None:
        found = site(tmp_path)
        done = found.run()
        rows = json.loads((found.folder / "result.json").read_text())["rounds"]
        assert [row["students"] is None for row in rows] == [False, True, True]
        assert all(row["personal"] is None for row in rows)
        assert done.result.student.direct is None


def serve(double: Double, socket: Path, ready: Any, end: Any) -> None:
    torch.set_num_threads(1)
    door = Door(socket, double)
    ready.set()
    end.wait()
    door.close()


class processes:  # noqa: N801  used as a context
    """Each device of a site, a process of its own behind its socket."""

    def __init__(self, found: Site) -> None:
        self._found = found

    def __enter__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self._end, self._running = context.Event(), []
        for name, double in self._found.doubles.items():
            ready = context.Event()
            socket = self._found.config.parent / f"{name}.sock"
            double.refusing = never
            process = context.Process(target=serve, args=(double, socket, ready, self._end))
            process.start()
            self._running.append(process)
            assert ready.wait(120)

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for process in self._running:
            process.join()


def never(round: int) -> Reason | None:
    return None


class TestQuestions:
    def test_a_device_gets_the_student_of_its_own_number(self, tmp_path: Path) -> None:
        """Heterogeneous students by the roster: widths 8, 6 and 8 again."""
        found = site(tmp_path)
        found.run(rounds=1)
        widths = []
        for double in found.doubles.values():
            _, tensors, _ = unpack_question(double.heard[0])
            starts = [tensor for name, tensor in tensors.items() if name.startswith("start.")]
            widths += [len(tensor) for tensor in starts if tensor.shape[1:] == (64,)]
        assert widths == [8, 6, 8]

    @pytest.mark.parametrize(("alpha", "rounds"), [(0.1, "teacher"), (0.0, "own")])
    def test_it_brings_no_more_than_is_needed(self, tmp_path: Path, alpha: float, rounds: str) -> None:
        found = site(
            tmp_path,
            change=lambda text: text.replace(
                'engine = "opacus"', f'engine = "opacus"\nalpha = {alpha}\nstart = "{rounds}"'
            ),
        )
        found.run()
        for round, message in enumerate(found.doubles["ada"].heard):
            _, tensors, invitation = unpack_question(message)
            kinds = {name.partition(".")[0] for name in tensors}
            starts = {"start"} if round == 0 or rounds == "teacher" else set()
            assert kinds == {"queries", "prior"} | starts | ({"teacher"} if alpha else set())
            assert tensors["queries"].dtype == torch.int64
            assert torch.equal(tensors["queries"], tensors["queries"].sort().values)
            assert tensors["prior"].shape == (len(tensors["queries"]), 10)
            assert invitation == b""

    def test_neither_seed_nor_path_is_in_one(self, tmp_path: Path) -> None:
        found = site(tmp_path)
        found.run(rounds=1)
        public = b"".join(file.read_bytes() for file in (tmp_path / "published").iterdir())
        for told in (public, *found.doubles["ada"].heard):
            assert str(tmp_path).encode() not in told
            assert b"4711" not in told
            assert (4711).to_bytes(8, "little") not in told

    def test_the_ledger_that_was_told_comes_back_with_the_next(self, tmp_path: Path) -> None:
        found = site(tmp_path)
        found.run()
        told = [unpack_question(message)[0].witness for message in found.doubles["bob"].heard]
        assert told == [None, "0:bob"]
        assert status(found.config).witnesses == {name: f"1:{name}" for name in NAMES}


class TestWhoAnswers:
    def test_a_straggler_is_left_out_and_back_in_the_next_round(self, tmp_path: Path) -> None:
        found = site(tmp_path, change=impatient)
        found.run(Picky(found.doubles, {0: {"bob"}}))
        assert [release.devices for release in found.releases()] == [("ada", "cy"), NAMES]

    def test_refusals_are_told_by_reason_and_asked_once(self, tmp_path: Path) -> None:
        found = site(tmp_path)
        found.doubles["ada"].refusing = lambda round: Reason.BUDGET if round else None
        found.run()
        assert [release.devices for release in found.releases()] == [NAMES, ("bob", "cy")]
        assert len(found.doubles["ada"].heard) == 2
        shown = status(found.config)
        assert shown.refused == {"ada": Reason.BUDGET}
        assert (shown.answered, shown.missing) == (("bob", "cy"), ())

    def test_who_says_later_is_asked_again(self, tmp_path: Path) -> None:
        found = site(tmp_path)
        ada = found.doubles["ada"]
        ada.refusing = lambda round: Reason.LATER if len(ada.heard) < 3 else None
        found.run(rounds=1)
        assert found.releases()[0].devices == NAMES
        assert [len(double.heard) for double in found.doubles.values()] == [3, 1, 1]

    def test_too_few_are_no_release(self, tmp_path: Path) -> None:
        found = site(tmp_path)
        for double in found.doubles.values():
            double.refusing = lambda round: Reason.NOT_AGREED
        with pytest.raises(ChannelError, match=r"0 of 3 devices answered.*not-agreed: ada, bob, cy"):
            found.run()
        assert status(found.config).done == 0
        for double in found.doubles.values():
            double.refusing = never
        found.run()
        assert status(found.config).finished

    @pytest.mark.parametrize("sent", [b"", b"nonsense", b"\0" * 4096])
    def test_what_is_no_answer_is_as_good_as_none(self, tmp_path: Path, sent: bytes) -> None:
        found = site(tmp_path, change=impatient)
        honest: dict[str, Any] = dict(found.doubles)
        found.run(InProcessCarrier(honest | {"cy": lambda _: sent}), rounds=1)
        assert found.releases()[0].devices == ("ada", "bob")

    def test_a_block_of_another_size_is_left_out(self, tmp_path: Path) -> None:
        found = site(tmp_path, change=impatient)
        honest: dict[str, Any] = dict(found.doubles)
        found.run(InProcessCarrier(honest | {"cy": lambda q: found.doubles["cy"](q)[:-4]}), rounds=1)
        assert found.releases()[0].devices == ("ada", "bob")

    def test_in_whatever_order_they_come_the_release_has_the_rosters(self, tmp_path: Path) -> None:
        class Late(InProcessCarrier):
            def ask(self, questions: Mapping[str, bytes], seconds: float) -> Mapping[str, bytes]:
                return dict(reversed(super().ask(questions, seconds).items()))

        one, other = site(tmp_path / "one", "noised"), site(tmp_path / "two", "noised")
        one.run(Late(one.doubles))
        other.run()
        assert same_releases(one, other)

    def test_a_socket_that_never_answers_costs_time_and_nobody_elses_answer(self, tmp_path: Path) -> None:
        silence = threading.Event()
        doors = [
            Door(tmp_path / "deaf", lambda message: bytes(silence.wait(60))),
            Door(tmp_path / "ada", lambda message: message + b"!"),
        ]
        carrier = SocketCarrier({name: tmp_path / name for name in ("deaf", "ada", "gone")})
        before = time.monotonic()
        answers = carrier.ask({name: name.encode() for name in ("deaf", "ada", "gone", "unknown")}, 1.0)
        assert answers == {"ada": b"ada!"}
        assert 0.9 < time.monotonic() - before < 10
        silence.set()
        for door in doors:
            door.close()

    def test_nobody_answers_for_another(self, tmp_path: Path) -> None:
        found = site(tmp_path, change=impatient)
        honest: dict[str, Any] = dict(found.doubles)
        replayed: list[bytes] = []

        def bob(question: bytes) -> bytes:
            replayed.append(found.doubles["bob"](question))
            return replayed[0]

        found.run(InProcessCarrier(honest | {"bob": bob, "cy": lambda _: replayed[0]}))
        assert [release.devices for release in found.releases()] == [("ada", "bob"), ("ada",)]


class TestDurability:
    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory: pytest.TempPathFactory) -> Site:
        found = site(tmp_path_factory.mktemp("whole"), "noised")
        found.run()
        return found

    @pytest.mark.parametrize("stage", range(1, 9))
    def test_it_goes_on_after_an_interruption_at_any_stage(
        self, tmp_path: Path, whole: Site, stage: int
    ) -> None:
        """Before the first round; distilling, asking, releasing, learning of each; the same run comes out."""
        found = site(tmp_path, "noised")
        with pytest.raises(InterruptError, match="cloud run --config"):
            cloud.run(found.config, StopAt(stage), carry=lambda *_: InProcessCarrier(found.doubles))
        found.run()
        assert same_releases(found, whole)
        assert weights(found.folder) == weights(whole.folder)
        assert charges(found.folder) == charges(whole.folder)

    def test_round_by_round_is_the_same(self, tmp_path: Path, whole: Site) -> None:
        found = site(tmp_path, "noised")
        assert found.run(rounds=1) is None
        assert status(found.config).done == 1
        assert found.run(rounds=1) is not None
        assert weights(found.folder) == weights(whole.folder)

    def test_told_to_stop_it_ends_after_the_round_at_hand(self, tmp_path: Path) -> None:
        found = site(tmp_path)
        with pytest.raises(RunError, match="no cloud is running"):
            cloud.stop(found.config)

        class Stopping(InProcessCarrier):
            def ask(self, questions: Mapping[str, bytes], seconds: float) -> Mapping[str, bytes]:
                assert status(found.config).running
                cloud.stop(found.config)
                return super().ask(questions, seconds)

        assert found.run(Stopping(found.doubles)) is None
        shown = status(found.config)
        assert (shown.done, shown.running, shown.finished) == (1, False, False)
        assert found.run() is not None

    def test_no_simulation_goes_on_with_it(self, tmp_path: Path) -> None:
        found = site(tmp_path)
        found.run(rounds=1)
        with pytest.raises(RunError, match="its devices are elsewhere; go on with it by `privkd cloud run`"):
            resume(found.folder)


class TestPublishing:
    def test_a_begun_run_is_not_published_over(self, tmp_path: Path) -> None:
        found = site(tmp_path)
        name = found.plan.digest
        text = found.config.read_text()
        cloud.publish(found.config)
        assert found.plan.digest == name
        found.run(rounds=1)
        found.config.write_text(text.replace("rounds = 2", "rounds = 3"))
        with pytest.raises(RunError, match="was begun and is not finished"):
            cloud.publish(found.config)
        with pytest.raises(RunError, match="changed since the plan was published"):
            found.run()
        found.config.write_text(text)
        found.run()
        found.config.write_text(text.replace("rounds = 2", "rounds = 3"))
        cloud.publish(found.config)
        assert found.plan.digest != name

    def test_the_roster_is_part_of_the_plan(self, tmp_path: Path) -> None:
        found = site(tmp_path)
        with pytest.raises(RunError, match="published for a roster without dora"):
            cloud.enrol(found.config, "dora")
        assert "device 1 of 3" in cloud.enrol(found.config, "bob")
        found.run()
        assert "device 3 of 4" in cloud.enrol(found.config, "dora")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (('kind = "plain"', 'kind = "secure"'), "needs running aggregators"),
            (('kind = "plain"', 'kind = "plain"\ndropout = 0.4'), "simulates silence"),
            (("[run.data]", "[run.data]\ndevices = 9"), "the roster has 3"),
            (('engine = "socket"', 'engine = "pigeon"'), "engine='pigeon'"),
            (("{device}.sock", "all.sock"), "each device has its own"),
            (("[run.data]", '[run.data]\nsource = "nowhere.npz"'), "nowhere.npz"),
            (("answer_seconds = 0.05", "answer_seconds = 30"), "again_seconds=20: no device answers before"),
        ],
    )
    def test_settings_that_are_no_clouds_are_said(
        self, tmp_path: Path, change: tuple[str, str], words: str
    ) -> None:
        with pytest.raises(InputError, match=words):
            site(tmp_path, change=lambda text: text.replace(*change))

    def test_the_template_is_read_by_its_own_reader(self, tmp_path: Path) -> None:
        config = tmp_path / "cloud.toml"
        cloud.init(config)
        assert CloudSettings.read(config).run.channel.kind == "secure"
        with pytest.raises(ConfigError, match="exists already"):
            cloud.init(config)


def test_the_report_draws_who_really_ran_where(tmp_path: Path) -> None:
    found = site(tmp_path)
    done = found.run()
    assert done.result.ran.engine == "socket"
    written = report(found.folder)
    assert written.trust.parties[0].party == "3 devices, elsewhere"
    page = (found.folder / "report.md").read_text()
    assert "3 devices elsewhere, over socket" in page
    assert "not audited here" in page
