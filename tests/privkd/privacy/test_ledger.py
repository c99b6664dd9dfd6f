import inspect
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import privkd.privacy.ledger
from privkd.errors import BudgetError, InputError, PrivkdError, RunError
from privkd.privacy.accounting import Bound, calibrate_noise_multiplier, calibrate_rho, price
from privkd.privacy.events import DpSgd, NoPrivacy, PostProcessing, PrivacyEvent, Unit, ZCdp
from privkd.privacy.ledger import Budget, Charge, Ledger

RECORD, DEVICE = Unit.RECORD, Unit.DEVICE
BUDGETS = (Budget(RECORD, 3.0, 1e-5), Budget(DEVICE, math.inf, 1e-6))
ROUND = DpSgd(1.6, 0.1, 20)
UNPROTECTED = NoPrivacy("secure aggregation without noise has no device-level guarantee")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def filled(path: Path | None) -> Ledger:
    ledger = Ledger(path, BUDGETS)
    for round in range(2):
        ledger.debit(RECORD, "device-0000", ROUND, round=round)
        ledger.post_process(RECORD, "device-0000", round=round, of="answers")
        ledger.debit(DEVICE, "device-0000", UNPROTECTED, round=round)
    ledger.debit(RECORD, "device-0001", ROUND, round=0)
    return ledger


def contents(ledger: Ledger) -> dict[tuple[Unit, str], tuple[PrivacyEvent, ...]]:
    return {(unit, party): ledger.events(unit, party) for unit in Unit for party in ledger.parties(unit)}


def test_a_ledger_survives_its_process(path: Path) -> None:
    before = filled(path)
    after = Ledger.load(path)
    assert contents(after) == contents(before)
    assert after.budgets == before.budgets == BUDGETS
    assert after.statement() == before.statement()
    assert after.head == before.head
    assert Ledger(path, BUDGETS).statement(by_party=True) == before.statement(by_party=True)


