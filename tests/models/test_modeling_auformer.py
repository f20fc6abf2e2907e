"""AUFormer against its paper: sizes, the experts written out naively, limits, ablations, and the backbone."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTModel

from actionunits.losses import mdwa_loss, weighted_dice_loss
from actionunits.models.auformer import AUFormerConfig, AUFormerForAUDetection, configuration_auformer
from actionunits.models.auformer import modeling_auformer as auformer
from actionunits.models.auformer.configuration_auformer import ABLATIONS, CHOICES
from actionunits.models.auformer.modeling_auformer import resize_positions, sine_cosine_positions
from references.auformer import ExpertsAlone, FastContextExpert, PlainAUFormer, PlainExpert, expert_pairs

from .test_modeling_common import AUS, AUModelTester

BACKBONE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
}
BP4D, DISFA = [1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24], [1, 2, 4, 6, 9, 12, 25, 26]


class AUFormerTester(AUModelTester):
    model_class = AUFormerForAUDetection
    has_attention = True
    without_gradient = ("k_proj.bias",)  # the same for all keys, so softmax does not see it

    @pytest.mark.parametrize("how", ["from_pretrained", "adapt_to_aus"])
    def test_shared_action_units_keep_their_heads(self, model, folder, how):
        # and their experts; the answers change with the group that an expert works in
        aus = [25, 43, 1]
        other = (
            model.adapt_to_aus(aus) if how == "adapt_to_aus" else AutoModel.from_pretrained(folder, aus=aus)
        )
        old, new = model.state_dict(), other.state_dict()
        kept = {name for name in new if ".AU25." in name or ".AU1." in name}
        assert kept
        for name in kept:
            torch.testing.assert_close(new[name], old[name], rtol=0, atol=0)
        assert {name for name in new if name not in old} == {name for name in new if ".AU43." in name}
        assert other(**self.make_inputs(other.config)).logits.isfinite().all()

    def test_occurrence_rates_weigh_the_loss(self, inputs, labels, folder):
        rates = [0.01, 0.3, 0.3, 0.3]
        plain = self.model_class.from_pretrained(folder)
        weighted = self.model_class.from_pretrained(folder, au_occurrence_rates=rates)
        labels[:] = 1  # exponents have no part in these
        alone = []
        for column in range(4):
            known = torch.full_like(labels, -1)
            known[:, column] = 1
            alone.append(plain(**inputs, labels=known).loss)
        inverse = 1 / torch.tensor(rates)
        expected = (inverse / inverse.sum() * torch.stack(alone)).sum()
        torch.testing.assert_close(weighted(**inputs, labels=labels).loss, expected)


class TestAUFormer(AUFormerTester):
    config = {"backbone_config": BACKBONE, "freeze_backbone": False}

    def test_unknown_action_unit_gets_no_gradient(self, model, inputs, labels):
        # Its heads get none; its experts collaborate on the others.
        labels[:, 1] = -1
        model(**inputs, labels=labels).loss.backward()
        heads = [p for name, p in model.named_parameters() if "classifier.AU4." in name]
        assert len(heads) == 4
        assert not any(head.grad.any() for head in heads)
        assert model.experts["AU4"].up_weight.grad.any()

    def test_shares_of_the_loss(self, model, inputs, labels):
        rates = [0.1, 0.2, 0.3, 0.4]
        model.config.au_occurrence_rates = rates
        output = model(**inputs, labels=labels)
        inverse = 1 / torch.tensor(rates)
        weight, gamma = 4 * inverse / inverse.sum(), 1 + torch.tensor(rates)
        final, experts = output.branch_logits.unbind(1)
        expected = mdwa_loss(final, labels, weight, gamma, 0.1) + weighted_dice_loss(final, labels, weight)
        torch.testing.assert_close(output.loss, expected + mdwa_loss(experts, labels, weight, gamma, 0.1))
        torch.testing.assert_close(output.logits, final, rtol=0, atol=0)

    @pytest.mark.parametrize("adaptation", ["moke", "convpass", "adapter", "lora", "vpt"])
    def test_compiles_in_one_graph(self, adaptation, labels):
        model = self.make_model(adaptation=adaptation, au_occurrence_rates=[0.1, 0.2, 0.3, 0.4])
        inputs = self.make_inputs(model.config)
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
        expected, actual = (m(**inputs, labels=labels, output_au_attentions=True) for m in (model, compiled))
        torch.testing.assert_close(actual.loss, expected.loss)
        torch.testing.assert_close(actual.au_attentions, expected.au_attentions)
        expected.loss.backward(), actual.loss.backward()
        for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


class TestFrozen(AUFormerTester):
    config = {"backbone_config": BACKBONE, "expert_dropout": 0.1}
    test_unknown_action_unit_gets_no_gradient = TestAUFormer.test_unknown_action_unit_gets_no_gradient

    def test_gradient_reaches_every_parameter(self, model, inputs, labels):
        model(**inputs, labels=labels).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad is not name.startswith("vit."), name
            assert (parameter.grad is not None and bool(parameter.grad.any())) is parameter.requires_grad, (
                name
            )

    @pytest.mark.parametrize("reentrant", [None, True])
    def test_gradient_checkpointing_changes_nothing(self, model, labels, reentrant):
        model.config.expert_dropout = 0.0
        for block in model.blocks:
            assert block.config is model.config
        super().test_gradient_checkpointing_changes_nothing(model, labels, reentrant)

    def test_learns_by_heart(self):
        # A part of it: this backbone knows nothing.
        model = make_model(expert_dropout=0.0).train()
        before = copy.deepcopy(model.vit.state_dict())
        inputs, labels = self.make_inputs(model.config, 8), self.make_labels(model.config, 8)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        losses = []
        for _ in range(25):
            loss = model(**inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], losses[::4]
        assert all(torch.equal(before[name], value) for name, value in model.vit.state_dict().items())

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_attention_matrices(self, model, inputs, implementation):
        model.set_attn_implementation(implementation)
        attentions = model(**inputs, output_attentions=True).attentions
        assert [matrix.shape for matrix in attentions] == [(3, 2, 17, 17)] * 2
        assert model(**inputs).attentions is None


ADAPTATIONS = {
    "convpass": {"adaptation": "convpass"},
    "adapter": {"adaptation": "adapter"},
    "lora": {"adaptation": "lora"},
    "vpt": {"adaptation": "vpt"},
    "vpt-shallow": {"adaptation": "vpt", "deep_prompts": False, "num_prompts": 3},
    "heads": {"adaptation": "none"},
    "alone": {"collaboration": False},
}


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_adaptations_learn_while_the_backbone_stays(adaptation, tmp_path):
    model = make_model(**ADAPTATIONS[adaptation])
    inputs, labels = make_inputs(model)
    output = model(inputs, labels=labels, output_au_attentions=True)
    assert output.branch_logits is None
    assert output.au_attentions.shape == (3, 4, 4, 4)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) is not name.startswith("vit."), (
            name
        )
    model.save_pretrained(tmp_path)
    loaded, info = AUFormerForAUDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded(inputs).logits, output.logits)
    twin = copy.deepcopy(model)  # hooks of LoRA included
    torch.testing.assert_close(twin(inputs).logits, output.logits, rtol=0, atol=0)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if not name.startswith(("vit.", "classifier.")):
                parameter.zero_()
    torch.testing.assert_close(model(inputs).logits, output.logits, rtol=0, atol=0)
    if adaptation != "heads":
        assert not torch.allclose(twin(inputs).logits, output.logits)


@pytest.mark.parametrize("adaptation", ["adapter", "lora", "convpass", "moke", "none"])
def test_untrained_adaptations_leave_the_backbone_as_it_is(adaptation):
    torch.manual_seed(0)
    model = AUFormerForAUDetection(
        AUFormerConfig(aus=AUS, backbone_config=BACKBONE, adaptation=adaptation)
    ).eval()
    inputs, _ = make_inputs(model)
    added = [p for name, p in model.named_parameters() if ".up" in name]
    assert bool(added) is (adaptation != "none")
    assert not any(parameter.any() for parameter in added)
    features = model.vit(inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(model(inputs).logits, model.classifier(features))


@pytest.mark.parametrize("name", ABLATIONS | CHOICES)
def test_every_entry_of_tables_4_and_5_trains(name):
    values = {**ABLATIONS, **CHOICES}[name]
    model = make_model(**values)
    inputs, labels = make_inputs(model)
    model(inputs, labels=labels).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        is_frozen = model.config.freeze_backbone and parameter_name.startswith("vit.")
        assert (parameter.grad is None) == is_frozen, parameter_name


def test_entries_of_tables_4_and_5_differ():
    """Each is another model or another loss, but for Convpass, which both tables have."""
    entries = {}
    for name, values in (ABLATIONS | CHOICES).items():
        model = make_model(au_occurrence_rates=[0.1, 0.2, 0.3, 0.4], **values)
        inputs, labels = make_inputs(model)
        loss = model(inputs, labels=labels).loss.item()
        entries[name] = (model.num_parameters(only_trainable=True), loss)
    assert entries.pop("Convpass") == entries["PETL"]
    assert len(set(entries.values())) == len(entries)


VALUES = [
    {"adaptation": "vpt", "num_prompts": 3},
    {"adaptation": "vpt", "deep_prompts": False},
    {"adaptation": "lora", "adapter_channels": 3},
    {"adaptation": "convpass", "adapter_channels": 3},
    {"adaptation": "adapter", "adapter_channels": 3},
    {"collaboration": False},
    {"expert_channels": 3},
    {"mrf_dilations": [1]},
    {"ca_neighborhood": 5},
    {"ca_border": "masked"},
    {"expert_dropout": 0.5},
    {"margin": 0.3},
    {"gamma_bounds": [1.5, 2.0]},
    {"dice_smoothing": 0.5},
    {"dice_loss_weight": 2.0},
    {"expert_loss_weight": 0.5},
]
OF_THE_BACKBONE = {
    "backbone_config",
    "backbone_name_or_path",
    "backbone_revision",
    "freeze_backbone",
    "adapters_only",
    "patch_loss_weight",  # has a test of its own
}


def test_every_config_value_is_exercised():
    assert set().union(*VALUES) | OF_THE_BACKBONE == set(AUFormerConfig.__annotations__)


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_every_config_value_makes_another_model(values):
    losses = []
    for model in (make_model(**values), make_model(adaptation=values.get("adaptation", "moke"))):
        inputs, labels = make_inputs(model)
        losses.append(model.train()(inputs, labels=labels).loss.item())
    assert abs(losses[0] - losses[1]) > 1e-5


def test_peft_adapts_a_model_without_adaptation(tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model(adaptation="none")
    inputs, labels = make_inputs(model)
    before = model(inputs).logits
    heads = model.config.au_labels
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=heads)
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(adapted(inputs).logits, before)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # LoRA's first factor has no gradient while the second is 0
        optimizer.zero_grad()
        adapted(inputs, labels=labels).loss.backward()
        optimizer.step()
    learned = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned and all("lora_" in name or "classifier" in name for name in learned)
    expected = adapted(inputs).logits
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model(adaptation="none"), tmp_path)
    torch.testing.assert_close(loaded(inputs).logits, expected)


def test_full_fine_tuning_is_a_vision_transformer():
    model = AUFormerForAUDetection(
        AUFormerConfig(aus=AUS, backbone_config=BACKBONE, adaptation="none", freeze_backbone=False)
    )
    assert all(parameter.requires_grad for parameter in model.parameters())
    inputs, labels = make_inputs(model)
    model(inputs, labels=labels).loss.backward()
    assert model.vit.embeddings.patch_embeddings.projection.weight.grad.any()


def test_adapter_modules_by_their_papers():
    model = make_model(adaptation="lora")
    inputs, _ = make_inputs(model)
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for block, layer in zip(merged.blocks, merged.vit.layers, strict=True):
            layer.attention.q_proj.weight += block.query.up.weight @ block.query.down.weight
            layer.attention.k_proj.weight += block.key.up.weight @ block.key.down.weight
            block.query.up.weight.zero_()
            block.key.up.weight.zero_()
    torch.testing.assert_close(merged(inputs).logits, model(inputs).logits, rtol=1e-4, atol=1e-5)
    prompted = make_model(adaptation="vpt", num_prompts=3)
    prompted.set_attn_implementation("eager")
    attentions = prompted(inputs, output_attentions=True).attentions
    assert [matrix.shape[-1] for matrix in attentions] == [1 + 3 + 16] * 2


def with_hooks(model):
    """The vision transformer of a model, plain, with its adapters as hooks around the layers."""
    vit, config = copy.deepcopy(model.vit), model.config
    for i, layer in enumerate(vit.layers):
        if model.prompts is not None and i < len(model.prompts.tokens):
            layer.register_forward_pre_hook(prompting(model.prompts.tokens[i], is_first=i == 0))
        for half, part in enumerate((layer.attention, layer.mlp)):
            if config.adaptation == "adapter":
                part.register_forward_hook(
                    adding(lambda x, y, a=model.blocks[i].adapters[half]: a.up(F.gelu(a.down(y))))
                )
            elif model.experts is not None:  # of one line, which hands nothing on
                is_moke = config.adaptation == "moke"
                expert = PlainExpert(16, *((4, [1, 3, 5], 3) if is_moke else (8, [], 0))).to(model.dtype)
                places = {name: p[2 * i + half] for name, p in model.experts["all"].named_parameters()}
                for target, source in expert_pairs(expert, places):
                    target.data.copy_(source.view_as(target))
                part.register_forward_hook(adding(lambda x, y, e=expert: e(x)))
    return vit


def prompting(prompts, is_first):
    def hook(layer, args):
        cls, patches = args[0][:, :1], args[0][:, 1 if is_first else 1 + len(prompts) :]
        return (torch.cat([cls, prompts.expand(len(cls), -1, -1), patches], dim=1), *args[1:])

    return hook


def adding(term):
    """A hook that adds a function of input and output to the output; the attention returns a tuple."""

    def hook(layer, args, output):
        if isinstance(output, tuple):
            return (output[0] + term(args[0], output[0]), *output[1:])
        return output + term(args[0], output)

    return hook


@pytest.mark.parametrize("adaptation", ["convpass", "adapter", "vpt", "vpt-shallow", "heads", "alone"])
def test_adaptations_equal_a_vision_transformer_with_hooks(adaptation):
    """Logits, the head's answers at the patches, and the maps before the first and after each block."""
    model = make_model(**ADAPTATIONS[adaptation]).double()
    inputs, _ = make_inputs(model, torch.float64)
    output = model(inputs, output_au_attentions=True, output_hidden_states=True)
    vit = with_hooks(model)(inputs, output_hidden_states=True)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(output.logits, model.classifier(vit.last_hidden_state[:, 0]), **close)
    answers = torch.sigmoid(model.classifier(vit.last_hidden_state[:, -16:])).mT
    torch.testing.assert_close(output.au_attentions.flatten(2), answers, **close)
    maps = [state[:, -16:].mT.unflatten(-1, (4, 4)) for state in vit.hidden_states]
    torch.testing.assert_close(list(output.hidden_states), maps, **close)


