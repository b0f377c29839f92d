"""`Pruner` inside the Trainer of Hugging Face transformers."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import woodfisher as wf
from models import ConvNet, Output, mlp, samples
from training import FISHER, assert_held

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from woodfisher.integrations.hf import PruningCallback  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
SCHEDULE = wf.Milestones({1: 0.4, 2: 0.6, 4: 0.8})

pytestmark = pytest.mark.filterwarnings("ignore:torch.func can't vectorise:woodfisher.WoodfisherWarning")


def bert(seed=0):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def sentences(count=24):
    """Tokens with padding, its mask, and classes."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 7, (count, 1), generator=generator)
    mask = torch.arange(6) < lengths
    return {
        "input_ids": torch.randint(1, 50, (count, 6), generator=generator) * mask,
        "attention_mask": mask.long(),
        "labels": torch.randint(3, (count,), generator=generator),
    }


class Images(nn.Module):
    """A convolutional network as the Trainer takes it: keyword arguments, and its own loss in what it returns."""

    def __init__(self):
        super().__init__()
        self.net = ConvNet()

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        return Output(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def images(seed=0):
    torch.manual_seed(seed)
    return Images()


def pictures(count=24):
    return dict(zip(("pixel_values", "labels"), samples(count, (2, 6, 6)), strict=True))


KINDS = {"bert": (bert, sentences), "conv": (images, pictures)}


class Watcher(transformers.TrainerCallback):
    """Looks at the gradients and weights right after the pruner did, and once gradients are dropped."""

    def __init__(self, pruner):
        self.pruner, self.calls, self.sparsities = pruner, 0, []

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        assert all(model.get_parameter(name).grad is not None for name in self.pruner.masks)
        assert_held(model, self.pruner, getattr(optimizer, "optimizer", optimizer))
        self.sparsities.append(round(self.pruner.sparsity, 1))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert_held(model, self.pruner)
        self.calls += 1


def trainer_of(kind, folder, seed=0, callback=None, others=(), **options):
    build, make_batch = KINDS[kind]
    model, batch = build(seed), make_batch()
    if callback is None:
        callback = PruningCallback(pruner_for(model, batch))
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.01,
            "save_steps": 3,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_strategy": "no",
            **options,
        }
    )
    rows = [{key: value[i] for key, value in batch.items()} for i in range(24)]
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback, *others]
    )
    return trainer, callback


def pruner_for(model, batch):
    return wf.Pruner(model, wf.Objective(model, [batch]), SCHEDULE, curvature=FISHER)


