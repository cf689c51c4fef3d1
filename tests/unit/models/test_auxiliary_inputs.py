"""Side streams keep their values and gradients on the way to the layers and to the next stage."""

import pytest
import torch

from megatron_ext.models.auxiliary_inputs import AuxiliaryInputs, AuxiliaryStream

ROWS, BATCH, HIDDEN = 4, 2, 6
NOTE = AuxiliaryStream(name="note", width=3)
TRAIL = AuxiliaryStream(name="trail", width=2, travels=True)
WORDS = AuxiliaryStream(name="words", width=HIDDEN, travels=True, to_layers=False)
WHOLE = AuxiliaryStream(name="whole", width=1, full_sequence=True)
STREAMS = [NOTE, TRAIL, WORDS, WHOLE]


def values(sequence_parallel: int = 1) -> dict[str, torch.Tensor]:
    """Random values of all streams."""
    generator = torch.Generator().manual_seed(0)
    rows = {s.name: ROWS * (sequence_parallel if s.full_sequence else 1) for s in STREAMS}
    return {s.name: torch.randn(rows[s.name], BATCH, s.width or 0, generator=generator) for s in STREAMS}


def hidden() -> torch.Tensor:
    """Random hidden states."""
    return torch.randn(ROWS, BATCH, HIDDEN, generator=torch.Generator().manual_seed(1))


def test_split_gives_back_what_join_was_given() -> None:
    auxiliary, streams, states = AuxiliaryInputs(STREAMS), values(), hidden()
    joined = auxiliary.join(states, streams)
    # 2 + 6 values a token beside the 6 of the hidden states fill two further rows.
    assert joined.shape == (3 * ROWS, BATCH, HIDDEN)
    assert auxiliary.pipeline_factor(HIDDEN) == 3
    found, travelling = auxiliary.split(joined)
    assert torch.equal(found, states) and found.is_contiguous()
    assert set(travelling) == {"trail", "words"}
    assert all(torch.equal(travelling[name], streams[name]) for name in travelling)


def test_several_residual_streams_travel_before_the_auxiliary_ones() -> None:
    auxiliary, streams = AuxiliaryInputs(STREAMS, residual_streams=3), values()
    states = torch.cat([hidden() + number for number in range(3)])
    joined = auxiliary.join(states, streams)
    assert joined.shape == (5 * ROWS, BATCH, HIDDEN) and auxiliary.pipeline_factor(HIDDEN) == 5
    found, travelling = auxiliary.split(joined)
    assert torch.equal(found, states)
    assert all(torch.equal(travelling[name], streams[name]) for name in ("trail", "words"))
    view = auxiliary.open(auxiliary.pack(streams), states)
    assert view.rows == ROWS and torch.equal(view.read("note"), streams["note"])


def test_without_travelling_streams_the_hidden_states_are_sent_as_they_are() -> None:
    auxiliary, states = AuxiliaryInputs([NOTE]), hidden()
    assert auxiliary.join(states, values()) is states
    found, travelling = auxiliary.split(states)
    assert found is states and travelling == {} and auxiliary.pipeline_factor(HIDDEN) == 1


@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_layers_read_what_was_packed(sequence_parallel: int) -> None:
    auxiliary, streams = AuxiliaryInputs(STREAMS, sequence_parallel), values(sequence_parallel)
    view = auxiliary.open(auxiliary.pack(streams), hidden())
    for name in ("whole", "note", "trail", "note"):
        assert torch.equal(view.read(name), streams[name])


def test_parts_of_a_stream_are_its_layers_own() -> None:
    parts = torch.randn(3, ROWS, BATCH, 2)
    auxiliary = AuxiliaryInputs([NOTE, AuxiliaryStream(name="layers", width=6)])
    view = auxiliary.open(auxiliary.pack({"note": values()["note"], "layers": parts}), hidden())
    for number in (2, 0, 1):
        assert torch.equal(view.read_part("layers", number, 3), parts[number])


def test_write_replaces_one_stream_and_leaves_the_others() -> None:
    auxiliary, streams = AuxiliaryInputs(STREAMS), values()
    view = auxiliary.open(auxiliary.pack(streams), hidden())
    view.write("trail", streams["trail"] * 2)
    assert torch.equal(view.read("trail"), streams["trail"] * 2)
    assert torch.equal(view.read("note"), streams["note"])
    assert torch.equal(view.read("whole"), streams["whole"])


