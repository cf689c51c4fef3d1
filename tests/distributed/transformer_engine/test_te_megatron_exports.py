"""An export in Megatron-LM's format has every entry that the engine's layers on Transformer Engine require."""

from pathlib import Path

from megatron_ext.testing.transformer_engine.run_with_te import needs_te, run_with_te
from tests.distributed.checkpoint.megatron_checkpoints import CASES
from tests.distributed.checkpoint.megatron_imports import alone, imported, written

NAME = "query and key norms"  # whose norms have entries of their own


def _load(folder: str) -> list[str]:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from megatron_ext.config.groups.parallel_config import ParallelConfig
    from megatron_ext.platform.process_groups import initialize
    from tests.distributed.checkpoint.megatron_checkpoints import engine_config

    initialize(ParallelConfig(), seed=1)
    given = CASES[NAME].all_arguments()
    model = GPTModel(
        config=engine_config(CASES[NAME], ParallelConfig()),
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True),
        vocab_size=given["padded_vocab_size"],
        max_sequence_length=given["max_position_embeddings"],
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = {"model": model.sharded_state_dict(metadata={"dp_cp_group": group})}
    extra = sorted({entry.key for entry in state["model"].values() if entry.key.endswith("_extra_state")})
    model.load_state_dict(dist_checkpointing.load(state, folder)["model"], strict=True)
    return extra


@needs_te
def test_the_engines_layers_on_transformer_engine_load_an_export(tmp_path: Path) -> None:
    from megatron_ext.interop.megatron.megatron_export import export_megatron

    written(CASES[NAME], tmp_path / "theirs")
    imported(tmp_path / "theirs", tmp_path / "ours")
    alone(export_megatron, str(tmp_path / "ours"), tmp_path / "exported")
    (extra,) = run_with_te(_load, 1, str(tmp_path / "exported" / "release"))
    assert "decoder.final_layernorm._extra_state" in extra
    assert "decoder.layers.self_attention.q_layernorm._extra_state" in extra
