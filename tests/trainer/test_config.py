"""Flags and YAML: what wins, what converts, and one line naming the key for what cannot be."""

import subprocess
import sys
from pathlib import Path

import pytest

from cast_serve.trainer.arguments import parse
from cast_serve.trainer.config import Pattern, RunConfig
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError

REQUIRED = ["--model", "m", "--data", "a.txt", "--output", "o"]


def from_yaml(tmp_path, text, *flags):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return parse([*REQUIRED, "--config", str(path), *flags])


def test_defaults_of_the_method():
    config = parse(REQUIRED)
    assert (config.beta1, config.beta2, config.eps, config.clip) == (0.9, 0.95, 1e-8, 1.0)
    assert (config.warmup, config.lr_floor, config.eta) == (0.05, 0.1, 1 / 3)
    assert (config.temperature, config.scaling_blocks, config.mask_interval) == (1.0, 2, 10)
    assert config.decay_ramp == 1.0
    assert (config.nm, config.export_form) == (Pattern(kept=2, group=4), "packed")


def test_flag_overrides_yaml_overrides_default(tmp_path):
    config = from_yaml(tmp_path, "lr: 0.1\nseed: 7\n", "--lr", "0.2")
    assert (config.lr, config.seed, config.batch_size) == (0.2, 7, 8)


def test_yaml_holds_everything(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndata: [a.txt, b.txt]\noutput: o\nlambda: 4e-7\npattern: '1:4'\n"
        "resume: true\nexport: dense\nlr:\nsteps: 1000\n"
    )
    assert parse(["--config", str(path)]) == RunConfig(
        model=Path("m"),
        data=(DataSource(place="a.txt"), DataSource(place="b.txt")),
        output=Path("o"),
        lambda_=4e-7,
        pattern="1:4",
        resume=True,
        export="dense",
        steps=1000,
    )


def test_every_field_is_a_flag():
    flags = ["--lambda", "1e-6", "--gradient-checkpointing", "--tokens", "1e9"]
    flags += ["--eval-data", "x.txt", "y.txt"]
    config = parse([*REQUIRED, *flags])
    assert config.lambda_ == 1e-6
    assert config.gradient_checkpointing
    assert config.tokens == 10**9
    assert config.eval_data == (DataSource(place="x.txt"), DataSource(place="y.txt"))


def test_pattern_other_than_2_of_4_exports_dense():
    assert parse([*REQUIRED, "--pattern", "4:8"]).export_form == "dense"
    assert parse([*REQUIRED, "--pattern", "4:8", "--export", "training"]).export_form == "training"


