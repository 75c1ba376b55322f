"""What the start-up report says of sparse layers, by device, and of models that are elsewhere."""

import pytest
from vllm.platforms import current_platform

from cast_serve.envs import ForcedKernel
from cast_serve.model_loaders.errors import CheckpointError
from cast_serve.server.report import PACKED, UNPACKED, outlook_of_sparse, report

FORCED = ForcedKernel(name="reference", config=None)


@pytest.mark.parametrize(
    ("forced", "on_gpu", "expected"),
    [
        (None, False, UNPACKED),
        (None, True, PACKED),
        (FORCED, False, "packed, all run by one kernel: CAST_SERVE_KERNEL=reference"),
        (FORCED, True, "packed, all run by one kernel: CAST_SERVE_KERNEL=reference"),
    ],
)
def test_outlook_of_sparse(forced, on_gpu, expected):
    assert outlook_of_sparse(forced, on_gpu=on_gpu) == expected


EXAMPLE = "examples/tiny-llama-2of4"


def test_report_on_this_device(monkeypatch, capsys, request):
    monkeypatch.delenv("CAST_SERVE_KERNEL", raising=False)
    report(str(request.config.rootpath / EXAMPLE), None, None)
    said = capsys.readouterr().err
    assert "56 sparse, 0 dense" in said
    assert (PACKED if current_platform.is_cuda() else UNPACKED) in " ".join(said.split())


@pytest.mark.parametrize("model", ["s3://bucket/models/llama", "gs://bucket/a/b/c", "owner/name"])
def test_model_elsewhere_is_left_to_vllm(model, capsys):
    report(model, None, None)
    assert "vLLM looks it up" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "models/of/mine"])
def test_folder_that_there_is_not(model):
    with pytest.raises(CheckpointError, match="no such folder"):
        report(model, None, None)
