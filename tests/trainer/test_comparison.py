"""cast-train compare: what runs, what is kept, and that the table holds what was written."""

import json
import math
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cast_serve.trainer.comparison import main as compare
from cast_serve.trainer.comparison.jobs import METHODS
from cast_serve.trainer.comparison.main import parse_comparison
from cast_serve.trainer.comparison.plots import lines_of, plot_curves
from cast_serve.trainer.comparison.results import Point, Row, read_results, render
from cast_serve.trainer.config_checks import own_settings
from cast_serve.trainer.data import load_corpus
from cast_serve.trainer.data_source import DataSource
from cast_serve.trainer.errors import RunError
from cast_serve.trainer.evaluation.mean_loss import mean_loss, to_perplexity
from cast_serve.trainer.gradient import Gradient
from cast_serve.trainer.main import main
from cast_serve.trainer.run_dir import Fixed, held, read_run, write_run
from cast_serve.trainer.source import load_source

REQUIRED = ["--model", "m", "--data", "a.txt", "--tokens", "1000"]
STEPS, BATCH, CONTEXT = 12, 4, 32


def jobs(*flags):
    return parse_comparison([*REQUIRED, "--output", "out", *flags]).jobs


@pytest.fixture
def eval_file(tmp_path):
    path = tmp_path / "eval.txt"
    path.write_text("the captain and the whale of the sea and ship " * 12)
    return path


@pytest.fixture
def flags(llama_dir, text_file, eval_file, tmp_path):
    return [
        *("compare", "--model", str(llama_dir), "--data", str(text_file)),
        *("--eval-data", str(eval_file), "--tokens", str(STEPS * BATCH * CONTEXT)),
        *("--context", str(CONTEXT), "--batch-size", str(BATCH), "--save-steps", "4"),
        *("--device", "cpu", "--export", "dense", "--dtype", "float32", "--allow-short-travel"),
        *("--lr", "cast=2e-3,sr-ste=1e-3", "--lambda", "cast=1e-4"),
        *("--output", str(tmp_path / "out"), "--methods", "magnitude,dense,sr-ste,cast"),
    ]


