import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memopt import ChunkedLoss
from lightning_memopt.techniques import chunked_loss
from lightning_memopt.techniques.lazy_logits import LogitsNotFormedError
from tests.parity import assert_parity, train
from tests.zoo import ZOO, slow_where

WITH_HEAD = ("gpt2", "llama", "t5", "mamba", "captioner")
NAMED_HEAD = {"lstm": "head", "encoder": "head", "shared_block": "outlet"}
# In float64, where a wrong gradient still shows but AdamW does not blow up rounding: the bias of attention keys has
# no gradient but rounding errors, and AdamW makes full steps of them.
DOUBLE = {"precision": "64-true", "rtol": 1e-6, "atol": 1e-6}
WITHOUT = [name for name in ZOO if name not in WITH_HEAD]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Chunks of 16 tokens at the zoo's width of 32, so that each loss takes many."""
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 1)


@pytest.mark.parametrize("name", slow_where(WITH_HEAD))
def test_models_with_a_language_model_head_train_the_same_wherever_their_loss_is(name):
    assert_parity(ZOO[name], [ChunkedLoss()], **DOUBLE)


@pytest.mark.parametrize("name", WITHOUT)
def test_modules_without_one_are_refused_by_name_with_the_remedy(name):
    module = ZOO[name].build()
    with pytest.raises(MisconfigurationException, match=rf"{type(module).__name__}.*chunked_cross_entropy"):
        train(module, ZOO[name].loader(), callbacks=[ChunkedLoss()])


@pytest.mark.parametrize("name", NAMED_HEAD)
def test_any_final_linear_layer_can_be_named(name):
    assert_parity(ZOO[name], [ChunkedLoss(head=NAMED_HEAD[name])], **DOUBLE)


class _LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_as_large_as_the_logits_is_made_in_forward_or_backward():
    entry, vocabulary = ZOO["gpt2"], 1000
    module = entry.build()
    module.model.resize_token_embeddings(vocabulary)
    module.model.tie_weights()
    batch = entry.batch(batch_size=32)
    tokens = batch["labels"].numel()
    sizes = {}
    for name, callbacks in (("plain", []), ("chunked", [ChunkedLoss()])):
        with _LargestTensor() as largest:
            train(copy.deepcopy(module), entry.loader(1, 32), steps=1, callbacks=callbacks)
        sizes[name] = largest.numel
    assert sizes["plain"] >= tokens * vocabulary
    assert sizes["chunked"] < tokens * vocabulary / 4


class _UsesLogits(type(ZOO["gpt2"].build())):
    def training_step(self, batch, batch_idx):
        output = self.model(**batch)
        self.log("accuracy", (output.logits.argmax(-1) == batch["labels"]).float().mean())
        return output.loss


def test_a_step_that_uses_the_logits_for_more_than_the_loss_is_told_so_in_the_first_step():
    entry = ZOO["gpt2"]
    module = _UsesLogits(entry.build().model)
    weights = {name: weight.clone() for name, weight in module.state_dict().items()}
    with pytest.raises(LogitsNotFormedError, match=r"model\.lm_head were used by argmax.*validation_step"):
        train(module, entry.loader(), callbacks=[ChunkedLoss()])
    assert all(torch.equal(weights[name], weight) for name, weight in module.state_dict().items())
    assert "forward" not in vars(module.model.lm_head)


def test_the_head_is_as_the_user_wrote_it_after_fit():
    entry = ZOO["gpt2"]
    module = entry.build()
    train(module, entry.loader(2), steps=2, callbacks=[ChunkedLoss()])
    assert "forward" not in vars(module.model.lm_head)
    assert module.model(**entry.batch()).logits.shape == (8, 16, 64)


class _ValidatesOnLogits(type(ZOO["gpt2"].build())):
    def validation_step(self, batch, batch_idx):
        self.shape = self.model(**batch).logits.shape


def test_validation_forms_logits_as_always():
    entry = ZOO["gpt2"]
    module = _ValidatesOnLogits(entry.build().model)
    callback = ChunkedLoss()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=2,
        enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, entry.loader(2), entry.loader(1))
    assert module.shape == (8, 16, 64)


@pytest.mark.parametrize("head", ["", 3])
def test_a_head_that_is_no_name_is_refused_at_once(head):
    with pytest.raises(MisconfigurationException, match="does not name a layer"):
        ChunkedLoss(head=head)


@pytest.mark.parametrize(
    ("head", "message"), [("model.lm_haed", r"no such submodule.*model\.lm_head"), ("model", "is a GPT2LMHeadModel")]
)
def test_a_head_that_is_not_there_or_not_linear_is_refused_before_the_first_step(head, message):
    with pytest.raises(MisconfigurationException, match=message):
        train(ZOO["gpt2"].build(), ZOO["gpt2"].loader(), callbacks=[ChunkedLoss(head=head)])


def test_two_of_them_on_one_head_are_refused_and_leave_nothing_behind():
    module = ZOO["gpt2"].build()
    with pytest.raises(MisconfigurationException, match=r"model\.lm_head is already replaced"):
        train(module, ZOO["gpt2"].loader(), callbacks=[ChunkedLoss(), ChunkedLoss()])
    assert "forward" not in vars(module.model.lm_head)


class _SoftCapped(type(ZOO["lstm"].build())):
    def training_step(self, batch, batch_idx):
        ids = batch["tokens"]
        logits = self.head(self.lstm(self.embed(ids[:, :-1]))[0])
        logits = torch.tanh(logits / 2.0) * 2.0
        return F.cross_entropy(logits.permute(0, 2, 1), ids[:, 1:], label_smoothing=0.1)


def test_soft_caps_label_smoothing_and_classes_in_the_second_dimension_train_the_same():
    assert_parity(replace(ZOO["lstm"], make=_SoftCapped), [ChunkedLoss(head="head")], **DOUBLE)


def test_a_head_that_is_a_subclass_of_linear_is_refused_by_name():
    class Lora(nn.Linear):
        pass

    module = ZOO["gpt2"].build()
    module.model.lm_head = Lora(32, 64, bias=False)
    with pytest.raises(MisconfigurationException, match=r"model\.lm_head is a Lora"):
        train(module, ZOO["gpt2"].loader(), callbacks=[ChunkedLoss()])
