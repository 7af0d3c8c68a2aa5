"""Small random models of transformers, for `capture_zoo.py`: configurations, models, inputs.

A configuration is made small by rules over the names of its fields: few layers, four heads, widths
of 32. Some models want widths that grow from stage to stage, so there are several sets of rules;
the first with which the model runs is taken. What no rule finds stands in `OVERRIDES`.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH = 2, 10
WORDS = range(6, 60)
VOCABULARY = 128
LAYERS, HEADS, KEY_HEADS, WIDTH, HEAD_WIDTH = 2, 4, 2, 32, 8
IMAGE, PATCH, WINDOW, POSITIONS = 32, 8, 4, 64
# A model of more parameters than this is not small.
MOST_PARAMETERS = 150_000_000

Change = Callable[[int], int]


def at_most(most: int) -> Change:
    """A number, or the most that it may be."""
    return lambda number: min(number, most)


def as_token(number: int) -> int:
    """A special token of the small vocabulary: the same for the same."""
    return number if number < WORDS.start else WORDS.stop + number % (VOCABULARY - WORDS.stop)


# The first pattern that a name of a field holds says how its numbers are changed.
RULES: tuple[tuple[str, Change], ...] = tuple(
    (pattern, change)
    for pattern, change in (
        (r"vocab_size$|^num_embeddings$|codebook_size$|^t2u_vocab|vocab_size_per|^n_tokens$",
         at_most(VOCABULARY)),
        (r"(token_id|token_index|token|_id)$", as_token),
        (r"^(image|input|resolution|crop)_?(size|resolution)?$|pretrain_image_size|^spec_size$"
         r"|^max_img_size$", at_most(IMAGE)),
        (r"patch_size$", at_most(PATCH)),
        (r"max_relative|relative_attention|rel_pos_bins|num_buckets", at_most(16)),
        (r"^max_.*positions?(_embeddings)?$|position_embeddings$|^n_positions$|^n_ctx$"
         r"|context_length$|max_seq_len|^max_length$|^max_text|^max_pos_emb$", at_most(POSITIONS)),
        (r"sliding_window(_size)?$|^(local_)?attention_window|^local_attention$"
         r"|attention_chunk_size|^window_size$|keep_window_size|^chunk_size$", at_most(WINDOW)),
        (r"key_value_heads$|kv_heads$|num_key_value_groups", at_most(KEY_HEADS)),
        (r"^linear_num_(key|value)_heads$|^mamba_n_heads$|^linear_num_heads$", at_most(HEADS)),
        (r"heads$|^n_head$|_heads_|attention_heads", at_most(HEADS)),
        (r"head_dim$|^d_kv$|head_size$|dim_head$|^head_dim|^(mamba_)?d_head$|^mamba_d_head$",
         at_most(HEAD_WIDTH)),
        (r"^n_group$|^topk_group$|^n_groups$|first_k_dense|num_expert_group", at_most(1)),
        (r"experts_per_tok|top_?k$|topk|^moe_k$|experts_per", at_most(2)),
        (r"experts$|^num_local_experts$|^moe_num_experts$", at_most(4)),
        (r"layer_interval$|every_n_layers$|layer_period$|sliding_window_pattern|sparse_step$",
         at_most(2)),
        (r"num_kv_shared_layers", at_most(0)),
        (r"layer_offset$|max_window_layers|^num_(mtp|nextn)", at_most(1)),
        (r"(^|_)layers$|^depth$|_depth$|num_blocks$|^n_layer$|^layers$|decoder_blocks$"
         r"|num_hidden_layers|_layers_", at_most(LAYERS)),
        (r"num_queries|num_query|num_latents|num_object|n_latents|latent_query_num|"
         r"num_denoising|proposals$", at_most(6)),
        (r"conv_pos_embedding_groups", at_most(2)),
        (r"conv_pos_embeddings", at_most(16)),
        (r"mel_bins|mel_dim|num_filters", at_most(16)),
        (r"kernel|stride|padding|num_channels|^in_channels$|audio_channels|rate$|ratio$|factor$"
         r"|bins$|loss|threshold|num_labels|_len$|^time_|^mask_|max_distance|temperature|_seconds"
         r"|sampling|num_frames|initial_channel|vocab|bytes|index_topk|num_points|_width$|_height$",
         lambda number: number),
        (r"hidden|embed|dim|size|channels|d_model|d_ff|inner|units|rank|width|ffn|n_embd|d_inner"
         r"|dff|d_state|state|features|out$|planes|nf$", at_most(WIDTH)),
    )
)  # fmt: skip


def _wide(number: int) -> int:
    """An eighth of a width; of heads nothing is taken."""
    return max(number // 8, 1) if number >= 64 else number


def _unless_width(name: str, change: Change, pattern: str) -> Change:
    if "hidden|embed" in pattern:
        return _wide
    return (lambda n: n) if "heads" in pattern else _wide if "head_dim" in pattern else change


def rules_for(kind: str) -> list[tuple[str, Change]]:
    """The rules of a set: all; an eighth of each width; widths as they are."""
    if kind == "constant":
        return list(RULES)
    if kind == "eighth":
        return [(p, _unless_width("", c, p)) for p, c in RULES]
    skipped = ("hidden|embed", "heads", "head_dim", "experts", "conv_pos", "mel_bins")
    return [(p, c) for p, c in RULES if not any(one in p for one in skipped)]


KINDS = ("constant", "eighth", "wide")


def changed(name: str, value: Any, rules: list[tuple[str, Change]], layers: int) -> Any:
    """The value of a field, made small."""
    if isinstance(value, bool) or value is None:
        return value
    if type(value) is int:
        for pattern, change in rules:
            if re.search(pattern, name):
                return change(value) if value > 0 else value
        return value
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(one, str) for one in value) and len(value) > layers:
            return _kinds_of(list(value), layers)
        if all(type(one) is int for one in value) and len(value) > 0:
            made = [changed(name, one, rules, layers) for one in value]
            if name in ("depths", "num_block_repeats"):
                made = [min(one, 2) for one in made]
            # Widths that grow stay as they are: stages depend on each other.
            grows = len(set(value)) > 1 and not re.search("token|depths|image|window", name)
            return type(value)(list(value) if grows else made)
    return value


def _sections(value: Any, half: int) -> Any:
    """Parameters of rotations, whose sections of pictures share half of the width of a head."""
    if not isinstance(value, dict):
        return value
    made = {name: _sections(one, half) for name, one in value.items()}
    for name in [one for one in made if one == "mrope_section"]:
        many = len(made[name])
        made[name] = [half - (many - 1) * (half // many)] + [half // many] * (many - 1)
    return made


def _kinds_of(kinds: list[str], layers: int) -> list[str]:
    distinct = list(dict.fromkeys(kinds))
    return (distinct + [kinds[-1]] * layers)[: max(layers, min(len(distinct), 4))]


def config_of(kind: Any, rules: str, override: dict[str, Any] | None = None) -> Any:
    """A small configuration of a class."""
    default = kind()
    return kind(**_changes(default, rules_for(rules), override or {}))


def _changes(default: Any, rules: list[tuple[str, Change]], override: dict[str, Any]) -> Any:
    """The fields of a configuration that are not as by default."""
    made: dict[str, Any] = {}
    subs = set(getattr(type(default), "sub_configs", None) or {})
    names = {f.name for f in dataclasses.fields(default) if _known(default, f.name)} | {
        name for name, value in vars(default).items() if name in subs
    }
    layers = max(LAYERS, len(set(getattr(default, "layer_types", None) or ())))
    deep = [n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in names]
    many = getattr(default, deep[0], 0) if deep else 0
    for name in sorted(names, key=lambda one: (one in _SHARED, one)):
        value = getattr(default, name, None)
        own = override.get(name)
        if name in subs and value is not None and dataclasses.is_dataclass(value):
            given = own if isinstance(own, dict) else {}
            inner = _changes(value, rules, given)
            made[name] = type(value)(**inner)
        elif name in override:
            made[name] = own
        elif name in deep:
            made[name] = min(value, layers) if type(value) is int else value
        elif name in _KEPT:
            continue
        elif value is None and name in _IF_NONE:
            made[name] = _IF_NONE[name]
        else:
            new = changed(name, value, rules, layers)
            if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
                part = value.get("partial_rotary_factor") or 1
                new = _sections(value, int(HEAD_WIDTH * part) // 2)
            per_layer = isinstance(value, (list, tuple)) and many and len(value) == many
            if per_layer and not all(isinstance(one, str) for one in value):
                new = type(value)(list(value)[:layers])
            if name in _SHARED and value == getattr(default, _SHARED[name], None):
                new = made.get(_SHARED[name], value)  # Each head has keys of its own.
            if new != value:
                made[name] = new
    made |= {name: value for name, value in override.items() if name not in made}
    if "initializer_range" in names and isinstance(getattr(default, "initializer_range", 0), float):
        made["initializer_range"] = 0.2
    return made


# Fields that a model needs, though they have no default.
_IF_NONE = {
    "prediction_length": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "topk_group": 1, "n_group": 1, "moe_topk": 2,
}  # fmt: skip
# How many heads have keys of their own, and how many have queries; in the order of their names.
_SHARED = {
    "num_key_value_heads": "num_attention_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
}
_KEPT = {
    "architectures", "id2label", "label2id", "num_labels", "chunk_size_feed_forward",
    "transformers_version", "dtype", "problem_type",
}  # fmt: skip


def _known(config: Any, name: str) -> bool:
    """Whether a field has one value; some differ from layer to layer."""
    try:
        getattr(config, name, None)
    except Exception:  # A class of its own says so.
        return False
    return True


# The class of a type.


def classes_of(name: str, config: Any) -> list[Any]:
    """The classes of models that take a configuration, the plainest first."""
    from transformers.models.auto import modeling_auto as auto

    kind = type(config)
    tables = ["MODEL_MAPPING_NAMES"] + [
        t for t in dir(auto) if t.endswith("MAPPING_NAMES") and t.startswith("MODEL_FOR")
    ]
    wanted: list[str] = []
    for table in tables:
        listed = getattr(auto, table).get(name, ())
        wanted += [listed] if isinstance(listed, str) else list(listed)
    package = kind.__module__.rpartition(".")[0]
    found = []
    for module in _modelings(package):
        models = [
            one for one in vars(module).values()
            if inspect.isclass(one) and issubclass(one, nn.Module)
            and getattr(one, "config_class", None) is kind and one.__module__ == module.__name__
            and "forward" in vars(one) and not one.__name__.endswith("PreTrainedModel")
        ]  # fmt: skip
        listed = [one for one in vars(module).values() if getattr(one, "__name__", "") in wanted]
        listed.sort(key=lambda one: wanted.index(one.__name__))
        models.sort(key=lambda one: (len(inspect.signature(one.forward).parameters), one.__name__))
        found += listed + [one for one in models if "For" not in one.__name__] + models
    return list(dict.fromkeys(found))


def _modelings(package: str) -> Iterator[Any]:
    import pkgutil

    folder = importlib.import_module(package)
    for module in pkgutil.iter_modules(folder.__path__):
        if module.name.startswith("modeling_") and "_flax" not in module.name:
            yield importlib.import_module(f"{package}.{module.name}")


def model_of(kind: Any, config: Any, attention: str, seed: int = 0) -> nn.Module:
    """A model with random weights, of which none is far smaller than the others."""
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    model: nn.Module = kind._from_config(copy.deepcopy(config), attn_implementation=attention)
    return model.float().eval()


QUERIES_AND_KEYS = re.compile(
    r"(^|[._])(q|k|qk|qkv|query|key|q_?proj|k_?proj|qkv_?proj|Wqkv|c_attn|to_q|to_k|query_key_value"
    r"|in_proj|in_proj_weight|wq|wk|q_lin|k_lin|q_[ab]_proj|kv_[ab]_proj\w*|w?_?q\w*|w?_?k\w*)$"
)


@torch.no_grad()
def strengthen(model: nn.Module, seed: int = 0) -> None:
    """Draw the weights of all projections anew, those of queries and keys larger."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        gain = 1.6 if QUERIES_AND_KEYS.search(name) else 1.0
        for own, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point() or parameter.is_meta:
                continue
            if not bool(parameter.isfinite().all()):
                parameter.zero_()
            kind = type(module).__name__
            matrix = parameter.ndim >= 2 and (
                isinstance(module, nn.Linear | nn.MultiheadAttention) or "Conv" in kind
            )
            if matrix:
                inner = parameter.shape[0] if kind == "Conv1D" else parameter[0].numel()
                strong = 1.6 if own == "in_proj_weight" else gain
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * strong * inner**-0.5)
            elif isinstance(module, nn.Embedding) and parameter.numel() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif (
                parameter.ndim > 0
                and float(parameter.std(unbiased=False)) == 0
                and (float(parameter.flatten()[0]) == 0 and parameter.ndim > 1)
            ):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