def test_initial_weights_are_xaviers():
    """As drawn for the layers of naive experts; prompts as for a linear layer on patches, VPT's choice."""
    torch.manual_seed(0)
    values = {"aus": AUS, "backbone_config": BACKBONE | {"num_hidden_layers": 12}}
    line = AUFormerForAUDetection(AUFormerConfig(**values)).experts["AU1"]
    expert = PlainExpert(16, 4, [1, 3, 5], 3)
    generations = [
        expert_pairs(expert, {name: p[g] for name, p in line.named_parameters()}) for g in range(24)
    ]
    for pairs in zip(*generations, strict=True):
        layer, drawn = pairs[0][0], torch.stack([place for _, place in pairs])
        if layer.ndim == 1 or layer is expert.up.weight:
            assert not drawn.any()
            continue
        expected = torch.stack([torch.nn.init.xavier_uniform_(layer.detach().clone()) for _ in pairs])
        assert drawn.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.02)
        assert drawn.std().item() == pytest.approx(expected.std().item(), rel=0.15)
    prompts = AUFormerForAUDetection(AUFormerConfig(adaptation="vpt", **values)).prompts.tokens
    expected = torch.nn.init.xavier_uniform_(torch.empty(16, 3 * 8 * 8))
    assert prompts.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.02)
    assert prompts.std().item() == pytest.approx(expected.std().item(), rel=0.15)


