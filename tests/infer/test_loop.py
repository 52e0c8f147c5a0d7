"""The loop: interruption, callbacks, checkpoints and exact resume, on an engine of three lines."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bayesdl._files import read_tensors, write_tensors
from bayesdl._rng import generator
from bayesdl.errors import FileError, MethodError, ResumeMismatch
from bayesdl.infer.checkpoint import Checkpoint, as_checkpoint
from bayesdl.infer.loop import Engine, InterruptedWarning, Run


class Density:
    """Counts gradients; otherwise a standard normal."""

    dim, dtype, device, execution = 2, torch.float64, torch.device("cpu"), "replay"
    sites = (SimpleNamespace(name="w", shape=torch.Size([2])),)
    prior_scale, glance = torch.ones(2, dtype=torch.float64), None

    def __init__(self) -> None:
        self.gradients = 0

    def value_and_grad(
        self, z: torch.Tensor, batch: Any = None, *, target: str = "posterior"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.gradients += len(z)
        return -0.5 * z.square().sum(-1), -z


@dataclass
class Walk(Engine):
    """A random walk that records where it was and can be made to fail."""

    density: Any
    total: int = 20
    label: str = "walk"
    interrupt_at: int = -1

    def init(self) -> dict[str, Any]:
        return {
            "z": torch.zeros(1, 2, dtype=torch.float64),
            "noise": generator(0, "walk"),
            "draws": torch.full((self.total, 2), torch.nan, dtype=torch.float64),
            "last": None,
            "scale": 0.1,
            "flag": True,
        }

    def step(self, state: dict[str, Any]) -> dict[str, Any]:
        noise = torch.randn(1, 2, dtype=torch.float64, generator=state["noise"])
        if state["step"] == self.interrupt_at:
            self.interrupt_at = -1
            raise KeyboardInterrupt
        z = state["z"] + state["scale"] * noise + 0.1 * self.density.value_and_grad(state["z"])[1]
        state["draws"][state["step"]] = z[0]
        return state | {"z": z, "scale": state["scale"] * 1.01}


def full_run() -> dict[str, Any]:
    density = Density()
    return Run().drive(Walk(density), density)  # type: ignore[arg-type]


def test_runs_to_the_end_and_counts() -> None:
    state = full_run()
    assert state["step"] == 20
    assert state["gradients"] == 20
    assert torch.isfinite(state["draws"]).all()


def test_interrupt_keeps_the_last_complete_step_and_its_random_position(tmp_path: Any) -> None:
    density = Density()
    run = Run(checkpoint=Checkpoint(tmp_path / "run", every=100))
    with pytest.warns(InterruptedWarning, match="step 7 of 20"):
        state = run.drive(Walk(density, interrupt_at=7), density)  # type: ignore[arg-type]
    assert state["step"] == 7
    assert run.tally.interrupted
    resumed = Run(checkpoint=Checkpoint(tmp_path / "run", every=100))
    state = resumed.drive(Walk(density), density)  # type: ignore[arg-type]
    assert torch.equal(state["draws"], full_run()["draws"])


def test_real_signal_in_the_middle_of_a_step() -> None:
    class Killed(Walk):
        def step(self, state: dict[str, Any]) -> dict[str, Any]:
            torch.randn(5, generator=state["noise"])
            if state["step"] == 3:
                signal.raise_signal(signal.SIGINT)
            return super().step(state)

    density = Density()
    outer = signal.getsignal(signal.SIGINT)
    # A shell that runs the tests in the background has them ignore the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.warns(InterruptedWarning):
            state = Run().drive(Killed(density), density)  # type: ignore[arg-type]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outer)
    assert state["step"] == 3
    expected = generator(0, "walk")
    for _ in range(3):
        torch.randn(5, generator=expected)
        torch.randn(1, 2, dtype=torch.float64, generator=expected)
    assert torch.equal(state["noise"].get_state(), expected.get_state())


@pytest.mark.parametrize("stop", [1, 10, 13, 19])
def test_stop_and_resume_is_bit_for_bit_and_loses_no_work(tmp_path: Any, stop: int) -> None:
    first, second = Density(), Density()
    checkpoint = Checkpoint(tmp_path / "a" / "run", every=5)
    run = Run(checkpoint=checkpoint, callback=lambda state: state["step"] == stop)
    assert run.drive(Walk(first), first)["step"] == stop  # type: ignore[arg-type]
    assert run.tally.stopped
    again = Run(checkpoint=checkpoint)
    state = again.drive(Walk(second), second)  # type: ignore[arg-type]
    reference = full_run()
    assert torch.equal(state["draws"], reference["draws"])
    assert state["scale"] == reference["scale"]
    assert state["last"] is None
    assert state["flag"] is True
    # one more gradient per process is the probe of the fingerprint, which the counts include
    assert (first.gradients, second.gradients) == (stop + 1, 20 - stop + 1)
    assert again.tally.gradients == 22
    assert again.tally.gradients_here == second.gradients
    assert not list(tmp_path.glob("**/*.part"))


def test_finished_checkpoint_returns_at_once(tmp_path: Any) -> None:
    density = Density()
    for _ in range(2):
        state = Run(checkpoint=as_checkpoint(tmp_path / "run")).drive(Walk(density), density)  # type: ignore[arg-type]
    assert density.gradients == 22
    assert torch.equal(state["draws"], full_run()["draws"])


def test_mismatch_names_every_field_with_both_values(tmp_path: Any) -> None:
    density = Density()
    Run(seed=1, identity={"settings": {"steps": 20}}, checkpoint=Checkpoint(tmp_path / "run")).drive(
        Walk(density),  # type: ignore[arg-type]
        density,
    )
    other = Run(seed=2, identity={"settings": {"steps": 30}}, checkpoint=Checkpoint(tmp_path / "run"))
    with pytest.raises(ResumeMismatch, match=r"(?s)settings: \{'steps': 20\} .*\{'steps': 30\}.*seed: 1 in .* 2 now"):
        other.drive(Walk(density), density)  # type: ignore[arg-type]


def test_other_execution_path_only_with_allow_inexact(tmp_path: Any) -> None:
    density, other = Density(), Density()
    other.execution = "handlers"
    Run(checkpoint=Checkpoint(tmp_path / "run")).drive(Walk(density), density)  # type: ignore[arg-type]
    with pytest.raises(ResumeMismatch, match="allow_inexact"):
        Run(checkpoint=Checkpoint(tmp_path / "run")).drive(Walk(other), other)  # type: ignore[arg-type]
    run = Run(checkpoint=Checkpoint(tmp_path / "run", allow_inexact=True))
    assert run.drive(Walk(other), other)["step"] == 20  # type: ignore[arg-type]


def test_other_density_at_the_same_sites_is_noticed(tmp_path: Any) -> None:
    class Wider(Density):
        def value_and_grad(
            self, z: torch.Tensor, batch: Any = None, *, target: str = "posterior"
        ) -> tuple[torch.Tensor, torch.Tensor]:
            value, grad = super().value_and_grad(z, target=target)
            return value - 1.0, grad

    density, other = Density(), Wider()
    Run(checkpoint=Checkpoint(tmp_path / "run")).drive(Walk(density), density)  # type: ignore[arg-type]
    with pytest.raises(ResumeMismatch, match="log_joint_probe"):
        Run(checkpoint=Checkpoint(tmp_path / "run", allow_inexact=True)).drive(Walk(other), other)  # type: ignore[arg-type]


def test_damaged_and_foreign_files(tmp_path: Any) -> None:
    density = Density()
    file = tmp_path / "run.safetensors"
    Run(checkpoint=Checkpoint(tmp_path / "run")).drive(Walk(density), density)  # type: ignore[arg-type]
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\x00" * 100):
        file.write_bytes(content)
        with pytest.raises(FileError, match=r"run\.safetensors"):
            Run(checkpoint=Checkpoint(tmp_path / "run")).drive(Walk(density), density)  # type: ignore[arg-type]
    write_tensors(file, {"z": torch.zeros(1)}, {"format": 1})
    with pytest.raises(FileError, match="not a checkpoint"):
        Run(checkpoint=Checkpoint(tmp_path / "run")).drive(Walk(density), density)  # type: ignore[arg-type]
    write_tensors(file, {"z": torch.zeros(1)}, {"format": 99})
    with pytest.raises(FileError, match="format 99"):
        Run(checkpoint=Checkpoint(tmp_path / "run")).drive(Walk(density), density)  # type: ignore[arg-type]


def test_checkpoint_holds_plain_tensors_and_json(tmp_path: Any) -> None:
    density = Density()
    Run(checkpoint=Checkpoint(tmp_path / "run")).drive(Walk(density), density)  # type: ignore[arg-type]
    tensors, header = read_tensors(tmp_path / "run.safetensors")
    assert tensors["noise"].dtype == torch.uint8
    assert header["scalars"]["step"] == 20
    assert header["fingerprint"]["sites"] == {"w": [2]}


def test_stages_have_their_own_seed_and_file(tmp_path: Any) -> None:
    run = Run(seed=3, checkpoint=Checkpoint(tmp_path / "run"), callback=lambda state: True)
    stage = run.stage("prior")
    assert stage.seed != run.seed
    assert stage.callback is None
    assert stage.checkpoint is not None
    assert stage.checkpoint.file == tmp_path / "run.prior.safetensors"
    assert stage.tally is run.tally


def test_too_early_says_what_is_missing() -> None:
    run = Run()
    run.tally.stopped = True
    assert isinstance(run.too_early("the first draw"), MethodError)
    run.tally.interrupted = True
    assert isinstance(run.too_early("the first draw"), KeyboardInterrupt)
    assert "the first draw" in str(run.too_early("the first draw"))


def test_bar_appears_only_after_its_patience(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    density = Density()
    Run(progress=True).drive(Walk(density), density)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("bayesdl.infer.progress.PATIENCE", 0.0)
    Run(progress=True).drive(Walk(density), density)  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert "walk" in captured.err
    assert "20/20" in captured.err
    assert captured.out == ""
    Run(progress=False).drive(Walk(density), density)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


def test_bad_checkpoint_setting() -> None:
    with pytest.raises(MethodError, match="every=0"):
        Checkpoint("run", every=0)


def test_error_in_a_step_passes_through_without_a_warning() -> None:
    class Broken(Walk):
        def step(self, state: dict[str, Any]) -> dict[str, Any]:
            raise MethodError("broken")

    density = Density()
    with pytest.raises(MethodError, match="broken"):  # a warning would be an error of another class
        Run().drive(Broken(density), density)  # type: ignore[arg-type]
