"""The CPU adapter: where it refuses, what it gives, and random streams of tensor-parallel ranks."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.platform import cpu
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS, TINY, VOCAB_SIZE, train_tiny, with_full_recompute


def test_adapter_refuses_a_machine_with_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stream, empty = torch.cuda.Stream, torch.empty
    with pytest.raises(RuntimeError, match="must not be installed: this machine has a CUDA device"):
        cpu.install()
    assert torch.cuda.Stream is stream and torch.empty is empty


def test_import_of_the_package_patches_nothing() -> None:
    code = (
        "import torch; before = (torch.cuda.Stream, torch.empty, torch.Tensor.to, torch.cuda.current_device);"
        "import megatron_ext.platform.process_groups, megatron_ext.models.build_model;"
        "import megatron_ext.training.engine.training_step;"
        "assert before == (torch.cuda.Stream, torch.empty, torch.Tensor.to, torch.cuda.current_device)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_cuda_calls_mean_the_cpu_after_installation() -> None:
    for what, holds in run_single(_installed_calls).items():
        assert holds, what


def _installed_calls() -> dict[str, bool]:
    cpu.install()
    empty = torch.empty
    cpu.install()
    state = torch.cuda.get_rng_state()
    first = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    again = torch.rand(4, device=torch.device("cuda", 0))
    torch.cuda.manual_seed(7)
    seeded = torch.rand(4)
    torch.cuda.synchronize()
    event = torch.cuda.Stream().record_event()
    with torch.cuda.stream(torch.cuda.current_stream()) as stream:
        stream.wait_event(event)
    with torch.device("meta"):
        nowhere = torch.empty(2)
    module = torch.nn.Linear(2, 2).cuda().to("cuda").to(device=torch.device("cuda"))
    return {
        "a second installation changes nothing": torch.empty is empty,
        "torch still says that there is no GPU": not torch.cuda.is_available(),
        "the current device is the CPU": torch.cuda.current_device() == torch.device("cpu"),
        "factories put cuda tensors on the CPU": first.device.type == "cpu",
        "tensors move to cuda by staying": first.cuda() is first and first.to("cuda").device.type == "cpu",
        "modules move to cuda by staying": module.weight.device.type == "cpu",
        "a default device counts": nowhere.is_meta,
        "the random state can be restored": torch.equal(first, again),
        "seeding cuda seeds the CPU": torch.equal(
            seeded, torch.rand(4, generator=torch.Generator().manual_seed(7))
        ),
        "streams are classes": isinstance(torch.cuda.current_stream(), torch.cuda.Stream),
        "events have happened": event.query(),
        "types carry the engine's names": torch.ones(1).bfloat16().type() == "torch.cuda.BFloat16Tensor",
        "a type can still be asked for": torch.ones(1).type(torch.float64).dtype == torch.float64,
    }


def test_random_streams_differ_over_tensor_ranks_only_where_they_must() -> None:
    default, forked, after = zip(*run_distributed(_random_streams, 2, LAYOUTS["TP2"]), strict=True)
    assert torch.equal(default[0], default[1])
    assert not torch.equal(forked[0], forked[1])
    assert torch.equal(after[0], after[1]), "the default stream has moved"


def test_random_streams_differ_over_pipeline_stages() -> None:
    default, forked, _ = zip(*run_distributed(_random_streams, 2, LAYOUTS["PP2"]), strict=True)
    assert not torch.equal(default[0], default[1])
    assert not torch.equal(forked[0], forked[1])


def _random_streams(parallel: ParallelConfig) -> list[torch.Tensor]:
    initialize(parallel, seed=1)
    default = torch.rand(8)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        forked = torch.rand(8)
    return [default, forked, torch.rand(8)]


DROPOUT = replace(TINY, hidden_dropout=0.3, attention_dropout=0.3)


@pytest.mark.parametrize("layout", ["TP2", "TP2+SP"])
def test_dropout_masks_of_attention_heads_differ_over_tensor_ranks(layout: str) -> None:
    """Both ranks run attention on equal heads of ones: what differs is the mask."""
    first, second = run_distributed(_attention_of_equal_heads, 2, LAYOUTS[layout])
    assert not torch.equal(first, second)


def _attention_of_equal_heads(parallel: ParallelConfig) -> torch.Tensor:
    initialize(parallel, seed=1)
    # Under sequence parallelism the engine runs the attention inside the rank's own stream; so does this.
    chunk = build_model(DROPOUT, parallel, vocab_size=VOCAB_SIZE, seed=1)[0].train()
    query, key = torch.ones(8, 2, 2, 8), torch.ones(8, 2, 1, 8)
    attention = chunk.decoder.layers[0].self_attention.core_attention
    if not parallel.sequence_parallel:
        return attention(query, key, key, None).detach()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        return attention(query, key, key, None).detach()


def test_dropout_training_keeps_replicated_activations_and_weights_equal_over_tensor_ranks() -> None:
    first, second = run_distributed(_replicated_values, 2, LAYOUTS["TP2"])
    assert first.keys() == second.keys() and len(first) > DROPOUT.num_layers
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    evaluated, trained = first["without dropout"], first["layer 4"]
    assert not torch.allclose(evaluated, trained), "nothing was dropped"


def _replicated_values(parallel: ParallelConfig) -> dict[str, torch.Tensor]:
    """Outputs of all layers in training, and gradients of replicated parameters."""
    initialize(parallel, seed=1)
    chunk = build_model(DROPOUT, parallel, vocab_size=VOCAB_SIZE, seed=1)[0].train()
    found: dict[str, torch.Tensor] = {}
    for layer in chunk.decoder.layers:
        layer.register_forward_hook(
            lambda module, _, output: found.update({f"layer {module.layer_number}": output[0].detach()})
        )
    tokens = torch.arange(32).view(2, 16)
    positions = torch.arange(16).expand_as(tokens)
    chunk(tokens, positions, None, labels=tokens).mean().backward()
    for name, parameter in chunk.named_parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            assert parameter.grad is not None
            found[f"gradient of {name}"] = parameter.grad
    trained = dict(found)
    chunk.eval()(tokens, positions, None)
    return {**trained, "without dropout": found["layer 4"]}


def test_recomputation_draws_the_same_dropout_masks() -> None:
    """Full recomputation changes neither losses nor gradients of a training with dropout, at tensor parallel 2."""
    plain = run_distributed(train_tiny, 2, LAYOUTS["TP2"], 3, list, DROPOUT)[0]
    recomputed = run_distributed(train_tiny, 2, with_full_recompute(LAYOUTS["TP2"]), 3, list, DROPOUT)[0]
    assert recomputed.losses == plain.losses
    assert recomputed.grad_norms == pytest.approx(plain.grad_norms, rel=1e-6)


def test_parallel_state_follows_the_layout() -> None:
    for rank, sizes in enumerate(run_distributed(_sizes, 4, LAYOUTS["TP2xPP2"])):
        assert sizes == (2, 2, 1, rank % 2, rank // 2)


def _sizes(parallel: ParallelConfig) -> tuple[int, ...]:
    initialize(parallel, seed=1)
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