# The paper's sizes.


@pytest.mark.parametrize(("aus", "learnable"), [(BP4D, 2_213_016), (DISFA, 1_475_344)])
def test_learnable_parameters_of_the_paper(aus, learnable):
    with torch.device("meta"):
        model = AUFormerForAUDetection(AUFormerConfig(aus=aus))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == learnable
    assert sum(p.numel() for p in model.experts["AU12"].parameters()) == 24 * 7_620
    assert sum(p.numel() for p in model.vit.parameters()) == 85_798_656
    assert sum(p.numel() for p in PlainExpert(768, 4, [1, 3, 5], 3).parameters()) == 7_620


def test_expert_maps_of_the_paper_have_a_place_a_patch():
    config = AUFormerConfig()
    assert (config.image_size, config.map_size, config.num_generations) == (224, 14, 24)


# The fast form against the naive one.

ARCHITECTURES = {
    "paper": {},
    "masked border": {"ca_border": "masked"},
    "wide neighbourhood": {"ca_neighborhood": 5},
    "wide and masked": {"ca_neighborhood": 7, "ca_border": "masked"},
    "neighbourhood of itself": {"ca_neighborhood": 1},
    "no context": {"ca_neighborhood": 0},
    "no receptive fields": {"mrf_dilations": []},
    "one receptive field": {"mrf_dilations": [2]},
    "neither": {"mrf_dilations": [], "ca_neighborhood": 0},
    "other channels": {"expert_channels": 3},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_and_gradients_equal_the_naive_experts(architecture, dtype, tolerance):
    model = make_model(**ARCHITECTURES[architecture]).to(dtype)
    naive = PlainAUFormer(model)
    inputs, labels = make_inputs(model, dtype)
    output = model(inputs, output_au_attentions=True)
    logits, expert_logits, knowledge = naive(inputs)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(output.branch_logits, torch.stack([logits, expert_logits], 1), **close)
    maps = [head(k[:, 1:])[..., 0] for head, k in zip(naive.heads, knowledge, strict=True)]
    torch.testing.assert_close(
        output.au_attentions, torch.sigmoid(torch.stack(maps, 1).view(3, 4, 4, 4)), **close
    )

    target = labels.to(dtype)
    ((output.branch_logits - target[:, None]) ** 2).sum().backward()
    ((logits - target) ** 2 + (expert_logits - target) ** 2).sum().backward()
    scale = max(p.grad.abs().max() for p in model.parameters() if p.requires_grad)
    for name, gradient in naive.gradients_like(model).items():
        actual = model.get_parameter(name).grad
        torch.testing.assert_close(actual / scale, gradient / scale, msg=name, **close)


def test_embeddings_are_the_last_knowledge_of_cls():
    model = make_model(expert_channels=3).double()
    inputs, _ = make_inputs(model, torch.float64)
    _, expert_logits, knowledge = PlainAUFormer(model)(inputs)
    embeddings = model.au_embeddings(inputs)
    expected = torch.stack([each[:, 0] for each in knowledge], dim=1)
    torch.testing.assert_close(embeddings, expected, rtol=1e-9, atol=1e-9)
    heads = model.expert_classifier
    torch.testing.assert_close((embeddings * heads.weight).sum(-1) + heads.bias, expert_logits)
    with pytest.raises(ValueError, match="collaborating experts"):
        make_model(collaboration=False).au_embeddings(inputs.float())


def test_both_naive_ways_to_look_at_neighbours_agree():
    model = make_model(ca_neighborhood=5).double()
    inputs, _ = make_inputs(model, torch.float64)
    for a, b in zip(
        PlainAUFormer(model)(inputs)[:2], PlainAUFormer(model, FastContextExpert)(inputs)[:2], strict=True
    ):
        torch.testing.assert_close(a, b)


def test_experts_without_the_transformer_agree():
    backbone = BACKBONE | {"hidden_size": 192}  # as wide as a patch has values
    model = make_model(backbone_config=backbone).double()
    inputs, labels = make_inputs(model, torch.float64)
    fast, plain = ExpertsAlone(model, plain=False), ExpertsAlone(model, plain=True)
    torch.testing.assert_close(fast(inputs), plain(inputs), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fast(inputs, labels), plain(inputs, labels), rtol=1e-9, atol=1e-9)


def test_naive_loss_is_the_models():
    model = make_model().double()
    inputs, labels = make_inputs(model, torch.float64)
    torch.testing.assert_close(model(inputs, labels=labels).loss, PlainAUFormer(model)(inputs, labels))


# The backbone.


@pytest.fixture
def vit_folder(tmp_path):
    """A ViT with a head for something else, as one finds them."""
    torch.manual_seed(3)
    vit = ViTForImageClassification(ViTConfig(**BACKBONE, num_labels=5, hidden_dropout_prob=0.1))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    vit.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.mark.parametrize("how", ["from_backbone", "from_config"])
def test_backbone_comes_from_a_vit_folder(vit_folder, how):
    if how == "from_backbone":
        model = AUFormerForAUDetection.from_backbone(vit_folder, aus=AUS, margin=0.15)
    else:
        model = AutoModel.from_config(AUFormerConfig.from_backbone(str(vit_folder), aus=AUS, margin=0.15))
    assert model.config.margin == 0.15
    assert model.config.vit_config.hidden_dropout_prob == 0.1
    assert model.config.id2label == {0: "AU1", 1: "AU4", 2: "AU12", 3: "AU25"}
    expected = ViTModel.from_pretrained(vit_folder, add_pooling_layer=False).state_dict()
    for name, value in model.vit.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in model.vit.parameters())


