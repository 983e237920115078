"""Command lines: a YAML file plus flags become one frozen dataclass; a wrong key is answered with the nearest one."""

import argparse
import dataclasses
import difflib
import errno
import inspect
import itertools
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

try:  # the first library that any program of ours reads: where it is absent, all are
    import jsonargparse
    import yaml
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is not installed for {sys.executable}. After `make demo` everything is in .venv: run "
        '`. .venv/bin/activate` first; or install it here with `python -m pip install -e ".[eval,serve]"`.'
    ) from None

Config = TypeVar("Config")
NOT_USABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EISDIR)  # for users to mend
INTERRUPTED = 128 + signal.SIGINT  # the exit status that shells give
HELP_FLAGS = ("--help", "-h")
RESERVED_FLAGS = (*HELP_FLAGS, "--config", "--print_config")


def parse(config_class: type[Config], argv: list[str] | None = None) -> Config:
    """Read `--config FILE` and flags such as `--optimizer.learning_rate 1e-5` into `config_class`.

    Bool fields may be given bare (`--fresh`), and so may a str field with "bare" (its value then) as metadata.
    Exits with status 2 and one line on standard error for anything that is not a field or not a value of its type.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    fields = _leaf_fields(config_class)
    arguments = _fill_bare_flags(arguments, fields)
    _check_flags(arguments, fields)
    _check_words(arguments, fields)
    _check_files(arguments, fields)
    arguments = _files_first(arguments)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        return jsonargparse.auto_cli(
            config_class, as_positional=False, args=arguments, prog=_program(), exit_on_error=False
        )
    except argparse.ArgumentError as error:  # the usage of 80 options, which goes with it, would hide the one line
        _refuse(f"{' '.join(str(error).split())}; {_program()} --help explains every option.")
    except ValueError as error:  # a check in some __post_init__: the message is the answer, not the traceback
        _refuse(str(error))


def run(config_class: type[Config], action: Callable[[Config], object], argv: list[str] | None = None) -> None:
    """Parse the command line and act on it; what the user can mend is one line on standard error and exit status 2."""
    config = parse(config_class, argv)
    try:
        action(config)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        package = Path(__file__).parent
        if package not in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents:
            raise  # not a message of ours: the traceback is needed
        _refuse(str(error))
    except OSError as error:
        if error.errno not in NOT_USABLE:
            raise
        _refuse(f"{error.filename or 'the disk'} cannot be used: {error.strerror}; mend that, or name another place.")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # Ctrl-C: a traceback would say nothing that the user does not know
        raise SystemExit(INTERRUPTED) from None


def main_of(module: str, what: str) -> Callable[[list[str]], None]:
    """Return a command, described by `what`: the module's `main`, read when it runs."""

    def command(arguments: list[str]) -> None:
        import_module(module).main(arguments)

    command.__doc__ = what
    return command


