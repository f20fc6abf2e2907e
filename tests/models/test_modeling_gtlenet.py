"""GTLE-Net against its paper: sizes, a plain implementation with the same weights, ablations, the encoder."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, Trainer, TrainingArguments

from actionunits.models.gtlenet import (
    GlobalExpressionEncoder,
    GlobalExpressionEncoderConfig,
    GtleNetConfig,
    GtleNetForAUDetection,
)
from actionunits.models.gtlenet.configuration_gtlenet import ABLATIONS
from actionunits.models.gtlenet.modeling_gtlenet import reconstruction_loss, triplet_loss
from references.gtlenet import PlainGtleNet

from .test_modeling_common import AUS, AUModelTester, adapt_every

ENCODER = {"image_size": 32, "width_multiplier": 0.125, "depths": [1, 1, 1]}
TINY = {
    "encoder_config": ENCODER,
    "feature_channels": [8, 8, 6],
    "mask_channels": [8, 6, 4],
    "classifier_channels": [4, 6, 8],
    "classifier_kernel_size": 5,
}
VARIANTS = {
    "GTLE-Net": {},
    "full size, deeper": {
        "feature_channels": [8, 8, 6, 6],
        "mask_channels": [6, 6, 4, 4],
        "feature_depth": 2,
    },
    "sum": {"reconstruction_reduction": "sum", "reconstruction_loss_weight": 0.01},
    "w/o E_m": {"local_module": "features"},
    "w/o E_m & w. CNN": {"local_module": "cnn"},
    "w/o E_m & E_a": {"local_module": "none"},
}


class GtleNetTester(AUModelTester):
    model_class = GtleNetForAUDetection

    def test_unknown_action_unit_gets_no_gradient(self, model, inputs, labels):
        # Its classifier gets none; its maps take part in the reconstruction.
        labels[:, 1] = -1
        model(**inputs, labels=labels).loss.backward()
        assert not any(p.grad.any() for p in model.classifiers["AU4"].parameters())
        assert all(p.grad.any() for p in model.classifiers["AU1"].parameters())


class AdaptedConvolution(torch.nn.Module):
    """A convolution and a change of its weight beside it, which acts when it is called, as PEFT's do."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.delta = layer, torch.nn.Parameter(0.1 * torch.randn_like(layer.weight))

    def forward(self, x):
        form = self.layer.stride, self.layer.padding, self.layer.dilation, self.layer.groups
        return self.layer(x) + F.conv2d(x, self.delta, None, *form)


class TestGtleNet(GtleNetTester):
    config = TINY

    def test_every_convolution_may_be_another(self, model, inputs, labels):
        merged = adapt_every(torch.nn.Conv2d, AdaptedConvolution, model)
        actual, expected = (one(**inputs, labels=labels) for one in (model, merged))
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-3, atol=1e-4)
        actual.loss.backward()
        deltas = [p for name, p in model.named_parameters() if name.endswith(".delta")]
        assert all(delta.grad is not None for delta in deltas)

    def test_without_reconstruction_an_unknown_action_unit_gets_no_gradient(self, inputs, labels):
        model = self.make_model(reconstruction_loss_weight=0.0)
        labels[:, 1] = -1
        model(**inputs, labels=labels).loss.backward()
        of_unknown = [p.grad for name, p in model.named_parameters() if ".AU4." in name]
        assert of_unknown
        assert all(grad is None or not grad.any() for grad in of_unknown)


class TestWithoutExtractors(GtleNetTester):
    config = TINY | {"local_module": "none"}

    def test_au_attentions(self, model, inputs):
        assert model(**inputs, output_au_attentions=True).au_attentions is None


def make(**kwargs):
    tester = TestGtleNet()
    model = tester.make_model(**kwargs)
    return model, tester.make_inputs(model.config)["pixel_values"], tester.make_labels(model.config)


