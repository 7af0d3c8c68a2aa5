"""Attention of released packages, examined: python benchmarks/wild.py.

    python benchmarks/wild.py                       # all of them, in some minutes
    python benchmarks/wild.py kornia monai          # those of these packages
    python benchmarks/wild.py --venv DIR --python python3.11

It makes a virtual environment, installs PyTorch and the pinned packages into it without what they
depend on, and examines each entry of `WILD` in a process of its own. What is declared wrong is
also asked one small call, whose answer is compared with plain loops (`wild_loops.py`). The results
go to `wild.json`, from which `docs/generate.py` writes the tables of `docs/wild.md`. The exit code
is 1 if an entry is not as it is declared.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.machinery
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import types
import venv
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import wild_loops

ROOT = Path(__file__).parents[1]
SUMMARY = Path(__file__).with_suffix(".json")
TORCH = "torch==2.13.0"
# What several of the packages import; they are installed without what they depend on.
COMMON = (
    "numpy==2.4.6",
    "einops==0.8.2",
    "packaging==26.4",
    "beartype==0.23.1",
    "matplotlib==3.10.7",
)
SECONDS = 300
# The answer of the small call: so far from what is documented, and so near to what the loops say.
OFF, SAME = 1e-2, 1e-5


@dataclass(frozen=True)
class Wild:
    """Something of a package that is examined.

    Attributes:
        package: The package and its version, as pip takes them.
        subject: What of it is examined.
        setup: Lines that import it.
        declared: The specification that is examined: what somebody would write.
        needs: What it imports besides `COMMON`, pinned.
        absent: Packages that it imports, and that its attention does not use: empty ones are there
            in their place.
        inner: Packages of which only the module that is named is imported, not the whole.
        problem: Of what is wrong: the function of `wild_loops` that has the answers.
        call: The call of that problem, of `q`, `k`, `v` (batch, heads, length, width) and `mask`.
        documented: What it is said to do, and where.
        does: What it does.
        issue: A public issue about it, if one was found.
    """

    package: str
    subject: str
    setup: str
    declared: str
    needs: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    problem: str = ""
    call: str = ""
    documented: str = ""
    does: str = ""
    issue: str = ""

    @property
    def name(self) -> str:
        """The package without its version."""
        return self.package.partition("==")[0]

    @property
    def version(self) -> str:
        """The version of the package."""
        return self.package.partition("==")[2]

    @property
    def key(self) -> str:
        """What tells it from the others."""
        return f"{self.name}: {self.subject}"


HUB = ("tqdm==4.70.1",)
FREEZE = ("frozendict==2.5.1", "einx==0.4.3", "loguru==0.7.3")
WILD = (
    # Not as documented, or not as another path of the same package.
    Wild(
        "memory-efficient-attention-pytorch==0.1.6",
        "flash_attention.FlashAttentionFunction",
        "from memory_efficient_attention_pytorch.flash_attention import FlashAttentionFunction",
        "AttentionSpec(FlashAttentionFunction.apply, name='FlashAttentionFunction',"
        " causal='bottom_right', fully_masked='undefined', dtypes=['float32'],"
        " call=lambda fn, c: fn(*c.tensors, c.mask, c.causal, 4, 4))",
        problem="causal_offset_negated",
        call="FlashAttentionFunction.apply(q.float(), k.float(), v.float(), None, True, 5, 5)",
        documented="`attention` of the same package counts causality from the last key",
        does="with more keys than queries the offset of the mask has the other sign: query i sees"
        " keys up to i - (keys - queries), the first queries none",
    ),
    Wild(
        "memory-efficient-attention-pytorch==0.1.6",
        "memory_efficient_attention",
        "from memory_efficient_attention_pytorch.memory_efficient_attention import"
        " memory_efficient_attention",
        "AttentionSpec(memory_efficient_attention, mask_argument='mask', mask_shape='(B, S)',"
        " causal='bottom_right', causal_argument='causal', fully_masked='undefined',"
        " dtypes=['float32'])",
        problem="causal_from_top_left",
        call="memory_efficient_attention(q, k, v, causal=True)",
        documented="`Attention(memory_efficient=...)` chooses between it and `attention`, which"
        " counts causality from the last key",
        does="causality is counted from the first key, so that the two differ with more keys than"
        " queries",
    ),
    Wild(
        "torch-multi-head-attention==0.15.1",
        "MultiHeadAttention",
        "from torch_multi_head_attention import MultiHeadAttention\n"
        "def called(kind, c):\n"
        "    if c.key.shape != c.value.shape: raise NotImplementedError('other widths')\n"
        "    heads, width = c.query.shape[1], c.query.shape[3]\n"
        "    layer = as_is(kind(heads * width, heads, bias=False, activation=None)).to(c.query)\n"
        "    mask = None if c.mask is None else c.mask[:, 0]\n"
        "    return split(layer(*map(merged, c.tensors), mask), heads)",
        "AttentionSpec(MultiHeadAttention, mask='keep', mask_shape='(B, 1, L, S)', causal=None,"
        " fully_masked='uniform', call=called, dtypes=['float32'])",
        problem="mask_of_another_sample",
        call="split(as_is(MultiHeadAttention(4, 2, bias=False, activation=None))"
        "(merged(q), merged(k), merged(v), mask), 2)",
        documented="`mask` is (batch, queries, keys): one map for each sample",
        does="masks are repeated in the order of samples where heads are in the order of heads: a"
        " sample is masked as another one",
        issue="ArrowLuo/CLIP4Clip#22",
    ),
    Wild(
        "MEGABYTE-pytorch==0.3.6",
        "attend.Attend",
        "from MEGABYTE_pytorch.attend import Attend",
        "AttentionSpec(Attend().eval(), mask='keep', mask_argument='mask', mask_shape='(B, S)',"
        " causal=None, fully_masked='undefined', dtypes=['float32'])",
        needs=HUB,
        problem="mask_ignored",
        call="Attend()(q, k, v, mask=mask)",
        documented="it takes `mask`, and `flash=True` applies it",
        does="without `flash=True` the mask changes nothing: masked keys are attended to",
    ),
    Wild(
        "x-transformers==2.31.10",
        "attend.Attend(flash=True)",
        "from x_transformers.attend import Attend\nattend = Attend(heads=4, flash=True).eval()",
        "AttentionSpec(attend, causal='bottom_right', dtypes=['float32'],"
        " call=lambda fn, c: fn(*c.tensors, mask=c.mask, causal=c.causal)[0])",
        needs=(*FREEZE, "torch-einops-utils==0.2.0"),
        problem="causal_ignored",
        call="attend(q, k, v, causal=True)[0]",
        documented="`forward` takes `causal`, and `flash=False` is causal then",
        does="with `flash=True` the argument is not handed on: no query is kept from later keys",
    ),
    Wild(
        "ring-attention-pytorch==0.5.20",
        "ring_flash_attn",
        "from ring_attention_pytorch.ring_flash_attention import ring_flash_attn",
        "AttentionSpec(ring_flash_attn, layout='blhd', mask=None, causal='bottom_right',"
        " causal_argument='causal', arguments={'bucket_size': 4}, dtypes=['float32'])",
        needs=("jaxtyping==0.3.11", "wadler-lindig==0.1.8"),
        problem="causal_from_top_left",
        call="ring_flash_attn(*(t.float().transpose(1, 2) for t in (q, k, v)), None, True, 2)"
        ".transpose(1, 2)",
        documented="`default_attention`, its plain counterpart, counts causality from the last key;"
        " so does it itself with `bucket_size=4`",
        does="with more keys than queries the answer depends on `bucket_size`: with 2 causality is"
        " counted from the first key",
    ),
    Wild(
        "soundstorm-pytorch==0.6.1",
        "attend.Attend(flash=True)",
        "from soundstorm_pytorch.attend import Attend\n"
        "attend, plain = Attend(causal=True, flash=True).eval(), Attend(flash=True).eval()",
        "AttentionSpec(attend, mask=None, causal='bottom_right', fully_masked='undefined',"
        " call=lambda fn, c: (fn if c.causal else plain)(*c.tensors), dtypes=['float32'])",
        inner=("soundstorm_pytorch",),
        problem="causal_from_top_left",
        call="attend(q, k, v)",
        documented="`flash=False` counts causality from the last key",
        does="`flash=True` counts it from the first key, so that the two differ with more keys than"
        " queries",
    ),
    Wild(
        "local-attention==1.11.2",
        "LocalAttention(autopad=True)",
        "from local_attention import LocalAttention\n"
        "local = LocalAttention(4, autopad=True, use_rotary_pos_emb=False).eval()",
        "AttentionSpec(local, mask_argument='mask', mask_shape='(B, S)', causal=None, square=True,"
        " may_see=lambda b, h, q, k: (q // 4 - k // 4).abs() <= 1, fully_masked='undefined',"
        " dtypes=['float32'])",
        needs=("hyper-connections==0.4.11",),
        problem="padding_attended",
        call="local(q, k, v)",
        documented="`autopad` pads to a multiple of the window, and cuts the output again; with a"
        " mask that is True everywhere the padding is not seen",
        does="without `mask` the keys of zeros that it adds are attended to",
    ),
    Wild(
        "kornia==0.9.0",
        "feature.loftr.FullAttention",
        "from kornia.feature.loftr.loftr_module.linear_attention import FullAttention\n"
        "full = FullAttention().eval()",
        "AttentionSpec(full, layout='blhd', mask='keep', mask_argument='kv_mask',"
        " mask_shape='(B, S)', causal=None, fully_masked='undefined', dtypes=['float32'])",
        needs=("kornia-rs==0.2.0",),
        problem="mask_ignored",
        call="full(*(t.transpose(1, 2) for t in (q, k, v)), kv_mask=mask).transpose(1, 2)",
        documented="`q_mask` and `kv_mask` are optional, each for itself, and `LinearAttention`"
        " of the same file applies `kv_mask` alone",
        does="`kv_mask` changes nothing unless `q_mask` is given as well",
    ),
    Wild(
        "monai==1.6.1",
        "networks.blocks.SABlock(use_flash_attention=True)",
        "from monai.networks.blocks.selfattention import SABlock\n"
        "def block(width, rate):\n"
        "    return SABlock(width, 2, dropout_rate=rate, use_flash_attention=True).eval()",
        "AttentionSpec(block(16, 0.5), inputs=x, causal=None, dtypes=['float32'])",
        problem="dropout_when_evaluating",
        call="split(as_is(block(4, 0.5))(merged(q)), 2)",
        documented="dropout is for training, as with `use_flash_attention=False`",
        does="`dropout_rate` is handed to PyTorch's function after `.eval()` too: each call gives"
        " another output",
        issue="pytorch/pytorch#124464",
    ),
    Wild(
        "performer-pytorch==1.1.4",
        "SelfAttention",
        "import torch\nfrom performer_pytorch import SelfAttention\n"
        "net = SelfAttention(2, heads=1, dim_head=2, nb_features=2, generalized_attention=True)\n"
        "net.fast_attention.projection_matrix.copy_(torch.eye(2))",
        "AttentionSpec(SequenceModel(SelfAttention(16, heads=2).eval(), mask='keep',"
        " mask_argument='mask'), inputs=x, causal=None, dtypes=['float32'])",
        needs=(
            "local-attention==1.11.2", "hyper-connections==0.4.11",
            "axial-positional-embedding==0.3.12",
        ),
        problem="masked_keys_in_the_sum",
        call="split(as_is(net)(merged(q), mask=mask), 1)",
        documented="`mask` hides padding",
        does="the values of masked tokens become 0, their keys stay in the sum that weights are"
        " divided by: padding changes the output",
    ),
    Wild(
        "speechbrain==1.1.2",
        "nnet.attention.RelPosMHAXL",
        "import torch\nfrom speechbrain.nnet.attention import RelPosMHAXL\n"
        "class Block(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.attention = RelPosMHAXL(16, 2)\n"
        "    def forward(self, x):\n"
        "        return self.attention(x, x, x, x.new_zeros(1, 2 * x.shape[1] - 1, 16))[0]\n"
        "net = as_is(RelPosMHAXL(4, 2)).float()\n"
        "net.in_proj_weight.data = torch.eye(4).repeat(3, 1)\n"
        "net.pos_bias_u.data.zero_(), net.pos_bias_v.data.zero_()",
        "AttentionSpec(Block().eval(), inputs=x, causal=None, dtypes=['float32'])",
        needs=(*HUB, "hyperpyyaml==1.2.3", "ruamel.yaml==0.19.1", "scipy==1.17.1",
               "joblib==1.6.0", "sentencepiece==0.2.1"),
        absent=("torchaudio", "soundfile", "huggingface_hub"),
        problem="scale_from_embedding",
        call="split(net(*(merged(t).float() for t in (q, k, v)), torch.zeros(1, 3, 4))[0], 2)",
        documented="nothing names the scale; `MultiheadAttention` of the same file scales by the"
        " width of a head, as most do",
        does="the scale is that of all heads together: (heads * width) ** -0.5",
    ),
    Wild(
        "zetascale==2.8.8",
        "nn.attention.MultiModalCausalAttention",
        "from zeta.nn.attention.multi_modal_causal_attention import MultiModalCausalAttention\n"
        "def textual(net):\n"
        "    net.eval()\n"
        "    return lambda x, mask=None: net(x, x, mask=None if mask is None else mask[:, 1:])[1]",
        "AttentionSpec(SequenceModel(textual(MultiModalCausalAttention(16, 2)), mask='keep',"
        " mask_argument='mask'), inputs=x, causal=None, name='MultiModalCausalAttention',"
        " dtypes=['float32'])",
        inner=("zeta", "zeta.nn", "zeta.nn.attention"),
        problem="mask_ignored_in_two_heads",
        call="split(textual(as_is(MultiModalCausalAttention(4, 2)))(merged(q), mask), 2)",
        documented="`forward` takes `mask`, and computes masked scores of the text from it",
        does="the masked scores are not used: the mask changes nothing; and the scale is that"
        " of all heads together",
    ),
    # As documented.
    Wild(
        "x-transformers==2.31.10",
        "attend.Attend",
        "from x_transformers.attend import Attend",
        "AttentionSpec(Attend(heads=4).eval(), causal='bottom_right', fully_masked='undefined',"
        " bias='attn_bias', dtypes=['float32'], call=lambda fn, c:"
        " fn(*c.tensors, mask=c.mask, causal=c.causal, attn_bias=c.bias)[0])",
        needs=(*FREEZE, "torch-einops-utils==0.2.0"),
    ),
    Wild(
        "memory-efficient-attention-pytorch==0.1.6",
        "attention",
        "from memory_efficient_attention_pytorch.memory_efficient_attention import attention",
        "AttentionSpec(attention, mask_argument='mask', causal='bottom_right',"
        " causal_argument='causal', bias='attn_bias', fully_masked='undefined',"
        " dtypes=['float32'])",
    ),
    Wild(
        "recurrent-memory-transformer-pytorch==0.7.0",
        "attend.Attend(use_flash=True)",
        "from recurrent_memory_transformer_pytorch.attend import Attend",
        "AttentionSpec(Attend(use_flash=True).eval(), mask_argument='mask', causal=None,"
        " fully_masked='undefined', dtypes=['float32'])",
        needs=("hyper-connections==0.4.11",),
    ),
    Wild(
        "bert-pytorch==0.0.1a4",
        "model.attention.Attention",
        "from bert_pytorch.model.attention import Attention",
        "AttentionSpec(Attention().eval(), mask_argument='mask', causal=None,"
        " fully_masked='uniform', returns='weights', dtypes=['float32'])",
        needs=HUB,
    ),
    Wild(
        "pytorch-forecasting==1.8.0",
        "ScaledDotProductAttention",
        "from pytorch_forecasting.models.temporal_fusion_transformer.sub_modules import"
        " ScaledDotProductAttention",
        "AttentionSpec(ScaledDotProductAttention().eval(), layout='bld', mask='drop',"
        " mask_argument='mask', causal=None, fully_masked='uniform', returns='weights',"
        " dtypes=['float32'])",
        absent=("lightning", "pandas"),
        inner=("pytorch_forecasting", "pytorch_forecasting.models",
               "pytorch_forecasting.models.temporal_fusion_transformer"),
    ),
    Wild(
        "curated-transformers==2.0.1",
        "layers.ScaledDotProductAttention",
        "import torch\nfrom curated_transformers.layers.attention import ("
        "AttentionMask, ScaledDotProductAttention)\n"
        "def called(fn, c):\n"
        "    all_seen = torch.ones(len(c.key), 1, 1, c.key.shape[2], dtype=torch.bool)\n"
        "    mask = all_seen if c.mask is None else c.mask\n"
        "    return fn(query=c.query, key=c.key, value=c.value, use_causal_mask=False,\n"
        "              attention_mask=AttentionMask(mask))",
        "AttentionSpec(ScaledDotProductAttention(dropout_prob=0.0, linear_biases=None).eval(),"
        " mask='keep', mask_shape='(B, S)', causal=None, fully_masked='undefined', call=called,"
        " dtypes=['float32'])",
        needs=("catalogue==2.0.10", "tokenizers==0.23.3", "fsspec==2026.9.0",
               "safetensors==0.8.0"),
        absent=("huggingface_hub",),
    ),
    Wild(
        "perceiver-pytorch==0.11.0",
        "Attention",
        "from perceiver_pytorch.perceiver_pytorch import Attention",
        "AttentionSpec(SequenceModel(Attention(16, heads=2, dim_head=8).eval(), mask='keep',"
        " mask_argument='mask'), inputs=x, causal=None, dtypes=['float32'])",
    ),
    Wild(
        "conformer==0.3.2",
        "Attention",
        "from conformer.conformer import Attention",
        "AttentionSpec(SequenceModel(Attention(16, heads=2, dim_head=8).eval(), mask='keep',"
        " mask_argument='mask'), inputs=x, causal=None, dtypes=['float32'])",
    ),
    Wild(
        "monai==1.6.1",
        "networks.blocks.SABlock",
        "from monai.networks.blocks.selfattention import SABlock",
        "AttentionSpec(SequenceModel(SABlock(16, 2, dropout_rate=0.5).eval(), mask='keep',"
        " mask_argument='attn_mask'), inputs=x, causal=None, dtypes=['float32'])",
    ),
    Wild(
        "linformer==0.2.3",
        "LinformerSelfAttention",
        "from linformer import LinformerSelfAttention",
        "AttentionSpec(LinformerSelfAttention(16, 8, k=4, heads=2).eval(), inputs=x, causal=None,"
        " dtypes=['float32'])",
    ),
    Wild(
        "axial-attention==0.6.1",
        "SelfAttention",
        "from axial_attention.axial_attention import SelfAttention",
        "AttentionSpec(SelfAttention(16, 2).eval(), inputs=x, causal=None, dtypes=['float32'])",
    ),
    Wild(
        "espnet==202511",
        "MultiHeadedAttention",
        "from espnet.nets.pytorch_backend.transformer.attention import MultiHeadedAttention\n"
        "net = MultiHeadedAttention(2, 16, 0.1).eval()",
        "AttentionSpec(SequenceModel(lambda x, mask=None: net(x, x, x, mask),"
        " mask=lambda real: real[:, None], mask_argument='mask'), inputs=x, causal=None,"
        " dtypes=['float32'], name='MultiHeadedAttention')",
    ),
    Wild(
        "joeynmt==2.3.0",
        "MultiHeadedAttention",
        "from joeynmt.transformer_layers import MultiHeadedAttention\n"
        "net = MultiHeadedAttention(2, 16).eval()",
        "AttentionSpec(SequenceModel(lambda x, mask=None: net(x, x, x, mask)[0],"
        " mask=lambda real: real[:, None], mask_argument='mask'), inputs=x, causal=None,"
        " dtypes=['float32'], name='MultiHeadedAttention')",
        inner=("joeynmt",),
        needs=("pyyaml==6.0.4",),
    ),
    Wild(
        "torchscale==0.3.0",
        "MultiheadAttention",
        "from types import SimpleNamespace\n"
        "from torchscale.component.multihead_attention import MultiheadAttention\n"
        "net = MultiheadAttention(SimpleNamespace(multiway=False, xpos_rel_pos=False,\n"
        "    layernorm_eps=1e-5), 16, 2, self_attention=True).eval()",
        "AttentionSpec(SequenceModel(lambda x, mask=None: net(x, x, x, key_padding_mask=mask)[0],"
        " mask='drop', mask_argument='mask'), inputs=x, causal=None, dtypes=['float32'],"
        " name='MultiheadAttention')",
    ),
    Wild(
        "fair-esm==2.0.0",
        "MultiheadAttention",
        "from esm.multihead_attention import MultiheadAttention\n"
        "net = MultiheadAttention(16, 2, self_attention=True).eval()\n"
        "def called(x, mask=None):\n"
        "    x = x.transpose(0, 1)\n"
        "    return net(x, x, x, key_padding_mask=mask)[0].transpose(0, 1)",
        "AttentionSpec(SequenceModel(called, mask='drop', mask_argument='mask'), inputs=x,"
        " causal=None, dtypes=['float32'], name='MultiheadAttention')",
        needs=HUB,
    ),
    Wild(
        "fightingcv-attention==1.0.0",
        "ScaledDotProductAttention",
        "from fightingcv_attention.attention.SelfAttention import ScaledDotProductAttention\n"
        "net = ScaledDotProductAttention(16, 8, 8, 2).eval()\n"
        "for one in net.parameters(): one.data.normal_(std=0.3)",
        "AttentionSpec(SequenceModel(lambda x, mask=None: net(x, x, x, mask),"
        " mask=lambda real: ~real[:, None, None], mask_argument='mask'), inputs=x, causal=None,"
        " dtypes=['float32'], name='ScaledDotProductAttention')",
    ),
    Wild(
        "litgpt==0.5.13",
        "GPT",
        "import torch\nfrom litgpt.config import Config\nfrom litgpt.model import GPT\n"
        "net = GPT(Config(block_size=32, padded_vocab_size=50, n_layer=1, n_head=4, n_embd=32,\n"
        "    n_query_groups=2)).eval()",
        "AttentionSpec(net, inputs=torch.randint(50, (2, 8)), causal='top_left',"
        " dtypes=['float32'])",
        absent=(
            "lightning", "lightning_utilities", "litdata", "huggingface_hub", "tokenizers", "psutil"
        ),
        inner=("litgpt",),
        needs=("pyyaml==6.0.4", "safetensors==0.8.0", *HUB),
    ),
    Wild(
        "PaLM-pytorch==0.2.2",
        "PaLM",
        "import torch\nfrom palm_pytorch import PaLM",
        "AttentionSpec(PaLM(num_tokens=50, dim=16, depth=1, heads=2, dim_head=8).eval(),"
        " inputs=torch.randint(50, (2, 8)), causal='top_left', dtypes=['float32'])",
    ),
    Wild(
        "timm==1.0.31",
        "layers.Attention",
        "from timm.layers.attention import Attention",
        "AttentionSpec(SequenceModel(Attention(16, 2).eval(),"
        " mask=lambda real: real[:, None, None], mask_argument='attn_mask'), inputs=x,"
        " causal=None, dtypes=['float32'])",
        absent=("torchvision", "huggingface_hub", "PIL"),
        needs=("pyyaml==6.0.4", "safetensors==0.8.0"),
    ),
    Wild(
        "vit-pytorch==1.26.11",
        "vit.Attention",
        "from vit_pytorch.vit import Attention",
        "AttentionSpec(Attention(16, heads=2, dim_head=8).eval(), inputs=x, causal=None,"
        " dtypes=['float32'])",
        absent=("torchvision",),
    ),
    Wild(
        "x-clip==0.14.4",
        "Attention(causal=True)",
        "from x_clip.x_clip import Attention",
        "AttentionSpec(SequenceModel(Attention(16, heads=2, dim_head=8, causal=True).eval(),"
        " mask='keep', mask_argument='mask'), inputs=x, causal='top_left', dtypes=['float32'])",
        absent=("torchvision", "ftfy", "regex", "vector_quantize_pytorch"),
    ),
    Wild(
        "self-attention-cv==1.2.3",
        "MultiHeadSelfAttention",
        "from self_attention_cv import MultiHeadSelfAttention",
        "AttentionSpec(MultiHeadSelfAttention(16, heads=2).eval(), inputs=x, causal=None,"
        " dtypes=['float32'])",
        absent=("torchvision",),
    ),
    Wild(
        "linear-attention-transformer==0.19.1",
        "LinearAttentionTransformerLM(causal=True)",
        "import torch\nfrom linear_attention_transformer import LinearAttentionTransformerLM",
        "AttentionSpec(LinearAttentionTransformerLM(num_tokens=50, dim=16, heads=2, depth=1,"
        " max_seq_len=8, causal=True).eval(), inputs=torch.randint(50, (2, 8)),"
        " causal='top_left', dtypes=['float32'])",
        needs=("local-attention==1.11.2", "hyper-connections==0.4.11",
               "axial-positional-embedding==0.3.12", "linformer==0.2.3",
               "product-key-memory==0.3.0", "colt5-attention==0.11.2"),
    ),
)  # fmt: skip


# In the environment of the packages.


class _Absent:
    """Finds modules that are not installed, and makes empty ones."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return MagicMock(name=spec.name, __path__=[], __spec__=spec, __version__="0.0")

    def exec_module(self, module: Any) -> None:
        """Leave it empty."""


