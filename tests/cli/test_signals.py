"""A fit that is told to stop: between two steps, saved, and gone on with to the same bits."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lightning_nrml.__main__ import main
from lightning_nrml.cli.signals import StopTogether, requeue

# 20 steps per epoch
SHORT = {"max_epochs: 30": "max_epochs: 3", "warmup_steps: 40": "warmup_steps: 10", "every_n_epochs: 5": ""}
FIT = ["fit", "--config", "quickstart.yaml", "--trainer.accelerator=cpu"]
LAST = Path("runs/quickstart/checkpoints/last.ckpt")


def write_recipe(folder: Path) -> None:
    """The quickstart, three epochs long."""
    text = (Path(__file__).parents[2] / "recipes/quickstart.yaml").read_text()
    for old, new in SHORT.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "quickstart.yaml").write_text(text)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The last checkpoint of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    write_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(FIT) == 0
        return load(LAST)


@pytest.fixture(autouse=True)
def recipe(folder: Path) -> None:
    write_recipe(folder)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Send this process a signal in the middle of a training step."""

    real = StopTogether.on_train_batch_end

    def tell(step: int, number: int) -> None:
        def end(self, trainer, *args):
            if trainer.global_step == step:
                os.kill(os.getpid(), number)
            real(self, trainer, *args)

        monkeypatch.setattr(StopTogether, "on_train_batch_end", end)

    return tell


