"""What every action unit model must do: `class TestX(AUModelTester)` and a tiny configuration run it all."""

import copy
import inspect

import accelerate
import pytest
import torch
from torch.func import functional_call, grad
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.utils.generic import find_labels

from actionunits import AUImageProcessor
from actionunits.action_units import UNKNOWN
from actionunits.modeling_outputs import AUDetectionOutput
from pretended_devices import PretendedDevices, parts

AUS = [1, 4, 12, 25]


class Adapted(torch.nn.Module):
    """A linear layer and a change of its weight beside it, which acts when it is called, as PEFT's do."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.in_features = layer, layer.in_features
        self.delta = torch.nn.Parameter(0.1 * torch.randn_like(layer.weight))

    def forward(self, x):
        return self.layer(x) + torch.nn.functional.linear(x, self.delta)


def adapt_every(kind, adapter, model):
    """Put adapters around all layers of a kind, and return a copy of the model with their changes merged."""
    merged = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is kind:
            adapted = adapter(layer)
            model.set_submodule(name, adapted)
            with torch.no_grad():
                merged.get_submodule(name).weight += adapted.delta
    return merged


class TrainedWhole(torch.nn.Module):
    """A copy that is trained in the place of a head, as PEFT's `modules_to_save` asks for."""

    def __init__(self, head):
        super().__init__()
        assert not isinstance(head, torch.nn.ModuleDict | torch.nn.ModuleList), "PEFT refuses these"
        self.head, self.trained = head.requires_grad_(False), copy.deepcopy(head).requires_grad_(True)

    def forward(self, *args):
        return self.trained(*args)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("trained"), name)


