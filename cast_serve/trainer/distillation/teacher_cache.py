"""The teacher's most likely tokens for every sequence of a run, on disk: OUTPUT.run/teacher.

teacher.json             what they were computed from; another run's are refused
shard-N.safetensors      complete once it has this name, so that a killed run goes on after it

A shard holds, for each of its sequences, log_p [context, K] (fp32 of an fp32 teacher, fp16 of a
bf16 one: finer than its logits), ids [context, K] (uint16 or int32), log_rest fp32 [context], which
are those of a TopK, and sha256 of the tokens. Sequences are found by that: neither the order of the
stream nor a repeated sequence matters, and no sequence can get another one's targets.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from cast_serve.trainer.config import RunConfig
from cast_serve.trainer.distillation.loss import TopK, top_k_of
from cast_serve.trainer.distillation.teacher import Teacher
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.source import weights_sha256

Item = dict[str, torch.Tensor]

_FORMAT = 1
_SHARD_BYTES = 256 * 2**20
_PREFIX = "teacher_"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a cache depends on; `model` is weights_sha256 of the dense model."""

    model: str
    data: str
    context: int
    top_k: int
    temperature: float
    values: str
    ids: str

    @classmethod
    def of(
        cls, config: RunConfig, model: PreTrainedModel, *, data_sha256: str, context: int
    ) -> "Origin":
        """Of a run about to start, with the model still dense.

        Raises:
            RunError: the vocabulary has fewer tokens than are to be kept.
        """
        values, ids = _dtypes(model, config)
        return cls(
            model=weights_sha256(model),
            data=data_sha256,
            context=context,
            top_k=config.teacher_top_k,
            temperature=config.temperature,
            values=values,
            ids=ids,
        )

    @property
    def sequence_bytes(self) -> int:
        return sequence_bytes(self.context, self.top_k, values=self.values, ids=self.ids)


