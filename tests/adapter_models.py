"""Tiny models for the tests of adapters: one of every kind of tower that adapters know."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import open_clip
import torch
import transformers
from open_clip.hf_model import HFTextEncoder
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from timm.models.vitamin import GeGluMlp
from torch import nn

from tracer.adapters import add_adapters

DIM = 16
VISION = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
NORMS = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
TINY_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": DIM}
SWIN = {
    "img_size": 32,
    "embed_dim": 16,
    "depths": (2, 1),
    "num_heads": (1, 2),
    "window_size": 4,
    "drop_path_rate": 0,
}

# What each tower stands for. Whole open_clip models first, by config …
CONFIGS = {
    "openai": {"quick_gelu": True},  # fused projections that never call their linear layer, pre-norm
    "layer_scale": {"vision_cfg": VISION | {"ls_init_value": 0.5}, "text_cfg": TEXT | {"ls_init_value": 0.5}},
    "norm_after": {"vision_cfg": VISION | NORMS, "text_cfg": TEXT | NORMS},  # open_clip's own attention
    "siglip": {  # CustomTextCLIP, timm's ViT with layer scale and an attention head, text without causal mask
        "vision_cfg": {
            "timm_model_name": "test_vit3",
            "image_size": 32,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
        "custom_text": True,
        "embed_dim": 96,
    },
    "coca": {
        "multimodal_cfg": {"width": 16, "context_length": 8, "heads": 2, "layers": 1, "attn_pooler_heads": 2},
        "vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
        "custom_text": True,
    },
}
# … then one image tower each, in a model that is otherwise "openai".
TRUNKS = {
    "timm_no_bias": lambda: VisionTransformer(**TINY_VIT, qkv_bias=False, proj_bias=False),
    "timm_post_norm": lambda: VisionTransformer(**TINY_VIT, block_fn=ResPostBlock, init_values=0.5),
    "eva_separate": lambda: Eva(
        **TINY_VIT, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, init_values=0.5
    ),
    "eva_post_norm": lambda: Eva(**TINY_VIT, use_post_norm=True, scale_attn_inner=True),
    "swin": lambda: SwinTransformer(**SWIN, num_classes=DIM),  # a width for each stage
    "swin_v2": lambda: SwinTransformerV2(**SWIN, num_classes=DIM),
    "vitamin": lambda: VisionTransformer(**TINY_VIT, mlp_layer=GeGluMlp),
}
# … and Hugging Face's text towers, in a model that is otherwise "siglip".
HF = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
      "intermediate_size": 32, "max_position_embeddings": 16,
      "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
T5 = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
M2M = {"vocab_size": 64, "d_model": 16, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
       "encoder_layerdrop": 0.0, **{f"{side}_{name}": n for side in ("encoder", "decoder")
       for name, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))}}  # fmt: skip
TEXTS = {
    "bert": lambda: transformers.BertConfig(**HF),
    "xlm_roberta": lambda: transformers.XLMRobertaConfig(**HF),
    "mt5": lambda: transformers.MT5Config(**T5),
    "nllb": lambda: transformers.M2M100Config(**M2M),
}
KINDS = [*CONFIGS, *TRUNKS, *TEXTS]
LAYERS = {"siglip": 9 + 1, "swin": 3 + 1, "swin_v2": 3 + 1} | dict.fromkeys(TEXTS, 9 + 2)  # the others: 2 + 1


def _register() -> None:
    """Make open_clip know the configs; it reads the files at once."""
    with tempfile.TemporaryDirectory() as folder:
        for name, config in CONFIGS.items():
            whole = {"embed_dim": DIM, "vision_cfg": VISION, "text_cfg": TEXT} | config
            Path(folder, f"adapters_{name}.json").write_text(json.dumps(whole))
        open_clip.add_model_config(folder)


_register()


def build(kind: str = "openai") -> nn.Module:
    """A tiny model whose every tensor, biases and gains too, is large enough to matter."""
    torch.manual_seed(0)
    name = kind if kind in CONFIGS else "siglip" if kind in TEXTS else "openai"
    model = open_clip.create_model(f"adapters_{name}", nonscalar_logit_scale=True)
    if kind in TRUNKS:
        model.visual = TRUNKS[kind]()
        model.visual.image_size = (SWIN if "swin" in kind else TINY_VIT)["img_size"]
    if kind in TEXTS:
        text = HFTextEncoder("", 96, TEXTS[kind](), pooler_type="mean_pooler", proj_type="linear")
        if text.config.is_encoder_decoder:  # as open_clip does for one that it loads by name
            text.transformer = text.transformer.encoder
        model.text = text
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter.abs() >= 10] = 0.0  # CoCa's decoder has a projection that nothing initialises
            parameter[parameter.isnan()] = 0.0
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs(model: nn.Module, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and token sequences, the largest token last in each."""
    generator = torch.Generator().manual_seed(1)
    trunk = getattr(model.visual, "trunk", None)
    size = trunk.patch_embed.img_size if trunk else model.visual.image_size
    size = size[0] if isinstance(size, tuple) else size
    length = model.context_length - (getattr(getattr(model, "text", None), "cls_emb", None) is not None)
    tokens = torch.randint(1, 62, (n, length), generator=generator)
    tokens[:, -1] = 63
    return torch.randn(n, 3, size, size, generator=generator), tokens


def features(model: nn.Module, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    image, text = inputs(model, n)
    return model.encode_image(image, normalize=True), model.encode_text(text, normalize=True)


def randomise(model: nn.Module, std: float = 0.1) -> None:
    """Give every adapter a W of about ``std`` · its width's root in effect."""
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_(std=std)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".adapter." in name}


def adapted(kind: str = "openai", **options) -> nn.Module:
    model = build(kind)
    add_adapters(model, **options)
    return model