def test_a_frozen_encoder_stays_frozen_when_it_is_loaded(tmp_path):
    TestGtleNet().make_model(freeze_encoder=True).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert not any(p.requires_grad for p in model.trunk.parameters())
    assert all(p.requires_grad for p in model.classifiers.parameters())
    free = AutoModel.from_pretrained(tmp_path, freeze_encoder=False)
    assert all(p.requires_grad for p in free.trunk.parameters())


# The paper's sizes.


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_encoder_returns_hidden_states_if_its_configuration_says_so():
    encoder = GlobalExpressionEncoder(GlobalExpressionEncoderConfig(**ENCODER)).eval()
    picture = torch.zeros(1, 3, 32, 32)
    assert encoder(picture).hidden_states is None
    encoder.config.output_hidden_states = True
    assert len(encoder(picture).hidden_states) == 4
    assert encoder(picture, output_hidden_states=False).hidden_states is None


def test_sizes_of_the_paper():
    with torch.device("meta"):
        encoder = GlobalExpressionEncoder(GlobalExpressionEncoderConfig()).eval()
        model = GtleNetForAUDetection(GtleNetConfig()).eval()
        paper = GtleNetForAUDetection(GtleNetConfig.paper())
        picture = torch.empty(1, 3, 256, 256)
        h = encoder.trunk(picture)[-1]
        output = model(picture, output_au_attentions=True)
        embeddings = model.au_embeddings(picture)
    assert h.shape == (1, 896, 16, 16)
    assert encoder(picture).embeddings.shape == (1, 16)
    assert output.au_attentions.shape == (1, 12, 256, 256)
    assert embeddings.shape == (1, 12, 256)
    assert parameters(encoder) == 22_592_784
    assert parameters(encoder.trunk) == parameters(model.trunk) == 9_613_312
    assert parameters(model.classifiers) == 12 * 2_136_577
    assert parameters(model.feature_extractor) == 3_521_351
    assert parameters(paper.feature_extractor) == 15_740_263


def test_compact_configuration_is_small():
    config = GtleNetConfig.compact(aus=AUS, image_size=96)
    assert (config.image_size, config.map_size) == (96, 48)
    assert config.encoder.depths == GlobalExpressionEncoderConfig.compact().depths
    assert GtleNetConfig.compact().image_size == 112, "presets do not share what one changes"
    assert parameters(GtleNetForAUDetection(config)) < 1e6


# The plain implementation.


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_gradients_and_statistics_equal_the_plain_network(variant, training):
    model, pictures, labels = make(**VARIANTS[variant])
    model, pictures = model.double().train(training), pictures.double()
    plain = PlainGtleNet(model.config, model)
    if not training:
        torch.testing.assert_close(model(pictures).logits, plain(pictures), rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            single = copy.deepcopy(model).float()(pictures.float()).logits
        torch.testing.assert_close(single, plain(pictures).float(), rtol=1e-4, atol=1e-5)
    loss, expected = model(pictures, labels=labels).loss, plain(pictures, labels.double())
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    loss.backward()
    expected.backward()
    for name, gradient in plain.gradients_like(model).items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-7, atol=1e-12, msg=name)
    twin = copy.deepcopy(model)
    plain.write_to(twin)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("local_module", ["masked", "none"])
