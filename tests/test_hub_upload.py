"""hub_upload.py against a Hub on loopback: what is refused, what is sent, what comes back."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel, pipeline

from actionunits.export_code import ENTRY, export_code
from actionunits.model_card import weights_hashes, write_card
from actionunits.publishing import HubUpload, PublishError, list_files
from actionunits.publishing_checks import (
    CHECKS,
    check_card,
    check_code,
    check_files,
    check_folder,
    check_model,
)
from fake_hub import FOREIGNER, READER, FakeHub, connect
from scripts import ROOT
from toy_run import publishable_folder

TEMPLATE = ROOT / "model_cards" / "template.md"
REPO = "lab/tiny"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return publishable_folder(tmp_path_factory.mktemp("publishable"), TEMPLATE)


@pytest.fixture
def folder(original, tmp_path):
    """A folder that is fit to be published, to be spoilt by a test."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture
def publish(hub_upload, monkeypatch, capsys):
    """Run the command; returns its exit code and what it printed. `quick` leaves out what loads the model."""

    def run(folder, *options, quick=True):
        if quick:
            for check in ("model", "code"):
                monkeypatch.setitem(CHECKS, check, lambda folder: [])
        code = hub_upload.main([str(folder), "--repo", REPO, *options])
        return code, "".join(capsys.readouterr())

    return run


def test_publishes_tags_and_reads_back(hub, folder, publish):
    code, said = publish(folder, "--yes", "--tag", "v7", quick=False)
    assert code == 0, said
    assert "Access to lab/tiny as alice" in said and "all hashes are equal" in said
    sent = hub.files(REPO, "v7")
    for file in folder.rglob("*"):
        if file.name != "README.md":
            assert sent[file.name] == file.read_bytes(), file.name
    card = sent["README.md"].decode()
    assert 'model="lab/tiny"' in card and "FOLDER_OF_THIS_MODEL" not in card
    assert f"{len(sent) - 1} of {len(sent) - 1} files" in said  # .gitattributes is the Hub's own
    assert not hub.repos[REPO].private
    assert any(request.startswith("GET /lab/tiny/resolve/") for request in hub.requests)
    assert any(request.startswith("POST /lfs-verify") for request in hub.requests)


def test_what_was_published_loads_by_name(hub, folder, publish, photo, landmarks):
    assert publish(folder, "--yes")[0] == 0
    model, info = AutoModel.from_pretrained(REPO, output_loading_info=True)
    assert not any(info.values())
    known = {"image": photo, "landmarks": landmarks}
    assert pipeline("au-detection", model=REPO)(known) == pipeline("au-detection", model=str(folder))(known)


def test_dry_run_needs_no_network_and_sends_nothing(folder, publish, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)
    code, said = publish(folder, "--dry-run", quick=False)
    assert code == 0, said
    for name in ("files: ok", "card: ok", "model: ok", "code: ok", "model.safetensors", "nothing was sent"):
        assert name in said, name
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.name != "README.md")
    assert f"{(folder / 'model.safetensors').stat().st_size:,} bytes" in said
    assert int(said.split(" bytes, to lab/tiny")[0].split()[-1].replace(",", "")) >= total


def test_folder_itself_stays_as_it_is(hub, folder, publish):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert publish(folder, "--yes", "--with-code", "--dry-run")[0] == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_read_only_folder_is_fit(folder, publish):
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    command = [sys.executable, str(ROOT / "hub_upload.py"), str(folder), "--repo", REPO, "--dry-run"]
    if os.geteuid() == 0 and shutil.which("setpriv"):  # root may write everywhere, unless it gives that up
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    run = subprocess.run(command, capture_output=True, text=True)
    folder.chmod(0o755)
    assert run.returncode == 0 and "nothing was sent" in run.stdout, run.stderr


@pytest.mark.parametrize("options", [[], ["--with-code"]])
def test_nothing_is_written_through_links(folder, publish, tmp_path, options):
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / "README.md").rename(outside / "README.md")
    (folder / "README.md").symlink_to(outside / "README.md")
    (folder / "face_landmarks").symlink_to(outside)
    before = (outside / "README.md").read_bytes()
    code, said = publish(folder, "--dry-run", *options)
    assert code == 1
    for name in ("README.md", "face_landmarks"):
        assert f"{name} is a link; put the file itself there." in said
    assert os.listdir(outside) == ["README.md"] and (outside / "README.md").read_bytes() == before


