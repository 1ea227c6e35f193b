"""The fields of a config.json: read by name, held to their kind, and none of them ignored."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from weft.model.config import ModelConfig
from weft.model.parts.ends import MOST_LAYERS
from weft.runtime.errors import UserError, nearest, shown
from weft.storage.foreign import shown_value

# Fields of config.json that change no logit, in three parts: what transformers says of any model and of its files, what it
# says of training, and what of generating text (its PreTrainedConfig and GenerationConfig, versions 4 and 5).
# fmt: off
OF_FILES = [
    'architectures', 'attn_implementation', 'auto_map', 'base_model_name', 'base_model_name_or_path', 'bos_token',
    'bos_token_id', 'cache_implementation', 'chunk_size_feed_forward', 'cls_token_id', 'custom_pipelines',
    'decoder_start_token_id', 'dtype', 'eos_token', 'eos_token_id', 'ep_size', 'finetuning_task', 'id2label',
    'is_composition', 'is_decoder', 'is_llama_config', 'label2id', 'language', 'library_name', 'license', 'mask_token_id',
    'max_sequence_length', 'max_seq_len', 'max_seq_length', 'model_max_length', 'model_type', 'name_or_path', 'num_labels',
    'output_attentions', 'output_hidden_states', 'output_router_logits', 'pad_token', 'pad_token_id', 'prefix',
    'pretraining_tp', 'problem_type', 'quantization_config', 'return_dict', 'sentence_transformers', 'sep_token_id',
    'tags', 'task_specific_params', 'tensor_parallel_size', 'tf_legacy_loss', 'tokenizer_class',
    'tokenizer_model_max_length', 'tokenizer_padding_side', 'torch_dtype', 'torchscript', 'transformers.js_config',
    'transformers_js_config', 'transformers_version', 'transformers_weights', 'unk_token', 'unk_token_id', 'use_bfloat16',
    'use_cache', 'use_flash_attention', 'use_flash_attention_2', 'use_flash_attn', 'use_flash_attn_2',
]
OF_TRAINING = [
    'attention_dropout', 'attention_probs_dropout_prob', 'attn_pdrop', 'aux_loss_alpha', 'classifier_dropout', 'dropout',
    'dropout_rate', 'embd_pdrop', 'embedding_dropout', 'gradient_checkpointing', 'hidden_dropout', 'hidden_dropout_prob',
    'hidden_dropout_rate', 'initializer_factor', 'initializer_range', 'layerdrop', 'neftune_alpha',
    'neftune_noise_alpha', 'resid_pdrop', 'router_aux_loss_coef', 'router_jitter_noise', 'router_z_loss_coef', 'seq_aux',
    'summary_activation', 'summary_first_dropout', 'summary_proj_to_labels', 'summary_type', 'summary_use_proj',
    'training_args', 'z_loss_coefficient',
]
OF_GENERATION = [
    'assistant_confidence_threshold', 'assistant_early_exit', 'assistant_ensemble_weight', 'assistant_lookbehind',
    'bad_words_ids', 'begin_suppress_tokens', 'cache_config', 'compile_config', 'constraints',
    'continuous_batching_config', 'disable_compile', 'diversity_penalty', 'do_sample', 'dola_layers', 'early_stopping',
    'encoder_no_repeat_ngram_size', 'encoder_repetition_penalty', 'epsilon_cutoff', 'eta_cutoff',
    'exponential_decay_length_penalty', 'force_words_ids', 'forced_bos_token_id', 'forced_decoder_ids',
    'forced_eos_token_id', 'generation_config', 'guidance_scale', 'is_assistant', 'length_penalty', 'low_memory',
    'max_cache_len', 'max_length', 'max_matching_ngram_size', 'max_new_tokens', 'max_time', 'min_length',
    'min_new_tokens', 'min_p', 'no_repeat_ngram_size', 'num_assistant_tokens', 'num_assistant_tokens_schedule',
    'num_beam_groups', 'num_beams', 'num_return_sequences', 'output_logits', 'output_scores', 'penalty_alpha',
    'prefill_chunk_size', 'prompt_lookup_num_tokens', 'remove_invalid_values', 'renormalize_logits',
    'repetition_penalty', 'return_dict_in_generate', 'sequence_bias', 'speculation_type', 'stop_strings',
    'suppress_tokens', 'target_lookbehind', 'temperature', 'token_healing', 'top_h', 'top_k', 'top_p', 'typical_p',
    'use_mtp', 'watermarking_config',
]
HARMLESS = frozenset([*OF_FILES, *OF_TRAINING, *OF_GENERATION])
HARMLESS_BEGIN = ('_', 'unsloth_')  # of names that libraries use for themselves
# Fields that change nothing with one value: of models that could have what they speak of, and have not.
IDLE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys([
        'add_cross_attention', 'alibi', 'attention_bias', 'attn_bias', 'is_encoder_decoder', 'lm_head_bias', 'mlp_bias',
        'parallel_attn', 'qk_layernorm', 'rope_interleaved', 'tie_encoder_decoder', 'use_bias',
        'use_bidirectional_attention', 'use_mrope', 'use_mup', 'use_qk_norm', 'use_sliding_window',
    ], (False,)),
    'partial_rotary_factor': (1, 1.0),
    'pruned_heads': ({},),
}
# fmt: on


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field may hold, beside null."""

    told: str
    fits: Callable[[Any], bool]