@pytest.mark.parametrize("training", [False, True])
def test_grouped_classifiers_equal_separate_ones(training, local_module):
    model, _, _ = make(local_module=local_module)
    one_by_one = model.double().train(training).classifiers
    grouped = copy.deepcopy(one_by_one)
    channels = one_by_one["AU1"].layers[0][0].in_channels
    inputs = [torch.randn(5, 4, channels, 16, 16, dtype=torch.float64).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    embeddings = one_by_one.embed_one_by_one(inputs[0]), grouped.embed_grouped(inputs[1])
    torch.testing.assert_close(*embeddings, rtol=1e-9, atol=1e-12)
    target = torch.randn(5, 4, dtype=torch.float64)
    for classifiers, embedding in zip((one_by_one, grouped), embeddings, strict=True):
        ((classifiers.classify(embedding) - target) ** 2).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-12)
    for (name, a), b in zip(one_by_one.named_parameters(), grouped.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-12, msg=name)
    for (name, a), b in zip(one_by_one.named_buffers(), grouped.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


# Masks, embeddings, reconstruction.


def test_masks_are_laid_over_the_features():
    model, pictures, _ = make()
    plain = PlainGtleNet(model.config, model).eval()
    h = plain.gee(pictures)
    masks = torch.cat(plain.e_m(h), dim=1)
    torch.testing.assert_close(model(pictures, output_au_attentions=True).au_attentions, masks[:, :4])
    c = [m * f for m, f in zip(plain.e_m(h), plain.e_a(h), strict=True)]
    torch.testing.assert_close(model.reconstruct(pictures), plain.d_r(torch.cat(c, 1)), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for head in model.mask_extractor.heads.values():
            head.bias.fill_(-100.0)  # nothing to see: all masks are 0
    torch.testing.assert_close(model(pictures).logits[0], model(pictures).logits[1])


def test_embeddings_are_what_the_last_layers_read():
    model, pictures, _ = make()
    embeddings = model.au_embeddings(pictures)
    assert embeddings.shape == (3, 4, 8)
    logits = [unit.output(embeddings[:, i])[:, 0] for i, unit in enumerate(model.classifiers.values())]
    torch.testing.assert_close(torch.stack(logits, 1), model(pictures).logits)


def test_the_reconstruction_loss_is_half_the_squared_error():
    picture = torch.zeros(2, 3, 4, 4)
    picture[1] = 1.0
    guess = torch.full((2, 3, 2, 2), 0.5)
    both, first = torch.tensor([True, True]), torch.tensor([True, False])
    assert reconstruction_loss(guess, picture, both, "mean") == pytest.approx(0.5 * 3 * 0.25)
    assert reconstruction_loss(guess, picture, both, "sum") == pytest.approx(4 * 0.5 * 3 * 0.25)
    guess[1] = 7.0
    assert reconstruction_loss(guess, picture, first, "mean") == pytest.approx(0.5 * 3 * 0.25)
    assert reconstruction_loss(guess, picture, ~both, "mean") == 0


def test_the_reconstruction_takes_part_in_the_loss():
    model, pictures, labels = make(reconstruction_loss_weight=0.5)
    loss = model(pictures, labels=labels).loss
    error = 0.5 * ((model.reconstruct(pictures) - F.avg_pool2d(pictures, 2)) ** 2).sum(1).mean()
    model.config.reconstruction_loss_weight = 0.0
    alone = model(pictures, labels=labels).loss
    torch.testing.assert_close(
        alone, F.binary_cross_entropy_with_logits(model(pictures).logits, labels.float())
    )
    torch.testing.assert_close(loss, alone + 0.5 * error)


def test_variants_without_maps_say_so():
    model, pictures, _ = make(local_module="none")
    with pytest.raises(ValueError, match='local_module="none"'):
        model.reconstruct(pictures)
    with pytest.raises(ValueError, match=r"40, 40.*32 x 32"):
        model(torch.zeros(1, 3, 40, 40))


# The expression encoder.


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return GlobalExpressionEncoder(GlobalExpressionEncoderConfig(**ENCODER, pretraining="expression")).eval()


@pytest.fixture
def encoder_folder(encoder, tmp_path):
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    encoder.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_the_encoder_is_saved_and_loaded(encoder, encoder_folder):
    loaded, info = AutoModel.from_pretrained(encoder_folder, output_loading_info=True)
    assert type(loaded) is GlobalExpressionEncoder
    assert not any(info.values())
    assert GlobalExpressionEncoderConfig.from_pretrained(encoder_folder).to_dict() == encoder.config.to_dict()
    pictures = torch.randn(2, 3, 48, 64)
    embeddings = loaded(pictures, alignment="ignored").embeddings
    torch.testing.assert_close(embeddings, encoder(pictures).embeddings)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    assert [len(state) for state in loaded(pictures, output_hidden_states=True).hidden_states] == [2] * 4
    half = AutoModel.from_pretrained(encoder_folder, dtype=torch.bfloat16)(pictures).embeddings
    torch.testing.assert_close(half.float(), embeddings, rtol=0, atol=0.1)


def test_gradient_checkpointing_does_not_change_the_encoder(encoder):
    plain, checkpointed = encoder.train(), copy.deepcopy(encoder)
    enable = "activation_checkpointing_enable"  # since transformers 5.20; deprecates the other
    getattr(checkpointed, enable if hasattr(checkpointed, enable) else "gradient_checkpointing_enable")()
    assert sum(getattr(module, "gradient_checkpointing", False) for module in checkpointed.modules()) > 1
    pictures = torch.randn(4, 3, 48, 48)
    for one in (plain, checkpointed):
        torch.manual_seed(0)  # dropout
        triplet_loss(*one(pictures).embeddings[torch.tensor([[0, 1, 2], [1, 2, 3]])].unbind(1)).backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=f"{name}: the batch was counted twice")


def test_embeddings_cannot_collapse_onto_one_point(encoder):
    """Trained to do nothing but draw together, those of a batch stay around the origin."""
    pictures = torch.randn(8, 3, 48, 48)
    optimizer = torch.optim.SGD(encoder.train().parameters(), lr=1.0)
    for _ in range(20):
        loss = torch.pdist(encoder(pictures).embeddings).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
    assert torch.pdist(encoder(pictures).embeddings).mean() > 0.5


def test_triplet_loss_by_hand():
    # On a line: |a-p|^2 = 1, |a-n|^2 = 4, |p-n|^2 = 1.
    a, p, n = (torch.tensor([[x]]) for x in (0.0, 1.0, 2.0))
    assert triplet_loss(a, p, n, 0.5) == pytest.approx(0 + 0.5)
    assert triplet_loss(a, p, n, torch.tensor([4.0])) == pytest.approx((1 - 4 + 4) + (1 - 1 + 4))
    assert triplet_loss(p, a, n, 0.5) == triplet_loss(a, p, n, 0.5), "anchor and positive are alike"
    both = triplet_loss(torch.cat([a, a]), torch.cat([p, a]), torch.cat([n, n]), torch.tensor([0.5, 0.1]))
    assert both == pytest.approx(0.25)
    assert triplet_loss(a.half(), p.half(), n.half()).dtype == torch.float32


@pytest.mark.parametrize("how", ["from_encoder", "from_config", "trained folder"])
def test_the_network_starts_from_an_encoder(encoder, encoder_folder, how, tmp_path):
    fields = {**TINY, "aus": AUS}
    del fields["encoder_config"]
    if how == "from_encoder":
        model = GtleNetForAUDetection.from_encoder(encoder_folder, **fields)
    else:
        model = AutoModel.from_config(GtleNetConfig.from_encoder(str(encoder_folder), **fields))
    if how == "trained folder":  # which has its own weights, the encoder gone or not
        model.save_pretrained(tmp_path / "trained")
        config = (encoder_folder / "config.json").read_text()
        (encoder_folder / "config.json").unlink()
        model = AutoModel.from_pretrained(tmp_path / "trained")
        (encoder_folder / "config.json").write_text(config)
    assert model.config.pretraining == model.config.encoder.pretraining == "expression"
    for name, value in encoder.trunk.state_dict().items():
        torch.testing.assert_close(model.trunk.state_dict()[name], value, rtol=0, atol=0)


def test_encoders_that_do_not_fit_are_refused(encoder_folder, tmp_path):
    with pytest.raises(ValueError, match=r"pretrained on 'expression', expected 'emotion'"):
        GtleNetForAUDetection.from_encoder(encoder_folder, **{**ABLATIONS["w. GEE Emotion"], "aus": AUS})
    wider = GtleNetConfig(
        encoder_config=ENCODER | {"width_multiplier": 0.25},
        encoder_name_or_path=str(encoder_folder),
        pretraining="expression",
    )
    with pytest.raises(ValueError, match=r"weights that do not fit: \['"):
        AutoModel.from_config(wider)
    GtleNetForAUDetection(GtleNetConfig(**TINY)).save_pretrained(tmp_path / "gtlenet")
    with pytest.raises(ValueError, match="'au-gtlenet' checkpoint"):
        GtleNetForAUDetection.from_encoder(tmp_path / "gtlenet")


def test_a_fixed_encoder_stays_as_it_is(encoder_folder):
    fields = {**TINY, **ABLATIONS["w. GEE fixed"], "aus": AUS}
    del fields["encoder_config"]
    model = GtleNetForAUDetection.from_encoder(encoder_folder, **fields).train()
    before = copy.deepcopy(model.trunk.state_dict())
    _, pictures, labels = make()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(pictures, labels=labels).loss.backward()
        optimizer.step()
    for name, value in model.trunk.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)
    learned = {name: p for name, p in model.named_parameters() if not name.startswith("trunk.")}
    assert all(p.grad is not None and p.grad.any() for p in learned.values())