class AUModelTester:
    """Common tests. A subclass names the classes and gives a configuration that runs in milliseconds.

    Attributes:
        model_class: The model; its config class is taken from it.
        config: Fields of a tiny configuration; `aus` is added.
        has_attention: Whether the model uses attention kernels, so that eager and sdpa can be compared.
        without_gradient: Ends of the names of parameters that the loss does not reach by design.
        always_float32: Ends of the names of what is summed up over an epoch, too fine for half precision.
    """

    model_class: type
    config: dict
    has_attention = False
    without_gradient: tuple[str, ...] = ()
    always_float32: tuple[str, ...] = (".prototype", ".feature_sum", ".epoch_weights", ".epoch_sums")

    # What the tests build on.

    def make_config(self, **kwargs):
        return self.model_class.config_class(**{"aus": AUS, **copy.deepcopy(self.config), **kwargs})

    def make_model(self, **kwargs):
        """A model in evaluation mode, its weights and batch statistics not those of the initialisation."""
        torch.manual_seed(0)
        model = self.model_class(self.make_config(**kwargs))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            model.train()(**self.make_inputs(model.config, batch_size=8))
        return model.eval()

    def make_inputs(self, config, batch_size=3):
        """Pictures, and centres that depend on the action unit's number, not on its place in the order."""
        generator = torch.Generator().manual_seed(1)
        size = self.image_size(config)
        numbers = torch.tensor(config.aus if config.aus is not None else range(config.num_labels))
        offsets = torch.rand(batch_size, 100, 2, 2, generator=generator)
        return {
            "pixel_values": torch.randn(batch_size, 3, size, size, generator=generator),
            "au_centers": offsets[:, numbers] * size,
        }

    def image_size(self, config):
        return config.image_size

    def make_labels(self, config, batch_size=3):
        return torch.randint(
            0, 2, (batch_size, config.num_labels), generator=torch.Generator().manual_seed(2)
        )

    @pytest.fixture
    def model(self):
        return self.make_model()

    @pytest.fixture
    def inputs(self, model):
        return self.make_inputs(model.config)

    @pytest.fixture
    def labels(self, model):
        return self.make_labels(model.config)

    @pytest.fixture
    def folder(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        return tmp_path

    # Configuration, saving, loading.

    def test_config_survives_saving(self, tmp_path):
        config = self.make_config(au_thresholds=[0.2, 0.3, 0.4, 1], au_occurrence_rates=[0.1, 0.2, 0.3, 0.4])
        config.save_pretrained(tmp_path)
        assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()
        assert type(AutoConfig.from_pretrained(tmp_path)) is type(config)

    def test_config_without_arguments_is_for_bp4d(self):
        config = self.model_class.config_class()
        assert config.aus == [1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24]
        assert config.problem_type == "multi_label_classification"

    def test_loaded_model_is_bit_exact(self, model, inputs, folder):
        loaded, info = self.model_class.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        for name, value in model.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
        torch.testing.assert_close(
            loaded(**inputs).logits, model(**inputs).logits
        )  # sums may have another order

    @pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageClassification])
    def test_auto_classes_load_the_detector(self, auto_class, folder):
        assert type(auto_class.from_pretrained(folder)) is self.model_class

    def test_weights_that_a_checkpoint_lacks_are_initialised(self):
        config = self.make_config()
        fresh = self.model_class(config).state_dict()
        torch.use_deterministic_algorithms(True)  # fills memory that nobody initialised with NaN
        try:
            loaded = self.model_class.from_pretrained(None, config=config, state_dict={}).state_dict()
        finally:
            torch.use_deterministic_algorithms(False)
        for name, value in fresh.items():
            assert loaded[name].isfinite().all(), name
            if value.unique().numel() == 1:
                torch.testing.assert_close(loaded[name], value, msg=name)
            elif value.numel() > 200:
                assert 0.7 < loaded[name].std() / value.std() < 1.4, name

    # Outputs.

    def test_outputs(self, model, inputs, labels):
        output = model(**inputs, labels=labels)
        assert isinstance(output, AUDetectionOutput)
        assert output.logits.shape == labels.shape
        assert output.logits.isfinite().all()
        assert output.logits.std() > 1e-4, "the tests need logits that differ"
        assert output.loss.shape == ()
        assert output.loss > 0
        assert model(**inputs).loss is None
        as_tuple = model(**inputs, labels=labels, return_dict=False)
        torch.testing.assert_close(as_tuple[0], output.loss)
        torch.testing.assert_close(as_tuple[1], output.logits)

    def test_signature(self, model, inputs):
        parameters = list(inspect.signature(self.model_class.forward).parameters)
        assert parameters[1:5] == ["pixel_values", "au_centers", "labels", "output_au_attentions"]
        model(**inputs, alignment="what else the image processor returns")

    def test_processor_options_make_the_input(self, model, photo, landmarks):
        processor = AUImageProcessor(**model.config.processor_options)
        inputs = processor(photo, landmarks=landmarks, return_tensors="pt")
        output = model(**inputs, labels=self.make_labels(model.config, 1))
        assert output.logits.shape == (1, len(AUS))
        assert output.loss.isfinite()

    def test_trainer_conventions(self, model):
        assert find_labels(self.model_class) == ["labels"]
        assert model.accepts_loss_kwargs is False
        fields = set(AUDetectionOutput.__dataclass_fields__) - {"loss", "logits"}
        assert fields == set(model.config.keys_to_ignore_at_inference)

    def test_au_attentions(self, model, inputs):
        output = model(**inputs, output_au_attentions=True)
        torch.testing.assert_close(output.logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
        maps = output.au_attentions
        assert maps.shape[:2] == output.logits.shape
        assert maps.ndim == 4
        assert maps.min() >= 0
        assert maps.max() <= 1
        assert maps.std() > 0
        for name, value in output.items():
            if isinstance(value, torch.Tensor) and name != "loss":
                assert value.shape[0] == len(output.logits), f"{name} is not batch-first"
        assert model(**inputs).au_attentions is None

    def test_pictures_that_are_not_normalised_are_refused(self, model, inputs):
        inputs["pixel_values"] = (255 * torch.rand(inputs["pixel_values"].shape)).to(torch.uint8)
        with pytest.raises(RuntimeError):
            model(**inputs)

    def test_hidden_states(self, model, inputs):
        hidden_states = model(**inputs, output_hidden_states=True).hidden_states
        assert len(hidden_states) > 1
        assert all(len(state) == 3 for state in hidden_states)
        assert model(**inputs).hidden_states is None
        model.config.output_hidden_states = True
        assert len(model(**inputs).hidden_states) == len(hidden_states)
        assert model(**inputs, output_hidden_states=False).hidden_states is None

    def test_gradients_of_hidden_states(self, model, inputs):
        inputs = {name: value.requires_grad_() for name, value in inputs.items()}
        output = model(**inputs, output_hidden_states=True)
        torch.testing.assert_close(output.logits, model(**inputs).logits, rtol=0, atol=0)
        gradients = torch.autograd.grad(output.logits.sum(), output.hidden_states)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert gradients[0].any()

    @pytest.mark.parametrize("training", [False, True])
    def test_no_pictures_have_no_answers(self, model, inputs, labels, training):
        before = {name: value.clone() for name, value in model.named_buffers() if value.is_floating_point()}
        inputs = {name: value[:0] for name, value in inputs.items()}
        wanted = {"output_au_attentions": True, "output_attentions": True, "output_hidden_states": True}
        for options in ({}, wanted):
            output = model.train(training)(**inputs, labels=labels[:0], **options)
            assert output.logits.shape == labels[:0].shape
            assert output.loss == 0
        output.loss.backward()
        for name, value in before.items():
            torch.testing.assert_close(model.get_buffer(name), value, rtol=0, atol=0, msg=name)

    def test_one_picture_equals_the_batch(self, model, inputs):
        with torch.no_grad():
            together = model(**inputs).logits
            alone = [model(**{k: v[i : i + 1] for k, v in inputs.items()}).logits for i in range(3)]
        torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-5)

    def test_is_deterministic(self, model, inputs):
        torch.testing.assert_close(model(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)

    def test_channels_last_changes_nothing(self, model, inputs):
        expected = model(**inputs).logits
        inputs["pixel_values"] = inputs["pixel_values"].to(memory_format=torch.channels_last)
        actual = model.to(memory_format=torch.channels_last)(**inputs).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, model, inputs, labels, dtype):
        expected = model(**inputs, labels=labels)
        inputs = {name: value.to(dtype) for name, value in inputs.items()}
        output = model.to(dtype)(**inputs, labels=labels, output_au_attentions=True)
        assert output.logits.dtype == dtype
        assert output.loss.dtype == torch.float32
        scale = expected.logits.abs().max()
        assert (output.logits.float() - expected.logits).abs().max() < 0.1 * scale
        assert all(value.isfinite().all() for value in output.values())

    def test_half_precision_takes_the_float32_of_the_processor(self, model, inputs, labels):
        model.to(torch.bfloat16)  # as `bf16_full_eval` of the Trainer does, which leaves the inputs alone
        output = model(**inputs, labels=labels)
        halves = {name: value.to(torch.bfloat16) for name, value in inputs.items()}
        assert output.logits.dtype == torch.bfloat16
        torch.testing.assert_close(output.logits, model(**halves).logits, rtol=0.05, atol=0.05)
        assert output.loss.isfinite()

    @pytest.mark.parametrize("how", ["from_pretrained", "from_config"])
    def test_half_precision_leaves_counts_and_running_sums_as_they_are(self, model, folder, how):
        if how == "from_pretrained":
            half = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
        else:
            half = AutoModel.from_config(self.make_config(), dtype=torch.bfloat16)
        kept = [name for name in model.state_dict() if name.endswith(self.always_float32)]
        for name, value in model.state_dict().items():
            is_left = name in kept or not value.is_floating_point()
            expected = value.dtype if is_left else torch.bfloat16
            assert half.state_dict()[name].dtype == expected, name

    def test_eager_equals_sdpa(self, inputs, folder):
        if not self.has_attention:
            pytest.skip("no attention kernel")
        logits = []
        for implementation in ("eager", "sdpa"):
            model = self.model_class.from_pretrained(folder, attn_implementation=implementation)
            logits.append(model(**inputs).logits)
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)

    def test_attention_matrices_come_of_any_kernel(self, inputs, folder):
        if not self.has_attention:
            pytest.skip("no attention kernel")
        eager, sdpa = (
            self.model_class.from_pretrained(folder, attn_implementation=implementation)(
                **inputs, output_attentions=True
            )
            for implementation in ("eager", "sdpa")
        )
        torch.testing.assert_close(sdpa.logits, eager.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sdpa.attentions, eager.attentions, rtol=1e-4, atol=1e-5)
        assert all(torch.isclose(weights.sum(-1), torch.ones(())).all() for weights in sdpa.attentions)

    @pytest.mark.slow
    def test_export(self, model, inputs):
        exported = torch.export.export(model, (), inputs, strict=False).module()
        torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)

    # Labels and training.

    def test_unknown_labels_equal_a_smaller_batch(self, model, inputs, labels):
        rest = {name: value[1:] for name, value in inputs.items()}
        expected = model(**rest, labels=labels[1:]).loss
        labels[0] = UNKNOWN
        torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)

    def test_unknown_action_unit_gets_no_gradient(self, model, inputs, labels):
        labels[:, 1] = UNKNOWN
        model(**inputs, labels=labels).loss.backward()
        of_unknown = [
            p.grad for name, p in model.named_parameters() if f".{model.config.au_labels[1]}." in name
        ]
        assert of_unknown
        assert all(grad is None or not grad.any() for grad in of_unknown)

    def test_nothing_known_is_no_loss(self, model, inputs, labels):
        loss = model(**inputs, labels=torch.full_like(labels, UNKNOWN)).loss
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())

    def test_code_for_missing_labels_is_refused(self, model, inputs, labels):
        labels[0, 0] = 9
        with pytest.raises(ValueError, match="Label 9 is neither"):
            model(**inputs, labels=labels)

    def test_occurrence_rates_weigh_the_loss(self, inputs, labels, folder):
        plain = self.model_class.from_pretrained(folder)
        weighted = self.model_class.from_pretrained(folder, au_occurrence_rates=[0.01, 0.3, 0.3, 0.3])
        labels[:] = 1
        assert weighted(**inputs, labels=labels).loss > 2 * plain(**inputs, labels=labels).loss

    def test_gradient_reaches_every_parameter(self, model, inputs, labels):
        # In evaluation mode: in training, batch normalisation takes the effect of biases before it away.
        inputs = {name: value.double() for name, value in inputs.items()}
        model.double()(**inputs, labels=labels).loss.backward()
        parameters = dict(model.named_parameters())
        missed = {name for name, p in parameters.items() if p.grad is None or p.grad.abs().max() < 1e-12}
        assert missed == {name for name in parameters if name.endswith(self.without_gradient)}

    def test_learns_by_heart(self):
        torch.manual_seed(0)
        model = self.model_class(self.make_config()).train()
        inputs, labels = self.make_inputs(model.config, 8), self.make_labels(model.config, 8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(15):
            loss = model(**inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], losses[::3]

    @pytest.mark.parametrize("reentrant", [None, True])
    def test_gradient_checkpointing_changes_nothing(self, model, labels, reentrant):
        plain, checkpointed = model.train(), copy.deepcopy(model)
        enable = "activation_checkpointing_enable"  # since transformers 5.20; deprecates the other
        enable = enable if hasattr(checkpointed, enable) else "gradient_checkpointing_enable"
        getattr(checkpointed, enable)(*([] if reentrant is None else [{"use_reentrant": reentrant}]))
        assert any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.modules())
        inputs = self.make_inputs(model.config)
        for one in (plain, checkpointed):
            one(**inputs, labels=labels).loss.backward()
        for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)
        for (name, a), b in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=f"{name}: the batch was counted twice")

    # What other libraries put in the place of layers.

    @pytest.mark.parametrize("buffers", [False, True])
    def test_offloaded_weights_change_nothing(self, model, inputs, labels, buffers):
        wanted = {"labels": labels, "output_au_attentions": True}
        with torch.no_grad():
            expected = model(**inputs, **wanted)
            accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=buffers)
            actual = model(**inputs, **wanted)
        assert any(parameter.is_meta for parameter in model.parameters())
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)

    @pytest.mark.parametrize("which", [slice(1), slice(1, None)])
    def test_parts_on_the_disk_change_nothing(self, model, inputs, folder, tmp_path_factory, which):
        parts = [name for name, _ in model.named_children()]
        places = dict.fromkeys(parts, "cpu") | dict.fromkeys(parts[which], "disk")
        loaded = AutoModel.from_pretrained(
            folder, device_map=places, offload_folder=tmp_path_factory.mktemp("disk")
        )
        assert loaded.hf_device_map == places
        actual, expected = (one(**inputs, output_au_attentions=True) for one in (loaded, model))
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)

    @pytest.mark.parametrize("how", ["in turn", "one after the other"])
    def test_parts_on_several_devices_change_nothing(self, model, inputs, labels, how):
        wanted = {"output_au_attentions": True, "output_attentions": True, "labels": labels}
        expected = [model(**inputs), model(**inputs, **wanted)]
        names = parts(model, model._no_split_modules)
        half = len(names) // 2
        numbers = [i % 2 if how == "in turn" else int(i >= half) for i in range(len(names))]
        with PretendedDevices() as devices:
            devices.spread(model, {name: f"cuda:{i}" for name, i in zip(names, numbers, strict=True)})
            actual = [model(**inputs), model(**inputs, **wanted)]
            model.train()(**inputs, labels=labels)  # takes notes of the batch
            if hasattr(model, "end_of_epoch"):
                model.end_of_epoch()
        for one, other in zip(actual, expected, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5, msg=name)

    def test_weights_may_be_arguments(self, model, inputs):
        weights = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
        actual = functional_call(model, weights, (), inputs).logits
        model.load_state_dict(weights, strict=False)
        torch.testing.assert_close(actual, model(**inputs).logits)

    def test_gradients_may_be_functions(self, model, inputs, labels):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

        def loss(weights):
            return functional_call(model, weights, (), inputs | {"labels": labels}).loss

        gradients = grad(loss)({name: p.detach() for name, p in trained.items()})
        model(**inputs, labels=labels).loss.backward()
        for name, p in trained.items():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(gradients[name], expected, msg=name)

    def test_every_linear_layer_may_be_another(self, model, inputs, labels):
        merged = adapt_every(torch.nn.Linear, Adapted, model)
        wanted = {"labels": labels, "output_au_attentions": True}
        actual, expected = model(**inputs, **wanted), merged(**inputs, **wanted)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-4, msg=name)
        actual.loss.backward()
        deltas = {name: p for name, p in model.named_parameters() if name.endswith(".delta")}
        assert deltas
        assert not [name for name, delta in deltas.items() if delta.grad is None]

    def test_heads_may_be_trained_whole_beside_adapters(self, model, inputs, labels):
        other, names = copy.deepcopy(model), ("classifier", "classifiers", "localizer")
        heads = [name for name, _ in model.named_modules() if name.split(".")[-1] in names]
        assert heads
        for name in heads:
            kept = TrainedWhole(model.get_submodule(name))
            model.set_submodule(name, kept)
            with torch.no_grad():
                for one in (kept.trained, other.get_submodule(name)):
                    for parameter in one.parameters():
                        parameter *= 1.1
        actual, expected = model(**inputs, labels=labels), other(**inputs, labels=labels)
        torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
        actual.loss.backward()
        for name in heads:
            assert all(p.grad is not None for p in model.get_submodule(name).trained.parameters()), name

    # Other outputs.

    @pytest.mark.parametrize("how", ["from_pretrained", "adapt_to_aus"])
    def test_shared_action_units_keep_their_heads(self, model, inputs, folder, how):
        aus = [25, 43, 1]
        if how == "adapt_to_aus":
            other = model.adapt_to_aus(aus)
        else:
            other, info = AutoModel.from_pretrained(folder, aus=aus, output_loading_info=True)
            assert info["missing_keys"]
            assert all(".AU43." in name for name in info["missing_keys"])
            assert not info["unexpected_keys"]  # the heads that nobody asked for
        assert other.config.au_labels == ["AU25", "AU43", "AU1"]
        logits = other(**self.make_inputs(other.config)).logits
        expected = model(**inputs).logits[:, [AUS.index(25), AUS.index(1)]]
        torch.testing.assert_close(logits[:, [0, 2]], expected, rtol=1e-4, atol=1e-5)
        assert logits[:, 1].isfinite().all()
        assert model.config.aus == AUS

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_types_stay_when_the_outputs_change(self, folder, dtype):
        half = AutoModel.from_pretrained(folder, dtype=dtype)
        known = half.state_dict()
        for name, value in half.adapt_to_aus([25, 43, 1]).state_dict().items():
            assert value.dtype == known[name.replace(".AU43.", ".AU25.")].dtype, name

    def test_number_of_labels(self, folder):
        model = self.model_class.from_pretrained(folder, num_labels=3)
        assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
        assert model.config.aus is None
        assert model(**self.make_inputs(model.config)).logits.shape == (3, 3)