LARGEST = 2**31 - 1
_whole = lambda value: isinstance(value, int) and not isinstance(value, bool)
_number = lambda value: (_whole(value) or isinstance(value, float)) and math.isfinite(value)
COUNT = Kind(f'a whole number from 1 to {LARGEST}', lambda value: _whole(value) and 1 <= value <= LARGEST)
LAYERS = Kind(f'a whole number from 1 to {MOST_LAYERS}', lambda value: _whole(value) and 1 <= value <= MOST_LAYERS)
INDEX = Kind(f'a whole number from 0 to {LARGEST}', lambda value: _whole(value) and 0 <= value <= LARGEST)
NUMBER = Kind('a number', _number)
POSITIVE = Kind('a number above 0', lambda value: _number(value) and value > 0)
FLAG = Kind('true or false', lambda value: isinstance(value, bool))
TEXT = Kind('a text', lambda value: isinstance(value, str))
TEXTS = Kind('a list of texts', lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value))
INDICES = Kind('a list of whole numbers', lambda value: isinstance(value, list) and all(map(INDEX.fits, value)))
NUMBERS = Kind('a list of numbers', lambda value: isinstance(value, list) and all(map(POSITIVE.fits, value)))
FIELDS = Kind('an object', lambda value: isinstance(value, dict))
# fmt: off
KIND_OF: dict[str, Kind] = {  # of fields by name, which mean the same in every family that has them
    **dict.fromkeys([
        'num_hidden_layers', 'n_layer', 'num_layers', 'num_decoder_layers', 'encoder_layers', 'decoder_layers',
    ], LAYERS),
    **dict.fromkeys([
        'vocab_size', 'decoder_vocab_size', 'hidden_size', 'n_embd', 'd_model', 'num_attention_heads', 'n_head',
        'num_heads', 'encoder_attention_heads', 'decoder_attention_heads', 'num_key_value_heads', 'head_dim', 'd_kv',
        'intermediate_size', 'n_inner', 'd_ff', 'encoder_ffn_dim', 'decoder_ffn_dim', 'moe_intermediate_size',
        'num_experts', 'num_local_experts', 'n_routed_experts', 'num_experts_per_tok', 'experts_per_token', 'n_group',
        'topk_group', 'q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim',
        'max_position_embeddings', 'original_max_position_embeddings', 'initial_context_length', 'n_positions', 'n_ctx',
        'sliding_window_size', 'decoder_sparse_step', 'no_rope_layer_interval', 'shared_expert_intermediate_size',
        'relative_attention_num_buckets', 'relative_attention_max_distance', 'moe_layer_freq', 'full_attn_mod',
        'interpolate_factor',
    ], COUNT),
    **dict.fromkeys([
        'first_k_dense_replace', 'max_window_layers', 'n_shared_experts', 'num_nextn_predict_layers', 'num_mtp_layers',
        'decoder_start_token_id', 'type_vocab_size', 'sliding_window', 'sliding_window_pattern', '_sliding_window_pattern',
    ], INDEX),
    **dict.fromkeys([
        'rms_norm_eps', 'layer_norm_eps', 'layer_norm_epsilon', 'rope_theta', 'rope_local_base_freq', 'factor',
        'attn_factor', 'extrapolation_factor', 'low_freq_factor', 'high_freq_factor',
        'beta_fast', 'beta_slow', 'attention_factor', 'partial_rotary_factor',
        'query_pre_attn_scalar', 'swiglu_limit', 'attn_output_multiplier', 'max_attn_value',
    ], POSITIVE),
    **dict.fromkeys([
        'mscale', 'mscale_all_dim', 'routed_scaling_factor', 'attn_logit_softcapping', 'final_logit_softcapping',
        'embedding_multiplier_scale', 'output_multiplier_scale', 'swiglu_alpha', 'clip_qkv',
    ], NUMBER),
    **dict.fromkeys([
        'tie_word_embeddings', 'attention_bias', 'mlp_bias', 'lm_head_bias', 'norm_topk_prob', 'use_sliding_window',
        'rope_interleave', 'use_qk_norm', 'scale_attn_weights', 'scale_attn_by_inverse_layer_idx',
        'reorder_and_upcast_attn', 'scale_embedding', 'scale_decoder_outputs', 'truncate', 'is_gated_act', 'is_decoder',
        'is_encoder_decoder', 'add_cross_attention', 'use_bidirectional_attention', 'use_mrope', 'normalize_before',
        'share_encoder_decoder_embeddings', 'static_position_embeddings', 'add_bias_logits', 'qkv_bias',
    ], FLAG),
    **dict.fromkeys([
        'hidden_act', 'hidden_activation', 'activation_function', 'feed_forward_proj', 'scoring_func', 'topk_method',
        'rope_type', 'type', 'position_embedding_type', 'model_type',
    ], TEXT),
    **dict.fromkeys(['architectures', 'layer_types'], TEXTS),
    **dict.fromkeys(['mlp_only_layers', 'no_rope_layers'], INDICES),
    **dict.fromkeys(['short_factor', 'long_factor'], NUMBERS),
    **dict.fromkeys([
        'rope_parameters', 'rope_scaling', 'full_attention', 'sliding_attention', 'vision_config', 'text_config',
        'quantization_config',
    ], FIELDS),
}
# fmt: on