# Configurations and training.


def test_ablations_are_those_of_table_6():
    assert len(ABLATIONS) == 8
    for fields in ABLATIONS.values():
        config = GtleNetConfig(**TINY, **fields)
        assert {name: getattr(config, name) for name in fields} == fields
        model = GtleNetForAUDetection(config)
        assert (model.mask_extractor is None) == (config.local_module != "masked")
        assert (model.feature_extractor is None) == (config.local_module == "none")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 100}, "image_size=100 must be a multiple of 16"),
        ({"image_size": 16}, "image_size=16 must be at least 32"),
        ({"encoder_config": {"padding": "valid"}}, "padding='valid'"),
        ({"mask_channels": [8, 8]}, r"mask_channels=\[8, 8\] need as many stages"),
        ({"feature_channels": [8] * 5, "mask_channels": [8] * 5}, "one to four stages"),
        ({"classifier_kernel_size": 4}, "classifier_kernel_size=4 must be odd"),
        ({"feature_depth": 0}, "feature_depth=0"),
        ({"reconstruction_loss_weight": -1.0}, "reconstruction_loss_weight=-1.0"),
        ({"encoder_config": {"depths": [1, 2]}}, r"depths=\[1, 2\]"),
        ({"encoder_config": {"dropout": 1.0}}, "dropout=1.0"),
        ({"local_module": "attention"}, "local_module"),
        ({"pretraining": "jigsaw"}, "pretraining"),
    ],
)
def test_configurations_that_make_no_sense(fields, message):
    with pytest.raises(Exception, match=message):
        GtleNetConfig(**fields)


