"""Command lines: recipes and flags to checked settings."""

import contextlib
import dataclasses
import difflib
import importlib.resources
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro
import yaml

from sellarec.checks import check, check_bounds, check_data, check_fewest, check_share, check_width
from sellarec.config import NODE_TIMEOUT, STAGES, Config, Evaluation, Fuse, Planning, Preflight, Prepare, Sweep, leaves
from sellarec.errors import UserError
from sellarec.language.templates import is_file

Settings = TypeVar("Settings", bound=Config)
Flags = TypeVar("Flags", Evaluation, Planning, Preflight)


def recipe_folder() -> Path:
    return Path(str(importlib.resources.files("sellarec") / "recipes"))


def built_in_recipes() -> list[str]:
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def read_recipe(recipe: str) -> tuple[str, dict[str, Any]]:
    """The name of a recipe and its settings by dotted name, from a built-in name or a YAML file.

    Raises:
        UserError: no such recipe, not YAML, or a name in it that is no setting.
    """
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else recipe_folder() / f"{recipe}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(recipe, built_in_recipes(), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise UserError(
            f"there is no recipe '{recipe}': {hint}give a .yaml file that exists or one of {', '.join(built_in_recipes())}"
        )
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"recipe {path} is not readable YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"recipe {path} must hold settings by name, like 'align: {{temperature: 0.2}}', not {content!r}"
        )
    known = [name for name, _, _ in leaves(Config())]
    sections = {name.rpartition(".")[0] for name in known} - {""}
    settings: dict[str, Any] = {}

    def flatten(mapping: dict[str, Any], prefix: str) -> None:
        for key, value in mapping.items():
            name = f"{prefix}{key}"
            if name in sections and value is None:
                continue
            if name in sections and isinstance(value, dict):
                flatten(value, f"{name}.")
            elif name in known:
                settings[name] = value
            elif name in sections:
                raise UserError(
                    f"recipe {path}: {name} is a section of settings, not a setting: give it as '{name}: {{...}}'"
                )
            else:
                near = difflib.get_close_matches(name, [*known, *sections], n=3, cutoff=0.5)
                hint = f"did you mean {', '.join(near)}?" if near else "`--help` lists every setting"
                raise UserError(f"recipe {path}: there is no setting '{name}'; {hint}")

    flatten(content, "")
    name = path.parent.name if path.name == "config.yaml" else path.stem
    return name, settings


def parse(arguments: Sequence[str], program: str = "train.py") -> Config:
    """The config of a command line `[RECIPE ...] [--flag value ...]`, checked.

    Recipes are laid over the defaults from left to right, then the flags.

    Raises:
        UserError: an unknown recipe or setting, or settings that contradict each other.
        SystemExit: a flag that doesn't parse (status 2, the message on stderr), or `--help` (status 0).
    """
    config, names = _parse(Config, arguments, program)
    if config.name is None:
        config = dataclasses.replace(config, name="-".join(names))
    check(config)
    return dataclasses.replace(config, fuse=_in_order(config.fuse))


def parse_sweep(arguments: Sequence[str]) -> Sweep:
    """The settings of a command line `[RECIPE ...] [--flag value ...]` of jobs/tune.py, checked; the search space is not.

    Raises:
        UserError: an unknown recipe or setting, or settings that contradict each other.
        SystemExit: a flag that doesn't parse (status 2, the message on stderr), or `--help` (status 0).
    """
    sweep, names = _parse(Sweep, arguments, "tune.py")
    if sweep.name is None:
        sweep = dataclasses.replace(sweep, name="-".join([*names, sweep.stage]))
    check_bounds(sweep)
    check_share(sweep.share)
    if sweep.stages:
        raise UserError(
            f"stages is {', '.join(sweep.stages)}, but a sweep runs what its --stage reads, and its trials: leave it out"
        )
    if sweep.profile.stages:
        raise UserError(
            f"profile.stages is {', '.join(sweep.profile.stages)}, but trials would write over each other's traces: profile a "
            "run of jobs/train.py"
        )
    if sweep.trackers:
        raise UserError(
            f"trackers is {', '.join(sweep.trackers)}, but a sweep leaves its trials' numbers in a folder of its own "
            "(docs/tuning.md): leave it out, or track the winner, which jobs/train.py runs"
        )
    changes = getattr(sweep, sweep.stage).changes
    if sweep.search == "pbt" and sweep.trials < 2:
        raise UserError(f"search is pbt and trials {sweep.trials}: a population has two members or more")
    if sweep.search == "pbt" and changes:
        raise UserError(
            f"search is pbt and {sweep.stage}.changes {list(changes)}: a population finds the changes itself, leave them out"
        )
    if sweep.search != "pbt" and sweep.perturb_every != 1:
        raise UserError(
            f"perturb_every is {sweep.perturb_every}, but search is {sweep.search}: only pbt reads it, leave it out"
        )
    if sweep.metric is not None:
        section = dataclasses.replace(getattr(sweep, sweep.stage), select_on=sweep.metric)
        sweep = dataclasses.replace(sweep, **{sweep.stage: section})
    check(sweep.base())
    return dataclasses.replace(sweep, fuse=_in_order(sweep.fuse))


