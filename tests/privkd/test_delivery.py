"""What the devices are left with: one student that knows what the teacher and their own know, for free."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import outcome, play, resume, small
from torch import Tensor, nn
from torch.nn import functional as F

from privkd.data.scenario import LabelledSet
from privkd.prepared import Finished, Prepared, prepare
from privkd.prepared import finished as trained_again
from privkd.privacy.randomness import derive_seed, seeded_generator
from privkd.progress import Silent
from privkd.runs.folder import RunFolder
from privkd.training.fit import accuracy
from privkd.training.losses import divergence

DEVICES = (0, 2)


def opened(path: Path) -> tuple[Prepared, Finished]:
    with RunFolder.resume(path) as folder:
        game = prepare(folder.config)
        return game, trained_again(game, folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Finished]:
    path = tmp_path_factory.mktemp("delivery") / "run"
    play(path, "student.delivery_fit.steps=25")
    return opened(path)


def weighing(game: Prepared, own_weight: float, **settings: object) -> Prepared:
    student = game.config.student.model_copy(update={"own_weight": own_weight, **settings})
    return replace(game, config=game.config.model_copy(update={"student": student}))


def weights(models: Sequence[nn.Module]) -> Tensor:
    return torch.stack([torch.nn.utils.parameters_to_vector(model.parameters()) for model in models])


def one_by_one(game: Prepared, done: Finished, number: int) -> nn.Module:
    """The same distillation in plain torch."""
    config, inputs = game.config.student, game.cloud.data.inputs
    state, own = done.state, done.students[number]
    with torch.no_grad():
        mean = config.own_weight * F.softmax(own(inputs), -1)
        mean += (1 - config.own_weight) * F.softmax(state.teacher(inputs), -1)
    student = game.cloud.public_students(state.teacher, round=state.round)[0]
    fit = config.delivery_fit
    optimizer = torch.optim.AdamW(student.parameters(), lr=fit.learning_rate, weight_decay=0.0)
    seed = derive_seed(game.config.seed, "deliver")
    generator = seeded_generator(seed, "fit", game.simulation.names[number])
    for step in range(fit.steps):
        chosen = torch.randint(len(inputs), (fit.batch_size,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = fit.learning_rate * (1 - step / fit.steps)
        optimizer.zero_grad()
        divergence(mean[chosen], student(inputs[chosen])).mean().backward()
        optimizer.step()
    return student


class TestDeliver:
    def test_without_weight_it_is_the_teachers_student_and_with_all_of_it_the_devices_own(
        self, finished: tuple[Prepared, Finished]
    ) -> None:
        game, state = finished
        shared = game.cloud.public_students(state.state.teacher, round=state.state.round)[0]
        none = weighing(game, 0).personalised(state, DEVICES, Silent())
        assert torch.equal(weights(none), weights([shared, shared]))
        own = [state.students[number] for number in DEVICES]
        assert torch.equal(weights(weighing(game, 1).personalised(state, DEVICES, Silent())), weights(own))

    @pytest.mark.parametrize("engine", ["cohort", "opacus"])
    def test_between_them_it_is_distilled_from_both(
        self, finished: tuple[Prepared, Finished], engine: str
    ) -> None:
        game, state = finished
        game = weighing(game, 0.3, engine=engine)
        found = game.personalised(state, DEVICES, Silent())
        naive = [one_by_one(game, state, number) for number in DEVICES]
        torch.testing.assert_close(weights(found), weights(naive), atol=2e-5, rtol=1e-4)
        assert not torch.allclose(weights(found[:1]), weights(found[1:]), atol=1e-2), (
            "each device has its own"
        )

    def test_comes_nearer_to_what_both_answer(self, finished: tuple[Prepared, Finished]) -> None:
        game, state = finished
        inputs = game.cloud.data.inputs
        start, end = (weighing(game, weight).personalised(state, DEVICES, Silent()) for weight in (0, 0.5))
        with torch.no_grad():
            for before, after, number in zip(start, end, DEVICES, strict=True):
                mean = F.softmax(state.students[number](inputs), -1) + F.softmax(
                    state.state.teacher(inputs), -1
                )
                far, near = (divergence(mean / 2, model(inputs)).mean() for model in (before, after))
                assert near < 0.7 * far

    def test_reads_no_private_record(self, finished: tuple[Prepared, Finished]) -> None:
        """Why it costs nothing: were one touched, the answer would not be a number."""
        game, state = finished
        spoilt = [
            replace(
                device,
                train=LabelledSet(torch.full_like(device.train.inputs, torch.nan), device.train.labels),
            )
            for device in game.scenario.devices
        ]
        blind = replace(game, scenario=replace(game.scenario, devices=tuple(spoilt)))
        found, clean = (one.personalised(state, DEVICES, Silent()) for one in (blind, game))
        assert torch.equal(weights(found), weights(clean))

    def test_many_devices_are_delivered_in_parts(
        self, finished: tuple[Prepared, Finished], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        game, state = finished
        together = game.personalised(state, (0, 1, 2), Silent())
        monkeypatch.setattr("privkd.engines.simulation._COPIED", 1)
        apart = game.personalised(state, (0, 1, 2), Silent())
        torch.testing.assert_close(weights(apart), weights(together), atol=1e-5, rtol=1e-4)


class TestInARun:
    def test_the_result_is_of_what_the_devices_are_left_with(self, tmp_path: Path) -> None:
        result = play(tmp_path / "run")
        game, state = opened(tmp_path / "run")
        students = game.personalised(state, range(3), Silent())
        test, devices = game.scenario.test, game.scenario.devices
        each = [accuracy(student, test.inputs, test.labels) for student in students]
        own = [accuracy(s, d.test.inputs, d.test.labels) for s, d in zip(students, devices, strict=True)]
        assert result.student.mean == pytest.approx(statistics.fmean(each))
        assert result.student.personal == pytest.approx(statistics.fmean(own))
        assert result.student.trained == result.rounds[-1].students

    def test_a_run_stopped_before_it_delivers_all_the_same(self, tmp_path: Path) -> None:
        for name in ("whole", "stopped"):
            play(tmp_path / name)
        (tmp_path / "stopped" / "result.json").unlink()
        resume(tmp_path / "stopped")
        whole, stopped = (outcome(tmp_path / name) for name in ("whole", "stopped"))
        assert stopped["student"] == whole["student"]

    def test_costs_no_privacy(self, tmp_path: Path) -> None:
        with_it, without = (
            play(tmp_path / str(weight), f"student.own_weight={weight}") for weight in (0.5, 1)
        )
        spent = [[row.epsilon.high for row in result.ledger] for result in (with_it, without)]
        assert spent[0] == spent[1]
        assert with_it.rounds == without.rounds, "what was released is the same"

    def test_a_deployment_measures_nothing(self, tmp_path: Path) -> None:
        result = play(tmp_path / "run", "privacy.noise=system")
        assert result.student.mean != result.student.mean
        assert result.student.personal != result.student.personal

    def test_bad_weights_are_refused(self) -> None:
        for weight in ("-0.1", "1.5", "nan"):
            with pytest.raises(Exception, match="own_weight"):
                small(f"student.own_weight={weight}")