def _without_running(name: str) -> None:
    """Make a package whose modules can be imported, without its own `__init__.py`."""
    parent, _, own = name.rpartition(".")
    if parent:
        paths = [f"{path}/{own}" for path in sys.modules[parent].__path__]
    else:
        paths = list(importlib.util.find_spec(name).submodule_search_locations)
    module = types.ModuleType(name)
    module.__path__ = paths
    sys.modules[name] = module


def names_of(wild: Wild) -> dict[str, Any]:
    """Import what is examined; return the names with which it is declared and called."""
    import torch

    from pytest_attnheat import AttentionSpec, SequenceModel

    def as_is(module: Any) -> Any:
        """Make each projection the identity, three times where it gives three things at once."""
        for one in module.modules():
            if isinstance(one, torch.nn.Linear):
                one.weight.data = torch.eye(one.in_features).repeat(
                    one.out_features // one.in_features, 1
                )
                if one.bias is not None:
                    one.bias.data.zero_()
        return module.double().eval()

    def split(tensor: Any, heads: int) -> Any:
        return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)

    sys.meta_path.insert(0, _Absent(wild.absent))
    for name in wild.inner:
        _without_running(name)
    torch.manual_seed(0)
    names = {
        "AttentionSpec": AttentionSpec, "SequenceModel": SequenceModel, "as_is": as_is,
        "merged": lambda tensor: tensor.transpose(1, 2).flatten(2), "split": split,
        "x": torch.randn(2, 8, 16),
    }  # fmt: skip
    exec(wild.setup, names)
    return names