def _parse(kind: type[Settings], arguments: Sequence[str], program: str) -> tuple[Settings, list[str]]:
    """The settings of a command line `[RECIPE ...] [--flag value ...]`, and the recipes' names."""
    names, flags = _with_recipes(arguments, "demo")
    if any(flag in ("--stages", "--stages=") for flag in arguments) and not _has_stages(list(arguments)):
        raise UserError(f"--stages names none: give some of {', '.join(STAGES)}, separated by commas, or leave it out")
    description = (
        f"usage: {program} [RECIPE ...] [OPTIONS]\n\n{kind.__doc__}\n\nA RECIPE is a .yaml file or one of: "
        f"{', '.join(built_in_recipes())} (default: demo). Later ones are laid over earlier ones, then the flags."
    )
    config = tyro.cli(
        kind, args=_split_stages(flags), prog=program, description=description, config=(tyro.conf.FlagConversionOff,)
    )
    if is_file(config.prompt.template):
        # workers, which read it too, are in another folder
        path = str(Path(config.prompt.template).expanduser().absolute())
        config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, template=path))
    return config, names


def _in_order(fuse: Fuse) -> Fuse:
    """What is named in any order, in one: the order changes no result, so it shall change no fingerprint."""
    hints = get_type_hints(Fuse)

    def ordered(name: str) -> tuple[Any, ...]:
        return tuple(sorted(getattr(fuse, name), key=get_args(get_args(hints[name])[0]).index))

    return dataclasses.replace(fuse, tokens=ordered("tokens"), train=ordered("train"))


def parse_prepare(arguments: Sequence[str]) -> Prepare:
    """The settings of a command line `DATASET [--flag value ...]` of jobs/prepare.py, checked. A DATASET is a data recipe.

    Raises:
        UserError: an unknown recipe or setting, or settings that contradict each other.
        SystemExit: a flag that doesn't parse (status 2, the message on stderr), or `--help` (status 0).
    """
    if arguments and arguments[0].startswith("-") and not {"-h", "--help"} & set(arguments):
        raise UserError(f"the dataset comes first, before {arguments[0]}: one of {', '.join(built_in_recipes())}")
    _, flags = _with_recipes(arguments, "demo", only="data.")
    description = (
        f"usage: prepare.py DATASET [--path PATH] --out DIR [OPTIONS]\n\n{Prepare.__doc__}\n\nA DATASET is a .yaml file or one "
        f"of: {', '.join(built_in_recipes())}."
    )
    settings = tyro.cli(
        Prepare, args=flags, prog="prepare.py", description=description, config=(tyro.conf.FlagConversionOff,)
    )
    check_bounds(settings)
    check_data(settings.data)
    # tasks of a cluster don't run in this process's folder
    earlier = None if settings.init_from is None else settings.init_from.absolute()
    data = dataclasses.replace(settings.data, path=_absolute(settings.data.path), items=_absolute(settings.data.items))
    return dataclasses.replace(settings, out=settings.out.absolute(), init_from=earlier, data=data)


def parse_evaluation(arguments: Sequence[str]) -> Evaluation:
    """The settings of jobs/evaluate.py, checked.

    Raises:
        UserError: settings that are out of range, or contradict each other.
        SystemExit: a flag that doesn't parse (status 2, the message on stderr), or `--help` (status 0).
    """
    settings = _parse_flags(Evaluation, arguments, "evaluate.py")
    if not re.fullmatch(r"none|full|candidates:[1-9]\d{0,8}", settings.ranking):
        raise UserError(f"--ranking is '{settings.ranking}', but must be none, full or candidates:N, as candidates:100")
    if not settings.cutoffs or min(settings.cutoffs) < 1 or len(set(settings.cutoffs)) < len(settings.cutoffs):
        raise UserError(f"--cutoffs are {settings.cutoffs}: different numbers from 1 on are needed")
    if settings.ranking == "none" and settings.cutoffs != Evaluation.cutoffs:
        raise UserError(
            f"--cutoffs are {' '.join(map(str, settings.cutoffs))}, but --ranking is none, which makes none for them to cut: "
            "leave them out, or take --ranking full or candidates:100"
        )
    if settings.split == "train" and settings.ranking != "none":
        raise UserError(
            f"--split is train and --ranking {settings.ranking}, but what a user had in train is left out of what is ranked: "
            "take --ranking none, or another split"
        )
    return settings