# Our fields that stand in no family's table by their names in config.json; of several, the one that the family reads is told.
# fmt: off
PUBLISHED: dict[str, tuple[str, ...]] = {
    'model.attention.kv_heads': (
        'num_key_value_heads', 'num_attention_heads', 'n_head', 'num_heads', 'decoder_attention_heads',
    ),
    'model.attention.head_dim': ('head_dim', 'd_kv'),
    'model.positions.fraction': ('partial_rotary_factor',),
    'model.attention.window': ('sliding_window', 'sliding_window_size'),
    'model.positions.pattern': ('no_rope_layers', 'no_rope_layer_interval'),
    'model.attention.window_pattern': ('layer_types', 'sliding_window_pattern'),
    'model.attention.softcap': ('attn_logit_softcapping', 'max_attn_value'),
    'model.head.softcap': ('final_logit_softcapping',),
    'model.mlp.limit': ('swiglu_limit',),
    'model.attention.scale': ('query_pre_attn_scalar', 'attn_output_multiplier'),
    'model.embedding.tied': ('tie_word_embeddings',),
    'model.mtp.layers': ('num_nextn_predict_layers', 'num_mtp_layers'),
    'model.attention.q_lora_rank': ('q_lora_rank',),
    'model.moe.shared_mlp_dim': ('shared_expert_intermediate_size',),
    'model.moe.pattern': ('mlp_only_layers',),
    'model.encoder.heads': ('encoder_attention_heads', 'num_heads'),
    'model.encoder.mlp_dim': ('encoder_ffn_dim', 'd_ff'),
    'model.encoder.head_dim': ('d_kv',),
    'model.encoder.start_token': ('decoder_start_token_id',),
    'model.positions.scaling': ('rope_scaling', 'rope_parameters'),
    'model.positions.scaling.factor': ('factor',),
    'model.positions.scaling.original_positions': ('original_max_position_embeddings',),
    'model.positions.scaling.short_factors': ('short_factor',),
    'model.positions.scaling.long_factors': ('long_factor',),
}
# fmt: on