# What a model is called with.


def inputs_of(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Sets of inputs that a model may take, one after the other."""
    accepted = inspect.signature(model.forward).parameters
    every = {k: v for k, v in all_inputs(model, config).items() if k in accepted}
    text = {"input_ids", "attention_mask", "bbox", "token_type_ids"}
    decoding = {"decoder_input_ids", "decoder_attention_mask"}
    seen: list[set[str]] = []
    needed = {n for n, p in accepted.items() if p.default is inspect.Parameter.empty
              and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}  # fmt: skip
    picture = {k for k in every if k not in text | decoding}
    both = text | picture | decoding
    for names in (
        text | decoding | needed, both, {"pixel_values"} | needed, picture | needed, text | needed,
        decoding | picture | needed, needed, {"input_values", "attention_mask"},
        {"input_features", "attention_mask"} | decoding, {"inputs_embeds", "attention_mask"},
        {"input_features"} | decoding,
    ):  # fmt: skip
        chosen = {k for k in names if k in every}
        if chosen and chosen not in seen:
            seen.append(chosen)
            yield {k: every[k] for k in every if k in chosen}


def _found(config: Any, *names: str) -> Any:
    """The first of some fields that a configuration, or one within it, has."""
    for name in names:
        value = getattr(config, name, None)
        if value not in (None, []):
            return value
    for sub in getattr(type(config), "sub_configs", None) or {}:
        inner = getattr(config, sub, None)
        if inner is not None and dataclasses.is_dataclass(inner):
            value = _found(inner, *names)
            if value is not None:
                return value
    return None


def _first(value: Any, default: int) -> int:
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if type(value) is int else default


def all_inputs(model: nn.Module, config: Any) -> dict[str, Any]:
    """Every input that is known, by its name; sentences are padded on the right."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    vocabulary = min(
        _first(_found(config, "vocab_size", "text_vocab_size"), VOCABULARY), WORDS.stop
    )
    low = min(WORDS.start, max(vocabulary - 2, 0))
    ids = torch.randint(low, max(vocabulary, low + 1), (BATCH, LENGTH), generator=generator)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    pad = _found(config, "pad_token_id")
    if type(pad) is int and 0 <= pad < vocabulary:
        ids = torch.where(mask.bool(), ids, pad)
    size = _found(config, "image_size", "img_size", "input_size", "crop_size")
    sides = list(size) if isinstance(size, (list, tuple)) else [_first(size, IMAGE)] * 2
    sides = (sides * 2)[:2]
    channels = _first(_found(config, "num_channels", "in_channels", "in_chans"), 3)
    frames = _first(_found(config, "num_frames", "frames_per_clip"), 4)
    patch = _first(_found(config, "patch_size"), PATCH)
    temporal = _first(_found(config, "temporal_patch_size"), 1)
    mel = _first(_found(config, "num_mel_bins", "feature_size", "input_feat_per_channel",
                        "input_dim"), 16)  # fmt: skip
    time = _first(_found(config, "max_source_positions"), 32) * 2
    width = _first(_found(config, "hidden_size", "d_model", "n_embd", "dim"), WIDTH)
    video = "video" in type(config).__name__.lower() or "num_frames" in vars(config) or (
        "tubelet_size" in vars(config)
    )  # fmt: skip
    picture = draw(BATCH, frames, channels, *sides) if video else draw(BATCH, channels, *sides)
    boxes = torch.randint(0, 20, (BATCH, LENGTH, 4), generator=generator).sort(-1).values
    boxes = boxes[..., [0, 1, 2, 3]]
    grid = torch.tensor([[1, 4, 4]] * BATCH)
    audio = draw(BATCH, 3200)
    first = str(getattr(model, "main_input_name", ""))
    features = draw(BATCH, time, mel)
    if any(one in type(model).__name__.lower() for one in ("whisper", "qwen2audio", "voxtral")):
        features = features.mT.contiguous()
    patches = draw(BATCH * 16, channels * temporal * patch * patch)
    known: dict[str, Any] = {
        "input_ids": ids, "attention_mask": mask, "bbox": boxes,
        "token_type_ids": torch.zeros_like(ids),
        "decoder_input_ids": ids[:, :7].clone(),
        "pixel_values": picture, "pixel_values_videos": draw(BATCH, frames, channels, *sides),
        "input_values": audio, "input_features": features,
        "inputs_embeds": draw(BATCH, LENGTH, width), "hidden_states": draw(BATCH, LENGTH, width),
        "grid_thw": grid, "image_grid_thw": grid,
        "pixel_mask": torch.ones(BATCH, *sides, dtype=torch.long),
        "encoder_hidden_states": draw(BATCH, LENGTH, width),
        "query_embeds": draw(BATCH, 6, width),
    }  # fmt: skip
    if "grid_thw" in inspect.signature(model.forward).parameters:
        known["hidden_states"] = known["pixel_values"] = patches
    if first == "input_values":
        known["attention_mask"] = torch.ones(BATCH, audio.shape[1], dtype=torch.long)
        known["attention_mask"][1, -1000:] = 0
    if first == "input_features":
        known["attention_mask"] = torch.ones(BATCH, time, dtype=torch.long)
        known["attention_mask"][1, -8:] = 0
    return known


# What the rules do not find: fields of the configuration by type, and inputs.
OVERRIDES: dict[str, dict[str, Any]] = {
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1],
              "layer_types": ["linear_attention", "full_attention"]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "bridgetower_vision_model": {"hidden_size": 128},
}  # fmt: skip


def _spectrogram(config: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, config.max_length, config.num_mel_bins)}


def _series(config: Any) -> dict[str, Any]:
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": torch.randn(BATCH, past), "past_observed_mask": torch.ones(BATCH, past),
        "past_time_features": torch.randn(BATCH, past, config.num_time_features),
        "future_values": torch.randn(BATCH, config.prediction_length),
        "future_time_features": torch.randn(
            BATCH, config.prediction_length, config.num_time_features),
    }  # fmt: skip


INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "audio-spectrogram-transformer": _spectrogram, "autoformer": _series, "informer": _series,
    "time_series_transformer": _series,
}  # fmt: skip
