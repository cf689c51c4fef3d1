"""lm-evaluation-harness gets the same numbers from a checkpoint as its own model type `hf` gets from the export."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megatron_ext.harness.harness_model import HarnessModel
from megatron_ext.inference.generation import stage_logits
from megatron_ext.interop import export_checkpoint, import_checkpoint
from megatron_ext.npt.modules.npt_layers import deactivated
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from tests.integration.npt.npt_run_helpers import DATA, train, write_data
from tests.unit.interop.hf_models import Kind, alone

KEPT = Path(__file__).parents[2] / "integration/scripts/kept_checkpoint"
TEXT = "the slings and arrows of outrageous fortune, or to take arms against a sea of troubles"
PAIRS = [
    ("to be or not", " to be"),
    ("", "that is the question"),
    ("whether it is ", "nobler in the mind"),
    ("a", " b"),
    (TEXT, " and by opposing"),
    ("to be", " or not to be, that"),
]
LONG = [TEXT, f"{TEXT} {TEXT} {TEXT}", "x"]
"""The second has more tokens than the longest sequence, 64."""
NPT_PAIRS = [pair for pair in PAIRS if all(pair)]
GREEDY = {"until": ["e", "of the"], "max_gen_toks": 9, "do_sample": False}
SHORT = {"until": ["\n"], "max_gen_toks": 3, "temperature": 0.0}


@pytest.fixture(scope="module", params=["texts begin with a token", "texts begin bare"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, as an imported checkpoint (`checkpoint`) and exported again (`export`)."""
    path: Path = tmp_path_factory.mktemp("harness")
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if request.param == "texts begin with a token":
        library.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(path / "hf")
    Kind(
        "Llama", {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    ).build().save_pretrained(path / "hf")
    alone(import_checkpoint, path / "hf", path / "checkpoint")
    alone(export_checkpoint, path / "checkpoint", path / "export")
    return path


def _instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, item, number) for number, item in enumerate(arguments)]


def _answers(model: Any) -> dict[str, list[Any]]:
    contexts = [(context or "x", dict(GREEDY)) for context, _ in PAIRS]
    contexts += [("to be", dict(SHORT))]
    return {
        "scores": model.loglikelihood(_instances("loglikelihood", PAIRS)),
        "rolling": model.loglikelihood_rolling(_instances("loglikelihood_rolling", [(t,) for t in LONG])),
        "texts": model.generate_until(_instances("generate_until", contexts)),
    }


def _ours(path: str, layout: dict[str, Any], batch_size: int) -> dict[str, list[Any]]:
    return _answers(HarnessModel(load=path, batch_size=batch_size, **layout))


LAYOUTS: dict[str, dict[str, int]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "two copies": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1},
}


