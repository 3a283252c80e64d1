"""The `streamserve` command: parses, delegates, and turns errors into one sentence and an exit code.

Owns verbs and exit codes: 0 done, 1 failed, 2 not understood, 130 interrupted. Everything slow is imported by the verb
that needs it, so that --help answers at once even where torch is broken.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from streamserve import __version__
from streamserve.config import Config
from streamserve.errors import ConfigError, StreamServeError
from streamserve.flags import Parser, UsageError, add_flags, human_int, read_config
from streamserve.resolve import check

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True, slots=True)
class Verb:
    """One thing the command does."""

    name: str
    help: str
    add_arguments: Callable[[Parser, bool], None]
    run: Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    wants_traceback = any(arguments[at : at + 2] == ["--log-level", "debug"] for at in range(len(arguments)))
    try:
        return _dispatch(arguments)
    except UsageError as error:
        return _failed(error, USAGE, wants_traceback)
    except StreamServeError as error:
        return _failed(error, USAGE if isinstance(error, ConfigError) else FAILED, wants_traceback)
    except BrokenPipeError:  # `streamserve generate | head`: what is still buffered goes nowhere, quietly
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as done:  # argparse after --help
        return int(done.code or 0)


def _dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        print(_overview())
        return OK
    if first in ("-V", "--version", "version"):
        print(f"streamserve {__version__}")
        return OK
    verb = next((verb for verb in VERBS if verb.name == first), None)
    if verb is None:
        near = get_close_matches(first, [verb.name for verb in VERBS], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(verb.name for verb in VERBS)}"
        raise UsageError(f"unknown command {first}; {hint}")
    rest = arguments[1:]
    show_all = "--help-all" in rest
    parser = Parser(f"streamserve {verb.name}", description=verb.help)
    parser.add_argument("--help-all", action="store_true", help="show every flag", default=argparse.SUPPRESS)
    verb.add_arguments(parser, show_all)
    return verb.run(parser.parse(["--help"] if show_all else rest))


def _failed(error: Exception, code: int, wants_traceback: bool) -> int:
    if wants_traceback:
        import traceback

        traceback.print_exception(error)
    print(f"streamserve: {error}", file=sys.stderr)
    return code


def _overview() -> str:
    verbs = "\n".join(f"  {verb.name:<10} {verb.help}" for verb in VERBS)
    return (
        "usage: streamserve COMMAND [arguments]\n\n"
        f"commands:\n{verbs}\n\n"
        "`streamserve COMMAND --help` shows the arguments of one; --version shows the version."
    )


# ---- verbs ----------------------------------------------------------------------------------------------------------


def _model_and_flags(parser: Parser, show_all: bool) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="same as --model-path")
    add_flags(parser, show_all=show_all)


def _config_of(namespace: argparse.Namespace) -> tuple[Config, frozenset[str]]:
    """Settings of a command line, checked, with MODEL taken in and logging set up."""
    from streamserve import log

    if getattr(namespace, "model", None) is not None:
        if getattr(namespace, "model_path", namespace.model) != namespace.model:
            raise UsageError(f"two models were given: {namespace.model} and --model-path {namespace.model_path}")
        namespace.model_path = namespace.model
    config, given = read_config(namespace)
    check(config)
    log.configure(config.server.log_level, config.server.log_format)
    return config, given


def _serve(namespace: argparse.Namespace) -> int:
    config, _ = _config_of(namespace)
    from streamserve.serve import run

    return run(config)


def _add_generate(parser: Parser, show_all: bool) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; without any, standard input is one")
    parser.add_argument("--input", metavar="FILE", help="JSON lines: bodies of chat or text completions; - is standard input")
    parser.add_argument("--output", metavar="FILE", help="where JSON lines of answers go (default standard output)")
    parser.add_argument("--raw", action="store_true", help="complete the prompts as they are, without the chat template")
    parser.add_argument("--max-tokens", type=human_int, metavar="N", help="longest answer, where a line does not say")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 takes the best token, where a line does not say")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of sampling, where a line does not say")
    add_flags(parser, show_all=show_all)


def _generate(namespace: argparse.Namespace) -> int:
    config, _ = _config_of(namespace)
    from streamserve.offline import run

    return run(config, namespace)


def _add_batch(parser: Parser, show_all: bool) -> None:
    parser.add_argument("input_file", metavar="IN", help="JSON lines: requests in OpenAI's batch format")
    parser.add_argument("output_file", metavar="OUT", help="where answers go, as they come; what it answers already is not asked")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="same as --model-path")
    parser.add_argument("--errors", metavar="FILE", help="where answers that are errors go, instead of OUT")
    add_flags(parser, show_all=show_all)


def _batch(namespace: argparse.Namespace) -> int:
    config, _ = _config_of(namespace)
    from streamserve.batch import run

    return run(config, namespace)


def _add_config(parser: Parser, show_all: bool) -> None:
    parser.add_argument("--explain", action="store_true", help="also read the model and say why each open value was chosen")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _model_and_flags(parser, show_all)


def _config(namespace: argparse.Namespace) -> int:
    config, given = _config_of(namespace)
    from streamserve.explain import run

    return run(config, given, explain=namespace.explain, as_json=namespace.json)


def _add_doctor(parser: Parser, show_all: bool) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, to paste into an issue")


def _doctor(namespace: argparse.Namespace) -> int:
    from streamserve.doctor import run

    return run(as_json=namespace.json)


def _add_run(parser: Parser, show_all: bool) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="same as --model-path; with --url the server's name for it")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="answer this and leave; - as MODEL is the default model")
    parser.add_argument("--url", metavar="URL", help="chat with a running server of OpenAI's API instead")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help="picture of the first message; repeatable")
    parser.add_argument("--max-tokens", type=human_int, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 takes the best token")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of sampling")
    parser.add_argument("--verbose", action="store_true", help="show how fast each answer was, and how much of it was cached")
    add_flags(parser, show_all=show_all)


def _run(namespace: argparse.Namespace) -> int:
    if namespace.model == "-":
        namespace.model = None
    if not hasattr(namespace, "log_level"):
        namespace.log_level = "error"  # what goes wrong is shown in the chat
    config, _ = _config_of(namespace)
    from streamserve.terminal.run import run

    return run(config, namespace)


def _add_bench(parser: Parser, show_all: bool) -> None:
    from streamserve.benchmark.options import add_options

    add_options(parser)


def _bench(namespace: argparse.Namespace) -> int:
    from streamserve.benchmark.options import BENCHES

    if namespace.bench is None:
        print("usage: streamserve bench BENCH [arguments]\n\nbenches:")
        print("\n".join(f"  {name:<10} {words}" for name, words in BENCHES.items()))
        return OK
    if namespace.bench not in BENCHES:
        raise UsageError(f"unknown bench {namespace.bench}; there are {', '.join(BENCHES)}")
    from streamserve.benchmark.serve import run

    return run(namespace)


VERBS = (
    Verb("serve", "serve a model over HTTP and WebSocket, with a playground at /", _model_and_flags, _serve),
    Verb("run", "chat in the terminal, with a model in this process or a running server", _add_run, _run),
    Verb("generate", "complete prompts offline: from arguments, standard input or JSON lines", _add_generate, _generate),
    Verb("batch", "answer a file of requests, in OpenAI's batch format; killed and run again it goes on", _add_batch, _batch),
    Verb("bench", "measure a running server: `bench serve`, against any server of OpenAI's API", _add_bench, _bench),
    Verb("config", "print the settings; with --explain the chosen values and why", _add_config, _config),
    Verb("doctor", "look at this machine and installation; say what to fix", _add_doctor, _doctor),
)