def test_what_cannot_be_copied_is_named(folder, publish):
    os.mkfifo(folder / "pipe")
    assert publish(folder, "--dry-run") == (1, f"`{folder}/pipe` is a named pipe\n")


def test_second_run_sends_nothing_and_a_changed_file_alone(hub, folder, publish):
    assert publish(folder, "--yes")[0] == 0
    head, seen = hub.repos[REPO].head, len(hub.requests)
    code, said = publish(folder, "--yes")
    assert code == 0 and "0 of 6 files, 0 bytes" in said, said
    assert hub.repos[REPO].head == head
    assert not [r for r in hub.requests[seen:] if "/commit/" in r or r.startswith("PUT /lfs")]
    with (folder / "README.md").open("a") as card:
        card.write("\nOne more line.\n")
    code, said = publish(folder, "--yes")
    assert code == 1 and "has a tag v0.1.0 already" in said
    code, said = publish(folder, "--yes", "--tag", "v2")
    assert code == 0 and "1 of 6 files" in said
    assert hub.repos[REPO].tags["v2"] != hub.repos[REPO].tags["v0.1.0"]


@pytest.mark.parametrize(
    "request_",
    ["PUT /lfs/", "POST .*/commit/", "POST .*/tag/", "GET .*/resolve/.*config", "POST /lfs-verify"],
)
@pytest.mark.parametrize("how", ["cut", 500])
def test_resumes_after_an_interruption(hub, folder, publish, request_, how):
    hub.fail(request_, how, times=99)  # more often than the client tries by itself
    code, said = publish(folder, "--yes")
    assert code == 1, said
    assert ("cannot be reached" if how == "cut" else "status 500") in said
    assert "will not be sent again" in said
    arrived, seen = set(hub.objects), len(hub.requests)
    hub._failures.clear()
    code, said = publish(folder, "--yes")
    assert code == 0, said
    uploads = {r.removeprefix("PUT /lfs/") for r in hub.requests[seen:] if r.startswith("PUT /lfs/")}
    assert not uploads & arrived, "sent again what had arrived"
    assert hub.repos[REPO].tags["v0.1.0"] == hub.repos[REPO].head


@pytest.mark.parametrize("name", ["model.onnx", "model-00001-of-00002.safetensors"])
def test_weights_of_an_older_version_may_not_stay(hub, folder, publish, name):
    assert publish(folder, "--yes")[0] == 0
    repo = hub.repos[REPO]
    head = repo.head
    repo.commits[head][name] = repo.commits[head]["model.safetensors"]
    (folder / "LICENSE").write_text("MIT")
    code, said = publish(folder, "--yes", "--tag", "v2")
    assert code == 1 and f"lab/tiny has {name}, of another version; delete that there" in said
    assert repo.head == head and "v2" not in repo.tags
    del repo.commits[head][name]
    assert publish(folder, "--yes", "--tag", "v2")[0] == 0


def test_what_somebody_else_sends_meanwhile_is_kept(hub, folder, monkeypatch):
    upload = HubUpload(REPO)
    upload.create(private=False, gated=None)
    repo, look = hub.repos[REPO], upload.api.model_info

    def look_before_a_change(name):
        found = look(name)
        files = repo.commits[repo.head]
        repo.commit({**files, "config.json": files[".gitattributes"]})
        return found

    monkeypatch.setattr(upload.api, "model_info", look_before_a_change)
    with pytest.raises(PublishError, match="Somebody else has changed lab/tiny meanwhile; run this again"):
        upload.send(list_files(folder), "all")
    assert set(hub.files(REPO)) == {".gitattributes", "config.json"}


def test_damage_on_the_way_is_found(hub, folder):
    upload = HubUpload(REPO)
    upload.create(private=False, gated=None)
    files = list_files(folder)
    sha = upload.send(upload.missing(files), "all")
    hub.repos[REPO].commits[sha]["metrics.json"].data += b" "
    with pytest.raises(PublishError, match=r"other content for \['metrics.json'\]"):
        upload.read_back(files, sha)


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("hf_wrong", REPO, "The Hub refuses the token; run `hf auth login`"),
        (READER, REPO, "The token may only read"),
        (FOREIGNER, REPO, "lab/tiny belongs to lab, but the token is bob's, who may write to bob"),
        *(
            ("", name, f"{name!r} is not a name of a repository; give --repo org/name")
            for name in ("no-slash", "lab/a/b", "lab/tiny.git", "lab/ti--ny", "lab/..", "läb/tiny")
        ),
    ],
)
def test_access_comes_first(hub, folder, hub_upload, monkeypatch, capsys, token, repo, message):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setitem(CHECKS, "files", lambda folder: pytest.fail("checked before the access was"))
    assert hub_upload.main([str(folder), "--repo", repo, "--yes"]) == 1
    assert message in capsys.readouterr().err
    assert not hub.repos