def test_backbone_for_another_size_of_picture(vit_folder):
    model = AUFormerForAUDetection.from_backbone(vit_folder, aus=AUS, image_size=48)
    assert model(torch.zeros(1, 3, 48, 48), output_au_attentions=True).au_attentions.shape == (1, 4, 6, 6)
    vit = ViTModel.from_pretrained(vit_folder)
    expected = vit.embeddings.interpolate_pos_encoding(torch.zeros(1, 37, 16), 48, 48)
    torch.testing.assert_close(model.vit.embeddings.position_embeddings.data, expected.data)
    same = vit.embeddings.position_embeddings
    assert resize_positions(same, 4) is same


def test_positions_without_a_checkpoint_are_sines_and_cosines():
    """The naive formula, place by place; 18 channels are four fours, and two that stay 0."""
    expected = [[0.0] * 18]  # [CLS]
    for row in range(3):
        for column in range(3):
            waves = [
                wave(place * 10000 ** (-k / 4))
                for place in (row, column)
                for wave in (math.sin, math.cos)
                for k in range(4)
            ]
            expected.append([*waves, 0.0, 0.0])
    torch.testing.assert_close(sine_cosine_positions(3, 18), torch.tensor(expected))
    model = AUFormerForAUDetection(AUFormerConfig(backbone_config=BACKBONE))
    positions = model.vit.embeddings.position_embeddings
    assert torch.equal(positions[0], sine_cosine_positions(4, 16))


