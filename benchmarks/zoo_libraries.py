"""Models and layers of libraries from the package index, for `capture_zoo.py --libraries`.

What is not installed is left out. Install with `pip install --no-deps`, beside PyTorch for the CPU;
of what is in `ABSENT` nothing is needed but the name.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import zoo_models
from capture_zoo import Case
from torch import Tensor, nn

Made = tuple[nn.Module, Callable[[nn.Module], Any]]
# Library -> what to import of it, and its cases: (name, what makes the model and calls it).
Cases = dict[str, Callable[[], Made]]
LIBRARIES: dict[str, Callable[[Any], Cases]] = {}


def library(module: str) -> Callable[[Callable[[Any], Cases]], Callable[[Any], Cases]]:
    """Add the cases of a library, which is imported by this name."""

    def add(cases: Callable[[Any], Cases]) -> Callable[[Any], Cases]:
        LIBRARIES[module] = cases
        return cases

    return add


# What libraries import and no case computes anything with: for these an empty stand-in will do.
ABSENT = (
    "torchvision",
    "torchaudio",
    "datasets",
    "numba",
    "pyfaidx",
    "faiss",
    "polars",
    "labml",
    "torchao",
    "omegaconf",
)


class _Absent(Loader, MetaPathFinder):
    """Finds what is not installed."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Name(str):
    """A member of an enumeration, or a function that returns what it is given."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        return given[0] if given else self


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Name(name)


class _Empty(ModuleType):
    __version__ = "2.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        own = {"__init__": lambda self, *_, **__: nn.Module.__init__(self),
               "forward": lambda self, given=None, *_, **__: given}  # fmt: skip
        return _Anything(name, (nn.Module,), own)


def names() -> list[str]:
    """The cases of the libraries that are installed."""
    _stand_in()
    return [
        f"{module}: {case}"
        for module, cases in LIBRARIES.items()
        if importlib.util.find_spec(module.split(".")[0]) is not None
        for case in _listed(module, cases)
    ]


def _listed(module: str, cases: Callable[[Any], Cases]) -> list[str]:
    return list(cases(_Later(module)))


class _Later:
    """A module that is imported when something of it is asked for within a case."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(importlib.import_module(self._name), name)
        except AttributeError:
            return importlib.import_module(f"{self._name}.{name}")


def _stand_in() -> None:
    sys.meta_path.append(_Absent())  # The last one: what is installed is found before.


def load(name: str) -> None:
    """Import the library of a case, so that no fork of this process has to."""
    module = name.partition(": ")[0]
    if module not in sys.modules:
        with suppress(Exception):  # The case itself will say why.
            importlib.import_module(module)


def find(name: str) -> Case:
    """A case by its name."""
    module, _, case = name.partition(": ")
    make = LIBRARIES[module](_Later(module))[case]

    def build(implementation: str) -> nn.Module:
        torch.manual_seed(0)
        model, _ = make()
        model.eval()
        zoo_models.strengthen(model)
        return model

    try:
        with torch.no_grad():
            model, call = make()
            call(model.eval())
    except Exception as error:
        raise LookupError(f"{type(error).__name__}: {error}"[:400]) from error
    return Case(name, build, call)