@pytest.mark.parametrize("kind", KINDS)
def test_training_prunes_to_the_goal_and_resumes_to_the_last_bit(kind, tmp_path):
    trainer, callback = trainer_of(kind, tmp_path)
    watcher = Watcher(callback.pruner)
    trainer.add_callback(watcher)
    trainer.train()
    assert watcher.sparsities == [0.0, 0.4, 0.6, 0.6, 0.8, 0.8]
    assert watcher.calls == callback.pruner.steps == STEPS
    assert_held(trainer.model, callback.pruner)
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    for name, kept in callback.pruner.masks.items():
        assert not saved[name][~kept].any()

    resumed, again = trainer_of(kind, tmp_path, seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert (again.pruner.steps, len(again.pruner.history)) == (STEPS, 1)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for name, mask in callback.pruner.masks.items():
        assert torch.equal(mask, again.pruner.masks[name])


def test_rows_of_a_transformer_are_its_gradients_with_either_mask():
    model, batch = bert().eval().double(), sentences()
    mask = batch["attention_mask"].bool()[:, None, None].expand(-1, 1, 6, 6)
    additive = {**batch, "attention_mask": torch.zeros(mask.shape).double().masked_fill(~mask, -1e9)}
    objective = wf.Objective(model, [batch])
    rows = objective.rows(8)
    for i, row in enumerate(rows):
        model.zero_grad()
        model(**{key: value[i : i + 1] for key, value in batch.items()}).loss.backward()
        expected = torch.cat([p.grad.flatten() for p in objective.parameters.values()])
        torch.testing.assert_close(row, expected)
    vectorised = wf.Objective(model, [additive])
    torch.testing.assert_close(vectorised.rows(8), rows)
    assert vectorised.forward._vectorised


def test_a_dense_checkpoint_starts_the_schedule(tmp_path):
    trainer, _ = trainer_of("conv", tmp_path, callback=transformers.TrainerCallback(), max_steps=3)
    trainer.train()
    resumed, callback = trainer_of("conv", tmp_path, seed=1)
    with pytest.warns(
        wf.WoodfisherWarning, match=r"after 3 steps of the optimizer, before the .* 0.8 \(0.6 by then"
    ):
        resumed.train(resume_from_checkpoint=True)
    assert (callback.pruner.steps, round(callback.pruner.sparsity, 1)) == (3, 0.6)


def test_a_truncated_state_is_explained(tmp_path):
    trainer, _ = trainer_of("conv", tmp_path)
    trainer.train()
    file = tmp_path / "checkpoint-3" / "pruner.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    resumed, _ = trainer_of("conv", tmp_path, seed=1)
    with pytest.raises(wf.WoodfisherError, match="cannot be read as the state of a pruner"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_elsewhere_is_named(tmp_path):
    trainer, _ = trainer_of("conv", tmp_path / "first")
    trainer.train()
    there = tmp_path / "first" / "checkpoint-3"
    resumed, _ = trainer_of("conv", tmp_path / "second", seed=1)
    with pytest.raises(
        wf.WoodfisherError, match=r"second.checkpoint-3 has no pruner.safetensors.*checkpoint=folder"
    ):
        resumed.train(resume_from_checkpoint=str(there))
    other, _ = trainer_of("conv", tmp_path / "second", seed=2)
    other.train()
    resumed, _ = trainer_of("conv", tmp_path / "second", seed=1)
    with pytest.raises(wf.WoodfisherError, match=r"is of another run: weights of 'net.*checkpoint=folder"):
        resumed.train(resume_from_checkpoint=str(there))
    del resumed
    model = images(1)
    callback = PruningCallback(pruner_for(model, pictures()), checkpoint=there)
    resumed, _ = trainer_of("conv", tmp_path / "second", callback=callback)
    resumed.model = resumed.model_wrapped = resumed.callback_handler.model = model
    resumed.train(resume_from_checkpoint=str(there))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:training ended after 3 steps:woodfisher.WoodfisherWarning")
def test_a_pruner_may_be_made_of_the_model_that_training_begins_with(tmp_path):
    callback = PruningCallback(lambda model: pruner_for(model, pictures()))
    trainer, _ = trainer_of("conv", tmp_path, callback=callback, save_strategy="no", max_steps=3)
    assert callback.pruner is None
    for _ in range(2):
        trainer.train()
        assert callback.pruner.objective.model is trainer.model
        assert (callback.pruner.steps, round(callback.pruner.sparsity, 1)) == (3, 0.6)


def of_layer(layer):
    return lambda model: wf.Pruner(
        model, wf.Objective(model, [pictures()], params=layer), SCHEDULE, criterion="magnitude"
    )


def two_callbacks(*names):
    layers = ("net.conv.weight", "net.fc.weight")
    return [PruningCallback(of_layer(layer), name=name) for layer, name in zip(layers, names, strict=True)]


def test_two_callbacks_keep_their_states_apart(tmp_path):
    first, other = two_callbacks("", "other")
    trainer, _ = trainer_of("conv", tmp_path, callback=first, others=[other])
    trainer.train()
    files = sorted(path.name for path in (tmp_path / "checkpoint-3").glob("pruner*"))
    assert files == ["pruner-other.safetensors", "pruner.safetensors"]
    callbacks = two_callbacks("", "other")
    resumed, _ = trainer_of("conv", tmp_path, seed=1, callback=callbacks[0], others=callbacks[1:])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [len(callback.pruner.history) for callback in callbacks] == [1, 1]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    first, same = two_callbacks("same", "same")
    trainer, _ = trainer_of("conv", tmp_path, callback=first, others=[same])
    with pytest.raises(wf.WoodfisherError, match="have the name 'same', .* one file: give each a name="):
        trainer.train()
    with pytest.raises(wf.WoodfisherError, match="'a/b' came, which is a path"):
        PruningCallback(pruner_for, name="a/b")


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("woodfisher.integrations.hf.save_file", half)
    trainer, _ = trainer_of("conv", tmp_path)
    with pytest.raises(wf.WoodfisherError, match="disk full"):
        trainer.train()
    assert not (tmp_path / "checkpoint-3" / "pruner.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callback": "other"}, "the one that is trained doesn't have its '0.weight'"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3},
            "load_best_model_at_end=True would end with the weights of some earlier time",
        ),
    ],
)
def test_wrong_uses_are_explained(options, message, tmp_path):
    if options.get("callback"):
        options = {"callback": PruningCallback(pruner_for(mlp(), pictures()))}
    trainer, _ = trainer_of("conv", tmp_path, **options)
    with pytest.raises(wf.WoodfisherError, match=message):
        trainer.train()