def test_adapters_are_saved_without_the_backbone(vit_folder, tmp_path):
    torch.manual_seed(0)
    model = AUFormerForAUDetection.from_backbone(vit_folder, aus=AUS).eval()
    with torch.no_grad():
        for line in model.experts.values():
            line.up_weight.normal_()
    inputs, _ = make_inputs(model)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "adapters", adapters_only=True)
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "adapters")}
    learnable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes["adapters"] < 4 * learnable + 20_000 < sizes["whole"] + 20_000
    for folder in ("adapters", "whole"):
        loaded, info = AutoModel.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        assert not loaded.config.adapters_only
        for name, value in model.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
        torch.testing.assert_close(loaded(inputs).logits, model(inputs).logits, rtol=0, atol=0)
        assert not any(parameter.requires_grad for parameter in loaded.vit.parameters())
    loaded.save_pretrained(tmp_path / "again")  # whole, by default
    vit_folder.rename(tmp_path / "moved")
    AutoModel.from_pretrained(tmp_path / "again")
    with pytest.raises(OSError, match=r"/vit', cannot be loaded.*backbone_name_or_path=FOLDER"):
        AutoModel.from_pretrained(tmp_path / "adapters")
    moved = AutoModel.from_pretrained(tmp_path / "adapters", backbone_name_or_path=str(tmp_path / "moved"))
    torch.testing.assert_close(moved(inputs).logits, model(inputs).logits, rtol=0, atol=0)


