"""What an import from Megatron-LM refuses in one line, and what a damaged or hostile file does: nothing."""

import json
import os
import pickle
import re
import shutil
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.interop.megatron.inert_pickle import Inert, read_pickle
from megatron_ext.interop.megatron.megatron_directory import read_common
from megatron_ext.interop.megatron.megatron_export import export_megatron
from megatron_ext.interop.megatron.torch_dist_files import TorchDistFiles
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint
from megatron_ext.training.checkpoint.saving.hashed_file import HashedFile
from tests.distributed.checkpoint.megatron_checkpoints import CASES, STEPS
from tests.distributed.checkpoint.megatron_imports import alone, imported, written

NAME = f"iter_{STEPS:07d}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Megatron-LM checkpoint; tests change copies."""
    folder = tmp_path_factory.mktemp("megatron") / "theirs"
    written(CASES["Llama"], folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` that a test may change."""
    shutil.copytree(saved, tmp_path / "theirs")
    return tmp_path / "theirs"


def change_common(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the content of common.pt."""
    path = folder / NAME / "common.pt"
    common, *_ = read_common(
        TorchDistFiles(folder / NAME)
    )  # also without common.pt, as megatron-core 0.19 writes
    common["args"] = Namespace(
        **{name: value for name, value in vars(common["args"]).items() if not isinstance(value, Inert)}
    )
    change(common)
    torch.save(common, path)


def refusal(folder: Path, **options: Any) -> str:
    """Returns the error of an import, and checks that it leaves nothing."""
    save = folder.parent / "ours"
    with pytest.raises((ValueError, OSError)) as error:
        imported(folder, save, **options)
    assert not list(folder.parent.glob("*ours*")), "the import left files"
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"num_layers": 6}, r"linear_qkv.layer_norm_weight has shape \[4, 32\], but .* describe \[6, 32\]"),
        ({"hidden_size": 64}, r"embeddings.weight has shape \[104, 32\], but .* \[104, 64\]"),
        ({"swiglu": False}, r"linear_fc1.weight has shape \[4, 96, 32\], but .* \[4, 48, 32\]"),
        (
            {"untie_embeddings_and_output_weights": False},
            "contains 1 tensors that do not belong to the model .* such as output_layer.weight",
        ),
        ({"add_qkv_bias": True}, "no tensor decoder.layers.self_attention.linear_qkv.bias"),
        (
            {"normalization": "LayerNorm"},
            "no tensor decoder.layers.self_attention.linear_qkv.layer_norm_bias",
        ),
        ({"position_embedding_type": "yarn"}, "cannot be built .*--position-embedding-type yarn"),
        ({"num_attention_heads": None}, "the argument num_attention_heads is missing"),
        ({"tokenizer_type": "BertWordPieceCase"}, "tokenizer_type BertWordPieceCase: not supported"),
        (
            {"vocab_size": 500},
            "the vocabulary has 104 rows, but the tokenizer has 501 ids; give the tokenizer",
        ),
        (
            {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "gone/tokenizer"},
            "gone/tokenizer.*; the checkpoint was trained with this tokenizer: give --tokenizer-type",
        ),
    ],
)
def test_arguments_that_do_not_fit_the_tensors_or_the_tokenizer_are_refused(
    changes: dict[str, Any], error: str, copy: Path
) -> None:
    change_common(copy, lambda common: vars(common["args"]).update(changes))
    assert re.search(error, refusal(copy))


def test_another_tokenizer_can_be_given(copy: Path) -> None:
    change_common(copy, lambda common: vars(common["args"]).update(tokenizer_type="Own", vocab_size=None))
    given = {"tokenizer_type": "NullTokenizer", "vocab_size": 90}
    found = imported(copy, copy.parent / "ours", tokenizer=given)
    assert (found.tokenizer.vocab_size, found.rows, found.model.make_vocab_size_divisible_by) == (
        91,
        104,
        104,
    )


def test_a_null_tokenizer_ends_documents_where_the_writing_version_does(copy: Path) -> None:
    since_18 = {"vocab_size": 97, "null_tokenizer_eod_id": None}
    change_common(copy, lambda common: vars(common["args"]).update(since_18))
    found = imported(copy, copy.parent / "ours")
    assert (found.tokenizer.vocab_size, found.tokenizer.eod) == (97, 96)
    shutil.rmtree(copy.parent / "ours")
    change_common(copy, lambda common: vars(common["args"]).update(null_tokenizer_eod_id=5))
    assert "--null-tokenizer-eod-id 5: must be the last id, 96" in refusal(copy)


def test_missing_and_truncated_files_are_named(copy: Path) -> None:
    folder = copy / NAME
    # megatron-core 0.19 writes the arguments among the tensors, where no common.pt is needed.
    optional = {"metadata.json"} | ({"common.pt"} - {path.name for path in folder.iterdir()})
    change_common(copy, lambda common: None)
    for path in sorted(folder.iterdir()):
        kept = path.read_bytes()
        path.write_bytes(kept[: len(kept) // 2])
        if path.name != "metadata.json" or len(kept) > 1:
            assert refusal(copy).startswith(str(path)), path.name
        path.unlink()
        if path.name not in optional:
            assert f"{path}: the file is missing" in refusal(copy), path.name
        path.write_bytes(kept)
    (copy / "latest_checkpointed_iteration.txt").write_text("7")
    assert "iter_0000007: no such directory" in refusal(copy)
    (copy / "latest_checkpointed_iteration.txt").write_text("newest")
    assert "contains 'newest' instead of a step number" in refusal(copy)
    (copy / "latest_checkpointed_iteration.txt").unlink()
    assert "no latest_checkpointed_iteration.txt in it" in refusal(copy)
    imported(folder, copy.parent / "ours")  # the directory of one checkpoint needs no tracker


def test_bytes_that_changed_within_a_tensor_file_are_refused(copy: Path) -> None:
    for path in (copy / NAME).glob("*.distcp"):
        content = bytearray(path.read_bytes())
        content[: len(content)] = b"\x00" * len(content)
        path.write_bytes(content)
    assert re.search(r"distcp: .*cannot be read; the file is (damaged|truncated)", refusal(copy))


class _Runs:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


class _Foreign:
    def __init__(self) -> None:
        self.value = 5


def test_pickles_that_would_run_code_run_none(copy: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    change_common(copy, lambda common: common.update(other=_Runs(str(trap))))
    assert "common.pt: cannot be read; the file is damaged" in refusal(copy)
    (copy / NAME / ".metadata").write_bytes(pickle.dumps(_Runs(str(trap))))
    with pytest.raises(ValueError, match="is not the metadata of a torch_dist checkpoint"):
        TorchDistFiles(copy / NAME)
    assert not trap.exists()


def test_objects_of_foreign_classes_are_read_as_inert_ones(copy: Path, tmp_path: Path) -> None:
    change_common(copy, lambda common: vars(common["args"]).update(foreign=_Foreign(), where=Path("x")))
    imported(copy, tmp_path / "ours")
    change_common(copy, lambda common: vars(common["args"]).update(softmax_scale=_Foreign()))
    (tmp_path / "plain").write_bytes(pickle.dumps(_Foreign()))
    read = read_pickle(tmp_path / "plain")
    assert type(read) is Inert
    assert vars(read) == {"value": 5}


def test_an_optimizer_that_cannot_be_read_is_refused_by_its_format(saved: Path, copy: Path) -> None:
    change_common(copy, lambda common: vars(common["args"]).update(optimizer="muon"))
    assert "--optimizer muon: only Adam's state can be imported" in refusal(copy, with_optimizer=True)
    change_common(copy, lambda common: vars(common["args"]).update(optimizer="adam"))
    change_common(copy, lambda common: common.pop("opt_param_scheduler"))
    assert "learning-rate schedule; import without --with-optimizer" in refusal(copy, with_optimizer=True)
    metadata = json.loads((copy / NAME / "metadata.json").read_text())
    (copy / NAME / "metadata.json").write_text(json.dumps({**metadata, "sharded_backend": "zarr"}))
    assert "is in the format zarr; save it with --ckpt-format torch_dist" in refusal(copy)


def test_other_formats_of_megatron_are_named_with_the_way_to_convert_them(tmp_path: Path) -> None:
    legacy = tmp_path / "legacy"
    (legacy / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    (legacy / "latest_checkpointed_iteration.txt").write_text("1")
    assert "--ckpt-convert-format torch_dist --ckpt-convert-save" in refusal(legacy)
    with pytest.raises(ValueError, match="--ckpt-convert-format torch_dist"):
        find_checkpoint(str(legacy))
    dcp = tmp_path / "dcp" / "iter_0000001"
    dcp.mkdir(parents=True)
    (dcp / ".metadata").touch()
    assert "torch_dcp or fsdp_dtensor" in refusal(dcp)


@pytest.mark.parametrize("root", [True, False])
def test_load_says_the_command_that_imports_a_checkpoint_of_megatron(root: bool, saved: Path) -> None:
    given = saved if root else saved / NAME
    with pytest.raises(ValueError, match="a checkpoint of Megatron-LM") as error:
        find_checkpoint(str(given))
    command = re.search(r"`python (.*)--save NEW_DIRECTORY`", str(error.value))
    assert command is not None
    assert command[1].split() == [
        "tools/convert_checkpoint.py", "import", "--format", "megatron", "--model-dir", str(saved),
    ]  # fmt: skip


def test_a_full_disk_leaves_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = HashedFile.__init__

    def open_on_full_disk(self: HashedFile, path: Path, cancelled: threading.Event) -> None:
        opened(self, Path("/dev/full"), cancelled)

    imported(copy, copy.parent / "first")
    monkeypatch.setattr(HashedFile, "__init__", open_on_full_disk)
    assert "No space left on device" in refusal(copy)
    with pytest.raises(OSError, match="No space left on device"):
        alone(export_megatron, str(copy.parent / "first"), copy.parent / "exported")
    assert not list(copy.parent.glob("*exported*"))
