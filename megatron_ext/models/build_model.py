"""Builds this rank's model chunks: the base model, and the modules that model families add to its layers and stages.

A rank holds one chunk, or several with the interleaved pipeline schedule.
"""

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision
from megatron_ext.models.auxiliary_inputs import AuxiliaryInputs, AuxiliaryStream
from megatron_ext.models.engine_config import build_transformer_config
from megatron_ext.models.gemma3n.altup import RotaryOfStreams
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.initialization import initialize_parameters
from megatron_ext.models.layer_spec import block_spec, key_value_streams, layer_spec
from megatron_ext.models.model_extension import Extension, StageInfo
from megatron_ext.models.ops.positions.rope_scaling import depends_on_length
from megatron_ext.models.ops.positions.rotary_by_length import RotaryByLength
from megatron_ext.models.ops.rotary import rotary_frequencies
from megatron_ext.models.transformer_engine import check_te, fuse_gradient_accumulation, uses_te
from megatron_ext.platform import process_groups


def padded_vocab_size(vocab_size: int, model: ModelConfig, tensor_parallel_size: int) -> int:
    """Returns the number of rows of the word embedding: the vocabulary size rounded up to a multiple of the divisor.

    The divisor is the least common multiple of `--make-vocab-size-divisible-by` and the tensor-parallel size;
    Megatron-LM uses their product. With the least common multiple, every tensor-parallel size that divides the flag's
    value gives the same number of rows, and so the same checkpoints and initial weights.
    """
    multiple = model.make_vocab_size_divisible_by
    while multiple % tensor_parallel_size:
        multiple += model.make_vocab_size_divisible_by
    return -(-vocab_size // multiple) * multiple


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    vocab_size: int,
    seed: int,
    precision: Precision = "fp32",
    extensions: list[Extension] | None = None,
    fuses_norms: bool = False,
) -> list[GPTModel]:
    """Builds this rank's model chunks on its device, and initializes them.

    Args:
        model: configuration of the base model.
        parallel: the parallel layout; megatron-core's parallel state must already be set up for it.
        vocab_size: the tokenizer's vocabulary size, before padding.
        seed: the initial weights depend only on this seed and the parameters' names.
        precision: precision of parameters and activations.
        extensions: the additions of the model families.
        fuses_norms: whether Transformer Engine's linear layers compute the norms before them, unless a norm's output is
            needed elsewhere. The parameters' names do not change.

    Returns:
        The chunks in the order of their virtual pipeline stages.

    Raises:
        ValueError: two families use the same slot or replace the same linear module of a layer, or declare different
            streams with the same name; or a flag requires Transformer Engine, which is not available.
    """
    extensions = extensions or []
    check_te(model, parallel)
    config = build_transformer_config(model, parallel, precision=precision)
    sequence_parallel_size = parallel.tensor_model_parallel_size if config.sequence_parallel else 1
    streams = _merged_streams(model, config, extensions)
    auxiliary = AuxiliaryInputs(streams, sequence_parallel_size, model.altup_streams or 1)
    # Laurel reads the output of the norm before the attention.
    keeps_norms = model.laurel_rank is not None or _keeps_norms(config, extensions)
    fuses_norms = fuses_norms and uses_te(model) and not keeps_norms
    if parallel.gradient_accumulation_fusion:
        _check_fused_gradients(extensions)
    virtual = config.virtual_pipeline_model_parallel_size
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)
    vocab = padded_vocab_size(vocab_size, model, parallel.tensor_model_parallel_size)
    chunks = []
    for vp_stage in range(virtual or 1):
        chunk = _build_chunk(
            model, config, auxiliary, extensions, vocab, vp_stage if virtual else None, fuses_norms
        )
        if parallel.gradient_accumulation_fusion:
            fuse_gradient_accumulation(chunk)
        initialize_parameters(chunk, seed, model.init_method_std, model.num_layers)
        chunks.append(chunk)
    return chunks


def _keeps_norms(config: TransformerConfig, extensions: list[Extension]) -> bool:
    recomputes = config.recompute_granularity == "selective" and "layernorm" in config.recompute_modules
    return recomputes or any(extension.reads_layers for extension in extensions)


