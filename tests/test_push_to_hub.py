"""What transformers does with a Hub works with our classes: pushing, loading, the Trainer, failures."""

import json

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModel, Trainer, TrainingArguments, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from actionunits import AUImageProcessor, EscdaForAUDetection
from actionunits.onnx_model import OnnxAUModel


@pytest.fixture
def pushed(hub, escda_folder):
    """A model and its image processor, pushed one after the other."""
    AutoModel.from_pretrained(escda_folder).push_to_hub("lab/escda")
    AutoImageProcessor.from_pretrained(escda_folder).push_to_hub("lab/escda")
    return "lab/escda"


def test_model_and_processor_come_back_as_they_went(hub, pushed, escda_folder):
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(hub.files(pushed))
    model, info = AutoModel.from_pretrained(pushed, output_loading_info=True)
    assert type(model) is EscdaForAUDetection and not any(info.values())
    for name, value in AutoModel.from_pretrained(escda_folder).state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    processor = AutoImageProcessor.from_pretrained(pushed)
    assert type(processor) is AUImageProcessor
    assert processor.to_dict() == AutoImageProcessor.from_pretrained(escda_folder).to_dict()


def test_weights_travel_as_large_files(hub, pushed):
    order = [r.split()[1].split("/")[1] for r in hub.requests if "lfs" in r]
    assert [r for r in hub.requests if r.startswith("PUT /lfs/")] and "lfs-verify" in order


def test_other_action_units_from_the_hub(hub, pushed):
    model = AutoModel.from_pretrained(pushed, aus=[12, 45])
    assert model.config.au_labels == ["AU12", "AU45"]


def test_pipeline_pushes_a_folder_that_asks_nobody_for_trust(hub, escda_folder, photo, landmarks):
    known = {"image": photo, "landmarks": landmarks}
    detect = pipeline("au-detection", model=str(escda_folder))
    expected = detect(known)
    detect.push_to_hub("lab/pipe")
    files = hub.files("lab/pipe")
    assert not [name for name in files if name.endswith(".py")]
    assert "custom_pipelines" not in json.loads(files["config.json"])
    assert pipeline("au-detection", model="lab/pipe")(known) == expected


def test_task_may_be_left_to_the_card(hub, pushed, photo, landmarks):
    repo = hub.repos[pushed]
    card = b"---\npipeline_tag: au-detection\n---\n# escda\n"
    repo.commits[repo.head]["README.md"] = type(next(iter(repo.commits[repo.head].values())))(card, False)
    (face,) = pipeline(model=pushed)({"image": photo, "landmarks": landmarks})
    assert len(face["action_units"]) == 12


def test_default_model_may_lie_on_the_hub(hub, pushed, photo, landmarks, monkeypatch):
    task = PIPELINE_REGISTRY.supported_tasks["au-detection"]
    monkeypatch.setitem(task, "default", {"model": (pushed, "main")})
    detect = pipeline("au-detection")
    assert detect.model.name_or_path == pushed
    assert len(detect({"image": photo, "landmarks": landmarks})) == 1


def test_trainer_pushes_what_it_trained(hub, escda_folder, tmp_path):
    model = AutoModel.from_pretrained(escda_folder)
    processor = AutoImageProcessor.from_pretrained(escda_folder)
    torch.manual_seed(0)
    rows = [
        {
            "pixel_values": torch.rand(3, 112, 112),
            "au_centers": torch.rand(12, 2, 2) * 111,
            "labels": torch.randint(0, 2, (12,)).float(),
        }
        for _ in range(4)
    ]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        push_to_hub=True,
        hub_model_id="lab/fine-tuned",
        hub_private_repo=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=processor)
    trainer.train()
    trainer.push_to_hub()
    assert hub.repos["lab/fine-tuned"].private
    assert {"README.md", "model.safetensors", "preprocessor_config.json"} <= set(hub.files("lab/fine-tuned"))
    tuned = AutoModel.from_pretrained("lab/fine-tuned").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(tuned[name], value, rtol=0, atol=0)
    before = AutoModel.from_pretrained(escda_folder).state_dict()
    assert any(not torch.equal(tuned[name], before[name]) for name in before)


def test_onnx_from_the_hub(hub, pushed):
    with pytest.raises(HfHubHTTPError, match="404"):
        OnnxAUModel.from_pretrained(pushed)


def test_private_models_need_a_token(hub, pushed, monkeypatch):
    hub.repos[pushed].private = True
    assert AutoModel.from_pretrained(pushed, force_download=True) is not None
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(OSError, match="lab/escda|download failed"):  # as the Hub's library is new or old
        AutoModel.from_pretrained(pushed, force_download=True)


def test_what_is_not_there(hub, pushed):
    with pytest.raises(OSError, match="lab/nothing"):
        AutoModel.from_pretrained("lab/nothing")
    with pytest.raises(OSError, match="v9"):
        AutoModel.from_pretrained(pushed, revision="v9")


def test_a_broken_push_raises_and_a_second_one_mends_it(hub, escda_folder):
    model = AutoModel.from_pretrained(escda_folder)
    hub.fail("POST .*/commit/", 500, times=99)
    with pytest.raises(HfHubHTTPError, match="500"):
        model.push_to_hub("lab/broken")
    hub._failures.clear()
    model.push_to_hub("lab/broken")
    assert "model.safetensors" in hub.files("lab/broken")


def test_a_cut_download_leaves_no_half_file(hub, pushed):
    hub.fail("GET .*/model.safetensors", "cut", times=99)
    with pytest.raises(Exception, match=r"(?i)disconnected|reach|connect|load"):
        AutoModel.from_pretrained(pushed)
    hub._failures.clear()
    assert AutoModel.from_pretrained(pushed) is not None
