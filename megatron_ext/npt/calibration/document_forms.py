"""Calibrates low_rank and outer_product, the forms in docs/design, so that the NPT layers are near the base layers.

A delta adds u B to W n, whereas the base layer computes W m = W n + W (m - n). Apart from a scalar per token, m - n is
linear in a (see `key_value`). In these forms, u is a product of two values: one is computed from the target's
input, the other from a. Therefore the calibration makes the first value a scalar per token, and the second one linear
in a, as nearly as the form allows. For this it computes:

    kappa     multiplies the target's input x. gate, up, fc1: n . kappa = 1 / rms(h + a), by least squares.
              down: x . kappa = 1, with kappa = W_down^T q and q . (W_down x) = 1, by least squares
    omega     a . omega = 1, by least squares
    D         the best directions of a, [h, r]: the first columns of A in `factors`

    low_rank          A = D + kappa times a factor, so that n A is mainly n . kappa, and a A is mainly a D. Since a A
                      is small, tanh is nearly linear.  down: A = D, and every column of A_in is kappa
    outer_product     W_down = D, c_a = kappa, W_a_up = 0.  With --np-normalize: W_down = [omega, D], where omega keeps
                      the root mean square of z nearly constant. For down, the last row of W_a_up is kappa, so that the
                      division by rms(W_a_up x) is a division by |x . kappa|.  Requires --np-affine

Then B is fitted to the actual u by least squares. gate, up, fc1: B = R W^T, where u R = m - n. down: u B = a for
--np-residual drop; B is 0 for keep. Neither form can represent the other part of m - n, (rho - 1) n.

The calibration reads the tokens three times: for the `moments`, which give D; for kappa and omega; for R and B.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.calibration.calibration_run import sum_over_ranks
from megatron_ext.npt.calibration.factors import DOWN, FC1, Place, Spectrum, place_of
from megatron_ext.npt.calibration.layer_pass import LayerTokens, visit_layers
from megatron_ext.npt.calibration.least_squares import LeastSquares
from megatron_ext.npt.modules.key_value import centred
from megatron_ext.npt.modules.modulation import LowRankModulation, Modulation, OuterProductModulation
from megatron_ext.npt.modules.npt_feed_forward import FORMS
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.modules.vector_norms import target_weight
from megatron_ext.npt.weights.np_factors import whole_factors
from megatron_ext.training.interface.family_interface import Batch

_SIZE = 0.2
"""Root mean square of the product a A in low_rank: small enough that tanh is nearly linear, and large compared with
Adam's steps.
"""

_RATIO = 10.0
"""Ratio of the part n . kappa to the part n D in the product n A of low_rank."""

_ORTHOGONAL = 2.0
"""Weight of the penalty on a . kappa, with a scaled to the size of n. The form low_rank needs the penalty, because its
A contains kappa and also multiplies a.
"""

_CONSTANT = 3.0
"""Ratio of the component a . omega of z to the norm of the other components, for outer_product."""

Target = tuple[int, str]
"""Number of a layer, from 0, and name of a target."""


@dataclass
class _Reads:
    """Sums over tokens for three least-squares fits, which give kappa and omega of one layer."""

    gain: LeastSquares
    """Fit of 1 / rms(h + a) by a linear map of n."""

    attention: LeastSquares
    """Fit of the constant 1 by a linear map of a."""

    output: LeastSquares
    """Fit of the constant 1 by a linear map of W_down x."""

    @classmethod
    def zeros(cls, size: int) -> "_Reads":
        return cls(*(LeastSquares.zeros(size, 1) for _ in range(3)))

    def add(self, tokens: LayerTokens, has_down: bool) -> None:
        """Adds a micro-batch."""
        attention = tokens.rows(tokens.attention)
        ones = torch.ones_like(attention[:, :1])
        self.gain.add(tokens.rows(tokens.normed), tokens.rows(tokens.inverse_rms))
        self.attention.add(attention, ones)
        if has_down:
            assert tokens.mlp_output is not None
            self.output.add(tokens.rows(tokens.mlp_output), ones)

    @property
    def tokens(self) -> torch.Tensor:
        """Number of tokens, [1]."""
        return self.attention.squares


def calibrate_form(
    chunks: list[GPTModel],
    settings: NPTModuleConfig,
    spectra: Mapping[Place, tuple[Spectrum, int]],
    batches: Callable[[], Iterator[Batch]],
    samples: int,
) -> tuple[dict[str, torch.Tensor], dict[Target, float]]:
    """Returns the calibrated factors of this stage's layers, as whole tensors by key, and their errors. Collective.

    Args:
        chunks: this rank's chunks of the base model, unwrapped, without recomputation.
        settings: form, targets and ranks.
        spectra: for each layer and target of this stage, the directions D of a, and the rank of one component.
        batches: called for each pass; returns this data-parallel rank's micro-batches, from the first on.
        samples: number of samples to use.

    Returns:
        The factors; and, for each layer and target, the squared error of the fit of B, relative to the square of the
        fitted values.
    """
    layers = {number for number, _ in spectra}
    chosen = [layer for chunk in chunks for layer in chunk.decoder.layers if layer.layer_number - 1 in layers]
    reads = {layer.layer_number - 1: _Reads.zeros(layer.config.hidden_size) for layer in chosen}

    def read(number: int, layer: Any, tokens: LayerTokens) -> None:
        reads[number].add(tokens, DOWN in settings.targets)

    visit_layers(chunks, layers, batches(), samples, read, name="calibration, pass 2 of 3")
    sums = chain.from_iterable((of.gain, of.attention, of.output) for of in reads.values())
    _share(chunks, sums)
    parts: dict[Target, Modulation] = {}
    for layer in chosen:
        number = layer.layer_number - 1
        parts |= _with_reads(settings, layer, reads.pop(number), spectra)  # free the sums of this layer
    fits = _fits(chunks, settings, parts, batches, samples)
    errors = _write_outputs(chosen, parts, fits)
    tensors: dict[str, torch.Tensor] = {}
    for (number, target), part in parts.items():
        tensors |= whole_factors(number, target, part)
    return {key: tensor.float() for key, tensor in tensors.items()}, errors


def _share(chunks: list[GPTModel], sums: Iterator[LeastSquares]) -> None:
    parts = chain.from_iterable(of.parts() for of in sums)
    sum_over_ranks(parts, chunks[0].config.sequence_parallel)


@torch.no_grad()
def _with_reads(
    settings: NPTModuleConfig, layer: Any, reads: _Reads, spectra: Mapping[Place, tuple[Spectrum, int]]
) -> dict[Target, Modulation]:
    """Returns the `Modulation` of each target of a layer. All factors are set, except the output factor: it is zero."""
    number, group = layer.layer_number - 1, layer.pg_collection.tp
    parts: dict[Target, Modulation] = {}
    for target in settings.targets:
        found, rank = spectra[place_of(number, target)]
        part = FORMS[settings.np_form](layer.config, layer.pg_collection, settings, target, rank)
        directions = _directions(found, part.total_rank, reads, layer, target)
        if target == DOWN:
            kappa = layer.mlp.linear_fc2.weight.double().t() @ _agreed(reads.output.solve(), group)
        else:
            kappa = _agreed(_gain(reads, isinstance(part, LowRankModulation)), group)
        if isinstance(part, LowRankModulation):
            _fill_low_rank(part, reads, directions, kappa)
        else:
            assert isinstance(part, OuterProductModulation)
            _fill_outer_product(part, directions, kappa, _agreed(reads.attention.solve(), group))
        parts[number, target] = part
    return parts


def _agreed(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns the first rank's values on every rank of the group, so that rounding cannot make ranks differ.
    Collective.
    """
    values = values.contiguous()
    dist.broadcast(values, src=dist.get_global_rank(group, 0), group=group)
    return values