def test_gradients_of_reads_parts_and_writes_equal_plain_tensors() -> None:
    auxiliary = AuxiliaryInputs([NOTE, TRAIL, AuxiliaryStream(name="layers", width=4)])
    leaves = {
        "note": values()["note"].requires_grad_(),
        "trail": values()["trail"].requires_grad_(),
        "layers": torch.randn(2, ROWS, BATCH, 2).requires_grad_(),
    }
    view = auxiliary.open(auxiliary.pack(leaves), hidden())
    first = view.read("note")
    part = view.read_part("layers", 1, 2)
    view.write("trail", view.read("trail").tanh() + part)
    again = view.read("note")
    total = (first**2).sum() + (again * 3).sum() + (part * view.read("trail")).sum()
    total = total + view.read_part("layers", 0, 2).sum() + view.read_part("layers", 1, 2).exp().sum()
    found = torch.autograd.grad(total, list(leaves.values()))

    note, trail, layers = leaves.values()
    plain = (note**2).sum() + (note * 3).sum() + (layers[1] * (trail.tanh() + layers[1])).sum()
    plain = plain + layers[0].sum() + layers[1].exp().sum()
    for ours, expected in zip(found, torch.autograd.grad(plain, list(leaves.values())), strict=True):
        torch.testing.assert_close(ours, expected)


def test_stream_that_nobody_reads_gets_no_gradient_and_spoils_none() -> None:
    auxiliary = AuxiliaryInputs([NOTE, TRAIL])
    streams = {name: value.requires_grad_() for name, value in values().items()}
    view = auxiliary.open(auxiliary.pack(streams), hidden())
    view.read("note").sum().backward()
    assert torch.equal(streams["note"].grad, torch.ones_like(streams["note"]))  # type: ignore[arg-type]
    assert torch.equal(streams["trail"].grad, torch.zeros_like(streams["trail"]))  # type: ignore[arg-type]


def test_streams_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="distinct names"):
        AuxiliaryInputs([NOTE, AuxiliaryStream(name="note", width=5)])


WRITTEN = AuxiliaryStream(name="written", width=4, full_sequence=True, travels=True, written=True)


@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_a_stream_with_the_whole_sequence_travels_beside_a_part_of_the_hidden_states(
    sequence_parallel: int,
) -> None:
    auxiliary, states = AuxiliaryInputs([WORDS, WRITTEN], sequence_parallel), hidden()
    whole = torch.randn(ROWS * sequence_parallel, BATCH, 4, requires_grad=True)
    joined = auxiliary.join(states, {**values(), "written": whole})
    # 6 + 4, or 6 + 2 x 4, values per token beside the 6 of the hidden states.
    assert joined.shape == ((2 + sequence_parallel) * ROWS, BATCH, HIDDEN)
    found, travelling = auxiliary.split(joined)
    assert torch.equal(found, states)
    assert torch.equal(travelling["words"], values()["words"])
    assert torch.equal(travelling["written"], whole)
    (gradient,) = torch.autograd.grad((travelling["written"] * whole.detach()).sum(), whole)
    assert torch.equal(gradient, whole)


@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_the_last_layer_returns_the_written_streams_as_further_rows(sequence_parallel: int) -> None:
    auxiliary, states = AuxiliaryInputs([NOTE, WORDS, WRITTEN], sequence_parallel), hidden()
    zeros = auxiliary.unwritten(states)
    assert zeros.keys() == {"written"} and not zeros["written"].any()
    view = auxiliary.open(auxiliary.pack({**values(), **zeros}), states)
    value = torch.randn_like(zeros["written"])
    view.write("written", value)
    output = auxiliary.with_written(states, view)
    assert output.shape == ((1 + -(-4 * sequence_parallel // HIDDEN)) * ROWS, BATCH, HIDDEN)
    found, written = auxiliary.without_written(output)
    assert torch.equal(found, states) and written.keys() == {"written"}
    assert torch.equal(written["written"], value)


def test_without_written_streams_the_last_layer_returns_the_hidden_states() -> None:
    auxiliary, states = AuxiliaryInputs([NOTE, WORDS]), hidden()
    assert auxiliary.with_written(states, auxiliary.open(auxiliary.pack(values()), states)) is states
    assert auxiliary.without_written(states) == (states, {}) and auxiliary.unwritten(states) == {}
