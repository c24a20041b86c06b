"""Tiny random models of every kind that transformers has, and their outputs under two attentions.

``compare(model_type)`` shrinks the default configuration, builds the model with eager attention and
with this package, gives both the same random weights, and compares outputs, gradients and
generation over batches without padding, padded on either side, and with holes. Outcomes are
``Equal``, ``Refused`` (an error that this package or transformers explains), ``Different``, and
``NotRun`` where the model cannot be made small or does not run under eager attention either.
"""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch

VOCABULARY = 99
SEQLEN = 13
POOLED = 6  # a token in all masks; models that pool the token with the largest number take this one
MAX_PARAMETERS = 100_000_000
TOLERANCE = 1e-4  # of the largest output
GRADIENT_TOLERANCE = 1e-3  # of the largest element of a parameter's gradient


class NotRun(Exception):
    """The model cannot be compared; says why."""


@dataclass
class Outcome:
    """What a comparison found: the model's class, the checks done, and faults if any."""

    model_class: str
    checks: list[str]
    faults: list[str]
    refusals: list[str]
    calls: int = 0  # of this package's attention
    sensitivity: float = 0.0  # of the output to a token, relative to its largest element


# ------------------------------------------------------------------------------------------------
# Configurations

# Names of integers, by what they count. The first rule that matches decides; None: as it is.
RULES = (
    (r"(token_id|token_index|_token_ids?|_id)$", "token"),
    (r"vocab(_size)?$|vocab_size", VOCABULARY),
    (r"^(max_(window|depth|2d)|pretraining_tp)|num_feat_extract_layers", None),
    (
        r"(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|^layers|^depth"
        r"|num_blocks?|resampler_depth|_layers)$",
        2,
    ),
    (r"(sliding_window|sliding_window_size|attention_chunk_size|local_attention)$", 6),
    (
        r"(max_position_embeddings|n_positions|max_seq_len|max_source_positions"
        r"|max_target_positions|n_ctx|context_length|max_sequence_length)$",
        128,
    ),
    (r"(num_key_value_heads|num_kv_heads|n_head_kv|kv_heads|multi_query_group_num)$", "kv heads"),
    (r"(attention_heads|num_heads|n_heads?|heads|num_attn_heads)$", "heads"),
    (r"qk_head_dim", 24),
    (r"qk_rope_head_dim|rotary_dim|rope_dim", 8),
    (r"index_topk$", 5),
    (r"(lora_rank|low_rank_dim|_rank)$", 16),
    (
        r"(head_dim|d_kv|head_size|dim_head|kv_channels|attention_head_size|d_head|head_dim_v)$",
        "head dim",
    ),
    (r"(n_routed_experts|experts|num_total_experts|moe_k|n_routed)$", 4),
    (r"(experts_per_tok|top_k|topk|moe_topk|num_selected_experts|experts_top_k)$", 2),
    (r"(n_group|topk_group|n_shared_experts|num_shared_experts|num_expert_group)$", 1),
    (r"first_k_dense_replace|layer_offset$", 1),
    (r"layer_period$", 2),
    (r"window_size$", 4),
    (r"(image_size|img_size|input_size|pretrain_image_size|tile_size)$", 32),
    (r"patch_size$", 8),
    (
        r"(num_channels|in_channels|in_chans|temporal_patch_size|spatial_merge_size|num_mel_bins"
        r"|feature_size|kernel_size|stride|num_frames|max_2d|type_vocab|relative|expand|ratio"
        r"|scale|downsample|sampling|codebook|conv|n_mels|hop|groups?)",
        None,
    ),
)
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
DERIVED = ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names")
IF_NONE = {  # defaults that a pretrained configuration always sets
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "prediction_length": 3,
    "vocab_size": VOCABULARY,
}
PLANS = {  # heads, key-value heads, head dim, other widths; None: as they are
    "smallest": (lambda v: 4, lambda v: 2, lambda v: 16, lambda v: min(v, 64)),
    "in proportion": (
        lambda v: max(v // 4, 1),
        lambda v: max(v // 4, 1),
        lambda v: max(v // 4, 8),
        lambda v: v if v < 64 else max(v // 16, 16),
    ),
    "layers alone": None,
}


def shrunk_int(name: str, value: int, spare_ids: list[int], plan) -> int:
    """A small value for an integer of a configuration."""
    small = next((small for pattern, small in RULES if re.search(pattern, name)), "width")
    if small == "token":
        return spare_ids.pop() if value >= VOCABULARY and spare_ids else value
    if small is None:
        return value
    if isinstance(small, str):
        kind = ("heads", "kv heads", "head dim", "width").index(small)
        return value if plan is None else min(value, plan[kind](value))
    is_width = plan is None and not re.search(r"vocab|layers?$|depth$|blocks?$|sliding", name)
    return value if is_width else min(value, small)


def layer_count(config: dict[str, Any]) -> int:
    return next((config[name] for name in LAYER_COUNTS if isinstance(config.get(name), int)), 0)


def kept_layers(config: dict[str, Any]) -> list[int]:
    """Numbers of the layers to keep: one of each kind, at least two, at most four."""
    count = layer_count(config)
    lists = [v for v in config.values() if isinstance(v, list) and len(v) == count > 2]
    kinds = {}
    for layer in range(count):
        kinds.setdefault(str([values[layer] for values in lists]), layer)
    kept = sorted(kinds.values())[:4]
    return kept if len(kept) > 1 else [0, 1]


def shrunk_rotary(parameters: dict[str, Any], config: dict[str, Any], plan) -> dict[str, Any]:
    """Rotary parameters for the smaller head dim."""
    small = dict(parameters)
    if "qk_rope_head_dim" in config:
        small.pop("partial_rotary_factor", None)
    sections = small.get("mrope_section", [16, 24, 24])  # many models have these by default
    if plan is not None and ("head_dim" in config or "num_attention_heads" in config):
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        half = int(plan[2](head_dim) * small.get("partial_rotary_factor", 1.0)) // 2
        rest = half // 4
        small["mrope_section"] = [half - (len(sections) - 1) * rest, *[rest] * (len(sections) - 1)]
    return small


def shrunk(config: dict[str, Any], spare_ids: list[int], plan) -> dict[str, Any]:
    """A configuration's dictionary with small numbers."""
    count, kept = layer_count(config), kept_layers(config)
    is_latent = "qk_rope_head_dim" in config  # keys and values of all heads from one vector
    small = {}
    for name, value in config.items():
        if not isinstance(name, str) or name in ("id2label", "label2id"):
            small[name] = value
        elif name in DERIVED:
            continue
        elif name == "per_layer_config":
            layers = {new: value.get(old, value.get(str(old))) for new, old in enumerate(kept)}
            small[name] = {k: shrunk(v, spare_ids, plan) for k, v in layers.items() if v}
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            small[name] = shrunk_rotary(value, config, plan)
        elif isinstance(value, dict):
            small[name] = shrunk(value, spare_ids, plan)
        elif isinstance(value, list) and len(value) == count > 2:
            small[name] = [value[layer] for layer in kept]
        elif value is None and name in IF_NONE:
            small[name] = IF_NONE[name]
        elif isinstance(value, list) and re.search(r"(indices|idx|ids)$", name):
            small[name] = [v for v in value if v < len(kept)] or [len(kept) - 1]
        elif isinstance(value, list) and re.search(r"^depths$|num_heads|attention_heads", name):
            small[name] = [
                2 ** (i + 1) if "heads" in name else min(v, 2) for i, v in enumerate(value)
            ]
        elif isinstance(value, bool) or not isinstance(value, int):
            small[name] = value
        elif name in LAYER_COUNTS:
            small[name] = min(value, len(kept))
        elif is_latent and name == "num_key_value_heads" and plan is not None:
            small[name] = plan[0](value)
        elif is_latent and name == "head_dim":
            small[name] = 8
        else:
            small[name] = shrunk_int(name, value, spare_ids, plan)
        if isinstance(name, str) and re.search("dropout|pdrop|layerdrop", name):
            small[name] = 0.0 if isinstance(value, float) else value
    return small


def small_configs(config_class: type):
    """Small configurations of a class, the smallest first."""
    default = config_class().to_dict()
    for name in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        default.pop(name, None)
    for plan in PLANS.values():
        spare_ids = list(range(61, VOCABULARY - 1))
        try:
            yield config_class.from_dict(shrunk(copy.deepcopy(default), spare_ids, plan))
        except Exception as error:
            yield error


# ------------------------------------------------------------------------------------------------
# Models

MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
)


def model_class(model_type: str) -> type:
    """The class to build for a model type: with a language model's head if there is one."""
    import transformers
    from transformers.models.auto import modeling_auto

    config_class = transformers.CONFIG_MAPPING[model_type]
    for mapping in MAPPINGS:
        name = getattr(modeling_auto, mapping).get(model_type)
        name = name[0] if isinstance(name, (tuple, list)) else name
        cls = getattr(transformers, name or "", None)
        if cls is not None and issubclass(config_class, cls.config_class or object):
            return cls
    raise NotRun("no model class in transformers' mappings")


def randomise(model: torch.nn.Module) -> None:
    """Random weights that make attention far from uniform and keep activations near one."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel() if "embed" not in name else 4
                torch.nn.init.normal_(parameter, 0.0, 1.2 / fan_in**0.5)
            else:
                is_scale = "weight" in name or "scale" in name
                torch.nn.init.normal_(parameter, float(is_scale), 0.1)


def build(cls: type, config: Any, implementation: str) -> torch.nn.Module:
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return cls(config).eval()


def count_parameters(cls: type, config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(cls, config, "eager").parameters())


# ------------------------------------------------------------------------------------------------
# Inputs


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these names that the configuration or a part of it has."""
    parts = [config.to_dict()]
    while parts:
        part = parts.pop(0)
        for name in names:
            if isinstance(part.get(name), (int, list, tuple)):
                return part[name]
        parts.extend(value for value in part.values() if isinstance(value, dict))
    return default


def image(config: Any) -> torch.Tensor:
    size = find(config, "image_size", "img_size", default=64)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = find(config, "num_channels", "in_channels", "in_chans", default=3)
    if not 0 < height * width <= 256**2:
        raise NotRun(f"images of {height} x {width}")
    return torch.randn(2, channels if isinstance(channels, int) else 3, height, width)


def patches(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images as rows of patches, and their grids, as Qwen2-VL's vision model takes them."""
    channels = find(config, "in_channels", "in_chans", "num_channels", default=3)
    area = find(config, "patch_size", default=8) ** 2
    width = channels * area * find(config, "temporal_patch_size", default=1)
    return torch.randn(32, width), torch.tensor([[1, 4, 4], [1, 4, 4]])


def mel(config: Any) -> torch.Tensor:
    """(batch, bins, frames)"""
    bins = find(config, "num_mel_bins", "feature_size", "input_feat_per_channel", default=80)
    return torch.randn(2, bins, 2 * find(config, "max_source_positions", default=128))


def candidate_inputs(model: torch.nn.Module):
    """Random inputs of two rows for a model, in several guesses."""
    torch.manual_seed(2)
    config, main = model.config, model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    inputs = {}
    if main == "input_ids" or ("input_ids" in parameters and main == "pixel_values"):
        inputs["input_ids"] = torch.randint(5, 59, (2, SEQLEN))
        ends = find(config, "eos_token_id")
        inputs["input_ids"][:, POOLED] = ends if isinstance(ends, int) and ends > 59 else 59
    if "decoder_input_ids" in parameters and config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(5, 59, (2, 7))
    for grid in {"grid_thw", "image_grid_thw"} & parameters.keys() if not inputs else ():
        pixels, sizes = patches(config)
        name = "hidden_states" if "hidden_states" in parameters else "pixel_values"
        merged = {"merge_sizes": torch.tensor([1, 1])} if "merge_sizes" in parameters else {}
        yield {name: pixels, grid: sizes, **merged}
    if main == "input_values":
        yield {"input_values": torch.randn(2, 4000), **inputs}
        yield {"input_values": mel(config).transpose(1, 2)[:, : find(config, "max_length")]}
    if main == "input_features" and "input_features_mask" in parameters:
        features = mel(config)
        yield {"input_features": features, "input_features_mask": features[:, 0].bool()}
    if main == "input_features":
        yield {"input_features": mel(config), **inputs}
        yield {"input_features": mel(config).transpose(1, 2), **inputs}
    if main == "input_ids" and not hasattr(model, "logit_scale"):
        yield inputs
    if "pixel_values" in parameters:
        yield {**inputs, "pixel_values": image(config)}
        frames = find(config, "num_frames", default=2)
        yield {**inputs, "pixel_values": image(config)[:, None].repeat(1, frames, 1, 1, 1)}
    if "pixel_values_videos" in parameters:
        frames = find(config, "num_frames", "frames_per_clip", default=2)
        yield {**inputs, "pixel_values_videos": image(config)[:, None].repeat(1, frames, 1, 1, 1)}
    if "input_ids" in inputs and "input_features" in parameters:
        yield {**inputs, "input_features": mel(config)}
    if "input_ids" in inputs and hasattr(model, "logit_scale"):
        yield inputs


def masks(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Padding masks by name; None: no mask."""
    result = {"no mask": None}
    if "input_ids" in inputs and "attention_mask" in inspect.signature(model.forward).parameters:
        positions = torch.arange(SEQLEN)
        left = (positions >= torch.tensor([[0], [5]])).long()
        holes = torch.ones(2, SEQLEN, dtype=torch.long)
        holes[0, 3:6] = 0
        holes[1, 9] = 0
        result |= {"left padding": left, "right padding": left.flip(1), "holes": holes}
    return result


# ------------------------------------------------------------------------------------------------
# Comparing


def floating_outputs(output: Any) -> list[torch.Tensor]:
    """All floating tensors of a model's output but caches, losses and attention weights."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, (list, tuple)):
        return [x for part in output for x in floating_outputs(part)]
    if not hasattr(output, "items"):
        return []
    parts = [v for k, v in output.items() if not re.search("past_key_values|loss|attentions", k)]
    return [x for part in parts for x in floating_outputs(part)]


def valid_part(x: torch.Tensor, mask: Any) -> torch.Tensor:
    """The rows of an output that belong to tokens."""
    if mask is not None and x.dim() >= 2 and x.shape[:2] == mask.shape:
        return x[mask.bool()]
    return x


def call(model, inputs, mask) -> list[torch.Tensor]:
    """All floating outputs."""
    inputs = dict(inputs) if mask is None else {**inputs, "attention_mask": mask}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    torch.manual_seed(3)
    return floating_outputs(model(**inputs))


def run(model, inputs, mask) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Valid outputs, and the parameters' gradients of a random loss of them."""
    model.zero_grad(set_to_none=True)
    outputs = [valid_part(x, mask) for x in call(model, inputs, mask)]
    if not outputs:
        raise NotRun("no floating output")
    differentiable = [x for x in outputs if x.requires_grad]
    torch.manual_seed(4)
    loss = sum((x * torch.randn_like(x)).sum() / x.numel() for x in differentiable)
    if differentiable:
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in outputs], gradients


def relative_difference(actual: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    """Largest difference, relative to the largest expected element; infinite for new NaNs."""
    if actual.shape != expected.shape or not torch.equal(actual.isfinite(), expected.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    if not finite.any():  # or no elements
        return 0.0
    scale = max(float(expected[finite].abs().max()), floor)
    return float((actual - expected)[finite].abs().max()) / scale


def faults_of(actual, expected) -> list[str]:
    """What differs between two results of ``run``."""
    outputs, gradients = actual
    expected_outputs, expected_gradients = expected
    if len(outputs) != len(expected_outputs) or gradients.keys() != expected_gradients.keys():
        return ["other outputs or gradients"]
    faults = []
    for number, (a, e) in enumerate(zip(outputs, expected_outputs)):
        error = relative_difference(a, e, 1e-3)
        if error > TOLERANCE:
            faults.append(f"output {number} differs by {error:.1e}")
    gradient_sizes = [float(g.abs().max()) for g in expected_gradients.values() if g.numel()]
    largest = max(gradient_sizes, default=0.0)
    for name, expected_gradient in expected_gradients.items():
        error = relative_difference(gradients[name], expected_gradient, 1e-3 * largest + 1e-9)
        if error > GRADIENT_TOLERANCE:
            faults.append(f"gradient of {name} differs by {error:.1e}")
    return faults[:3]


def sensitivity(model, inputs, before: torch.Tensor) -> float:
    """How much another early token, or another patch of an image, changes the last output row."""
    name, given = next(iter(inputs.items()))
    changed = given.clone()
    if given.is_floating_point():
        changed[..., : given.shape[-1] // 4] += 1.0
    else:
        changed[:, 4] = 5 + (given[:, 4] + 10) % 54
    with torch.no_grad():
        after = call(model, {**inputs, name: changed}, None)[0]
    if after.shape != before.shape:
        return float("inf")
    last = (slice(None), -1) if after.dim() > 2 else ()
    return relative_difference(after[last], before[last], 1e-3)


def generated(model, inputs, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedily generated tokens, and their scores."""
    result = model.generate(
        **inputs,
        attention_mask=mask,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return result.sequences, torch.stack(result.logits)


REFUSALS = (ImportError, NotImplementedError, TypeError, ValueError)


def attempt(outcome: Outcome, check: str, function, *args) -> Any:
    """The function's result under this package; what it raises goes into the outcome."""
    try:
        return function(*args)
    except REFUSALS as error:
        outcome.refusals.append(f"{check}: {type(error).__name__}: {error}")
    except Exception as error:
        outcome.faults.append(f"{check}: {type(error).__name__}: {error}")
    return None


def reason_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, NotRun) else f"{type(error).__name__}: {lines[0]}"


def small_models(cls: type, config_class: type, reasons: list[str]):
    """(config, model) with eager attention and random weights, for every small configuration."""
    for config in small_configs(config_class):
        try:
            if isinstance(config, Exception):
                raise config
            parameters = count_parameters(cls, config)
            if parameters > MAX_PARAMETERS:
                raise NotRun(f"{parameters / 1e6:.0f} million parameters")
            config.is_decoder = "CausalLM" in cls.__name__ or "LMHead" in cls.__name__
            model = build(cls, config, "eager")
        except Exception as error:
            reasons.append(reason_of(error))
            continue
        randomise(model)
        yield config, model


def eager_model(model_type: str) -> tuple[Any, torch.nn.Module, dict[str, torch.Tensor], Any]:
    """(config, model, inputs, results without mask) for the first configuration that runs."""
    from transformers import CONFIG_MAPPING

    cls = model_class(model_type)
    reasons = []
    try:
        for config, model in small_models(cls, CONFIG_MAPPING[model_type], reasons):
            for inputs in candidate_inputs(model):
                try:
                    return config, model, inputs, run(model, inputs, None)
                except Exception as error:
                    reasons.append(reason_of(error))
            reasons.append(f"{cls.__name__} takes {model.main_input_name!r}")
    except Exception as error:
        reasons.append(reason_of(error))
    raise NotRun(f"{cls.__name__}: " + " / ".join(dict.fromkeys(reasons)))


def compare(model_type: str, implementation: str = "exact_attention") -> Outcome:
    """Compare a model under eager attention and under an implementation.

    Raises NotRun if there is nothing to compare.
    """
    config, eager, inputs, expected = eager_model(model_type)
    outcome = Outcome(type(eager).__name__, [], [], [])
    model = attempt(outcome, "building", build, type(eager), config, implementation)
    if model is None:
        return outcome
    model.load_state_dict(eager.state_dict())
    outcome.sensitivity = sensitivity(eager, inputs, expected[0][0])
    for check, mask in masks(eager, inputs).items():
        try:
            expected = run(eager, inputs, mask)
        except Exception:
            continue  # the model takes no such mask
        actual = attempt(outcome, check, run, model, inputs, mask)
        if actual is not None:
            outcome.checks.append(check)
            outcome.faults += [f"{check}: {fault}" for fault in faults_of(actual, expected)]
    compare_generation(outcome, eager, model, inputs)
    return outcome


def compare_generation(outcome: Outcome, eager, model, inputs) -> None:
    """Compare greedy generation of a left-padded batch, with the model's usual cache."""
    if "input_ids" not in inputs or not getattr(eager, "can_generate", lambda: False)():
        return
    mask = masks(eager, inputs).get("left padding")
    inputs = {"input_ids": inputs["input_ids"]}
    try:
        tokens, scores = generated(eager, inputs, mask)
    except Exception:
        return
    actual = attempt(outcome, "generation", generated, model, inputs, mask)
    if actual is None:
        return
    outcome.checks.append("generation")
    error = relative_difference(actual[1], scores, 1e-3)
    if not torch.equal(actual[0], tokens) or error > TOLERANCE:
        outcome.faults.append(f"generation: scores differ by {error:.1e}")
