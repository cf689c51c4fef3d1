"""Converts the NP factors of a model to whole tensors and back, in any parallel layout.

The NP factors are the trained parameters of NPT layers, described in `modulation`. Each tensor has one of these keys:

    layer_{i}_np.{target}.{name}            i is the layer's index in the whole model, from 0
    layer_{i}_np.{target}.{name}.{k}        if a target has several components: one tensor for each component k

The factor c_a of a component is a vector; every other factor is a matrix.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.modulation import Modulation
from megatron_ext.npt.modules.npt_layers import np_modules
from megatron_ext.platform.collectives import merge_over_ranks

_ROWS = ("B", "W_a_up", "W_b_up", "c_a")
"""Factors whose components are concatenated along dimension 0; all other factors are concatenated along dimension
1.
"""
_SHOWN = 5
"""An error message lists at most this many differences of each kind."""


def gather_np_factors(chunks: list[GPTModel]) -> dict[str, torch.Tensor]:
    """Returns all NP factors of the model, as whole tensors by key; every rank gets all of them, on the CPU.

    Collective over tensor- and pipeline-parallel ranks. `chunks` are this rank's model chunks, unwrapped.
    """
    local: dict[str, torch.Tensor] = {}
    for number, module in np_modules(chunks).items():
        for target, part in module.modulations.items():
            local |= whole_factors(number, target, part)
    group = parallel_state.get_pipeline_model_parallel_group()
    return sorted_by_layer(merge_over_ranks(local, group))


def whole_factors(number: int, target: str, part: Modulation) -> dict[str, torch.Tensor]:
    """Returns the factors of one target of a layer, as whole tensors by key, on the CPU; collective if they are split.

    Args:
        number: index of the layer, from 0.
        target: `gate`, `up`, `down` or `fc1`.
        part: this rank's factors of the target, possibly split over the ranks.
    """
    prefix = f"layer_{number}_np.{target}"
    return {
        key: tensor.cpu().clone()
        for name, parameter in part.named_parameters()
        for key, tensor in _components(f"{prefix}.{name}", part, name, _whole(part, name, parameter.detach()))
    }


def load_np_factors(chunks: list[GPTModel], tensors: dict[str, torch.Tensor]) -> None:
    """Loads the factors that `gather_np_factors` returned. Collective over pipeline-parallel ranks.

    Args:
        chunks: this rank's model chunks, unwrapped.
        tensors: the whole factors by key.

    Raises:
        ValueError: a key is missing or unknown, or a tensor has the wrong shape. The message lists the differences, and
            nothing is loaded.
    """
    places = {
        key: (part, name, place)
        for prefix, part, name, parameter in _parameters(chunks)
        for key, place in _components(prefix, part, name, parameter.detach())
    }
    shapes = {key: _whole_shape(part, name, place) for key, (part, name, place) in places.items()}
    expected = merge_over_ranks(shapes, parallel_state.get_pipeline_model_parallel_group())
    _check({key: tuple(tensor.shape) for key, tensor in tensors.items()}, expected)
    for key, (part, name, place) in places.items():
        place.copy_(_local(part, name, tensors[key], place))


def _parameters(chunks: list[GPTModel]) -> Iterator[tuple[str, Modulation, str, torch.nn.Parameter]]:
    for number, module in np_modules(chunks).items():
        for target, part in module.modulations.items():
            for name, parameter in part.named_parameters():
                yield f"layer_{number}_np.{target}.{name}", part, name, parameter


def _components(
    key: str, part: Modulation, name: str, factor: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the key of each component of a factor, and a view of the component's values."""
    count = part.settings.num_np_components
    for number, view in enumerate(factor.chunk(count, dim=0 if name in _ROWS else 1)):
        yield key if count == 1 else f"{key}.{number}", view.squeeze(0) if name == "c_a" else view


def join_components(key: str, count: int, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the factor named `key`, with its `count` components concatenated; `tensors` holds the components by key.

    Raises:
        KeyError: a component is missing.
    """
    name = key.rpartition(".")[2]
    parts = [tensors[key if count == 1 else f"{key}.{number}"] for number in range(count)]
    if name == "c_a":
        return torch.stack(parts)
    return torch.cat(parts, dim=0 if name in _ROWS else 1)


def _whole(part: Modulation, name: str, local: torch.Tensor) -> torch.Tensor:
    group = part.groups.tp
    if name not in part.split_dims or group.size() == 1:
        return local
    pieces = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(pieces, local.contiguous(), group=group)
    return torch.cat(pieces, dim=part.split_dims[name])


def _split_dim(part: Modulation, name: str, place: torch.Tensor) -> int | None:
    """Returns the dimension along which a component is split over the ranks, or None."""
    # `split_dims` refers to the factor of all components, a matrix; the c_a of one component is a vector.
    return min(part.split_dims[name], place.dim() - 1) if name in part.split_dims else None


def _whole_shape(part: Modulation, name: str, place: torch.Tensor) -> tuple[int, ...]:
    shape = list(place.shape)
    dim = _split_dim(part, name, place)
    if dim is not None:
        shape[dim] *= part.groups.tp.size()
    return tuple(shape)


def _local(part: Modulation, name: str, tensor: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    dim = _split_dim(part, name, place)
    if dim is None:
        return tensor
    return tensor.narrow(dim, part.groups.tp.rank() * place.size(dim), place.size(dim))


def sorted_by_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sorts the factors by layer."""
    return dict(sorted(tensors.items(), key=lambda item: int(item[0].split("_")[1])))


def _check(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    shapes = [
        f"{key} has shape {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    differences = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of the wrong shape": shapes,
    }
    if any(".fc1.B" in key for key in differences["missing"]) and any(
        ".gate.B" in key for key in differences["unknown"]
    ):
        raise ValueError(
            "the NP weights have the factors of an earlier version of --np-form key_value (gate.B, "
            "up.B); calibrate again with --np-init-strategy calibrated"
        )
    texts = [f"{kind}: {_listed(items)}" for kind, items in differences.items() if items]
    if texts:
        raise ValueError(f"the NP weights do not fit the model; {'; '.join(texts)}")


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
