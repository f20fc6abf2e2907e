"""The README's Python runs, in order, and prints what the README says."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

import toy_videos
from actionunits.cli import sample_photo
from actionunits.data.corpora import get_corpus

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.mark.slow
def test_snippets_print_what_they_promise(tmp_path, monkeypatch, capsys):
    shutil.copy(sample_photo(), tmp_path / "photo.jpg")  # a PNG by any name
    toy_videos.write(tmp_path / "clip.mp4", [Image.open(sample_photo()).convert("RGB")] * 3)
    get_corpus("bp4d").write_tiny(tmp_path / "BP4D")
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