class Of(nn.Module):
    """Layers that are called in a way of their own, as a model."""

    def __init__(self, forward: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.own = nn.ModuleList(parts), forward

    def forward(self, *given: Any) -> Any:
        """Call the function with the layers and what is given."""
        return self.own(*self.parts, *given)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    """Random numbers, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(length: int = 12, most: int = 100) -> Tensor:
    """(2, length) random tokens."""
    return torch.randint(1, most, (2, length), generator=torch.Generator().manual_seed(1))


def real(length: int = 12) -> Tensor:
    """(2, length), True for what is no padding."""
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, -3:] = False
    return mask


IMAGES = (2, 3, 32, 32)
on = lambda *given, **named: lambda model: model(*given, **named)  # noqa: E731


@library("x_transformers")
def x_transformers(lib: Any) -> Cases:
    """Options of x-transformers."""

    def model(kind: str = "Decoder", options: dict[str, Any] | None = None, **more: Any) -> Made:
        layers = getattr(lib, kind)(dim=32, depth=2, heads=4, attn_dim_head=8, **(options or {}))
        made = lib.TransformerWrapper(num_tokens=100, max_seq_len=32, attn_layers=layers, **more)
        return made, on(words(), mask=real())

    options: dict[str, dict[str, Any]] = {
        "plain": {}, "rotary": {"rotary_pos_emb": True}, "ALiBi": {"alibi_pos_bias": True},
        "relative bias": {"rel_pos_bias": True}, "dynamic bias": {"dynamic_pos_bias": True},
        "one kv head": {"attn_one_kv_head": True}, "grouped": {"attn_kv_heads": 2},
        "flash": {"attn_flash": True}, "flash, grouped": {"attn_flash": True, "attn_kv_heads": 2},
        "memory keys": {"attn_num_mem_kv": 3}, "qk norm": {"attn_qk_norm": True},
        "talking heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
        "top k": {"attn_sparse_topk": 4}, "softclamp": {"attn_softclamp_logits": True},
        "gate values": {"attn_gate_values": True}, "on attention": {"attn_on_attn": True},
        "sandwich": {"sandwich_coef": 1}, "macaron": {"macaron": True},
        "value residual": {"add_value_residual": True}, "sigmoid": {"attn_sigmoid": True},
        "head scale": {"attn_head_scale": True}, "shift tokens": {"shift_tokens": 1},
        "selective": {"attn_selective": True}, "xpos": {"rotary_xpos": True},
        "data dependent ALiBi": {"attn_data_dependent_alibi": True},
        "forgetting, flash": {"attn_data_dependent_alibi": True, "attn_flash": True},
        "l2 distance": {"attn_l2_distance": True},
        "cog signed": {"attn_cog_signed": True}, "laser": {"attn_laser": True},
        "sinks": {"attn_head_learned_sink": True}, "contextual": {"attn_add_zero_kv": True},
    }  # fmt: skip
    cases: Cases = {}
    for name, given in options.items():
        cases[f"decoder, {name}"] = lambda given=given: model("Decoder", given)  # type: ignore[misc]
    cases["encoder"] = lambda: model("Encoder")
    cases["encoder, flash"] = lambda: model("Encoder", {"attn_flash": True})
    cases["encoder, memory tokens"] = lambda: model("Encoder", num_memory_tokens=2)
    cases["cross attention"] = lambda: (
        lib.TransformerWrapper(num_tokens=100, max_seq_len=32, attn_layers=lib.Decoder(
            dim=32, depth=2, heads=4, attn_dim_head=8, cross_attend=True)),
        on(words(7), context=drawn(2, 12, 32), context_mask=real()),
    )  # fmt: skip
    cases["encoder and decoder"] = lambda: (
        lib.XTransformer(
            dim=32, enc_num_tokens=100, enc_depth=1, enc_heads=4, enc_max_seq_len=32,
            dec_num_tokens=100, dec_depth=1, dec_heads=4, dec_max_seq_len=32,
        ), on(words(), words(7), mask=real()),
    )  # fmt: skip
    cases["images"] = lambda: (
        lib.ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5,
                                 attn_layers=lib.Encoder(dim=32, depth=2, heads=4)),
        on(drawn(*IMAGES)),
    )  # fmt: skip
    return cases


@library("vit_pytorch")
def vit_pytorch(lib: Any) -> Cases:
    """The zoo of vit-pytorch."""
    plain = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2,
             "heads": 4, "mlp_dim": 48}  # fmt: skip

    def of(module: str, kind: str, size: int = 32, **given: Any) -> Callable[[], Made]:
        def make() -> Made:
            found = getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)
            return found(**given), on(drawn(2, 3, size, size))

        return make

    return {
        "ViT": of("vit", "ViT", **plain, dim_head=8),
        "ViT, one head": of("vit", "ViT", **plain | {"heads": 1}, dim_head=8),
        "SimpleViT": of("simple_vit", "SimpleViT", **plain),
        "SimpleViT, flash": of("simple_flash_attn_vit", "SimpleViT", **plain),
        "SimpleViT, registers": of("simple_vit_with_register_tokens", "SimpleViT", **plain),
        "SimpleViT, qk norm": of("simple_vit_with_qk_norm", "SimpleViT", **plain),
        "DeepViT": of("deepvit", "DeepViT", **plain),
        "CaiT": of("cait", "CaiT", **plain, cls_depth=1),
        "ParallelViT": of("parallel_vit", "ViT", **plain),
        "ViT, patch merger": of("vit_with_patch_merger", "ViT", **plain, patch_merge_layer=1,
                                patch_merge_num_tokens=4),
        "ViT, small data": of("vit_for_small_dataset", "ViT", **plain),
        "ViT, patch dropout": of("vit_with_patch_dropout", "ViT", **plain, patch_dropout=0.0),
        "T2TViT": of("t2t", "T2TViT", image_size=32, dim=32, depth=2, heads=4, mlp_dim=48,
                     num_classes=5, t2t_layers=((3, 2), (3, 2))),
        "PiT": of("pit", "PiT", image_size=32, patch_size=8, dim=32, num_classes=5, depth=(1, 1),
                  heads=4, mlp_dim=48),
        "LeViT": of("levit", "LeViT", size=64, image_size=64, num_classes=5, stages=2,
                    dim=(32, 64), depth=2,
                    heads=(4, 4), mlp_mult=2),
        "CrossViT": of("cross_vit", "CrossViT", image_size=32, num_classes=5, sm_dim=32, lg_dim=32,
                       sm_patch_size=8, lg_patch_size=16, depth=1, sm_enc_depth=1, lg_enc_depth=1,
                       sm_enc_heads=4, lg_enc_heads=4, sm_enc_mlp_dim=48, lg_enc_mlp_dim=48,
                       cross_attn_depth=1, cross_attn_heads=4),
        "CvT": of("cvt", "CvT", num_classes=5, s1_emb_dim=32, s2_emb_dim=32, s3_emb_dim=32,
                  s1_heads=1, s2_heads=2, s3_heads=4, s1_depth=1, s2_depth=1, s3_depth=1),
        "TwinsSVT": of("twins_svt", "TwinsSVT", num_classes=5, s1_emb_dim=32, s2_emb_dim=32,
                       s3_emb_dim=32, s4_emb_dim=32, s1_depth=1, s2_depth=1, s3_depth=1, s4_depth=1,
                       s1_local_patch_size=4, s2_local_patch_size=4, s3_local_patch_size=2,
                       s4_local_patch_size=1, s1_global_k=2, s2_global_k=2, s3_global_k=2,
                       s4_global_k=1),
        "RegionViT": of("regionvit", "RegionViT", size=224, dim=(32, 32, 32, 32),
                        depth=(1, 1, 1, 1),
                        num_classes=5, window_size=7),
        "CrossFormer": of("crossformer", "CrossFormer", num_classes=5, dim=(32, 32, 32, 32),
                          depth=(1, 1, 1, 1), size=224),
        "ScalableViT": of("scalable_vit", "ScalableViT", num_classes=5, dim=32, heads=(2, 4, 4, 4),
                          depth=(1, 1, 1, 1), ssa_dim_key=(8, 8, 8, 8),
                          reduction_factor=(8, 4, 2, 1),
                          window_size=(8, 4, None, None), size=256),
        "SepViT": of("sep_vit", "SepViT", num_classes=5, dim=32, dim_head=8, heads=(1, 2, 4, 4),
                     depth=(1, 1, 1, 1), window_size=7, size=224),
        "MaxViT": of("max_vit", "MaxViT", num_classes=5, dim_conv_stem=16, dim=16, dim_head=8,
                     depth=(1, 1), window_size=4, size=64),
        "NesT": of("nest", "NesT", image_size=32, patch_size=4, dim=32, heads=4, num_hierarchies=2,
                   block_repeats=(1, 1), num_classes=5),
        "MobileViT": of("mobile_vit", "MobileViT", size=64, image_size=(64, 64), dims=[32, 48, 64],
                        channels=[16, 16, 24, 24, 32, 32, 32, 32, 32, 32, 64], num_classes=5),
        "XCiT": of("xcit", "XCiT", **plain, cls_depth=1),
        "ViViT": lambda: (
            importlib.import_module("vit_pytorch.vivit").ViViT(
                image_size=32, frames=4, image_patch_size=8, frame_patch_size=2, num_classes=5,
                dim=32, spatial_depth=1, temporal_depth=1, heads=4, mlp_dim=48),
            on(drawn(2, 3, 4, 32, 32))),
        "ViT, 3D": lambda: (
            importlib.import_module("vit_pytorch.vit_3d").ViT(
                image_size=32, frames=4, image_patch_size=8, frame_patch_size=2, num_classes=5,
                dim=32, depth=2, heads=4, mlp_dim=48), on(drawn(2, 3, 4, 32, 32))),
        "ViT, 1D": lambda: (
            importlib.import_module("vit_pytorch.vit_1d").ViT(
                seq_len=32, patch_size=4, num_classes=5, dim=32, depth=2, heads=4, mlp_dim=48),
            on(drawn(2, 3, 32))),
        "CCT": lambda: (
            importlib.import_module("vit_pytorch.cct").CCT(
                img_size=32, embedding_dim=32, n_conv_layers=1, num_layers=2, num_heads=4,
                num_classes=5), on(drawn(*IMAGES))),
        "NaViT": lambda: (
            importlib.import_module("vit_pytorch.na_vit").NaViT(**plain), on(
                [[drawn(3, 32, 32), drawn(3, 16, 32)], [drawn(3, 32, 16)]])),
    }  # fmt: skip


@library("timm")
def timm(lib: Any) -> Cases:
    """Models of timm, at a small size of images; of large ones two blocks."""

    def of(name: str, size: int, **given: Any) -> Callable[[], Made]:
        def make() -> Made:
            model = lib.create_model(name, num_classes=5, **given)
            return model, on(drawn(2, 3, size, size))

        return make

    small: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 4}
    vit = {"img_size": 32, "patch_size": 8, **small}
    plain = {
        "vit_tiny_patch16_224": vit, "deit_tiny_distilled_patch16_224": vit,
        "vit_base_patch16_clip_224": vit, "vit_base_patch32_plus_256": vit,
        "vit_relpos_small_patch16_224": vit, "vit_srelpos_small_patch16_224": vit,
        "vit_medium_patch16_gap_240": vit, "vit_small_patch14_reg4_dinov2": vit,
        "vit_base_patch16_siglip_224": vit, "beit_base_patch16_224": vit,
        "beitv2_base_patch16_224": vit, "eva02_tiny_patch14_224": vit, "cait_xxs24_224": vit,
        "xcit_nano_12_p16_224": {"img_size": 32, **small}, "convit_tiny": vit,
        "samvit_base_patch16": {"img_size": 32, "patch_size": 8, **small,
                                "global_attn_indexes": (1,), "window_size": 2},
        "vit_base_patch16_rope_224": vit, "naflexvit_base_patch16_gap": {**small, "patch_size": 8},
    }  # fmt: skip
    cases = {name: of(name, 32, **given) for name, given in plain.items()}
    of_depths: dict[str, tuple[int, dict[str, Any]]] = {
        "swin_tiny_patch4_window7_224": (64, {"img_size": 64, "window_size": 4, "depths": (1, 2)}),
        "swinv2_tiny_window8_256": (64, {"img_size": 64, "window_size": 4, "depths": (1, 2)}),
        "swin_s3_tiny_224": (224, {"depths": (1, 1, 1, 1)}),
        "twins_pcpvt_small": (64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
        "twins_svt_small": (64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
        "pvt_v2_b0": (64, {}), "pvt_v2_b2_li": (64, {"depths": (1, 1, 1, 1)}),
        "maxvit_rmlp_pico_rw_256": (64, {"img_size": 64}), "coatnet_pico_rw_224": (224, {}),
        "levit_128s": (224, {}), "crossvit_9_240": (240, {}), "pit_ti_224": (224, {}),
        "visformer_tiny": (224, {}), "volo_d1_224": (224, {}),
        "edgenext_xx_small": (64, {}), "efficientformer_l1": (224, {}),
        "efficientformerv2_s0": (224, {}), "efficientvit_m0": (224, {}),
        "efficientvit_b0": (64, {}),
        "fastvit_sa12": (64, {}), "hiera_tiny_224": (224, {"stages": (1, 1, 1, 1)}),
        "mvitv2_tiny": (224, {}), "nest_tiny": (224, {}),
        "davit_tiny": (64, {"depths": (1, 1, 1, 1)}), "gcvit_xxtiny": (224, {}),
        "mobilevit_xxs": (64, {}), "mobilevitv2_050": (64, {}), "halonet26t": (256, {}),
        "botnet26t_256": (256, {}), "lambda_resnet26t": (64, {}), "tiny_vit_5m_224": (224, {}),
        "swiftformer_xs": (224, {}), "nextvit_small": (64, {}), "coat_lite_tiny": (224, {}),
        "repghostnet_050": (64, {}), "sebotnet33ts_256": (256, {}), "vitamin_small_224": (224, {}),
        "mobilenetv4_hybrid_medium": (64, {}), "shvit_s1": (224, {}), "resnet50_clip": (224, {}),
        "skresnet18": (64, {}), "gernet_s": (64, {}), "convnext_atto": (64, {}),
        "poolformer_s12": (64, {}), "caformer_s18": (64, {}),
        "focalnet_tiny_srf": (64, {}), "inception_next_atto": (64, {}), "sequencer2d_s": (224, {}),
    }  # fmt: skip
    return cases | {name: of(name, size, **given) for name, (size, given) in of_depths.items()}


@library("diffusers")
def diffusers(lib: Any) -> Cases:
    """Blocks and small models of diffusers."""

    def attention(processor: str = "", **given: Any) -> Callable[[], Made]:
        def make() -> Made:
            module = importlib.import_module("diffusers.models.attention_processor")
            made = module.Attention(query_dim=32, heads=4, dim_head=8, **given)
            if processor:
                made.set_processor(getattr(module, processor)())
            other = (
                drawn(2, 7, given["cross_attention_dim"])
                if "cross_attention_dim" in given
                else None
            )
            return made, on(drawn(2, 12, 32), encoder_hidden_states=other)

        return make

    def unet(**given: Any) -> Made:
        model = lib.UNet2DConditionModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32,
            attention_head_dim=8, **given,
        )  # fmt: skip
        return model, on(drawn(2, 4, 16, 16), 3, encoder_hidden_states=drawn(2, 7, 32))

    def made(kind: str, config: dict[str, Any], *given: Any, **named: Any) -> Callable[[], Made]:
        return lambda: (getattr(lib, kind)(**config), on(*given, **named))

    heads = {"num_attention_heads": 4, "attention_head_dim": 8}
    moment = torch.tensor([3.0, 4.0])
    return {
        "Attention, sdpa": attention(), "Attention, by hand": attention("AttnProcessor"),
        "Attention, sliced": lambda: _sliced(attention()()),
        "Attention, cross": attention(cross_attention_dim=24),
        "Attention, cross, by hand": attention("AttnProcessor", cross_attention_dim=24),
        "Attention, qk norm": attention(qk_norm="layer_norm"),
        "UNet2DConditionModel": unet,
        "UNet2DConditionModel, linear projection": lambda: unet(use_linear_projection=True),
        "UNet2DModel": made("UNet2DModel", {"sample_size": 16, "block_out_channels": (32, 64),
            "layers_per_block": 1, "norm_num_groups": 8, "down_block_types": ("DownBlock2D",
            "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8}, drawn(2, 3, 16, 16), 3),
        "AutoencoderKL": made("AutoencoderKL", {"block_out_channels": (32,), "norm_num_groups": 8,
            "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)},
            drawn(2, 3, 16, 16)),
        "VQModel": made("VQModel", {"block_out_channels": (32,), "norm_num_groups": 8},
                        drawn(2, 3, 16, 16)),
        "AutoencoderDC": made("AutoencoderDC", {"encoder_block_out_channels": (32, 64),
            "decoder_block_out_channels": (32, 64), "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1), "attention_head_dim": 8, "latent_channels": 4,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,))},
            drawn(2, 3, 16, 16)),
        "DiTTransformer2DModel": made("DiTTransformer2DModel", {**heads, "in_channels": 4,
            "num_layers": 2, "sample_size": 8, "patch_size": 2, "norm_num_groups": 8},
            drawn(2, 4, 8, 8), timestep=torch.tensor([3, 4]), class_labels=torch.tensor([1, 2])),
        "SD3Transformer2DModel": made("SD3Transformer2DModel", {**heads, "sample_size": 8,
            "in_channels": 4, "num_layers": 2, "joint_attention_dim": 32,
            "caption_projection_dim": 32, "pooled_projection_dim": 16, "out_channels": 4},
            drawn(2, 4, 8, 8), drawn(2, 7, 32), drawn(2, 16), torch.tensor([3, 4])),
        "PixArtTransformer2DModel": made("PixArtTransformer2DModel", {**heads, "in_channels": 4,
            "out_channels": 8, "num_layers": 2, "sample_size": 8, "cross_attention_dim": 32,
            "caption_channels": 24, "use_additional_conditions": False},
            drawn(2, 4, 8, 8), drawn(2, 7, 24), torch.tensor([3, 4]),
            encoder_attention_mask=real(7)),
        "SanaTransformer2DModel": made("SanaTransformer2DModel", {**heads, "in_channels": 4,
            "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8, "cross_attention_dim": 32, "caption_channels": 24,
            "sample_size": 8, "patch_size": 1}, drawn(2, 4, 8, 8), drawn(2, 7, 24),
            torch.tensor([3, 4])),
        "FluxTransformer2DModel": made("FluxTransformer2DModel", {**heads, "in_channels": 4,
            "patch_size": 1, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32,
            "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4)}, drawn(2, 16, 4),
            drawn(2, 7, 32), drawn(2, 16), moment / 10, torch.zeros(16, 3), torch.zeros(7, 3)),
        "AuraFlowTransformer2DModel": made("AuraFlowTransformer2DModel", {**heads, "sample_size": 8,
            "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
            "joint_attention_dim": 32, "caption_projection_dim": 32, "pos_embed_max_size": 64},
            drawn(2, 4, 8, 8), drawn(2, 7, 32), moment),
        "HunyuanDiT2DModel": made("HunyuanDiT2DModel", {**heads, "in_channels": 4, "sample_size": 8,
            "patch_size": 2, "num_layers": 2, "hidden_size": 32, "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32, "pooled_projection_dim": 16, "text_len": 7,
            "text_len_t5": 7}, drawn(2, 4, 8, 8), moment, encoder_hidden_states=drawn(2, 7, 32),
            text_embedding_mask=real(7), encoder_hidden_states_t5=drawn(2, 7, 32),
            text_embedding_mask_t5=real(7), image_meta_size=drawn(2, 6), style=torch.tensor([0, 0]),
            image_rotary_emb=None),
        "CogVideoXTransformer3DModel": made("CogVideoXTransformer3DModel", {**heads,
            "in_channels": 4,
            "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 24, "num_layers": 2,
            "sample_width": 8, "sample_height": 8, "sample_frames": 5, "patch_size": 2,
            "temporal_compression_ratio": 4, "max_text_seq_length": 7}, drawn(2, 2, 4, 8, 8),
            drawn(2, 7, 24), torch.tensor([3, 4])),
        "LTXVideoTransformer3DModel": made("LTXVideoTransformer3DModel", {**heads, "in_channels": 4,
            "out_channels": 4, "num_layers": 2, "cross_attention_dim": 32, "caption_channels": 24},
            drawn(2, 16, 4), drawn(2, 7, 24), torch.tensor([3, 4]), real(7), num_frames=1, height=4,
            width=4),
        "WanTransformer3DModel": made("WanTransformer3DModel", {**heads, "in_channels": 4,
            "attention_head_dim": 12,
            "out_channels": 4, "num_layers": 2, "text_dim": 24, "freq_dim": 16, "ffn_dim": 48,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32},
            drawn(2, 4, 1, 8, 8), torch.tensor([3, 4]), drawn(2, 7, 24)),
        "UVit2DModel": made("UVit2DModel", {"hidden_size": 32, "cond_embed_dim": 16,
            "encoder_hidden_size": 24, "vocab_size": 64, "codebook_size": 60, "in_channels": 32,
            "block_out_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 36, "sample_size": 8},
            words(16, 50)[:, :16].view(2, 4, 4), drawn(2, 7, 24), drawn(2, 16), drawn(2, 5)),
        "PriorTransformer": made("PriorTransformer", {**heads, "num_layers": 2, "embedding_dim": 16,
            "num_embeddings": 5, "additional_embeddings": 4}, drawn(2, 16), 3, drawn(2, 16),
            drawn(2, 5, 16)),
        "StableAudioDiTModel": made("StableAudioDiTModel", {**heads, "sample_size": 16,
            "in_channels": 4, "num_layers": 2, "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 16, "time_proj_dim": 16, "global_states_input_dim": 16,
            "cross_attention_input_dim": 16}, drawn(2, 4, 16), moment, drawn(2, 7, 16),
            drawn(2, 1, 16), rotary_embedding=(drawn(17, 4), drawn(17, 4))),
    }  # fmt: skip


def _sliced(made: Made) -> Made:
    model: Any = made[0]
    model.set_attention_slice(2)
    return made


@library("open_clip")
def open_clip(lib: Any) -> Cases:
    """Towers of open_clip."""

    def of(kind: str, **more: Any) -> Callable[[], Made]:
        vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8,
                  **more.pop("vision", {})}  # fmt: skip
        text = {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 4, "layers": 2,
                **more.pop("text", {})}  # fmt: skip
        return lambda: (getattr(lib, kind)(embed_dim=16, vision_cfg=vision, text_cfg=text, **more),
                        on(drawn(*IMAGES), words()))  # fmt: skip

    return {
        "CLIP": of("CLIP"), "CustomTextCLIP": of("CustomTextCLIP"),
        "CLIP, attention pool": of(
            "CustomTextCLIP", vision={"attentional_pool": True, "attn_pooler_heads": 4}),
        "CLIP, no causal mask": of("CustomTextCLIP", text={"no_causal_mask": True}),
        "CoCa": of("CoCa", vision={"attentional_pool": True, "attn_pooler_heads": 4,
                   "output_tokens": True}, text={"embed_cls": True, "output_tokens": True},
                   multimodal_cfg={"context_length": 12, "vocab_size": 100, "width": 32, "heads": 4,
                                   "layers": 2}),
    }  # fmt: skip


def _lucid(module: str, kind: str, given: dict[str, Any], *call: Any, **named: Any) -> Cases:
    """A case of a library that has a module for one idea."""
    return {
        kind: lambda: (getattr(importlib.import_module(module), kind)(**given), on(*call, **named))
    }


TOKENS = {"num_tokens": 100, "dim": 32, "depth": 2, "heads": 4}


@library("performer_pytorch")
def performer(lib: Any) -> Cases:
    """Kernel attention, with some local heads."""
    given = {"num_tokens": 100, "max_seq_len": 16, "dim": 32, "depth": 1, "heads": 4, "dim_head": 8}
    return {
        "PerformerLM": lambda: (lib.PerformerLM(**given), on(words(16))),
        "PerformerLM, local heads": lambda: (
            lib.PerformerLM(**given, local_attn_heads=2, local_window_size=8), on(words(16))),
        "SelfAttention": lambda: (lib.SelfAttention(dim=32, heads=4), on(drawn(2, 12, 32))),
    }  # fmt: skip


@library("reformer_pytorch")
def reformer(lib: Any) -> Cases:
    """Attention by hashes."""
    return {
        "LSHSelfAttention": lambda: (
            lib.LSHSelfAttention(dim=32, heads=4, bucket_size=4, n_hashes=2, causal=True),
            on(drawn(2, 16, 32))),
        "LSHSelfAttention, full": lambda: (
            lib.LSHSelfAttention(dim=32, heads=4, bucket_size=4, n_hashes=2, use_full_attn=True),
            on(drawn(2, 16, 32))),
    }  # fmt: skip


@library("linformer")
def linformer(lib: Any) -> Cases:
    """Keys in fewer places."""
    return {
        "LinformerSelfAttention": lambda: (
            lib.LinformerSelfAttention(dim=32, seq_len=16, heads=4, k=8), on(drawn(2, 16, 32))),
        "one kv head": lambda: (
            lib.LinformerSelfAttention(dim=32, seq_len=16, heads=4, k=8, one_kv_head=True,
                                       share_kv=True), on(drawn(2, 16, 32))),
    }  # fmt: skip


@library("local_attention")
def local_attention(lib: Any) -> Cases:
    """Windows."""
    given = {"dim": 8, "window_size": 4, "autopad": True}

    def heads(**more: Any) -> Made:
        return lib.LocalAttention(**given, **more), on(
            *(drawn(2, 4, 16, 8, seed=i) for i in (1, 2, 3))
        )

    return {
        "causal": lambda: heads(causal=True, look_backward=1),
        "both sides": lambda: heads(look_backward=1, look_forward=1),
        "exact window": lambda: heads(causal=True, exact_windowsize=True),
        "LocalTransformer": lambda: (
            lib.LocalTransformer(num_tokens=100, dim=32, depth=2, max_seq_len=16,
                                 local_attn_window_size=4,
                                 heads=4, dim_head=8), on(words(16))),
        "LocalMHA": lambda: (lib.LocalMHA(dim=32, dim_head=8, heads=4, window_size=4, causal=True),
                             on(drawn(2, 16, 32), mask=real(16))),
    }  # fmt: skip


@library("routing_transformer")
def routing(lib: Any) -> Cases:
    """Clusters of queries and keys."""
    return _lucid("routing_transformer", "RoutingTransformerLM", {
        **TOKENS, "max_seq_len": 16, "window_size": 4, "causal": True}, words(16))  # fmt: skip


@library("linear_attention_transformer")
def linear_attention(lib: Any) -> Cases:
    """Linear attention, and local heads."""
    given = {**TOKENS, "max_seq_len": 16}
    return {
        "linear": lambda: (lib.LinearAttentionTransformerLM(**given), on(words(16))),
        "causal, local": lambda: (
            lib.LinearAttentionTransformerLM(**given, causal=True, n_local_attn_heads=2,
                                             local_attn_window_size=4), on(words(16))),
    }  # fmt: skip


@library("perceiver_pytorch")
def perceiver(lib: Any) -> Cases:
    """Latents that attend to inputs."""
    given = {"input_channels": 3, "input_axis": 2, "num_freq_bands": 2, "max_freq": 4.0, "depth": 1,
             "num_latents": 5, "latent_dim": 32, "cross_heads": 2, "latent_heads": 4,
             "cross_dim_head": 8, "latent_dim_head": 8, "num_classes": 5}  # fmt: skip
    return {
        "Perceiver": lambda: (lib.Perceiver(**given), on(drawn(2, 8, 8, 3))),
        "PerceiverIO": lambda: (
            lib.PerceiverIO(dim=16, queries_dim=16, logits_dim=5, depth=1, num_latents=5,
                            latent_dim=32, cross_heads=1, latent_heads=4, cross_dim_head=8,
                            latent_dim_head=8),
            on(drawn(2, 12, 16), queries=drawn(6, 16), mask=real())),
    }  # fmt: skip


@library("enformer_pytorch")
def enformer(lib: Any) -> Cases:
    """Relative positions on long sequences of bases."""
    return {"Enformer": lambda: (
        lib.Enformer.from_hparams(dim=48, depth=1, heads=4, num_downsamples=3, target_length=8,
                                  dim_divisible_by=4, output_heads={"human": 5}),
        on(torch.randint(0, 5, (2, 128))))}  # fmt: skip


@library("conformer")
def conformer(lib: Any) -> Cases:
    """Relative positions of Shaw, and convolutions."""
    return {"ConformerBlock": lambda: (lib.ConformerBlock(dim=32, dim_head=8, heads=4),
                                       on(drawn(2, 12, 32)))}  # fmt: skip


@library("nystrom_attention")
def nystrom(lib: Any) -> Cases:
    """Three factors in place of weights."""
    return {
        "NystromAttention": lambda: (
            lib.NystromAttention(dim=32, dim_head=8, heads=4, num_landmarks=4),
            on(drawn(2, 16, 32)),
        )
    }


@library("sinkhorn_transformer")
def sinkhorn(lib: Any) -> Cases:
    """Sorted blocks of keys."""
    return {
        "SinkhornTransformerLM": lambda: (
            lib.SinkhornTransformerLM(**TOKENS, max_seq_len=16, bucket_size=4),
            on(words(16)),
        )
    }


@library("tab_transformer_pytorch")
def tab_transformer(lib: Any) -> Cases:
    """Attention over the columns of a table."""
    given = {"categories": (4, 5, 6), "num_continuous": 2, "dim": 32, "dim_out": 1, "depth": 2,
             "heads": 4}  # fmt: skip
    call = on(torch.randint(0, 4, (2, 3)), drawn(2, 2))
    return {"TabTransformer": lambda: (lib.TabTransformer(**given), call),
            "FTTransformer": lambda: (lib.FTTransformer(**given), call)}  # fmt: skip


@library("memorizing_transformers_pytorch")
def memorizing(lib: Any) -> Cases:
    """Attention to what was remembered."""
    return {"KNNAttention": lambda: (
        importlib.import_module("memorizing_transformers_pytorch.memorizing_transformers_pytorch")
        .Attention(dim=32, heads=4, dim_head=8), on(drawn(2, 12, 32)))}  # fmt: skip


@library("invariant_point_attention")
def ipa(lib: Any) -> Cases:
    """Scores with distances of points."""
    return {"InvariantPointAttention": lambda: (
        lib.InvariantPointAttention(dim=32, heads=4, scalar_key_dim=8, scalar_value_dim=8,
                                    point_key_dim=2, point_value_dim=2),
        on(drawn(2, 8, 32), drawn(2, 8, 8, 32), rotations=torch.eye(3).expand(2, 8, 3, 3),
           translations=torch.zeros(2, 8, 3), mask=real(8)))}  # fmt: skip


@library("egnn_pytorch")
def egnn(lib: Any) -> Cases:
    """Messages, with attention to a few nodes in common."""
    return {"EGNN_Network": lambda: (
        lib.EGNN_Network(num_tokens=20, dim=32, depth=1, num_nearest_neighbors=4,
                         global_linear_attn_every=1, global_linear_attn_heads=4,
                         global_linear_attn_dim_head=8),
        on(words(12, 20), drawn(2, 12, 3)))}  # fmt: skip


@library("point_transformer_pytorch")
def point_transformer(lib: Any) -> Cases:
    """A weight for each channel."""
    given = {"dim": 16, "pos_mlp_hidden_dim": 16, "attn_mlp_hidden_mult": 2}
    call = on(drawn(2, 12, 16), drawn(2, 12, 3), mask=real())
    return {
        "PointTransformerLayer": lambda: (lib.PointTransformerLayer(**given), call),
        "PointTransformerLayer, near": lambda: (
            lib.PointTransformerLayer(**given, num_neighbors=4), call),
        "MultiheadPointTransformerLayer": lambda: (
            lib.MultiheadPointTransformerLayer(dim=16, heads=4, dim_head=8, pos_mlp_hidden_dim=16,
                                               attn_mlp_hidden_mult=2), call),
    }  # fmt: skip


@library("x_clip")
def x_clip(lib: Any) -> Cases:
    """Images and texts."""
    return {"CLIP": lambda: (
        lib.CLIP(dim_text=32, dim_image=32, dim_latent=16, num_text_tokens=100, text_enc_depth=1,
                 text_seq_len=12, text_heads=4, visual_enc_depth=1, visual_image_size=32,
                 visual_patch_size=8, visual_heads=4), on(words(), drawn(*IMAGES)))}  # fmt: skip


@library("coca_pytorch")
def coca(lib: Any) -> Cases:
    """One head of keys, parallel feed-forward."""
    module = "coca_pytorch.coca_pytorch"
    return {
        "ParallelTransformerBlock": lambda: (
            importlib.import_module(module).ParallelTransformerBlock(32, dim_head=8, heads=4),
            on(drawn(2, 12, 32))),
        "CrossAttention": lambda: (
            importlib.import_module(module).CrossAttention(32, dim_head=8, heads=4),
            on(drawn(2, 12, 32), drawn(2, 7, 32))),
    }  # fmt: skip


@library("flamingo_pytorch")
def flamingo(lib: Any) -> Cases:
    """A resampler, and gated attention to media."""
    locations = torch.zeros(2, 12, dtype=torch.bool)
    locations[:, [1, 6]] = True
    return {
        "PerceiverResampler": lambda: (
            lib.PerceiverResampler(dim=32, depth=1, dim_head=8, heads=4, num_latents=5),
            on(drawn(2, 2, 9, 32))),
        "GatedCrossAttentionBlock": lambda: (
            lib.GatedCrossAttentionBlock(dim=32, dim_head=8, heads=4),
            on(drawn(2, 12, 32), drawn(2, 2, 5, 32), media_locations=locations)),
    }  # fmt: skip


@library("soft_moe_pytorch")
def soft_moe(lib: Any) -> Cases:
    """Experts that take weighted means of tokens."""
    return {
        "SoftMoE": lambda: (lib.SoftMoE(dim=32, seq_len=12, num_experts=4), on(drawn(2, 12, 32)))
    }


@library("bs_roformer")
def bs_roformer(lib: Any) -> Cases:
    """Attention over time, then over bands."""
    module = "bs_roformer.bs_roformer"
    return {
        "Attention": lambda: (
            importlib.import_module(module).Attention(32, heads=4, dim_head=8, flash=False),
            on(drawn(2, 12, 32))),
        "Attention, flash": lambda: (
            importlib.import_module(module).Attention(32, heads=4, dim_head=8, flash=True),
            on(drawn(2, 12, 32))),
    }  # fmt: skip


@library("torchtune")
def torchtune(lib: Any) -> Cases:
    """Layers of torchtune, which puts queries and keys together itself."""

    def llama(window: int = 0) -> Made:
        module = importlib.import_module("torchtune.models.llama3")
        model = module.llama3(vocab_size=100, num_layers=2, num_heads=4, num_kv_heads=2,
                              embed_dim=32, max_seq_len=32, intermediate_dim=48)  # fmt: skip
        return model, on(words())

    def gemma() -> Made:
        module = importlib.import_module("torchtune.models.gemma2")
        return module.gemma2(vocab_size=100, num_layers=2, num_heads=4, head_dim=8, num_kv_heads=2,
                             embed_dim=32, intermediate_dim=48, max_seq_len=32,
                             sliding_window_size=4), on(words())  # fmt: skip

    return {"llama3": llama, "gemma2": gemma}


@library("whisper")
def whisper(lib: Any) -> Cases:
    """OpenAI's own Whisper."""

    def of(fused: bool) -> Made:
        module = importlib.import_module("whisper.model")
        module.MultiHeadAttention.use_sdpa = fused
        sizes = module.ModelDimensions(16, 20, 32, 4, 2, 100, 16, 32, 4, 2)
        return module.Whisper(sizes), on(drawn(2, 16, 40), words(7))

    return {"fused": lambda: of(True), "by hand": lambda: of(False)}


@library("esm")
def esm(lib: Any) -> Cases:
    """Protein models."""

    def two() -> Made:
        found = importlib.import_module("esm.model.esm2").ESM2(num_layers=2, embed_dim=32,
                                                             attention_heads=4)  # fmt: skip
        return found, on(torch.randint(4, 20, (2, 12)))

    return {"ESM2": two, "ESM2, contacts": lambda: (two()[0], on(
        torch.randint(4, 20, (2, 12)), need_head_weights=True))}  # fmt: skip


@library("torchscale")
def torchscale(lib: Any) -> Cases:
    """Encoders and decoders with options."""

    def of(part: str, **more: Any) -> Callable[[], Made]:
        def make() -> Made:
            config = importlib.import_module("torchscale.architecture.config")
            made = importlib.import_module(f"torchscale.architecture.{part}")
            sizes = {f"{part}_{k}": v for k, v in {"embed_dim": 32, "attention_heads": 4,
                     "ffn_embed_dim": 48, "layers": 2}.items()}  # fmt: skip
            name = part.capitalize()
            given = getattr(config, f"{name}Config")(vocab_size=100, **sizes, **more)
            embed = nn.Embedding(100, 32)
            model = getattr(made, name)(given, embed_tokens=embed)
            return model, on(words())

        return make

    return {
        "Encoder": of("encoder"),
        "Encoder, relative": of("encoder", rel_pos_buckets=8, max_rel_pos=16),
        "Decoder": of("decoder"),
        "Encoder, multiway": of("encoder", multiway=True),
    }


@library("rtdl_revisiting_models")
def rtdl(lib: Any) -> Cases:
    """Tables."""
    return {"FTTransformer": lambda: (
        lib.FTTransformer(n_cont_features=3, cat_cardinalities=[4, 5], d_out=1, n_blocks=2,
                          d_block=32, attention_n_heads=4, attention_dropout=0.0, ffn_d_hidden=48,
                          ffn_d_hidden_multiplier=None, ffn_dropout=0.0, residual_dropout=0.0),
        on(drawn(2, 3), torch.randint(0, 4, (2, 2))))}  # fmt: skip


@library("entmax")
def entmax(lib: Any) -> Cases:
    """Sparse weights."""

    def of(function: str) -> Made:
        def forward(project: nn.Module, inputs: Tensor) -> Tensor:
            q, k, v = (
                t.unflatten(-1, (4, 8)).transpose(1, 2) for t in project(inputs).chunk(3, -1)
            )
            return getattr(lib, function)(q @ k.mT / 8**0.5, dim=-1) @ v

        return Of(forward, nn.Linear(32, 96)), on(drawn(2, 12, 32))

    return {name: lambda name=name: of(name) for name in ("sparsemax", "entmax15", "entmax_bisect")}  # type: ignore[misc]


@library("torch_geometric")
def torch_geometric(lib: Any) -> Cases:
    """A softmax over the edges of each node."""
    edges = torch.randint(0, 8, (2, 30), generator=torch.Generator().manual_seed(1))

    def of(kind: str, *given: Any, **more: Any) -> Callable[[], Made]:
        def make() -> Made:
            nn_of = importlib.import_module("torch_geometric.nn")
            return getattr(nn_of, kind)(*given, **more), on(drawn(8, 16), edges)

        return make

    return {
        "GATConv": of("GATConv", 16, 8, heads=4), "GATv2Conv": of("GATv2Conv", 16, 8, heads=4),
        "TransformerConv": of("TransformerConv", 16, 8, heads=4),
        "SuperGATConv": of("SuperGATConv", 16, 8, heads=4), "AGNNConv": of("AGNNConv"),
    }  # fmt: skip


@library("speechbrain")
def speechbrain(lib: Any) -> Cases:
    """Attention of speech models."""

    def of(kind: str, **given: Any) -> Made:
        module = importlib.import_module("speechbrain.nnet.attention")
        inputs = drawn(2, 12, 32)
        made = getattr(module, kind)(**given)
        if kind == "RelPosMHAXL":
            positions = importlib.import_module("speechbrain.nnet.attention").RelPosEncXL(32)(
                inputs
            )
            return made, on(inputs, inputs, inputs, positions)
        return made, on(inputs, inputs, inputs)

    def older(kind: str, **given: Any) -> Made:
        made = getattr(importlib.import_module("speechbrain.nnet.attention"), kind)(**given)
        return made, on(drawn(2, 12, 16), torch.tensor([12, 9]), drawn(2, 16))

    sizes = {"enc_dim": 16, "dec_dim": 16, "attn_dim": 16, "output_dim": 16}
    return {
        "MultiheadAttention": lambda: of("MultiheadAttention", nhead=4, d_model=32),
        "RelPosMHAXL": lambda: of("RelPosMHAXL", embed_dim=32, num_heads=4),
        "ContentBasedAttention": lambda: older("ContentBasedAttention", **sizes),
        "KeyValueAttention": lambda: older("KeyValueAttention", **sizes),
    }  # fmt: skip


@library("kornia")
def kornia(lib: Any) -> Cases:
    """Matching of images."""

    def full() -> Made:
        module = importlib.import_module("kornia.feature.loftr.loftr_module.linear_attention")
        return module.FullAttention(), on(*(drawn(2, 12, 4, 8, seed=i) for i in (1, 2, 3)))

    def linear() -> Made:
        module = importlib.import_module("kornia.feature.loftr.loftr_module.linear_attention")
        return module.LinearAttention(), on(*(drawn(2, 12, 4, 8, seed=i) for i in (1, 2, 3)))

    return {"LoFTR, full": full, "LoFTR, linear": linear}


@library("monai")
def monai(lib: Any) -> Cases:
    """Networks of medical images."""

    def nets(kind: str, given: dict[str, Any], *shape: int) -> Callable[[], Made]:
        return lambda: (getattr(importlib.import_module("monai.networks.nets"), kind)(**given),
                        on(drawn(*shape)))  # fmt: skip

    vit = {"in_channels": 1, "img_size": (32, 32), "patch_size": (8, 8), "hidden_size": 32,
           "mlp_dim": 48, "num_layers": 2, "num_heads": 4, "spatial_dims": 2}  # fmt: skip
    return {
        "ViT": nets("ViT", vit, 2, 1, 32, 32),
        "SwinUNETR": nets("SwinUNETR", {"in_channels": 1, "out_channels": 2, "spatial_dims": 2,
                          "feature_size": 12}, 2, 1, 64, 64),
        "UNETR": nets("UNETR", {"in_channels": 1, "out_channels": 2, "img_size": (32, 32),
                      "spatial_dims": 2, "hidden_size": 32, "mlp_dim": 48, "num_heads": 4,
                      "feature_size": 8}, 2, 1, 32, 32),
        "SABlock": lambda: (importlib.import_module("monai.networks.blocks").SABlock(32, 4),
                            on(drawn(2, 12, 32))),
        "SABlock, fused": lambda: (importlib.import_module("monai.networks.blocks").SABlock(
            32, 4, use_flash_attention=True), on(drawn(2, 12, 32))),
        "CrossAttentionBlock": lambda: (
            importlib.import_module("monai.networks.blocks").CrossAttentionBlock(32, 4),
            on(drawn(2, 12, 32), drawn(2, 7, 32))),
        "AttentionUnet": nets("AttentionUnet", {"spatial_dims": 2, "in_channels": 1,
            "out_channels": 2, "channels": (8, 16), "strides": (2,)}, 2, 1, 32, 32),
    }  # fmt: skip


@library("litgpt")
def litgpt(lib: Any) -> Cases:
    """One model of many configurations."""

    def of(**given: Any) -> Callable[[], Made]:
        sizes = {"block_size": 32, "vocab_size": 100, "padded_vocab_size": 100, "n_layer": 2,
                 "n_head": 4, "n_embd": 32, "intermediate_size": 48}  # fmt: skip
        return lambda: (lib.GPT(lib.Config(**{**sizes, **given})), on(words()))

    return {
        "plain": of(), "grouped": of(n_query_groups=2), "one key head": of(n_query_groups=1),
        "softcap": of(attention_logit_softcapping=5.0),
        "window": of(sliding_window_size=4, sliding_window_indices=[1, 0]),
        "parallel": of(parallel_residual=True, shared_attention_norm=True),
    }  # fmt: skip


@library("lambda_networks")
def lambda_networks(lib: Any) -> Cases:
    """No weights of queries and keys."""
    return {
        "LambdaLayer": lambda: (
            lib.LambdaLayer(dim=32, dim_out=32, n=64, dim_k=8, heads=4, dim_u=1),
            on(drawn(2, 32, 8, 8)),
        )
    }


@library("halonet_pytorch")
def halonet(lib: Any) -> Cases:
    """Blocks with a halo."""
    return {"HaloAttention": lambda: (
        lib.HaloAttention(dim=32, block_size=4, halo_size=2, dim_head=8, heads=4),
        on(drawn(2, 32, 8, 8)))}  # fmt: skip


@library("axial_attention")
def axial(lib: Any) -> Cases:
    """Rows, then columns."""
    return {
        "AxialAttention": lambda: (
            lib.AxialAttention(dim=32, dim_index=1, heads=4, num_dimensions=2),
            on(drawn(2, 32, 6, 5)),
        )
    }


@library("memory_efficient_attention_pytorch")
def memory_efficient(lib: Any) -> Cases:
    """Attention in pieces."""
    given = {"dim": 32, "heads": 4, "dim_head": 8, "causal": True}
    return {
        "whole": lambda: (lib.Attention(**given), on(drawn(2, 16, 32), mask=real(16))),
        "in pieces": lambda: (
            lib.Attention(**given, memory_efficient=True, q_bucket_size=4, k_bucket_size=4),
            on(drawn(2, 16, 32))),
    }  # fmt: skip


@library("block_recurrent_transformer_pytorch")
def block_recurrent(lib: Any) -> Cases:
    """A state that attends and is attended to."""
    return {"BlockRecurrentTransformer": lambda: (
        lib.BlockRecurrentTransformer(num_tokens=100, dim=32, depth=2, heads=4, dim_head=8,
                                      max_seq_len=16, block_width=8, num_state_vectors=4,
                                      recurrent_layers=(2,)), on(words(16)))}  # fmt: skip


@library("recurrent_memory_transformer_pytorch")
def recurrent_memory(lib: Any) -> Cases:
    """Memory tokens on both sides."""
    return {"RecurrentMemoryTransformer": lambda: (
        lib.RecurrentMemoryTransformer(num_tokens=100, dim=32, depth=1, num_memory_tokens=3,
                                       seq_len=16, causal=True, heads=4, dim_head=8),
        on(words(16)))}  # fmt: skip


@library("simple_hierarchical_transformer")
def hierarchical(lib: Any) -> Cases:
    """Several lengths at once."""
    return {
        "HierarchicalTransformer": lambda: (
            lib.HierarchicalTransformer(
                num_tokens=100,
                dim=32,
                depth=1,
                seq_len=16,
                hierarchies=(1, 2),
                window_sizes=(8, None),
            ),
            on(words(16)),
        )
    }


@library("taylor_series_linear_attention")
def taylor(lib: Any) -> Cases:
    """Linear attention by a series."""
    return {
        "TaylorSeriesLinearAttn": lambda: (
            lib.TaylorSeriesLinearAttn(dim=32, dim_head=8, heads=4),
            on(drawn(2, 12, 32)),
        )
    }


@library("timesformer_pytorch")
def timesformer(lib: Any) -> Cases:
    """Time, then space."""
    return {"TimeSformer": lambda: (
        lib.TimeSformer(dim=32, image_size=32, patch_size=8, num_frames=3, num_classes=5, depth=1,
                        heads=4, dim_head=8), on(drawn(2, 3, 3, 32, 32)))}  # fmt: skip


@library("cross_transformers_pytorch")
def cross_transformers(lib: Any) -> Cases:
    """A query image and a support set."""

    def make() -> Made:
        backbone = nn.Conv2d(3, 32, 8, stride=8)
        model = lib.CrossTransformer(dim=32, dim_key=16, dim_value=16)
        return Of(lambda b, m, a, c: m(b, a, c), backbone, model), on(
            drawn(1, 3, 32, 32), drawn(1, 2, 2, 3, 32, 32))  # fmt: skip

    return {"CrossTransformer": make}


@library("slot_attention")
def slots(lib: Any) -> Cases:
    """A softmax over the queries."""
    return {"SlotAttention": lambda: (lib.SlotAttention(num_slots=4, dim=32, iters=2),
                                      on(drawn(2, 12, 32)))}  # fmt: skip


@library("g_mlp_pytorch")
def g_mlp(lib: Any) -> Cases:
    """Gates over positions, with a tiny attention."""
    return {"gMLP": lambda: (lib.gMLP(num_tokens=100, dim=32, depth=1, seq_len=12, attn_dim=8),
                             on(words()))}  # fmt: skip


@library("MEGABYTE_pytorch")
def megabyte(lib: Any) -> Cases:
    """Patches of bytes."""
    return {"MEGABYTE": lambda: (
        lib.MEGABYTE(num_tokens=100, dim=(32, 32), depth=(1, 1), max_seq_len=(4, 4), heads=4,
                     dim_head=8), on(words(16)))}  # fmt: skip


@library("iTransformer")
def itransformer(lib: Any) -> Cases:
    """Attention over series."""
    return {"iTransformer": lambda: (
        lib.iTransformer(num_variates=5, lookback_len=16, dim=32, depth=1, heads=4, dim_head=8,
                         pred_length=4), on(drawn(2, 16, 5)))}  # fmt: skip


@library("se3_transformer_pytorch")
def se3(lib: Any) -> Cases:
    """Attention that turns with its points."""
    return {"SE3Transformer": lambda: (
        lib.SE3Transformer(dim=8, heads=2, depth=1, dim_head=4, num_degrees=2, valid_radius=10,
                           num_neighbors=4), on(drawn(1, 8, 8), drawn(1, 8, 3)))}  # fmt: skip


@library("self_attention_cv")
def self_attention_cv(lib: Any) -> Cases:
    """Building blocks."""
    return {
        "SelfAttention": lambda: (lib.SelfAttention(dim=32), on(drawn(2, 12, 32))),
        "MultiHeadSelfAttention": lambda: (
            lib.MultiHeadSelfAttention(dim=32, heads=4), on(drawn(2, 12, 32))),
        "TransformerEncoder": lambda: (
            lib.TransformerEncoder(dim=32, blocks=1, heads=4), on(drawn(2, 12, 32))),
        "ViT": lambda: (lib.ViT(img_dim=32, in_channels=3, patch_dim=8, num_classes=5, dim=32,
                                blocks=1, heads=4), on(drawn(*IMAGES))),
        "LinformerAttention": lambda: (
            lib.LinformerAttention(dim=32, shared_projection=False, proj_shape=(12, 8), heads=4),
            on(drawn(2, 12, 32))),
        "BottleneckAttention": lambda: (
            importlib.import_module("self_attention_cv.bottleneck_transformer").BottleneckAttention(
                dim=32, fmap_size=(8, 8), heads=4, dim_head=8), on(drawn(2, 32, 8, 8))),
    }  # fmt: skip


@library("labml_nn")
def labml(lib: Any) -> Cases:
    """Annotated implementations: time first."""

    def of(module: str, kind: str, *given: Any, same: bool = True) -> Callable[[], Made]:
        def make() -> Made:
            found = getattr(importlib.import_module(f"labml_nn.transformers.{module}"), kind)(
                *given
            )
            x = drawn(12, 2, 32)
            mask = torch.ones(12, 12, 1).tril()
            return found, lambda model: model(query=x, key=x, value=x, mask=mask)

        return make

    return {
        "MultiHeadAttention": of("mha", "MultiHeadAttention", 4, 32, 0.0),
        "AlibiMultiHeadAttention": of("alibi", "AlibiMultiHeadAttention", 4, 32, 0.0),
        "RotaryPEMultiHeadAttention": of("rope", "RotaryPEMultiHeadAttention", 4, 32, 0.5, 0.0),
        "RelativeMultiHeadAttention": of(
            "xl.relative_mha", "RelativeMultiHeadAttention", 4, 32, 0.0),
        "GraphAttentionLayer": lambda: (
            importlib.import_module("labml_nn.graphs.gat").GraphAttentionLayer(
                32, 32, 4, dropout=0.0),
            on(drawn(9, 32), torch.ones(9, 9, 1, dtype=torch.bool))),
    }  # fmt: skip


@library("tsai")
def tsai(lib: Any) -> Cases:
    """Time series."""

    def of(module: str, kind: str, *given: Any, **more: Any) -> Callable[[], Made]:
        return lambda: (getattr(importlib.import_module(f"tsai.models.{module}"), kind)(
            *given, **more), on(drawn(2, 3, 16)))  # fmt: skip

    return {
        "TST": of("TST", "TST", 3, 5, 16, n_layers=2, d_model=32, n_heads=4, d_ff=48),
        "PatchTST": of("PatchTST", "PatchTST", 3, 5, 16, pred_dim=4, n_layers=2, d_model=32,
                       n_heads=4, d_ff=48, patch_len=4, stride=2),
    }  # fmt: skip