def test_the_image_size_is_the_encoders_however_it_is_given(tmp_path):
    encoder = GlobalExpressionEncoderConfig(**ENCODER)
    config = GtleNetConfig(**TINY | {"encoder_config": encoder}, image_size=64)
    assert encoder.image_size == 32, "the caller's stays as it is"
    GtleNetForAUDetection(config).save_pretrained(tmp_path)
    for size, model in (
        (64, AutoModel.from_pretrained(tmp_path)),
        (96, AutoModel.from_pretrained(tmp_path, image_size=96)),
    ):
        assert model.config.image_size == model.config.encoder.image_size == size
        assert model.eval()(torch.zeros(1, 3, size, size)).logits.shape == (1, 12)
    with pytest.raises(Exception, match="image_size=100 must be a multiple of 16"):
        GtleNetConfig.from_pretrained(tmp_path, image_size=100)


def test_the_trainer_trains_it_and_goes_on_exactly(tmp_path):
    def data(i):
        picture = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i))
        return {"pixel_values": picture, "labels": torch.tensor([i % 2, 1, 0, -1])}

    def trainer(name):
        torch.manual_seed(0)
        model = GtleNetForAUDetection(GtleNetConfig(aus=AUS, **TINY))
        steps = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
        quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none"}
        arguments = TrainingArguments(str(tmp_path / name), **steps, **quiet)
        return Trainer(model, arguments, train_dataset=[data(i) for i in range(8)])

    whole, stopped = trainer("whole"), trainer("stopped")
    assert math.isfinite(whole.train().training_loss)
    stopped.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(stopped.model.state_dict()[name], value, rtol=0, atol=0, msg=name)