def parse_planning(arguments: Sequence[str]) -> Planning:
    """The settings of jobs/plan.py, checked.

    Raises:
        UserError: settings that are out of range.
        SystemExit: a flag that doesn't parse (status 2, the message on stderr), or `--help` (status 0).
    """
    settings = _parse_flags(Planning, arguments, "plan.py")
    check_width("dim", settings.dim)
    if settings.mfu > 1:
        raise UserError(f"mfu is {settings.mfu}: a share above 0, at most 1, is needed")
    if settings.host_memory_per_worker is not None and settings.tables.placement == "device":
        raise UserError(
            "host_memory_per_worker is given, but tables.placement is device, which puts no rows into the host's memory: leave "
            "it out, or take uvm or uvm-caching"
        )
    defaults = Planning(workers=1, users=1, items=1)
    for name in ("rows", "gpu", "mfu"):
        if settings.llm is None and getattr(settings, name) != getattr(defaults, name):
            raise UserError(f"{name} is given, but llm is not, of which it says something: give --llm, or leave it out")
    return settings


def parse_preflight(arguments: Sequence[str]) -> Preflight:
    """The settings of jobs/preflight.py, checked.

    Raises:
        UserError: settings that are out of range.
        SystemExit: a flag that doesn't parse (status 2, the message on stderr), or `--help` (status 0).
    """
    settings = _parse_flags(Preflight, arguments, "preflight.py")
    check_fewest(settings.min_workers, settings.workers)
    check_share(settings.share)
    if settings.node_timeout != NODE_TIMEOUT and not settings.autoscaler:
        raise UserError(
            f"node_timeout is {settings.node_timeout:g}, but no nodes are waited for without autoscaler: leave it out, or give "
            "--autoscaler True"
        )
    if settings.min_workers is not None and settings.concurrent > 1:
        raise UserError(
            f"min_workers is {settings.min_workers} and concurrent {settings.concurrent}, but a sweep's trials have `workers` "
            "workers each: leave out one of the two"
        )
    return settings


def _parse_flags(kind: type[Flags], arguments: Sequence[str], program: str) -> Flags:
    """The settings of a command line without recipes, within their bounds."""
    settings = tyro.cli(kind, args=list(arguments), prog=program, config=(tyro.conf.FlagConversionOff,))
    check_bounds(settings)
    return settings


def typed(name: str, value: Any) -> Any:
    """A value of YAML as the setting of this dotted name takes it.

    Raises:
        UserError: it takes none such.
    """
    flags = _as_flag(name, value)
    if not _parses(flags):
        raise UserError(f"{name} can't be {value!r}: `--help` tells what it takes")
    config = tyro.cli(Config, args=flags, config=(tyro.conf.FlagConversionOff,))
    config = dataclasses.replace(config, fuse=_in_order(config.fuse))
    return next(found for other, found, _ in leaves(config) if other == name)


def _absolute(path: str | None) -> str | None:
    return path if path is None or "://" in path else str(Path(path).absolute())


def _with_recipes(arguments: Sequence[str], default: str, only: str = "") -> tuple[list[str], list[str]]:
    """The names of a command line's recipes, and its flags after those that the recipes stand for."""
    first_flag = next((i for i, text in enumerate(arguments) if text.startswith("-")), len(arguments))
    recipes, flags = list(arguments[:first_flag]), list(arguments[first_flag:])
    settings: dict[str, Any] = {}
    names = []
    for recipe in recipes or [default]:
        name, laid_over = read_recipe(recipe)
        if recipe not in built_in_recipes():  # whose values tests check
            _check_values(recipe, laid_over)
        names.append(name)
        settings.update(laid_over)
    chosen = {name: value for name, value in settings.items() if name.startswith(only)}
    return names, [argument for name, value in chosen.items() for argument in _as_flag(name, value)] + flags


def _has_stages(flags: list[str]) -> bool:
    split = _split_stages(flags)
    after = split[split.index("--stages") + 1 :]
    return bool(after) and not after[0].startswith("-")


def _check_values(recipe: str, settings: dict[str, Any]) -> None:
    """Refuse a value of a recipe that its setting can't take."""
    if not _parses([argument for name, value in settings.items() for argument in _as_flag(name, value)]):
        for name, value in settings.items():
            if not _parses(_as_flag(name, value)):
                kind = next(f.type for other, _, f in leaves(Config()) if other == name)
                raise UserError(
                    f"recipe {recipe}: {name} is {value!r}, which is none of {kind}: `--help` tells what it takes"
                )


def _parses(flags: list[str]) -> bool:
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            tyro.cli(Config, args=_split_stages(flags), config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        return False
    return True


def _as_flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]  # a value may begin with a dash


def _split_stages(flags: list[str]) -> list[str]:
    """`--stages a,b` as `--stages a b`, which is how a tuple is given."""
    out: list[str] = []
    for flag in flags:
        if flag.startswith("--stages="):
            out += ["--stages", *(part.strip() for part in flag.removeprefix("--stages=").split(",") if part.strip())]
        elif out and out[-1] == "--stages":
            out += [part.strip() for part in flag.split(",") if part.strip()]
        else:
            out.append(flag)
    return out
