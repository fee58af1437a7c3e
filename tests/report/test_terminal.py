"""Progress and tables on a terminal. ``pytest tests/report/test_terminal.py``."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import edgetrain
from edgetrain.report import terminal
from edgetrain.training.callbacks import Progress
from edgetrain.training.run import parse_record

STANDING = Progress(3, 20, "conv 1x28x28-16x14x14", 0, 12, 29, 30, 400, 469, 0.0557, 0.9923, 4 << 20, 64 << 20, 10, 30)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_terminal_shows_bar_percentage_epoch_and_loss(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None, markup=False)
    monkeypatch.setattr(terminal, "Console", lambda **settings: console)
    live = terminal.LiveProgress()
    live._run = live._bars.add_task("run", figures="", total=1.0)
    live._epoch = live._bars.add_task("epoch", figures="", total=None)
    live.stepped(STANDING)
    console.print(live._bars.get_renderable())
    run, cell = (line for line in out.getvalue().splitlines() if line.strip())
    assert "19%" in run
    assert "left" in run
    assert "━" in run
    for part in ("cell 1/12 conv 1x28x28-16x14x14  epoch 30/30", "━", "85%", "loss 0.0557"):
        assert part in cell
    assert len(cell) <= width


@pytest.mark.parametrize("name", ["exp[/2]", "x[bold]y", "[red]", "a]b["])
def test_names_are_not_taken_for_markup(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = edgetrain.fit("mlp:4", "digits", run_dir=name, epochs=1, device="cpu")
    terminal.show_run(run.record)
    assert f"run folder {name}\n" in capsys.readouterr().out


def test_a_forged_record_sends_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = edgetrain.fit("mlp:4", "digits", run_dir=tmp_path / "r", epochs=1, device="cpu")
    forged = json.loads((run.path / "record.json").read_text())
    forged["cells"][0]["name"] = "a\x1b[31mred\x07"
    forged["votes"]["\x1b[2Jsum"] = 0.5
    forged["input"] = "na\u00efve\u00a0\u6f22"
    forged["citations"] = ["\x1b]0;title\x07", "[bold]x"]
    record, _ = parse_record(json.dumps(forged), run.path)
    terminal.show_run(record)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[bold]x" in out
    assert record.input == "na\u00efve\u00a0\u6f22"  # letters and spaces of any language stay