class TeacherCache:
    """The cache in `folder`, which need not exist yet.

    Raises:
        RunError: the folder holds a damaged cache, or one of another origin.
    """

    def __init__(self, folder: Path, origin: Origin) -> None:
        self._folder = folder
        self._origin = origin
        # sha256 of a sequence's tokens -> shard and place in it.
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._open: dict[Path, Any] = {}
        if (folder / "teacher.json").exists():
            self._check_origin()
        for path in sorted(folder.glob("shard-*.safetensors")):
            self._read_places(path)

    def __len__(self) -> int:
        """Sequences that are there."""
        return len(self._places)

    def missing(self, sequences: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Those of `sequences`, each int64 [context], that are not there, each once."""
        seen = set(self._places)
        for ids in sequences:
            digest = _sha256(ids)
            if digest not in seen:
                seen.add(digest)
                yield ids

    def fill(
        self, sequences: Iterable[torch.Tensor], teacher: Teacher, *, batch_size: int
    ) -> Iterator[int]:
        """Compute and write what is missing; how many are there, after each shard.

        Raises:
            RunError: the disk is full or cannot be written.
        """
        missing = self.missing(sequences)
        rows_of_a_shard = max(1, _SHARD_BYTES // self._origin.sequence_bytes)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            record = {"format": _FORMAT} | asdict(self._origin)
            (self._folder / "teacher.json").write_text(json.dumps(record, indent=2) + "\n")
            while rows := list(islice(missing, rows_of_a_shard)):
                batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
                parts = [self._compute(torch.stack(batch), teacher) for batch in batches]
                self._write({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
                yield len(self)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"teacher: cannot write {self._folder}: {error}; free space and start again, or "
                "choose a smaller teacher_top_k, or teacher: offload"
            ) from error

    def read(self, ids: torch.Tensor) -> Item:
        """teacher_log_p, teacher_ids (int32) and teacher_log_rest of one sequence, on the CPU.

        Raises:
            RunError: it is not there.
        """
        place = self._places.get(_sha256(ids))
        if place is None:
            raise RunError(
                f"teacher: {self._folder} holds nothing of a sequence of the run; continue with "
                "--resume, which computes it"
            )
        path, row = place
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        shard = self._open[path]
        found = {key: shard.get_slice(key)[row] for key in ("log_p", "ids", "log_rest")}
        # uint16 is a dtype for storage: few operations take it.
        found["ids"] = found["ids"].to(torch.int32)
        return {_PREFIX + key: value for key, value in found.items()}

    def _compute(self, ids: torch.Tensor, teacher: Teacher) -> Item:
        device = next(teacher.model.parameters()).device
        targets = teacher.targets(ids.to(device))
        top = top_k_of(targets, k=self._origin.top_k, temperature=self._origin.temperature)
        shape = (*ids.shape, self._origin.top_k)
        values, tokens = (getattr(torch, name) for name in (self._origin.values, self._origin.ids))
        digests = [torch.frombuffer(bytearray(_sha256(row)), dtype=torch.uint8) for row in ids]
        return {
            "log_p": top.log_p_TK.view(shape).to(values).cpu(),
            "ids": top.ids_TK.view(shape).cpu().to(tokens),
            "log_rest": top.log_rest_T.view(ids.shape).float().cpu(),
            "sha256": torch.stack(digests),
        }

    def _write(self, tensors: Item) -> None:
        paths = (self._folder / f"shard-{number:05}.safetensors" for number in count())
        # Not behind the last: one that was damaged and removed leaves its number free.
        path = next(path for path in paths if not path.exists())
        staging = path.with_suffix(".part")
        save_file(tensors, staging)
        os.replace(staging, path)
        self._read_places(path)

    def _read_places(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                digests = shard.get_tensor("sha256")
        except (OSError, SafetensorError) as error:
            raise RunError(f"teacher: {path} is damaged: {error}; remove it and resume") from error
        for row, digest in enumerate(digests):
            self._places[bytes(digest.tolist())] = (path, row)

    def _check_origin(self) -> None:
        path = self._folder / "teacher.json"
        try:
            found = json.loads(path.read_text())
            before = Origin(**{key: found[key] for key in asdict(self._origin)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"teacher: {path} cannot be read: {error!r}; remove {self._folder}"
            ) from error
        now = asdict(self._origin)
        changed = [key for key, value in asdict(before).items() if value != now[key]]
        if changed:
            raise RunError(
                f"teacher: {self._folder} was computed with another {', '.join(changed)}; remove it"
            )


class CachedStream(Dataset[Item]):
    """A stream whose items carry their teacher's targets as well."""

    def __init__(self, stream: Dataset[Item], cache: TeacherCache) -> None:
        self._stream = stream
        self._cache = cache

    def __len__(self) -> int:
        return len(self._stream)  # type: ignore[arg-type]  # torch's Dataset does not say

    def __getitem__(self, index: int) -> Item:
        item = self._stream[index]
        return item | self._cache.read(item["input_ids"])


def batch_targets(batch: Mapping[str, Any]) -> TopK:
    """The targets in a batch of CachedStream's items."""
    log_p, ids, log_rest = (batch[_PREFIX + key] for key in ("log_p", "ids", "log_rest"))
    return TopK(
        log_p_TK=log_p.flatten(0, 1), ids_TK=ids.flatten(0, 1), log_rest_T=log_rest.flatten()
    )


def sequences_of(stream: Dataset[Item], length: int) -> Iterator[torch.Tensor]:
    """The tokens of every item, in order."""
    return (stream[index]["input_ids"] for index in range(length))


def cache_bytes(model: PreTrainedModel, config: RunConfig, *, context: int, sequences: int) -> int:
    """Bytes on disk of the cache of so many different sequences; 0 where the run has none.

    Raises:
        RunError: the vocabulary has fewer tokens than are to be kept.
    """
    if config.eta == 0 or config.teacher != "cached":
        return 0
    values, ids = _dtypes(model, config)
    return sequences * sequence_bytes(context, config.teacher_top_k, values=values, ids=ids)


def sequence_bytes(context: int, top_k: int, *, values: str, ids: str) -> int:
    """Bytes on disk of one sequence."""
    width = sum(getattr(torch, name).itemsize for name in (values, ids))
    return context * (top_k * width + 4) + hashlib.sha256().digest_size


def _dtypes(model: PreTrainedModel, config: RunConfig) -> tuple[str, str]:
    """Of log-probabilities and of ids."""
    vocab: int = model.get_output_embeddings().weight.shape[0]
    if config.teacher_top_k > vocab:
        raise RunError(
            f"teacher_top_k: {config.teacher_top_k} is more than the vocabulary of {vocab}"
        )
    values = "float16" if config.compute == "bf16" else "float32"
    return values, "uint16" if vocab <= 2**16 else "int32"


def _sha256(ids: torch.Tensor) -> bytes:
    return hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).digest()
