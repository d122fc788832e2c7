"""The words of the command line: options as people type them, and what they may have meant."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches

from tracer.errors import UserError

NAMED = {"eval_data": "PATH", "kinds": "ROLE"}  # options of named sets: --eval_data.NAME PATH
REPEATED = ("prompt_template", "log_to")  # options that may be given several times, a value each

# What other programs call an option.
SYNONYMS = {
    "lr": "learning_rate rate base_lr",
    "batch_size": "bs batch train_batch_size per_device_train_batch_size global_batch_size",
    "epochs": "epoch num_epochs num_train_epochs max_epochs",
    "steps": "max_steps iterations iters num_steps total_steps",
    "warmup": "warmup_steps num_warmup_steps lr_warmup",
    "weight_decay": "wd decay",
    "train_data": "train data dataset data_dir train_dir training_data",
    "eval_data": "eval test test_data val val_data validation_data valid_data eval_dir imagenet_val",
    "pretrained": "weights checkpoint ckpt init load resume_from run",
    "model": "arch architecture model_name backbone",
    "output": "out output_dir save_dir out_dir logdir log_dir logs dir run_dir",
    "workers": "num_workers threads jobs dataloader_num_workers",
    "precision": "amp dtype bf16 fp16 mixed_precision",
    "accumulation": "accum_freq grad_accum gradient_accumulation_steps accumulate",
    "clip_grad": "grad_clip_norm max_grad_norm gradient_clip_val",
    "save_every": "save_frequency checkpoint_every save_steps",
    "eval_every": "val_frequency eval_steps zeroshot_frequency eval_frequency",
    "seed": "random_seed",
    "seeds": "num_seeds runs",
    "prompt_template": "template prompt prompts zeroshot_template",
    "log_to": "report_to logger loggers logging",
    "classes": "class_names classnames labels",
    "freeze": "lock_image lock_text freeze_image freeze_text",
    "alpha": "a weight lambda wise_alpha",
}

# Options of other trainers that need no counterpart here, and why.
UNNEEDED = {
    "log_every log_steps logging_steps log_freq log_frequency log_interval log_every_n_steps": (
        "log.jsonl has a line for each step"
    ),
    "resume auto_resume resume_from_checkpoint continue": (
        "the same command goes on with a run that was interrupted"
    ),
    "local_loss gather_with_grad": "on several ranks the loss always sees the pairs of all, each computed once",
    "local_rank nproc nproc_per_node num_gpus gpus devices nnodes world_size": (
        "torchrun --nproc-per-node N -m tracer … starts several ranks"
    ),
}


def normalised(argv: list[str]) -> list[str]:
    """Return the arguments with underscores in the names of options, and ``--config`` before what overrides it.

    The name of a set keeps its hyphens: ``--eval-data.my-set`` becomes ``--eval_data.my-set``. Several values of
    an option of :data:`REPEATED` become one list.
    """
    first, others, repeated = list[str](), list[str](), dict[str, list[str]]()
    words = iter(argv)
    for word in words:
        if not word.startswith("--") or word == "--":
            others.append(word)
            continue
        option, equals, value = word[2:].partition("=")
        name, dot, rest = option.partition(".")
        name = name.replace("-", "_")
        if name in ("config", *REPEATED):
            given = value if equals else next(words, None)
            if given is None:
                raise UserError(f"--{name} needs a value")
            if name == "config":
                first += ["--config", given]
            else:
                repeated.setdefault(name, []).append(given)
        else:
            others.append(f"--{name}{dot}{rest}{equals}{value}")
    lists = [f"--{name}={_as_list(values)}" for name, values in repeated.items()]
    command = 1 if others and not others[0].startswith("-") else 0
    return [*others[:command], *first, *others[command:], *lists]


def _as_list(values: list[str]) -> str:
    """Return values as a YAML list, a single one that is a list already as it is."""
    if len(values) == 1 and values[0].startswith("["):
        return values[0]
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"[{quoted}]"


def check_command(argv: list[str], commands: Collection[str]) -> None:
    """Raise UserError for a command that does not exist, with the one that may have been meant."""
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise UserError(
            f"tracer has no command '{argv[0]}': {_meant(get_close_matches(argv[0], commands, 1), '')}"
            f"the commands are {', '.join(commands)}"
        )


def check_options(command: str, argv: Iterable[str], known: Collection[str]) -> None:
    """Raise UserError for an option that the command does not have, with the one that may have been meant.

    A beginning of an option is none: argparse would take it, but what reads the arguments would not know it.
    """
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name = word[2:].partition("=")[0].partition(".")[0]
            if name not in known:
                raise unknown(command, name, known, "--")


def unknown(command: str, name: str, known: Collection[str], dashes: str) -> UserError:
    """Return the error about an option that a command does not have; with no ``dashes`` a setting of a file."""
    what = "option" if dashes else "setting"
    plain = name.lower().replace("-", "_")
    why = next((reason for words, reason in UNNEEDED.items() if plain in words.split()), None)
    if why:
        return UserError(f"tracer {command} has no {what} {dashes}{name} and needs none: {why}")
    likely = likely_meant(name, known)
    shown = [f"{option}.NAME" if dashes and option in NAMED else option for option in likely]
    return UserError(
        f"tracer {command} has no {what} {dashes}{name}: {_meant(shown, dashes)}"
        f"'tracer {command} --help' lists all"
    )


def likely_meant(name: str, known: Collection[str]) -> list[str]:
    """Return the known option that is meant: a synonym, or one that begins so, is spelt alike, or is in it."""
    plain = name.lower().replace("-", "_")
    by_synonym = [option for option, words in SYNONYMS.items() if option in known and plain in words.split()]
    begun = [option for option in sorted(known) if option.startswith(plain)]
    alike = get_close_matches(plain, known, 1, cutoff=0.6)
    return (by_synonym or begun or alike or [word for word in plain.split("_") if word in known])[:1]


def _meant(likely: list[str], dashes: str) -> str:
    return f"did you mean {dashes}{likely[0]}? " if likely else ""