@pytest.mark.parametrize("tag", ["", "main", "a b", "-v1"])
def test_a_tag_that_cannot_be_comes_first(folder, hub_upload, capsys, tag):
    with pytest.raises(SystemExit) as stop:
        hub_upload.main([str(folder), "--repo", REPO, f"--tag={tag}", "--dry-run"])
    assert stop.value.code == 2 and f"{tag!r} cannot name a version" in capsys.readouterr().err


def test_without_a_token(hub, folder, publish, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    code, said = publish(folder, "--yes")
    assert code == 1 and "There is no token; run `hf auth login`, or set HF_TOKEN." in said


def test_no_network(folder, publish, monkeypatch, tmp_path):
    with FakeHub() as gone:
        connect(monkeypatch, gone, tmp_path / "cache")
    code, said = publish(folder, "--yes")
    assert code == 1 and f"The Hub at {gone.url} cannot be reached" in said


def test_a_hub_in_trouble(hub, folder, publish):
    hub.fail("GET /api/whoami", 503)
    code, said = publish(folder, "--yes")
    assert code == 1 and "The Hub answered with status 503" in said


def test_nobody_to_ask_means_no(hub, folder, publish, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    code, said = publish(folder)
    assert code == 1 and "say --yes" in said and not hub.repos
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: "n")
    assert publish(folder)[0] == 1 and not hub.repos
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    assert publish(folder)[0] == 0 and REPO in hub.repos


def test_visibility_of_an_existing_repository_is_not_changed_silently(hub, folder, publish):
    assert publish(folder, "--yes", "--private")[0] == 0
    assert hub.repos[REPO].private
    code, said = publish(folder, "--yes", "--tag", "v2")
    assert code == 1 and "exists and is private" in said


def test_licensed_data_needs_a_word(hub, tmp_path, publish):
    folder = publishable_folder(tmp_path / "bp4d", TEMPLATE, corpus="bp4d")
    code, said = publish(folder, "--yes")
    assert code == 1 and "say --i-hold-the-rights" in said and "Binghamton University" in said
    code, said = publish(folder, "--yes", "--i-hold-the-rights")
    assert code == 1 and "--gated manual, auto or no" in said
    assert not hub.repos
    code, said = publish(folder, "--yes", "--i-hold-the-rights", "--gated", "manual")
    assert code == 0, said
    assert hub.repos[REPO].gated == "manual"
    order = [r for r in hub.requests if "/settings" in r or "/commit/" in r]
    assert order[0].startswith("PUT"), "files were open to everybody before the gate was"
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.license == "other" and "BP4D" in card.data.to_dict()["extra_gated_prompt"]


def test_unrecorded_data_counts_as_licensed(folder, publish):
    (folder / "run.json").unlink()
    code, said = publish(folder, "--dry-run")
    assert code == 1 and "Nobody recorded what the model was trained on" in said


def test_with_code(hub, folder, publish):
    code, said = publish(folder, "--yes", "--with-code")
    assert code == 0, said
    sent = hub.files(REPO)
    assert {f"{ENTRY}.py", "modeling_escda.py", "face_landmarks/model.safetensors"} <= set(sent)
    assert json.loads(sent["config.json"])["auto_map"]["AutoModel"] == f"{ENTRY}.GdaForAUDetection"
    assert 'model="lab/tiny", trust_remote_code=True' in sent["README.md"].decode()


@pytest.mark.slow
def test_a_stranger_loads_it_from_the_hub(hub, folder, publish, tmp_path):
    """The whole way: published with its code, then used by name where the package is hidden."""
    status, said = publish(folder, "--yes", "--with-code", quick=False)
    assert status == 0, said
    code = (
        "import sys\nclass Hidden:\n def find_spec(self, name, path=None, target=None):\n"
        "  if name.partition('.')[0] == 'actionunits': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\nfrom transformers import pipeline\n"
        "detect = pipeline('au-detection', model=sys.argv[1], trust_remote_code=True)\n"
        "(face,) = detect(sys.argv[2])\nprint(len(face['action_units']))"
    )
    from actionunits.pictures import sample_photo

    places = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment = {**os.environ, **places, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", code, REPO, str(sample_photo())]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "3", run.stderr[-2000:]


@pytest.mark.slow
def test_code_that_does_not_work_alone_is_found(folder):
    export_code(folder)
    (folder / "losses.py").unlink()
    (problem,) = check_code(folder)
    assert problem.startswith("Without the package the folder fails") and "losses" in problem


# What the checks find.


def test_a_fit_folder_has_no_problems(folder):
    text = (folder / "README.md").read_text().replace("FOLDER_OF_THIS_MODEL", REPO)
    (folder / "README.md").write_text(text)
    assert check_folder(folder) == []


def spoil(folder, name, change):
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "a/x.pkl", "optimizer.pt"])
def test_pickles_are_found(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps({}))
    assert check_files(folder) == [f"{name} may run code when it is read; publish safetensors only."]


