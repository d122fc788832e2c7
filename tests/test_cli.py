"""The command line: every option is a field, and every mistake is one line that names the remedy."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from tracer.cli import _warnings_of_one_line, main, parse
from tracer.demo.config import DemoConfig
from tracer.train.config import Config


def refused(capsys, *argv: str) -> str:
    """Run the command, expect exit code 2 and one line; return the line."""
    assert main([str(a) for a in argv]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("tracer: error: ")
    return line


def test_options_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("train_data: a.csv\nlr: 3e-4\nsteps: 70\neval_data: {near: n.csv}\n")
    command, config = parse(["finetune", "--config", str(file), "--steps", "30", "--eval_data.far", "f.csv"])
    assert command == "finetune"
    assert (config.lr, config.steps, config.batch_size) == (3e-4, 30, 512)
    assert config.eval_data == {"near": Path("n.csv"), "far": Path("f.csv")}


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("tracer.cli.run", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == (
        "tracer: stopped; the same command goes on from the last whole checkpoint, if any\n"
    )


def test_a_missing_set_is_named_before_any_weights_are_fetched(capsys, tmp_path, monkeypatch):
    from tracer.train import run

    monkeypatch.setattr(run, "load_clip", lambda *args: pytest.fail("the model was loaded first"))
    line = refused(capsys, "finetune", "--train_data", tmp_path / "nope.csv", "--output", tmp_path / "run")
    assert "nope.csv' does not exist" in line


def test_finetune_prints_the_accuracy_on_every_set(capsys, tiny_config, drawings, tmp_path):
    options = {
        "train_data": drawings / "train.csv", "eval_data.held_out": drawings / "test.csv", "model": tiny_config,
        "pretrained": "null", "output": tmp_path / "run", "cache": tmp_path / "cache", "method": "flyp",
        "steps": 1, "warmup": 0, "batch_size": 8,
    }  # fmt: skip
    assert main(["finetune", *(str(x) for name, value in options.items() for x in (f"--{name}", value))]) == 0
    out = capsys.readouterr().out
    assert "held_out" in out
    assert "student" in out
    assert f"run: {tmp_path / 'run'}" in out


def test_a_warning_stands_above_the_bar(capsys):
    """Regression: it went on where the bar had ended, and DeepSpeed's old names of collectives were told of."""
    with _warnings_of_one_line(), tqdm(range(3), desc="training") as bar:
        bar.update()
        warnings.warn("the batch\nis small", stacklevel=1)
        warnings.warn(
            "`torch.distributed.all_gather_into_tensor` is deprecated. Please use another.",
            FutureWarning,
            stacklevel=1,
        )
    err = capsys.readouterr().err
    assert "\rtracer: warning: the batch is small\n" in err
    assert "deprecated" not in err


def test_the_demo_reaches_every_setting_of_a_run():
    assert {f.name for f in dataclasses.fields(Config)} < {f.name for f in dataclasses.fields(DemoConfig)}
    config = parse(["demo", "--seeds", "1", "--wma_beta", "0.3", "--margin", "0.05"])[1]
    assert (config.seeds, config.wma_beta, config.margin) == (1, 0.3, 0.05)


