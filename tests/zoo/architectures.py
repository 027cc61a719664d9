"""Families of Hugging Face beside the zoo's, each as small as it can be: what users bring that nobody had in mind."""

from typing import Any

import torch
import transformers

from tests.zoo.entry import Entry, tokens
from tests.zoo.text import LossInside

VOCABULARY = 64
LENGTH = 16
CLASSES = 4
IMAGE = 32

_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
_DECODER = _TEXT | {"num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
_NO_DROPOUT = (
    "dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "hidden_dropout_prob", "embd_pdrop",
    "attention_probs_dropout_prob", "resid_pdrop", "attn_pdrop", "seq_classif_dropout", "classifier_dropout",
    "attn_dropout", "attention_dropout_prob", "drop_path_rate", "classifier_dropout_prob", "qa_dropout",
    "feat_proj_dropout", "final_dropout", "layerdrop", "encoder_layerdrop", "decoder_layerdrop", "embedding_dropout",
    "mlp_dropout", "path_dropout", "positional_dropout", "ff_dropout", "head_dropout", "dropout_rate",
)  # fmt: skip


def _model(name: str, config: str, rate: float, options: dict[str, Any]) -> Any:
    made = getattr(transformers, config)(**options)
    for key in _NO_DROPOUT:
        if isinstance(getattr(made, key, None), float):
            setattr(made, key, rate)
    return getattr(transformers, name)(made)


class Contrastive(LossInside):
    """Each image against the texts of all others in the batch, so that a part of it has another loss."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(**batch, return_loss=True).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch, return_loss=True).loss)


def _clip(dropout: float) -> Contrastive:
    options = {"projection_dim": 16, "text_config": _TEXT | {"projection_dim": 16}}
    return Contrastive(
        _model("CLIPModel", "CLIPConfig", dropout, options | {"vision_config": _VIT | {"projection_dim": 16}})
    )


def _entry(name: str, model: str, config: str, sample: Any, has_batch_norm: bool = False, **options: Any) -> Entry:
    def make(dropout: float) -> LossInside:
        return LossInside(_model(model, config, dropout, options))

    return Entry(name, make, sample, has_batch_norm=has_batch_norm)


def _causal(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = tokens(generator, LENGTH, VOCABULARY)
    return {"input_ids": ids, "labels": ids}


def _masked(generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = tokens(generator, LENGTH, VOCABULARY)
    mask = torch.ones(LENGTH, dtype=torch.long)
    mask[LENGTH - int(torch.randint(0, 5, (), generator=generator)) :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), torch.tensor(-100))}


def _classified(generator: torch.Generator) -> dict[str, torch.Tensor]:
    labels = torch.randint(0, CLASSES, (), generator=generator)
    return {"input_ids": tokens(generator, LENGTH, VOCABULARY), "labels": labels}


def _translated(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(generator, LENGTH, VOCABULARY), "labels": tokens(generator, 8, VOCABULARY)}


def _image(generator: torch.Generator) -> dict[str, torch.Tensor]:
    pixels = torch.randn(3, IMAGE, IMAGE, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, CLASSES, (), generator=generator)}


def _segmented(generator: torch.Generator) -> dict[str, torch.Tensor]:
    pixels = torch.randn(3, 64, 64, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, CLASSES, (64, 64), generator=generator)}


def _spoken(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(800, generator=generator), "labels": tokens(generator, 4, 32, low=1)}


def _heard(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(8, 40, generator=generator), "labels": tokens(generator, 8, VOCABULARY)}


def _captioned(generator: torch.Generator) -> dict[str, Any]:
    return {
        "input_ids": tokens(generator, LENGTH, VOCABULARY),
        "pixel_values": torch.randn(3, IMAGE, IMAGE, generator=generator),
    }  # fmt: skip


def _series(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "past_values": torch.randn(32, 3, generator=generator),
        "future_values": torch.randn(8, 3, generator=generator),
    }


_IMAGE = {"image_size": IMAGE, "num_labels": CLASSES, "num_channels": 3}
_VIT = _IMAGE | {
    "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
_STAGES = {"depths": [1, 2, 1], "hidden_sizes": [16, 32, 48], "num_labels": CLASSES}
_TWO_SIDES = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1, "use_cache": False,
    "forced_eos_token_id": None,
}  # fmt: skip
_WAVES = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
    "apply_spec_augment": False, "pad_token_id": 0, "ctc_zero_infinity": True, "ctc_loss_reduction": "mean",
}  # fmt: skip
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}

_LIST = [
    _entry("mistral", "MistralForCausalLM", "MistralConfig", _causal, sliding_window=8, **_DECODER),
    _entry("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _masked, tie_word_embeddings=True, **_DECODER),
    _entry("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _causal, **_DECODER),
    _entry("gemma2", "Gemma2ForCausalLM", "Gemma2Config", _causal, sliding_window=8, **_DECODER),
    _entry("phi3", "Phi3ForCausalLM", "Phi3Config", _causal, **_DECODER),
    _entry("olmo2", "Olmo2ForCausalLM", "Olmo2Config", _causal, **_DECODER),
    _entry("cohere", "CohereForCausalLM", "CohereConfig", _causal, **_DECODER),
    _entry("stablelm", "StableLmForCausalLM", "StableLmConfig", _causal, **_DECODER),
    _entry("mixtral", "MixtralForCausalLM", "MixtralConfig", _causal, **_DECODER, **_MOE),
    _entry(
        "qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _causal, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, **_DECODER,
    ),
    _entry("gpt_oss", "GptOssForCausalLM", "GptOssConfig", _causal, sliding_window=8, **_DECODER, **_MOE),
    _entry("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _causal, **_TEXT, use_cache=False),
    _entry(
        "opt", "OPTForCausalLM", "OPTConfig", _masked, ffn_dim=64, word_embed_proj_dim=32, use_cache=False, **_TEXT
    ),
    _entry(
        "bloom", "BloomForCausalLM", "BloomConfig", _masked, vocab_size=VOCABULARY, hidden_size=32, n_layer=3,
        n_head=4, use_cache=False,
    ),
    _entry("falcon", "FalconForCausalLM", "FalconConfig", _causal, **_TEXT, use_cache=False),
    _entry(
        "mpt", "MptForCausalLM", "MptConfig", _causal, d_model=32, n_heads=4, n_layers=3, vocab_size=VOCABULARY,
        max_seq_len=32, expansion_ratio=2, use_cache=False,
    ),
    _entry(
        "gptj", "GPTJForCausalLM", "GPTJConfig", _causal, vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=3,
        n_head=4, rotary_dim=4, use_cache=False, bos_token_id=0, eos_token_id=1,
    ),
    _entry(
        "gpt_bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", _causal, vocab_size=VOCABULARY, n_positions=32,
        n_embd=32, n_layer=3, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=1,
    ),
    _entry(
        "mamba2", "Mamba2ForCausalLM", "Mamba2Config", _causal, vocab_size=VOCABULARY, hidden_size=32,
        num_hidden_layers=3, num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=8, use_cache=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=0,
    ),
    _entry(
        "distilbert", "DistilBertForSequenceClassification", "DistilBertConfig", _classified, vocab_size=VOCABULARY,
        dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=32, num_labels=CLASSES, pad_token_id=0,
    ),
    _entry("roberta", "RobertaForMaskedLM", "RobertaConfig", _masked, **_TEXT),
    _entry(
        "electra", "ElectraForSequenceClassification", "ElectraConfig", _classified, embedding_size=16,
        num_labels=CLASSES, **_TEXT,
    ),
    _entry("albert", "AlbertForMaskedLM", "AlbertConfig", _masked, embedding_size=16, **_TEXT),
    _entry(
        "deberta", "DebertaV2ForSequenceClassification", "DebertaV2Config", _classified, num_labels=CLASSES,
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm",
        share_att_key=True, **_TEXT,
    ),
    _entry(
        "modernbert", "ModernBertForMaskedLM", "ModernBertConfig", _masked, local_attention=8, cls_token_id=1,
        sep_token_id=1, global_attn_every_n_layers=2, **_TEXT,
    ),
    _entry("bart", "BartForConditionalGeneration", "BartConfig", _translated, **_TWO_SIDES),
    _entry("marian", "MarianMTModel", "MarianConfig", _translated, **_TWO_SIDES),
    _entry(
        "whisper", "WhisperForConditionalGeneration", "WhisperConfig", _heard, num_mel_bins=8,
        max_source_positions=20, max_target_positions=32, suppress_tokens=None, begin_suppress_tokens=None,
        **_TWO_SIDES,
    ),
    _entry("convnext", "ConvNextForImageClassification", "ConvNextConfig", _image, num_stages=3, **_STAGES),
    _entry(
        "resnet", "ResNetForImageClassification", "ResNetConfig", _image, has_batch_norm=True, embedding_size=16,
        layer_type="basic", **_STAGES,
    ),
    _entry(
        "swin", "SwinForImageClassification", "SwinConfig", _image, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
        window_size=4, patch_size=4, **_IMAGE,
    ),
    _entry(
        "segformer", "SegformerForSemanticSegmentation", "SegformerConfig", _segmented, has_batch_norm=True,
        depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 32, 32], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32,
        num_labels=CLASSES,
    ),
    _entry("dinov2", "Dinov2ForImageClassification", "Dinov2Config", _image, **_VIT),
    _entry("beit", "BeitForImageClassification", "BeitConfig", _image, use_mask_token=False, **_VIT),
    _entry(
        "mobilenet_v2", "MobileNetV2ForImageClassification", "MobileNetV2Config", _image, has_batch_norm=True,
        depth_multiplier=0.25, **_IMAGE,
    ),
    _entry("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", _spoken, **_WAVES),
    _entry("hubert", "HubertForCTC", "HubertConfig", _spoken, **_WAVES),
    Entry("clip", _clip, _captioned, has_batch_norm=True),
    _entry(
        "patchtst", "PatchTSTForPrediction", "PatchTSTConfig", _series, has_batch_norm=True, num_input_channels=3,
        context_length=32, prediction_length=8, patch_length=8, patch_stride=8, d_model=32, num_hidden_layers=3,
        num_attention_heads=4, ffn_dim=64,
    ),
]  # fmt: skip

ARCHITECTURES: dict[str, Entry] = {entry.name: entry for entry in _LIST}

IN_SINGLE_PRECISION = ("mixtral", "qwen3_moe", "gpt_oss")
"""torch has no grouped products of doubles."""