def test_backbone_of_the_hub_is_that_of_the_revision(vit_folder, monkeypatch):
    """Configuration and weights are both asked for at the revision, "main" without one."""
    asked = []
    for owner in (auformer.ViTModel, configuration_auformer.AutoConfig):
        load = owner.from_pretrained
        monkeypatch.setattr(
            owner,
            "from_pretrained",
            lambda name, revision, load=load, **kwargs: asked.append(revision) or load(name, **kwargs),
        )
    for revision in (None, "v1.0"):
        AUFormerForAUDetection.from_backbone(vit_folder, backbone_revision=revision, aus=AUS)
    assert asked == ["main", "main", "v1.0", "v1.0"]


def test_processor_options_are_the_middle_224_of_256():
    options = AUFormerConfig(aus=[1, 12]).processor_options
    assert options["crop_size"] == options["size"] == {"height": 224, "width": 224}
    assert (options["aligned_size"], options["aus"]) == (256, [1, 12])


def test_backbones_that_do_not_fit_are_refused(vit_folder, tmp_path):
    with pytest.raises(ValueError, match="backbone_name_or_path=None"):
        make_model().save_pretrained(tmp_path / "out", adapters_only=True)
    with pytest.raises(ValueError, match="freeze_backbone=False"):
        model = AUFormerForAUDetection.from_backbone(vit_folder, aus=AUS, freeze_backbone=False)
        model.save_pretrained(tmp_path / "out", adapters_only=True)
    make_model().save_pretrained(tmp_path / "auformer")
    with pytest.raises(ValueError, match=r"'au-auformer' checkpoint.*type \"vit\""):
        AUFormerForAUDetection.from_backbone(tmp_path / "auformer")
    other = AUFormerConfig(
        backbone_config=BACKBONE | {"num_hidden_layers": 3}, backbone_name_or_path=str(vit_folder)
    )
    with pytest.raises(ValueError, match=r"weights missing .*layers\.2"):
        AutoModel.from_config(other)
    with pytest.raises(ValueError, match=r"40, 40.*32 x 32"):
        make_model()(torch.zeros(1, 3, 40, 40))


