"""Facts about one NPT layer: oracle, symmetry, initial values, what is materialised, and that training holds."""

import functools
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.ops.add_product import add_product
from megatron_ext.npt.modules.npt_extension import NPTExtension
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single

HIDDEN, FFN, TOKENS = 32, 96, 64
MODEL = ModelConfig(
    num_layers=1,
    hidden_size=HIDDEN,
    ffn_hidden_size=FFN,
    num_attention_heads=2,
    seq_length=TOKENS,
    swiglu=True,
    disable_bias_linear=True,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    init_method_std=0.2,
)
LOW_RANK = NPTModuleConfig(npt_layers="all", np_rank=16, np_target="gate+up+down")
OUTER = replace(LOW_RANK, np_form="outer_product")
KEY_VALUE = replace(LOW_RANK, np_form="key_value")


def _layer(settings: NPTModuleConfig, model: ModelConfig = MODEL) -> Any:
    initialize(ParallelConfig(), seed=3)
    extensions: list[Any] = [NPTExtension(settings)]
    return build_model(model, ParallelConfig(), vocab_size=32, seed=3, extensions=extensions)[
        0
    ].decoder.layers[0]


def _inputs(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """h and a [s, 1, h]; a of very different sizes, a part of it a function of h."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)) * HIDDEN**-0.5
    hidden = torch.randn(TOKENS, 1, HIDDEN, generator=generator)
    hidden = hidden * torch.exp(torch.randn(TOKENS, 1, 1, generator=generator) / 2)
    attention = hidden @ mixing + torch.randn(TOKENS, 1, HIDDEN, generator=generator)
    return hidden, attention * 0.4


def _oracle_error() -> tuple[float, float]:
    """Of the NPT layer with the oracle's deltas, and with its own untrained ones, against the base layer."""
    layer = _layer(replace(LOW_RANK, np_target="gate+up", np_rank=TOKENS, np_residual="keep"))
    hidden, a = _inputs()
    with torch.no_grad():
        n, m = layer.pre_mlp_layernorm(hidden), layer.pre_mlp_layernorm(hidden + a)
        base = hidden + a + layer.mlp(m)[0]
        untrained = layer.feed_forward(layer, hidden, lambda _, a=a: a, None)
        for target, weight in zip(("gate", "up"), layer.mlp.linear_fc1.weight.chunk(2), strict=True):
            v_a, v_b = n / n.square().sum(-1, keepdim=True), (m - n) @ weight.t()
            # One factor row a token: u picks the token's own v_b.
            picked = torch.eye(TOKENS).view(TOKENS, 1, TOKENS) * (v_a * n).sum(-1, keepdim=True)
            part = getattr(layer.feed_forward, target)
            part.coefficients = lambda x, a, u=picked: u
            part.B.copy_(v_b.squeeze(1))
        found = layer.feed_forward(layer, hidden, lambda _, a=a: a, None)
    return tuple(float((value - base).norm() / base.norm()) for value in (found, untrained))  # type: ignore[return-value]


def test_the_oracle_reproduces_the_base_layer() -> None:
    with_oracle, untrained = run_single(_oracle_error)
    assert with_oracle < 1e-6 < 1e-2 < untrained


def _evenness(settings: NPTModuleConfig) -> float:
    """How far MLP*(n; a) and MLP*(n; -a) are apart, relative to what the delta does."""
    layer = _layer(settings)
    hidden, a = _inputs()
    with torch.no_grad():
        for name, parameter in layer.feed_forward.named_parameters():
            if name.endswith(("c_a", "B", "W_b_up")):
                parameter.normal_(generator=torch.Generator().manual_seed(2))
        n = layer.pre_mlp_layernorm(hidden)
        plus, minus = (layer.feed_forward.modulated_mlp(layer.mlp, n, value) for value in (a, -a))
        return float((plus - minus).norm() / (plus - layer.mlp(n)[0]).norm())


def test_without_the_affine_term_the_outer_product_is_even_in_the_attention_output() -> None:
    """So no weights represent the odd part of a target; the affine term cures it, and low_rank has not the defect."""
    bare = replace(OUTER, np_affine=False)
    assert run_single(_evenness, bare) < 1e-6
    assert run_single(_evenness, replace(bare, np_normalize=False)) < 1e-6
    assert run_single(_evenness, OUTER) > 0.1
    assert run_single(_evenness, LOW_RANK) > 0.1


def _start(settings: NPTModuleConfig) -> tuple[float, dict[str, float]]:
    """Relative size of what the deltas do at initialisation, and the gradients' norms."""
    layer = _layer(settings)
    hidden, a = _inputs()
    n = layer.pre_mlp_layernorm(hidden)
    found, base = layer.feed_forward.modulated_mlp(layer.mlp, n, a), layer.mlp(n)[0]
    found.square().sum().backward()
    gradients = {name: float(p.grad.norm()) for name, p in layer.feed_forward.named_parameters()}
    return float((found - base).detach().norm() / base.detach().norm()), gradients


@pytest.mark.parametrize("components", [1, 4])
@pytest.mark.parametrize("form", [LOW_RANK, OUTER], ids=["low_rank", "outer_product"])
def test_deltas_start_small_with_all_gradients_or_at_zero_with_the_output_factors(
    form: NPTModuleConfig, components: int
) -> None:
    settings = replace(form, num_np_components=components)
    size, gradients = run_single(_start, settings)
    assert 0 < size < 0.05
    assert all(norm > 0 for norm in gradients.values())
    conservative = replace(settings, np_init_strategy="conservative")
    size, gradients = run_single(_start, conservative)
    assert size == 0
    alive = {name for name, norm in gradients.items() if norm > 0}
    assert alive == {name for name in gradients if name.endswith(("B", "W_b_up"))}


STABLE = {
    f"{settings.np_form} {settings.np_target} k={k} {settings.np_residual}": replace(
        settings, np_rank=rank, num_np_components=k
    )
    for form in (LOW_RANK, OUTER)
    for settings in (replace(form, np_target="gate+up", np_residual="keep"), form)
    for rank, k in ((16, 1), (48, 4))
}
STABLE |= {
    f"key_value {target} {residual}": replace(KEY_VALUE, np_target=target, np_residual=residual)
    for target, residual in cast(Any, (("gate+up", "keep"), ("gate+up+down", "drop")))
}
BARE = replace(OUTER, np_rank=48, num_np_components=4, np_normalize=False)


def _train_to_equivalence(cases: dict[str, NPTModuleConfig]) -> dict[str, list[float]]:
    return {name: _losses(settings) for name, settings in cases.items()}


def _losses(settings: NPTModuleConfig, steps: int = 200) -> list[float]:
    """Layer equivalence, relative squared error, on fresh inputs, AdamW at the documents' largest rate times four."""
    layer = _layer(settings)
    for parameter in layer.mlp.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(layer.feed_forward.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        hidden, a = _inputs(step)
        with torch.no_grad():
            target = a + layer.mlp(layer.pre_mlp_layernorm(hidden + a))[0]
        error = layer.feed_forward(layer, hidden, lambda _, a=a: a, None) - hidden - target
        loss = error.square().mean() / target.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.feed_forward.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@functools.cache
def _training() -> dict[str, list[float]]:
    return run_single(_train_to_equivalence, {**STABLE, "bare": BARE})


@pytest.mark.parametrize("case", STABLE)
def test_layer_equivalence_training_falls_and_never_jumps(case: str) -> None:
    losses = _training()[case]
    start = sum(losses[:5]) / 5
    assert sum(losses[-10:]) / 10 < 0.95 * start
    assert max(losses) < 2 * start


def test_the_normalisations_are_what_holds_the_outer_product() -> None:
    losses = _training()["bare"]
    assert max(losses) > 3 * losses[0]


class _Sizes(TorchDispatchMode):
    """Counts the results that own their memory and are as large as a tensor over hidden or FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.large = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [value for value in [*args, *(kwargs or {}).values()] if isinstance(value, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.numel() >= TOKENS * HIDDEN:
            address = result.untyped_storage().data_ptr()
            self.large += address not in {value.untyped_storage().data_ptr() for value in given}
        return result


def _large_tensors(target: Any) -> list[int]:
    """Of a forward pass: base MLP and residual, then NPT's: two forms with one and four components, key_value."""
    counts = []
    tiny = [replace(form, np_target=target, np_rank=2) for form in (LOW_RANK, OUTER)]
    forms = [replace(settings, num_np_components=k) for settings in tiny for k in (1, 4)]
    forms.append(replace(KEY_VALUE, np_target=target, np_rank=2))
    for settings in (None, *forms):
        layer = _layer(settings or LOW_RANK)
        hidden, a = _inputs()
        with torch.no_grad(), _Sizes() as sizes:
            if settings is None:
                output = layer.mlp(layer.pre_mlp_layernorm(hidden))
                layer.mlp_bda(layer.training, False)(output, hidden, layer.hidden_dropout)
            else:
                layer.feed_forward(layer, hidden, lambda _, a=a: a, None)
        counts.append(sizes.large)
    return counts


def test_nothing_of_hidden_or_ffn_width_is_made_beyond_the_mlps_own() -> None:
    """But for one copy of the output, whatever the components: with `down`, where the engine returns a view of it.

    key_value makes h + a, and n with the gain applied.
    """
    base, *others, key_value = run_single(_large_tensors, "gate+up")
    assert base == 5 and others == [base] * 4 and key_value == base + 2
    base, *others, key_value = run_single(_large_tensors, "gate+up+down")
    assert base == 5 and others == [base + 1] * 4 and key_value == base + 3


def _saved_bytes(rank: int) -> dict[int, int]:
    """What the backward pass keeps, by number of components."""
    found = {}
    for k in (1, 4):
        layer = _layer(replace(OUTER, num_np_components=k, np_rank=rank))
        for parameter in layer.mlp.parameters():
            parameter.requires_grad_(False)
        hidden, a = _inputs()
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            kept = layer.feed_forward(layer, hidden, lambda _, a=a: a, None)
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        found[k] = sum(size for address, size in sizes.items() if address not in own)
        del kept
    return found


def test_activations_kept_grow_with_the_rank_of_a_component_alone() -> None:
    rank = 2
    kept = run_single(_saved_bytes, rank)
    # Of a component and target, r wide: a W_down, z, W_a_up x, u, and a few of their size between them, in fp32.
    assert 0 < kept[4] - kept[1] < 3 * 3 * TOKENS * (8 * rank + 8) * 4


def test_a_product_is_added_to_a_part_of_a_tensor_and_to_a_view() -> None:
    generator = torch.Generator().manual_seed(0)
    u, factor = torch.randn(4, 2, 3, generator=generator), torch.randn(3, 5, generator=generator)
    base = torch.randn(4, 2, 12, generator=generator)
    expected = base.clone()
    expected[..., 6:11] += u @ factor
    total = base.clone()
    assert add_product(total, u, factor, start=6).data_ptr() == total.data_ptr()
    torch.testing.assert_close(total, expected)
    viewed = base.clone()
    torch.testing.assert_close(add_product(viewed.view(4, 2, 12), u, factor, start=6), expected)
    assert torch.equal(viewed, base)