@pytest.mark.parametrize(
    "name",
    [
        *(".env", "notes.txt", "helper.py", "checkpoint-5/config.json", "photo.jpg"),
        *("LICENSES/photo.jpg", "model-5/model.safetensors", "face_landmarks/helper.py"),
    ],
)
def test_stray_files_are_found(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("import os")
    assert check_files(folder) == [f"{name} does not belong to a model; take it out."]


def test_links_and_missing_files_are_found(folder):
    (folder / "LICENSE").symlink_to("/etc/hostname")
    (folder / "preprocessor_config.json").unlink()
    (folder / "model.safetensors").unlink()
    assert check_files(folder) == [
        "preprocessor_config.json is missing.",
        "There are no weights, model.safetensors.",
        "LICENSE is a link; put the file itself there.",
    ]


def card_problems(folder, old, new):
    text = (folder / "README.md").read_text()
    assert old in text
    (folder / "README.md").write_text(text.replace(old, new).replace("FOLDER_OF_THIS_MODEL", REPO))
    return check_card(folder)


def test_a_figure_that_was_not_measured_is_found(folder):
    f1 = ModelCard.load(folder / "README.md").data.eval_results[0].metric_value
    (problem,) = card_problems(folder, f"value: {f1}", "value: 0.99")
    assert problem.startswith("README.md gives f1 0.99 on test, but metrics.json has")


def test_a_changed_table_is_found(folder):
    row = next(
        line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| AU12 |")
    )
    assert card_problems(folder, row, row.replace("lip", "Lip")) == [
        "The table of action units in README.md is not that of metrics.json."
    ]


def test_changed_figures_of_groups_are_found(folder):
    sexes = json.loads((folder / "metrics.json").read_text())["test"]["groups"]["sex"].values()
    gap = f"{max(s['f1'] for s in sexes) - min(s['f1'] for s in sexes):.2f}"
    missing = f"README.md does not give the largest gap between groups, {gap}."
    assert card_problems(folder, f"**{gap}**", "**0.001**") == [missing]
    assert card_problems(folder, "| sex: f |", "| sex: m |") == [
        missing,
        "The table of groups of people in README.md is not that of metrics.json.",
    ]


def test_a_measurement_without_figures_in_the_head_is_found(folder):
    text = (folder / "README.md").read_text()
    figures = text[text.index("model-index:") : text.index("\n---\n")]
    assert card_problems(folder, figures, "model_name: toy-model") == [
        "README.md gives no figures in its head (model-index)."
    ]


def test_figures_without_a_measurement_are_found(folder):
    (folder / "metrics.json").unlink()
    assert card_problems(folder, "# toy-model", "# toy-model") == [
        "README.md has figures, but there is no metrics.json that they come from."
    ]


def test_figures_of_an_older_measurement_are_found(folder):
    spoil(folder, "metrics.json", lambda m: m["test"]["calibrated"]["mean"].update(auc=0.1234))
    problems = card_problems(folder, "# toy-model", "# toy-model")
    assert any("metrics.json has 0.1234 on test" in problem for problem in problems)


def test_a_card_of_other_weights_is_found(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v + 1 if v.is_floating_point() else v for k, v in tensors.items()}, folder / "model.safetensors"
    )
    assert card_problems(folder, "# toy-model", "# toy-model") == [
        "README.md does not give the SHA-256 of model.safetensors."
    ]
    assert list(weights_hashes(folder)) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("interval of its mean is 0.", "interval of its mean is 0.9", "interval of its mean is 0.9"),
        ("per picture, and at least one on ", "per picture, and at least one on 0", "at least one on 0"),
        ("sex: f 0.", "sex: f 0.9", "sex: f 0.9"),
        ("\n# toy-model\n", "\n# toy-model\n\nThe best: F1 0.95 on DISFA.\n", "The best: F1 0.95 on DISFA."),
        ("## Groups of", "| all of BP4D | 0.91 |\n\n## Groups of", "| all of BP4D | 0.91 |"),
    ],
)
def test_figures_outside_the_tables_are_compared_with_the_run(folder, publish, old, new, named):
    text = (folder / "README.md").read_text()
    assert text.count(old) == 1
    (folder / "README.md").write_text(text.replace(old, new))
    code, said = publish(folder, "--dry-run")
    assert code == 1
    (problem,) = (line for line in said.splitlines() if line.startswith("  - "))
    assert problem.startswith("  - README.md gives figures that the run does not: ") and named in problem