def test_trainer_resumes_exactly(tmp_path):
    data = [
        {
            "pixel_values": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)),
            "labels": torch.tensor([i % 2, 1, 0, -1]),
        }
        for i in range(8)
    ]
    weights = []
    for stop in (None, 2):
        torch.manual_seed(0)
        arguments = {
            "output_dir": str(tmp_path / str(stop)),
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        }
        if stop:
            Trainer(fresh_model(), TrainingArguments(max_steps=4, **arguments), train_dataset=data).train()
            trainer = Trainer(fresh_model(), TrainingArguments(max_steps=4, **arguments), train_dataset=data)
            trainer.train(resume_from_checkpoint=str(tmp_path / "2" / "checkpoint-2"))
        else:
            trainer = Trainer(fresh_model(), TrainingArguments(max_steps=4, **arguments), train_dataset=data)
            trainer.train()
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0, msg=name)


# Configurations.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ca_neighborhood": 4}, "ca_neighborhood=4 must be odd"),
        ({"mrf_dilations": [1, 0]}, r"mrf_dilations=\[1, 0\]"),
        ({"margin": 1.0}, "margin=1.0"),
        ({"gamma_bounds": [1.0]}, r"gamma_bounds=\[1.0\]"),
        ({"gamma_bounds": [0, 2]}, r"gamma_bounds=\[0, 2\]"),
        ({"dice_smoothing": -1.0}, "dice_smoothing=-1.0"),
        ({"expert_channels": 0}, "expert_channels=0"),
        ({"expert_dropout": 1.0}, "expert_dropout=1.0"),
        ({"adaptation": "prefix"}, "adaptation"),
        ({"ca_border": "reflect"}, "ca_border"),
        ({"image_size": 100}, "image_size=100"),
        ({"image_size": 0}, "image_size=0"),
        ({"backbone_config": {"patch_size": [16, 8]}}, r"patch_size=\[16, 8\]"),
    ],
)
def test_configurations_that_make_no_sense(fields, message):
    with pytest.raises(Exception, match=message):
        AUFormerConfig(**fields)


def test_a_backbone_config_serves_pictures_of_several_sizes(tmp_path):
    vit = ViTConfig(**BACKBONE)
    configs = [AUFormerConfig(backbone_config=vit, image_size=size) for size in (48, 64)]
    assert [config.image_size for config in configs] == [48, 64]
    assert vit.image_size == 32
    configs[0].save_pretrained(tmp_path)
    assert AUFormerConfig.from_pretrained(tmp_path, image_size=96).vit_config.image_size == 96


def test_losses_of_the_ablations():
    model = make_model(margin=0.0, gamma_bounds=[1, 1], dice_loss_weight=0.0, expert_loss_weight=0.0)
    inputs, labels = make_inputs(model)
    output = model(inputs, labels=labels)
    p, y = torch.sigmoid(output.logits), labels
    wa = -(y * p.log() + (1 - y) * p * (1 - p).log()).mean()
    torch.testing.assert_close(output.loss, wa)
    model.config.dice_loss_weight, model.config.dice_smoothing = 2.0, 0.5
    with_dice = wa + 2 * (1 - (2 * y * p + 0.5) / (y + p**2 + 0.5)).mean()
    torch.testing.assert_close(model(inputs, labels=labels).loss, with_dice)