WHOLE = "train.csv"  # the data set that is there; x.csv is not
CAROT = ["finetune", "--train_data", "x.csv", "--baseline", "carot"]
R_ADAPTER = ["finetune", "--train_data", WHOLE, "--method", "r-adapter", "--pretrained", "null"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "expected"),
        (["fintune"], "tracer has no command 'fintune': did you mean finetune?"),
        (["finetune", "--learning-rate", "1"], "no option --learning_rate: did you mean --lr?"),
        (["finetune", "--test-data", "x.csv"], "no option --test_data: did you mean --eval_data.NAME?"),
        (["finetune", "--weight_decy", "1"], "no option --weight_decy: did you mean --weight_decay?"),
        (["finetune", "--lr_rate", "1"], "no option --lr_rate: did you mean --lr?"),
        (["finetune", "--epoch", "1"], "no option --epoch: did you mean --epochs?"),
        (["finetune", "--preci", "fp32"], "no option --preci: did you mean --precision?"),
        (["evaluate", "--zzz"], "no option --zzz: 'tracer evaluate --help' lists all"),
        (["index", "photos", "--jpeg", "exact"], "tracer index has no option --jpeg: 'tracer"),
        (["finetune"], "train_data"),
        (["finetune", "--train_data", "x.csv", "--learning_rate", "1"], "--learning_rate"),
        (["finetune", "--train_data", "x.csv", "--lr", "fast"], "Given value: fast"),
        (["finetune", "--train_data", "x.csv", "--teacher", "sma"], "Got value: sma"),
        (["finetune", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["finetune", "--train_data", "x.csv", "--steps", "0"], "--steps is 0: it must be at least 1"),
        (
            ["finetune", "--train_data", "x.csv", "--steps", "9", "--epochs", "2"],
            "--steps 9 and --epochs 2 exclude each other: give one of them",
        ),
        (["demo", "--epochs", "0"], "--epochs is 0: it must be at least 1"),
        (
            ["finetune", "--train_data", "x.csv", "--save_every", "0"],
            "--save_every is 0: it must be at least 1",
        ),
        (["finetune", "--train_data", "x.csv", "--batch_size", "1"], "needs at least 2 pairs"),
        (
            ["finetune", "--train_data", "x.csv", "--steps", "9", "--warmup", "500"],
            "--warmup is 500: it must be below --steps 9",
        ),
        (
            ["finetune", "--train_data", "x.csv", "--precision", "bf16", "--zero_stage", "0"],
            "--zero_stage 1 or more",
        ),
        (
            ["finetune", "--train_data", "x.csv", "--precision", "fp16", "--zero_stage", "0"],
            "--precision fp16 needs --zero_stage 1 or more",
        ),
        (
            ["finetune", "--train_data", "x.csv", "--compile", "true", "--zero_stage", "3"],
            "--compile true needs --zero_stage 2 or less",
        ),
        (
            ["finetune", "--train_data", "x.csv", "--freeze_text_blocks", "-1"],
            "--freeze_text_blocks is -1: it must be at least 0",
        ),
        (
            ["finetune", "--train_data", "x.csv", "--freeze", "text", "--freeze_text_blocks", "2"],
            "--freeze text freezes these blocks already: leave --freeze_text_blocks 2 out",
        ),
        (
            ["finetune", "--train_data", "x.csv", "--adapters", "true", "--freeze", "image"],
            "--freeze image and adapters exclude each other",
        ),
        (["demo", "--ablate", "true", "--freeze", "image"], "--freeze image: r-adapter trains adapters"),
        (
            ["finetune", "--train_data", "x.csv", "--mesh", "2by2"],
            "--mesh is '2by2': it must be auto, ring, or PxQ such as 4x2",
        ),
        (["finetune", "--train_data", "x.csv", "--timeout", "0"], "--timeout is 0.0: it must be above 0"),
        (
            [*R_ADAPTER, "--model", "tracer-demo", "--deepspeed", "nowhere.json"],
            "'nowhere.json' does not exist: check --deepspeed",
        ),
        (
            [*R_ADAPTER[:3], "--model", "RN50", "--pretrained", "null", "--freeze_image_blocks", "5"],
            "--freeze_image_blocks is 5: the image tower has 4 blocks",
        ),
        (
            [*R_ADAPTER[:3], "--model", "RN50", "--pretrained", "null", "--grad_checkpointing", "true"],
            "would move the statistics of BatchNorm ('visual.bn1') twice in each step: add --lock_batchnorm true",
        ),
        (
            ["finetune", "--train_data", "x.csv", "--adapter_alpha", "1.5"],
            "--adapter_alpha is 1.5: it must be",
        ),
        (
            ["finetune", "--train_data", "x.csv", "--adapter_momentum", "1"],
            "--adapter_momentum is 1.0: it must",
        ),
        (
            ["finetune", "--train_data", "x.csv", "--adapter_drop", "-0.1"],
            "--adapter_drop is -0.1: it must be",
        ),
        (
            ["finetune", "--train_data", "x.csv", "--adapter_rank", "0"],
            "--adapter_rank is 0: it must be at least",
        ),
        (["finetune", "--train_data", "x.csv", "--adapter_towers", "audio"], "Got value: audio"),
        (
            [*R_ADAPTER, "--model", "RN50"],
            "the visual tower is a ModifiedResNet, which has no transformer layers that R-Adapter knows",
        ),
        (
            [*R_ADAPTER, "--model", "ViT-S-32", "--adapter_rank", "385"],
            "adapter rank is 385: it must be from 1 to 384",
        ),
        (["finetune", "--train_data", WHOLE, "--model", "ViT-Z-32"], "unknown model 'ViT-Z-32'"),
        (
            ["finetune", "--train_data", WHOLE, "--model", "ViT-B-32", "--pretrained", "opnai"],
            "'opnai' is neither a local file nor a pretrained tag of ViT-B-32",
        ),
        (["finetune", "--train_data", WHOLE, "--pretrained", "no.pt"], "checkpoint 'no.pt' does not exist"),
        (["evaluate", "--eval_data.a", "nothing.csv"], "data 'nothing.csv' does not exist"),
        (["evaluate", "--eval_data.a", "x.csv", "--workers", "0"], "--workers is 0: it must be at least 1"),
        (["finetune", "--train_data", "x.csv", "--lr", "-1"], "--lr is -1.0: it must be above 0"),
        (["finetune", "--train_data", "x.csv", "--lr", "nan"], "lr"),
        (["finetune", "--train_data", "x.csv", "--lr", ".inf"], "--lr is inf: it must be above 0"),
        (["finetune", "--train_data", "x.csv", "--wma_beta", "0"], "--wma_beta is 0.0: it must be above 0"),
        (["finetune", "--train_data", "x.csv", "--ema_start", "2"], "--ema_start is 2.0: it must be from 0"),
        (["finetune", "--train_data", "x.csv", "--smoothing", "1.5"], "it must be at least 0 and below 1"),
        (["finetune", "--train_data", "x.csv", "--seed", "9876543210"], "it must be from 0 to 2147483647"),
        (
            ["finetune", "--train_data", "x.csv", "--eval_data.v1.5", "x.csv"],
            "--eval_data.v1.5: the name of a set holds no dots, write --eval_data.v1_5",
        ),
        (["evaluate", "--eval_data.v1.5=x.csv"], "the name of a set holds no dots, write --eval_data.v1_5"),
        (["evaluate", "--eval_data", "my photos.csv"], "such as --eval_data.my-photos my photos.csv"),
        (["evaluate", "--eval-data"], "--eval_data names no set: write --eval_data.NAME PATH"),
        (["demo", "--kinds", "near"], "--kinds names no set: write --kinds.NAME"),
        (["demo", "--method", "flyp"], "--method flyp has no effect: --methods says which"),
        (["demo", "--teacher", "ema"], "--teacher ema has no effect"),
        (["demo", "--adapters", "true"], "--adapters True has no effect"),
        (["demo", "--seed", "3"], "--seed 3 has no effect"),
        (["demo", "--baseline", "wma"], "--baseline wma has no effect: --methods says which"),
        # Regression: an option whose value is the default looked unset, and was overridden silently.
        (["demo", "--teacher", "wma"], "--teacher wma has no effect: each of --methods has its own teacher"),
        (
            ["demo", "--methods", "[flyp, carot]", "--distill_weight=0.9"],
            "carot has 1.0: leave --distill_weight out",
        ),
        ([*CAROT, "--distill_weight", "0.9"], "in place of which --baseline carot has 1.0: leave"),
        ([*CAROT, "--positives", "true"], "in place of which --baseline carot has False: leave"),
        (["demo", "--train_data", "photos"], "settings are chosen by --validation PATH"),
        (
            [*R_ADAPTER, "--adapters", "false"],
            "r-adapter trains adapters, which --adapters false excludes",
        ),
        (["finetune", "--log-every", "10"], "and needs none: log.jsonl has a line for each step"),
        (["finetune", "--resume", "latest"], "and needs none: the same command goes on"),
        (["demo", "--kinds.v1.5", "near"], "--kinds.v1.5: the name of a set holds no dots"),
        (["demo", "--seeds", "0"], "--seeds is 0: it must be at least 1"),
        (["demo", "--wise_alpha", "7"], "--wise_alpha is 7.0: it must be from 0 to 1"),
        (["demo", "--alphas", "[0.5, 3.0]"], "--alphas is 3.0: it must be from 0 to 1"),
        (
            ["demo", "--kinds.t", "foo"],
            "--kinds.t is 'foo': it must be one of in-distribution, near, shifted",
        ),
        (
            ["demo", "--eval_data.a", "a.csv", "--kinds.b", "near"],
            "--kinds.b names no evaluation set: the sets are a",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_it(capsys, drawings, tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(tmp_path)
    argv = [drawings / WHOLE if a == WHOLE else a for a in argv]
    enough = ["--batch_size", "8"] if drawings / WHOLE in argv else []
    assert says in refused(capsys, *argv, *enough)
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_in_the_file_is_named(capsys, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("train_data: a.csv\nlearning_rate: 1\n")
    line = refused(capsys, "finetune", "--config", file)
    assert f"'{file}': tracer finetune has no setting learning_rate: did you mean lr?" in line


@pytest.mark.parametrize("content", ["[1, 2]", "lr: [", "just words"])
def test_a_file_that_holds_no_settings_is_named(capsys, tmp_path, content):
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    assert f"'{file}'" in refused(capsys, "finetune", "--config", file)


def test_options_override_the_file_wherever_it_stands(tmp_path):
    """Steps and epochs stand for each other, so either overrides the file's other one."""
    file = tmp_path / "settings.yaml"
    file.write_text("train_data: a.csv\nsteps: 70\nlr: 3e-4\n")
    config = parse(["finetune", "--lr", "1", "--epochs", "3", "--config", str(file)])[1]
    config.validate()
    assert (config.steps, config.epochs, config.lr) == (None, 3, 1.0)
    file.write_text("train_data: a.csv\nepochs: 7\n")
    config = parse(["finetune", f"--config={file}", "--steps", "3"])[1]
    assert (config.steps, config.epochs) == (3, None)


def test_hyphens_are_accepted_and_the_names_of_sets_keep_them():
    argv = ["finetune", "--train-data", "a.csv", "--batch-size=8", "--eval-data.my-set", "b.csv"]
    config = parse(argv)[1]
    assert (config.batch_size, config.eval_data) == (8, {"my-set": Path("b.csv")})


def test_help_shows_sets_as_they_are_given(capsys):
    for command, option in (("evaluate", "--eval_data.NAME PATH"), ("demo", "--kinds.NAME ROLE")):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert option in capsys.readouterr().out


def test_a_set_whose_name_holds_a_dot_is_refused_in_the_file_too(capsys, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("eval_data: {v1.5: a.csv}\n")
    assert "the name of a set holds no dots" in refused(capsys, "evaluate", "--config", file)


def test_a_file_of_settings_that_is_not_text_is_named(capsys, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_bytes(b"\x89PNG\r\n")
    assert f"'{file}' is not YAML in UTF-8" in refused(capsys, "finetune", "--config", file)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x89PNG\r\n", "is not JSON in UTF-8"),
        (b"{", "is not JSON in UTF-8"),
        (b'{"circle": [1], "bar": ["a bar"]}', "a list of at least one string for each class"),
        (b'{"circle": [], "bar": ["a bar"]}', "a list of at least one string for each class"),
        (b'["circle", "bar"]', "must hold {class: [prompt, …]}"),
        (b'{"circle": ["a circle"]}', "has one class ('circle'): a classifier needs at least two"),
        (b"{}", "names no class: label the pictures"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(capsys, drawings, tmp_path, content, says):
    file = tmp_path / "classes.json"
    file.write_bytes(content)
    line = refused(
        capsys,
        "evaluate",
        "--eval_data.a",
        drawings / "test.csv",
        "--classes",
        file,
        "--model",
        "tracer-demo",
    )
    assert f"classes file '{file}'" in line
    assert says in line


def test_a_set_of_a_single_class_is_refused(capsys, drawings, tmp_path):
    file = tmp_path / "one.csv"
    file.write_text(f"image,label\n{next(drawings.glob('*.png'))},circle\n")
    assert "needs at least two" in refused(
        capsys, "evaluate", "--eval_data.a", file, "--model", "tracer-demo"
    )


def test_weights_that_do_not_fit_the_demo_s_model_are_named(capsys, drawings, tmp_path):
    def says(pretrained: str) -> str:
        options = (
            "--eval_data.a",
            drawings / "test.csv",
            "--cache",
            tmp_path / "cache",
            "--model",
            "tracer-demo",
        )
        return refused(capsys, "evaluate", *options, "--pretrained", pretrained)

    damaged, other = tmp_path / "damaged.safetensors", tmp_path / "other.safetensors"
    damaged.write_bytes(b"\xff" * 100)
    save_file({"visual.proj": torch.zeros(2, 2)}, other)
    assert f"model 'tracer-demo' with weights '{damaged}' cannot be loaded: " in says(str(damaged))
    line = says(str(other))
    assert f"model 'tracer-demo' with weights '{other}' cannot be loaded: Error(s) in loading" in line
    assert len(line) < 500 + len(str(other))
    assert "tracer-demo has no pretrained tags, and 'openai' is not a local file" in says("openai")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is not JSON in UTF-8"),
        (b"\x89PNG\r\n", "is not JSON in UTF-8"),
        (b"{}", "must hold embed_dim, vision_cfg and text_cfg"),
    ],
)
def test_a_model_config_that_cannot_be_used_is_named(capsys, drawings, tmp_path, content, says):
    file = tmp_path / "broken-model.json"
    file.write_bytes(content)
    options = ("--eval_data.a", drawings / "test.csv", "--cache", tmp_path / "cache", "--pretrained", "null")
    line = refused(capsys, "evaluate", *options, "--model", file)
    assert f"model config '{file}' {says}" in line