def written_perplexity(folder, llama_dir, eval_file):
    """Of a checkpoint as its files are, by a stock model."""
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(
        load_file(folder / "model.safetensors"), strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    source = DataSource(place=str(eval_file))
    tokenizer = load_source(llama_dir).tokenizer
    (blocks,) = load_corpus((source,), tokenizer, context=CONTEXT, held_out=0.0).parts
    return to_perplexity(mean_loss(model, blocks.stacked()))


@pytest.mark.slow
def test_every_run_is_compiled(flags, caplog):
    """torch.compile gives up on code that it compiled eight times, and says so in a warning."""
    methods = ["--methods", "dense,fixed-mask,sr-ste", "--lr", "", "--lambda", ""]
    tokens = ["--tokens", str(2 * BATCH * CONTEXT)]
    assert main([*flags, *methods, *tokens, "--compile", "--eval-steps", "1"]) == 0
    assert "recompile_limit" not in caplog.text


@pytest.mark.slow
def test_compare_interrupted_and_run_again(flags, llama_dir, eval_file, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    straight = ["--methods", "sr-ste", "--lr", "sr-ste=1e-3", "--lambda", ""]
    assert main([*flags, *straight, "--output", str(tmp_path / "straight")]) == 0

    compute, calls = Gradient.accumulate, []

    def interrupted(self, *arguments, **options):
        calls.append(None)
        # In sr-ste's 8th step, after dense's 12.
        if len(calls) == STEPS + 8:
            raise KeyboardInterrupt
        return compute(self, *arguments, **options)

    monkeypatch.setattr(Gradient, "accumulate", interrupted)
    assert main(flags) == 130
    found = json.loads((folder / "results.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["magnitude (one-shot)", "dense"]
    kept = (folder / "dense-seed0/model.safetensors").stat().st_mtime_ns

    calls.clear()
    monkeypatch.setattr(
        Gradient,
        "accumulate",
        lambda self, *a, **o: calls.append(None) or compute(self, *a, **o),
    )
    assert main(flags) == 0
    # sr-ste goes on after the checkpoint of step 4, cast runs, dense does not.
    assert len(calls) == (STEPS - 4) + STEPS
    assert (folder / "dense-seed0/model.safetensors").stat().st_mtime_ns == kept

    name = "sr-ste-lr0.001-seed0/model.safetensors"
    expected, weights = load_file(tmp_path / "straight" / name), load_file(folder / name)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)

    found = json.loads((folder / "results.json").read_text())
    rows = {row["checkpoint"]: row for row in found["rows"]}
    names = ["oneshot-magnitude-seed0", "dense-seed0", "sr-ste-lr0.001-seed0"]
    assert list(rows) == [*names, "cast-lr0.002-lambda0.0001-seed0"]
    text = (folder / "results.md").read_text()
    for name, row in rows.items():
        number = written_perplexity(folder / name, llama_dir, eval_file)
        assert row["perplexity"] == pytest.approx(number, rel=1e-5), name
        assert f"{row['perplexity']:.3f}" in text, name
        tokens = [point["tokens"] for point in row["curve"]]
        # Every 2 of 12 steps: the whole steps in a tenth of the run, rounded up.
        every = range(0, STEPS + 1, 2) if row["tokens"] else []
        assert tokens == [step * BATCH * CONTEXT for step in every], name
    sparse = rows["cast-lr0.002-lambda0.0001-seed0"]["curve"]
    one_shot = rows["oneshot-magnitude-seed0"]["perplexity"]
    assert sparse[0]["pruned"] == pytest.approx(one_shot, rel=1e-6)
    assert sparse[0]["perplexity"] == pytest.approx(found["rows"][0]["perplexity_dense"], rel=1e-6)
    for plot in ("perplexity.png", "final.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    assert found["setting"]["evaluated_on"] == "eval_data"
    assert str(tmp_path) not in json.dumps(found)

    calls.clear()
    assert main(flags) == 0
    assert not calls
    # A lost plot or table costs no training.
    (folder / "results.md").unlink()
    shutil.rmtree(folder / "cast-lr0.002-lambda0.0001-seed0")
    assert main(flags) == 0
    assert not calls
    assert (folder / "results.md").read_text() == text


@pytest.mark.slow
def test_compare_side_by_side(flags, tmp_path, capsys, monkeypatch):
    """The same weights as one by one, in the order of --methods; a failure is one row less."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    flags += ["--methods", "sr-ste,dense,magnitude,cast", "--log-steps", "1"]
    flags += ["--lr", "cast=2e-3,sr-ste=1e30"]
    assert main([*flags, "--jobs", "2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: 1 of 4 runs failed; the first: sr-ste-lr1e+30-seed0: the gradient is" in error
    together = tmp_path / "out"
    alone = tmp_path / "alone"
    assert (
        main(
            [
                *flags,
                "--methods",
                "dense,magnitude,cast",
                "--lr",
                "cast=2e-3",
                "--output",
                str(alone),
            ]
        )
        == 0
    )
    rows = [row.checkpoint for row in read_results(together)[1]]
    assert rows == [row.checkpoint for row in read_results(alone)[1]]
    for name in rows:
        weights, expected = (load_file(f / name / "model.safetensors") for f in (together, alone))
        assert all(torch.equal(weights[key], expected[key]) for key in expected), name
        assert (together / f"{name}.log").is_file()
    (together / "results.json").unlink()
    assert main([*flags, "--only", "dense-seed0"]) == 0
    assert not (together / "results.json").exists()


@pytest.mark.slow
def test_compare_side_by_side_ends_its_runs(flags, tmp_path):
    command = [sys.executable, "-m", "cast_serve.trainer.main", *flags]
    command += ["--methods", "dense,cast", "--lr", "cast=2e-3", "--tokens", "100000000"]
    process = subprocess.Popen([*command, "--jobs", "2"], stderr=subprocess.PIPE, text=True)
    names = ("dense-seed0", "cast-lr0.002-lambda0.0001-seed0")
    logs = [tmp_path / f"out/{name}.run/log.jsonl" for name in names]
    deadline = time.monotonic() + 240
    while not all(log.exists() for log in logs):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    runs = psutil.Process(process.pid).children(recursive=True)
    assert len(runs) >= 2
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "cast-train compare: interrupted" in error
    assert not any(run.is_running() for run in runs)


def test_compare_refuses_another_setting_in_the_same_folder(flags, capsys, tmp_path):
    only = [*flags, "--methods", "magnitude", "--lr", "", "--lambda", ""]
    assert main(only) == 0
    assert main([*only, "--pattern", "1:4"]) == 2
    assert "pattern was" in capsys.readouterr().err


def test_compare_knows_no_settings_of_a_run_whose_record_is_gone(flags, capsys, tmp_path):
    only = [*flags, "--methods", "magnitude", "--lr", "", "--lambda", ""]
    assert main(only) == 0
    shutil.rmtree(tmp_path / "out/oneshot-magnitude-seed0.run")
    assert main([*only, "--scaling-blocks", "4"]) == 2
    error = capsys.readouterr().err
    assert "oneshot-magnitude-seed0 is finished, and" in error
    assert "is gone; put it back, or remove the output and run again" in error


def test_compare_writes_nothing_to_the_folder_of_the_model(flags, llama_dir, capsys, tmp_path):
    folder = shutil.copytree(llama_dir, tmp_path / "model")
    held = sorted(folder.iterdir())
    places = ["--model", str(folder), "--output", str(folder / "runs")]
    assert main([*flags, *places, "--jobs", "2"]) == 2
    assert "is in the folder that is read" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == held


def test_a_one_shot_prune_has_one_writer(flags, capsys):
    only = [*flags, "--methods", "magnitude", "--lr", "", "--lambda", ""]
    (job,) = parse_comparison(only[1:]).jobs
    with held(job.config):
        assert main(only) == 2
    assert "another cast-train is writing" in capsys.readouterr().err
    assert main(only) == 0
    assert not (job.config.run_dir / ".lock").exists()


def test_compare_refuses_a_short_travel_before_it_trains(flags, capsys, tmp_path):
    flags.remove("--allow-short-travel")
    assert main([*flags, "--lr", "cast=1e-6"]) == 2
    assert "cast-train compare: error: travel 0.0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_compare_goes_on_after_a_run_that_diverges(flags, capsys, tmp_path):
    given = ["--methods", "sr-ste,magnitude", "--lr", "sr-ste=1e30", "--lambda", ""]
    assert main([*flags, *given, "--log-steps", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "cast-train compare: error: 1 of 2 runs failed; the first: sr-ste-lr1e+30"
    )
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["magnitude (one-shot)"]


def test_jobs_by_default():
    found = {job.method: job for job in jobs()}
    assert list(found) == [m for m in METHODS if ":" not in m]
    configs = {method: job.config for method, job in found.items()}
    assert configs["wanda"].initial_mask == "wanda"
    assert not found["wanda"].trains
    assert configs["cast"].method == "cast"
    assert configs["fixed-mask"].pruned_first == "magnitude"
    assert configs["cast"].pruned_first is None
    assert {config.tokens for config in configs.values()} == {1000}
    assert all(config.lr is None for config in configs.values())
    assert len({job.name for job in found.values()}) == len(found)


def test_jobs_of_rates_and_seeds():
    found = jobs(
        "--methods",
        "magnitude,fixed-mask:wanda,ast",
        "--seeds",
        "1,2",
        "--lr",
        "ast=1e-4,ast=2e-4",
        "--lambda",
        "ast=1e-5",
        "--eta",
        "0.5",
    )
    assert [job.name for job in found] == [
        "oneshot-magnitude-seed1",
        "fixed-mask-wanda-seed1",
        "fixed-mask-wanda-seed2",
        "ast-lr0.0001-lambda1e-05-seed1",
        "ast-lr0.0001-lambda1e-05-seed2",
        "ast-lr0.0002-lambda1e-05-seed1",
        "ast-lr0.0002-lambda1e-05-seed2",
    ]
    last = found[-1].config
    assert (last.method, last.lr, last.lambda_, last.seed) == ("ast", 2e-4, 1e-5, 2)
    assert {job.config.eta for job in found} == {0.5}
    assert found[1].config.initial_mask == "wanda"


def test_cast_from_a_one_shot_start():
    given = ["--lr", "cast:sparsegpt=1e-4", "--lambda", "cast:sparsegpt=1e-6"]
    (job,) = jobs("--methods", "cast:sparsegpt", *given)
    assert job.name == "cast-sparsegpt-lr0.0001-lambda1e-06-seed0"
    assert job.trains
    config = job.config
    assert (config.method, config.start, config.lr) == ("cast", "sparsegpt", 1e-4)


def test_jobs_that_vary():
    methods = ["--methods", "magnitude,cast", "--lambda", "cast=1e-5"]
    found = jobs(*methods, "--vary", "eta=0,1", "warmup=0.5", "--warmup", "0.1")
    assert [job.name for job in found] == [
        "oneshot-magnitude-seed0",
        "cast-lambda1e-05-seed0",
        "cast-lambda1e-05-eta0-seed0",
        "cast-lambda1e-05-eta1-seed0",
        "cast-lambda1e-05-warmup0.5-seed0",
    ]
    settings = [(job.config.eta, job.config.warmup) for job in found[1:]]
    assert settings == [(1 / 3, 0.1), (0.0, 0.1), (1.0, 0.1), (1 / 3, 0.5)]


@pytest.mark.slow
def test_compare_varies_one_flag_at_a_time(flags, tmp_path):
    methods = ["--methods", "magnitude,cast", "--lr", "cast=2e-3", "--tokens", "512"]
    assert main([*flags, *methods, "--vary", "tokens=256", "masked-rate=1,16"]) == 0
    folder = tmp_path / "out"
    found, rows = read_results(folder)
    assert found["setting"]["given"] == {"tokens": 512, "masked_rate": 1.0}
    assert [(row.otherwise, row.tokens) for row in rows] == [
        ("", 0),
        ("", 512),
        ("tokens 256", 256),
        ("masked_rate 1", 512),
        ("masked_rate 16", 512),
    ]
    _, usual, shorter, same, faster = (row.perplexity for row in rows)
    assert same == usual != faster
    name = "cast-lr0.002-lambda0.0001-seed0"
    assert lines_of(rows, "tokens", 512) == {name: [(256, shorter), (512, usual)]}
    text = (folder / "results.md").read_text()
    assert "| method | otherwise | tokens |" in text
    assert "| cast | masked_rate 16 | 512 | 0.002 | 0.0001 | 0 |" in text
    assert (folder / "varied.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--methods", "cast,lottery"], "methods: 'lottery' is none; known: magnitude, wanda"),
        (["--methods", "cast,cast"], "methods: one is named twice"),
        (["--lr", "1e-4"], "lr: '1e-4' names no method; write --lr METHOD=1e-4"),
        (["--lr", "wanda=1e-4"], "lr: 'wanda' is not trained with one here; known: dense, fixed"),
        (["--lr", "cast=fast"], "lr: expected a number for cast, got 'fast'"),
        (["--lr", "cast=-1"], "lr: -1.0 is out of range"),
        (["--lambda", "dense=1"], "lambda: 'dense' is not trained with one here; known: sr-ste"),
        (["--seeds", "1,x"], "seeds: expected different whole numbers"),
        (["--seeds", "1,1"], "seeds: expected different whole numbers"),
        (["--method", "ast"], "method: it differs from run to run; name them in --methods"),
        (["--start", "wanda"], "start: it differs from run to run; name the method cast:sparsegpt"),
        (["--methods", "cast:sparsegpt"], "lr: cast:sparsegpt needs one, as --lr cast:sparsegpt=X"),
        (["--jobs", "0"], "jobs: 0 is out of range"),
        (["--only", "cast-seed0,ast"], "only: 'ast' is no run of these; known: oneshot"),
        (
            ["--methods", "dense,fixed-mask:wanda", "--masked-rate", "4"],
            "masked_rate: is of cast alone, and --methods names none of these",
        ),
        (
            ["--methods", "cast:sparsegpt,dense", "--vary", "masked-rate=4"],
            "vary: masked_rate is of cast alone, not of dense; give --methods cast:sparsegpt",
        ),
        (
            ["--methods", "dense", "--pattern", "1:4"],
            "pattern: is of cast, fixed-mask, sr-ste, ast alone, and --methods names none of these",
        ),
        (["--resume"], "resume: it differs from run to run; leave it out"),
        (["--dry-run"], "dry_run: it differs from run to run"),
        (["--batch", "4"], "unrecognized arguments: --batch"),
        (["--vary", "eta"], "vary: 'eta' gives no values; write --vary eta=VALUE,VALUE"),
        (["--vary", "seed=1"], "vary: 'seed' cannot be varied; known: eta, temperature, scaling_"),
        (["--vary", "context=8"], "vary: 'context' cannot be varied"),
        (["--vary", "eta=2"], "eta: 2.0 is out of range"),
        (["--vary", "eta=0.5,0.5"], "vary: a value is given twice"),
        (["--vary", "steps=5"], "tokens: steps is given too"),
        (
            ["--vary", "masked-rate=4"],
            "vary: masked_rate is of cast alone, not of dense, fixed-mask",
        ),
        (
            ["--vary", "mask-metric=activation", "--methods", "ast,fixed-mask:wanda"],
            "of cast, sr-ste, ast alone, not of fixed-mask:wanda; give --methods ast",
        ),
    ],
)
def test_flags_that_are_refused(given, message):
    with pytest.raises(RunError, match=message):
        jobs(*given)


def test_methods_are_given_what_is_of_them():
    found = jobs("--mask-metric", "activation", "--decay-ramp", "0.1", "--masked-rate", "4")
    given = {job.method: job.config for job in found}
    with_metric = {name for name, config in given.items() if config.mask_metric == "activation"}
    assert with_metric == {"cast", "sr-ste", "ast"}
    assert {name for name, config in given.items() if config.decay_ramp == 0.1} == {"cast"}
    assert {name for name, config in given.items() if config.masked_rate == 4} == {"cast"}


def test_the_pattern_is_of_all_that_are_sparse():
    given = {job.method: job.config for job in jobs("--pattern", "1:4")}
    assert given.pop("dense").pattern == "2:4"
    assert {config.pattern for config in given.values()} == {"1:4"}
    assert not any(own_settings(config) for config in given.values())


def test_a_run_goes_on_whatever_its_method_does_not_look_at(tmp_path):
    given = ["--methods", "dense", "--output", str(tmp_path)]
    (job,) = parse_comparison([*REQUIRED, *given]).jobs
    fixed = Fixed(
        steps=1,
        context=8,
        sequences_per_step=1,
        lr=1e-3,
        lambda_=0.0,
        data_sha256="",
        dense_loss=1.0,
    )
    write_run(job.config, fixed)
    record = json.loads((job.config.run_dir / "run.json").read_text())
    record["config"]["pattern"] = "1:4"
    (job.config.run_dir / "run.json").write_text(json.dumps(record))
    assert read_run(job.config) == fixed


def test_a_rate_in_yaml_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-4\n")
    with pytest.raises(RunError, match="lr: it differs from run to run; give --lr METHOD=X"):
        jobs("--config", str(path))


def test_render_means_over_seeds():
    def row(seed, found, method="cast"):
        return Row(
            method=method,
            checkpoint=f"{method}-lr0.1-seed{seed}",
            tokens=2048,
            lr=0.1,
            lambda_=None,
            seed=seed,
            perplexity_dense=9.0,
            perplexity_before_prune=12.5,
            perplexity=found,
            curve=(Point(tokens=0, perplexity=9.0, pruned=90.0),),
        )

    setting = {"model": "m", "pattern": "2:4", "data": ["a.txt"], "evaluation_tokens": 512}
    setting |= {"evaluated_on": "held-out", "context": 32}
    env = {"gpu": "CPU", "torch": "2", "commit": "abc"}
    text = render([row(0, 12.0), row(1, 14.0), row(0, 20000.0, "ast")], setting, env)
    assert "| cast | 2,048 | 0.1 |  | 1 | 12.500 | 14.000 |" in text
    assert "| ast | 2,048 | 0.1 |  | 0 | 12.500 | 2e+04 |" in text
    assert "| cast | 0.1 |  | 2 | 13.000 ± 1.414 |" in text
    assert text.count("±") == 1


def test_a_row_has_the_settings_of_its_method_alone():
    found = jobs(
        "--mask-metric", "activation", "--decay-ramp", "0.1", "--second-moment", "gradient"
    )
    settings = {job.method: own_settings(job.config) for job in found}
    ours = {"decay_ramp": 0.1, "mask_metric": "activation", "second_moment": "gradient"}
    assert settings["cast"] == ours
    assert settings["ast"] == {"mask_metric": "activation"}
    assert settings["dense"] == settings["fixed-mask"] == {}


def test_methods_of_the_command_are_those_of_the_trainer():
    from cast_serve.trainer.methods import METHODS as trained

    assert set(compare.TRAINED) == set(trained)


def test_plot_of_a_run_that_was_ruined(tmp_path):
    """Its perplexity may overflow."""
    curve = (
        Point(tokens=0, perplexity=9.0, pruned=90.0),
        Point(tokens=1024, perplexity=30.0, pruned=math.inf),
        Point(tokens=2048, perplexity=20.0, pruned=21.0),
    )
    row = Row(
        method="cast",
        checkpoint="cast-seed0",
        tokens=2048,
        lr=0.1,
        lambda_=None,
        seed=0,
        perplexity_dense=9.0,
        perplexity_before_prune=20.0,
        perplexity=21.0,
        curve=curve,
    )
    plot_curves([row], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_long_legend_is_inside_the_plot(tmp_path):
    from matplotlib.image import imread

    long = {"decay_ramp": 0.02, "second_moment": "gradient", "mask_metric": "activation"}
    rows = [
        Row(
            method="fixed-mask:sparsegpt",
            checkpoint=f"run-{lr}",
            tokens=3000,
            lr=lr,
            lambda_=None,
            seed=0,
            perplexity_dense=20.0,
            perplexity_before_prune=30.0,
            perplexity=30.0,
            curve=(Point(tokens=0, perplexity=20.0, pruned=100.0),),
            settings=settings | {"dense_rate": lr},
        )
        for lr, settings in ((1e-3, long), (2e-3, {}), (3e-3, long))
    ]
    plot_curves(rows, tmp_path / "plot.png")
    shown = imread(tmp_path / "plot.png")[..., :3]
    assert (shown[:, :2] == 1).all()
    assert (shown[:, -2:] == 1).all()