def _directions(found: Spectrum, count: int, reads: _Reads, layer: Any, target: str) -> torch.Tensor:
    """Returns D [h, count], scaled so that each column of a D has a mean square of 1."""
    columns = found.reads[:, :count]
    # The sign of a column is arbitrary but affects low_rank, so make the largest element positive.
    columns = columns * columns.gather(0, columns.abs().argmax(0, keepdim=True)).sign()
    if target != DOWN:
        columns = centred(columns.t(), layer.config).t()
    columns = columns / _rms(reads.attention.inputs, columns, reads.tokens)
    return _agreed(columns, layer.pg_collection.tp)


def _rms(products: torch.Tensor, columns: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the root mean square of each column of x C over the tokens, from the sum of x x^T."""
    squares = (columns * (products @ columns)).sum(0) / tokens
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def _gain(reads: _Reads, orthogonal: bool) -> torch.Tensor:
    """Returns kappa of gate, up and fc1, [h, 1], scaled so that n . kappa has a mean square of 1."""
    penalty = None
    if orthogonal:
        sizes = reads.gain.inputs.trace() / reads.attention.inputs.trace()
        penalty = _ORTHOGONAL * sizes * reads.attention.inputs
    kappa = reads.gain.solve(penalty)
    return kappa / _rms(reads.gain.inputs, kappa, reads.tokens)


def _fill_low_rank(
    part: LowRankModulation, reads: _Reads, directions: torch.Tensor, kappa: torch.Tensor
) -> None:
    if part.reads_ffn:
        part.A.copy_(_SIZE * directions)
        part.A_in.copy_(kappa.expand_as(part.A_in))
        return
    columns = directions + _RATIO * _rms(reads.gain.inputs, directions, reads.tokens) * kappa
    part.A.copy_(_SIZE * columns / _rms(reads.attention.inputs, columns, reads.tokens))


def _fill_outer_product(
    part: OuterProductModulation, directions: torch.Tensor, kappa: torch.Tensor, omega: torch.Tensor
) -> None:
    settings, rank = part.settings, part.rank
    count = settings.num_np_components
    part.c_a.copy_((kappa.t() * part.input_size**0.5).expand_as(part.c_a))
    blocks = []
    for component in range(count):
        columns = directions[:, component::count]
        if settings.np_normalize:
            columns = torch.cat([_CONSTANT * rank**0.5 * omega, columns[:, : rank - 1]], dim=1)
        if part.divides_by_read:
            part.W_a_up[(component + 1) * rank - 1].copy_(part.c_a[component])
        blocks.append(columns)
    part.W_down.copy_(torch.cat(blocks, dim=1))


def _fits(
    chunks: list[GPTModel],
    settings: NPTModuleConfig,
    parts: Mapping[Target, Modulation],
    batches: Callable[[], Iterator[Batch]],
    samples: int,
) -> dict[Place, LeastSquares]:
    """Returns the least-squares sums of u and of the values to fit: m - n, or a for `down`. Collective."""
    fits: dict[Place, LeastSquares] = {}
    readers: dict[Place, Modulation] = {}
    for (number, target), part in parts.items():
        place = place_of(number, target)
        if place in readers or (target == DOWN and settings.np_residual == "keep"):
            continue  # gate and up have the same u
        readers[place] = part
        fits[place] = LeastSquares.zeros(part.total_rank, part.config.hidden_size)

    def add(number: int, layer: Any, tokens: LayerTokens) -> None:
        for kind, x, wanted in (
            (FC1, tokens.normed, tokens.mlp_input.float() - tokens.normed.float()),
            (DOWN, tokens.activated, tokens.attention),
        ):
            if (number, kind) in fits:
                assert x is not None
                u = readers[number, kind].coefficients(x, tokens.attention)
                fits[number, kind].add(tokens.rows(u), tokens.rows(wanted))

    numbers = {number for number, _ in parts}
    visit_layers(chunks, numbers, batches(), samples, add, name="calibration, pass 3 of 3")
    _share(chunks, iter(fits.values()))
    return fits


@torch.no_grad()
def _write_outputs(
    layers: list[Any], parts: Mapping[Target, Modulation], fits: Mapping[Place, LeastSquares]
) -> dict[Target, float]:
    """Sets the output factors; returns the relative squared error of each fit (of m - n, or of a for `down`)."""
    errors: dict[Target, float] = {}
    by_number = {layer.layer_number - 1: layer for layer in layers}
    for (number, target), part in parts.items():
        fit = fits.get(place_of(number, target))
        if fit is None:
            continue
        layer = by_number[number]
        solution = _agreed(fit.solve(), layer.pg_collection.tp)
        errors[number, target] = fit.error_left(solution)
        if target != DOWN:
            solution = solution @ target_weight(target, layer.mlp).double().t()
        part.output_factor.copy_(solution)
    return errors
