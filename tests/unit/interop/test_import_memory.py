"""An import holds few tensors of the model at a time, however many it has."""

import weakref
from pathlib import Path

import pytest
import torch

from megatron_ext.interop import import_checkpoint
from megatron_ext.interop.formats.hf_files import SafetensorsFiles
from tests.unit.interop.hf_models import KINDS, alone


@pytest.mark.parametrize("name", ["Llama", "Phi3"])
def test_an_import_holds_the_tensors_of_one_projection_at_a_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In bf16 a tensor is written as it was read: memory of the mapped file, which torch cannot release by itself.
    KINDS[name].build().bfloat16().save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    held, most, read = set[int](), list[int](), SafetensorsFiles.read

    def counted(self: SafetensorsFiles, tensor_name: str) -> torch.Tensor:
        tensor = read(self, tensor_name)
        number = len(most)
        held.add(number)
        weakref.finalize(tensor.untyped_storage(), held.discard, number)
        most.append(len(held))
        return tensor

    monkeypatch.setattr(SafetensorsFiles, "read", counted)
    alone(import_checkpoint, tmp_path / "hf", tmp_path / "checkpoint")
    assert len(most) > 20
    # Queries, keys and values, and the tensor before them.
    assert max(most) <= 4