def test_identity_ignores_what_may_change_on_resume():
    before = parse([*REQUIRED, "--seed", "1"])
    assert parse([*REQUIRED, "--seed", "1", "--resume", "--save-steps", "7"]).identity() == (
        before.identity()
    )
    assert parse([*REQUIRED, "--seed", "2"]).identity() != before.identity()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1\n", "unknown key 'learning_rate'; known: model, data"),
        ("lambda_: 1\n", "unknown key 'lambda_'"),
        ("lr: fast\n", "lr: expected a number, got 'fast'"),
        ("lr: true\n", "lr: expected a number, got True"),
        ("lr: .nan\n", "lr: expected a number"),
        ("lr: 0\n", r"lr: 0.0 is out of range; it must be finite and above 0"),
        ("steps: 1.5\n", "steps: expected a whole number, got 1.5"),
        ("steps: [1]\n", r"steps: expected a whole number, got \[1\]"),
        ("steps: 0\n", "steps: 0 is out of range"),
        (f"lr: 1{'0' * 400}\n", "lr: expected a number, got 10000"),
        ("batch_size:\n", "batch_size: expected a whole number, got None"),
        ("resume: 1\n", "resume: expected true or false, got 1"),
        ("export: zip\n", "export: 'zip' is not possible; use packed, dense, training"),
        ("pattern: 2:4\n", "pattern: expected text, got number 124; quote it"),
        ("pattern: '4:2'\n", "pattern: '4:2' is no N:M pattern"),
        ("pattern: '02:04'\n", "pattern: '02:04' is no N:M pattern"),
        ("pattern: two of four\n", "pattern: 'two of four' is no N:M pattern"),
        ("eta: 1.1\n", "eta: 1.1 is out of range; it must be from 0 to 1"),
        ("lambda: -1\n", "lambda: -1.0 is out of range"),
        ("warmup: 1\n", "warmup: 1.0 is out of range"),
        ("decay_ramp: 0\n", "decay_ramp: 0.0 is out of range; it must be above 0 and at most 1"),
        ("decay_ramp: 1.5\n", "decay_ramp: 1.5 is out of range"),
        ("masked_rate: 0.5\n", "masked_rate: 0.5 is out of range; it must be 1 or more"),
        ("method: ast\nmasked_rate: 2\n", "masked_rate: is of method cast, not ast"),
        ("dense_rate: -0.1\n", "dense_rate: -0.1 is out of range; it must be 0 or more"),
        (
            "method: dense\ndense_rate: 0.5\n",
            "dense_rate: is of method cast, fixed-mask, sr-ste, ast",
        ),
        ("cuda_graph: true\ndevice: cpu\n", "cuda_graph: needs an NVIDIA GPU"),
        ("cuda_graph: true\ngradient_checkpointing: true\n", "use one of the two"),
        ("cuda_graph: true\nteacher: offload\n", "a teacher in host memory"),
        ("seed: -1\n", "seed: -1 is out of range"),
        ("steps: 5\ntokens: 5\n", "tokens: steps is given too"),
        ("eta: 0\nteacher: offload\n", "teacher: with eta 0 no teacher is asked; leave it out"),
        ("eta: 0\ntemperature: 2\n", "temperature: with eta 0 no teacher is asked"),
        ("teacher_top_k: 8\n", "teacher_top_k: is of teacher=cached; leave it out"),
        ("eta: 0\nloss: liger\n", "loss: with eta 0 there is no KL for liger to compute; use"),
        ("method: dense\npattern: '1:4'\n", "pattern: is of method cast, fixed-mask, sr-ste, ast"),
        ("scale_baselines: true\n", "scale_baselines: is of method fixed-mask, sr-ste, ast, not"),
        ("export: training\ndtype: bfloat16\n", "dtype: the training form keeps fp32 weights"),
        ("held_out: 0.2\neval_data: x.txt\n", "held_out: eval_data is evaluated on instead"),
        ("model: 5\n", "model: expected text, got number 5"),
        ("data: []\n", "data: no file given"),
        ("- lr\n", "must hold `key: value` lines, found a list"),
        ("lr: [1\n", "is not YAML"),
    ],
)
def test_yaml_errors(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text("output: o\n" + text if text[0] not in "-{" else text)
    keys = {line.partition(":")[0] for line in text.splitlines()}
    flags = [f for k in ("model", "data") if k not in keys for f in (f"--{k}", "x")]
    with pytest.raises(RunError, match=message) as caught:
        parse(["--config", str(path), *flags])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "a", "--output", "o"], "model: missing; give --model"),
        ([*REQUIRED, "--lr", "x"], "lr: expected a number, got 'x'"),
        ([*REQUIRED, "--steps", "inf"], "steps: expected a whole number"),
        ([*REQUIRED, "--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
        ([*REQUIRED, "--config", "absent.yaml"], "config: cannot read absent.yaml"),
        ([*REQUIRED, "--output", ""], "output: is empty"),
    ],
)
def test_flag_errors(flags, message):
    with pytest.raises(RunError, match=message):
        parse(flags)


def test_help_is_fast():
    code = (
        "import sys\nfrom cast_serve.trainer.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, "--help imports torch or transformers"
    assert "--scaling-blocks" in done.stdout