def test_loss_of_the_patches():
    """A logit and two centres for each action unit, read from all patches in their places."""
    plain, model = make_model(), make_model(patch_loss_weight=0.5)
    model.load_state_dict(plain.state_dict(), strict=False)
    inputs, labels = make_inputs(model)
    labels[0, 1] = -1
    centers = 32 * torch.rand(3, len(AUS), 2, 2, generator=torch.Generator().manual_seed(2))
    patches = model(inputs, output_hidden_states=True).hidden_states[-1].flatten(2).mT
    norm = model.vit.layernorm
    places = F.layer_norm(patches, (16,), norm.weight, norm.bias, norm.eps).flatten(1)
    loss, known = 0.0, labels >= 0
    for i, au in enumerate(AUS):
        read = model.patch_reader[f"AU{au}"](places)
        each = F.binary_cross_entropy_with_logits(read[:, 0], labels[:, i].float(), reduction="none")
        loss += each[known[:, i]].sum() / known.sum()
        target = (centers[:, i].reshape(3, 4) + 0.5 - 16) / 32 * 5
        loss += F.smooth_l1_loss(read[:, 1:], target) / len(AUS)
    expected = plain(inputs, labels=labels).loss + 0.5 * loss
    torch.testing.assert_close(model(inputs, centers, labels).loss, expected)
    for wrong in (None, centers[:, :1]):
        with pytest.raises(ValueError, match="patch_loss_weight=0.5 needs au_centers of shape"):
            model(inputs, wrong, labels)
    assert model(inputs).loss is None


def test_unknown_labels_leave_the_places_to_the_loss_of_the_patches():
    """What is read of an occurrence gets no gradient from an unknown label, alone or in a batch of such."""
    model = make_model(patch_loss_weight=0.5)
    inputs, labels = make_inputs(model)
    centers = 32 * torch.rand(3, len(AUS), 2, 2, generator=torch.Generator().manual_seed(2))
    readers = [model.patch_reader[f"AU{au}"] for au in AUS]
    for reader in readers:
        torch.nn.init.normal_(reader.weight, std=0.1, generator=torch.Generator().manual_seed(1))

    def gradients(labels):
        """Of the occurrence (N, C), of the places (N, 4, C), and of the heads that answer."""
        model.zero_grad()
        loss = model(inputs, centers, labels).loss
        loss.backward()
        weights = torch.stack([reader.weight.grad for reader in readers])
        heads = [p.grad for name, p in model.named_parameters() if "classifier" in name]
        return loss.detach(), weights[:, 0], weights[:, 1:], [grad for grad in heads if grad is not None]

    _, _, places, _ = gradients(labels)
    labels[:, 1] = -1
    _, occurrence, others, _ = gradients(labels)
    assert not occurrence[1].any() and occurrence[0].any()
    torch.testing.assert_close(others, places)
    loss, occurrence, others, heads = gradients(torch.full_like(labels, -1))
    assert not occurrence.any() and heads and not any(grad.any() for grad in heads)
    torch.testing.assert_close(others, places)
    assert 0 < loss < torch.inf
    with pytest.raises(ValueError, match="Label nan is neither"):
        model(inputs, centers, torch.full_like(labels, torch.nan, dtype=torch.float32))


def test_compact_configuration_trains_as_a_whole():
    config = AUFormerConfig.compact(aus=AUS)
    assert (config.image_size, config.map_size, config.freeze_backbone) == (112, 8, False)
    model = AUFormerForAUDetection(config)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters()) < 3e6


def make_model(**kwargs):
    torch.manual_seed(0)
    model = AUFormerForAUDetection(
        AUFormerConfig(**{"aus": AUS, "backbone_config": BACKBONE, **kwargs})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def make_inputs(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(3, 3, 32, 32, generator=generator, dtype=dtype)
    return pictures, torch.randint(0, 2, (3, len(model.config.aus)), generator=generator)


def fresh_model():
    torch.manual_seed(0)
    return AUFormerForAUDetection(AUFormerConfig(aus=AUS, backbone_config=BACKBONE, freeze_backbone=False))