@pytest.fixture
def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM job of one task, and a ``scontrol`` that keeps what it is asked; returns its log."""
    tools = folder / "tools"
    tools.mkdir()
    script = tools / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
    script.chmod(0o755)
    names = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES")
    ranks = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
    job = {"SLURM_JOB_ID": "78", "SLURM_JOB_NAME": "pretrain", "SLURM_NODELIST": "localhost"}
    for name, value in {**dict.fromkeys(names, "1"), **dict.fromkeys(ranks, "0"), **job}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return folder / "asked"


@pytest.fixture
def terminal() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell's background jobs ignore it, and hand that down."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def assert_same(got: dict, want: dict) -> None:
    assert got["global_step"] == want["global_step"]
    assert got["state_dict"].keys() == want["state_dict"].keys()
    for name, value in want["state_dict"].items():
        assert torch.equal(got["state_dict"][name].nan_to_num(), value.nan_to_num()), name


@pytest.mark.parametrize(("step", "saved"), [(1, 1), (33, 33), (40, 41)])
def test_sigterm_saves_and_the_run_goes_on_to_the_same_bits(nrml, told, whole, step, saved, monkeypatch):
    """At the last step of an epoch (40) the run goes on through validation, to the next step."""
    told(step, signal.SIGTERM)
    code, _, err = nrml(*FIT)
    assert code == 143
    assert "nrml: stopped by SIGTERM. Go on with the same command and --ckpt_path last." in err
    assert load(LAST)["global_step"] == saved
    told(-1, signal.SIGTERM)
    code, _, err = nrml(*FIT, "--ckpt_path=last")
    assert code == 0, err
    assert_same(load(LAST), whole)


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_does_the_same(nrml, told, whole):
    told(33, signal.SIGINT)
    code, _, err = nrml(*FIT)
    assert code == 130
    assert "stopping once a step is done; Ctrl-C again stops at once" in err
    assert "nrml: stopped by Ctrl-C. Go on with the same command and --ckpt_path last." in err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert load(LAST)["global_step"] == 33
    told(-1, signal.SIGINT)
    assert nrml(*FIT, "--ckpt_path=last")[0] == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(load(LAST), whole)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("error", [BrokenPipeError, RuntimeError("reentrant call")])
def test_ctrl_c_saves_even_if_nobody_can_be_told(nrml, told, monkeypatch, error):
    """``nrml fit | tee log``: the same Ctrl-C has ended ``tee``. Or stderr was just being written to."""
    real = StopTogether.note_interrupt

    class Closed:
        def write(self, text):
            raise error

    def note(self, *args):
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", Closed())
            real(self, *args)

    monkeypatch.setattr(StopTogether, "note_interrupt", note)
    told(3, signal.SIGINT)
    assert nrml(*FIT)[0] == 130
    assert load(LAST)["global_step"] == 3


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_twice_stops_at_once_and_once_does_not_hide_sigterm(nrml, told, monkeypatch):
    real = StopTogether.note_interrupt

    def twice(self, signum, frame):
        real(self, signum, frame)
        os.kill(os.getpid(), again)

    monkeypatch.setattr(StopTogether, "note_interrupt", twice)
    told(3, signal.SIGINT)
    again = signal.SIGINT
    assert nrml(*FIT)[0] == 1
    assert not LAST.exists()
    again = signal.SIGTERM
    assert nrml(*FIT)[0] == 143
    assert load(LAST)["global_step"] == 3


def test_ctrl_c_stays_ignored_in_the_background(nrml, told):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        told(3, signal.SIGINT)
        assert nrml(*FIT, "--trainer.max_epochs=2")[0] == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_told_at_the_very_last_step_the_run_ends_as_any_other(nrml, told, whole):
    told(60, signal.SIGTERM)
    assert nrml(*FIT)[0] == 0
    got = load(LAST)
    assert_same(got, whole)
    for part in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        assert got["loops"]["fit_loop"][part] == whole["loops"]["fit_loop"][part], part


def test_without_a_last_checkpoint_the_run_stops_all_the_same(nrml, told, folder):
    told(3, signal.SIGTERM)
    assert nrml(*FIT, "--checkpoint_last.every_n_epochs=0")[0] == 143
    assert nrml(*FIT, "--trainer.enable_checkpointing=false")[0] == 143
    assert not LAST.exists()


def test_a_slurm_job_is_queued_again_and_goes_on_by_itself(nrml, told, whole, slurm, monkeypatch):
    """With the same command, the same metrics file and the same bits."""
    told(33, signal.SIGUSR1)
    code, _, err = nrml(*FIT)
    assert code == 143
    assert "nrml: the time of job 78 ends: it is queued again, and goes on from last.ckpt then." in err
    assert slurm.read_text() == "requeue 78\n"
    assert load(LAST)["global_step"] == 33
    assert not list(Path("runs").rglob("hpc_ckpt*"))
    told(-1, signal.SIGUSR1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    code, _, err = nrml(*FIT)
    assert code == 0, err
    assert_same(load(LAST), whole)
    with Path("runs/quickstart/metrics.csv").open() as file:
        epochs = {row["epoch"] for row in csv.DictReader(file)}
    assert epochs == {"0", "1", "2"}


def test_what_another_job_or_an_earlier_run_left_is_not_gone_on_with(nrml, told, whole, slurm, monkeypatch):
    told(21, signal.SIGTERM)
    assert nrml(*FIT)[0] == 143
    assert not slurm.exists()
    told(-1, signal.SIGTERM)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "79")
    steps: list[int] = []
    real = StopTogether.on_train_batch_end
    monkeypatch.setattr(
        StopTogether,
        "on_train_batch_end",
        lambda self, trainer, *args: (steps.append(trainer.global_step), real(self, trainer, *args)),
    )
    assert nrml(*FIT)[0] == 0
    assert steps[0] == 1
    assert_same(load(LAST), whole)


def test_a_job_that_cannot_be_queued_again_says_what_to_do(nrml, told, slurm, monkeypatch):
    (slurm.parent / "tools/scontrol").write_text("#!/bin/sh\nexit 1\n")
    told(3, signal.SIGUSR1)
    code, _, err = nrml(*FIT)
    assert code == 143
    assert "the time of job 78 ends, but it could not be queued again" in err
    assert "submit it with --ckpt_path last" in err
    (slurm.parent / "tools/scontrol").unlink()
    monkeypatch.setenv("PATH", str(slurm.parent / "tools"))
    assert "could not be queued again" in nrml(*FIT)[2]


def test_one_task_queues_the_job_again_for_all(slurm, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert requeue() == "the time of job 78 ends; stopped."
    assert not slurm.exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert "queued again" in requeue()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "78")  # as for one task of each array
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert "queued again" in requeue()
    assert slurm.read_text() == "requeue 78\nrequeue 78_3\n"


def test_a_restarted_job_names_a_checkpoint_that_is_cut_off(nrml, slurm, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    LAST.parent.mkdir(parents=True)
    LAST.write_bytes(b"half")
    code, _, err = nrml(*FIT)
    assert code == 2
    assert "last.ckpt is no whole checkpoint" in err