def _at_every_layout(path: str) -> dict[str, dict[str, list[Any]]]:
    return {name: _ours(path, layout, 2) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def of_two_ranks(folder: Path) -> list[dict[str, dict[str, list[Any]]]]:
    return run_distributed(_at_every_layout, 2, str(folder / "checkpoint"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, list[Any]]:
    return _answers(HFLM(pretrained=str(folder / "export"), device="cpu", dtype="float32", batch_size=1))


def _check_equal(found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    for (score, greedy), (their_score, their_greedy) in zip(found["scores"], expected["scores"], strict=True):
        assert score == pytest.approx(their_score, abs=1e-4)
        assert greedy == their_greedy
    assert found["rolling"] == pytest.approx(expected["rolling"], abs=1e-3)
    assert found["texts"] == expected["texts"]


def test_scores_and_texts_equal_those_of_the_harnesss_own_model_type_on_the_export(
    folder: Path, theirs: dict[str, list[Any]]
) -> None:
    assert len({score for score, _ in theirs["scores"]}) == len(PAIRS)
    assert any(0 < len(text) < 20 for text in theirs["texts"])
    _check_equal(alone(_ours, str(folder / "checkpoint"), {}, 3), theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_gets_the_same_scores_and_texts(
    layout: str, of_two_ranks: list[dict[str, dict[str, list[Any]]]], theirs: dict[str, list[Any]]
) -> None:
    for found in of_two_ranks:
        _check_equal(found[layout], theirs)


SHORT_PAIRS = [("a line", " of"), ("read ", "again"), ("small text", " that"), ("i", "s")]
"""Short enough for the kept model, whose longest sequence has 16 tokens, each a byte."""


def _score_by_hand(model: HarnessModel, pairs: list[tuple[str, str]]) -> list[float]:
    """The sums of log p(token) over the continuations, one text at a time."""
    sums = []
    for context, continuation in pairs:
        context, continuation = context.rstrip(), " " * context.endswith(" ") + continuation
        ids, start = model.tok_encode(context + continuation), len(model.tok_encode(context))
        tokens = torch.tensor([ids])
        batch = {"tokens": tokens, "position_ids": torch.arange(len(ids)).expand_as(tokens)}
        with torch.no_grad():
            logits = stage_logits(model.loaded.model, model.loaded.families, batch)
        assert logits is not None
        log_p = logits[0, :, : model.loaded.tokenizer.vocab_size].double().log_softmax(-1)
        sums.append(float(sum(log_p[i - 1, ids[i]] for i in range(start, len(ids)))))
    return sums


def _per_layer() -> tuple[list[tuple[float, bool]], list[float]]:
    """Scores of a PLE model, by the harness in a batch, and summed by hand."""
    model = HarnessModel(load=str(KEPT), batch_size=3)
    with pytest.raises(
        ValueError, match="a continuation has 38 tokens, but the model's maximum sequence length is 16"
    ):
        model.loglikelihood(_instances("loglikelihood", [("a", " continuation that is longer than that")]))
    found = model.loglikelihood(_instances("loglikelihood", SHORT_PAIRS))
    return found, _score_by_hand(model, SHORT_PAIRS)


def test_a_model_with_per_layer_embeddings_is_scored_with_them() -> None:
    found, by_hand = alone(_per_layer)
    assert [score for score, _ in found] == pytest.approx(by_hand, abs=1e-4)


NPT = [
    *("--np-form", "key_value", "--np-target", "gate+up", "--np-residual", "keep", "--npt-layers", "all"),
    *(
        "--np-init-strategy",
        "calibrated",
        "--calibration-tokens",
        "200",
        "--np-rank",
        "6",
        "--seq-length",
        "16",
    ),
    *("--train-iters", "1", "--lr", "1e-4", "--micro-batch-size", "2", "--global-batch-size", "4", *DATA),
]


def _converted(path: str) -> tuple[list[tuple[float, bool]], list[float], list[float]]:
    """Scores of an NPT model: by the harness in batches, by hand, and by hand with its NP components off."""
    model = HarnessModel(load=path, batch_size=4)
    found = model.loglikelihood(_instances("loglikelihood", NPT_PAIRS))
    by_hand = _score_by_hand(model, NPT_PAIRS)
    with deactivated([model.loaded.model]):
        return found, by_hand, _score_by_hand(model, NPT_PAIRS)


def test_a_model_converted_to_npt_is_scored_with_its_np_components(folder: Path, tmp_path: Path) -> None:
    base, run = str(folder / "checkpoint"), str(tmp_path / "run")
    code, _ = run_single(train, "--load", base, "--data-path", write_data(tmp_path), "--save", run, *NPT)
    assert code == 0
    found, by_hand, without = run_single(_converted, run)
    scores = [score for score, _ in found]
    assert scores == pytest.approx(by_hand, abs=1e-4)
    # With its NP components off, the model has the base model's scores, which are others.
    expected = alone(_ours, base, {}, 1)["scores"]
    assert without == pytest.approx(
        [score for pair, (score, _) in zip(PAIRS, expected, strict=True) if all(pair)], abs=1e-4
    )
    assert min(abs(a - b) for a, b in zip(scores, without, strict=True)) > 1e-3


def _templated(path: str) -> str:
    return HarnessModel(load=path).apply_chat_template([{"role": "user", "content": "hello"}])


def test_the_models_own_chat_template_formats_a_conversation(folder: Path) -> None:
    assert alone(_templated, str(folder / "checkpoint")) == "user: hello\n"


@pytest.mark.parametrize("size", ["auto", "0", "-2"])
def test_a_batch_size_that_is_no_number_is_refused(size: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"--batch_size {size}: must be an integer of at least 1"):
        HarnessModel(load=str(folder / "checkpoint"), batch_size=size)
