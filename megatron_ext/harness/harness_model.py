"""The model type `megatron_ext` of lm-evaluation-harness: scores and continues texts with a checkpoint.

The harness asks for three things; each is defined as in its own model type `hf`, so the numbers can be compared:

    loglikelihood            sum of log p(token | earlier tokens) over a continuation, and whether the continuation is
                             the greedy one
    loglikelihood_rolling    the same sum over a whole text, in windows of the model's maximum sequence length
    generate_until           a continuation that ends before any of several stop texts

Texts begin with the begin-of-text token if the model's training texts did (`Tokenizer.begin`). The requests are divided
among the model copies (data parallelism); all processes of a copy get the same requests and compute together.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from megatron.core import parallel_state
from tqdm import tqdm

from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.inference.generation import Sampling, generate, share_from_last_stage, stage_logits
from megatron_ext.inference.load_model import load_model
from megatron_ext.inference.stopping import ends_with_any
from megatron_ext.platform import process_groups
from megatron_ext.progressive.objectives.unmasking import objective_of
from megatron_ext.registry.known_families import FAMILIES

Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request to score: context and continuation as texts (None for a window of a longer text), and the ids of each."""


@register_model("megatron_ext")
class HarnessModel(TemplateLM):
    """A checkpoint of this project as a model of the harness."""

    def __init__(
        self,
        load: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        ckpt_step: int | None = None,
        tensor_model_parallel_size: int | None = None,
        pipeline_model_parallel_size: int | None = None,
        bf16: bool = False,
        bos: bool | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        """Loads the model; collective over all processes. Arguments that are not listed below are passed to
        `load_model`.

        Args:
            load: a directory of checkpoints, or the directory of one checkpoint.
            batch_size: number of sequences in one forward pass.
            max_batch_size: not used; the harness passes it to every model.
            device: not used; torchrun and the environment determine the device.
            max_gen_toks: longest continuation, in tokens, for tasks that specify no length.

        Raises:
            ValueError: `batch_size` is not an integer of at least 1, or the model predicts masked tokens; also as in
                `load_model`.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(
                f"--batch_size {batch_size}: must be an integer of at least 1 for --model megatron_ext"
            )
        self.batch_size = int(batch_size)
        self.max_gen_toks = max_gen_toks
        self.loaded = load_model(
            load,
            FAMILIES,
            ckpt_step=ckpt_step,
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            bf16=bf16,
            bos=bos,
        )
        objective = objective_of(self.loaded.families)
        if objective is not None and objective.bidirectional:
            raise ValueError(
                f"load={load}: the harness requires a causal model, but this one was trained with "
                f"{objective.kind}, in which every token attends to all others"
            )
        self._device = process_groups.device()
        self._copies = parallel_state.get_data_parallel_group()
        self._rank, self._world_size = dist.get_rank(self._copies), dist.get_world_size(self._copies)
        self.tokenizer = _chat_tokenizer(self.loaded.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-document token."""
        return self.loaded.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """Id of the token that is put before a text without context: begin-of-text, or end-of-document if there is no
        begin-of-text token.
        """
        bos = self.loaded.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The model's maximum sequence length, in tokens."""
        model = self.loaded.model
        return min(model.max_sequence_length, model.sliding_window or model.max_sequence_length)

    @property
    def tokenizer_name(self) -> str:
        """Fingerprint of the tokenizer, for the harness's cache of requests."""
        return self.loaded.tokenizer.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the ids of a text. If the model's training texts began with the begin-of-text token, so do the ids,
        unless `add_special_tokens` is False.
        """
        ids = self.loaded.tokenizer.tokenize(string)
        return ids if add_special_tokens is False else self.loaded.tokenizer.begin(ids)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the sum of log p(token) over each text; see the top of this file."""
        windows: list[Scored] = []
        counts = []
        for (text,) in (request.args for request in requests):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            found = [(None, *make_disjoint_window(part)) for part in parts]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(score for score, _ in islice(scores, count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns, for each request, log p(continuation | context) and whether it is the greedy continuation."""
        # Sequences of similar length share a batch. The longest come first, so that a lack of memory shows at once.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for places in self._batches(order, "Running loglikelihood requests", disable_tqdm):
            scores = self._score([(requests[i][1], requests[i][2]) for i in places])
            for place, (total, matches) in zip(places, scores, strict=True):
                results[place] = (total, bool(matches))
                texts = requests[place][0]
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[place])
        return results

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Returns [log p, greedy] for each pair of context and continuation ids; greedy is 1 if greedy decoding
        yields the continuation, otherwise 0.
        """
        longest = max(len(continuation) for _, continuation in pairs)
        if longest > self.max_length:
            raise ValueError(
                f"a continuation has {longest} tokens, but the model's maximum sequence length is "
                f"{self.max_length}; choose a task with shorter texts"
            )
        # The last token is predicted but never an input. The beginning of a too long context is cut off.
        rows = [(context + continuation)[-(self.max_length + 1) :] for context, continuation in pairs]
        length = max(map(len, rows)) - 1
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids) - 1] = torch.tensor(ids[:-1])
        tokens = tokens.to(process_groups.device())
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
        batch = {"tokens": tokens, "position_ids": positions}
        logits = stage_logits(self.loaded.model, self.loaded.families, batch)
        found = torch.zeros(len(rows), 2, dtype=torch.float64, device=tokens.device)
        if logits is not None:
            for place, (ids, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
                wanted = torch.tensor(continuation, device=tokens.device)
                here = logits[place, len(ids) - 1 - len(continuation) : len(ids) - 1, : self._vocab_size]
                log_p = here.float().log_softmax(-1).gather(-1, wanted.unsqueeze(-1))
                found[place, 0] = log_p.double().sum()
                found[place, 1] = (here.argmax(-1) == wanted).all()
        share_from_last_stage(found)
        return found.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns a continuation of each context that ends before any of the request's stop texts."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(place)
        results = [""] * len(requests)
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        for same in groups.values():
            settings = normalize_gen_kwargs(requests[same[0]].args[1], self.max_gen_toks)
            order = sorted(same, key=lambda i: -len(contexts[i]))
            for places in self._batches(order, "Running generate_until requests", disable_tqdm):
                texts = self._continue([contexts[i] for i in places], settings)
                for place, text in zip(places, texts, strict=True):
                    results[place] = text
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return results

    def _continue(self, contexts: list[list[int]], settings: Any) -> list[str]:
        tokenizer, new_tokens = self.loaded.tokenizer, settings["max_gen_toks"]
        room = self.max_length - new_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks {new_tokens}: must be below the model's maximum sequence length, {self.max_length}"
            )
        stops = handle_stop_sequences(settings["until"], eos=tokenizer.inv_vocab[tokenizer.eod])
        sampling = Sampling(
            max_new_tokens=new_tokens,
            temperature=settings.get("temperature", 1.0),
            top_k=settings.get("top_k", 0),
            top_p=settings.get("top_p", 0.0),
            stop_tokens=self.loaded.stop_tokens,
        )
        found = generate(
            self.loaded.model,
            self.loaded.families,
            [context[-room:] for context in contexts],
            sampling,
            self._vocab_size,
            ends_with_any(tokenizer, stops),
        )
        return [postprocess_generated_text(self._decode(ids), stops, None) for ids in found]

    def _decode(self, ids: list[int]) -> str:
        """Returns the text of generated ids. Special tokens are left out if transformers can read the tokenizer."""
        if self.tokenizer is None:
            return self.loaded.tokenizer.detokenize(ids)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _batches(self, order: list[int], what: str, disable_tqdm: bool) -> Iterator[list[int]]:
        quiet = disable_tqdm or process_groups.rank() != 0
        with tqdm(total=len(order), disable=quiet, desc=what) as progress:
            for start in range(0, len(order), self.batch_size):
                yield order[start : start + self.batch_size]
                progress.update(len(order[start : start + self.batch_size]))

    @property
    def _vocab_size(self) -> int:
        return self.loaded.tokenizer.vocab_size

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Formats a conversation with the chat template that came with the model.

        Raises:
            ValueError: the model has no chat template.
        """
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise ValueError("--apply_chat_template: the model's tokenizer has no chat template")
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensors of all model copies, concatenated."""
        found = [torch.empty_like(tensor.reshape(-1)) for _ in range(self._world_size)]
        dist.all_gather(found, tensor.reshape(-1), group=self._copies)
        return torch.cat(found)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Returns the objects of all model copies on copy `dst`, None on the others."""
        found = [None] * self._world_size
        dist.all_gather_object(found, obj, group=self._copies)
        return found if self._rank == dst else None

    def barrier(self) -> None:
        """Waits for all model copies."""
        dist.barrier(group=self._copies)


def _chat_tokenizer(tokenizer: Tokenizer) -> Any:
    """Loads the tokenizer with transformers, for its chat template; returns None if transformers cannot read it."""
    for path in map(Path, tokenizer.files):
        folder = path if path.is_dir() else path.parent
        if (folder / "tokenizer_config.json").is_file():
            return transformers.AutoTokenizer.from_pretrained(folder)
    return None