def _check_fused_gradients(extensions: list[Extension]) -> None:
    # A gradient that reaches a weight other than through the weight's own layer would be dropped.
    for extension in extensions:
        if extension.reads_layers:
            raise ValueError(
                f"--gradient-accumulation-fusion: the model family '{extension.name}' may use weights "
                "outside of their layers; omit this flag"
            )


def _merged_streams(
    model: ModelConfig, config: TransformerConfig, extensions: list[Extension]
) -> list[AuxiliaryStream]:
    # Several families may declare the same stream, such as the word embedding; keep one of them.
    streams = [stream for extension in extensions for stream in extension.streams(config)]
    return list(dict.fromkeys([*streams, *key_value_streams(model, config.tensor_model_parallel_size)]))


def _build_chunk(
    model: ModelConfig,
    config: TransformerConfig,
    auxiliary: AuxiliaryInputs,
    extensions: list[Extension],
    vocab_size: int,
    vp_stage: int | None,
    fuses_norms: bool,
) -> GPTModel:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stage = _stage_info(config, vp_stage)
    layers = [
        layer_spec(
            model,
            auxiliary,
            _merged("slot", number, [(e.name, e.slots(config, number)) for e in extensions]),
            _merged("linear layer", number, [(e.name, e.linears(config, number)) for e in extensions]),
            bidirectional=any(extension.bidirectional for extension in extensions),
            fuses_norms=fuses_norms,
            number=number,
            stage=stage,
        )
        for number in stage.layer_numbers
    ]
    # The engine builds learned positions on the default device.
    with process_groups.device():
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(model, layers),
            vocab_size=vocab_size,
            max_sequence_length=model.resolved_max_position_embeddings,
            pre_process=stage.is_first,
            post_process=stage.is_last,
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type=model.position_embedding_type,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            pg_collection=groups,
            vp_stage=vp_stage,
            auxiliary=auxiliary,
            stage=stage,
            sliding_window=model.sliding_window,
            embedding_multiplier=model.embedding_multiplier,
            logit_divisor=model.logit_divisor,
            final_logit_softcapping=model.final_logit_softcapping,
            altup_streams=model.altup_streams,
        )
    scales = model.use_rope_scaling or model.rotary_seq_len_interpolation_factor is not None
    if depends_on_length(model):
        chunk.rotary_pos_emb = RotaryByLength(model, groups.cp)
    elif scales or model.has_two_rotaries or model.rotary_proportion != 1.0:
        chunk.rotary_pos_emb.inv_freq = rotary_frequencies(model)
    if model.altup_streams is not None and model.position_embedding_type == "rope":
        chunk.rotary_pos_emb = RotaryOfStreams(chunk.rotary_pos_emb, model.altup_streams)
    for extension in extensions:
        module = extension.stage_module(config, stage, groups)
        if module is not None:
            chunk.add_stage_module(extension.name, module)
    # The engine builds its position embedding in fp32 whatever `params_dtype` is.
    return chunk.to(device=process_groups.device(), dtype=config.params_dtype)


def _merged(
    kind: str, layer_number: int, contributions: list[tuple[str, dict[str, ModuleSpec]]]
) -> dict[str, ModuleSpec]:
    """Merges the modules that the model families contribute to one layer: slot modules, or linear modules."""
    merged: dict[str, ModuleSpec] = {}
    for family, modules in contributions:
        for name, spec in modules.items():
            if name in merged:
                raise ValueError(
                    f"layer {layer_number}: the model family '{family}' uses the {kind} '{name}', "
                    "which another model family already uses; apply the two families to different layers"
                )
            merged[name] = spec
    return merged


def _stage_info(config: TransformerConfig, vp_stage: int | None) -> StageInfo:
    rank = parallel_state.get_pipeline_model_parallel_rank()
    last_rank = parallel_state.get_pipeline_model_parallel_world_size() - 1
    last_chunk = (config.virtual_pipeline_model_parallel_size or 1) - 1
    chunk = vp_stage or 0
    offset = get_transformer_layer_offset(config, vp_stage, rank)
    count = get_num_layers_to_build(config, vp_stage, rank)
    first = rank == 0 and chunk == 0
    return StageInfo(
        layer_numbers=tuple(range(offset, offset + count)),
        is_first=first,
        is_last=rank == last_rank and chunk == last_chunk,
        owns_replicas=first,
    )