@settings(deadline=None, max_examples=50)
@given(
    event=st.one_of(
        st.builds(DpSgd, st.floats(0, math.inf), st.floats(0, 1), st.integers(0, 10**9)),
        st.builds(ZCdp, st.floats(0, math.inf)),
        st.builds(NoPrivacy, st.text(st.characters(codec="utf-8"))),
    ),
    party=st.text(min_size=1).filter(lambda text: text.isprintable()),
)
def test_every_event_is_spelt_exactly(
    event: PrivacyEvent, party: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    unlimited = [Budget(RECORD, math.inf, 1e-5)]
    Ledger(path, unlimited).debit(RECORD, party, event, round=7, label="label")
    reloaded = Ledger.load(path)
    assert reloaded.events(RECORD, party) == (event,)
    reloaded.debit(RECORD, party, event, round=7, label="label")
    assert reloaded.events(RECORD, party) == (event,)


def test_epsilon_is_the_price_of_the_events() -> None:
    ledger = filled(None)
    assert ledger.epsilon(RECORD, "device-0000") == price([ROUND] * 2, 1e-5)
    assert ledger.epsilon(RECORD, "device-0000", delta=1e-6) == price([ROUND] * 2, 1e-6)
    assert ledger.epsilon(RECORD, "nobody") == Bound(0, 0, 0)


def test_the_worst_party_speaks_for_the_unit() -> None:
    ledger = filled(None)
    assert ledger.spent(RECORD) == ledger.epsilon(RECORD, "device-0000")
    assert ledger.spent(RECORD).high > ledger.epsilon(RECORD, "device-0001").high
    assert ledger.spent(RECORD, delta=1e-3).high < ledger.spent(RECORD).high
    assert Ledger(None, BUDGETS).spent(RECORD) == Bound(0, 0, 0)


def test_units_are_never_added() -> None:
    ledger = filled(None)
    alone = Ledger(None, BUDGETS)
    for round in range(2):
        alone.debit(RECORD, "device-0000", ROUND, round=round)
    assert ledger.epsilon(RECORD, "device-0000") == alone.epsilon(RECORD, "device-0000")
    assert ledger.spent(DEVICE).high == math.inf
    assert math.isfinite(ledger.spent(RECORD).high)


def test_nothing_in_the_ledger_prices_without_one_unit() -> None:
    public = {name: f for name, f in inspect.getmembers(Ledger, callable) if not name.startswith("_")}
    pricing = {name for name, f in public.items() if inspect.signature(f).return_annotation in (Bound, float)}
    assert pricing == {"epsilon", "spent"}
    for name in pricing:
        unit = inspect.signature(public[name]).parameters["unit"]
        assert unit.default is inspect.Parameter.empty
        assert unit.annotation is Unit
    assert not [name for name in public if "total" in name or "sum" in name]
    assert set(privkd.privacy.ledger.__all__) == {"Budget", "Charge", "Ledger", "Statement"}


def test_an_overspending_charge_is_refused_and_not_booked(path: Path) -> None:
    ledger = filled(path)
    before = contents(ledger), path.read_bytes()
    with pytest.raises(
        BudgetError, match=r"device-0000 would spend epsilon .* of 3 on unit record"
    ) as raised:
        ledger.debit(RECORD, "device-0000", DpSgd(1.0, 0.1, 200), round=2)
    assert "\n" not in str(raised.value)
    assert (contents(ledger), path.read_bytes()) == before
    ledger.debit(RECORD, "device-0001", ROUND, round=1)


def test_a_calibrated_run_fits_exactly() -> None:
    rounds = 3
    noise = calibrate_noise_multiplier(epsilon=3.0, delta=1e-5, sampling_rate=0.1, steps=20 * rounds)
    rho = calibrate_rho(epsilon=8.0, delta=1e-6, releases=rounds)
    ledger = Ledger(None, [Budget(RECORD, 3.0, 1e-5), Budget(DEVICE, 8.0, 1e-6)])
    for round in range(rounds):
        ledger.debit(RECORD, "a", DpSgd(noise, 0.1, 20), round=round)
        ledger.debit(DEVICE, "a", ZCdp(rho), round=round)
    assert 0.99 * 3 < ledger.spent(RECORD).high <= 3
    assert 0.99 * 8 < ledger.spent(DEVICE).high <= 8
    with pytest.raises(BudgetError):
        ledger.debit(RECORD, "a", DpSgd(noise, 0.1, 20), round=rounds)
    with pytest.raises(BudgetError):
        ledger.debit(DEVICE, "a", ZCdp(rho), round=rounds)


def test_a_finite_budget_refuses_what_has_no_guarantee() -> None:
    ledger = Ledger(None, BUDGETS)
    for event in (UNPROTECTED, DpSgd(0.0, 0.1, 1), ZCdp(math.inf)):
        with pytest.raises(BudgetError, match="epsilon inf of 3"):
            ledger.debit(RECORD, "a", event, round=0)
        ledger.debit(DEVICE, "a", event, round=0)
    assert ledger.reasons(RECORD) == ()
    assert ledger.reasons(DEVICE) == (UNPROTECTED.reason, "DP-SGD without noise", "a channel without noise")


def test_a_repeated_charge_is_one_charge(path: Path) -> None:
    ledger = filled(path)
    before = contents(ledger), path.read_bytes()
    ledger.debit(RECORD, "device-0000", ROUND, round=1)
    ledger.post_process(RECORD, "device-0000", round=1, of="answers")
    Ledger.load(path).debit(DEVICE, "device-0000", UNPROTECTED, round=0)
    ledger.debit_all([Charge(RECORD, "device-0001", ROUND, 0)] * 2)
    assert (contents(ledger), path.read_bytes()) == before


def test_a_repeated_key_with_another_event_is_refused(path: Path) -> None:
    ledger = filled(path)
    with pytest.raises(RunError, match=r"round 1, device-0000, unit record: .* was booked as"):
        ledger.debit(RECORD, "device-0000", DpSgd(1.7, 0.1, 20), round=1)
    other = [Charge(RECORD, "b", ROUND, 0), Charge(RECORD, "b", DpSgd(9.0, 0.1, 20), 0)]
    with pytest.raises(RunError):
        ledger.debit_all(other)
    assert ledger.events(RECORD, "b") == ()


def test_a_label_tells_two_charges_apart() -> None:
    ledger = Ledger(None, BUDGETS)
    for label in ("body", "head"):
        ledger.debit(RECORD, "a", ROUND, round=0, label=label)
    assert ledger.events(RECORD, "a") == (ROUND, ROUND)


def test_a_batch_is_booked_whole_or_not_at_all(path: Path) -> None:
    ledger = filled(path)
    lines = path.read_bytes().count(b"\n")
    good = [Charge(RECORD, f"device-{i:04d}", ROUND, 2) for i in range(2, 1000)]
    with pytest.raises(BudgetError, match="device-0001"):
        ledger.debit_all([*good, Charge(RECORD, "device-0001", DpSgd(0.5, 0.5, 100), 2)])
    assert ledger.parties(RECORD) == ("device-0000", "device-0001")
    ledger.debit_all(good)
    assert path.read_bytes().count(b"\n") == lines + 1
    path.write_bytes(path.read_bytes()[:-1])
    assert Ledger.load(path).parties(RECORD) == ("device-0000", "device-0001")


def test_a_batch_cannot_hide_overspending_in_its_parts() -> None:
    ledger = Ledger(None, BUDGETS)
    with pytest.raises(BudgetError):
        ledger.debit_all([Charge(RECORD, "a", ROUND, round) for round in range(20)])
    assert ledger.events(RECORD, "a") == ()


def test_an_empty_batch_writes_nothing(path: Path) -> None:
    ledger = Ledger(path, BUDGETS)
    before = path.read_bytes()
    ledger.debit_all([])
    assert path.read_bytes() == before


def test_post_processing_is_free_and_stated() -> None:
    ledger = Ledger(None, BUDGETS)
    ledger.debit(RECORD, "a", ROUND, round=0)
    before = ledger.epsilon(RECORD, "a")
    ledger.post_process(RECORD, "a", round=0, of="answers on public inputs")
    ledger.post_process(RECORD, "a", round=4, of="answers on public inputs")
    assert ledger.epsilon(RECORD, "a") == before
    assert ledger.events(RECORD, "a").count(PostProcessing("answers on public inputs")) == 2


def test_post_processing_needs_a_source() -> None:
    ledger = Ledger(None, BUDGETS)
    ledger.debit(RECORD, "a", ROUND, round=1)
    ledger.debit(DEVICE, "b", ZCdp(0.1), round=0)

    def refused(unit: Unit, party: str, round: int) -> None:
        with pytest.raises(PrivkdError, match="debit its source first"):
            ledger.post_process(unit, party, round=round, of="answers")
        with pytest.raises(PrivkdError, match="debit its source first"):
            ledger.debit(unit, party, PostProcessing("answers"), round=round)

    refused(RECORD, "b", 1)  # nobody's charge
    refused(DEVICE, "a", 1)  # a charge on another unit
    refused(RECORD, "a", 0)  # a charge of a later round
    refused(DEVICE, "b", 0)  # not DP-SGD
    ledger.debit_all([Charge(RECORD, "c", ROUND, 0), Charge(RECORD, "c", PostProcessing("answers"), 0)])
    with pytest.raises(PrivkdError):
        ledger.debit_all([Charge(RECORD, "d", PostProcessing("answers"), 0), Charge(RECORD, "d", ROUND, 0)])


def test_post_processing_of_many_is_all_or_nothing() -> None:
    ledger = Ledger(None, BUDGETS)
    ledger.debit(RECORD, "a", ROUND, round=0)
    with pytest.raises(PrivkdError, match=r"^b has no"):
        ledger.post_process(RECORD, "a", "b", round=0, of="answers")
    assert ledger.events(RECORD, "a") == (ROUND,)


def test_without_dp_the_answers_are_post_processing_of_no_guarantee() -> None:
    ledger = Ledger(None, [Budget(RECORD, math.inf, 1e-5)])
    ledger.debit(RECORD, "a", NoPrivacy("epsilon was set to inf"), round=0)
    ledger.post_process(RECORD, "a", round=0, of="answers")
    assert ledger.spent(RECORD).low == math.inf


def test_the_statement_says_everything_a_report_needs() -> None:
    record, device = filled(None).statement()
    assert (record.unit, record.party, record.parties, record.charges) == (RECORD, "device-0000", 2, 4)
    assert record.neighbouring_relation == "add or remove one record of one device"
    assert record.epsilon == price([ROUND] * 2, 1e-5)
    assert (record.delta, record.budget, record.reasons) == (1e-5, 3.0, ())
    assert record.method == "privacy loss distribution"
    assert device.epsilon.low == device.budget == math.inf
    assert device.reasons == (UNPROTECTED.reason,)
    assert "zero out" in device.neighbouring_relation


def test_the_statement_names_each_party() -> None:
    rows = filled(None).statement(by_party=True)
    assert [(row.unit, row.party, row.parties) for row in rows] == [
        (RECORD, "device-0000", 1),
        (RECORD, "device-0001", 1),
        (DEVICE, "device-0000", 1),
    ]


def test_the_statement_of_an_untouched_ledger_is_zero() -> None:
    assert [(row.party, row.parties, row.epsilon.high) for row in Ledger(None, BUDGETS).statement()] == [
        (None, 0, 0),
        (None, 0, 0),
    ]


@pytest.mark.parametrize(
    "budgets",
    [
        [Budget(RECORD, 3.1, 1e-5), BUDGETS[1]],
        [Budget(RECORD, 3.0, 2e-5), BUDGETS[1]],
        [Budget(RECORD, math.inf, 1e-5), BUDGETS[1]],
        BUDGETS[:1],
    ],
    ids=str,
)
def test_a_changed_budget_is_refused(path: Path, budgets: list[Budget]) -> None:
    filled(path)
    with pytest.raises(
        RunError, match="was started with record epsilon 3 at delta 1e-05, device epsilon inf"
    ):
        Ledger(path, budgets)
    Ledger(path, reversed(BUDGETS))


def test_a_missing_ledger_is_no_new_budget(path: Path) -> None:
    with pytest.raises(RunError, match="is missing"):
        Ledger.open(path, BUDGETS, must_exist=True)
    with pytest.raises(RunError, match="is missing"):
        Ledger.load(path)
    assert not path.exists()
    head = Ledger.open(path, BUDGETS, must_exist=False).head
    path.unlink()
    with pytest.raises(RunError, match="is missing"):
        Ledger.open(path, BUDGETS, must_exist=False, at_least=head)


def test_lost_charges_show_against_a_head(path: Path) -> None:
    head = filled(path).head
    assert Ledger.open(path, BUDGETS, must_exist=True, at_least=head).head == head
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match="lost charges"):
        Ledger.open(path, BUDGETS, must_exist=True, at_least=head)
    with pytest.raises(RunError, match="lost charges"):
        Ledger.load(path, at_least=head)


