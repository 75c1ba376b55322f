"""The engines that are compared: what each is started as, and on which model folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cast_serve.bench.serving.models import ServedModel, write_model
from cast_serve.bench.serving.vllm_command import MODULE
from cast_serve.model_loaders.write import new_folder

# The engine whose numbers the others' are divided by.
BASELINE = "dense-bf16"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to serve a model.

    Attributes:
        sparse: whether the model folder declares its linears 2:4.
        server: a module and its arguments, to which the model folder and flags are added.
        flags: what this engine is given beside the flags that all are given.
        needs_gpu: whether vLLM has it on GPUs only.
    """

    name: str
    sparse: bool = False
    server: tuple[str, ...] = (MODULE, "serve")
    flags: tuple[str, ...] = ()
    needs_gpu: bool = False

    def serve_command(self, model: Path, flags: Sequence[str]) -> list[str]:
        """Arguments of a Python that serves the folder `model`."""
        return ["-m", *self.server, str(model), *self.flags, *flags]

    def offline_command(self, benchmark: str, model: Path, flags: Sequence[str]) -> list[str]:
        """Arguments of a Python that runs `vllm bench BENCHMARK` on the folder `model`."""
        return ["-m", MODULE, benchmark, "--model", str(model), *self.flags, *flags]

    def model_folder(self, model: ServedModel, folder: Path) -> Path:
        """Where under `folder` this engine's form of the model is."""
        return folder / f"{model.name}-{'2of4' if self.sparse else 'dense'}"

    def write_model(self, model: ServedModel, folder: Path) -> Path:
        """The model folder of this engine under `folder`, made where it is not there yet."""
        path = self.model_folder(model, folder)
        if not path.exists():
            with new_folder(path) as made:
                write_model(model, made, sparse=self.sparse)
        return path


ENGINES = (
    Engine(name=BASELINE),
    Engine(name="dense-fp8", flags=("--quantization", "fp8"), needs_gpu=True),
    Engine(name="sparse-bf16", sparse=True, server=("cast_serve.server.main", "--model")),
)


def find_engines(names: str, *, on_gpu: bool) -> tuple[tuple[Engine, ...], dict[str, str]]:
    """The engines of "A,B" that can run here, and why each of the others is left out.

    Raises:
        ValueError: there is no such engine; lists those there are.
    """
    known = {engine.name: engine for engine in ENGINES}
    chosen = names.split(",")
    for name in chosen:
        if name not in known:
            raise ValueError(f"no engine {name!r}; there is {', '.join(known)}")
    out = {
        name: "vLLM quantizes to FP8 on GPUs only"
        for name in chosen
        if known[name].needs_gpu and not on_gpu
    }
    return tuple(known[name] for name in chosen if name not in out), out


def common_flags(model: ServedModel, *, on_gpu: bool, dummy: bool = True) -> tuple[str, ...]:
    """What every engine is given, online and offline.

    No prefix caching: warm-ups and repeats would otherwise find their prompts computed.

    Args:
        dummy: model folders have no weights; the engine makes random ones.
    """
    flags = (
        *(("--load-format", "dummy") if dummy else ()),
        "--max-model-len",
        str(model.max_model_len),
        "--no-enable-prefix-caching",
    )
    # By default vLLM takes 92 % of a CPU's memory, or refuses to start.
    return flags if on_gpu else (*flags, "--kv-cache-memory-bytes", str(1 << 30))