def test_an_unflattering_sentence_may_not_be_left_out(folder, publish):
    text = (folder / "README.md").read_text()
    (weak,) = (line for line in text.splitlines() if line.startswith("- Weak action units"))
    (folder / "README.md").write_text(text.replace(f"{weak}\n", ""))
    code, said = publish(folder, "--dry-run")
    assert code == 1 and f"README.md leaves out what was measured: {weak}" in said


def test_words_may_be_added_to_a_card(folder, publish):
    with (folder / "README.md").open("a") as card:
        card.write("\nThanks to the 3 people who read the F-codes, and to AUC Ltd. See also AU12.\n")
    assert publish(folder, "--dry-run")[0] == 1, "a number beside the name of a measure"
    text = (folder / "README.md").read_text().replace("AUC Ltd", "all others")
    (folder / "README.md").write_text(text)
    assert publish(folder, "--dry-run")[0] == 0


@pytest.mark.parametrize("old", ["name: open synthetic corpus, test", "type: synthetic"])
def test_figures_are_of_the_corpus_that_was_measured(folder, publish, old):
    text = (folder / "README.md").read_text()
    assert text.count(old) == 1
    (folder / "README.md").write_text(text.replace(old, f"{old.partition(' ')[0]} BP4D"))
    code, said = publish(folder, "--dry-run")
    assert code == 1 and "README.md gives f1 on " in said and "but it was measured on open synthetic" in said


def test_thresholds_that_were_not_measured_are_found(folder):
    spoil(folder, "config.json", lambda c: c.update(au_thresholds=[0.5, 0.599, 0.7]))
    assert card_problems(folder, "# toy-model", "# toy-model") == [
        "config.json decides AU12 at 0.599, but metrics.json was measured at 0.6."
    ]
    spoil(folder, "config.json", lambda c: c.pop("au_thresholds"))
    assert check_card(folder) == [
        f"config.json decides {label} at 0.5, but metrics.json was measured at {threshold}."
        for label, threshold in (("AU12", 0.6), ("AU25", 0.7))
    ]


@pytest.mark.parametrize("content", ["", '{"test": ', "[]", "1"])
@pytest.mark.parametrize("name", ["config.json", "metrics.json", "preprocessor_config.json", "run.json"])
def test_broken_json_is_named(folder, publish, name, content):
    (folder / name).write_text(content)
    for options in ((), ("--with-code",)):
        code, said = publish(folder, "--dry-run", *options)
        assert code == 1 and f"{name} is broken: it holds no JSON object." in said, said


@pytest.mark.parametrize(("name", "lacks"), [("metrics.json", "calibrated"), ("run.json", "recipe")])
def test_a_run_of_another_kind_is_a_problem_not_an_error(folder, publish, name, lacks):
    (folder / name).write_text('{"test": {}, "corpus": {"name": "synthetic"}}')
    code, said = publish(folder, "--dry-run")
    assert code == 1 and f"there is no '{lacks}'" in said, said
    (folder / "README.md").unlink()
    code, said = publish(folder, "--dry-run")
    assert code == 1 and said.startswith("No card can be written from the run: there is no"), said


