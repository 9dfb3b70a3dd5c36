"""A sweep's records, its identity and its best trial: what goes on after a kill, and what a resume must refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.errors import InputError
from infra.storage import Store, open_store
from tests.unit.test_tuning_searcher import space
from tuning.identity import SweepIdentity, code_digests, differences, keep_identity
from tuning.ledger import Ledger, best_of, read_trials, trial_folder
from tuning.records import Rung, Status, TrialRecord
from tuning.searcher import make_searcher
from tuning.space import SearchSpace
from workflows.loading import config_from

PSNR = "val_psnr"


def ledger(store: Store, seed: int = 0, **changes: Any) -> Ledger:
    wanted = space(budget={"images": 640, "min_images": 160}, **changes)
    return Ledger(store, wanted, make_searcher("random", wanted, seed), "/the/root")


def store_in(folder: Path) -> Store:
    return open_store(str(folder / "sweep"))


# ---- the ledger ----


def test_what_the_ledger_was_told_is_on_the_disk_after_each_call(tmp_path: Path) -> None:
    store, heard = store_in(tmp_path), []
    book = ledger(store)
    book.listen(heard.append)
    record = book.next_trial(2)
    assert record is not None
    steps: list[tuple[Status, int]] = [("waiting", 0), ("waiting", 0)]
    book.started(0)
    book.stepped(0)
    book.stepped(0)
    steps += [("running", 0), ("running", 0)]
    book.rung(0, 160, {PSNR: 15.0})
    steps.append(("running", 160))
    book.rung(0, 320, {PSNR: 16.0}, stopped=True)
    steps.append(("stopped", 320))
    book.ended(0, "stopped")
    assert [(r.status, r.images) for r in heard] == [*steps, ("stopped", 320)]
    assert read_trials(store) == book.records == [heard[-1]]
    assert heard[-1].drawn == record.drawn and heard[-1].value(PSNR) == 16.0
    facts = heard[-1].facts
    assert facts["started"] <= facts["first_step"] <= facts["ended"]


def test_a_trial_is_run_from_a_complete_configuration_that_names_the_sweeps_root(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    book = ledger(store)
    record = book.next_trial(1)
    assert record is not None
    read = config_from(yaml.safe_load(trial_folder(store, 0).read_bytes("trial.yaml")))
    assert read == book.space.check(dict(record.drawn)).model_copy(update={"root": "/the/root"})
    assert read.vq.train.images == 640 and read.vq.train.checkpoint_every_images == 160


@pytest.mark.parametrize("calls", range(6))
def test_a_sweep_killed_after_any_call_goes_on_with_what_was_begun_and_draws_the_same_trials(
    tmp_path: Path, calls: int
) -> None:
    def run(book: Ledger, most: int) -> None:
        script = [
            lambda: book.next_trial(3),
            lambda: book.started(0),
            lambda: book.rung(0, 160, {PSNR: 15.0}),
            lambda: book.ended(0, "finished"),
            lambda: book.next_trial(3),
        ]
        for call in script[:most]:
            call()

    store = store_in(tmp_path)
    run(ledger(store), calls)
    again = ledger(store)
    begun = [record.number for record in again.interrupted]
    assert begun == ([0] if 1 <= calls <= 3 else [1] if calls == 5 else [])
    drawn = {}
    while (record := again.next_trial(3)) is not None:
        drawn[record.number] = record.drawn
    assert list(drawn)[: len(begun)] == begun
    assert sorted(record.number for record in again.records) == [0, 1, 2]
    whole = ledger(store_in(tmp_path / "whole"))
    assert [record.drawn for record in again.records] == [whole.next_trial(3).drawn for _ in range(3)]  # type: ignore[union-attr]


def test_a_rung_that_is_known_is_not_recorded_twice(tmp_path: Path) -> None:
    book = ledger(store_in(tmp_path))
    book.next_trial(1)
    book.rung(0, 160, {PSNR: 15.0})
    book.rung(0, 160, {PSNR: 99.0})
    book.rung(0, 320, {PSNR: 16.0})
    assert book[0].rungs == (Rung(160, {PSNR: 15.0}), Rung(320, {PSNR: 16.0}))


def test_a_closed_ledger_changes_nothing_more(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    book = ledger(store)
    book.next_trial(2)
    book.started(0)
    before = read_trials(store)
    book.close()
    book.rung(0, 160, {PSNR: 15.0})
    book.ended(0, "finished")
    assert book.next_trial(2) is None
    assert read_trials(store) == before


def test_what_a_crash_left_of_a_trial_without_a_record_is_no_trial(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    trial_folder(store, 0).write_bytes("vq/history.json", b"[]")
    book = ledger(store)
    assert book.records == []
    book.next_trial(1)
    assert sorted(trial_folder(store, 0).files()) == ["record.json", "trial.yaml"]


def test_passwords_in_a_trials_error_are_not_kept(tmp_path: Path) -> None:
    book = ledger(store_in(tmp_path))
    book.next_trial(1)
    book.ended(0, "failed", "no answer from http://me:secret@host/")
    assert book[0].error == "no answer from http://me:***@host/"


def test_a_damaged_record_is_named_with_its_remedy(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    trial_folder(store, 3).write_bytes("record.json", b'{"number": 3')
    said = r"the record .*trials/0003/record.json is damaged: .*\nhint: delete the folder .*trials/0003; its trial"
    with pytest.raises(InputError, match=said):
        read_trials(store)


# ---- the best ----


def trial(number: int, status: Status, images: int, psnr: float | None) -> TrialRecord:
    rungs = () if psnr is None else (Rung(images, {PSNR: psnr}),)
    return TrialRecord(number, {}, {}, status, rungs)


def test_the_best_is_sought_among_those_that_were_trained_to_the_end() -> None:
    records = [trial(0, "finished", 640, 20.0), trial(1, "finished", 640, 22.0), trial(2, "stopped", 160, 30.0)]
    best = best_of(space(), records)
    assert best is not None and best.number == 1
    smallest = best_of(space(metrics=[{"name": PSNR, "direction": "min"}]), records)
    assert smallest is not None and smallest.number == 0


def test_without_a_finished_trial_the_best_is_one_of_those_that_went_furthest() -> None:
    records = [trial(0, "stopped", 160, 30.0), trial(1, "running", 320, 20.0), trial(2, "failed", 0, None)]
    best = best_of(space(), records)
    assert best is not None and best.number == 1
    assert best_of(space(), records[2:]) is None


# ---- the identity ----


def identity(searched: SearchSpace | None = None, **changes: Any) -> SweepIdentity:
    return replace(SweepIdentity(searched or space(), "tpe", "asha", 0), **changes)


def test_a_sweep_goes_on_when_only_where_and_how_much_it_runs_has_changed(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    assert keep_identity(store, identity()) is False
    assert keep_identity(store, identity(space(budget={"trials": 40}, about="more trials"))) is True


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (identity(space(constraints=[])), r"space\.constraints was \[\"max\(sizes\).*\"\], is \[\]"),
        (identity(seed=7), r"seed was 0, is 7"),
        (identity(searcher="random"), r'searcher was "tpe", is "random"'),
        (
            identity(space(base={"preset": "integration", "set": {"vq.train.global_batch": 64}})),
            r"space\.resolved_base\.vq\.train\.global_batch was 32, is 64",
        ),
        (
            identity(space(base={"preset": "integration", "set": {"compute.workers": 1}})),
            r"space\.compute\.workers was 2, is 1",
        ),
    ],
)
def test_a_sweep_that_was_begun_otherwise_says_what_differs(tmp_path: Path, changed: SweepIdentity, said: str) -> None:
    store = store_in(tmp_path)
    keep_identity(store, identity())
    with pytest.raises(InputError, match=rf"was begun otherwise: {said}\nhint: --name starts another sweep; --force"):
        keep_identity(store, changed)
    assert keep_identity(store, changed, force=True) is True
    assert keep_identity(store, changed) is True


def test_code_that_has_changed_since_is_named_file_by_file(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    keep_identity(store, identity())
    value = store.read_json("sweep.json")
    value["code"]["workflows/training/loop.py"] = "another digest"
    value["code"]["tuning/gone.py"] = value["code"].pop("tuning/ledger.py")
    store.write_json("sweep.json", value)
    said = (
        "the code, tuning/gone.py is gone; the code, tuning/ledger.py is new; "
        "the code, workflows/training/loop.py has changed\n"
    )
    with pytest.raises(InputError, match=said):
        keep_identity(store, identity())


def test_many_differences_are_counted(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    keep_identity(store, identity())
    other = identity(space(constraints=[], metrics=[{"name": PSNR, "direction": "min"}]), searcher="grid", seed=1)
    with pytest.raises(InputError, match=r"; and 1 more\n"):
        keep_identity(store, other)


def test_a_damaged_sweep_file_says_that_force_writes_it_anew(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.write_bytes("sweep.json", b"{")
    with pytest.raises(InputError, match=r"sweep\.json is damaged: .*\nhint: --force writes it anew"):
        keep_identity(store, identity())
    assert keep_identity(store, identity(), force=True) is True
    assert store.read_json("sweep.json") == identity().as_json()


def test_the_code_that_decides_is_that_of_the_science_the_jobs_and_the_search() -> None:
    found = code_digests()
    assert {name.split("/")[0] for name in found} == {"hvqd_model", "workflows", "tuning"}
    assert len(found) > 60
    assert list(differences({"code": found}, {"code": dict(found)})) == []


def test_an_identity_names_no_place() -> None:
    value = identity().as_json()
    assert json.loads(json.dumps(value)) == value
    assert not {"root", "tracking", "compute"} & set(value["space"]["resolved_base"])