def test_a_callback_that_can_make_no_pruner_is_explained(tmp_path):
    with pytest.raises(wf.WoodfisherError, match="a function that makes one; None came"):
        PruningCallback(None)
    trainer, _ = trainer_of("conv", tmp_path, callback=PruningCallback(lambda model: "pruner"))
    with pytest.raises(wf.WoodfisherError, match="must return the Pruner that it makes; 'pruner' came"):
        trainer.train()


@pytest.fixture(params=["prune", "trainer"])
def pruned_bert(request, tmp_path):
    """A BERT and the masks that `prune` or the Trainer's callback left on it."""
    if request.param == "prune":
        model = bert().eval()
        curvature = wf.DiagonalFisher(samples=8)
        report = wf.prune(model, [sentences()], sparsity=0.8, criterion="obd", curvature=curvature, stages=1)
        return model, report.masks
    trainer, callback = trainer_of("bert", tmp_path / "run", save_strategy="no")
    trainer.train()
    return trainer.model.eval(), callback.pruner.masks


def test_pruned_models_survive_save_pretrained_and_files(pruned_bert, tmp_path):
    model, masks = pruned_bert
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(
        0.8 * sum(m.numel() for m in masks.values())
    )
    model.save_pretrained(tmp_path / "pretrained")
    reloaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "pretrained").eval()
    wf.save_weights(model, tmp_path / "compressed.safetensors", masks)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    compressed, plain = bert(seed=1).eval(), bert(seed=2).eval()
    compressed.load_state_dict(wf.load_weights(tmp_path / "compressed.safetensors"))
    plain.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    kept = wf.Objective(model, [sentences()]).kept
    assert int(kept.sum()) == sum(int(mask.sum()) for mask in masks.values())
    batch = sentences()
    for other in (reloaded, compressed, plain):
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
        for name, mask in masks.items():
            assert not other.get_parameter(name)[~mask].any()
        assert torch.equal(wf.Objective(other, [batch]).kept, kept)
        assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_onnx_of_a_pruned_bert(tmp_path):
    pytest.importorskip("onnxruntime")
    model = bert().eval()
    wf.prune(model, [], sparsity=0.8, criterion="magnitude")
    inputs = {name: value for name, value in sentences().items() if name != "labels"}
    wf.export.to_onnx(model, inputs, tmp_path / "bert.onnx")
    one = {name: value[:1] for name, value in inputs.items()}
    logits = wf.export.OnnxModel(tmp_path / "bert.onnx")(one)
    assert wf.export.difference(logits, [model(**one).logits]) < 1e-5


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config).eval()


BERT_ATTENTION = ["*.query.weight", "*.key.weight", "*.value.weight", "*.attention.output.dense.weight"]
GPT2_ATTENTION = ["*.attn.c_attn.weight", "*.attn.c_proj.weight"]


@pytest.mark.parametrize(
    ("make", "params"), [(bert, BERT_ATTENTION), (gpt2, GPT2_ATTENTION)], ids=["bert", "gpt2"]
)
def test_heads_by_the_params_that_the_docs_give(make, params):
    assert str(params).replace("'", '"') in (ROOT / "docs" / "hugging-face.md").read_text(encoding="utf-8")
    model = make()
    report = wf.prune(model, None, sparsity=0.5, criterion="magnitude", pattern=wf.Heads(2), params=params)
    assert report.sparsity == 0.5
    for name, mask in report.masks.items():
        if name.endswith(("output.dense.weight", "query.weight")):
            heads = mask.mT.reshape(2, -1) if "output" in name else mask.reshape(2, -1)
        elif name.endswith("c_proj.weight"):  # inputs come first
            heads = mask.reshape(2, -1)
        else:
            continue
        assert torch.equal(heads.all(1), heads.any(1))


def test_models_that_return_a_cache_are_traced_without(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("torch_pruning")
    model, inputs = gpt2(), {"input_ids": sentences()["input_ids"]}
    wf.export.to_onnx(model, inputs, tmp_path / "gpt2.onnx")
    logits = wf.export.OnnxModel(tmp_path / "gpt2.onnx")(inputs)
    assert wf.export.difference(logits, [model(**inputs).logits]) < 1e-5
    assert model.config.use_cache
    with pytest.raises(wf.WoodfisherError, match="no channel of the model can be cut out"):
        wf.Channels.of(model, inputs)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "woodfisher.integrations.hf")
    with pytest.raises(wf.WoodfisherError, match=r"pip install 'woodfisher\[hf\]'"):
        importlib.import_module("woodfisher.integrations.hf")
