"""Numbers without sense on the scripts' command lines: refused by name and value, before anything is made."""

import pytest
from tiny_run import load_script

EXPRESSION = ("pretrain_expression", ["--synthetic", "-"])
FACES = ("pretrain_face_recognition", ["--data", "-"])
LANDMARKS = ("train_landmarks", ["--data", "-"])


@pytest.mark.parametrize(
    ("script", "option", "value"),
    [
        (EXPRESSION, "--steps", "-3"),  # else an encoder that learned nothing would be the result
        (EXPRESSION, "--validate-every", "0"),
        (EXPRESSION, "--validation-triplets", "0"),
        (EXPRESSION, "--batch", "none"),
        (EXPRESSION, "--lr", "nan"),
        (EXPRESSION, "--image-size", "-64"),
        (FACES, "--steps", "0"),
        (FACES, "--batch", "0"),
        (FACES, "--held-out", "0"),
        (FACES, "--held-out", "1"),
        (FACES, "--held-out-pictures", "0"),
        (LANDMARKS, "--epochs", "0"),
        (LANDMARKS, "--check-every", "0"),
        (LANDMARKS, "--batch", "0"),
        (LANDMARKS, "--map-size", "-1"),
        (("benchmark", []), "--repeats", "0"),
        (("benchmark", []), "--batches", "0"),
        (("checkpoint_table", []), "--rounds", "0"),
        (("plot_au_embeddings", ["--models", "-", "--data", "-"]), "--pictures", "-5"),
    ],
    ids=str,
)
def test_numbers_without_sense_are_refused(script, option, value, tmp_path, monkeypatch, capsys):
    name, arguments = script
    output = [] if name in ("benchmark", "checkpoint_table") else ["--output", str(tmp_path / "run")]
    words = [*arguments, *output, f"{option}={value}"]
    monkeypatch.setattr("sys.argv", [name, *words])
    with pytest.raises(SystemExit):
        load_script(name).main()
    message = capsys.readouterr().err
    assert f"argument {option}: {value} is no " in message
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_named(monkeypatch, capsys):
    benchmark = load_script("benchmark")
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--device", "cuda"])
    assert "--device cuda: PyTorch finds no GPU" in capsys.readouterr().err