def examine(wild: Wild) -> dict[str, Any]:
    """Examine an entry, and ask the small call of what is declared wrong."""
    from pytest_attnheat import check_attention

    started = time.process_time()
    names = names_of(wild)
    report = check_attention(eval(wild.declared, names))
    found = {
        "passed": report.passed,
        "failed": [one.name for one in report.failed],
        "found": "" if report.passed else _found(report),
        **(confirm(wild, names) if wild.problem else {}),
    }
    return {**found, "seconds": round(time.process_time() - started, 1)}


def _found(report: Any) -> str:
    """What the report says in one line: its diagnosis, or the first thing that failed."""
    wrong = [one.declaration for one in report.failed if one.declaration]
    diagnosis = report.diagnosis
    if wrong and not (diagnosis is not None and diagnosis.defects):
        return wrong[0]
    if diagnosis is not None and diagnosis.defects:
        return str(diagnosis.sentence)
    first = report.failed[0]
    return f"{first.name}: {first.message.splitlines()[0]}"


def confirm(wild: Wild, names: Mapping[str, Any]) -> dict[str, float]:
    """How far the answer of the small call is from what is documented, and from what loops say."""
    import torch

    problem = getattr(wild_loops, wild.problem)()
    given = {
        "q": torch.tensor(problem.query, dtype=torch.float64),
        "k": torch.tensor(problem.key, dtype=torch.float64),
        "v": torch.tensor(problem.value, dtype=torch.float64),
        "mask": None if problem.mask is None else torch.tensor(problem.mask),
    }
    with torch.no_grad():
        output = eval(wild.call, {**names, **given}).tolist()
    return {
        "off_documented": wild_loops.apart(output, problem.documented),
        "off_loops": wild_loops.apart(output, problem.does(output)),
    }