def test_damage_is_never_a_fresh_budget(path: Path) -> None:
    filled(path)
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:10],
        whole[1:],
        whole.replace(b"1.6", b"9.6", 1),
        whole.replace(b"3.0", b"9.0", 1),
    ):
        path.write_bytes(content)
        for attempt in (
            lambda: Ledger(path, BUDGETS),
            lambda: Ledger.open(path, BUDGETS, must_exist=False),
            lambda: Ledger.load(path),
        ):
            with pytest.raises(RunError, match="line "):
                attempt()
        assert path.read_bytes() == content


def test_a_torn_charge_was_never_promised(path: Path) -> None:
    ledger = filled(path)
    before = contents(ledger)
    ledger.debit(RECORD, "device-0002", ROUND, round=0)
    path.write_bytes(path.read_bytes()[:-5])
    again = Ledger.load(path)
    assert contents(again) == before
    again.debit(RECORD, "device-0002", ROUND, round=0)
    assert contents(Ledger.load(path)) == contents(ledger)


@pytest.mark.parametrize(
    "record", [{}, {"format": 2, "budgets": []}, {"format": 1, "budgets": [{}]}], ids=str
)
def test_another_journal_is_no_ledger(path: Path, record: dict[str, object]) -> None:
    from privkd.journal import Journal

    Journal(path).append(record)
    with pytest.raises(RunError, match="line 1"):
        Ledger.load(path)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"charges": 3},
        {"charges": [{}]},
        {"charges": [{"event": {"kind": "free"}}]},
        {"charges": [{"event": 1}]},
    ],
    ids=str,
)
def test_an_unknown_line_is_refused(path: Path, record: dict[str, object]) -> None:
    from privkd.journal import Journal

    filled(path)
    journal = Journal(path)
    journal.append(record)
    with pytest.raises(RunError, match=f"line {len(journal)}: not a batch of charges"):
        Ledger.load(path)


