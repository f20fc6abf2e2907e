"""The README's Python runs, in order, and prints what the README says."""

import re
import shutil
from pathlib import Path

import pytest

from actionunits.cli import sample_photo

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.mark.slow
def test_snippets_print_what_they_promise(tmp_path, monkeypatch, capsys):
    shutil.copy(sample_photo(), tmp_path / "photo.jpg")  # a PNG by any name
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    blocks = BLOCK.findall(README.read_text(encoding="utf-8"))
    assert len(blocks) >= 3
    for code, promised in blocks:
        exec(compile(code, str(README), "exec"), namespace)
        printed = capsys.readouterr().out
        if promised:
            assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", promised).split()
            for found, expected in zip(NUMBER.findall(printed), NUMBER.findall(promised), strict=True):
                assert float(found) == pytest.approx(float(expected), abs=0.02)
