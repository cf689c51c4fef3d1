"""Transformer Engine's own Python classes train the three families as megatron-core's linear layers do.

The classes are real, those of the package that `make install` brings; what they call in its compiled extension, which
needs CUDA, is computed by a reference in torch. Every layout is compared with megatron-core's own layers in one
process.
"""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig
from megatron_ext.testing.layout_runs import Run, assert_same_run, train_variant
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS
from megatron_ext.testing.transformer_engine.run_with_te import needs_te, run_with_te
from megatron_ext.training.interface.family_interface import Family
from tests.distributed import test_three_families_in_one_model as grown
from tests.distributed.transformer_engine.te_variants import VARIANTS, with_te
from tests.integration.progressive.progressive_run_helpers import stored, write_data

pytestmark = needs_te

FUSED = " fused gradients"


def _train(layout: str, name: str) -> Run:
    parallel = LAYOUTS[layout.removesuffix(FUSED)]
    variant = VARIANTS[name]
    return train_variant(
        replace(variant, model=with_te(variant.model)),
        replace(parallel, gradient_accumulation_fusion=layout.endswith(FUSED)),
    )


CASES = [
    *(
        (layout, name)
        for layout in ("TP2", "TP2+SP", "PP2", "DP2 distributed optimizer")
        for name in VARIANTS
    ),
    *((layout + FUSED, name) for layout in ("TP2+SP", "PP2") for name in ("Llama", "GPT-2", "PLE", "LoRA")),
]


def _train_all() -> dict[tuple[str, str], Run]:
    with pytest.raises(
        ValueError, match="--gradient-accumulation-fusion: the model family 'npt' may use weights"
    ):
        _train("TP2" + FUSED, "NPT")
    return {case: _train(*case) for case in CASES}


@pytest.fixture(scope="module")
def trained() -> list[dict[tuple[str, str], Run]]:
    return run_with_te(_train_all, 2)


@functools.cache
def _single(name: str) -> Run:
    run: Run = run_single(train_variant, VARIANTS[name], LAYOUTS["TP1"])
    return run


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_te_trains_and_saves_as_the_engines_own_layers_do_in_a_single_process(
    trained: list[dict[tuple[str, str], Run]], layout: str, name: str
) -> None:
    assert_same_run([of_rank[layout, name] for of_rank in trained], _single(name))


def _alone(config: ProgressiveRunConfig, tokenizer: Tokenizer) -> list[Family]:
    return []


GROWN = {"progressive": _alone, "PLE, NPT and progressive": grown.others}


def _grow(data: str, folder: str, *flags: str) -> dict[str, tuple[list[float], dict[str, torch.Size]]]:
    """Losses of a run that grows the model by a stack, and the shapes of the tensors in its last checkpoint."""
    found = {}
    for name, families in GROWN.items():
        losses = grown.train(data, f"{folder}/{name}", *flags, make_others=families)
        tensors = stored(f"{folder}/{name}", "progressive_rack")
        found[name] = losses, {key: tensor.shape for key, tensor in tensors.items()}
    return found


def test_a_model_that_grows_trains_with_te_as_with_the_engines_own_layers(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    flags = (*grown.LAYOUTS["TP2"], "--transformer-impl", "transformer_engine")
    own = run_single(_grow, data, str(tmp_path / "own"))
    found = run_with_te(_grow, 2, data, str(tmp_path / "te"), *flags)[0]
    for name, (losses, shapes) in own.items():
        assert len(losses) == 4 and found[name] == (pytest.approx(losses, rel=2e-4), shapes), name