def test_a_card_that_is_no_text_is_found_and_folders_go_by_their_own_name(folder, publish):
    (folder / "README.md").write_bytes("Müller".encode("latin-1"))
    code, said = publish(folder, "--dry-run")
    assert code == 1 and "The head of README.md cannot be read: 'utf-8' codec" in said
    (folder / "README.md").unlink()
    (folder / "metrics.json").unlink()
    assert f"run: {folder} has no metrics.json" in publish(folder, "--dry-run")[1]


def test_code_that_is_left_over_is_found(folder):
    export_code(folder)
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(folder)  # names no code, but the files stay
    assert check_code(folder) == [
        "There is code that config.json does not name; export it anew, or take it out."
    ]


def test_a_missing_or_empty_section_is_found(folder):
    assert card_problems(folder, "## Limits\n", "## Other\n") == [
        "README.md lacks the section '## Limits', or it is empty."
    ]
    text = (folder / "README.md").read_text().replace("## Other\n", "## Limits\n\n## Other\n")
    (folder / "README.md").write_text(text)
    assert check_card(folder) == ["README.md lacks the section '## Limits', or it is empty."]


def test_no_card_and_a_broken_head(folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n# x\n")
    assert check_card(folder)[0].startswith("The head of README.md cannot be read")
    (folder / "README.md").unlink()
    assert check_card(folder)[0].startswith("There is no card")


@pytest.mark.parametrize("licence", ["apache-2.0", "mit"])
def test_licensed_weights_under_a_free_licence_are_found(tmp_path, licence):
    folder = publishable_folder(tmp_path / "bp4d", TEMPLATE, corpus="disfa")
    problems = card_problems(folder, "license: other", f"license: {licence}")
    assert problems == [f"README.md puts weights trained on DISFA under {licence}; say `other`."]


def test_a_card_is_written_where_the_run_allows_it(folder, publish):
    (folder / "README.md").unlink()
    assert publish(folder, "--dry-run")[0] == 0


def test_missing_and_left_over_keys_are_found(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["something.else"] = torch.zeros(2)
    del tensors["classifier.AU12.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    problems = check_model(folder)
    assert any("Missing keys: ['classifier.AU12.weight']" in problem for problem in problems), problems
    assert any("Unexpected keys: ['something.else']" in problem for problem in problems), problems


def test_weights_that_answer_nonsense_are_found(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.AU12.bias"][:] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (problem,) = check_model(folder)
    assert "nan" in problem


def test_a_processor_of_other_action_units_is_found(folder):
    spoil(folder, "preprocessor_config.json", lambda p: p.update(aus=[12, 1, 25]))
    assert check_model(folder) == [
        "The processor's action units [12, 1, 25] are not the model's [1, 12, 25]."
    ]


def test_a_path_of_this_machine_is_found(folder):
    spoil(folder, "config.json", lambda c: c.update(backbone_name_or_path="/home/somebody/vit"))
    assert "config.json names a place on this machine: /home/somebody/vit." in check_model(folder)
    recipe = {"split": {"folds_file": "/home/somebody/folds.csv"}}
    run = {"recipe": recipe, "inherited": {"/home/somebody/gda": ["synthetic"]}}
    (folder / "run.json").write_text(json.dumps(run))
    problems = check_model(folder)
    for place in ("folds.csv", "gda"):
        assert f"run.json names a place on this machine: /home/somebody/{place}." in problems


def test_an_onnx_file_of_other_weights_is_found(folder, monkeypatch):
    (folder / "model.onnx").write_bytes(b"no graph")
    (problem,) = check_model(folder)
    assert problem.startswith("model.onnx cannot be checked: ")
    exported = AutoModel.from_pretrained(folder).eval()  # answers as a file of the same weights would
    monkeypatch.setattr("actionunits.publishing_checks.OnnxAUModel", lambda file, config: exported)
    assert check_model(folder) == []
    with torch.no_grad():
        exported.classifier["AU12"].bias += 0.01
    assert check_model(folder) == ["model.onnx answers otherwise than the weights, by 0.01; export anew."]


def test_a_broken_file_is_a_problem_not_an_error(folder):
    (folder / "model.safetensors").write_bytes(b"not weights")
    (problem,) = check_model(folder)
    assert problem.startswith("The folder does not load")
    write_card(folder, TEMPLATE)  # the card itself does not mind