def run_command(program: str, commands: dict[str, Callable[[list[str]], None]], arguments: list[str]) -> None:
    """Run the command named by the first argument; `--help` lists them, and a wrong name ends with status 2."""
    name, *rest = arguments or [""]
    width = max(map(len, commands))
    lines = "\n".join(f"  {command:<{width}}  {inspect.getdoc(action)}" for command, action in commands.items())
    if name in HELP_FLAGS:
        print(f"python -m {program} COMMAND [OPTIONS]; COMMAND --help explains the options.\n\n{lines}")
        return
    if name not in commands:
        nearest = difflib.get_close_matches(name, commands, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        _refuse(f"python -m {program} wants one of these commands, got {name!r}{hint}:\n{lines}")
    commands[name](rest)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as nested plain dicts."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """Return the resolved config as YAML in field order."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def flatten(config: Any) -> dict[str, Any]:
    """Return {"optimizer.learning_rate": 1e-5, ...} for a config or nested dict."""
    nested = config if isinstance(config, dict) else to_dict(config)
    flat = {}
    for key, value in nested.items():
        children = {f"{key}.{name}": inner for name, inner in flatten(value).items()} if isinstance(value, dict) else {}
        flat.update(children or {key: value})
    return flat


def _leaf_fields(config_class: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Return the dotted name of every field that is not itself a config."""
    hints, leaves = get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            leaves.update(_leaf_fields(hints[field.name], f"{prefix}{field.name}."))
        else:
            leaves[prefix + field.name] = field
    return leaves


def _fill_bare_flags(arguments: list[str], fields: dict[str, dataclasses.Field]) -> list[str]:
    filled = []
    for argument, following in itertools.pairwise([*arguments, "--"]):
        filled.append(argument)
        field = fields.get(argument.removeprefix("--")) if argument.startswith("--") else None
        if field is None or not following.startswith("--"):
            continue
        bare = "true" if field.type in (bool, "bool") else field.metadata.get("bare")
        if bare is not None:
            filled.append(bare)
    return filled


def _check_flags(arguments: list[str], fields: dict[str, dataclasses.Field]) -> None:
    groups = {name.rsplit(".", depth)[0] for name in fields for depth in range(1, name.count(".") + 1)}
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        if flag.startswith("--") and flag not in RESERVED_FLAGS and flag[2:] not in {*fields, *groups}:
            _refuse_unknown("flag", flag, [*(f"--{name}" for name in fields), *RESERVED_FLAGS])


def _check_words(arguments: list[str], fields: dict[str, dataclasses.Field]) -> None:
    """Refuse a word that is no option's value, and name the option that it was probably meant for."""
    if any(flag in arguments for flag in HELP_FLAGS):
        return
    for before, word in itertools.pairwise(["", *arguments]):
        is_value = before.startswith("--") and "=" not in before and before != "--print_config"
        if not is_value and not word.startswith("-"):
            option = _option_for(word, fields)
            hint = f"did you mean {option} {word}?" if option else "give it as --NAME VALUE, and a list as [a,b]."
            _refuse(f"{word} stands behind no option; {hint}")


def _option_for(word: str, fields: dict[str, dataclasses.Field]) -> str:
    """Return the flag that takes a file or folder like this one; empty: none, or it is not clear which."""
    by_suffix = {".yaml": "config", ".yml": "config", ".jsonl": "data.path", ".gz": "data.path"}
    name = by_suffix.get(Path(word).suffix, "")
    if not name and ("/" in word or Path(word).exists()):
        name = next((field for field in ("checkpoint", "run") if field in fields), "")
    return f"--{name}" if name == "config" or name in fields else ""


def _check_files(arguments: list[str], fields: dict[str, dataclasses.Field]) -> None:
    files = [value for flag, value in itertools.pairwise([*arguments, ""]) if flag == "--config"]
    files += [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    for name in files:
        if not Path(name).is_file():
            choices = sorted(str(path) for path in Path(name).parent.glob("*.yaml"))
            _refuse(f"--config {name}: no such file{'; there are ' + ', '.join(choices) if choices else ''}.")
        try:
            content = yaml.safe_load(Path(name).read_text()) or {}
        except yaml.YAMLError as error:
            _refuse(f"{name} is not YAML: {' '.join(str(error).split())}.")
        if not isinstance(content, dict):
            _refuse(f"{name} must hold `key: value` lines, got {type(content).__name__}.")
        for key, value in flatten(content).items():
            if not value and any(field.startswith(f"{key}.") for field in fields):
                _refuse(f"the section {key} in {name} is empty; give it keys, or take its line out.")
            if key not in fields:
                _refuse_unknown("key", key, list(fields), f" in {name}")


def _files_first(arguments: list[str]) -> list[str]:
    """Return the arguments with `--config FILE` in front: a flag overrides the file wherever it stands."""
    is_file = [argument == "--config" or argument.startswith("--config=") for argument in arguments]
    is_name = [argument == "--config" for argument in ["", *arguments]]
    files = [a for a, flag, name in zip(arguments, is_file, is_name, strict=False) if flag or name]
    return files + [a for a, flag, name in zip(arguments, is_file, is_name, strict=False) if not (flag or name)]


def _program() -> str:
    """Return how this process was started, without its options: `python train.py`, `python -m fastdllm chat`."""
    module = vars(sys.modules["__main__"]).get("__spec__")
    script = Path(sys.argv[0]).name
    if module is None and script.endswith(".py"):
        return f"python {script}"
    started = f"python -m {module.name.removesuffix('.__main__')}" if module is not None else script
    has_command = module is None or module.name.endswith(".__main__")
    return " ".join([started, *(word for word in sys.argv[1:2] if has_command and not word.startswith("-"))])


def _refuse_unknown(kind: str, name: str, known: list[str], where: str = "") -> None:
    tails = {known_name.rsplit(".", 1)[-1].removeprefix("--"): known_name for known_name in known}
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    tail = difflib.get_close_matches(name.rsplit(".", 1)[-1].removeprefix("--"), tails, n=1, cutoff=0.6)
    suggestion = nearest[0] if nearest else tails[tail[0]] if tail else ""
    hint = f"did you mean {suggestion}?" if suggestion else "see --help for all of them."
    _refuse(f"unknown {kind} {name}{where}; {hint}")


def _refuse(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