def as_declared(wild: Wild, result: Mapping[str, Any]) -> bool:
    """Whether what was found is what is declared."""
    if "error" in result or result["passed"] == bool(wild.problem):
        return False
    return not wild.problem or (result["off_documented"] > OFF and result["off_loops"] < SAME)


# Around it.


def pins(entries: Iterable[Wild]) -> list[str]:
    """All that is installed for these, without PyTorch."""
    return sorted({*COMMON, *(pin for one in entries for pin in (one.package, *one.needs))})


def environment(folder: Path, python: str, entries: Iterable[Wild]) -> str:
    """Make the environment, or add to it; return its Python."""
    inside = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    if not Path(inside).exists():
        if python == sys.executable:
            venv.create(folder, with_pip=True)
        else:
            subprocess.run([python, "-m", "venv", str(folder)], check=True)
    install = [inside, "-m", "pip", "--quiet", "--quiet", "install"]
    subprocess.run([*install, TORCH], check=True)
    subprocess.run([*install, "--no-deps", *pins(entries)], check=True)
    return inside


def apart(python: str, wild: Wild) -> dict[str, Any]:
    """Examine an entry in a process of the environment."""
    command = [python, "-W", "ignore", __file__, "--inside", str(WILD.index(wild))]
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    try:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
            capture_output=True, encoding="utf-8", timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {SECONDS} seconds"}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def row(wild: Wild, result: Mapping[str, Any]) -> dict[str, Any]:
    """What the docs keep of an entry."""
    said = ("subject", "declared", "call", "documented", "does", "issue")
    return {
        "package": wild.name,
        "version": wild.version,
        **{name: getattr(wild, name) for name in said if getattr(wild, name)},
        "verdict": "wrong" if wild.problem else "right",
        "date": datetime.date.today().isoformat(),
        "with": f"Python {platform.python_version()}, {TORCH.replace('==', ' ')}",
        **result,
    }


