"""Dataset presets, document 002's configuration file, and a run's length in epochs."""

from pathlib import Path

import pytest
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.config.command_line.parse import parse
from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.data.datasets.epochs import epoch_samples
from megatron_ext.npt.objective.npt_run_config import NPTRunConfig
from megatron_ext.npt.runs.dataset_presets import with_preset
from megatron_ext.testing.run_single import run_single
from pretrain_npt import DOCUMENT_SECTIONS
from tests.integration.npt.npt_run_helpers import DATA, ROOT, make_base, train, write_data

SHAPE = ["--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4"]
SHAPE += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "64"]


@pytest.fixture
def presets(tmp_path: Path) -> tuple[str, str]:
    """A presets file, and the prefix of the one dataset that is there."""
    prefix = write_data(tmp_path)
    path = tmp_path / "presets.yaml"
    pairs = [[0.7, prefix], f"0.3 {prefix}"]
    path.write_text(yaml.safe_dump({"small": prefix, "medium": pairs, "large": "missing/corpus", "none": []}))
    return str(path), prefix


def test_a_preset_stands_for_its_blend_and_data_of_ones_own_wins(presets: tuple[str, str]) -> None:
    file, prefix = presets
    assert with_preset(DataConfig(), "small", file).data_path == (prefix,)
    assert with_preset(DataConfig(), "medium", file).data_path == ("0.7", prefix, "0.3", prefix)
    own = DataConfig(data_path=("mine",))
    assert with_preset(own, "small", file) is own
    assert with_preset(own, None, "no file") is own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("huge", "--dataset-preset huge: .* has no such preset"),
        ("large", "--dataset-preset large: missing/corpus.idx does not exist"),
        ("none", "--dataset-preset none: .* names no dataset"),
    ],
)
def test_a_preset_that_is_not_there_is_told_in_one_line(
    name: str, message: str, presets: tuple[str, str]
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        with_preset(DataConfig(), name, presets[0])


@pytest.mark.parametrize("content", [None, "- a", "small: [", "small: {a: 1"])
def test_a_file_that_holds_no_presets_is_told_in_one_line(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "presets.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match="--dataset-preset") as error:
        with_preset(DataConfig(), "small", str(path))
    assert str(path) in str(error.value)


def test_the_place_of_a_yaml_error_is_named(tmp_path: Path) -> None:
    path = tmp_path / "presets.yaml"
    path.write_text("small:\n  - a: b: c")
    with pytest.raises(
        ValueError, match="--dataset-presets-file .*yaml, line 2, column 9: not valid YAML: mapping values"
    ):
        with_preset(DataConfig(), "small", str(path))


def test_the_shipped_file_has_the_documents_presets_and_each_parses() -> None:
    names = yaml.safe_load((ROOT / "examples" / "npt" / "datasets.yaml").read_text())
    assert list(names) == ["small", "medium", "large"]
    for spelling in ("--dataset", "--dataset_preset", "--dataset-preset"):
        given = [*SHAPE, "--seq-length", "8", "--lr", "1", "--train-iters", "1", spelling, "medium"]
        assert parse(NPTRunConfig, given).npt.dataset_preset == "medium"


DOCUMENT = """
model:
  base_model_name: "meta-llama/Llama-2-7b-hf"  # Base model to convert
  npt_layers: "upper_half"  # Which layers to convert
  rank: 16  # Rank for low-rank adapters
  modulation_scale: 0.5
training:
  batch_size: 4
  gradient_accumulation_steps: 8
  learning_rate: 1e-4
  num_epochs: 3
  equivalence_weight: 1.0
  regularization_weight: 0.02
  max_grad_norm: 0.7
  max_length: 512
"""


def _parse(content: str, tmp_path: Path) -> NPTRunConfig:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    return parse(NPTRunConfig, ["--config", str(path), *SHAPE], sections=DOCUMENT_SECTIONS)


def test_every_key_of_document_002_reaches_its_field(tmp_path: Path) -> None:
    config = _parse(DOCUMENT, tmp_path)
    assert config.npt.base_checkpoint == "meta-llama/Llama-2-7b-hf"
    assert (config.np.npt_layers, config.np.np_rank, config.np.np_scale) == (
        "upper_half",
        16,
        0.5,
    )
    training = config.training
    assert (training.micro_batch_size, training.gradient_accumulation_steps, training.num_epochs) == (4, 8, 3)
    assert (config.optimizer.lr, config.optimizer.clip_grad) == (1e-4, 0.7)
    assert (config.npt.equivalence_weight, config.npt.regularization_weight) == (1.0, 0.02)
    assert config.model.seq_length == 512


def test_layers_may_be_a_list(tmp_path: Path) -> None:
    assert _parse(DOCUMENT.replace('"upper_half"', "[1, 3]"), tmp_path).np.npt_layers == "1,3"


def test_an_unknown_key_stays_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("ranks: 4", "save: somewhere"):
        with pytest.raises(SystemExit):
            _parse(DOCUMENT.replace("rank: 16", key), tmp_path)
        assert f"unknown key {key.split(':')[0]} in section model" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config", "config_small", "config_optimized"])
def test_the_shipped_configurations_parse(name: str) -> None:
    given = ["--config", str(ROOT / "examples" / "npt" / f"{name}.yaml"), *SHAPE]
    config = parse(NPTRunConfig, given, sections=DOCUMENT_SECTIONS)
    assert config.npt.mode == "equivalence" and (config.training.num_epochs or 0) > 0


def test_an_epoch_is_the_training_splits_tokens_in_sequences(tmp_path: Path) -> None:
    prefix = write_data(tmp_path)
    dataset = IndexedDataset(prefix)
    lengths = dataset.sequence_lengths.copy()
    data = DataConfig(data_path=(prefix,), split="90,10")
    assert epoch_samples(data, 16) == (lengths[:54].sum() - 1) // 16
    own = DataConfig(train_data_path=(prefix, prefix))
    assert epoch_samples(own, 16) == 2 * ((lengths.sum() - 1) // 16)
    steps = TrainingConfig(num_epochs=1.5, micro_batch_size=2).with_epochs(100, 4).train_iters
    assert steps == 150 // 8
    with pytest.raises(
        ValueError, match="--num-epochs: the training data has less than one sequence of 9999"
    ):
        epoch_samples(data, 9999)


def _run(folder: str, prefix: str, config: str) -> str:
    base = make_base(folder, prefix)
    Path(config).write_text(DOCUMENT.replace("meta-llama/Llama-2-7b-hf", base).replace("512", "16"))
    # No shape and no tokenizer: they are the base model's.
    flags = ["--config", config, "--num-epochs", "0.5", "--data-path", prefix, *DATA]
    return train(*flags)[1]


def test_document_002s_file_trains(tmp_path: Path) -> None:
    prefix = write_data(tmp_path)
    output = run_single(_run, str(tmp_path), prefix, str(tmp_path / "config.yaml"))
    samples = epoch_samples(DataConfig(data_path=(prefix,), split="90,10,0"), 16)
    steps = samples // 2 // 32
    assert f"step {steps}/{steps} | " in output and "equivalence_loss" in output
