"""The command line's flags, frozen: a new one is a reviewed change to this list, and there are fewer than 60."""

from streamserve.cli import VERBS
from streamserve.flags import Parser, settings

FLAGS = [
    "--admin-api-key",
    "--api-key",
    "--chat-template",
    "--chunked-prefill-size",
    "--context-length",
    "--cors-origins",
    "--deterministic",
    "--device",
    "--disable-cuda-graph",
    "--disable-playground",
    "--disable-radix-cache",
    "--drain-timeout-s",
    "--dtype",
    "--embedding-model",
    "--fake",
    "--fake-step-ms",
    "--host",
    "--keep-alive-s",
    "--load-format",
    "--log-format",
    "--log-level",
    "--log-requests",
    "--max-body-mb",
    "--max-decode-pause-ms",
    "--max-queued-requests",
    "--max-running-requests",
    "--max-total-tokens",
    "--media-hosts",
    "--mem-fraction-static",
    "--model-path",
    "--op",
    "--page-size",
    "--port",
    "--random-seed",
    "--reasoning-parser",
    "--request-timeout-s",
    "--response-store",
    "--resume-window-s",
    "--revision",
    "--sampling-defaults",
    "--schedule-policy",
    "--send-interval-ms",
    "--served-model-name",
    "--speculative",
    "--ssl-certfile",
    "--ssl-keyfile",
    "--threads",
    "--tokenizer-path",
    "--tool-call-parser",
    "--vision-model",
    "--write-timeout-s",
]


def _all_flags() -> set[str]:
    found: set[str] = set()
    for verb in VERBS:
        parser = Parser(verb.name)
        verb.add_arguments(parser, True)
        found |= {option for action in parser._actions for option in action.option_strings[:1] if option != "-h"}
    return found


def test_the_settings_flags_are_these() -> None:
    assert sorted(setting.flag for setting in settings()) == FLAGS


def test_there_are_fewer_than_sixty_flags_over_all_commands() -> None:
    assert len(FLAGS) < len(_all_flags()) < 60


def test_every_setting_explains_itself() -> None:
    assert [setting.flag for setting in settings() if not setting.field.metadata.get("help", "").strip()] == []


def test_the_help_shows_about_fifteen_flags() -> None:
    assert 8 <= len([setting for setting in settings() if setting.is_common]) <= 18