def keep(made: Mapping[str, Any]) -> None:
    """Put a row into the summary, in place of an older one of the same subject."""
    known = json.loads(SUMMARY.read_text(encoding="utf-8")) if SUMMARY.exists() else {"rows": []}
    rows = {f"{one['package']}: {one['subject']}": one for one in (*known["rows"], made)}
    ordered = [rows[wild.key] for wild in WILD if wild.key in rows]
    SUMMARY.write_text(json.dumps({"rows": ordered}, indent=1) + "\n", encoding="utf-8")


def tables(verdict: str) -> Iterator[tuple[str, ...]]:
    """The rows of the docs that have one verdict."""
    for one in json.loads(SUMMARY.read_text(encoding="utf-8"))["rows"]:
        if one["verdict"] != verdict:
            continue
        named = f"{one['package']} {one['version']}, `{one['subject']}`"
        if verdict == "right":
            yield named, f"`{one['declared']}`", one["date"]
            continue
        off = f"{one['off_documented']:.1g}; {_short(one['off_loops'])}"
        yield (named, one["documented"], one["does"], f"`{one['call']}`", off, one["found"],
               one.get("issue", "none found"), one["date"])  # fmt: skip


def _short(number: float) -> str:
    return "0" if number == 0 else f"{number:.0e}"


def main() -> int:
    """Examine what is asked for; return 1 if something is not as it is declared."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="packages; all by default")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-wild", help="where to install")
    parser.add_argument("--python", default=shutil.which("python3.11") or sys.executable)
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside is not None:
        warnings.simplefilter("ignore")
        print(json.dumps(examine(WILD[asked.inside])))
        return 0
    entries = [one for one in WILD if not asked.names or one.name in asked.names]
    unknown = set(asked.names) - {one.name for one in WILD}
    if unknown:
        parser.error(f"no such package: {', '.join(sorted(unknown))}")
    python = environment(asked.venv.resolve(), asked.python, entries)
    results = []
    with ThreadPoolExecutor(2) as pool:
        for wild, result in zip(entries, pool.map(partial(apart, python), entries), strict=True):
            results.append(result)
            said = result.get("error") or result["found"] or "all checks passed"
            verdict = "as declared" if as_declared(wild, result) else "NOT AS DECLARED"
            print(f"{verdict}  {wild.key}\n    {said}", flush=True)
            if as_declared(wild, result):
                keep(row(wild, result))
    different = sum(not as_declared(*pair) for pair in zip(entries, results, strict=True))
    return int(different > 0)


if __name__ == "__main__":
    raise SystemExit(main())