class Fields:
    """The fields of a config.json; each is read by name, and one that nothing has read is an error, not ignored."""

    def __init__(self, values: Mapping[str, Any], source: str = 'config.json', path: str = ''):
        self.values, self.source = dict(values), source
        self.path = path  # of a part, dotted, with a dot at its end
        self.seen: set[str] = set()
        self.names: dict[str, str] = {}  # of our fields that a `Table` has

    def error(self, said: str) -> UserError:
        return UserError(f'{self.source}: {said}')

    def __call__(self, name: str, default: Any = ...) -> Any:
        """A field's value; where there is none, or it is null, the default."""
        value = self.value(name)
        if value is None:
            if default is ...:
                raise self.error(f'{name} is missing: this family has no default for it')
            return default
        return value

    def given(self, name: str, default: Any) -> Any:
        """A field's value, which may be null; where there is no field, the default: where null says something of its own."""
        value = self.value(name)
        return value if name in self.values else default

    def value(self, name: str) -> Any:
        """A field's value, or None, after a look at what it is."""
        self.seen.add(name)
        value, kind = self.values.get(name), KIND_OF.get(name)
        if value is not None and kind is not None and not kind.fits(value):
            raise self.error(f'{name} is {shown_value(value)}: it must be {kind.told}')
        return value

    def either(self, names: tuple[str, ...], default: Any = ...) -> Any:
        """A field that has several names; where more than one is there they must agree."""
        found = {name: value for name in names if (value := self.value(name)) is not None}
        for name, value in found.items():
            if value != next(iter(found.values())):
                first = next(iter(found))
                raise self.error(
                    f'{first} is {shown_value(found[first])} and {name} {shown_value(value)}: they mean '
                    'the same, and must agree'
                )
        return next(iter(found.values())) if found else self(names[0], default)

    def only(self, name: str, *works: Any, default: Any = ...) -> Any:
        """A field of which only some values are supported; absent means the first of them, or `default`."""
        value = self(name, works[0] if default is ... else default)
        if value not in works:
            raise self.error(
                f'{name} is {shown_value(value)}, which is not supported; supported: {", ".join(map(repr, works))}'
            )
        return value

    def skip(self, *names: str) -> None:
        """Fields that this family can leave unread: what they say follows from others, or changes no logit."""
        for name in names:
            self.value(name)

    def part(self, name: str) -> 'Fields | None':
        """A field that holds fields."""
        value = self(name, None)
        return None if value is None else Fields(value, f'{self.source}: {name}', f'{self.path}{name}.')

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Errors of a model that was read from these fields name them, where they have names."""
        try:
            yield
        except UserError as error:
            message = re.sub(r'model\.[a-z_]+(\.[a-z_]+)*', self._published, str(error))
            file = '' if self.source in message or message.startswith('mesh.') else f'{self.source}: '
            raise UserError(file + message) from None

    def _published(self, ours: re.Match[str]) -> str:
        # The scaling's fields are read through `part`, of which this does not know.
        names = (self.names[ours[0]],) if ours[0] in self.names else PUBLISHED.get(ours[0], ())
        return next((name for name in names if name in self.seen), names[0] if names else ours[0])

    def finish(self) -> None:
        """Raises UserError for the first field that nothing has read."""
        for name, value in self.values.items():
            idle = any(type(value) is type(one) and value == one for one in IDLE.get(name, ()))
            known = name in self.seen or name in HARMLESS or name.startswith(HARMLESS_BEGIN)
            if not (known or idle or value is None):
                raise self.error(
                    f'{shown(name, 60)} is {shown_value(value)}: this family does not know the field, and it '
                    f'may change the result; --ignore {shown(self.path + name, 60)} passes it over{nearest(name, self.seen)}'
                )


# Fields of config.json that are fields of the model as they are: by name ours, dotted; what an absent one means (`...`: it must
# be there); other names that it has had. Of a field whose values have other names with us, these names stand in the place of
# the default: absent means the first.
Table = Mapping[str, tuple[Any, ...]]


def read_fields(f: Fields, table: Table, **defaults: Any) -> dict[str, Any]:
    """Our fields, dotted, of those in a table; `defaults` count before the table's."""
    found = {}
    for name, (ours, default, *others) in table.items():
        f.names[f'model.{ours}'] = name
        if isinstance(default, Mapping):
            found[ours] = default[f.only(name, *default, default=defaults.get(name, ...))]
        else:
            found[ours] = f.either((name, *others), defaults.get(name, default))
    return found


def write_fields(c: ModelConfig, table: Table) -> dict[str, Any]:
    """The inverse of `read_fields`; without the fields of parts that the model does not have."""
    found = {}
    for name, (ours, default, *_) in table.items():
        part, _, field = ours.rpartition('.')
        owner = getattr(c, part) if part else c
        value = getattr(owner, field, None)
        if isinstance(default, Mapping):
            value = next((named for named, mine in default.items() if mine == value), next(iter(default)))
        if owner is not None:
            found[name] = value
    return found


def passed_over(values: Mapping[str, Any], names: Sequence[str], source: str) -> dict[str, Any]:
    """The fields of a config.json without those named, of which one inside another is `section.field`.

    Raises UserError for a name that is no field there.
    """
    left = dict(values)
    for name in dict.fromkeys(names):
        less = _without(left, name)
        if less is None:
            raise UserError(f'--ignore {shown(name, 60)}: {source} has no such field{nearest(name, _names(values))}')
        left = less
    return left


def _without(section: dict[str, Any], name: str) -> dict[str, Any] | None:
    """A section without the field that a dotted name is; None where there is none. Names of fields may have dots themselves."""
    if name in section:
        return {field: value for field, value in section.items() if field != name}
    for field, value in section.items():
        if isinstance(value, dict) and name.startswith(f'{field}.'):
            inner = _without(value, name.removeprefix(f'{field}.'))
            return None if inner is None else section | {field: inner}
    return None


def _names(section: Mapping[str, Any]) -> Iterator[str]:
    for field, value in section.items():
        yield field
        if isinstance(value, dict):
            yield from (f'{field}.{inner}' for inner in value)
