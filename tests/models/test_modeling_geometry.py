"""The network that reads places: its answer written naively, its statistics, and what it does not see."""

import os

import numpy as np
import pytest
import torch

from actionunits import GeometryConfig, GeometryForAUDetection
from actionunits.au_regions import au_centers
from actionunits.landmarks import get_scheme
from actionunits.models.geometry.configuration_geometry import PLACES
from actionunits.models.geometry.modeling_geometry import SMALLEST_VARIANCE, Standardization

from .test_modeling_common import AUS, AUModelTester


class TestGeometry(AUModelTester):
    model_class = GeometryForAUDetection
    config = {"places": [1, 6, 12], "hidden_sizes": [16, 12], "dropout": 0.0}
    always_float32 = ("standardization.mean", "standardization.variance")

    def make_inputs(self, config, batch_size=3):
        """Centres of its places, whatever the labels are."""
        whole = type(config)(aus=config.places, image_size=config.image_size)
        return super().make_inputs(whole, batch_size)

    def test_au_attentions(self, model, inputs):
        assert model(**inputs, output_au_attentions=True).au_attentions is None

    def test_pictures_that_are_not_normalised_are_refused(self, model, inputs):
        changed = inputs | {"pixel_values": torch.zeros(3, 3, 32, 32, dtype=torch.uint8)}
        assert torch.equal(model(**changed).logits, model(**inputs).logits)  # it does not look at them


@pytest.fixture
def tester():
    return TestGeometry()


@pytest.fixture
def model(tester):
    return tester.make_model()


def test_answer_written_naively(tester, model):
    inputs = tester.make_inputs(model.config)
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    for face, logits in zip(inputs["au_centers"].double().numpy(), model(**inputs).logits, strict=True):
        points = face.reshape(-1, 2) / model.config.image_size
        x = (points - points.mean(0)).reshape(-1)
        x = (x - state["standardization.mean"]) / np.sqrt(
            state["standardization.variance"] + SMALLEST_VARIANCE
        )
        for layer in range(2):
            x = state[f"layers.{layer}.linear.weight"] @ x + state[f"layers.{layer}.linear.bias"]
            x = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
        expected = [
            state[f"classifier.AU{au}.weight"][0] @ x + state[f"classifier.AU{au}.bias"][0] for au in AUS
        ]
        np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_where_the_face_lies_and_how_it_looks_changes_nothing(tester, model):
    inputs = tester.make_inputs(model.config)
    expected = model(**inputs).logits
    moved = inputs["au_centers"] + torch.tensor([3.0, -5.0])
    torch.testing.assert_close(model(au_centers=moved).logits, expected, rtol=1e-3, atol=1e-4)
    assert (model(au_centers=1.1 * inputs["au_centers"]).logits - expected).abs().max() > 1e-3


def test_statistics_are_those_of_all_faces_seen():
    seen = torch.randn(23, 5, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.3
    layer = Standardization(5).train()
    for batch in seen.split([1, 4, 10, 8]):
        layer(batch)
    torch.testing.assert_close(layer.mean, seen.mean(0))
    torch.testing.assert_close(layer.variance, seen.var(0, correction=0))
    assert layer.count == 23
    layer(seen[:0])
    layer.eval()(seen)
    assert layer.count == 23
    standardised = layer(seen)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(standardised.std(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)


def _worker(rank, folder, seen):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    layer = Standardization(seen.shape[1]).train()
    for batch in seen.split([10, 3, 10]):
        layer(batch[rank::2])
    torch.save(layer.state_dict(), f"{folder}/{rank}.pt")
    os._exit(0)  # freeing a gloo group right after a collective can deadlock on the interpreter lock


@pytest.mark.slow
def test_processes_share_what_they_have_seen(tmp_path):
    seen = torch.randn(23, 5, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.3
    torch.multiprocessing.spawn(_worker, (str(tmp_path), seen), nprocs=2)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(state["mean"], seen.mean(0))
        torch.testing.assert_close(state["variance"], seen.var(0, correction=0))
        assert state["count"] == 23


def test_centres_that_are_missing_or_of_other_places_are_refused(tester, model):
    inputs = tester.make_inputs(model.config)
    with pytest.raises(ValueError, match="needs au_centers, which are missing"):
        model(pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"expected \(B, 3, 2, 2\): two .* \[1, 6, 12\]"):
        model(au_centers=inputs["au_centers"][:, :2])


def test_places_stay_when_the_outputs_change(model):
    other = model.adapt_to_aus([25, 12])
    assert other.config.places == [1, 6, 12]
    assert other.config.processor_options["aus"] == [1, 6, 12]
    assert GeometryConfig().places == list(PLACES)


def test_default_places_are_all_that_the_corpus_codes_and_none_twice():
    points = np.random.default_rng(0).uniform(0, 100, (get_scheme("ibug68").size, 2))
    coded = [1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 24, 25, 26]
    every, ours = ({au_centers(points, "ibug68", [au]).tobytes() for au in aus} for aus in (coded, PLACES))
    assert len(ours) == len(PLACES) and ours == every


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"places": [8]}, "places=\\[8\\] must be action units that have centres"),
        ({"hidden_sizes": []}, "at least one layer"),
        ({"dropout": 1.0}, "dropout=1.0 must lie"),
    ],
)
def test_no_network_can_be_built_of_these(fields, message):
    with pytest.raises(Exception, match=message):
        GeometryConfig(**fields)
    with pytest.raises(Exception, match=message):
        GeometryConfig.from_dict(GeometryConfig().to_dict(), **fields)