def test_a_unit_without_a_budget_is_refused() -> None:
    ledger = Ledger(None, BUDGETS[:1])
    for attempt in (
        lambda: ledger.debit(DEVICE, "a", ZCdp(0.1), round=0),
        lambda: ledger.spent(DEVICE),
        lambda: ledger.epsilon(DEVICE, "a"),
    ):
        with pytest.raises(InputError, match="no budget for unit device"):
            attempt()


@pytest.mark.parametrize("budgets", [[], [BUDGETS[0], BUDGETS[0]]], ids=["none", "twice"])
def test_one_budget_for_each_unit(path: Path, budgets: list[Budget]) -> None:
    with pytest.raises(InputError, match="exactly one"):
        Ledger(path, budgets)
    assert not path.exists()


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0, 1e-5), (-1, 1e-5), (math.nan, 1e-5), (1, 0), (1, 1), (1, math.nan)]
)
def test_an_impossible_budget_is_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(InputError, match="record budget"):
        Budget(RECORD, epsilon, delta)


@pytest.mark.parametrize(
    "charge",
    [
        Charge(DEVICE, "", ZCdp(0.1), 0),
        Charge(DEVICE, "a", ZCdp(0.1), -1),
        Charge(DEVICE, "a", ZCdp(-0.1), 0),
        Charge(DEVICE, "a", DpSgd(1.0, 2.0, 1), 0),
        Charge(DEVICE, "a", "nothing", 0),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_an_impossible_charge_is_refused(path: Path, charge: Charge) -> None:
    ledger = Ledger(path, BUDGETS)
    before = path.read_bytes()
    with pytest.raises(InputError):
        ledger.debit_all([charge])
    assert path.read_bytes() == before
    assert ledger.parties(DEVICE) == ()


def test_a_disk_that_fails_books_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = filled(path)
    before = contents(ledger)

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(RunError, match="No space left"):
            ledger.debit(RECORD, "device-0001", ROUND, round=1)
    assert contents(ledger) == before == contents(Ledger.load(path))


CHILD = """
import sys
from pathlib import Path
from privkd.privacy.events import Unit, ZCdp
from privkd.privacy.ledger import Budget, Ledger

ledger = Ledger(Path(sys.argv[1]), [Budget(Unit.DEVICE, float("inf"), 1e-6)])
for round in range(100_000):
    ledger.debit(Unit.DEVICE, "a", ZCdp(1e-3), round=round)
    print(round, flush=True)
"""


@pytest.mark.parametrize("after", [1, 37])
def test_a_debit_that_returned_survives_a_kill(path: Path, after: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(after):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    returned = after + len(child.stdout.read().split("\n")) - 1
    child.wait()
    child.stdout.close()
    booked = len(Ledger.load(path).events(DEVICE, "a"))
    assert booked in (returned, returned + 1)  # the kill may fall between the debit and its announcement
