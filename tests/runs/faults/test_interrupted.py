"""SIGTERM and Ctrl-C: the step is finished and saved, a message says how to continue, and that changes nothing."""

from __future__ import annotations

import json
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from forked_runs import logged_step
from forks import Forks, Running, Whole
from run_checks import events
from same_run import assert_same_run
from transformers import TrainerControl, TrainerState
from typer.testing import CliRunner

from ept.cli.main import app
from ept.runs.config import RunConfig
from ept.runs.folder import RunFolder
from ept.runs.processes import Processes
from ept.runs.stop import Interrupted, StopSignals
from ept.runs.train import train

Configure = Callable[..., RunConfig]
STOPPED = {signal.SIGTERM: ("SIGTERM", 143), signal.SIGINT: ("Ctrl-C", 130)}


def after_step(step: int, run: Path, running: Running) -> Running:
    while logged_step(run) < step:
        assert running.at_work(), running.said()
        time.sleep(0.002)
    return running


@pytest.mark.parametrize("number", STOPPED, ids=lambda number: number.name)
def test_a_signal_finishes_the_step_and_saves(
    forks: Forks, whole: Whole, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "a run"
    running = after_step(9, run, forks.start(*whole.command, run))
    running.send(number)
    name, code = STOPPED[number]
    assert running.ended() == code, running.said()
    lines = running.said().splitlines()
    assert f"{name}: finishing this step and saving; a second Ctrl-C stops at once" in lines
    found = re.fullmatch(rf"stopped by {name} after step (\d+) of \d+, which is saved: `ept (.*)` continues", lines[-1])
    assert found, running.said()
    assert "Traceback" not in running.said()

    step = int(found[1])
    assert 9 <= step < whole.steps
    checkpoint = RunFolder(run).last_checkpoint()
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{step}"
    code, said = forks.run(*shlex.split(found[2]))
    assert code == 0, said
    assert_same_run(run, whole.folder)


def test_an_interrupted_comparison_goes_on(forks: Forks, whole: Whole, tmp_path: Path) -> None:
    settings = [f"compare.methods={json.dumps(['ept'])}", "compare.seeds=[0]", f"output_dir={tmp_path / 'comparison'}"]
    command = ["compare", "--config", whole.command[2], *(part for s in settings for part in ("--set", s))]
    running = forks.start(*command)
    while not (logs := list((tmp_path / "comparison").glob("runs/*/metrics.jsonl"))):
        assert running.at_work(), running.said()
        time.sleep(0.002)
    run = logs[0].parent
    after_step(9, run, running).send(signal.SIGTERM)
    assert running.ended() == 143, running.said()
    *_, stopped, again = running.said().splitlines()
    assert re.match(r"stopped by SIGTERM after step \d+ of", stopped), running.said()
    assert again == "run the same command again to continue the comparison"
    assert RunFolder(run).last_checkpoint() is not None

    code, said = forks.run(*command)
    assert code == 0, said
    assert [path.parent for path in (tmp_path / "comparison").glob("runs/*/results.json")] == [run]
    assert events(run) == events(whole.folder)


@pytest.fixture(autouse=True)
def signals_are_not_ignored() -> Iterator[None]:
    """As Ctrl-C is in what a shell runs in the background, this suite included."""
    before = {number: signal.getsignal(number) for number in STOPPED}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def signals(folder: RunFolder) -> Iterator[StopSignals]:
    with StopSignals(folder, Processes()) as signals:
        yield signals


CONTROL, STATE = TrainerControl(), TrainerState(global_step=3, max_steps=5)


@pytest.mark.parametrize("number", STOPPED)
def test_the_first_signal_is_noted_and_the_second_stops_at_once(
    signals: StopSignals, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    signals.on_train_begin(None, STATE, CONTROL)
    signal.raise_signal(number)
    assert signals.received == number
    with pytest.raises(Interrupted) as stop:
        signal.raise_signal(number)
    assert stop.value.exit_code == STOPPED[number][1]
    assert capfd.readouterr().err.count("finishing this step and saving") == 1


@dataclass(frozen=True)
class Signalled(Processes):
    """One of two ranks; the other one has received `number`."""

    world_size: int = 2
    number: int = 0
    calls: list[str] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        return [value, self.number]

    def leave(self) -> None:
        self.calls.append("leave")


def test_in_several_processes_a_second_signal_changes_nothing(
    folder: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    """Launchers repeat them, the last time to processes that are about to exit."""
    with StopSignals(folder, Signalled()) as signals:
        signals.on_train_begin(None, STATE, CONTROL)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        with pytest.raises(Interrupted):
            signals.on_train_end(None, STATE, CONTROL)
    signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == "\nSIGTERM: finishing this step and saving\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_another_process_stops_this_one(folder: RunFolder, rank: int) -> None:
    """After the step, once its checkpoint is whole."""
    others, control = Signalled(rank=rank, number=signal.SIGINT), TrainerControl()
    signals = StopSignals(folder, others)
    signals.on_step_end(None, STATE, control)
    assert control.should_save
    assert others.calls == []
    with pytest.raises(Interrupted, match="stopped by Ctrl-C after step 3 of 5, which is saved"):
        signals.on_save(None, STATE, control)
    assert others.calls == ["leave"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_another_process_after_the_last_step_stops_this_one(folder: RunFolder, rank: int) -> None:
    others = Signalled(rank=rank, number=signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        StopSignals(folder, others).on_train_end(None, STATE, CONTROL)
    assert others.calls == ["leave"]


@pytest.mark.parametrize("rank, said", [("0", "stopped here\n"), ("1", "")])
def test_rank_0_alone_reports_a_stop(monkeypatch: pytest.MonkeyPatch, rank: str, said: str) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise Interrupted("stopped here", signal.SIGINT)

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("ept.runs.train.train", stop)
    result = CliRunner().invoke(app, ["train"])
    assert (result.exit_code, result.stderr) == (130, said)


@pytest.mark.parametrize(
    "here, everywhere, command",
    [
        ("2", "2", "`torchrun --nproc-per-node 2 -m ept train --resume --output 'a b'`"),
        ("2", "4", "the same launch with `-m ept train --resume --output 'a b'`"),
    ],
    ids=["one machine", "two machines"],
)
def test_how_several_processes_continue(
    here: str, everywhere: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setenv("WORLD_SIZE", everywhere)
    assert StopSignals(RunFolder(Path("a b")), Processes()).resume_command() == command


@pytest.mark.usefixtures("signals")
def test_away_from_the_steps_a_signal_stops_at_once(folder: RunFolder) -> None:
    with pytest.raises(Interrupted, match="stopped by SIGTERM: nothing has been written"):
        signal.raise_signal(signal.SIGTERM)
    folder.config.touch()
    resume = f"`ept train --resume --output {folder.path}` continues from the last checkpoint, or from the start"
    with pytest.raises(Interrupted, match=re.escape(f"stopped by Ctrl-C: {resume}")):
        signal.raise_signal(signal.SIGINT)


def test_a_run_that_is_not_replaced_yet_is_not_offered(configure: Configure) -> None:
    """It is another run, and continuing it is not what was requested."""
    config = configure("bert")
    folder = RunFolder(Path(str(config.output_dir)))
    folder.path.mkdir()
    folder.config.touch()
    with pytest.raises(Interrupted, match="stopped by Ctrl-C: nothing has been written"):
        train(config, overwrite=True, on_ready=lambda run: signal.raise_signal(signal.SIGINT))


def test_a_signal_after_the_last_step_is_not_lost(signals: StopSignals) -> None:
    signals.on_train_begin(None, STATE, CONTROL)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        signals.on_train_end(None, STATE, CONTROL)


def test_a_signal_while_the_training_ends_is_not_lost(signals: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the agreement and the end of training: too late for one, too early to stop at once."""
    signals.on_train_begin(None, STATE, CONTROL)
    gather = Processes.gather
    monkeypatch.setattr(Processes, "gather", lambda p, v: (gather(p, v), signal.raise_signal(signal.SIGINT))[0])
    with pytest.raises(Interrupted, match="stopped by Ctrl-C"):
        signals.on_train_end(None, STATE, CONTROL)


def test_an_interruption_is_no_ordinary_error() -> None:
    """Code that continues after errors, as a comparison does, must not continue after Ctrl-C."""
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert not issubclass(Interrupted, Exception)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in STOPPED]


def test_handlers_are_put_back(folder: RunFolder) -> None:
    before = handlers()

    def fail() -> None:
        with StopSignals(folder, Processes()):
            assert not set(handlers()) & set(before)
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert handlers() == before


def test_ignored_signals_stay_ignored(folder: RunFolder) -> None:
    """A run in the background of a script, or under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals(folder, Processes()):
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_the_handlers_alone(folder: RunFolder) -> None:
    before, within = handlers(), []

    def elsewhere() -> None:
        with StopSignals(folder, Processes()):
            within.append(handlers())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert within == [before]
