"""A run folder in a temporary directory, and the command line called in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_nrml.__main__ import main

CONFIG = """\
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  logger: {class_path: RunCSVLogger, init_args: {flush_logs_every_n_steps: 1}}
  log_every_n_steps: 1
model:
  class_path: cli_fakes.TinyModule
  init_args: {embedding_dim: 4, rule: {lr: 0.05}}
data:
  class_path: cli_fakes.TinyData
  init_args: {batch_size: 8}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with ``tiny.yaml``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def nrml(folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call ``nrml`` with arguments: ``(exit code, stdout, stderr)``."""

    def call(*args: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(list(args))
        out = capfd.readouterr()
        return code, out.out, out.err

    return call
